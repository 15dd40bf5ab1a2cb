"""Digests: whether tensors are those that were there before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor], words: Any = None) -> str:
    """Return the SHA-256 of tensors (names, dtypes, shapes, bytes) and of what JSON can hold.

    Saved files hold it: what goes into it is part of their format, and changes with its version
    alone.
    """
    total = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
