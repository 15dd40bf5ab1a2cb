"""The smallest sum of tables over several variables, exactly where the tables allow it.

Variables that no table holds together are independent, and a chain of tables is minimised from its
end: a variable is eliminated by adding up all tables that hold it and keeping, for each combination
of the other variables in them, its best value. Where that would need too large a table, variables
are changed one after the other until none changes any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

import numpy as np

from torchcap.plan.price import Table, Vector

LARGEST_TABLE: Final = 2**22
"""Entries of the largest table that is added up."""


def minimize(sizes: Sequence[int], tables: Sequence[Table]) -> list[int]:
    """Return the index of each variable's value in the smallest sum.

    Args:
        sizes: how many values each variable can take.
        tables: (variables, what each combination of their values adds), the axes in the order of
            the variables.

    Returns:
        the exact minimum, unless eliminating the variables one by one needs a table of more than
        ``LARGEST_TABLE`` entries; then one that no change of a single variable improves.
    """
    order = _elimination_order(sizes, tables)
    return _descend(sizes, tables) if order is None else _eliminate(sizes, tables, order)


def _elimination_order(sizes: Sequence[int], tables: Sequence[Table]) -> list[int] | None:
    """Return an order in which no large table comes up; None if this search finds none."""
    near: dict[int, set[int]] = {variable: set() for variable in range(len(sizes))}
    for variables, _ in tables:
        for variable in variables:
            near[variable] |= set(variables) - {variable}
    order = []
    while near:
        costs = {v: prod(sizes[n] for n in others) * sizes[v] for v, others in near.items()}
        variable = min(costs, key=costs.__getitem__)
        if costs[variable] > LARGEST_TABLE:
            return None
        others = near.pop(variable)
        for other in others:
            near[other] |= others - {other}
            near[other].discard(variable)
        order.append(variable)
    return order


def _eliminate(sizes: Sequence[int], tables: Sequence[Table], order: Sequence[int]) -> list[int]:
    left = [(tuple(variables), table) for variables, table in tables]
    best: list[tuple[int, tuple[int, ...], np.ndarray]] = []
    for variable in order:
        mine = [entry for entry in left if variable in entry[0]]
        left = [entry for entry in left if variable not in entry[0]]
        others = tuple(sorted({v for variables, _ in mine for v in variables} - {variable}))
        axes = (*others, variable)
        total = np.zeros([sizes[v] for v in axes])
        for variables, table in mine:
            total += _spread(variables, table, axes)
        best.append((variable, others, total.argmin(-1)))
        left.append((others, total.min(-1)))
    chosen = [0] * len(sizes)
    for variable, others, choice in reversed(best):
        chosen[variable] = int(choice[tuple(chosen[v] for v in others)])
    return chosen


def _spread(variables: Sequence[int], table: Vector, axes: Sequence[int]) -> Vector:
    """Give a table the axes of another, of length 1 where it does not depend on them."""
    ordered = np.transpose(table, np.argsort([axes.index(v) for v in variables]))
    return ordered.reshape([table.shape[variables.index(v)] if v in variables else 1 for v in axes])


def _descend(sizes: Sequence[int], tables: Sequence[Table]) -> list[int]:
    """Improve one variable after the other, from the smallest and the largest values on."""
    starts = [[0] * len(sizes), [size - 1 for size in sizes]]
    found = [_improve(sizes, tables, start) for start in starts]
    return min(found, key=lambda chosen: _sum(tables, chosen))


def _improve(sizes: Sequence[int], tables: Sequence[Table], start: list[int]) -> list[int]:
    chosen = list(start)
    holding = [[entry for entry in tables if v in entry[0]] for v in range(len(sizes))]
    changed = True
    while changed:
        changed = False
        for variable, mine in enumerate(holding):
            total = np.zeros(sizes[variable])
            for variables, table in mine:
                line = tuple(slice(None) if v == variable else chosen[v] for v in variables)
                total += table[line]
            better = int(total.argmin())
            if total[better] < total[chosen[variable]]:
                chosen[variable], changed = better, True
    return chosen


def _sum(tables: Sequence[Table], chosen: Sequence[int]) -> float:
    return float(sum(table[tuple(chosen[v] for v in variables)] for variables, table in tables))
