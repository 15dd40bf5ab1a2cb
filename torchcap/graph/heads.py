"""Rules of channels that a reshape spreads over several dimensions, as attention has them.

A linear layer writes queries, keys and values of all heads in one row; a reshape gives every head a
dimension of its own. From there on channels are followed along several dimensions
(:class:`~torchcap.graph.values.Heads`), until a reshape puts the heads side by side again. The
heads stay, and of each equally many channels may go.

The numbers that reshapes, splits and slices are given must follow. They do where they are left to
be found (``-1``), read from a shape, or held by a module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from torchcap.graph import layers, moving, operators
from torchcap.graph.channels import Ids
from torchcap.graph.numbers import pin_settings
from torchcap.graph.values import (
    Call,
    Channels,
    Extent,
    Heads,
    Opaque,
    Setting,
    Value,
    flat,
)

_UNEVEN = "does not fall evenly into heads"


def spread(x: Channels | Heads) -> Heads:
    """Return a tensor with channels along one dimension as one with a single head."""
    return x if isinstance(x, Heads) else Heads(x.shape, (x.dim,), x.ids, 0)


def settled(x: Heads) -> Channels | Heads:
    """Return heads that are left with one dimension as plain channels."""
    return Channels(x.shape, x.dim, x.ids) if len(x.dims) == 1 else x


def collapsed(call: Call, value: Value) -> Value:
    """Return nested values in which heads are plain channels, the same ones in every head."""
    if isinstance(value, tuple):
        return tuple(collapsed(call, item) for item in value)
    if not isinstance(value, Heads):
        return value
    _alike(call, value, [dim for dim in value.dims if dim != value.dim])
    return Channels(value.shape, value.dim, value.rows[0])


# --------------------------------------------------------------------------------------------------
# Into heads and out of them


def reshaping(call: Call) -> Value:
    """``view`` and ``reshape``, into heads, out of them or beside them."""
    x = call.argument(0, "input")
    sizes = call.args[1:] or (call.kwargs.get("shape", call.kwargs.get("size")),)
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    if isinstance(x, Heads) or (isinstance(x, Channels) and _stands_alone(x, call.shape)):
        return _reshaped(call, x, sizes)
    alone = _only_moved(x, call.shape) if isinstance(x, Channels) else None
    if alone is not None and len(sizes) == len(call.shape):
        return _sized(call, Heads(call.shape, (alone,), x.ids, 0), sizes)
    pin_settings(call)
    return moving.reshaping(call)


def flattening(call: Call) -> Value:
    """``flatten`` of heads."""
    x = call.argument(0, "input")
    start, end = call.argument(1, "start_dim", 0), call.argument(2, "end_dim", -1)
    if call.module is not None or not isinstance(x, Heads):
        return call.give_up(call.unexpected)
    start, end = start % len(x.shape), end % len(x.shape)
    # Sizes that flatten finds by itself are as good as those that a reshape is left to find.
    place = x.dim if x.dim < start else start if x.dim <= end else x.dim - (end - start)
    sizes = [-1 if dim == place else size for dim, size in enumerate(call.shape)]
    return _reshaped(call, x, sizes)


def unflattening(call: Call) -> Value:
    """``unflatten``: of channels into heads, or of another dimension."""
    x, dim, sizes = (call.argument(n, name) for n, name in enumerate(("input", "dim", "sizes")))
    known = isinstance(dim, int) and isinstance(sizes, tuple | list)
    if call.module is None and known and isinstance(x, Channels) and dim % len(x.shape) == x.dim:
        return _reshaped(call, x, (*call.shape[: x.dim], *sizes, *x.shape[x.dim + 1 :]))
    pin_settings(call)
    return moving.unflattening(call)


def _stands_alone(x: Channels, shape: tuple[int, ...]) -> bool:
    """Whether a reshape merges the channels with no other dimension."""
    group = next((old for old, _ in _groups(x.shape, shape) if x.dim in old), [])
    return group == [x.dim] and x.shape[x.dim] > 1 < len(x.shape)


def _only_moved(x: Channels, shape: tuple[int, ...]) -> int | None:
    """Return where channels are behind a reshape that adds or drops dimensions of size one."""
    old = [d for d, size in enumerate(x.shape) if size > 1 or d == x.dim]
    new = [d for d, size in enumerate(shape) if size > 1]
    if len(x.ids) < 2:
        return None
    groups = _groups([x.shape[d] for d in old], [shape[d] for d in new])
    held = [(a, b) for a, b in groups if old.index(x.dim) in a]
    if len(held) != 1 or [len(side) for side in held[0]] != [1, 1]:
        return None
    return new[held[0][1][0]]


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair up the dimensions of two shapes: runs of both that hold the same entries."""
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i][: len(old) - i], [j][: len(new) - j]
        i, j = i + len(left), j + len(right)
        while (a := math.prod(old[d] for d in left)) != (b := math.prod(new[d] for d in right)):
            if a < b:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        groups.append((left, right))
    return groups


