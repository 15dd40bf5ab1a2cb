"""Rules of operators without parameters: pointwise functions, sums, concatenation, reshaping."""

from __future__ import annotations

import operator
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from torchcap.graph.channels import Ids
from torchcap.graph.values import Call, Channels, Extent, Held, Opaque, Rule, Value, flat, opaque

# --------------------------------------------------------------------------------------------------
# One tensor in, one out, channel by channel


def unchanged(call: Call) -> Value:
    """The tensor itself, in evaluation mode."""
    x = call.argument(0, "input")
    if isinstance(x, Opaque):  # others among the arguments only lend their dtype
        return opaque(call.result)
    if isinstance(x, Channels) and not call.result.is_floating_point():
        call.table.bend(x.ids)  # rounding is not linear
    return call.like(x) if isinstance(x, Channels) else call.give_up(call.unexpected)


def pointwise(call: Call) -> Value:
    """One function of one variable, the same for all entries."""
    x = call.argument(0, "input")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    tensors = [v for v in flat((call.args, call.kwargs)) if isinstance(v, Channels | Opaque)]
    if any(v is not x and prod(v.shape) != 1 for v in tensors):
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
    """Resampling of all dimensions behind the second one, to a size or along a grid."""
    x = call.argument(0, "input")
    if not isinstance(x, Channels) or len(call.followed()) > 1:
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


def refusal(why: str) -> Rule:
    """Make the rule of an operator through which channels cannot be followed."""
    return lambda call: call.give_up(f"{call.label} {why}")


# --------------------------------------------------------------------------------------------------
# Several tensors in, one out, entry by entry


def scaling(call: Call) -> Value:
    """Product or quotient of two tensors, or of a tensor and a number."""
    return _combine(call, "multiplied with")


def addition(call: Call) -> Value:
    """Sum or difference of two tensors, or of a tensor and a number."""
    return _combine(call, "added to")


def _combine(call: Call, verb: str) -> Value:
    left, right = (_with_channels(call, place) for place in (0, 1))
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
            return call.give_up(f"{verb} a tensor whose channels are not followed")
    elif not isinstance(other, int | float):
        return call.give_up(f"{verb} {type(other).__name__}")
    # A term that is one for all channels does not commute with a rotation; a factor does.
    if verb == "added to" or x is right:
        call.table.bend(x.ids)
    return call.like(x, x.dim + len(call.shape) - len(x.shape))


def _with_channels(call: Call, place: int) -> Value:
    """Return an operand; a parameter that the other operand's channels meet has channels too."""
    x, other = (call.argument(p, ("input", "other")[p]) for p in (place, 1 - place))
    if not isinstance(x, Held) or not isinstance(other, Channels):
        return x
    dim = len(x.shape) - (len(other.shape) - other.dim)
    if dim < 0 or x.shape[dim] != len(other.ids):
        return x
    ids = call.table.axis(x.module, [(x.name, dim)], "carrier", len(other.ids))
    return Channels(x.shape, dim, ids)


def _combine_channels(call: Call, left: Channels, right: Channels, verb: str) -> Value:
    same_dim = len(left.shape) - left.dim == len(right.shape) - right.dim
    if not same_dim or len(left.ids) != len(right.ids):
        return call.give_up(f"{verb} a tensor of other channels")
    wide = max(left, right, key=lambda x: prod(x.shape))  # not the weight of the two
    call.table.join(left.ids, right.ids)
    if verb == "multiplied with":
        call.table.bend(left.ids)
        call.select(left.ids, "multiplied channel by channel")
    elif _has_parameter(call, left, right):
        call.select(left.ids, "a term for each channel")
    else:
        call.restrict_sum(left.ids, right.ids)
    return call.like(wide)


def _has_parameter(call: Call, *operands: Channels) -> bool:
    """Whether one of the two is a tensor that the program holds, rather than a feature map."""
    if any(isinstance(value, Held) for value in call.args):
        return True
    held = [axis.ids for axis in call.table.axes.values() if axis.role == "carrier"]
    vectors = [x for x in operands if prod(x.shape) == len(x.ids)]
    return any(np.array_equal(ids, x.ids) for x in vectors for ids in held)


