"""Channel identities: which entries of which tensor axes are the same channel.

Every axis of every parameter gets a run of integers, one a channel. Reading the graph joins the
integers that an operator forces to agree (the output axis of a convolution and the input axis of
the next one) and notes what may not change. At the end the joined classes fall into *cells*: runs
of channels that travel together through every axis, in one order. Cells whose ranks must agree
(the groups of a grouped convolution, the halves of a chunk) form one channel space.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from torch import fx

from torchcap.graph.sizes import Place

Ids = NDArray[np.int64]

Share = tuple[Ids, Fraction]
"""Some channels, and what their number is multiplied with."""

ProductKey = tuple[str, int, int, int]
"""What tells one dot product from all others: its place, its two sides, how often it was met."""

UNKNOWN = -1
"""The space of channels that stand on no layer's axis."""

_LONG = 4096
"""Channels that stay anyway are put together up to this number."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of one layer, with the tensors that carry it.

    Attributes:
        module: qualified name of the layer, ``""`` for the model itself.
        tensors: (tensor name, axis number) of each parameter or buffer with this axis.
        role: ``"producer"``, ``"consumer"`` or ``"carrier"``.
        ids: the channel identities along the axis; for the input of a grouped convolution, of all
            groups one after the other.
        groups: number of groups that share the positions of the axis (grouped convolution input).
    """

    module: str
    tensors: tuple[tuple[str, int], ...]
    role: str
    ids: Ids
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of an axis that holds consecutive channels of one space, each ``repeat`` times."""

    offset: int
    space: int
    start: int
    channels: int
    repeat: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """Channel spaces of a table, by number.

    Attributes:
        cells: number of equal cells of each space.
        channels: channels of each space, all cells together.
        reasons: why a space may not change, else None.
        selection: what tells the channels of a space apart, else None.
        nonlinear: whether a nonlinearity stands in the space.
        products: which cells of a space meet in a dot product.
        runs: for each axis of the table, what it is made of; empty where it is not made of whole
            cells (whose spaces are then fixed).
        lost: for each axis that is not made of whole cells, why it stays.
        layouts: the same for each observed axis.
    """

    cells: tuple[int, ...]
    channels: tuple[int, ...]
    reasons: tuple[str | None, ...]
    selection: tuple[str | None, ...]
    nonlinear: tuple[bool, ...]
    products: tuple[tuple[int, ...], ...]
    runs: tuple[tuple[Run, ...], ...]
    lost: tuple[str, ...]
    layouts: tuple[tuple[Run, ...], ...]


@dataclass(frozen=True, slots=True)
class Scaling:
    """A dot product that its operator divides by the root of the number of channels.

    Attributes:
        writer: qualified name of the layer that wrote one of the two sides, and nothing else.
        ids: what it wrote, ``(heads, channels of one)``.
        roots: how often it is divided.
    """

    writer: str
    ids: Ids
    roots: int = 1


@dataclass(slots=True)
class ChannelTable:
    """Collects axes, joins and restrictions while a graph is read.

    Attributes:
        axes: the axes of all layers, by (module, tensor, axis).
        bound: attributes that say how many channels there are (as a product), with the channels.
        pinned: attributes that are used in another way too.
        beside: the layers that mix another dimension than the channels, with these.
        across: the layers of which the other dimension is followed instead of the channels.
        abandoned: the modules that a rule gave up on in one of their calls, with the reason; what
            another call says of them does not hold.
        numbers: the numbers in the code that would have to follow channels: the node, which of the
            new dimensions or pieces, and the channels.
        by_numbers: the reasons for which channels stay because of such a number.
    """

    axes: dict[tuple[str, str, int], Axis] = field(default_factory=dict)
    abandoned: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Ids] = field(default_factory=dict)
    across: frozenset[str] = frozenset()
    numbers: list[tuple[fx.Node, int, Ids]] = field(default_factory=list)
    by_numbers: set[str] = field(default_factory=set)
    _size: int = 0
    _joins: list[tuple[Ids, Ids]] = field(default_factory=list)
    _fixed: list[tuple[Ids, str]] = field(default_factory=list)
    _selections: list[tuple[Ids, str]] = field(default_factory=list)
    _nonlinear: list[Ids] = field(default_factory=list)
    _contractions: list[tuple[Ids, Ids]] = field(default_factory=list)
    _balances: list[tuple[Ids, str, bool]] = field(default_factory=list)
    _products: dict[ProductKey, tuple[Ids, Ids, Scaling | None]] = field(default_factory=dict)
    _roots: dict[tuple[ProductKey, int], int] = field(default_factory=dict)
    _graph: int = 0
    _rooted: dict[int, Scaling] = field(default_factory=dict)
    _consumed: set[int] = field(default_factory=set)
    _met: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    _agreements: list[tuple[Share, Share, str]] = field(default_factory=list)
    bound: list[tuple[tuple[Place, ...], Ids]] = field(default_factory=list)
    pinned: set[Place] = field(default_factory=set)

    def begin(self) -> None:
        """Note that another graph of the same model is going to be read."""
        self._met.clear()
        self._graph += 1

    def new(self, count: int) -> Ids:
        """Return ``count`` new identities."""
        ids = np.arange(self._size, self._size + count, dtype=np.int64)
        self._size += count
        return ids

    def axis(
        self,
        module: str,
        tensors: Sequence[tuple[str, int]],
        role: str,
        count: int,
        groups: int = 1,
    ) -> Ids:
        """Return the identities along a parameter's axis: the same ones at every use of a layer."""
        key = (module, *tensors[0])
        if key not in self.axes:
            self.axes[key] = Axis(module, tuple(tensors), role, self.new(count), groups)
        return self.axes[key].ids

    def join(self, left: Ids, right: Ids) -> None:
        """Note that two axes hold the same channels, position by position."""
        if left.size and left is not right:
            self._joins.append((left.ravel(), right.ravel()))

    def fix(self, ids: Ids, reason: str) -> None:
        """Note that channels must stay as they are."""
        self._fixed.append((ids.ravel(), reason))

    def select(self, ids: Ids, reason: str) -> None:
        """Note that channels are told apart, so that they may be dropped but not mixed."""
        self._selections.append((ids.ravel(), reason))

    def bend(self, ids: Ids) -> None:
        """Note that a function that is not linear acts on channels."""
        self._nonlinear.append(ids.ravel())

    def balance(self, pieces: Ids, reason: str, *, held: bool = False) -> None:
        """Note that the rows of ``pieces``, ``(pieces, channels)``, must keep equal widths.

        Args:
            pieces: the rows.
            reason: why channels stay where they cannot.
            held: whether they must because one attribute of a module counts them all.
        """
        self._balances.append((pieces, reason, held))

    def contract(self, name: str, left: Ids, right: Ids, writer: str | None = None) -> ProductKey:
        """Note that two tensors meet in a dot product, head by head.

        Args:
            name: where the operator stands; it may be met again, in another mode.
            left: identities of the left side, ``(heads, channels of one)``.
            right: of the other side.
            writer: where the operator divides by the root of the number of channels, the layer that
                wrote the left side and can be scaled instead.

        Returns:
            what the product is called.
        """
        self._contractions.append((left.ravel(), right.ravel()))
        for rows, other in ((left, right), (right, left)):
            rooted = self._rooted.get(int(rows.flat[0]))
            if rooted is not None and np.array_equal(rooted.ids, rows):
                self._consumed.add(int(rows.flat[0]))
                return self._note_product(name, rows, other, rooted.writer, 1 + bool(writer))
        return self._note_product(name, left, right, writer, 1)

    def _note_product(
        self, name: str, left: Ids, right: Ids, writer: str | None, roots: int
    ) -> ProductKey:
        scaling = None if writer is None else Scaling(writer, left, roots)
        place = (name, int(left.flat[0]), int(right.flat[0]))
        self._met[place] += 1
        key = (*place, self._met[place])
        self._products[key] = left, right, scaling
        self._roots[key, self._graph] = 0 if scaling is None else roots
        return key

    def divide(self, key: ProductKey, writer: str) -> None:
        """Note that a product is divided by the root of its number of channels after all."""
        left, right, _ = self._products[key]
        roots = self._roots[key, self._graph] + 1
        self._products[key] = left, right, Scaling(writer, left, roots)
        self._roots[key, self._graph] = roots

    def compare_scales(self) -> None:
        """Fix the channels of products that are scaled in one mode and not in the other."""
        found: dict[ProductKey, set[int]] = {}
        for (key, _), roots in self._roots.items():
            found.setdefault(key, set()).add(roots)
        for key, several in found.items():
            if len(several) > 1:
                reason = f"scaled in one mode and not in the other, at {key[0]}"
                self.fix(self._products[key][0], reason)

    def divide_side(self, rows: Ids, writer: str) -> None:
        """Note that a side of a product to come is divided by the root of its channels."""
        self._rooted[int(rows.flat[0])] = Scaling(writer, rows)

    def role(self, module: str) -> str | None:
        """Return the role of a layer that has written or carried channels, if it has."""
        roles = {axis.role for axis in self.axes.values() if axis.module == module}
        return next((role for role in ("producer", "carrier") if role in roles), None)

    def bind(self, places: tuple[Place, ...], rows: Ids) -> None:
        """Note that the product of some attributes is how many channels each row has."""
        self.bound.append((places, rows))

    def pin(self, places: tuple[Place, ...]) -> None:
        """Note that attributes are used in a way that cannot follow channels."""
        self.pinned.update(places)

    def agree(self, left: Share, right: Share, reason: str) -> None:
        """Note that two numbers of channels must stay equal.

        Args:
            left: identities, and what their number is multiplied with.
            right: the same of the other side.
            reason: why channels stay where the two do not follow each other.
        """
        self._agreements.append((left, right, reason))
        self.by_numbers.add(reason)

    def products(self) -> Iterator[tuple[Ids, Ids]]:
        """Yield both sides of every dot product, head by head."""
        for left, right, _ in self._products.values():
            yield from zip(left, right, strict=True)

    def scalings(self) -> list[Scaling]:
        """Return the products that a writer has to be scaled for, and fix those where none can be.

        Whoever scales what a layer writes must know that nothing else reads it.
        """
        if not self._rooted and not any(s for _, _, s in self._products.values()):
            return []
        for first, rooted in self._rooted.items():
            if first not in self._consumed:
                self.fix(rooted.ids, "divided by the root of its channels, for no dot product")
        labels = self.labels()
        read = [labels[axis.ids] for axis in self.axes.values() if axis.role == "consumer"]
        readers = np.concatenate(
            [*read, *(np.unique(labels[p]) for p, _, _ in self._products.values())]
        )
        found = []
        sides = self.labels(contracted=False)
        bent = sides[np.concatenate([np.empty(0, np.int64), *self._nonlinear])]
        for ids, other, scaling in self._products.values():
            if scaling is None:
                continue
            if np.isin(sides[ids], [*sides[other].flat, *bent]).any():
                self.fix(ids, f"what {scaling.writer!r} writes is not only multiplied with keys")
            elif np.isin(readers, labels[ids]).sum() == len(np.unique(labels[ids])):
                found.append(scaling)
            else:
                self.fix(ids, f"what {scaling.writer!r} writes is read in several places")
        return found

    def resolve(self, observed: Sequence[Ids] = ()) -> Resolved:
        """Sort all channels into spaces.

        Args:
            observed: identities along further axes (of activations) whose layout is wanted.
        """
        return _Resolution(self, self.labels(), observed).result()

    def stuck(self) -> list[tuple[fx.Node, int]]:
        """Return the numbers in the code for which channels stay."""
        if not self.numbers:
            return []
        found = _Resolution(self, self.labels())
        found.result()
        stuck = []
        tied = []
        for node, position, ids in self.numbers:
            cells = [int(cell) for cell in found.cells_of(ids) if cell >= 0]
            if self.by_numbers & {found.reasons[cell] for cell in cells}:
                stuck.append((node, position))
            elif any(map(found.is_fixed, cells)) and all(found.reasons[c] is None for c in cells):
                tied.append((node, position, ids))
        if not tied:
            return stuck
        apart = _Resolution(self, self.labels(), together=False)
        apart.result()
        for node, position, ids in tied:  # what one attribute counts, and something else holds
            cells = [int(cell) for cell in apart.cells_of(ids) if cell >= 0]
            stuck += [] if any(map(apart.is_fixed, cells)) else [(node, position)]
        return stuck

    def labels(self, *, contracted: bool = True) -> Ids:
        """Return the class of every identity, by propagating the least label along the joins.

        Args:
            contracted: whether the two sides of a dot product are one class.
        """
        labels = np.arange(self._size, dtype=np.int64)
        joins = [*self._joins, *(self._contractions if contracted else ())]
        if not joins:
            return labels
        left = np.concatenate([pair[0] for pair in joins])
        right = np.concatenate([pair[1] for pair in joins])
        while True:
            least = np.minimum(labels[left], labels[right])
            if np.array_equal(least, labels[left]) and np.array_equal(least, labels[right]):
                return labels
            # Hook both roots on the lesser one, then let every identity follow its root.
            np.minimum.at(labels, labels[left], least)
            np.minimum.at(labels, labels[right], least)
            while not np.array_equal(labels, labels[labels]):
                labels = labels[labels]


