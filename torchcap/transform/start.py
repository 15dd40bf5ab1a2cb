"""Where training starts: the tensors around each space, given to an initializer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchcap.batches import Batches
from torchcap.errors import DataError, PlanError, TorchcapError
from torchcap.graph.spaces import ChannelSpace, Port, SpaceGraph
from torchcap.graph.weights import TRANSPOSED_CONVOLUTIONS
from torchcap.plan.plan import Plan
from torchcap.projection.initialize import Initializer, Readout, SpaceContext
from torchcap.projection.moments import SecondMoments, input_patches, output_rows
from torchcap.transform.observe import observe

FULL_MOMENT_FEATURES = 2304
"""Largest patch whose moments are kept whole; taps of larger ones are treated one by one."""

ROWS_PER_BATCH = 8192
"""Output positions of a layer whose patches are looked at in one batch."""

_Key = tuple[str, Port]

_Found = Mapping[_Key, "_Reading | _Writing"]


@dataclass(slots=True)
class _Reading:
    """The moments of one consumer's stretch of one space."""

    port: Port
    taps: int
    moments: SecondMoments
    whole: bool

    def update(self, patches: Tensor) -> None:
        """Add patches of the whole layer, ``(groups, rows, width * kernel)``."""
        groups, rows, features = patches.shape
        kernel = self.taps // self.port.repeat
        virtual = patches.transpose(0, 1).reshape(rows, groups * features)
        start = self.port.offset * kernel
        stretch = virtual[:, start : start + self.port.channels * self.taps]
        if not self.whole:
            by_tap = stretch.reshape(rows, self.port.channels, self.taps).transpose(1, 2)
            stretch = by_tap.reshape(-1, self.port.channels)
        self.moments.update(stretch)


@dataclass(slots=True)
class _Writing:
    """The moments of what one producer writes into one stretch of a space."""

    port: Port
    moments: SecondMoments

    def update(self, rows: Tensor) -> None:
        """Add outputs of the whole layer, ``(rows, outputs)``."""
        self.moments.update(rows[:, self.port.offset : self.port.offset + self.port.channels])


