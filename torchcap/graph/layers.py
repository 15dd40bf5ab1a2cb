"""Rules of layers that own parameters: convolutions, linear layers, norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from torchcap.graph.channels import Ids
from torchcap.graph.operators import pointwise
from torchcap.graph.sizes import Place
from torchcap.graph.values import Call, Channels, Opaque, Value
from torchcap.graph.weights import output_axis

# --------------------------------------------------------------------------------------------------
# Layers that write and read channels


def convolution(call: Call) -> Value:
    """A convolution: grouped, depthwise or dense, over one to three dimensions."""
    layer = call.module
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)  # noqa: S101 - from the table
    x = call.argument(0, "input")
    if not call.plain("weight", "bias", "gain"):
        return call.give_up(f"the weight of {call.label} is already parametrized")
    dim = len(call.shape) - layer.weight.dim() + 1
    if isinstance(x, Channels) and x.dim != dim:
        return call.give_up(f"{call.label} convolves along the channels")
    if isinstance(x, Channels) and layer.groups == layer.in_channels > 1:
        return _depthwise(call, layer, x)
    reading = call.table.axis(
        call.path, [("weight", 1)], "consumer", layer.in_channels, layer.groups
    )
    _read(call, x, reading)
    writing = _written(call, layer, layer.out_channels)
    if layer.groups > 1:
        why = f"does not fall evenly into the {layer.groups} groups of {call.label}"
        call.table.balance(reading.reshape(layer.groups, -1), why)
        call.table.balance(writing.reshape(layer.groups, -1), why)
    return Channels(call.shape, dim, writing)


def _depthwise(call: Call, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Channels) -> Value:
    tensors = [(n, 0) for n in ("weight", "bias", "gain") if call.has(n)]
    ids = call.table.axis(call.path, tensors, "carrier", layer.out_channels)
    call.table.join(ids, np.repeat(x.ids, layer.out_channels // layer.in_channels))
    call.select(ids, f"depthwise convolution {call.path!r}")
    return Channels(call.shape, x.dim, ids)


def transposed_convolution(call: Call) -> Value:
    """A transposed convolution, over one to three dimensions: a convolution run backwards."""
    layer = call.module
    assert isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)  # noqa: S101 - from the table
    x = call.argument(0, "input")
    if not call.plain("weight", "bias"):
        return call.give_up(f"the weight of {call.label} is already parametrized")
    if layer.groups > 1:
        return call.give_up(f"{call.label} is a transposed convolution with groups")
    dim = len(call.shape) - layer.weight.dim() + 1
    if isinstance(x, Channels) and x.dim != dim:
        return call.give_up(f"{call.label} convolves along the channels")
    if isinstance(x, Channels) and len(np.unique(x.ids)) < len(x.ids):
        return call.give_up(f"{call.label} reads a channel several times")
    _read(call, x, call.table.axis(call.path, [("weight", 0)], "consumer", layer.in_channels))
    return Channels(call.shape, dim, _written(call, layer, layer.out_channels))


def linear(call: Call) -> Value:
    """A linear layer over the last dimension."""
    layer = call.module
    assert isinstance(layer, nn.Linear)  # noqa: S101 - from the table
    x = call.argument(0, "input")
    if not call.plain("weight", "bias"):
        return call.give_up(f"the weight of {call.label} is already parametrized")
    reading = call.table.axis(call.path, [("weight", 1)], "consumer", layer.in_features)
    writing = _written(call, layer, layer.out_features)
    mixes = f"{call.label} mixes another dimension than the channels"
    if isinstance(x, Channels) and x.dim != len(x.shape) - 1 and call.path in call.table.across:
        call.fix(x.ids, mixes)
        x = Opaque(x.shape)  # what it writes is followed instead
    if isinstance(x, Channels) and x.dim != len(x.shape) - 1:
        # It mixes positions, of which there are as many as ever; each channel by itself.
        for ids in (reading, writing):
            call.fix(ids, mixes)
        known = call.table.beside.setdefault(call.path, x.ids)
        if not np.array_equal(known, x.ids):  # called for other channels too
            return call.give_up(f"{call.label} mixes another dimension of several spaces")
        if layer.bias is not None:
            call.table.bend(x.ids)  # a term that is one for all channels commutes with no rotation
        return call.like(x)
    _read(call, x, reading)
    return Channels(call.shape, len(call.shape) - 1, writing)


def conv_mlp(call: Call) -> Value:
    """Timm's ``ConvMlp``, the head of its VGGs: two convolutions, each with an activation.

    It is read as one operator, because it branches on the size of its input.
    """
    x = call.argument(0, "x")
    batch, _, *positions = call.shape
    for name in ("fc1", "act1", "drop", "fc2", "act2"):
        child = getattr(call.module, name)
        width = getattr(child, "out_channels", x.shape[1])
        x = call.inside(name, x, (batch, width, *positions))
    return x


def _read(call: Call, x: Value, reading: Ids) -> None:
    if isinstance(x, Channels):
        call.table.join(reading, x.ids)
    else:
        call.fix(reading, f"{call.label} reads a tensor whose channels are not followed")


def _written(call: Call, layer: nn.Module, count: int) -> Ids:
    others = [(name, 0) for name in ("bias", "gain") if call.has(name)]
    tensors = [("weight", output_axis(layer)), *others]
    return call.table.axis(call.path, tensors, "producer", count)


# --------------------------------------------------------------------------------------------------
# Layers that act on each channel alone, with parameters of their own


def batch_norm(call: Call) -> Value:
    """Batch normalisation, with the activation that timm puts into it."""
    x = call.argument(0, "input")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    names = ("weight", "bias", "running_mean", "running_var")
    if x.dim != 1 or not call.plain(*names):
        return call.give_up(f"{call.label} does not normalise along the channels")
    if not _act_is_pointwise(call):
        return call.give_up(f"the activation inside {call.label} has no rule")
    _carry(call, x, names, 0, None if call.folded else f"per-channel affine of {call.path!r}")
    return call.like(x)


def _act_is_pointwise(call: Call) -> bool:
    """Bend the channels if the norm has an activation inside; whether it is one with a rule."""
    for name in ("drop", "act"):
        inner = getattr(call.module, name, None)
        operator = call.operator_of(inner) if isinstance(inner, nn.Module) else None
        kind = None if operator is None else operator.kind
        if kind == "pointwise":
            for x in call.followed():
                call.table.bend(x.ids)
        elif inner is not None and kind != "unchanged":
            return False
    return True


def layer_norm(call: Call) -> Value:
    """Layer normalisation over the last dimension, or root mean square normalisation."""
    return _norm_over_channels(call, len(call.shape) - 1)


def layer_norm_2d(call: Call) -> Value:
    """Layer normalisation over the channels of an image."""
    return _norm_over_channels(call, 1)


def _norm_over_channels(call: Call, dim: int) -> Value:
    x = call.argument(0, "input")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    shape = getattr(call.module, "normalized_shape", ())
    if x.dim != dim or len(shape) != 1 or not call.plain("weight", "bias"):
        return call.give_up(f"{call.label} does not normalise over the channels alone")
    if not call.has("weight"):
        return call.give_up(f"{call.label} counts its channels, and has no weight that shows them")
    if not _act_is_pointwise(call):
        return call.give_up(f"the activation inside {call.label} has no rule")
    _carry(call, x, ("weight", "bias"), 0, f"norm over channels {call.path!r}")
    return call.like(x)


def global_response_norm(call: Call) -> Value:
    """Global response normalisation (ConvNeXt V2): each channel by its share of all of them."""
    x = call.argument(0, "x")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    dim: int = call.module.channel_dim  # type: ignore[assignment, union-attr]
    if x.dim != dim % len(x.shape) or not call.plain("weight", "bias"):
        return call.give_up(f"{call.label} does not normalise over the channels alone")
    _carry(call, x, ("weight", "bias"), 0, f"norm over channels {call.path!r}")
    return call.like(x)


def group_norm(call: Call) -> Value:
    """Group normalisation: channels may be dropped, as many from each group."""
    layer = call.module
    assert isinstance(layer, nn.GroupNorm)  # noqa: S101 - from the table
    x = call.argument(0, "input")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    if x.dim != 1 or not call.plain("weight", "bias"):
        return call.give_up(f"{call.label} does not normalise along the channels")
    if not _act_is_pointwise(call):
        return call.give_up(f"the activation inside {call.label} has no rule")
    if layer.num_groups == len(x.ids):  # each channel by itself
        _carry(call, x, ("weight", "bias"), 0, f"per-channel affine of {call.path!r}")
        _counts(call, "num_groups", x)
        call.table.bend(x.ids)
        return call.like(x)
    _carry(call, x, ("weight", "bias"), 0, f"group norm {call.path!r}")
    call.select(x.ids, f"group norm {call.path!r}")
    pieces = x.ids.reshape(layer.num_groups, -1)
    call.table.balance(pieces, f"does not fall evenly into the groups of {call.label}")
    return call.like(x)


def instance_norm(call: Call) -> Value:
    """Instance normalisation: each channel by its own statistics, or by those that it stores."""
    layer, x = call.module, call.argument(0, "input")
    positions = next(n for kind, n in _INSTANCE_NORMS.items() if isinstance(layer, kind))
    names = ("weight", "bias", "running_mean", "running_var")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    if x.dim != len(x.shape) - positions - 1 or not call.plain(*names):
        return call.give_up(f"{call.label} does not normalise along the channels")
    if any(call.has(name) for name in names):
        _carry(call, x, names, 0, f"per-channel affine of {call.path!r}")
    elif not _counts(call, "num_features", x):
        return call.give_up(f"{call.label} was made for another number of channels")
    call.table.bend(x.ids)
    return call.like(x)


_INSTANCE_NORMS: Mapping[type[nn.Module], int] = {
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 2,
    nn.InstanceNorm3d: 3,
}


def response_norm(call: Call) -> Value:
    """Timm's filter response norms and EvoNorms: statistics of each channel, or of groups."""
    x = call.argument(0, "x")
    names = ("weight", "bias", "tau", "v", "running_var")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    if x.dim != 1 or not call.plain(*names):
        return call.give_up(f"{call.label} does not normalise along the channels")
    if not _act_is_pointwise(call):
        return call.give_up(f"the activation inside {call.label} has no rule")
    _carry(call, x, names, 0, f"per-channel affine of {call.path!r}")
    call.table.bend(x.ids)
    groups = getattr(call.module, "groups", None)
    if isinstance(groups, int):
        pieces = x.ids.reshape(groups, -1)
        call.table.balance(pieces, f"does not fall evenly into the groups of {call.label}")
    return call.like(x)


