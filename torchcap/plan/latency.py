"""Latency: measured times of layers at several widths, and what they say about a plan.

The table is data: it is measured on the device that a model is meant for
(:func:`torchcap.measure_latency`), kept as JSON, and read anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcap.errors import PlanError
from torchcap.graph.spaces import SpaceGraph
from torchcap.plan.documents import Entry, document, parsed
from torchcap.plan.plan import Plan
from torchcap.plan.price import (
    Quadratic,
    Size,
    Sizes,
    Table,
    Vector,
    activations,
    as_vector,
    weight_of,
)

_FORMAT, _VERSION = "torchcap-latency", 1

EVEN = 8
"""Widths that are a multiple of this are what libraries are made for."""


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Times of one layer, all its calls in a forward together, at several widths of its weight.

    Attributes:
        outputs: sizes of the weight's first axis, rising.
        inputs: sizes of its second axis, rising.
        milliseconds: a row for each of ``outputs``, a column for each of ``inputs``.
        steps: how finely times follow the two widths: libraries compute channels in blocks, and
            one of 16 takes as long with one channel in it as with all.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]
    steps: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        shape = (len(self.outputs), len(self.inputs))
        rows = {len(row) for row in self.milliseconds}
        if 0 in shape or (len(self.milliseconds), *rows) != shape:
            raise PlanError(
                f"times of a layer at {shape[0]} by {shape[1]} widths need a table of that shape; "
                f"got {len(self.milliseconds)} rows of {sorted(rows)}"
            )
        widths = (self.outputs, self.inputs)
        if any(list(row) != sorted({*row}) or row[0] < 1 for row in widths):
            raise PlanError(
                f"widths of a layer have to rise, from 1 on; got {self.outputs}, {self.inputs}"
            )
        if not all(isfinite(t) and t >= 0 for row in self.milliseconds for t in row):
            raise PlanError("times of a layer are finite and not negative")
        if len(self.steps) != 2 or min(self.steps) < 1:
            raise PlanError(f"steps of a layer's widths are two numbers above 0; got {self.steps}")

    def at(self, outputs: Vector, inputs: Vector) -> Vector:
        """Return the times at some widths: of whole steps, linear between those measured."""
        table = np.array(self.milliseconds)
        y, low_y, high_y = _between(_rounded(outputs, self.steps[0]), self.outputs)
        x, low_x, high_x = _between(_rounded(inputs, self.steps[1]), self.inputs)
        low = table[low_y, low_x] * (1 - x) + table[low_y, high_x] * x
        high = table[high_y, low_x] * (1 - x) + table[high_y, high_x] * x
        return low * (1 - y) + high * y


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """What the layers of a model take on one device.

    Attributes:
        model: name of the model's class.
        device: what was measured, in words (device, threads, batch).
        layers: qualified name of a layer -> its times.
        rest: milliseconds of all else at full width.
        rest_floor: what is left of them where layers write (next to) nothing.
        whole: measured milliseconds of the whole model, folded, at full width.
        uneven: share by which layers take longer in the network where a width that has changed is
            no multiple of 8.
    """

    model: str
    device: str
    layers: Mapping[str, LayerTimes]
    rest: float
    rest_floor: float
    whole: float
    uneven: float = 0.0

    def to_json(self) -> str:
        """Return the table as JSON text."""
        layers = {name: asdict(times) for name, times in self.layers.items()}
        values = {name: getattr(self, name) for name in _FIELDS}
        content = {"format": _FORMAT, "version": _VERSION, **values, "layers": layers}
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Make a table from JSON text.

        Raises:
            PlanError: if the text is not JSON, or no table.
        """
        found = document(parsed(text, "latency table"), "latency table", _FORMAT, _VERSION)
        found.check_keys("format", "version", *_FIELDS, "layers")
        layers = {name: _layer_times(entry) for name, entry in found.entries("layers", "layer")}
        numbers = {name: found.number(name) for name in _FIELDS[2:]}
        return cls(found.text("model"), found.text("device"), layers, **numbers)


