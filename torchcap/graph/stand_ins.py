"""What runs in place of some modules while a forward is recorded on fake tensors.

Fake tensors take norms and recurrent layers apart into many operators, which would be most of the
time of a reading; what is wanted of them are the shapes alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

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
    """Keep the transformers of ``torch.nn`` to the operators that they are made of, for a while."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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


SHAPES: Mapping[type[nn.Module], Callable[..., Any]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d), _normed),
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), _remembered),
}