def _reshaped(call: Call, x: Channels | Heads, sizes: Sequence[Value]) -> Value:
    x, new = spread(x), call.shape
    if len(sizes) != len(new):
        return call.give_up(call.unexpected)
    dims: list[int] = []  # of the result, that hold channels
    full: list[int] = []  # all old dimensions that are regrouped with some that hold channels
    spots: list[slice | None] = []
    width = -1
    for old_dims, new_dims in _groups(x.shape, new):
        held = [d for d in old_dims if d in x.dims]
        if not held:
            continue
        if x.dim in held:
            width = _width_among(sizes, new_dims)
        mixed = held != old_dims or x.dim in held
        if mixed and len(old_dims) > 1 and len(new_dims) > 1:
            return call.give_up("channels are regrouped with others")
        dims += new_dims
        full += [x.shape[d] for d in old_dims]
        spots += [slice(None) if d in held else None for d in old_dims]
    # Positions that are merged with channels repeat what these hold.
    entries = np.transpose(x.ids, np.argsort(x.dims))[tuple(spots)]
    entries = np.broadcast_to(entries, full).reshape([new[d] for d in dims])
    return _sized(call, Heads(new, tuple(dims), entries, dims.index(width)), sizes)


def _width_among(sizes: Sequence[Value], new_dims: list[int]) -> int:
    """Return which of the new dimensions may become smaller: the last whose size can follow."""
    follow = [d for d in new_dims if isinstance(sizes[d], Setting | Extent) or sizes[d] == -1]
    return follow[-1] if follow else new_dims[-1]


def _sized(call: Call, x: Heads, sizes: Sequence[Value]) -> Value:
    """Check that the sizes of a reshape follow the channels, or can be made to."""
    if not isinstance(sizes[x.dim], int) or sizes[x.dim] != -1:
        call.number(x.dim, x.ids)
    for dim, size in enumerate(sizes):
        if isinstance(size, Setting) and dim != x.dim:
            call.table.pin(size.places)
        elif isinstance(size, Extent) and dim != x.dim:
            return call.give_up("reshaped by the number of channels")
    size = sizes[x.dim]
    if isinstance(size, Setting):
        call.table.bind(size.places, x.rows)
    elif isinstance(size, Extent):
        call.agree(size, Extent(x.rows, len(x.rows)))
    elif size != -1:
        reason = f"reshaped to a fixed number of channels ({size}; -1 would follow)"
        return call.give_up(reason, number=True)
    call.table.balance(x.rows, call.at(_UNEVEN))
    return settled(x)


# --------------------------------------------------------------------------------------------------
# Moving and cutting dimensions


def permutation(call: Call) -> Value:
    """Permutation of the dimensions of heads."""
    x, order = call.args[0], call.argument(1, "dims")
    order = order if isinstance(order, tuple | list) else call.args[1:]
    if not isinstance(x, Heads) or not all(type(d) is int for d in order):
        return call.give_up(call.unexpected)
    places = [d % len(x.shape) for d in order]
    return _moved(call, x, [places.index(d) for d in range(len(places))])


def transposition(call: Call) -> Value:
    """Exchange of two dimensions of heads."""
    x, pair = call.args[0], [call.argument(1, "dim0"), call.argument(2, "dim1")]
    if not isinstance(x, Heads) or not all(type(d) is int for d in pair):
        return call.give_up(call.unexpected)
    first, second = (d % len(x.shape) for d in pair)
    return _moved(call, x, [{first: second, second: first}.get(d, d) for d in range(len(x.shape))])


