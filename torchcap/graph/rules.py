"""Operator rules: what each operator does to the channels of the tensors it reads.

A rule is a function ``rule(call) -> value``. It sees the operator's arguments as abstract values
(:class:`Channels` for a tensor whose channels are followed, :class:`Opaque` for any other tensor,
:class:`Extent` for a size that follows channels, plain Python for the rest) and answers with the
abstract value of the result, joining, fixing or restricting channels on the way.

``RULES`` maps a module class, a function or a method name to its rule. A class that inherits the
``forward`` of one in the table has the same rule. **An operator without a rule is a boundary**:
every channel that enters it stays as it is, and what comes out of it is opaque.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm.layers as tl
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import norm as timm_norm
from timm.layers import std_conv
from timm.layers.linear import Linear as TimmLinear
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from torchcap.graph.channels import ChannelTable, Ids

# --------------------------------------------------------------------------------------------------
# Abstract values


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A tensor whose channels are not followed: they never change."""

    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """A tensor whose channels are followed along one dimension.

    Attributes:
        shape: the shape with the example inputs.
        dim: the dimension that holds the channels.
        ids: the identity of each entry along ``dim``, shape ``(shape[dim],)``.
    """

    shape: tuple[int, ...]
    dim: int
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """An integer of the traced program that is the number of some followed channels."""

    ids: Ids


Value = Any
Rule = Callable[["Call"], Value]


def flat(value: Value) -> Iterator[Value]:
    """Iterate over the leaves of a nested value."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from flat(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from flat(item)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def opaque(result: Any) -> Value:
    """Return the opaque counterpart of a concrete (fake) result."""
    if isinstance(result, Tensor):
        return Opaque(tuple(result.shape))
    if isinstance(result, Mapping):
        return {key: opaque(item) for key, item in result.items()}
    if isinstance(result, tuple | list):
        return tuple(opaque(item) for item in result)
    return result


# --------------------------------------------------------------------------------------------------
# What a rule works with


@dataclass(slots=True)
class Call:
    """One operator of the graph, as its rule sees it.

    Attributes:
        node: the FX node.
        args, kwargs: abstract values of the arguments.
        result: the concrete result on the example inputs (fake tensors).
        module, path: the module that is called and its qualified name, for a module call.
        table: where channels are joined, fixed and restricted.
        folded: whether this is a normalisation that will be folded into the layer before it.
    """

    node: fx.Node
    args: tuple[Value, ...]
    kwargs: Mapping[str, Value]
    result: Any
    module: nn.Module | None
    path: str
    table: ChannelTable
    folded: bool = False

    @property
    def label(self) -> str:
        """How messages name this operator."""
        target = self.path if self.module is not None else _function_name(self.node.target)
        return (
            f"{target!r}" if self.module is None else f"{target!r} ({type(self.module).__name__})"
        )

    @property
    def unexpected(self) -> str:
        """The reason of a rule that finds arguments which it was not made for."""
        return f"{self.label} has arguments that its rule does not know"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(self.result.shape)

    def argument(self, index: int, name: str, default: Value = None) -> Value:
        """Return an argument by position or name."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def followed(self) -> list[Channels]:
        """Return the tensors among the arguments whose channels are followed."""
        return [v for v in flat((self.args, self.kwargs)) if isinstance(v, Channels)]

    def like(self, x: Channels, dim: int | None = None) -> Channels:
        """Return the result as a tensor with the channels of ``x``."""
        return Channels(self.shape, x.dim if dim is None else dim, x.ids)

    def give_up(self, reason: str) -> Value:
        """Fix every channel that enters this operator, and return an opaque result."""
        for value in flat((self.args, self.kwargs)):
            if isinstance(value, Channels | Extent):
                self.table.fix(value.ids, reason)
        return opaque(self.result)

    def has(self, name: str) -> bool:
        """Whether the module has a tensor of this name."""
        return isinstance(getattr(self.module, name, None), Tensor)

    def plain(self, *names: str) -> bool:
        """Whether the named tensors are ordinary parameters or buffers of the module, or absent."""
        module = self.module
        if module is None or parametrize.is_parametrized(module):
            return False
        held = {**module._parameters, **module._buffers}
        return all(getattr(module, n, None) is None or held.get(n) is not None for n in names)