_FIELDS = ("model", "device", "rest", "rest_floor", "whole", "uneven")


class LatencyPrice:
    """Milliseconds of one forward, as a function of the ranks; see `Price`.

    Args:
        graph: the spaces.
        table: measured times.

    Raises:
        PlanError: if a layer of the graph is not in the table.
    """

    def __init__(self, graph: SpaceGraph, table: LatencyTable) -> None:
        sizes = Sizes(graph)
        self.spaces = sizes.spaces
        self._layers: list[tuple[LayerTimes, Size, Size]] = []
        self._table = table
        constant = 0.0
        for name in dict.fromkeys(call.module for call in sizes.graph.calls):
            tensor = weight_of(name)
            axes = [sizes(tensor, a) for a in (0, 1)] if tensor in sizes.graph.tensors else []
            if name not in table.layers and not any(size.parts.any() for size in axes):
                continue  # it is part of the rest: a projection of nn.MultiheadAttention, say
            if name not in table.layers:
                raise PlanError(
                    f"layer {name!r} of {graph.model!r} is not in the latency table, which was "
                    f"measured on {table.model!r}; measure the latency of this model"
                )
            times = table.layers[name]
            if axes:
                _check_widths(name, times, axes, sizes.graph.tensors[tensor])
                self._layers.append((times, axes[0], axes[1]))
            else:
                constant += times.milliseconds[-1][-1]
        self._rest = _scaled_rest(graph, table, constant)

    def total(self, ranks: Vector) -> float:
        """Return the milliseconds for some ranks; see `Price`."""
        layers = sum(
            float(self._times(times, _at(outputs, ranks), _at(inputs, ranks)))
            for times, outputs, inputs in self._layers
        )
        return layers + self._rest.total(ranks)

    def _times(self, times: LayerTimes, outputs: Vector, inputs: Vector) -> Vector:
        """Return what a layer takes in the network at some widths."""
        uneven = _is_uneven(outputs, times.outputs[-1]) | _is_uneven(inputs, times.inputs[-1])
        return times.at(outputs, inputs) * (1 + self._table.uneven * uneven)

    def tables(self, candidates: Sequence[Vector]) -> Iterator[Table]:
        """Iterate over the layers' times and the rest; see `Price`.

        A layer that reads or writes several spaces has no table over two of them: there its times
        are taken as the bilinear function of its widths that is nearest to them.
        """
        yield from self._rest.tables(candidates)
        for times, outputs, inputs in self._layers:
            o, i = (np.flatnonzero(size.parts).tolist() for size in (outputs, inputs))
            if len({*o, *i}) <= 2 and len(o) <= 1 and len(i) <= 1:
                at = partial(self._times, times)
                yield from _exact_tables(at, outputs, inputs, candidates)
            else:
                yield from _bilinear(times, outputs, inputs, self.spaces).tables(candidates)


def predict_latency(graph: SpaceGraph, plan: Plan | None, table: LatencyTable) -> float:
    """Return the milliseconds of one forward of the model that a plan gives.

    Args:
        graph: what :func:`torchcap.analyze` found.
        plan: the ranks; None for the folded model at full width.
        table: measured times of the model's layers.

    Raises:
        PlanError: if the plan does not fit the graph, or a layer is not in the table.
    """
    if plan is not None:
        plan.check(graph)
    price = LatencyPrice(graph, table)
    ranks = {space.name: space.channels for space in graph.free}
    return price.total(as_vector(price.spaces, ranks | (plan.ranks if plan is not None else {})))


def _scaled_rest(graph: SpaceGraph, table: LatencyTable, constant: float) -> Quadratic:
    """Return the time of all but the layers: it falls with the values that layers write."""
    written = activations(graph)
    full = as_vector(written.spaces, {space.name: space.channels for space in graph.free})
    slope = (table.rest - table.rest_floor) / written.total(full)
    return Quadratic(
        written.spaces,
        constant + table.rest_floor + slope * written.constant,
        slope * written.linear,
        slope * written.products,
    )


