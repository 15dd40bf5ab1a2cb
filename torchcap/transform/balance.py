"""The closed form of linear spaces: new coordinates, in which the first channels matter most.

Where nothing but linear maps act on the channels of a space, any invertible ``T`` may be put behind
what writes them and its inverse before what reads them: the network stays what it is. With second
moments ``Σ`` of the features ``f`` and ``G = W Wᵀ`` of what reads them, the best oblique projection
``C`` of rank ``r`` in ``min E|f (I - C) W|²`` comes from ``Σ^½ G^½ = U S Vᵀ``: in the coordinates
``T = Σ^-½ U S^½`` it keeps the first ``r`` channels. Queries and keys are the same with the second
moments of the keys as ``G``: so scores are approximated best, with the two taken as independent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchcap.batches import Batches
from torchcap.graph.spaces import ChannelSpace, Port, SpaceGraph
from torchcap.plan.plan import Plan
from torchcap.projection.moments import SecondMoments
from torchcap.transform.observe import observe

RIDGE = 1e-6
"""Added to both moments, as a share of their mean diagonal: directions without features stay."""

_Stretch = tuple[str, int]


@dataclass(slots=True)
class _Block:
    """One block of a linear space.

    Attributes:
        space: name of the space.
        number: of the block.
        width: its channels.
        written: the rows that ``Tᵀ`` is put before, as (module, first row).
        read: the columns that the inverse of ``T`` is put behind, as (module, first column).
        keys: the rows that the inverse of ``T`` is put before.
    """

    space: str
    number: int
    width: int
    written: list[_Stretch] = field(default_factory=list)
    read: list[_Stretch] = field(default_factory=list)
    keys: list[_Stretch] = field(default_factory=list)


@torch.no_grad()
def balance_(model: nn.Module, graph: SpaceGraph, plan: Plan, data: Batches) -> dict[str, Tensor]:
    """Change the coordinates of the linear spaces of a plan, in place; the model computes the same.

    Spaces that something else than plain linear and convolution layers writes or reads are left.

    Args:
        model: a folded model.
        graph: its spaces, after folding.
        plan: the ranks.
        data: batches for the second moments.

    Returns:
        for each space that was changed the basis that keeps its first channels,
        ``(blocks, channels / blocks, rank / blocks)``.
    """
    balance = Balance(model, graph, plan)
    if balance.spaces:
        observe(model, data, balance)
    return balance.apply_()


class Balance:
    """The work of :func:`balance_`: moments are gathered by :func:`observe`, then it is applied.

    Attributes:
        spaces: those that will be changed.
    """

    def __init__(self, model: nn.Module, graph: SpaceGraph, plan: Plan) -> None:
        self.model, self.plan, self.graph = model, plan, graph
        found = {name: _blocks(model, graph, graph[name]) for name in plan.choices}
        self.spaces = tuple(name for name, blocks in found.items() if blocks is not None)
        self.blocks = [block for blocks in found.values() for block in blocks or ()]
        self.moments: dict[tuple[str, str, int], SecondMoments] = {}
        sides: dict[str, dict[str, list[tuple[int, SecondMoments]]]] = {"input": {}, "output": {}}
        for block in self.blocks:
            seen = [("output", *s) for s in (*block.written, *block.keys)] if block.keys else []
            for key in [*seen, *(("input", *stretch) for stretch in block.read)]:
                side, path, first = key
                weight = getattr(model.get_submodule(path), "weight")  # noqa: B009 - of no known type
                self.moments[key] = SecondMoments(block.width, device=weight.device)
                sides[side].setdefault(path, []).append((first, self.moments[key]))
        self.inputs = {path: partial(_see, found) for path, found in sides["input"].items()}
        self.outputs = {path: partial(_see, found) for path, found in sides["output"].items()}

    @torch.no_grad()
    def apply_(self) -> dict[str, Tensor]:
        """Change the coordinates, in place, and return the bases; see :func:`balance_`."""
        for moments in self.moments.values():
            moments.reduce()
        for block in self.blocks:
            _change_(self.model, block, self.moments)
        bases = {}
        for name in self.spaces:
            space, rank = self.graph[name], self.plan.choices[name].rank
            eye = torch.eye(
                space.channels // space.blocks, rank // space.blocks, dtype=torch.float64
            )
            bases[name] = eye.expand(space.blocks, -1, -1)
        return bases


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates in which two second moments are one and the same diagonal.

    Args:
        left: ``E[fᵀ f]`` of row vectors ``f``, ``(c, c)``.
        right: ``E[gᵀ g]`` of row vectors ``g`` that ``f`` is multiplied with, ``(c, c)``.

    Returns:
        ``T`` and its inverse: ``f T`` and ``g T^-ᵀ`` have the same products as ``f`` and ``g``, and
        the fewer channels of them are kept, from the first on, the less is lost of these.
    """
    half, half_inverse = _roots(left)
    other, _ = _roots(right)
    U, S, _ = torch.linalg.svd(half @ other)
    root = S.sqrt()
    return half_inverse @ U * root, (U.mT @ half) / root[:, None]


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a regularised moment, and the inverse of that."""
    mean = moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    values, vectors = torch.linalg.eigh(moment / mean)
    values = values.clamp_min(0) + RIDGE
    root = values.sqrt()
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


# --------------------------------------------------------------------------------------------------
# What a block is written and read by


def _blocks(model: nn.Module, graph: SpaceGraph, space: ChannelSpace) -> list[_Block] | None:
    """Return the blocks of a space, or None if one of them cannot change its coordinates."""
    if space.freedom != "linear" or space.carriers:
        return None
    width = space.channels // space.blocks
    ports = [p for p in (*space.producers, *space.consumers) if p.parameter == "weight"]
    called = {call.module for call in graph.calls}  # hooks see no function that takes a weight
    if not all(port.module in called and _is_plain(model, port, width) for port in ports):
        return None
    blocks = [_Block(space.name, number, width) for number in range(space.blocks)]
    for port in ports:
        for number in range(port.channels // width):
            block = blocks[port.start // width + number]
            stretches = block.written if port in space.producers else block.read
            stretches.append((port.module, port.offset + number * width))
    for product in graph.products:
        if product.space == space.name:
            block = blocks[product.block]
            if product.right not in block.written or block.keys:
                return None
            block.written.remove(product.right)
            block.keys.append(product.right)
    whole = all(
        bool(block.keys) == (block.number in space.products)
        and len(block.written) == 1
        and bool(block.read) != bool(block.keys)
        for block in blocks
    )
    return blocks if whole else None


def _is_plain(model: nn.Module, port: Port, width: int) -> bool:
    layer = model.get_submodule(port.module)
    known = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    whole = port.start % width == 0 and port.channels % width == 0
    return known and whole and port.repeat == 1 and getattr(layer, "groups", 1) == 1


# --------------------------------------------------------------------------------------------------
# Moments and changes


def _see(
    found: list[tuple[int, SecondMoments]],
    layer: nn.Module,
    args: tuple[Any, ...],
    output: Tensor | None = None,
) -> None:
    """Add what a layer reads, or what it writes, to the moments of its stretches."""
    x = args[0] if output is None else output
    kernel: tuple[int, ...] = getattr(layer, "kernel_size", ())
    rows = x.movedim(x.ndim - 1 - len(kernel), -1).reshape(-1, x.shape[x.ndim - 1 - len(kernel)])
    for first, moments in found:
        moments.update(rows[:, first : first + moments.features])


def _change_(
    model: nn.Module, block: _Block, moments: Mapping[tuple[str, str, int], SecondMoments]
) -> None:
    if block.keys:
        left = moments["output", *block.written[0]].second_moment
        right = moments["output", *block.keys[0]].second_moment
    else:
        left = torch.stack([moments["input", *s].second_moment for s in block.read]).sum(0)
        columns = [_columns(model, stretch, block.width).double() for stretch in block.read]
        right = torch.stack([c @ c.mT for c in columns]).sum(0)
    T, inverse = balanced(left, right)
    for module, first in block.written:
        _map_rows_(model.get_submodule(module), first, T.mT)
    for module, first in block.keys:
        _map_rows_(model.get_submodule(module), first, inverse)
    for module, first in block.read:
        weight = getattr(model.get_submodule(module), "weight")  # noqa: B009 - of no known type
        stretch = weight[:, first : first + block.width]
        mapped = torch.tensordot(inverse, stretch.double(), dims=([1], [1])).transpose(0, 1)
        stretch.copy_(mapped)


def _columns(model: nn.Module, stretch: _Stretch, width: int) -> Tensor:
    """Return what a layer reads of a stretch of its input, ``(width, outputs and taps)``."""
    module, first = stretch
    weight: Tensor = getattr(model.get_submodule(module), "weight")  # noqa: B009 - of no known type
    return weight[:, first : first + width].transpose(0, 1).flatten(1)


def _map_rows_(layer: nn.Module, first: int, matrix: Tensor) -> None:
    for tensor in (layer.weight, layer.bias):
        if isinstance(tensor, Tensor):
            rows = tensor[first : first + len(matrix)]
            rows.copy_(torch.tensordot(matrix, rows.double(), dims=([1], [0])))