def relocation(call: Call) -> Value:
    """``movedim`` of heads."""
    x, source, target = call.args[0], call.argument(1, "source"), call.argument(2, "destination")
    if not isinstance(x, Heads):
        return call.give_up(call.unexpected)
    target_of = moving.relocated(len(x.shape), source, target)
    return call.give_up(call.unexpected) if target_of is None else _moved(call, x, target_of)


def _moved(call: Call, x: Heads, target: Sequence[int]) -> Heads:
    return Heads(call.shape, tuple(target[d] for d in x.dims), x.ids, x.width)


def unbinding(call: Call) -> Value:
    """``unbind``: queries, keys and values one by one."""
    x, dim = call.argument(0, "input"), call.argument(1, "dim", 0)
    if not isinstance(x, Heads) or type(dim) is not int:
        return call.give_up(call.unexpected)
    dim %= len(x.shape)
    if dim == x.dim:
        return call.give_up("channels are taken one by one")
    return tuple(_taken(x, dim, place) for place in range(x.shape[dim]))


def _taken(x: Heads, dim: int, place: int) -> Channels | Heads:
    """Take one entry of a dimension that holds no width."""
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    ids, dims, width = x.ids, list(x.dims), x.width
    if dim in dims:
        axis = dims.index(dim)
        ids = np.take(ids, place, axis)
        dims.remove(dim)
        width -= axis < width
    return settled(Heads(shape, tuple(d - (d > dim) for d in dims), ids, width))


def splitting(call: Call) -> Value:
    """``split``: along the channels, where the numbers that say how wide pieces are can follow."""
    x, dim = call.argument(0, "tensor"), call.argument(2, "dim", 0)
    if isinstance(x, Channels) and type(dim) is int and dim % len(x.shape) == x.dim:
        return splitting_of_heads(call)
    pin_settings(call)
    return moving.splitting(call)


def splitting_of_heads(call: Call) -> Value:
    """``split`` of heads."""
    found = _pieces(call)
    if found is None:
        return call.give_up(call.unexpected)
    pieces, along = found
    if not along:
        pin_settings(call)
        return tuple(pieces)
    sizes = call.argument(1, "split_size_or_sections", call.kwargs.get("split_size"))
    if not isinstance(sizes, tuple | list):
        sizes = [sizes] * len(pieces)
    if len(sizes) != len(pieces):
        return call.give_up("split into fixed numbers of channels")
    for position, piece in enumerate(pieces):
        call.number(position, piece.rows)
    for piece, size in zip(pieces, sizes, strict=True):
        if not follows(call, size, piece.rows):
            return call.give_up("split into fixed numbers of channels", number=True)
        call.table.balance(piece.rows, call.at(_UNEVEN))
    return tuple(settled(piece) for piece in pieces)


def chunking_of_heads(call: Call) -> Value:
    """``chunk`` of heads."""
    found = _pieces(call)
    pin_settings(call)
    if found is None:
        return call.give_up(call.unexpected)
    pieces, along = found
    if along:
        if len({piece.ids.shape for piece in pieces}) > 1:
            return call.give_up(f"{call.label} into unequal pieces")
        rows = np.concatenate([piece.rows for piece in pieces])
        call.table.balance(rows, call.at(_UNEVEN))
    return tuple(pieces)


def _pieces(call: Call) -> tuple[list[Heads], bool] | None:
    """Return the pieces that a tensor is cut into, and whether it is cut along the channels."""
    x, dim = call.args[0], call.argument(2, "dim", 0)
    if not isinstance(x, Channels | Heads) or type(dim) is not int:
        return None
    x, dim = spread(x), dim % len(x.shape)
    shapes = [tuple(piece.shape) for piece in call.result]
    if dim not in x.dims:
        return [Heads(shape, x.dims, x.ids, x.width) for shape in shapes], False
    axis = x.dims.index(dim)
    ends = np.cumsum([shape[dim] for shape in shapes])[:-1]
    ids = np.split(x.ids, ends, axis=axis)
    pieces = [Heads(s, x.dims, i, x.width) for s, i in zip(shapes, ids, strict=True)]
    return pieces, axis == x.width


