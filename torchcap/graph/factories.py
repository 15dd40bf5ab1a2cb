"""Rules of operators that make tensors, and of writing into them."""

from __future__ import annotations

import torch

from torchcap.graph.values import Call, Channels, Extent, Opaque, Rule, Value, flat


def made(first: int, *, constant: bool = True) -> Rule:
    """Make the rule of a function that makes a tensor of given sizes (``zeros``, ``full``).

    Args:
        first: place of the sizes among the arguments; what stands before lends its dtype.
        constant: whether all entries are the same.
    """

    def rule(call: Call) -> Value:
        sizes = call.args[first:] or (call.kwargs.get("size", ()),)
        if sizes and isinstance(sizes[0], tuple | list):
            sizes = tuple(sizes[0])
        follow = [dim for dim, size in enumerate(sizes) if isinstance(size, Extent)]
        others = [v for v in flat((call.args[first:], call.kwargs)) if isinstance(v, Extent)]
        if not others:
            return Opaque(call.shape)
        extent = others[0]
        plain = extent.times == extent.parts == 1
        if len(follow) != 1 or len(others) > 1 or not plain or not constant:
            return call.give_up(f"its number of channels is used in {call.label}")
        if call.node.target not in _ZEROS:  # what is one for all channels commutes with no rotation
            call.table.bend(extent.ids)
        return Channels(call.shape, follow[0], extent.ids)

    return rule


_ZEROS = {torch.zeros, "new_zeros"}


def assignment(call: Call) -> Value:
    """``x[index] = value``, beside the channels: a part of the tensor comes from elsewhere."""
    x, index, value = call.args
    if not isinstance(x, Channels) or any(isinstance(v, Channels | Opaque) for v in flat(index)):
        return call.give_up(
            f"{call.label} by a tensor, or into one whose channels are not followed"
        )
    entries = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(entry is not None and entry is not Ellipsis for entry in entries)
    at = entries.index(Ellipsis) if Ellipsis in entries else len(entries)
    entries[at : at + 1] = [slice(None)] * (len(x.shape) - consumed)
    if None in entries or entries[x.dim] != slice(None):
        return call.give_up("written into some of the channels")
    behind = sum(isinstance(entry, slice) for entry in entries[x.dim :])
    if isinstance(value, Channels):
        if len(value.shape) - value.dim != behind or len(value.ids) != len(x.ids):
            return call.give_up("other channels are written into it")
        call.table.join(x.ids, value.ids)
    elif isinstance(value, Opaque):
        if len(value.shape) >= behind and value.shape[-behind] != 1:
            return call.give_up("a tensor whose channels are not followed is written into it")
        call.table.bend(x.ids)
    elif isinstance(value, int | float):
        call.table.bend(x.ids)
    else:
        return call.give_up(call.unexpected)
    return Channels(x.shape, x.dim, x.ids)
