"""Weights of layers: on which axis a layer writes its channels, and how often it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
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
        yield _layer_call(path, layer, output)


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


def _layer_call(path: str, layer: nn.Module, output: Tensor) -> LayerCall:
    shape = tuple(getattr(layer, "weight").shape)  # noqa: B009 - of no known type
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        written = output.numel() // shape[0]
        return LayerCall(path, written, shape, written)
    places = tuple(output.shape[output.dim() - len(layer.kernel_size) :])
    images = output.numel() // (layer.out_channels * prod(places))
    positions = images * prod(_places_read(layer, places))
    return LayerCall(path, positions, shape, output.numel() // shape[1], output_axis(layer))


def _places_read(
    layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, written: tuple[int, ...]
) -> list[int]:
    """Return the height and width of the image that a transposed convolution has read."""
    found = []
    for n, kernel, stride, padding, dilation, extra in zip(
        written,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.output_padding,
        strict=True,
    ):
        smallest = dilation * (kernel - 1) + 1 - 2 * int(padding)
        # A call may ask for another size, but for less than a stride more.
        found.append((n - smallest - (extra if extra >= stride else 0)) // stride + 1)
    return found