def multiplied_addition(call: Call) -> Value:
    """``addcmul``: the first tensor plus the product of the two others."""
    known = call.kwargs.keys() <= {"input", "tensor1", "tensor2", "value"}
    term = call.argument(0, "input")
    factors = call.argument(1, "tensor1"), call.argument(2, "tensor2")
    tensors = (term, *factors)
    if not known or not all(isinstance(v, Channels | Opaque) for v in tensors):
        return call.give_up(call.unexpected)
    shape = np.broadcast_shapes(*(factor.shape for factor in factors))
    result = torch.empty(shape, device="meta")
    product = scaling(replace(call, args=factors, kwargs={}, result=result))
    return addition(replace(call, args=(term, product), kwargs={}))


def together(call: Call) -> Value:
    """A function of several tensors, entry by entry: ``maximum``, ``where``, a comparison."""
    operands = [*call.args, *call.kwargs.values()]
    followed = call.followed()
    if not followed or not all(isinstance(v, Channels | Opaque | int | float) for v in operands):
        return call.give_up(call.unexpected)
    first = followed[0]
    behind = len(first.shape) - first.dim
    for v in followed:
        if len(v.shape) - v.dim != behind or len(v.ids) != len(first.ids):
            return call.give_up(f"{call.label} of tensors with other channels")
    for v in operands:
        if isinstance(v, Opaque) and len(v.shape) >= behind and v.shape[-behind] != 1:
            return call.give_up(f"{call.label} with a tensor whose channels are not followed")
    for v in followed[1:]:
        if not np.array_equal(first.ids, v.ids):
            call.table.join(first.ids, v.ids)
            call.select(first.ids, "told apart channel by channel")
    call.table.bend(first.ids)
    return call.like(first, len(call.shape) - behind)


def gated_halves(call: Call) -> Value:
    """``glu``: one half of the channels, multiplied with the sigmoid of the other."""
    x = call.argument(0, "input")
    dim = getattr(call.module, "dim", None) if call.module else call.argument(1, "dim", -1)
    if not isinstance(x, Channels) or not isinstance(dim, int):
        return call.give_up(call.unexpected)
    call.table.bend(x.ids)
    if dim % len(x.shape) != x.dim:
        return call.like(x)
    halves = x.ids.reshape(2, -1)
    call.table.balance(halves, f"does not fall evenly into the halves of {call.label}")
    call.table.join(halves[0], halves[1])
    call.select(halves, "multiplied channel by channel")
    return Channels(call.shape, x.dim, halves[0])


# --------------------------------------------------------------------------------------------------
# Pieces


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
            call.fix(pieces[-1], f"{call.label} with a tensor whose channels are not followed")
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
        return call.give_up("indexed along the channels or by a tensor")
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


# --------------------------------------------------------------------------------------------------
# Along other dimensions than the channels


def reduction(place: int = 1, *, bends: bool = False) -> Rule:
    """Make the rule of a sum, maximum or norm over other dimensions than the channels.

    Args:
        place: where the dimensions stand among the arguments.
        bends: whether it is not linear.
    """

    def rule(call: Call) -> Value:
        x, dims = call.argument(0, "input"), _dims(call.argument(place, "dim"))
        if not isinstance(x, Channels):
            return call.give_up(call.unexpected)
        if not dims:
            return call.give_up("reduced over all dimensions")
        reduced = {d % len(x.shape) for d in dims}
        if x.dim in reduced and _normalises(call, x):
            call.select(x.ids, "norm over channels")
            call.table.bend(x.ids)
            return opaque(call.result)
        if x.dim in reduced:
            return call.give_up("reduced over the channels")
        if bends:
            call.table.bend(x.ids)
        return _results(call, x, x.dim - sum(d < x.dim for d in reduced))

    return rule


def _normalises(call: Call, x: Channels) -> bool:
    """Whether a mean over channels is what these are divided by, as global response norms do."""
    name = getattr(call.node.target, "__name__", call.node.target)
    if name != "mean" or not call.argument(2, "keepdim", default=False):
        return False
    node = call.node
    while len(node.users) == 1:
        (user,) = node.users
        kind = call.kind_of(user)
        if kind == "product" and user.args[1:] == (node,) and user.target in DIVISIONS:
            other = call.values.get(user.args[0])  # type: ignore[arg-type]
            return isinstance(other, Channels) and np.array_equal(other.ids, x.ids)
        if kind != "sum" or any(isinstance(a, fx.Node) and a is not node for a in user.args):
            return False
        node = user
    return False


