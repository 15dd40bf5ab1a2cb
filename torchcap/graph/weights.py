"""Weights of layers: on which axis a layer writes its channels, and how often it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torchcap.graph.spaces import LayerCall

TRANSPOSED_CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def output_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight that its outputs lie on; on the other lie its inputs.

    It is the first, but for a transposed convolution: ``(in, out / groups, …)``.
    """
    return 1 if isinstance(layer, TRANSPOSED_CONVOLUTIONS) else 0


def layer_calls(
    path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Iterator[LayerCall]:
    """Yield what one call of a layer of that name has done.

    Args:
        path: its qualified name.
        layer: a convolution or linear layer, or ``nn.MultiheadAttention``, which holds linear
            layers that it does not call.
        args: what it was given by position.
        kwargs: what it was given by name.
        output: what it put out.
    """
    if isinstance(layer, nn.MultiheadAttention):
        named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        yield from _attention_calls(path, layer, *(named[n] for n in ("query", "key", "value")))
    elif isinstance(output, Tensor):
        yield _layer_call(path, layer, layer_input(args, kwargs), output)


def _attention_calls(
    path: str, layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> Iterator[LayerCall]:
    """Yield the projections of an attention; its products of queries, keys and values are none."""
    width = layer.embed_dim
    counts = [x.numel() // x.shape[-1] for x in (query, key, value)]
    if layer._qkv_same_embed_dim:  # one weight for all three
        yield LayerCall(path, sum(counts), (width, width), sum(counts))
    else:
        for name, x, count in zip("qkv", (query, key, value), counts, strict=True):
            yield LayerCall(f"{path}.{name}_proj", count, (width, x.shape[-1]), count)
    yield LayerCall(f"{path}.out_proj", counts[0], (width, width), counts[0])


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a layer reads, which may be given by place or by name."""
    if args:
        return args[0]
    return kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))


def _layer_call(path: str, layer: nn.Module, x: Tensor, output: Tensor) -> LayerCall:
    shape = tuple(getattr(layer, "weight").shape)  # noqa: B009 - of no known type
    axis = output_axis(layer)
    written = output.numel() // shape[axis]
    positions = written if axis == 0 else x.numel() // shape[0]
    return LayerCall(path, positions, shape, written, axis)
