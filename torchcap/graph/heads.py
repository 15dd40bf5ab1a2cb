"""Rules of channels that a reshape spreads over several dimensions, as attention has them.

A linear layer writes queries, keys and values of all heads in one row; a reshape gives every head a
dimension of its own. From there on channels are followed along several dimensions
(:class:`~torchcap.graph.values.Heads`), until a reshape puts the heads side by side again. The
heads stay, and of each equally many channels may go.

The numbers that reshapes, splits and slices are given must follow. They do where they are left to
be found (``-1``), read from a shape, or held by a module (:class:`~torchcap.graph.sizes.Size`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from torchcap.graph import moving, operators
from torchcap.graph.sizes import Size
from torchcap.graph.values import Call, Channels, Extent, Heads, Opaque, Value, flat

_UNEVEN = "does not fall evenly into heads at {}"


def spread(x: Channels | Heads) -> Heads:
    """Return a tensor with channels along one dimension as one with a single head."""
    return x if isinstance(x, Heads) else Heads(x.shape, (x.dim,), x.ids, 0)


def settled(x: Heads) -> Channels | Heads:
    """Return heads that are left with one dimension as plain channels."""
    return Channels(x.shape, x.dim, x.ids) if len(x.dims) == 1 else x


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
    pin_sizes(call)
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
    pin_sizes(call)
    return moving.unflattening(call)


def _stands_alone(x: Channels, shape: tuple[int, ...]) -> bool:
    """Whether a reshape merges the channels with no other dimension."""
    group = next((old for old, _ in _groups(x.shape, shape) if x.dim in old), [])
    return group == [x.dim] and x.shape[x.dim] > 1 < len(x.shape)


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
            return call.give_up(f"channels are regrouped with others at {call.node.name!r}")
        dims += new_dims
        full += [x.shape[d] for d in old_dims]
        spots += [slice(None) if d in held else None for d in old_dims]
    # Positions that are merged with channels repeat what these hold.
    entries = np.transpose(x.ids, np.argsort(x.dims))[tuple(spots)]
    entries = np.broadcast_to(entries, full).reshape([new[d] for d in dims])
    return _sized(call, Heads(new, tuple(dims), entries, dims.index(width)), sizes)


def _width_among(sizes: Sequence[Value], new_dims: list[int]) -> int:
    """Return which of the new dimensions may become smaller: what is left open, or the last."""
    open_ones = [d for d in new_dims if type(sizes[d]) is int and sizes[d] == -1]
    return open_ones[0] if open_ones else new_dims[-1]


def _sized(call: Call, x: Heads, sizes: Sequence[Value]) -> Value:
    """Check that the sizes of a reshape follow the channels, or can be made to."""
    for dim, size in enumerate(sizes):
        if isinstance(size, Size) and dim != x.dim:
            call.table.pin(size)
        elif isinstance(size, Extent) and dim != x.dim:
            return call.give_up(f"reshaped by the number of channels at {call.node.name!r}")
    size = sizes[x.dim]
    if isinstance(size, Size):
        call.table.bind(size, x.rows)
    elif isinstance(size, Extent):
        if size.parts != len(x.rows) or len(size.ids) != x.rows.size:
            return call.give_up(f"reshaped by other channels at {call.node.name!r}")
        call.table.join(size.ids, x.rows)
    elif size != -1:
        return call.give_up(f"reshaped to a fixed number of channels at {call.node.name!r}")
    call.table.balance(x.rows, _UNEVEN.format(repr(call.node.name)))
    return settled(x)


def pin_sizes(call: Call) -> None:
    """Note that an operator uses sizes in a way that cannot follow channels."""
    for value in flat((call.args, call.kwargs)):
        if isinstance(value, Size):
            call.table.pin(value)


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
        return call.give_up(f"channels are taken one by one at {call.node.name!r}")
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
    """``split``: along the channels, where the modules hold the widths of the pieces."""
    x, dim = call.argument(0, "tensor"), call.argument(2, "dim", 0)
    if isinstance(x, Channels) and type(dim) is int and dim % len(x.shape) == x.dim:
        return cutting(call)
    pin_sizes(call)
    return moving.splitting(call)


def cutting(call: Call) -> Value:
    """``chunk`` and ``split`` of heads."""
    x, cut = call.args[0], call.argument(1, "split_size_or_sections")
    dim = call.argument(2, "dim", 0)
    if not isinstance(x, Channels | Heads) or type(dim) is not int:
        return call.give_up(call.unexpected)
    x, dim = spread(x), dim % len(x.shape)
    shapes = [tuple(piece.shape) for piece in call.result]
    if dim not in x.dims:
        pin_sizes(call)
        return tuple(Heads(shape, x.dims, x.ids, x.width) for shape in shapes)
    axis = x.dims.index(dim)
    ends = np.cumsum([shape[dim] for shape in shapes])[:-1]
    ids = np.split(x.ids, ends, axis=axis)
    pieces = [Heads(s, x.dims, i, x.width) for s, i in zip(shapes, ids, strict=True)]
    if axis == x.width and call.node.target in _SPLITS:
        return _sized_pieces(call, pieces, cut)
    pin_sizes(call)
    if axis == x.width and call.node.target not in _CHUNKS:
        return call.give_up(f"split into fixed numbers of channels at {call.node.name!r}")
    if axis == x.width:
        if len({shape[dim] for shape in shapes}) > 1:
            return call.give_up(f"{call.label} into unequal pieces")
        rows = np.concatenate([piece.rows for piece in pieces])
        call.table.balance(rows, _UNEVEN.format(repr(call.node.name)))
    return tuple(pieces)


_SPLITS = {torch.split, torch.functional.split, "split", "split_with_sizes"}
_CHUNKS = {torch.chunk, "chunk"}


def _sized_pieces(call: Call, pieces: list[Heads], sizes: Value) -> Value:
    """Let the numbers that say how wide the pieces are follow them."""
    if not isinstance(sizes, tuple | list):
        sizes = [sizes] * len(pieces)
    widths = [piece.ids.shape[piece.width] for piece in pieces]
    followed = [isinstance(s, Size) and s.plain == w for s, w in zip(sizes, widths, strict=False)]
    if len(sizes) != len(pieces) or not all(followed):
        return call.give_up(f"split into fixed numbers of channels at {call.node.name!r}")
    for piece, size in zip(pieces, sizes, strict=True):
        call.table.bind(size, piece.rows)
        call.table.balance(piece.rows, _UNEVEN.format(repr(call.node.name)))
    return tuple(settled(piece) for piece in pieces)


def item(call: Call) -> Value:
    """Indexing; a slice of the first channels may be as wide as a module says."""
    x, index = call.args
    if isinstance(x, Channels) and isinstance(index, tuple) and len(index) > x.dim:
        cut = index[x.dim]
        before = index[: x.dim]
        plain = all(type(i) is slice for i in before) and isinstance(cut, slice)
        if plain and cut.start is None and cut.step is None and isinstance(cut.stop, Size | int):
            return _first_channels(call, x, cut.stop)
    pin_sizes(call)
    return operators.item(call)


def _first_channels(call: Call, x: Channels, stop: int) -> Value:
    rest = [*call.args[1]]
    rest[x.dim] = slice(None)
    if rest != [slice(None)] * len(rest):
        return call.give_up(f"indexed along the channels and besides at {call.node.name!r}")
    width = call.shape[x.dim]
    if isinstance(stop, Size) and stop.plain == width:
        call.table.bind(stop, x.ids[None, :width])
    elif isinstance(stop, Size) or stop < len(x.ids):
        return call.give_up(f"indexed along the channels at {call.node.name!r}")
    return Channels(call.shape, x.dim, x.ids[:width])


def item_of_heads(call: Call) -> Value:
    """Indexing of heads beside their width, and of tuples that hold them."""
    x, index = call.args
    if not isinstance(x, Heads):
        known = isinstance(x, tuple | list) and type(index) in {int, slice}
        return x[index] if known else call.give_up(call.unexpected)
    pin_sizes(call)
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(v, int | None) for v in flat(entries) if v is not Ellipsis):
        return call.give_up(f"indexed by a tensor at {call.node.name!r}")
    consumed = sum(i is not None and i is not Ellipsis for i in entries)
    at = entries.index(Ellipsis) if Ellipsis in entries else len(entries)
    entries[at : at + 1] = [slice(None)] * (len(x.shape) - consumed)
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
                return call.give_up(f"indexed along the channels at {call.node.name!r}")
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
        return call.give_up(f"{call.label} along the channels at {call.node.name!r}")
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
        return call.give_up(f"reduced over the channels at {call.node.name!r}")
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
        call.table.select(x.ids, f"norm over channels at {call.node.name!r}")
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
    call.table.select(x.ids, f"norm over channels {call.path!r}")
    return _like(call, x)


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
            return call.give_up(f"combined with unfollowed channels at {call.node.name!r}")
    elif isinstance(other, Size) or not isinstance(other, int | float):
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
        return call.give_up(f"combined with other channels at {call.node.name!r}")
    # Where the narrow one has a dimension less it is one for all heads.
    ordered = np.transpose(
        narrow.ids, sorted(range(len(others)), key=lambda a: places.index(others[a]))
    )
    lacking = tuple(axis for axis, place in enumerate(places) if place not in others)
    spread = np.expand_dims(ordered, lacking)
    if any(a not in {1, b} for a, b in zip(spread.shape, wide.ids.shape, strict=True)):
        return call.give_up(f"combined with other channels at {call.node.name!r}")
    spread = np.broadcast_to(spread, wide.ids.shape)
    call.table.join(wide.ids, spread)
    if factor:
        call.table.bend(wide.ids)
        call.table.select(wide.ids, f"multiplied channel by channel at {call.node.name!r}")
    else:
        call.restrict_sum(wide.ids, spread)
    return fitting(call, Heads(call.shape, tuple(places), wide.ids, wide.width))


def fitting(call: Call, x: Heads) -> Value:
    """Give up where a dimension of heads was broadcast."""
    if tuple(x.shape[d] for d in x.dims) != x.ids.shape:
        return call.give_up(f"heads are repeated at {call.node.name!r}")
    return x


def attribute(call: Call) -> Value:
    """``getattr``: the shape of heads."""
    x, name = call.args[0], call.args[1]
    if isinstance(x, Heads) and name in {"dtype", "device", "ndim"}:
        return call.result
    return _sizes(x) if isinstance(x, Heads) and name == "shape" else operators.attribute(call)


def size(call: Call) -> Value:
    """``x.size()``, ``x.size(dim)``."""
    x, dim = call.args[0], call.argument(1, "dim")
    if not isinstance(x, Heads):
        return call.give_up(call.unexpected)
    return _sizes(x) if dim is None else _sizes(x)[dim]


def _sizes(x: Heads) -> tuple[int | Extent, ...]:
    extent = Extent(x.rows.ravel(), len(x.rows))
    return tuple(extent if dim == x.dim else n for dim, n in enumerate(x.shape))


def division(call: Call) -> Value:
    """Whole division of a number of channels."""
    left, right = call.args
    pin_sizes(call)
    whole = isinstance(left, Extent) and left.parts == 1 and isinstance(right, int)
    if whole and right > 0 and len(left.ids) % right == 0:
        return Extent(left.ids, int(right))
    return call.give_up(f"its number of channels is computed with, in {call.label}")
