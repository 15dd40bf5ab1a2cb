"""Rules of attention: the products of queries and keys, and of attention and values.

From values to the layer that reads them everything is linear, head by head. Queries and keys meet
in a dot product, which a common orthonormal basis leaves as it is. Where the operator divides by
the root of the number of channels, the layer that wrote the queries is scaled, so that scores stay
what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from torchcap.graph import heads, operators
from torchcap.graph.channels import Ids
from torchcap.graph.heads import fitting, follows, settled, spread
from torchcap.graph.numbers import pin_settings
from torchcap.graph.operators import addition
from torchcap.graph.values import (
    Call,
    Channels,
    Heads,
    Opaque,
    Root,
    Scores,
    Value,
    flat,
    followed_ids,
)


def product(call: Call, nodes: Sequence[Any] | None = None) -> Value:
    """Matrix product: of queries and keys, or of attention and values.

    Args:
        call: the call.
        nodes: both operands in the graph, if they are not the arguments of the call.
    """
    left, right = call.argument(0, "input"), call.argument(1, "other")
    if not all(
        isinstance(x, Channels | Heads | Opaque) and len(x.shape) > 1 for x in (left, right)
    ):
        return call.give_up(call.unexpected)
    if isinstance(left, Opaque) and isinstance(right, Opaque):
        return Opaque(call.shape)
    if isinstance(left, Opaque):
        return _multiplied(call, spread(right), kept=-1, summed=-2)
    if isinstance(right, Opaque):
        return _multiplied(call, spread(left), kept=-2, summed=-1)
    rows = _paired(spread(left), -1, spread(right), -2)
    if rows is None:
        return call.give_up("multiplied along different channels")
    key = call.table.contract(call.where, *rows)
    return Scores(call.shape, key, rows[0], _writer(call, ("input", "other"), nodes))


def scaling(call: Call) -> Value:
    """A product or quotient, which may be that of scores, or of queries, and a root of a size."""
    roots = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Root)]
    if not roots:
        pin_settings(call)
        rule = heads.scaling if call.has_heads() else operators.scaling
        return rule(call)
    found = _divided(call, *call.args) if len(call.args) == 2 and not call.kwargs else None
    if found is not None:
        return found
    for root in roots:
        ids = followed_ids(root)
        if ids is not None:
            call.fix(ids, "the root of its number of channels is computed with")
    pin_settings(call)
    plain = tuple(v.number if isinstance(v, Root) else v for v in call.args)
    return scaling(replace(call, args=plain, kwargs={}))


def _divided(call: Call, x: Value, root: Value) -> Value | None:
    """Divide by the root of a number of channels, and let the layer behind make up for it."""
    divides = call.node.target in operators.DIVISIONS
    if not isinstance(root, Root) or root.power != (0.5 if divides else -0.5):
        return None
    if isinstance(x, Scores):
        rows, writer = x.rows, x.writer
    elif isinstance(x, Channels | Heads):
        rows, writer = spread(x).rows, written_by_layer(call.node.args[0], call)
    else:
        return None
    if writer is None or not follows(call, root.size, rows):
        return None
    if isinstance(x, Scores):
        call.table.divide(x.key, writer)
        return Opaque(call.shape)
    call.table.divide_side(rows, writer)
    return replace(x, shape=call.shape)


def added_product(call: Call) -> Value:
    """``addmm`` and ``baddbmm``: a matrix product, and a term that is added."""
    term, left, right = call.args if len(call.args) == 3 else (None, None, None)
    if call.kwargs or not all(isinstance(x, Channels | Heads | Opaque) for x in (left, right)):
        return call.give_up(call.unexpected)
    found = product(replace(call, args=(left, right)))
    return addition(replace(call, args=(found, term)))


def _multiplied(call: Call, x: Heads, *, kept: int, summed: int) -> Value:
    """A product with a tensor that is not followed, which mixes positions of each head."""
    places = [d - len(x.shape) for d in x.dims]
    if places[x.width] != kept or summed in places:
        return call.give_up("multiplied along the channels")
    dims = tuple(place + len(call.shape) for place in places)
    found = fitting(call, Heads(call.shape, dims, x.ids, x.width))
    return settled(found) if isinstance(found, Heads) else found


def _paired(left: Heads, at: int, right: Heads, other: int) -> tuple[Ids, Ids] | None:
    """Return the rows of two tensors that are multiplied along their channels, head by head."""
    rows = []
    heads = []
    for x, place in ((left, at), (right, other)):
        places = [d - len(x.shape) for d in x.dims]
        leading = sorted((p, axis) for axis, p in enumerate(places) if axis != x.width)
        if places[x.width] != place or any(p >= -2 for p, _ in leading):
            return None
        ids = np.transpose(x.ids, [*(axis for _, axis in leading), x.width])
        heads.append([(p, x.ids.shape[axis]) for p, axis in leading])
        rows.append(ids.reshape(-1, ids.shape[-1]))
    same = heads[0] == heads[1] and rows[0].shape == rows[1].shape
    return (rows[0], rows[1]) if same else None


def dot_product_attention(call: Call) -> Value:
    """``scaled_dot_product_attention``."""
    query, key, value = (call.argument(i, name) for i, name in enumerate(("query", "key", "value")))
    followed = [v for v in flat((call.args, call.kwargs)) if isinstance(v, Channels | Heads)]
    given = [x for x in (query, key, value) if isinstance(x, Channels | Heads)]
    if len(followed) != len(given) or call.argument(7, "enable_gqa", default=False):
        return call.give_up(call.unexpected)
    scaled = call.argument(6, "scale") is None  # then by the root of the number of channels
    writer = _writer(call, ("query", "key")) if scaled else None
    pair = [x for x in (query, key) if isinstance(x, Channels | Heads)]
    rows = _paired(spread(pair[0]), -1, spread(pair[1]), -1) if len(pair) == 2 else None
    if rows is None or (scaled and writer is None):
        for x in pair:
            call.fix(x.ids, f"computed with, on the way to {call.label}")
    else:
        call.table.contract(call.where, *rows, writer=writer)
    if not isinstance(value, Channels | Heads):
        return Opaque(call.shape)
    return _multiplied(call, spread(value), kept=-1, summed=-2)


def _writer(call: Call, names: tuple[str, str], nodes: Sequence[Any] | None = None) -> str | None:
    """Return the layer that wrote the queries, if nothing but moves is done to them afterwards.

    None if there is none, or if it wrote the keys too and the two cannot be told apart.
    """
    query, key = nodes or [
        call.node.args[place] if place < len(call.node.args) else call.node.kwargs.get(name)
        for place, name in enumerate(names)
    ]
    wrote, other = written_by_layer(query, call), written_by_layer(key, call)
    pair = [call.argument(place, name) for place, name in enumerate(names)]
    if wrote is not None and wrote == other:
        followed = [x.ids for x in pair if isinstance(x, Channels | Heads)]
        apart = len(followed) == 2 and not np.isin(followed[0], followed[1]).any()
        if call.table.role(wrote) != "producer" or not apart:
            return None
    return wrote


def written_by_layer(node: Any, call: Call) -> str | None:
    """Return the layer that wrote a value which has only been moved since."""
    while isinstance(node, fx.Node):
        path = str(node.target)
        if node.op == "call_module":
            module = call.module_of(node)
            if isinstance(module, nn.Linear | _ConvNd) or hasattr(module, "normalized_shape"):
                plain = isinstance(getattr(module, "act", None), nn.Identity | None)
                return path if plain and call.table.role(path) is not None else None
            if path not in call.folds and call.kind_of(node) != "unchanged":
                return None
        elif call.kind_of(node) not in {"move", "unchanged", "chunk", "split"}:
            return None
        node = node.args[0] if node.args else None
    return None