def follows(call: Call, size: Value, rows: Ids) -> bool:
    """Let a size follow the channels of each row; whether it can."""
    if isinstance(size, Setting) and size == rows.shape[1]:
        call.table.bind(size.places, rows)
    elif isinstance(size, Extent) and size.number == rows.shape[1]:
        if size.times == 1 and size.ids.size % size.parts == 0:
            call.table.balance(size.ids.reshape(size.parts, -1), call.at("does not divide evenly"))
        call.agree(size, Extent(rows, len(rows)))
    else:
        return False
    return True


def item(call: Call) -> Value:
    """Indexing; a slice of the channels may begin and end where a size says that follows them."""
    x, index = call.args
    if isinstance(x, Channels):
        entries = _entries(x.shape, index)
        cut = None if entries is None or None in entries else entries[x.dim]
        if isinstance(cut, slice) and cut != slice(None) and cut.step is None:
            return _stretch(call, x, entries or [], cut)
    pin_settings(call)
    return operators.item(call)


def _entries(shape: tuple[int, ...], index: Value) -> list[Value] | None:
    """Return an index with one entry for each dimension; None if it is no plain one."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in entries):
        return None
    consumed = sum(i is not None and i is not Ellipsis for i in entries)
    at = entries.index(Ellipsis) if Ellipsis in entries else len(entries)
    entries[at : at + 1] = [slice(None)] * (len(shape) - consumed)
    return entries


def _stretch(call: Call, x: Channels, entries: list[Value], cut: slice) -> Value:
    """Take the channels from one size to another."""
    if any(e != slice(None) for dim, e in enumerate(entries) if dim != x.dim):
        return call.give_up("indexed along the channels and besides")
    ends = []
    for end, default in ((cut.start, 0), (cut.stop, len(x.ids))):
        number = end.number if isinstance(end, Extent) else default if end is None else int(end)
        if end is not None and not 0 < number <= len(x.ids) + (type(end) is int) * number:
            return call.give_up("indexed along the channels")
        ends.append(number)
        whole = type(end) is int and number >= len(x.ids) and default
        if end is None or whole or (number == 0 and type(end) is int):
            continue
        if not follows(call, end, x.ids[None, :number]):
            return call.give_up(f"indexed along the channels by a fixed number ({end})")
    return Channels(call.shape, x.dim, x.ids[ends[0] : ends[1]])


def item_of_heads(call: Call) -> Value:
    """Indexing of heads beside their width, and of tuples that hold them."""
    x, index = call.args
    if not isinstance(x, Heads):
        known = isinstance(x, tuple | list) and type(index) in {int, slice}
        return x[index] if known else call.give_up(call.unexpected)
    pin_settings(call)
    entries = _entries(x.shape, index)
    if entries is None or any(not isinstance(v, int | None) for v in flat(entries)):
        return call.give_up("indexed by a tensor")
    return _indexed(call, x, entries)


def _indexed(call: Call, x: Heads, entries: Sequence[int | slice | None]) -> Value:
    """Take one entry or a stretch of some dimensions; there is an entry for each of them."""
    ids = np.moveaxis(x.ids, range(len(x.dims)), np.argsort(np.argsort(x.dims)))
    kept: list[int] = []
    where: list[int | slice] = []
    source = place = 0
    width = -1
    for entry in entries:
        if entry is None:
            place += 1
            continue
        if source in x.dims:
            if source == x.dim and entry != slice(None):
                return call.give_up("indexed along the channels")
            where.append(entry)
            if source == x.dim:
                width = len(kept)
            kept += [place] if isinstance(entry, slice) else []
        place += isinstance(entry, slice)
        source += 1
    return settled(Heads(call.shape, tuple(kept), ids[tuple(where)], width))


def insertion(call: Call) -> Value:
    """``unsqueeze`` of heads."""
    x, dim = call.argument(0, "input"), call.argument(1, "dim")
    if not isinstance(x, Heads) or type(dim) is not int:
        return call.give_up(call.unexpected)
    dim %= len(call.shape)
    return Heads(call.shape, tuple(d + (d >= dim) for d in x.dims), x.ids, x.width)


def joining(call: Call) -> Value:
    """``cat`` of heads along positions."""
    tensors, dim = call.argument(0, "tensors"), call.argument(1, "dim", 0)
    if type(dim) is not int or not all(isinstance(t, Heads) for t in tensors):
        return call.give_up(call.unexpected)
    first = tensors[0]
    places = {(t.dims, t.width) for t in tensors}
    if dim % len(call.shape) in first.dims or len(places) > 1:
        return call.give_up(f"{call.label} along the channels")
    for tensor in tensors[1:]:
        call.table.join(first.ids, tensor.ids)
    return Heads(call.shape, first.dims, first.ids, first.width)


# --------------------------------------------------------------------------------------------------
# One head at a time


def unchanged(call: Call) -> Value:
    """The tensor itself, in evaluation mode."""
    x = call.argument(0, "input")
    if isinstance(x, Heads) and not call.result.is_floating_point():
        call.table.bend(x.ids)  # rounding is not linear
    if isinstance(x, Channels | Opaque):  # heads among the other arguments only lend their dtype
        return operators.unchanged(call)
    return _like(call, x) if isinstance(x, Heads) else call.give_up(call.unexpected)


def pointwise(call: Call) -> Value:
    """One function of one variable, the same for all entries."""
    x = call.argument(0, "input")
    values = flat((call.args, call.kwargs))
    tensors = [v for v in values if isinstance(v, Channels | Heads | Opaque)]
    if not isinstance(x, Heads) or any(v is not x and math.prod(v.shape) != 1 for v in tensors):
        return call.give_up(call.unexpected)
    call.table.bend(x.ids)
    return _like(call, x)


def _like(call: Call, x: Heads) -> Heads:
    return Heads(call.shape, x.dims, x.ids, x.width)


def softmax(call: Call) -> Value:
    """Softmax over positions, or over heads, whose channels then are the same."""
    x = call.argument(0, "input")
    dim = getattr(call.module, "dim", None) if call.module else call.argument(1, "dim")
    if not isinstance(x, Heads) or type(dim) is not int:
        return call.give_up(call.unexpected)
    if dim % len(x.shape) == x.dim:
        return call.give_up(f"{call.label} acts along the channels")
    _alike(call, x, [dim % len(x.shape)])
    call.table.bend(x.ids)
    return _like(call, x)


def reduction(call: Call) -> Value:
    """Mean or sum over positions, or over heads, whose channels then are the same."""
    x, dims = call.argument(0, "input"), call.argument(1, "dim")
    keep = call.argument(2, "keepdim", default=False)
    dims = [dims] if type(dims) is int else dims
    if not isinstance(x, Heads) or keep or not isinstance(dims, tuple | list):
        return call.give_up(call.unexpected)
    gone = sorted((d % len(x.shape) for d in dims), reverse=True)
    if x.dim in gone:
        return call.give_up("reduced over the channels")
    _alike(call, x, gone)
    result: Channels | Heads = x
    for dim in gone:
        result = _taken(spread(result), dim, 0)
    return result


def _alike(call: Call, x: Heads, dims: Sequence[int]) -> None:
    """Join the channels along some dimensions, because they are mixed there."""
    for axis, dim in enumerate(x.dims):
        if dim in dims:
            first = np.take(x.ids, [0], axis)
            call.table.join(np.ascontiguousarray(np.broadcast_to(first, x.ids.shape)), x.ids)


def normalization(call: Call) -> Value:
    """``F.normalize``: over the channels of each head, or over positions."""
    x, dim = call.argument(0, "input"), call.argument(2, "dim", 1)
    if not isinstance(x, Heads) or type(dim) is not int:
        return call.give_up(call.unexpected)
    dim %= len(x.shape)
    if dim == x.dim:
        call.select(x.ids, "norm over channels")
    _alike(call, x, [] if dim == x.dim else [dim])
    call.table.bend(x.ids)
    return _like(call, x)


def norm_of_heads(call: Call) -> Value:
    """A norm over the channels of each head, which has one weight for all heads."""
    x = call.argument(0, "input")
    shape = getattr(call.module, "normalized_shape", ())
    names = [name for name in ("weight", "bias") if call.has(name)]
    if not isinstance(x, Heads) or x.dim != len(x.shape) - 1 or len(shape) != 1:
        return call.give_up(f"{call.label} does not normalise over the channels of heads alone")
    if not call.plain("weight", "bias") or "weight" not in names:
        return call.give_up(f"{call.label} counts its channels, and has no weight that shows them")
    ids = call.table.axis(call.path, [(name, 0) for name in names], "carrier", x.ids.shape[x.width])
    for row in x.rows:
        call.table.join(ids, row)
    call.select(x.ids, f"norm over channels {call.path!r}")
    return _like(call, x)


def linear(call: Call) -> Value:
    """A linear layer over the channels of each head: one layer for all of them."""
    x = call.argument(0, "input")
    if not isinstance(x, Heads) or x.dim != len(x.shape) - 1:
        return call.give_up(f"{call.label} mixes another dimension than the channels")
    _alike(call, x, x.dims[: x.width] + x.dims[x.width + 1 :])
    one = np.take(x.rows, 0, axis=0)
    return layers.linear(replace(call, args=(Channels(x.shape, x.dim, one),), kwargs={}))


def scaling(call: Call) -> Value:
    """Product or quotient of heads and a number, or a tensor that is one for all their channels."""
    return _combined(call, factor=True)


def addition(call: Call) -> Value:
    """Sum or difference of heads and something that is one for all their channels."""
    return _combined(call, factor=False)


def _combined(call: Call, *, factor: bool) -> Value:
    left, right = call.argument(0, "input"), call.argument(1, "other")
    if not call.kwargs.keys() <= {"input", "other"}:
        return call.give_up(call.unexpected)
    if isinstance(left, Channels | Heads) and isinstance(right, Channels | Heads):
        return _combined_heads(call, spread(left), spread(right), factor=factor)
    x, other = (left, right) if isinstance(left, Heads) else (right, left)
    if isinstance(other, Opaque):
        behind = len(x.shape) - x.dim
        if len(other.shape) >= behind and other.shape[-behind] != 1:
            return call.give_up("combined with unfollowed channels")
    elif isinstance(other, Setting) or not isinstance(other, int | float):
        return call.give_up(call.unexpected)
    if not factor or x is right:
        call.table.bend(x.ids)
    shift = len(call.shape) - len(x.shape)
    return fitting(call, Heads(call.shape, tuple(d + shift for d in x.dims), x.ids, x.width))


def _combined_heads(call: Call, left: Heads, right: Heads, *, factor: bool) -> Value:
    wide, narrow = (left, right) if left.ids.ndim >= right.ids.ndim else (right, left)
    shift = [len(call.shape) - len(x.shape) for x in (wide, narrow)]
    places = [d + shift[0] for d in wide.dims]
    others = [d + shift[1] for d in narrow.dims]
    if places[wide.width] != others[narrow.width] or not set(others) <= set(places):
        return call.give_up("combined with other channels")
    # Where the narrow one has a dimension less it is one for all heads.
    ordered = np.transpose(
        narrow.ids, sorted(range(len(others)), key=lambda a: places.index(others[a]))
    )
    lacking = tuple(axis for axis, place in enumerate(places) if place not in others)
    spread = np.expand_dims(ordered, lacking)
    if any(a not in {1, b} for a, b in zip(spread.shape, wide.ids.shape, strict=True)):
        return call.give_up("combined with other channels")
    spread = np.broadcast_to(spread, wide.ids.shape)
    call.table.join(wide.ids, spread)
    if factor:
        call.table.bend(wide.ids)
        call.select(wide.ids, "multiplied channel by channel")
    else:
        call.restrict_sum(wide.ids, spread)
    return fitting(call, Heads(call.shape, tuple(places), wide.ids, wide.width))


def fitting(call: Call, x: Heads) -> Value:
    """Give up where a dimension of heads was broadcast."""
    if tuple(x.shape[d] for d in x.dims) != x.ids.shape:
        return call.give_up("heads are repeated")
    return x


def attribute(call: Call) -> Value:
    """``getattr``: the transpose of heads."""
    x, name = call.args[0], call.args[1]
    if not isinstance(x, Heads) or name not in {"mT", "data"}:
        return call.give_up(f"attribute {name!r} of a tensor")
    last = len(x.shape) - 1
    swap = {last: last - 1, last - 1: last} if name == "mT" else {}
    return _moved(call, x, [swap.get(d, d) for d in range(len(x.shape))])


def size(call: Call) -> Value:
    """``x.size(dim)``."""
    x, dim = call.args[0], call.argument(1, "dim")
    if not isinstance(x, Heads) or not isinstance(dim, int):
        return call.give_up(call.unexpected)
    width = type(dim) is int and dim % len(x.shape) == x.dim
    return Extent(x.rows.ravel(), len(x.rows)) if width else call.result
