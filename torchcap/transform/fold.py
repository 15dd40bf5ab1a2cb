"""Folding: batch norms and weight standardisation become part of the layer they act on.

Between a convolution and its reader then stands one pointwise function, the same for all channels,
and a projection may mix them. Statistics are those of evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor, nn

from torchcap.graph.rules import STANDARDIZED
from torchcap.graph.spaces import Fold
from torchcap.graph.weights import output_axis


@torch.no_grad()
def fold_(model: nn.Module, folds: Sequence[Fold]) -> None:
    """Fold norms into layers, in place, computing in float64.

    A folded ``BatchNorm2d`` leaves an ``nn.Identity`` behind, timm's ``BatchNormAct2d`` its
    activation; a weight-standardised convolution becomes a plain one.
    """
    for fold in folds:
        layer = model.get_submodule(fold.layer)
        if isinstance(layer, STANDARDIZED):
            replace_(model, fold.layer, plain_convolution(layer))
        if fold.norm is not None:
            norm = model.get_submodule(fold.norm)
            weight, bias = absorb(layer, norm)
            old: Any = layer.weight
            own: Any = layer.bias if isinstance(layer.bias, nn.Parameter) else old
            layer.weight, layer.bias = _like(old, weight), _like(own, bias)
            replace_(model, fold.norm, remainder(norm))


def absorb(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weight and bias, in float64, of a layer that also does what its norm does."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)  # noqa: S101 - the reading has checked it
    variance = _tensor(norm, "running_var", 1.0, weight)  # folded norms have statistics
    scale = torch.rsqrt(variance + float(norm.eps))  # type: ignore[arg-type]
    scale = scale * _tensor(norm, "weight", 1.0, weight)
    shift = _tensor(norm, "bias", 0.0, weight) - _tensor(norm, "running_mean", 0.0, weight) * scale
    if isinstance(bias, Tensor):
        shift = shift + bias.double() * scale
    axis = output_axis(layer)
    wide = scale.reshape(*(-1 if d == axis else 1 for d in range(weight.dim())))
    return weight.double() * wide, shift


def _tensor(norm: nn.Module, name: str, default: float, like: Tensor) -> Tensor:
    value = getattr(norm, name, None)
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.full((), default, dtype=torch.float64, device=like.device)


def _like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Return a parameter of the old one's dtype, strides and ``requires_grad``."""
    new = torch.empty_like(old) if value.shape == old.shape else old.new_empty(value.shape)
    return nn.Parameter(new.copy_(value), requires_grad=old.requires_grad)


def remainder(norm: nn.Module) -> nn.Module:
    """Return what a norm does besides its affine map: timm's norms hold an activation."""
    parts = [getattr(norm, name, None) for name in ("drop", "act")]
    kept = [p for p in parts if isinstance(p, nn.Module) and not isinstance(p, nn.Identity)]
    rest = nn.Identity() if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)
    return rest.train(norm.training)


def plain_convolution(layer: nn.Module) -> nn.Conv2d:
    """Return a convolution that holds the standardised weight of another."""
    assert isinstance(layer, nn.Conv2d)  # noqa: S101 - the reading has checked it
    gain = None
    if isinstance(layer, ScaledStdConv2d | ScaledStdConv2dSame):
        gain = (layer.gain.double() * layer.scale).flatten()
    weight = F.batch_norm(
        layer.weight.double().reshape(1, layer.out_channels, -1),
        None,
        None,
        weight=gain,
        training=True,
        momentum=0.0,
        eps=float(layer.eps),  # type: ignore[arg-type]
    ).reshape(layer.weight.shape)
    kind = Conv2dSame if getattr(layer, "same_pad", False) else nn.Conv2d
    plain = kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        groups=layer.groups,
        bias=layer.bias is not None,
        device="meta",
    )
    plain.weight = _like(layer.weight, weight)  # type: ignore[arg-type]
    plain.bias = layer.bias
    plain.train(layer.training)
    return plain


def replace_(model: nn.Module, path: str, module: nn.Module) -> None:
    """Let a module of a model become another one, in place; it keeps its hooks.

    It stays the same object: a forward may reach it in other ways than by its name, through a list
    of layers or a closure.
    """
    old = model.get_submodule(path)
    kept = {name: value for name, value in vars(old).items() if name in _HOOKS}
    held = {**vars(module), **kept}
    old.__class__ = type(module)
    vars(old).clear()
    vars(old).update(held)


_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)