class _Resolution:
    """The work of one ``resolve()``: classes -> cells -> spaces."""

    def __init__(
        self,
        table: ChannelTable,
        labels: Ids,
        observed: Sequence[Ids] = (),
        *,
        together: bool = True,
    ) -> None:
        self.table = table
        self.labels = labels
        self.axes = [labels[axis.ids] for axis in table.axes.values()]
        self.observed = [labels[ids.ravel()] for ids in observed]
        self.balances = [
            (labels[i], reason) for i, reason, held in table._balances if together or not held
        ]
        self.reasons: list[str | None] = []
        self._make_cells()
        self.tie = list(range(len(self.cells)))
        self.held: set[int] | None = None  # the roots of what stays, once all is known

    def _make_cells(self) -> None:
        """Group classes that stand on the same axes and in the same pieces, by random signature."""
        rng = np.random.default_rng(0)
        signature = np.zeros(len(self.labels), dtype=np.int64)
        stretches: Iterable[Ids] = [
            *self.axes,
            *(row for pieces, _ in self.balances for row in pieces),
        ]
        for classes in stretches:
            np.add.at(signature, classes, rng.integers(-(2**63), 2**63 - 1))
        self.cell_of = np.full(len(self.labels), -1, dtype=np.int64)
        self.cells: list[Ids] = []
        # Axes are met in the order of the forward, so a cell has the order of its first axis; equal
        # signatures stand on the same axes, so a cell is met whole.
        for classes in self.axes:
            fresh = _unique(classes[self.cell_of[classes] < 0])
            for value in _unique(signature[fresh]):
                members = fresh[signature[fresh] == value]
                self.cell_of[members] = len(self.cells)
                self.cells.append(members)

    def result(self) -> Resolved:
        self.reasons = [None] * len(self.cells)
        for ids, reason in self.table._fixed:
            self._fix(_unique(self.cell_of[self.labels[ids]]), reason)
        runs = [
            self._runs(classes, self._arrival(axis.module))
            for axis, classes in zip(self.table.axes.values(), self.axes, strict=True)
        ]
        layouts = [self._runs(classes, None) for classes in self.observed]
        for pieces, reason in self.balances:
            self._tie_pieces(pieces, reason)
        for left, right, reason in self.table._agreements:
            self._compare(left, right, reason)
        return self._spaces(runs, layouts)

    def _compare(self, left: Share, right: Share, reason: str) -> None:
        """Fix the channels of two numbers that are made of different spaces."""
        found: dict[int, Fraction] = defaultdict(Fraction)
        for sign, (ids, share) in ((1, left), (-1, right)):
            cells, counts = np.unique(self.cell_of[self.labels[ids]], return_counts=True)
            for cell, count in zip(cells.tolist(), counts.tolist(), strict=True):
                found[self._root(cell) if cell >= 0 else UNKNOWN] += sign * count * share
        others = {root for root, count in found.items() if count and root != UNKNOWN}
        if others:
            self._fix([c for c in range(len(self.cells)) if self._root(c) in others], reason)

    @staticmethod
    def _arrival(module: str) -> str:
        return f"its channels reach {module!r} in another order or in part"

    def _fix(self, cells: Iterable[int], reason: str) -> None:
        for cell in cells:
            if cell >= 0 and self.reasons[cell] is None:
                self.reasons[cell] = reason

    def _runs(self, classes: Ids, reason: str | None) -> list[Run]:
        """Read an axis as whole cells one after the other; fix the cells that don't come whole."""
        runs: list[Run] = []
        position = 0
        while position < len(classes):
            cell = int(self.cell_of[classes[position]])
            if cell >= 0:
                run = self._whole_cell(classes, position, cell)
            else:
                run = Run(position, UNKNOWN, 0, 1, 1)
            if run is None:
                if reason is not None:
                    self._fix(_unique(self.cell_of[classes]), reason)
                return []
            runs.append(run)
            position += run.channels * run.repeat
        return runs

    def _whole_cell(self, classes: Ids, offset: int, cell: int) -> Run | None:
        members = self.cells[cell]
        changes = np.flatnonzero(classes[offset:] != classes[offset])
        stretch = int(changes[0]) if len(changes) else len(classes) - offset
        # A cell of one channel may stand several times in a row: each time is a repetition.
        repeat = stretch
        expected = np.repeat(members, repeat)
        found = classes[offset : offset + len(expected)]
        return (
            Run(offset, cell, 0, len(members), repeat) if np.array_equal(found, expected) else None
        )

    def _tie_pieces(self, pieces: Ids, reason: str) -> None:
        cells = _unique(self.cell_of[pieces.ravel()])
        stay = all(cell == UNKNOWN or self.reasons[cell] is not None for cell in cells)
        if stay and pieces.size > _LONG:
            return
        rows = [self._runs(row, reason) for row in pieces]
        if not all(rows) or any(run.space == UNKNOWN for row in rows for run in row):
            self._fix(_unique(self.cell_of[pieces.ravel()]), reason)
            return
        shapes = [[(run.channels, run.repeat) for run in row] for row in rows]
        if any(shape != shapes[0] for shape in shapes):
            self._fix((run.space for row in rows for run in row), reason)
            return
        for column in zip(*rows, strict=True):
            for run in column[1:]:
                self.tie[self._root(run.space)] = self._root(column[0].space)

    def cells_of(self, ids: Ids) -> Ids:
        """Return the cells of some channels, :data:`UNKNOWN` where there is none."""
        return _unique(self.cell_of[self.labels[ids.ravel()]])

    def is_fixed(self, cell: int) -> bool:
        """Whether a cell stays, or one that it is tied to."""
        if self.held is None:
            self.held = {
                self._root(c) for c, reason in enumerate(self.reasons) if reason is not None
            }
        return self._root(cell) in self.held

    def _why(self, classes: Ids) -> str:
        """Return the first reason for which some of these channels stay."""
        cells = (int(cell) for cell in _unique(self.cell_of[classes]) if cell >= 0)
        reasons = (self.reasons[cell] for cell in cells)
        return next((reason for reason in reasons if reason is not None), "")

    def _root(self, cell: int) -> int:
        while self.tie[cell] != cell:
            cell = self.tie[cell]
        return cell

    def _spaces(self, runs: list[list[Run]], layouts: list[list[Run]]) -> Resolved:
        families: dict[int, list[int]] = {}
        for cell in range(len(self.cells)):
            families.setdefault(self._root(cell), []).append(cell)
        members = list(families.values())
        home = {
            cell: (space, number * len(self.cells[cell]))
            for space, cells in enumerate(members)
            for number, cell in enumerate(cells)
        }
        selections: list[str | None] = [None] * len(members)
        for ids, reason in self.table._selections:
            for cell in _unique(self.cell_of[self.labels[ids]]):
                if cell >= 0 and selections[home[int(cell)][0]] is None:
                    selections[home[int(cell)][0]] = reason
        bent = {
            home[int(cell)][0]
            for ids in self.table._nonlinear
            for cell in _unique(self.cell_of[self.labels[ids]])
            if cell >= 0
        }
        multiplied = {
            int(cell)
            for ids, _, _ in self.table._products.values()
            for cell in _unique(self.cell_of[self.labels[ids.ravel()]])
        }
        return Resolved(
            cells=tuple(len(cells) for cells in members),
            channels=tuple(len(cells) * len(self.cells[cells[0]]) for cells in members),
            reasons=tuple(
                next((self.reasons[cell] for cell in cells if self.reasons[cell]), None)
                for cells in members
            ),
            selection=tuple(selections),
            nonlinear=tuple(space in bent for space in range(len(members))),
            products=tuple(
                tuple(number for number, cell in enumerate(cells) if cell in multiplied)
                for cells in members
            ),
            runs=tuple(tuple(_merged(axis, home)) for axis in runs),
            lost=tuple(
                "" if axis else self._why(classes)
                for axis, classes in zip(runs, self.axes, strict=True)
            ),
            layouts=tuple(tuple(_merged(axis, home)) for axis in layouts),
        )


def _unique(values: Ids) -> Ids:
    """Return the distinct values in the order in which they first appear."""
    if len(values) < 2:
        return values
    steps = np.diff(values)
    values = values[np.concatenate([[True], steps != 0])]  # positions repeat channels
    if (steps >= 0).all():
        return values
    _, first = np.unique(values, return_index=True)
    return values[np.sort(first)]


def _merged(runs: list[Run], home: dict[int, tuple[int, int]]) -> Iterator[Run]:
    """Turn runs of cells into runs of spaces, neighbouring cells of a space in one run."""
    pending: Run | None = None
    for run in runs:
        space, start = home.get(run.space, (UNKNOWN, 0))
        if space == UNKNOWN:  # channels that no layer writes: one run, however many
            start = pending.channels if pending is not None and pending.space == UNKNOWN else 0
        if (
            pending is not None
            and pending.space == space
            and pending.repeat == run.repeat
            and pending.start + pending.channels == start
        ):
            pending = Run(
                pending.offset, space, pending.start, pending.channels + run.channels, run.repeat
            )
            continue
        if pending is not None:
            yield pending
        pending = Run(run.offset, space, start, run.channels, run.repeat)
    if pending is not None:
        yield pending