def _function_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


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
    writing = _written(call, layer.out_channels)
    if layer.groups > 1:
        why = f"does not fall evenly into the {layer.groups} groups of {call.label}"
        call.table.balance(reading.reshape(layer.groups, -1), why)
        call.table.balance(writing.reshape(layer.groups, -1), why)
    return Channels(call.shape, dim, writing)


def _depthwise(call: Call, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Channels) -> Value:
    tensors = [(n, 0) for n in ("weight", "bias", "gain") if call.has(n)]
    ids = call.table.axis(call.path, tensors, "carrier", layer.out_channels)
    call.table.join(ids, np.repeat(x.ids, layer.out_channels // layer.in_channels))
    call.table.select(ids, f"depthwise convolution {call.path!r}")
    return Channels(call.shape, x.dim, ids)


def linear(call: Call) -> Value:
    """A linear layer over the last dimension."""
    layer = call.module
    assert isinstance(layer, nn.Linear)  # noqa: S101 - from the table
    x = call.argument(0, "input")
    if not call.plain("weight", "bias"):
        return call.give_up(f"the weight of {call.label} is already parametrized")
    if isinstance(x, Channels) and x.dim != len(x.shape) - 1:
        return call.give_up(f"{call.label} mixes another dimension than the channels")
    _read(call, x, call.table.axis(call.path, [("weight", 1)], "consumer", layer.in_features))
    return Channels(call.shape, len(call.shape) - 1, _written(call, layer.out_features))


def _read(call: Call, x: Value, reading: Ids) -> None:
    if isinstance(x, Channels):
        call.table.join(reading, x.ids)
    else:
        call.table.fix(reading, f"{call.label} reads a tensor whose channels are not followed")


def _written(call: Call, count: int) -> Ids:
    tensors = [(name, 0) for name in ("weight", "bias", "gain") if call.has(name)]
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
        rule = find_module_rule(inner, RULES) if isinstance(inner, nn.Module) else None
        if rule is pointwise:
            for x in call.followed():
                call.table.bend(x.ids)
        elif inner is not None and rule is not unchanged:
            return False
    return True


def layer_norm(call: Call) -> Value:
    """Layer normalisation over the last dimension."""
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
    if not _act_is_pointwise(call):
        return call.give_up(f"the activation inside {call.label} has no rule")
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
    _carry(call, x, ("weight", "bias"), 0, f"group norm {call.path!r}")
    call.table.select(x.ids, f"group norm {call.path!r}")
    pieces = x.ids.reshape(layer.num_groups, -1)
    call.table.balance(pieces, f"does not fall evenly into the groups of {call.label}")
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


def _carry(call: Call, x: Channels, names: Sequence[str], axis: int, select: str | None) -> None:
    tensors = [(name, axis) for name in names if call.has(name)]
    if tensors:
        ids = call.table.axis(call.path, tensors, "carrier", len(x.ids))
        call.table.join(ids, x.ids)
    if select is not None:
        call.table.select(x.ids, select)


# --------------------------------------------------------------------------------------------------
# Operators without parameters


def unchanged(call: Call) -> Value:
    """The tensor itself, in evaluation mode."""
    x = call.argument(0, "input")
    return call.like(x) if isinstance(x, Channels) else opaque(call.result)


def pointwise(call: Call) -> Value:
    """One function of one variable, the same for all entries."""
    x = call.argument(0, "input")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    if sum(isinstance(v, Channels | Opaque) for v in flat((call.args, call.kwargs))) > 1:
        return call.give_up(f"{call.label} reads several tensors")
    call.table.bend(x.ids)
    return call.like(x)


def spatial(trailing: int, *, bends: bool = False) -> Rule:
    """Make the rule of an operator over the last ``trailing`` dimensions, channel by channel."""

    def rule(call: Call) -> Value:
        x = call.argument(0, "input")
        if not isinstance(x, Channels) or not isinstance(call.result, Tensor):
            return call.give_up(f"{call.label} gives several results")
        if x.dim >= len(x.shape) - trailing:
            return call.give_up(f"{call.label} acts along the channels")
        if bends:
            call.table.bend(x.ids)
        return call.like(x)

    return rule


def interpolation(call: Call) -> Value:
    """Resampling of all dimensions behind the second one."""
    x = call.argument(0, "input")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    return call.like(x) if x.dim == 1 else call.give_up(f"{call.label} acts along the channels")


def padding(call: Call) -> Value:
    """Padding; channels that are padded too (option A shortcuts) stay as they are."""
    x = call.argument(0, "input")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    module = call.module
    amounts = call.argument(1, "pad") if module is None else getattr(module, "padding", None)
    value = call.argument(3, "value") if module is None else getattr(module, "value", None)
    if not isinstance(amounts, tuple | list) or not all(isinstance(a, int) for a in amounts):
        return call.give_up(f"{call.label} pads by computed amounts")
    behind = 2 * (len(x.shape) - 1 - x.dim)
    if any(amounts[behind : behind + 2]):
        return call.give_up(f"padded along the channels by {call.label} (option A shortcut)")
    if value:
        call.table.bend(x.ids)
    return call.like(x)


def scaling(call: Call) -> Value:
    """Product or quotient of two tensors, or of a tensor and a number."""
    return _combine(call, "multiplied with")


def addition(call: Call) -> Value:
    """Sum or difference of two tensors, or of a tensor and a number."""
    return _combine(call, "added to")


def _combine(call: Call, verb: str) -> Value:
    left, right = call.argument(0, "input"), call.argument(1, "other")
    if not call.kwargs.keys() <= {"input", "other"}:
        return call.give_up(call.unexpected)
    if isinstance(left, Channels) and isinstance(right, Channels):
        return _combine_channels(call, left, right, verb)
    x, other = (left, right) if isinstance(left, Channels) else (right, left)
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    if isinstance(other, Opaque):
        behind = len(x.shape) - x.dim
        if len(other.shape) >= behind and other.shape[-behind] != 1:
            return call.give_up(
                f"{verb} a tensor whose channels are not followed, at {call.node.name!r}"
            )
    elif not isinstance(other, int | float):
        return call.give_up(f"{verb} {type(other).__name__} at {call.node.name!r}")
    # A term that is one for all channels does not commute with a rotation; a factor does.
    if verb == "added to" or x is right:
        call.table.bend(x.ids)
    return call.like(x, x.dim + len(call.shape) - len(x.shape))


def _combine_channels(call: Call, left: Channels, right: Channels, verb: str) -> Value:
    same_dim = len(left.shape) - left.dim == len(right.shape) - right.dim
    if not same_dim or len(left.ids) != len(right.ids):
        return call.give_up(f"{verb} a tensor of other channels at {call.node.name!r}")
    wide = left if len(left.shape) >= len(right.shape) else right
    call.table.join(left.ids, right.ids)
    if verb == "multiplied with":
        call.table.select(left.ids, f"multiplied channel by channel at {call.node.name!r}")
    elif not np.array_equal(left.ids, right.ids):
        call.table.fix(left.ids, f"residual stream: joined at {call.node.name!r}")
    return call.like(wide)


def concatenation(call: Call) -> Value:
    """Concatenation: along the channels a direct sum, along another dimension a join."""
    tensors = call.argument(0, "tensors")
    dim = call.argument(1, "dim", 0)
    if not isinstance(dim, int) or not isinstance(tensors, tuple | list):
        return call.give_up(f"{call.label} along a dimension that is computed")
    dim %= len(call.shape)
    followed = [t for t in tensors if isinstance(t, Channels)]
    if not followed:
        return call.give_up(call.unexpected)
    at = followed[0].dim
    if any(t.dim != at for t in followed):
        return call.give_up(f"{call.label} of tensors with channels in different places")
    pieces: list[Ids] = []
    for tensor in tensors:
        if isinstance(tensor, Channels):
            pieces.append(tensor.ids)
        elif isinstance(tensor, Opaque):
            pieces.append(call.table.new(tensor.shape[at]))
            call.table.fix(
                pieces[-1], f"{call.label} with a tensor whose channels are not followed"
            )
    if dim == at:
        return Channels(call.shape, at, np.concatenate(pieces))
    for piece in pieces[1:]:
        call.table.join(pieces[0], piece)
    return Channels(call.shape, at, pieces[0])


def chunk(call: Call) -> Value:
    """Equal pieces along a dimension; pieces of the channels must stay equally wide."""
    x, count = call.argument(0, "input"), call.argument(1, "chunks")
    dim = call.argument(2, "dim", 0)
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    if not isinstance(count, int) or not isinstance(dim, int):
        return call.give_up(f"{call.label} with computed arguments")
    shapes = [tuple(piece.shape) for piece in call.result]
    if dim % len(x.shape) != x.dim:
        return tuple(Channels(shape, x.dim, x.ids) for shape in shapes)
    if len(shapes) != count or len(x.ids) % count:
        return call.give_up(f"{call.label} into unequal pieces")
    pieces = x.ids.reshape(count, -1)
    call.table.balance(pieces, f"does not fall evenly into the pieces of {call.label}")
    return tuple(Channels(shape, x.dim, row) for shape, row in zip(shapes, pieces, strict=True))


def item(call: Call) -> Value:
    """Indexing: of a tuple or mapping in the program, or of a tensor beside its channels."""
    x, index = call.args
    if not isinstance(x, Channels | Opaque):
        return x[index] if isinstance(index, int | slice | str) else call.give_up("computed index")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    dim, position = _indexed_dim(x, index if isinstance(index, tuple) else (index,))
    if dim is None:
        return call.give_up(f"indexed along the channels or by a tensor at {call.node.name!r}")
    return call.like(x, position)


def _indexed_dim(x: Channels, index: tuple[Value, ...]) -> tuple[int | None, int]:
    """Return the channel dimension (None if it is touched) and its place after indexing."""
    if not all(
        i is None or i is Ellipsis or (isinstance(i, int | slice) and not isinstance(i, bool))
        for i in index
    ):
        return None, 0
    if any(isinstance(v, Extent | Opaque | Channels) for v in flat(index)):
        return None, 0
    consumed = sum(i is not None and i is not Ellipsis for i in index)
    source = target = 0
    for entry in index if Ellipsis in index else (*index, Ellipsis):
        skip = len(x.shape) - consumed if entry is Ellipsis else 1
        if entry is None:
            target += 1
        elif source <= x.dim < source + skip:
            whole = entry is Ellipsis or entry == slice(None)
            return (x.dim if whole else None), target + x.dim - source
        else:
            source += skip
            target += 0 if isinstance(entry, int) else skip
    return None, 0


def reduction(call: Call) -> Value:
    """Mean over dimensions other than the channels."""
    x, dims = call.argument(0, "input"), call.argument(1, "dim")
    keep = call.argument(2, "keepdim", default=False)
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or not all(isinstance(d, int) for d in dims):
        return call.give_up(f"averaged over all dimensions at {call.node.name!r}")
    reduced = {d % len(x.shape) for d in dims}
    if x.dim in reduced:
        return call.give_up(f"averaged over the channels at {call.node.name!r}")
    return call.like(x, x.dim if keep else x.dim - sum(d < x.dim for d in reduced))


# --------------------------------------------------------------------------------------------------
# Operators that move dimensions


def permutation(call: Call) -> Value:
    """Permutation of all dimensions."""
    x = call.args[0]
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    order = call.argument(1, "dims")
    order = order if isinstance(order, tuple | list) else call.args[1:]
    if not all(isinstance(d, int) for d in order):
        return call.give_up(f"permuted by computed dimensions at {call.node.name!r}")
    return call.like(x, [d % len(x.shape) for d in order].index(x.dim))


def transposition(call: Call) -> Value:
    """Exchange of two dimensions."""
    x = call.args[0]
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    pair = [call.argument(1, "dim0"), call.argument(2, "dim1")]
    if not all(isinstance(d, int) for d in pair):
        return call.give_up(f"transposed by computed dimensions at {call.node.name!r}")
    first, second = (d % len(x.shape) for d in pair)
    return call.like(x, {first: second, second: first}.get(x.dim, x.dim))


def insertion(call: Call) -> Value:
    """``unsqueeze``: a new dimension of size one."""
    x, dim = call.argument(0, "input"), call.argument(1, "dim")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    return call.like(x, x.dim + (dim % len(call.shape) <= x.dim))


def flattening(call: Call) -> Value:
    """``flatten``, as a function, a method or a module."""
    x = call.argument(0, "input")
    if call.module is not None:
        start, end = int(call.module.start_dim), int(call.module.end_dim)  # type: ignore[arg-type]
    else:
        start, end = call.argument(1, "start_dim", 0), call.argument(2, "end_dim", -1)
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    start, end = start % len(x.shape), end % len(x.shape)
    return _merge(call, x, start, end)


def reshaping(call: Call) -> Value:
    """``view`` and ``reshape``, as far as they merge the channels with dimensions behind them."""
    x = call.argument(0, "input")
    sizes = call.args[1:] or (call.kwargs.get("shape", call.kwargs.get("size")),)
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    extents = [s for s in sizes if isinstance(s, Extent)]
    if not isinstance(x, Channels):
        return call.give_up(f"reshaped by the number of channels at {call.node.name!r}")
    if len(x.shape) == 1 and call.shape.count(1) == len(call.shape) - 1 and not extents:
        return _spread(call, x, sizes)
    end = _last_merged(x.shape, call.shape, x.dim)
    if end is None or len(sizes) != len(call.shape):
        return call.give_up(f"reshaped across the channels at {call.node.name!r}")
    size = sizes[x.dim]
    follows = size == -1 or (
        isinstance(size, Extent) and x.dim == end and np.array_equal(size.ids, x.ids)
    )
    if not follows or len(extents) != isinstance(size, Extent):
        return call.give_up(f"reshaped to a fixed number of channels at {call.node.name!r}")
    return _repeated(call, x, end)


def _spread(call: Call, x: Channels, sizes: Sequence[Value]) -> Value:
    """A vector (layer scale) with dimensions of size one put around its only one."""
    dim = next(d for d, n in enumerate(call.shape) if n == len(x.ids))
    if len(sizes) != len(call.shape) or sizes[dim] != -1:
        return call.give_up(f"reshaped to a fixed number of channels at {call.node.name!r}")
    return Channels(call.shape, dim, x.ids)


def _repeated(call: Call, x: Channels, end: int) -> Channels:
    """The channels merged with the dimensions behind them, up to ``end``."""
    return Channels(call.shape, x.dim, np.repeat(x.ids, math.prod(x.shape[x.dim + 1 : end + 1])))


def _last_merged(old: tuple[int, ...], new: tuple[int, ...], dim: int) -> int | None:
    """Return the last of the dimensions that ``dim`` is merged with, if that is all that happens.

    Dimensions before ``dim`` must stay: with a batch of one, shapes alone would not tell whether
    the channels were merged with it.
    """
    if len(new) <= dim or new[:dim] != old[:dim]:
        return None
    end = dim
    while math.prod(old[dim : end + 1]) < new[dim] and end + 1 < len(old):
        end += 1
    return end if math.prod(old[dim : end + 1]) == new[dim] else None


def _merge(call: Call, x: Channels, start: int, end: int) -> Value:
    if end < x.dim or start > x.dim:
        return call.like(x, x.dim if end >= x.dim else x.dim - (end - start))
    if start < x.dim:
        return call.give_up(f"flattened with dimensions before the channels at {call.node.name!r}")
    return _repeated(call, x, end)


def packing(call: Call) -> Value:
    """The making of a named tuple."""
    return tuple(call.args)


# --------------------------------------------------------------------------------------------------
# Sizes


def size(call: Call) -> Value:
    """``x.size()``, ``x.size(dim)``: integers that remember which channels they count."""
    x, dim = call.args[0], call.argument(1, "dim")
    if not isinstance(x, Channels | Opaque):
        return call.give_up(f"size of a {type(x).__name__}")
    sizes = _sizes(x)
    if isinstance(call.result, tuple):
        return sizes
    return sizes[dim] if isinstance(dim, int) else call.give_up("size of a computed dimension")


def attribute(call: Call) -> Value:
    """``getattr``: the shape of a tensor; whatever else does not follow channels."""
    x, name = call.args[0], call.args[1]
    if isinstance(x, Channels | Opaque):
        if name == "shape":
            return _sizes(x)
        if name in {"dtype", "device", "ndim", "requires_grad", "is_cuda"}:
            return call.result
        return call.give_up(f"attribute {name!r} of a tensor")
    return call.give_up(f"attribute {name!r}")


def _sizes(x: Channels | Opaque) -> tuple[int | Extent, ...]:
    at = x.dim if isinstance(x, Channels) else -1
    ids = x.ids if isinstance(x, Channels) else np.empty(0, dtype=np.int64)
    return tuple(Extent(ids) if d == at else n for d, n in enumerate(x.shape))


def plain_result(call: Call) -> Value:
    """A property of a tensor that does not depend on its channels (``dim()``)."""
    return call.result


# --------------------------------------------------------------------------------------------------
# The table

Target = type[nn.Module] | Callable[..., Any] | str

CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    tl.Conv2dSame,
    std_conv.StdConv2d,
    std_conv.StdConv2dSame,
    std_conv.ScaledStdConv2d,
    std_conv.ScaledStdConv2dSame,
)
STANDARDIZED: tuple[type[nn.Module], ...] = CONVOLUTIONS[4:]
LINEARS: tuple[type[nn.Module], ...] = (nn.Linear, TimmLinear)
BATCH_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    tl.BatchNormAct2d,
    tl.SyncBatchNormAct,
    tl.FrozenBatchNormAct2d,
    torchvision.ops.FrozenBatchNorm2d,
)