def _is_uneven(widths: Vector, full: int) -> NDArray[np.bool_]:
    return np.asarray((widths % EVEN != 0) & (widths != full))


def _exact_tables(
    at: Callable[[Vector, Vector], Vector],
    outputs: Size,
    inputs: Size,
    candidates: Sequence[Vector],
) -> Iterator[Table]:
    o, i = (np.flatnonzero(size.parts).tolist() for size in (outputs, inputs))
    if o and i and o != i:
        rows = outputs.base + outputs.parts[o[0]] * candidates[o[0]]
        columns = inputs.base + inputs.parts[i[0]] * candidates[i[0]]
        yield (o[0], i[0]), at(rows[:, None], columns[None, :])
        return
    space = (o or i or [0])[0]
    ranks = candidates[space]
    rows = outputs.base + outputs.parts[space] * ranks
    columns = inputs.base + inputs.parts[space] * ranks
    yield (space,), at(rows, columns)


def _bilinear(times: LayerTimes, outputs: Size, inputs: Size, spaces: tuple[str, ...]) -> Quadratic:
    y, x = (grid.ravel() for grid in np.meshgrid(times.outputs, times.inputs, indexing="ij"))
    design = np.stack([np.ones(len(y)), y, x, y * x], 1)
    a, b, c, d = np.linalg.lstsq(design, np.ravel(times.milliseconds), rcond=None)[0]
    products = d * np.outer(outputs.parts, inputs.parts)
    return Quadratic(
        spaces,
        a + b * outputs.base + c * inputs.base + d * outputs.base * inputs.base,
        (b + d * inputs.base) * outputs.parts + (c + d * outputs.base) * inputs.parts,
        (products + products.T) / 2,
    )


def _check_widths(
    name: str, times: LayerTimes, axes: Sequence[Size], shape: tuple[int, ...]
) -> None:
    """Raise a PlanError if a layer was measured at other widths than it may get."""
    for axis, grid in enumerate((times.outputs, times.inputs)):
        alone = len(grid) == 1 and shape[axis] > 1 and axes[axis].parts.any()
        if grid[-1] != shape[axis] or alone:
            raise PlanError(
                f"the latency table has layer {name!r} at widths {grid}, and here its width is up "
                f"to {shape[axis]}{' and may shrink' if alone else ''}: it was measured on another "
                "model, or with other spaces (streams); measure the latency of this one"
            )


def _at(size: Size, ranks: Vector) -> Vector:
    return np.asarray(size.base + size.parts @ ranks)


def _rounded(widths: Vector, step: int) -> Vector:
    return np.ceil(np.asarray(widths) / step) * step


def _between(
    values: Vector, grid: Sequence[int]
) -> tuple[Vector, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return where values lie between their neighbours on a grid, 0 to 1, and these neighbours."""
    points = np.asarray(grid, dtype=float)
    clipped = np.clip(values, points[0], points[-1])
    high = np.clip(np.searchsorted(points, clipped), 1 if len(points) > 1 else 0, len(points) - 1)
    low = np.maximum(high - 1, 0)
    gap = points[high] - points[low]
    share = np.divide(clipped - points[low], gap, out=np.zeros_like(clipped), where=gap > 0)
    return share, low, high


def _layer_times(entry: Entry) -> LayerTimes:
    widths = ("outputs", "inputs", "steps")
    entry.check_keys(*widths, "milliseconds")
    outputs, inputs, steps = (entry.wholes(name) for name in widths)
    rows = entry.rows("milliseconds")
    try:
        return LayerTimes(outputs, inputs, rows, steps)  # type: ignore[arg-type] # checked there
    except PlanError as error:
        raise PlanError(f"{entry.where}: {error}") from error
