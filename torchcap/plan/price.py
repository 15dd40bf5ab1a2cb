"""Prices: what a plan costs, as a function of all ranks at once, for the allocation.

The size of a tensor's axis is affine in the ranks of the spaces that lie on it, and multiply-adds,
parameters and activations are products of at most two such sizes. So each is a quadratic function
of the ranks, with a product wherever one layer stands between two spaces: inside of bottlenecks,
and all along a plain chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from torchcap.graph.spaces import Counted, SpaceGraph

Vector = NDArray[np.float64]
Table = tuple[tuple[int, ...], Vector]


class Price(Protocol):
    """What ranks cost together; they are given in the order of ``spaces``."""

    @property
    def spaces(self) -> tuple[str, ...]:
        """The names of the spaces."""

    def total(self, ranks: Vector) -> float:
        """Return the price of some ranks, ``(spaces,)``."""

    def tables(self, candidates: Sequence[Vector]) -> Iterator[Table]:
        """Iterate over the price as a sum of tables over one or two spaces.

        Args:
            candidates: the ranks that are considered for each space.

        Yields:
            the numbers of the spaces, and the price of each combination of their candidates.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """``constant + linear · r + rᵀ products r``, with ``products`` symmetric.

    Attributes:
        spaces: the names of the spaces.
        constant: what stays whatever the ranks.
        linear: shape ``(spaces,)``.
        products: shape ``(spaces, spaces)``.
    """

    spaces: tuple[str, ...]
    constant: float
    linear: Vector
    products: Vector

    def total(self, ranks: Vector) -> float:
        """Return the price of some ranks; see `Price`."""
        return float(self.constant + self.linear @ ranks + ranks @ self.products @ ranks)

    def tables(self, candidates: Sequence[Vector]) -> Iterator[Table]:
        """Iterate over the price, space by space and pair by pair; see `Price`."""
        for i, ranks in enumerate(candidates):
            yield (i,), self.linear[i] * ranks + self.products[i, i] * ranks**2
            for j in range(i):
                if self.products[i, j]:
                    yield (j, i), 2 * self.products[i, j] * np.outer(candidates[j], ranks)


@dataclass(frozen=True, slots=True, eq=False)
class Size:
    """The size of one axis of a tensor, ``base + parts · r``."""

    base: float
    parts: Vector


class Sizes:
    """The sizes of all axes of a graph's parameters, as functions of the ranks of its free spaces.

    Args:
        graph: the spaces; norms that fold are taken as folded.
    """

    def __init__(self, graph: SpaceGraph) -> None:
        self.graph = graph.after_folding()
        self.spaces = tuple(space.name for space in self.graph.free)
        self._parts: dict[tuple[str, int], Vector] = {}
        for number, space in enumerate(self.graph.free):
            for port in space.ports:
                parts = self._parts.setdefault((port.tensor, port.axis), np.zeros(len(self.spaces)))
                share = port.channels * port.repeat / (space.channels * port.groups)
                parts[number] += share

    def __call__(self, tensor: str, axis: int) -> Size:
        """Return the size of an axis."""
        full = np.array([self.graph[name].channels for name in self.spaces], dtype=float)
        parts = self._parts.get((tensor, axis), np.zeros(len(self.spaces)))
        return Size(self.graph.tensors[tensor][axis] - float(parts @ full), parts)

    def counted(self, counted: Counted) -> Size:
        """Return how many of some channels are left."""
        parts = np.zeros(len(self.spaces))
        held = 0
        for name, count in counted.parts:
            if name in self.spaces:
                parts[self.spaces.index(name)] += count / self.graph[name].channels
                held += count
        return Size(counted.size - held, parts)

    def volume(self, tensor: str) -> tuple[float, tuple[Size, ...]]:
        """Return a tensor's number of entries: a factor, and the sizes of at most two axes."""
        axes = [self(tensor, axis) for axis in range(len(self.graph.tensors[tensor]))]
        varying = tuple(size for size in axes if size.parts.any())
        return prod(size.base for size in axes if not size.parts.any()), varying


def multiply_adds(graph: SpaceGraph) -> Quadratic:
    """Return the multiply-adds of a graph's layers, as :func:`torchcap.cost` counts them."""
    sizes = Sizes(graph)
    terms: list[tuple[float, tuple[Size, ...]]] = []
    for call in sizes.graph.calls:
        tensor = weight_of(call.module)
        if call.beside is not None:  # the weight of such a layer never changes
            terms.append((call.macs / call.beside.size, (sizes.counted(call.beside),)))
        elif tensor in sizes.graph.tensors:
            kernel, axes = sizes.volume(tensor)
            terms.append((call.positions * kernel, axes))
        else:  # tied or parametrized weights never change
            terms.append((float(call.macs), ()))
    return _quadratic(sizes, terms)


def parameters(graph: SpaceGraph) -> Quadratic:
    """Return the number of a graph's parameters, as :func:`torchcap.cost` counts them."""
    sizes = Sizes(graph)
    return _quadratic(sizes, [sizes.volume(tensor) for tensor in sizes.graph.tensors])


def activations(graph: SpaceGraph) -> Quadratic:
    """Return how many values a graph's layers write, as :func:`torchcap.cost` counts them."""
    sizes = Sizes(graph)
    terms: list[tuple[float, tuple[Size, ...]]] = []
    for call in sizes.graph.calls:
        tensor = weight_of(call.module)
        if call.beside is not None:
            written = call.written * call.shape[call.axis] / call.beside.size
            terms.append((written, (sizes.counted(call.beside),)))
        elif tensor in sizes.graph.tensors:
            terms.append((float(call.written), (sizes(tensor, call.axis),)))
        else:
            terms.append((float(call.written * call.shape[call.axis]), ()))
    return _quadratic(sizes, terms)


def weight_of(module: str) -> str:
    """Return the qualified name of a layer's weight."""
    return f"{module}.weight" if module else "weight"


def _quadratic(sizes: Sizes, terms: Sequence[tuple[float, tuple[Size, ...]]]) -> Quadratic:
    """Multiply out a sum of products of at most two sizes."""
    count = len(sizes.spaces)
    one = Size(1.0, np.zeros(count))
    constant, linear, products = 0.0, np.zeros(count), np.zeros((count, count))
    for factor, axes in terms:
        left, right = (*axes, one, one)[:2]
        constant += factor * left.base * right.base
        linear += factor * (left.base * right.parts + right.base * left.parts)
        products += factor * np.outer(left.parts, right.parts)
    return Quadratic(sizes.spaces, constant, linear, (products + products.T) / 2)


def as_vector(spaces: Sequence[str], ranks: Mapping[str, int]) -> Vector:
    """Return ranks as a vector, in the order of the spaces."""
    return np.array([ranks[name] for name in spaces], dtype=float)