_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus,
    nn.Softsign, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold,
    tl.Swish, tl.Mish, tl.Sigmoid, tl.Tanh, tl.HardSwish, tl.HardSigmoid, tl.HardMish, tl.GELU,
    tl.GELUTanh, tl.QuickGELU,
)  # fmt: skip
_POINTWISE_FUNCTIONS = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid,
    torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.exp, torch.sqrt, torch.rsqrt,
    torch.square, torch.abs, operator.neg, operator.pow,
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "clamp", "clamp_", "exp", "sqrt", "rsqrt",
    "square", "abs", "neg", "pow",
)  # fmt: skip
_UNCHANGED = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    tl.DropPath, tl.DropBlock2d, torchvision.ops.StochasticDepth,
    F.dropout, F.dropout2d, F.dropout3d, torchvision.ops.stochastic_depth, tl.drop_path,
    "contiguous", "clone", "detach", "float", "to", "type_as", "double", "half",
)  # fmt: skip
_AVERAGE_POOLS = {
    1: (nn.AvgPool1d, nn.AdaptiveAvgPool1d, F.avg_pool1d, F.adaptive_avg_pool1d),
    2: (nn.AvgPool2d, nn.AdaptiveAvgPool2d, AvgPool2dSame, F.avg_pool2d, F.adaptive_avg_pool2d),
    3: (nn.AvgPool3d, nn.AdaptiveAvgPool3d, F.avg_pool3d, F.adaptive_avg_pool3d),
}
_MAXIMUM_POOLS = {
    1: (nn.MaxPool1d, nn.AdaptiveMaxPool1d, F.max_pool1d, F.adaptive_max_pool1d),
    2: (nn.MaxPool2d, nn.AdaptiveMaxPool2d, MaxPool2dSame, F.max_pool2d, F.adaptive_max_pool2d),
    3: (nn.MaxPool3d, nn.AdaptiveMaxPool3d, F.max_pool3d, F.adaptive_max_pool3d),
}
_PADS = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d, F.pad,
)  # fmt: skip