def blur_pool(call: Call) -> Value:
    """Timm's ``BlurPool2d``: one filter for all channels, unless it stores one for each."""
    x = call.argument(0, "x")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    if x.dim != 1:
        return call.give_up(f"{call.label} acts along the channels")
    if not call.plain("filt"):
        return call.give_up(call.unexpected)
    if getattr(call.module, "channels", None) is not None:
        _carry(call, x, ("filt",), 0, f"a filter for each channel in {call.path!r}")
        if not _counts(call, "channels", x):
            return call.give_up(call.unexpected)
    return call.like(x)


def prelu(call: Call) -> Value:
    """A PReLU, whose slope may be one for all channels or one for each."""
    x = call.argument(0, "input")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    weight = getattr(call.module, "weight", None)
    if weight is None or weight.numel() == 1:
        return pointwise(call)
    if x.dim != 1 or not call.plain("weight"):
        return call.give_up(f"{call.label} does not act along the channels")
    _carry(call, x, ("weight",), 0, f"per-channel slope of {call.path!r}")
    return call.like(x)


def _counts(call: Call, name: str, x: Channels) -> bool:
    """Let an attribute follow the number of channels; whether it is that number."""
    if getattr(call.module, name) != len(x.ids):
        return False
    call.table.bind((Place(call.path, name),), x.ids[None])
    return True


def _carry(call: Call, x: Channels, names: Sequence[str], axis: int, select: str | None) -> None:
    tensors = [(name, axis) for name in names if call.has(name)]
    if tensors:
        ids = call.table.axis(call.path, tensors, "carrier", len(x.ids))
        call.table.join(ids, x.ids)
    if select is not None:
        call.select(x.ids, select)
