"""``einsum``: a reading of one tensor, or the matrix product that two of them are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from torchcap.graph.attention import product
from torchcap.graph.values import Call, Channels, Heads, Opaque, Scores, Value

_ROW, _COLUMN = "<rows>", "<columns>"


def contraction(call: Call) -> Value:
    """``einsum``, of one tensor whose channels are followed, or of two that are multiplied."""
    equation, *operands = call.args
    nodes: list[Any] = list(call.node.args[1:])
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands, nodes = list(operands[0]), list(nodes[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return call.give_up(f"{call.label} without letters for all dimensions")
    if not all(isinstance(v, Channels | Heads | Opaque) for v in operands):
        return call.give_up(call.unexpected)
    inputs, output = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    followed = [i for i, v in enumerate(operands) if not isinstance(v, Opaque)]
    if len(followed) == 1 and isinstance(operands[followed[0]], Channels):
        return _alone(operands[followed[0]], terms, followed[0], output, call)
    pair = _Product.of(operands, terms, output) if len(operands) == 2 else None
    if pair is None:
        return call.give_up(f"{call.label} of several tensors with channels")
    return pair.read(call, nodes)


def _alone(x: Channels, terms: Sequence[str], place: int, output: str, call: Call) -> Value:
    """Follow channels that are neither summed over nor weighted."""
    letter = terms[place][x.dim]
    if letter not in output:
        return call.give_up(f"{call.label} sums over the channels")
    if "".join(terms).count(letter) > 1:
        return call.give_up(f"{call.label} with a tensor whose channels are not followed")
    return call.like(x, output.index(letter))


@dataclass(frozen=True, slots=True)
class _Product:
    """A matrix product: dimensions that both have, one that is summed over, and those of one.

    Attributes:
        operands: both tensors, with their dimensions in the order of a matrix product.
        order: of the dimensions of the product, by letter.
        shape: of the product.
        output: the letters that the einsum puts out.
    """

    operands: tuple[Value, Value]
    order: tuple[str, ...]
    shape: tuple[int, ...]
    output: str

    @classmethod
    def of(
        cls, operands: Sequence[Channels | Heads | Opaque], terms: Sequence[str], output: str
    ) -> _Product | None:
        """Return the product that an einsum is; None if it is none."""
        left, right = terms
        summed = [c for c in left if c in right and c not in output]
        rows, columns = ([c for c in a if c not in b] for a, b in ((left, right), (right, left)))
        alone = {*rows, *columns} - set(output)
        repeated = any(len(set(word)) < len(word) for word in (left, right, output))
        if len(summed) != 1 or alone or repeated:
            return None
        batch = [c for c in output if c in left and c in right]
        sizes: dict[str, int] = {}
        for x, term in zip(operands, terms, strict=True):
            sizes |= dict(zip(term, x.shape, strict=True))
        first = _arranged(operands[0], left, batch, rows, summed, sizes)
        second = _arranged(operands[1], right, batch, summed, columns, sizes)
        if first is None or second is None:
            return None
        last = (rows[0] if len(rows) == 1 else _ROW, columns[0] if len(columns) == 1 else _COLUMN)
        shape = tuple(prod(sizes[c] for c in group) for group in (*batch, rows, columns))
        return cls((first, second), (*batch, *last), shape, output)

    def read(self, call: Call, nodes: Sequence[Any]) -> Value:
        """Read the product, and put its dimensions in the order of the einsum."""
        multiplied = replace(
            call, args=self.operands, kwargs={}, result=torch.empty(self.shape, device="meta")
        )
        found = product(multiplied, nodes)
        if isinstance(found, Scores):
            return replace(found, shape=call.shape)
        if isinstance(found, Channels):
            return call.like(found, self.output.index(self.order[found.dim]))
        if isinstance(found, Heads):
            dims = tuple(self.output.index(self.order[d]) for d in found.dims)
            return Heads(call.shape, dims, found.ids, found.width)
        return Opaque(call.shape)


def _arranged(
    x: Channels | Heads | Opaque,
    term: str,
    batch: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    sizes: dict[str, int],
) -> Channels | Heads | Opaque | None:
    """Return a tensor with its dimensions in the order of a matrix product.

    Several rows become one, unless they hold channels: then there is no such product.
    """
    order = [*batch]
    for group in (first, second):
        held = {term[d] for d in _dims(x)}
        if len(group) != 1 and held.intersection(group):
            return None
        order.append(group[0] if len(group) == 1 else _ROW)
    shape = tuple(prod(sizes[c] for c in group) for group in (*batch, first, second))
    if isinstance(x, Channels):
        return Channels(shape, order.index(term[x.dim]), x.ids)
    if isinstance(x, Heads):
        return Heads(shape, tuple(order.index(term[d]) for d in x.dims), x.ids, x.width)
    return Opaque(shape)


def _dims(x: Channels | Heads | Opaque) -> tuple[int, ...]:
    if isinstance(x, Heads):
        return x.dims
    return (x.dim,) if isinstance(x, Channels) else ()