RULES: Mapping[Target, Rule] = {
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys(LINEARS, linear),
    **dict.fromkeys(BATCH_NORMS, batch_norm),
    **dict.fromkeys((nn.LayerNorm, tl.LayerNorm, timm_norm.LayerNormFp32), layer_norm),
    **dict.fromkeys((tl.LayerNorm2d, TorchvisionLayerNorm2d, tl.LayerNormAct2d), layer_norm_2d),
    **dict.fromkeys((nn.GroupNorm, tl.GroupNorm, tl.GroupNorm1, tl.GroupNormAct), group_norm),
    nn.PReLU: prelu,
    tl.PReLU: prelu,
    **dict.fromkeys(_POINTWISE_MODULES, pointwise),
    **dict.fromkeys(_POINTWISE_FUNCTIONS, pointwise),
    **dict.fromkeys(_UNCHANGED, unchanged),
    **{t: spatial(dims) for dims, targets in _AVERAGE_POOLS.items() for t in targets},
    **{t: spatial(dims, bends=True) for dims, targets in _MAXIMUM_POOLS.items() for t in targets},
    **dict.fromkeys(_PADS, padding),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, F.interpolate), interpolation),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), scaling),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), scaling),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), addition),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), addition),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenation),
    **dict.fromkeys((torch.chunk, "chunk"), chunk),
    **dict.fromkeys((torch.mean, "mean"), reduction),
    operator.getitem: item,
    getattr: attribute,
    "size": size,
    "dim": plain_result,
    **dict.fromkeys((torch.permute, "permute"), permutation),
    **dict.fromkeys((torch.transpose, "transpose", torch.swapaxes), transposition),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), insertion),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), flattening),
    **dict.fromkeys((torch.reshape, "reshape", "view"), reshaping),
}

READS_SIZES: frozenset[Rule] = frozenset({item, size, attribute, reshaping})
"""Rules that know what to do with an :class:`Extent` among their arguments."""


def find_module_rule(module: nn.Module, rules: Mapping[Target, Rule]) -> Rule | None:
    """Return the rule of a module's class, or of the class whose computation it inherits."""
    for base in type(module).__mro__:
        rule = rules.get(base)
        if rule is not None:
            methods = ("forward", "_conv_forward", "_check_input_dim")
            same = all(getattr(type(module), m, 0) is getattr(base, m, 0) for m in methods)
            return rule if same else None
    return None


def find_rule(node: fx.Node, module: nn.Module | None, rules: Mapping[Target, Rule]) -> Rule | None:
    """Return the rule of a graph node, if there is one."""
    if module is not None:
        return find_module_rule(module, rules)
    if isinstance(node.target, type) and issubclass(node.target, tuple) and not node.kwargs:
        return packing
    return rules.get(node.target) if node.op in {"call_function", "call_method"} else None
