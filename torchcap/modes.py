"""What public calls do before anything else: they leave inference mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run outside of ``torch.inference_mode``, wherever it is called.

    What it makes can then be trained, and what it has to train it can.
    """

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(mode=False):
            return function(*args, **kwargs)

    return called
