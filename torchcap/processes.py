"""Processes of ``torch.distributed``: alone, every function here does nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if count() > 1:
        moved = _reachable(tensor)
        dist.all_reduce(moved)
        tensor.copy_(moved)
    return tensor


def mean_(tensor: Tensor) -> Tensor:
    """Average a tensor over all processes, in place, and return it."""
    return sum_(tensor).div_(count()) if count() > 1 else tensor


def smallest(number: int) -> int:
    """Return the smallest of all processes' numbers."""
    if count() == 1:
        return number
    shared = _reachable(torch.tensor(number))
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)


def shared(tensor: Tensor) -> Tensor:
    """Return the first process's tensor."""
    if count() == 1:
        return tensor
    moved = _reachable(tensor).contiguous()
    dist.broadcast(moved, src=0)
    return moved.to(tensor.device)


def shared_text(text: str) -> str:
    """Return the first process's text."""
    texts = [text]
    if count() > 1:
        dist.broadcast_object_list(texts, src=0)
    return texts[0]


def _reachable(tensor: Tensor) -> Tensor:
    """Return the tensor where the backend can read it: NCCL moves device memory only."""
    if dist.get_backend() == "nccl" and not tensor.is_cuda:
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor
