"""Rules of operators that move, merge, cut or repeat dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from torchcap.graph.operators import beside
from torchcap.graph.values import Call, Channels, Extent, Opaque, Value


def permutation(call: Call) -> Value:
    """Permutation of all dimensions."""
    x = call.args[0]
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    order = call.argument(1, "dims")
    order = order if isinstance(order, tuple | list) else call.args[1:]
    if not all(isinstance(d, int) for d in order):
        return call.give_up("permuted by computed dimensions")
    return call.like(x, [d % len(x.shape) for d in order].index(x.dim))


def transposition(call: Call) -> Value:
    """Exchange of two dimensions."""
    x = call.args[0]
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    pair = [call.argument(1, "dim0"), call.argument(2, "dim1")]
    if not all(isinstance(d, int) for d in pair):
        return call.give_up("transposed by computed dimensions")
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
        return call.give_up("reshaped by the number of channels")
    if len(x.shape) == 1 and call.shape.count(1) == len(call.shape) - 1 and not extents:
        return _spread(call, x, sizes)
    end = _last_merged(x.shape, call.shape, x.dim)
    if end is None or len(sizes) != len(call.shape):
        return call.give_up("reshaped across the channels")
    size = sizes[x.dim]
    follows = size == -1 or (
        isinstance(size, Extent) and x.dim == end and np.array_equal(size.ids, x.ids)
    )
    if not follows or len(extents) != isinstance(size, Extent):
        return call.give_up("reshaped to a fixed number of channels")
    return _repeated(call, x, end)


def _spread(call: Call, x: Channels, sizes: Sequence[Value]) -> Value:
    """A vector (layer scale) with dimensions of size one put around its only one."""
    dim = next(d for d, n in enumerate(call.shape) if n == len(x.ids))
    if len(sizes) != len(call.shape) or sizes[dim] != -1:
        return call.give_up("reshaped to a fixed number of channels")
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
        return call.give_up("flattened with dimensions before the channels")
    return _repeated(call, x, end)


def removal(call: Call) -> Value:
    """``squeeze`` of a named dimension."""
    x, dim = call.argument(0, "input"), call.argument(1, "dim")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    if not isinstance(dim, int):
        return call.give_up("squeezed without a dimension")
    dim %= len(x.shape)
    if dim == x.dim:  # it would vanish, were there one channel left
        return call.give_up("squeezed along the channels")
    if x.shape[dim] != 1:
        return call.like(x)
    return call.like(x, x.dim - (dim < x.dim))


def expansion(call: Call) -> Value:
    """``expand`` and ``expand_as``, where the channels stay as many as they are."""
    x, other = call.args[0], call.args[1] if len(call.args) > 1 else None
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    dim = x.dim + len(call.shape) - len(x.shape)
    if isinstance(other, Channels):
        if other.dim != dim or len(other.ids) != len(x.ids):
            return call.give_up("expanded to other channels")
        call.table.join(x.ids, other.ids)
        return call.like(x, dim)
    sizes = other if isinstance(other, tuple | list) else call.args[1:]
    size = sizes[dim] if len(sizes) == len(call.shape) else None
    same = size == -1 or (isinstance(size, Extent) and np.array_equal(size.ids, x.ids))
    if not same or sum(isinstance(s, Extent) for s in sizes) != isinstance(size, Extent):
        return call.give_up("expanded to a fixed number of channels")
    return call.like(x, dim)


def repetition(call: Call) -> Value:
    """``repeat`` and ``tile`` of dimensions other than the channels."""
    x = call.args[0]
    counts = call.args[1] if isinstance(call.args[1], tuple | list) else call.args[1:]
    if not isinstance(x, Channels) or not all(isinstance(n, int) for n in counts):
        return call.give_up(call.unexpected)
    counts = [1] * (len(call.shape) - len(counts)) + list(counts)
    dim = x.dim + len(call.shape) - len(x.shape)
    if counts[dim] != 1:
        return call.give_up("channels are repeated")
    return call.like(x, dim)


def flipping(call: Call) -> Value:
    """``flip`` along dimensions other than the channels."""
    return beside(call, call.args[1:] if len(call.args) > 2 else call.argument(1, "dims"))


def unbinding(call: Call) -> Value:
    """``unbind`` of a dimension other than the channels."""
    x, dim = call.argument(0, "input"), call.argument(1, "dim", 0)
    if not isinstance(x, Channels) or not isinstance(dim, int):
        return call.give_up(call.unexpected)
    dim %= len(x.shape)
    if dim == x.dim:
        return call.give_up("channels are taken one by one")
    place = x.dim - (dim < x.dim)
    return tuple(Channels(tuple(piece.shape), place, x.ids) for piece in call.result)


def splitting(call: Call) -> Value:
    """``split`` along a dimension other than the channels: along them, widths are numbers."""
    x, dim = call.argument(0, "tensor"), call.argument(2, "dim", 0)
    if not isinstance(x, Channels) or not isinstance(dim, int):
        return call.give_up(call.unexpected)
    if dim % len(x.shape) == x.dim:
        return call.give_up("split into fixed numbers of channels")
    return tuple(Channels(tuple(piece.shape), x.dim, x.ids) for piece in call.result)


def stacking(call: Call) -> Value:
    """``stack``: a new dimension beside the channels, which are joined."""
    tensors, dim = call.argument(0, "tensors"), call.argument(1, "dim", 0)
    if not isinstance(tensors, tuple | list) or not isinstance(dim, int):
        return call.give_up(call.unexpected)
    followed = [t for t in tensors if isinstance(t, Channels)]
    if not followed or any(not isinstance(t, Channels | Opaque) for t in tensors):
        return call.give_up(call.unexpected)
    first = followed[0]
    for tensor in followed:
        if tensor.dim != first.dim:
            return call.give_up(f"{call.label} of tensors with channels in different places")
        call.table.join(first.ids, tensor.ids)
    if len(followed) < len(tensors):
        call.fix(first.ids, f"{call.label} with a tensor whose channels are not followed")
    return call.like(first, first.dim + (dim % len(call.shape) <= first.dim))


def relocation(call: Call) -> Value:
    """``movedim``: dimensions taken out and put in elsewhere."""
    x, source, target = call.args[0], call.argument(1, "source"), call.argument(2, "destination")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    target_of = relocated(len(x.shape), source, target)
    return call.give_up(call.unexpected) if target_of is None else call.like(x, target_of[x.dim])


def relocated(dims: int, source: Value, target: Value) -> list[int] | None:
    """Return where ``movedim`` puts each dimension; None if its arguments are no numbers."""
    places = [v if isinstance(v, tuple | list) else (v,) for v in (source, target)]
    if not all(isinstance(d, int) for p in places for d in p):
        return None
    numbered = torch.empty(*range(1, dims + 1), device="meta")
    moved = list(numbered.movedim(*map(tuple, places)).shape)
    return [moved.index(number) for number in range(1, dims + 1)]


def picking(call: Call) -> Value:
    """``select``: one entry of a dimension other than the channels."""
    x, dim = call.argument(0, "input"), call.argument(1, "dim")
    if not isinstance(x, Channels) or not isinstance(dim, int):
        return call.give_up(call.unexpected)
    dim %= len(x.shape)
    if dim == x.dim:
        return call.give_up("indexed along the channels")
    return call.like(x, x.dim - (dim < x.dim))


def unflattening(call: Call) -> Value:
    """``unflatten`` of a dimension other than the channels."""
    x, dim = call.argument(0, "input"), call.argument(1, "dim")
    dim = dim if call.module is None else getattr(call.module, "dim", None)
    if not isinstance(x, Channels) or not isinstance(dim, int):
        return call.give_up(call.unexpected)
    dim %= len(x.shape)
    if dim == x.dim:
        return call.give_up("reshaped to a fixed number of channels")
    return call.like(x, x.dim + (dim < x.dim) * (len(call.shape) - len(x.shape)))


def reshaping_as(call: Call) -> Value:
    """``reshape_as`` and ``view_as``: to a tensor whose last dimension is the channels too."""
    x, other = call.args[0], call.argument(1, "other")
    if not isinstance(x, Channels) or not isinstance(other, Channels):
        return call.give_up(call.unexpected)
    last = x.dim == len(x.shape) - 1 and other.dim == len(other.shape) - 1
    if not last or len(x.ids) != len(other.ids):
        return call.give_up("reshaped across the channels")
    call.table.join(x.ids, other.ids)
    return call.like(x, other.dim)


# --------------------------------------------------------------------------------------------------
# Positions of an image, put beside their channel


def spreading(call: Call) -> Value:
    """``unfold``, ``pixel_unshuffle``: windows of each channel become neighbours in its place."""
    x = call.argument(0, "input")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    if x.dim != len(x.shape) - 3:
        return call.give_up(f"{call.label} acts along the channels")
    return Channels(call.shape, x.dim, np.repeat(x.ids, call.shape[x.dim] // len(x.ids)))


def gathering(call: Call) -> Value:
    """``fold``, ``pixel_shuffle``: neighbours become windows, if they are all of one channel."""
    x = call.argument(0, "input")
    if not isinstance(x, Channels):
        return call.give_up(call.unexpected)
    dim = len(call.shape) - 3
    neighbours = x.ids.reshape(call.shape[dim], -1) if x.dim == dim else x.ids[None]
    if x.dim != dim:
        return call.give_up(f"{call.label} acts along the channels")
    first = np.broadcast_to(neighbours[:, :1], neighbours.shape)
    if not np.array_equal(first, neighbours):  # what becomes one channel goes or stays together
        call.table.join(first.ravel(), neighbours.ravel())
    return Channels(call.shape, dim, neighbours[:, 0])
