"""Writing down what a reading has found: resolved channels as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from torchcap.graph.channels import UNKNOWN, Axis, ChannelTable, Ids, Resolved, Run, Scaling
from torchcap.graph.spaces import (
    ChannelSpace,
    Counted,
    DotProduct,
    Freedom,
    Port,
    ScaledRows,
    Stretch,
    Tap,
)
from torchcap.graph.taps import Sight

Names = Mapping[int, str]
"""Names of spaces, by their number."""


def spaces_of(
    table: ChannelTable, resolved: Resolved
) -> tuple[tuple[ChannelSpace, ...], dict[int, str]]:
    """Return the spaces that have a producer, and their names by number."""
    ports: dict[int, dict[str, list[Port]]] = {}
    lost: list[ChannelSpace] = []
    for axis, runs, why in zip(table.axes.values(), resolved.runs, resolved.lost, strict=True):
        if axis.role == "producer" and not runs:
            lost.append(_lost(axis, why))
        for run in runs:
            roles = ports.setdefault(run.space, {"producer": [], "consumer": [], "carrier": []})
            roles[axis.role] += _ports(axis, run)
    names: dict[int, str] = {}
    taken: Counter[str] = Counter()
    spaces = []
    for number, roles in ports.items():
        if not roles["producer"]:
            continue
        first = roles["producer"][0].module
        taken[first] += 1
        names[number] = first if taken[first] == 1 else f"{first}:{taken[first]}"
        freedom, reason = _freedom(resolved, number, roles)
        spaces.append(
            ChannelSpace(
                name=names[number],
                channels=resolved.channels[number],
                freedom=freedom,
                producers=tuple(roles["producer"]),
                consumers=tuple(roles["consumer"]),
                carriers=tuple(roles["carrier"]),
                reason=reason,
                blocks=resolved.cells[number],
                products=resolved.products[number],
            )
        )
    return (*spaces, *lost), names


def _lost(axis: Axis, reason: str) -> ChannelSpace:
    """Return the space of a layer whose channels meet in ways that no space has."""
    count = len(axis.ids)
    ports = tuple(Port(axis.module, name, dim, 0, 0, count) for name, dim in axis.tensors)
    return ChannelSpace(axis.module, count, "fixed", ports, (), (), reason)


def _ports(axis: Axis, run: Run) -> list[Port]:
    return [
        Port(axis.module, name, dim, run.offset, run.start, run.channels, run.repeat, axis.groups)
        for name, dim in axis.tensors
    ]


def _freedom(
    resolved: Resolved, space: int, roles: Mapping[str, list[Port]]
) -> tuple[Freedom, str]:
    reason = resolved.reasons[space]
    if reason is None and not roles["consumer"] and not resolved.products[space]:
        reason = "no layer with a rule reads it"
    if reason is None and resolved.channels[space] == resolved.cells[space]:
        reason = "every block holds one channel"
    if reason is not None:
        return "fixed", reason
    if resolved.selection[space] is not None:
        return "selection", str(resolved.selection[space])
    return ("stiefel" if resolved.nonlinear[space] else "linear"), ""


def counted(size: int, layout: tuple[Run, ...], names: Names) -> Counted:
    """Return how many channels of which spaces a layout holds."""
    sizes = [(names.get(run.space), run.channels * run.repeat) for run in layout]
    return Counted(size, tuple((name, size) for name, size in sizes if name is not None))


def dot_products_of(table: ChannelTable, resolved: Resolved, names: Names) -> Iterator[DotProduct]:
    """Yield the products both of whose sides are stretches of what layers write.

    Channels that meet in any other product as well are left out.
    """
    labels, sides = table.labels(), table.labels(contracted=False)
    found, others = [], [np.empty(0, dtype=np.int64)]
    for pair in table.products():
        product = None
        if not np.isin(sides[pair[0]], sides[pair[1]]).any():
            product = _dot_product(table, resolved, names, pair)
        if product is None:
            others.append(labels[pair[0]])
        else:
            found.append((labels[pair[0]], product))
    other = np.concatenate(others)
    yield from (product for classes, product in found if not np.isin(classes, other).any())


def _dot_product(
    table: ChannelTable, resolved: Resolved, names: Names, pair: tuple[Ids, Ids]
) -> DotProduct | None:
    if not all(np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids))) for ids in pair):
        return None
    places = []
    for ids in pair:
        for axis, runs in zip(table.axes.values(), resolved.runs, strict=True):
            if axis.role == "producer" and ids[0] in axis.ids:
                places.append((axis.module, int(ids[0] - axis.ids[0]), runs))
    if len(places) != 2:
        return None
    (left, at, runs), (right, other, _) = places
    for run in runs:
        width = resolved.channels[run.space] // resolved.cells[run.space]
        start = run.start + at - run.offset
        if run.offset <= at < run.offset + run.channels and width == len(pair[0]):
            return DotProduct(names[run.space], start // width, (left, at), (right, other))
    return None


def scaled_rows(table: ChannelTable, scaling: Scaling, counted: Counted) -> ScaledRows:
    """Return the rows of a layer that are scaled for a product of queries and keys."""
    axis = next(
        a for a in table.axes.values() if a.module == scaling.writer and a.role != "consumer"
    )
    sides = table.labels(contracted=False)
    rows = np.isin(sides[axis.ids], sides[scaling.ids])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], rows, [False]])))
    stretches = tuple((int(a), int(b - a)) for a, b in edges.reshape(-1, 2))
    return ScaledRows(scaling.writer, stretches, counted, scaling.roots)


def taps_of(
    sights: Sequence[Sight],
    layouts: Sequence[tuple[Run, ...]],
    names: Names,
    spaces: Sequence[ChannelSpace],
) -> Iterator[Tap]:
    """Yield the places where features can be compared, of those that were seen."""
    readers = {
        module
        for space in spaces
        if space.free
        for port in space.consumers
        for module in (port.module, port.module.rpartition(".")[0])
    }
    for sight, layout in zip(sights, layouts, strict=True):
        if layout and (sight.reader is None or sight.reader in readers):
            yield Tap(
                sight.name,
                sight.module,
                sight.call,
                sight.side,
                sight.value.dim,
                tuple(
                    Stretch(
                        None if run.space == UNKNOWN else names.get(run.space),
                        run.start,
                        run.channels,
                        run.repeat,
                    )
                    for run in layout
                ),
            )