def bases_for(
    model: nn.Module,
    graph: SpaceGraph,
    plan: Plan,
    init: Initializer,
    data: Batches | Moments | None = None,
) -> dict[str, Tensor]:
    """Choose a starting basis for every planned space. The model is not changed.

    Args:
        model: a folded model.
        graph: its spaces, after folding.
        plan: the ranks.
        init: chooses one basis from what is around a space.
        data: batches for the second moments, or these; None if the initializer goes by weights
            alone.

    Returns:
        space name -> basis, ``(blocks, channels / blocks, rank / blocks)``.
    """
    return {
        around.context.name: _basis(init, around.context)
        for around in surroundings(model, graph, plan, data)
    }


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What stands around one space.

    Attributes:
        context: its tensors.
        readers: whose readouts the first ones of the context are.
    """

    context: SpaceContext
    readers: tuple[Port, ...]


def surroundings(
    model: nn.Module, graph: SpaceGraph, plan: Plan, data: Batches | Moments | None = None
) -> Iterator[Surroundings]:
    """Iterate over what stands around every planned space; see :func:`bases_for`."""
    spaces = [graph[name] for name in plan.choices]
    if data is not None and not isinstance(data, Moments):
        batches, data = data, Moments(model, spaces)
        observe(model, batches, data)
    moments = {} if data is None else data.found()
    for space in spaces:
        yield _surroundings(model, graph, space, plan, moments)


def _basis(init: Initializer, context: SpaceContext) -> Tensor:
    """Let an initializer choose, and check what it gives."""
    try:
        basis = init(context)
    except ValueError as error:
        if isinstance(error, TorchcapError):
            raise
        raise DataError(
            f"no start for space {context.name!r} ({error}); give data=, or start from the weights "
            "alone: init=LargestNorm()"
        ) from error
    shape = (context.blocks, context.block_channels, context.block_rank)
    if not isinstance(basis, Tensor) or tuple(basis.shape) != shape:
        given = tuple(basis.shape) if isinstance(basis, Tensor) else type(basis).__name__
        raise PlanError(
            f"the initializer's basis of space {context.name!r} must have shape {shape}, "
            f"(blocks, channels / blocks, rank / blocks); got {given}"
        )
    P = basis.double()
    gap = (P.mT @ P - torch.eye(shape[2], dtype=P.dtype, device=P.device)).abs().max()
    if not gap <= 1e-4 or (context.selection and not bool(((P == 0) | (P == 1)).all())):
        kind = "columns of the identity" if context.selection else "orthonormal columns"
        raise PlanError(
            f"the initializer's basis of space {context.name!r} must have {kind}; its PᵀP is "
            f"off the identity by {float(gap):.1e}"
        )
    return basis


def _surroundings(
    model: nn.Module, graph: SpaceGraph, space: ChannelSpace, plan: Plan, moments: _Found
) -> Surroundings:
    producers = [
        _embedded(_rows(model, port), port, space.channels)
        for port in space.producers
        if port.parameter == "weight"
    ]
    # A readout is a weight with its moments, so without data there are none.
    found = [(port, moments.get((space.name, port))) for port in space.consumers]
    readings = [(port, reading) for port, reading in found if isinstance(reading, _Reading)]
    context = SpaceContext(
        name=space.name,
        channels=space.channels,
        rank=plan.ranks[space.name],
        blocks=space.blocks,
        selection=space.freedom == "selection",
        producers=tuple(producers),
        readouts=(
            *(_readout(model, space, port, reading) for port, reading in readings),
            *(_score_readout(graph, space, moments) if moments else ()),
        ),
        moment=_own_moment(space, [reading for _, reading in readings]),
    )
    return Surroundings(context, tuple(port for port, _ in readings))


def _rows(model: nn.Module, port: Port) -> Tensor:
    """Return what a port's layer holds for each of its channels, ``(channels, columns)``."""
    weight = getattr(model.get_submodule(port.module), port.parameter).detach()
    if port.groups > 1:
        # Input j of group g is read by the rows of group g only; others are zero.
        rows, width, *kernel = weight.shape
        wide = weight.new_zeros(port.groups, width, port.groups, rows // port.groups, *kernel)
        for group, block in enumerate(weight.chunk(port.groups)):
            wide[group, :, group] = block.transpose(0, 1)
        front = wide.reshape(port.groups * width, rows, -1)
    else:
        front = weight.movedim(port.axis, 0)
        front = front.reshape(front.shape[0], front.shape[1] if front.dim() > 1 else 1, -1)
    stretch = front[port.offset : port.offset + port.channels * port.repeat]
    # (channels, repeat, other, kernel): what a channel meets at each position and tap
    return stretch.reshape(port.channels, port.repeat, front.shape[1], -1)


def _embedded(rows: Tensor, port: Port, channels: int) -> Tensor:
    """Put the rows of a port that holds a part of the space among zeros for the rest."""
    full = rows.new_zeros(channels, rows[0].numel())
    full[port.start : port.start + port.channels] = rows.flatten(1)
    return full


def _readout(model: nn.Module, space: ChannelSpace, port: Port, reading: _Reading) -> Readout:
    rows = _rows(model, port)
    channels, repeat, out, kernel = rows.shape
    part = rows.permute(2, 0, 1, 3).reshape(out, channels, repeat * kernel)
    weight = part.new_zeros(out, space.channels, repeat * kernel)
    weight[:, port.start : port.start + channels] = part
    moment = reading.moments.second_moment
    size = len(moment) // channels
    full = moment.new_zeros(space.channels, size, space.channels, size)
    inside = slice(port.start, port.start + channels)
    full[inside, :, inside] = moment.reshape(channels, size, channels, size)
    if port.groups > 1:
        _cut_between_groups_(full[inside, :, inside], port)
    mean = moment.new_zeros(space.channels, size)
    mean[inside] = reading.moments.mean.reshape(channels, size)
    wide = full.reshape(space.channels * size, space.channels * size)
    return Readout(weight, wide, mean.flatten())


def _score_readout(graph: SpaceGraph, space: ChannelSpace, moments: _Found) -> Iterator[Readout]:
    """Yield how dot products of queries and keys read a space.

    With ``z = q * k``, channel by channel, the product is ``Σ z``; taken as independent, the two
    give ``E[z zᵀ] = E[q qᵀ] * E[k kᵀ]``.
    """
    products = [product for product in graph.products if product.space == space.name]
    if not products:
        return
    width = space.channels // space.blocks
    device = next(w.moments.second_moment.device for w in moments.values())
    weight = torch.zeros(len(products), space.channels, 1, dtype=torch.float64, device=device)
    moment = torch.zeros(space.channels, space.channels, dtype=torch.float64, device=device)
    for number, product in enumerate(products):
        inside = slice(product.block * width, (product.block + 1) * width)
        weight[number, inside] = 1
        sides = [_written(space, moments, *side) for side in (product.left, product.right)]
        queries, keys = (None if side is None else side[:width, :width] for side in sides)
        if queries is None or keys is None:
            return
        moment[inside, inside] += queries * keys
    yield Readout(weight, moment)


def _written(space: ChannelSpace, moments: _Found, module: str, first: int) -> Tensor | None:
    """Return the second moment of what a layer writes, from one of its outputs on.

    None if nothing has been seen of it: a function may be called with its weight.
    """
    for port in space.producers:
        writing = moments.get((space.name, port))
        start = first - port.offset
        if port.module == module and isinstance(writing, _Writing) and 0 <= start < port.channels:
            return writing.moments.second_moment[start:, start:]
    return None


def _cut_between_groups_(moment: Tensor, port: Port) -> None:
    """Zero the moments between groups: no group can make up for a channel of another."""
    # A grouped layer reads whole groups of its port, which may start within the axis.
    entries = port.offset + torch.arange(port.channels, device=moment.device) * port.repeat
    group = entries // max(1, _group_width(port))
    same = group[:, None] == group[None, :]
    moment.mul_(same[:, None, :, None])


def _group_width(port: Port) -> int:
    return port.channels * port.repeat // port.groups


def _own_moment(space: ChannelSpace, readings: list[_Reading]) -> Tensor | None:
    """Return the second moment of a space's features as its first whole reader sees them."""
    for reading in readings:
        channels = reading.port.channels
        if channels == space.channels:
            moment = reading.moments.second_moment
            size = len(moment) // channels
            blocks = moment.reshape(channels, size, channels, size)
            return blocks.diagonal(dim1=1, dim2=3).mean(-1)
    return None


class Moments:
    """The second moments of what consumers of some spaces read, gathered by :func:`observe`.

    Where queries and keys meet in a dot product, those of what their layers write are gathered too.

    Args:
        model: a folded model.
        spaces: whose surroundings are looked at.
        generator: draws the output positions that are looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        spaces: Sequence[ChannelSpace],
        generator: torch.Generator | None = None,
    ) -> None:
        self.readings: dict[_Key, _Reading] = {}
        self.writings: dict[_Key, _Writing] = {}
        by_module: dict[str, list[_Reading]] = {}
        by_writer: dict[str, list[_Writing]] = {}
        for space in spaces:
            for port in space.producers if space.products else ():
                if port.parameter == "weight":
                    weight = getattr(model.get_submodule(port.module), port.parameter)
                    moments = SecondMoments(port.channels, device=weight.device)
                    writing = self.writings[space.name, port] = _Writing(port, moments)
                    by_writer.setdefault(port.module, []).append(writing)
            for port in space.consumers:
                reading = self.readings[space.name, port] = _new_reading(model, port)
                by_module.setdefault(port.module, []).append(reading)
        self.inputs = {path: _Watch(seeing, generator) for path, seeing in by_module.items()}
        self.outputs = {path: _WatchOutput(w, generator) for path, w in by_writer.items()}

    def found(self) -> _Found:
        """Return what has been seen, over all processes.

        Raises:
            DataError: if nothing was.
        """
        found: dict[_Key, _Reading | _Writing] = {**self.readings, **self.writings}
        for seen in found.values():
            seen.moments.reduce()
        # A reader that runs in training mode alone, or as a function, has seen nothing.
        if self.readings and not any(r.moments.count for r in self.readings.values()):
            raise DataError("the data is empty: its batches hold no images")
        return {key: seen for key, seen in found.items() if seen.moments.count}


def _new_reading(model: nn.Module, port: Port) -> _Reading:
    layer = model.get_submodule(port.module)
    weight = getattr(layer, port.parameter)
    kernel = 1 if isinstance(layer, TRANSPOSED_CONVOLUTIONS) else weight[0, 0].numel()
    taps = port.repeat * kernel
    whole = port.channels * taps <= FULL_MOMENT_FEATURES
    features = port.channels * (taps if whole else 1)
    return _Reading(port, taps, SecondMoments(features, device=weight.device), whole)


@dataclass(slots=True)
class _Watch:
    readings: list[_Reading]
    generator: torch.Generator | None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        patches = _rows_read(layer, args[0], self.generator)
        for reading in self.readings:
            reading.update(patches)


def _rows_read(layer: nn.Module, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return what a layer multiplies with its weight, ``(groups, rows, features)``."""
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):  # every position by itself
        rows = output_rows(layer, x, max_rows=ROWS_PER_BATCH, generator=generator)
        return rows.unsqueeze(0)
    return input_patches(layer, x, max_rows=ROWS_PER_BATCH, generator=generator)


@dataclass(slots=True)
class _WatchOutput:
    writings: list[_Writing]
    generator: torch.Generator | None

    def __call__(self, layer: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        rows = output_rows(layer, output, max_rows=ROWS_PER_BATCH, generator=self.generator)
        for writing in self.writings:
            writing.update(rows)
