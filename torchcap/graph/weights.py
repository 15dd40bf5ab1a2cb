"""Weights of layers: on which axis a layer writes its channels, and how often it runs."""

from __future__ import annotations

from math import prod

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


def layer_call(path: str, layer: nn.Module, output: Tensor) -> LayerCall:
    """Return what a convolution or linear layer of that name did to put out a tensor."""
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
