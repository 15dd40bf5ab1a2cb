"""What runs in place of some modules while a model is traced, and while its shapes are found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn

TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules of ``torch.nn`` that are made of others, and are read like those of a user."""


@contextlib.contextmanager
def plain_transformers() -> Iterator[None]:
    """Keep the transformers of ``torch.nn`` to the operators that they are made of, for a while.

    What turns their masks into numbers looks at dtypes; it becomes one operator.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    canonical = F._canonical_mask
    torch.backends.mha.set_fastpath_enabled(False)
    F._canonical_mask = partial(_mask_as_operator, canonical)
    try:
        yield
    finally:
        F._canonical_mask = canonical
        torch.backends.mha.set_fastpath_enabled(before)


def _mask_as_operator(canonical: Callable[..., Any], mask: Any, **options: Any) -> Any:
    if not isinstance(mask, fx.Proxy):
        return canonical(mask, **options)
    return mask.tracer.create_proxy("call_function", canonical, (mask,), options)


@contextlib.contextmanager
def shapes_alone(model: nn.Module) -> Iterator[None]:
    """Let norms and recurrent layers give tensors of the right shape, and no more, for a while.

    Fake tensors take them apart into many operators, which is most of the time of a reading.
    """
    changed = []
    for module in model.modules():
        forward = _SHAPES.get(type(module))
        if forward is not None and "forward" not in vars(module):  # as a user may have put there
            module.forward = partial(forward, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _normed(norm: nn.Module, *args: Tensor, **kwargs: Tensor) -> Any:
    (x,) = args or kwargs.values()
    kept: Any = torch.empty_like(x)
    for name in ("drop", "act"):  # those of timm hold more
        inner = getattr(norm, name, None)
        kept = kept if inner is None else inner(kept)
    return kept


def _remembered(layer: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    if not isinstance(x, Tensor):  # packed sequences
        return type(layer).forward(layer, *args, **kwargs)
    directions = 2 if layer.bidirectional else 1
    width = layer.proj_size or layer.hidden_size
    output = x.new_empty(*x.shape[:-1], directions * width)
    images = () if x.dim() == 2 else (x.shape[0 if layer.batch_first else 1],)
    hidden, cell = (
        x.new_empty(directions * layer.num_layers, *images, size)
        for size in (width, layer.hidden_size)
    )
    return output, ((hidden, cell) if isinstance(layer, nn.LSTM) else hidden)


_SHAPES: Mapping[type[nn.Module], Callable[..., Any]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d), _normed),
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), _remembered),
}