DIVISIONS: frozenset[Any] = frozenset(
    {operator.truediv, torch.div, "div", "div_", torch.divide, "divide"}
)


def extreme(call: Call) -> Value:
    """``max`` and ``min``: over dimensions, with the places, or of two tensors."""
    other = call.argument(1, "other")
    return (together if isinstance(other, Channels | Opaque) else reduction(bends=True))(call)


def along(place: int, name: str = "dim", default: Value = None, *, bends: bool = False) -> Rule:
    """Make the rule of a softmax, sort or shift along other dimensions than the channels.

    Args:
        place: where the dimensions stand among the arguments.
        name: what they are called there, and as an attribute of a module.
        default: what they are where they are not given.
        bends: whether it is not linear.
    """

    def rule(call: Call) -> Value:
        argument = call.argument(place, name, default)
        dims = getattr(call.module, name, None) if call.module is not None else argument
        return beside(call, dims, bends=bends)

    return rule


def normalization(call: Call) -> Value:
    """``F.normalize``: over the channels, or over other dimensions."""
    x, dim = call.argument(0, "input"), call.argument(2, "dim", 1)
    if isinstance(x, Channels) and type(dim) is int and dim % len(x.shape) == x.dim:
        call.select(x.ids, "norm over channels")
        call.table.bend(x.ids)
        return call.like(x)
    return beside(call, dim, bends=True)


def beside(call: Call, dims: Value, *, bends: bool = False) -> Value:
    """Keep the channels, where none of the dimensions is theirs."""
    x, acted = call.argument(0, "input"), _dims(dims)
    if not isinstance(x, Channels) or len(call.followed()) > 1 or not acted:
        return call.give_up(call.unexpected)
    if x.dim in {d % len(x.shape) for d in acted}:
        return call.give_up(f"{call.label} acts along the channels")
    if bends:
        call.table.bend(x.ids)
    return _results(call, x, x.dim)


def _dims(dims: Value) -> tuple[int, ...]:
    """Return dimensions as a tuple; an empty one if they are not given, or computed."""
    found = dims if isinstance(dims, tuple | list) else (dims,)
    plain = all(isinstance(d, int) and not isinstance(d, bool) for d in found)
    return tuple(found) if plain else ()


def _results(call: Call, x: Channels, place: int) -> Value:
    """Return the results, with the channels at ``place`` where dimensions are gone."""
    single = isinstance(call.result, Tensor)
    values = tuple(
        Channels(tuple(r.shape), x.dim if r.dim() >= len(x.shape) else place, x.ids)
        for r in ((call.result,) if single else call.result)
    )
    return values[0] if single else values


# --------------------------------------------------------------------------------------------------
# Sizes


def size(call: Call) -> Value:
    """``x.size(dim)``: an integer that remembers which channels it counts."""
    x, dim = call.args[0], call.argument(1, "dim")
    if isinstance(x, Channels) and not isinstance(dim, int):
        return call.give_up("the forward tells kinds of integers apart, and reads all sizes")
    return Extent(x.ids) if isinstance(x, Channels) and dim % len(x.shape) == x.dim else call.result


def count(call: Call) -> Value:
    """``x.numel()``."""
    x = call.args[0]
    if isinstance(x, Channels):
        return Extent(x.ids, times=prod(x.shape) // len(x.ids))
    return call.result


def attribute(call: Call) -> Value:
    """``getattr``: the transpose of a tensor, or a part of what a function returns."""
    x, name = call.args[0], call.args[1]
    if isinstance(x, Channels) and name == "data":
        return call.like(x)
    if isinstance(x, Channels) and name in {"T", "mT"}:
        last = len(x.shape) - 1
        places = {last: last - 1, last - 1: last} if name == "mT" else {x.dim: last - x.dim}
        return call.like(x, places.get(x.dim, x.dim))
    return call.give_up(f"attribute {name!r} of a tensor")
