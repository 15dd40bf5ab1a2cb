"""A forward that is watched: which modules run, on what, and who reads their tensors.

Where a forward cannot be traced, running it still shows what its submodules are given, so that they
can be traced one by one; and whether something goes past them, so that they may not be changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from torchcap.graph.sizes import Place, reads_noted

_SHOWS_NO_VALUE = {Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__}  # type: ignore[attr-defined]


class Run(NamedTuple):
    """One call of a module.

    Attributes:
        path: qualified name of the module.
        args: what it was given by position.
        kwargs: what it was given by name.
        output: what it gave.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


@dataclass(slots=True)
class Watched:
    """What one forward has shown.

    Attributes:
        inputs: positional and named arguments of the first call of each module.
        ran: every call, in the order in which they ended; tensors are on the meta device.
        callers: module -> the modules that were running when it was called.
        reads: attribute of a module -> the modules that were running when it was read.
        read_by_others: module -> another one that ran while a tensor of the first was read.
    """

    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    ran: list[Run] = field(default_factory=list)
    callers: dict[str, set[str]] = field(default_factory=dict)
    read_by_others: dict[str, str] = field(default_factory=dict)
    reads: dict[Place, set[str]] = field(default_factory=dict)


@torch.no_grad()
def watch_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Watched:
    """Run a model once, in the mode that it is in, and note what happens inside.

    Args:
        model: a copy that may be hooked.
        args: of its forward, by position.
        kwargs: of its forward, by name.
    """
    watched = Watched()
    running: list[str] = []

    def note(place: Place) -> None:
        watched.reads.setdefault(place, set()).add(running[-1] if running else "")

    with (
        _hooked(model, watched, running),
        _TensorReads(model, watched, running),
        reads_noted(model, note),
    ):
        model(*args, **kwargs)
    return watched


@contextlib.contextmanager
def _hooked(model: nn.Module, watched: Watched, running: list[str]) -> Iterator[None]:
    handles = []
    for path, module in model.named_modules():
        start, end = partial(_start, path, watched, running), partial(_end, path, watched, running)
        handles += [
            module.register_forward_pre_hook(start, with_kwargs=True),
            module.register_forward_hook(end, with_kwargs=True, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _start(
    path: str,
    watched: Watched,
    running: list[str],
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    watched.inputs.setdefault(path, (args, dict(kwargs)))
    watched.callers.setdefault(path, set()).update(running[-1:])
    running.append(path)


def _end(
    path: str,
    watched: Watched,
    running: list[str],
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    running.pop()
    watched.ran.append(Run(path, *tree_map(_on_meta, (args, kwargs, output))))


def _on_meta(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


class _TensorReads(TorchFunctionMode):
    """Notes tensors of modules that are read while another module runs."""

    def __init__(self, model: nn.Module, watched: Watched, running: list[str]) -> None:
        super().__init__()
        self.watched, self.running = watched, running
        self.owners: dict[int, str] = {}
        for path, module in model.named_modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self.owners.setdefault(id(tensor), path)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in _SHOWS_NO_VALUE:
            for value in tree_leaves((args, kwargs)):
                owner = self.owners.get(id(value)) if isinstance(value, Tensor) else None
                here = self.running[-1] if self.running else ""
                if owner is not None and owner != here:
                    self.watched.read_by_others.setdefault(owner, here)
        return func(*args, **(kwargs or {}))
