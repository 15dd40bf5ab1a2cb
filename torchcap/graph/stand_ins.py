"""What runs in place of some modules while a forward is recorded.

Fake tensors take norms and recurrent layers apart into many operators, which would be most of the
time of a reading; what is wanted of them are the shapes alone. On real tensors large layers would
be, and what is wanted of them are values as random weights would give them.
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
"""What runs on fake tensors."""


_MOST_COMPUTED = 10**8
"""Multiply-adds of a layer up to which it is computed."""


def _noise(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return noise of the size that a layer's output has, if computing that would take long."""
    weight: Any = layer.weight
    twin = object.__new__(type(layer))
    held = {n: p if p is None else nn.Parameter(p.to("meta")) for n, p in layer._parameters.items()}
    vars(twin).update({**vars(layer), "_parameters": held})
    shape = type(layer).forward(twin, x.to("meta"), *args, **kwargs).shape
    outputs = int(getattr(layer, "out_channels", 0) or weight.shape[0])
    each = weight.numel() // outputs  # inputs of one output, or nearly so
    if shape.numel() * each <= _MOST_COMPUTED:
        return type(layer).forward(layer, x, *args, **kwargs)
    generator = torch.Generator(x.device).manual_seed(shape.numel())
    some = torch.randn(2**16 + 1, generator=generator, device=x.device)
    scale = (weight.float().square().mean() * x.float().square().mean() * each).sqrt()
    noise = (scale * some).to(x.dtype)
    return noise.repeat(shape.numel() // len(noise) + 1)[: shape.numel()].view(shape)


NOISE: Mapping[type[nn.Module], Callable[..., Any]] = dict.fromkeys(
    (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), _noise
)
"""What runs on real tensors."""


_MOST_BOXES = 2000
"""Boxes up to which those that overlap are looked for, in a time that grows with their square."""


def _kept(suppress: Callable[..., Any], boxes: Tensor, scores: Tensor, threshold: float) -> Any:
    """Return what is kept of many boxes if none of them overlap, the best first."""
    if len(boxes) <= _MOST_BOXES:
        return suppress(boxes, scores, threshold)
    return scores.argsort(descending=True)


OPERATORS: Mapping[str, Callable[..., Any]] = {"torchvision.nms.default": _kept}
"""What runs in place of operators on real tensors; it is given the operator, too."""
