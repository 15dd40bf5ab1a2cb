"""Channel spaces: what reading a model finds, as plain data.

A *channel space* is the set of tensor axes that must keep the same channels in the same order. It
names its producers, consumers and carriers by :class:`Port`, and says with its *freedom* which
projections it allows. A :class:`SpaceGraph` holds all spaces of one model, together with what is
needed to decide (shapes and multiply-adds) and to change (which norms fold into which layers). It
holds no tensors and no modules, so it survives a copy of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Literal

from torchcap.graph.legend import hints, meanings
from torchcap.graph.rewritten import Rewriting
from torchcap.graph.sizes import Place

Freedom = Literal["linear", "stiefel", "selection", "fixed"]


@dataclass(frozen=True, slots=True)
class Port:
    """A slice of one axis of one parameter or buffer that holds channels of a space.

    Entry ``offset + i`` of the axis belongs to channel ``start + i // repeat`` of the space.

    Attributes:
        module: qualified name of the layer that owns the tensor, ``""`` for the model itself.
        parameter: name of the tensor in its layer.
        axis: the axis of the tensor.
        offset: first entry of the slice; for ``groups > 1`` counted over all groups, one after
            the other.
        start: first channel of the space that the slice holds.
        channels: number of channels that the slice holds.
        repeat: how many neighbouring entries hold one channel (positions merged by a flatten, or
            the multiplier of a depthwise convolution).
        groups: for the input axis of a grouped convolution, its number of groups: group ``g`` of
            the outputs reads entries ``g * size`` to ``(g + 1) * size``, all stored at ``0..size``.
    """

    module: str
    parameter: str
    axis: int
    offset: int
    start: int
    channels: int
    repeat: int = 1
    groups: int = 1

    @property
    def tensor(self) -> str:
        """Qualified name of the tensor."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True, slots=True)
class ChannelSpace:
    """Tensor axes that must keep the same channels in the same order.

    Attributes:
        name: qualified name of the first producer; a further space of the same layer has ``:2``,
            ``:3``… behind it.
        channels: number of channels.
        freedom: ``"linear"`` (no nonlinearity on the way), ``"stiefel"`` (one pointwise function
            for all channels), ``"selection"`` (channels may be dropped, not mixed) or ``"fixed"``.
        producers: the axes that write the channels.
        consumers: the axes that mix them away.
        carriers: the axes of parameters that act on each channel alone.
        reason: why the space is fixed, or only a selection; empty otherwise.
        blocks: number of equal blocks, one behind the other, that must keep equally many channels
            each (groups of a convolution, pieces of a chunk, heads); ranks are multiples of it.
        products: the blocks whose channels meet in a dot product, of queries and keys.
    """

    name: str
    channels: int
    freedom: Freedom
    producers: tuple[Port, ...]
    consumers: tuple[Port, ...]
    carriers: tuple[Port, ...]
    reason: str = ""
    blocks: int = 1
    products: tuple[int, ...] = ()

    @property
    def free(self) -> bool:
        """Whether the space may get a smaller rank."""
        return self.freedom != "fixed"

    @property
    def ports(self) -> tuple[Port, ...]:
        """All ports: producers, consumers, carriers."""
        return self.producers + self.consumers + self.carriers


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive channels of an activation: of one space, or (``space`` is None) of none."""

    space: str | None
    start: int
    channels: int
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Tap:
    """A place where the features of teacher and student are compared.

    Attributes:
        name: the graph node whose value is compared.
        module: qualified name of the module call that shows the value.
        call: which call of that module in a forward, from 0.
        side: ``"output"``, or ``"input"`` where the value is the module's first argument.
        dim: the dimension of the channels.
        layout: what stands along that dimension.
    """

    name: str
    module: str
    call: int
    side: Literal["output", "input"]
    dim: int
    layout: tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """A normalisation that can be folded into the layer before it, or a layer's own.

    Attributes:
        layer: qualified name of the convolution or linear layer.
        norm: qualified name of its batch norm; None where only weight standardisation folds.
        axis: the axis of the layer's weight that its outputs lie on.
    """

    layer: str
    norm: str | None
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Counted:
    """How many channels of which spaces something holds, among ``size`` in all.

    Attributes:
        size: their number before any projection.
        parts: (space, how many of the ``size`` are its channels), for each of the spaces.
    """

    size: int
    parts: tuple[tuple[str, int], ...]

    def kept(self, ratios: Mapping[str, Fraction]) -> int:
        """Return how many are left where some spaces keep this share of their channels."""
        gone = sum((count * (1 - ratios.get(space, 1)) for space, count in self.parts), Fraction(0))
        return int(self.size - gone)


_NONE = Counted(1, ())


@dataclass(frozen=True, slots=True)
class DotProduct:
    """A product of queries and keys over the channels of one block of a space.

    Attributes:
        space: name of the space.
        block: the block, all of whose channels are summed over.
        left, right: who writes the two sides: (module, first of its outputs).
    """

    space: str
    block: int
    left: tuple[str, int]
    right: tuple[str, int]


@dataclass(frozen=True, slots=True)
class HeldSize:
    """An attribute that a forward reads, which says how many channels there are (``head_dim``).

    Attributes:
        place: where it is held.
        counted: what it counts.
    """

    place: Place
    counted: Counted


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """Rows that make up for an operator which divides by the root of the number of channels.

    With fewer channels the operator would divide by less: these rows are multiplied with the root
    of the share of channels that is kept.

    Attributes:
        module: qualified name of the layer that writes the queries.
        rows: the rows of its weight and bias, as (offset, length).
        counted: what the operator counts: the channels of one head.
        roots: how often it divides.
    """

    module: str
    rows: tuple[tuple[int, int], ...]
    counted: Counted
    roots: int = 1


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a convolution or linear layer.

    Attributes:
        module: qualified name of the layer.
        positions: how often all of the weight is used: batch times output positions, of a
            transposed convolution times input positions.
        shape: shape of its weight.
        written: values that are put out for each entry of the weight's axis of outputs: batch
            times output positions, and times the groups of a transposed convolution.
        axis: the axis of the weight that the outputs lie on.
        beside: the channels among the positions, where the layer mixes another dimension than
            them: it runs once for each.
    """

    module: str
    positions: int
    shape: tuple[int, ...]
    written: int
    axis: int = 0
    beside: Counted | None = None

    @property
    def macs(self) -> int:
        """Multiply-adds of the call, at full width."""
        return self.positions * prod(self.shape)


@dataclass(frozen=True, slots=True)
class SpaceGraph:
    """Everything that reading a model finds.

    Attributes:
        model: name of the model's class.
        spaces: all channel spaces with a producer, in the order of the forward.
        tensors: shape of every parameter of the model, by qualified name.
        calls: calls of convolutions and linear layers in one evaluation forward on the example.
        folds: the norms and standardisations that can be folded away.
        taps: where features can be compared.
        notes: what the reading left out, in words (operators without a rule).
        products: the products of queries and keys whose two sides are written by layers.
        sizes: the attributes that count channels of free spaces.
        scaled: the rows that are scaled where spaces get a smaller rank.
        read: the attributes of modules that the forward reads.
        written: the parameters and buffers that the forward writes into.
        rewritings: what forwards become in which numbers are written that count channels.
    """

    model: str
    spaces: tuple[ChannelSpace, ...]
    tensors: Mapping[str, tuple[int, ...]]
    calls: tuple[LayerCall, ...]
    folds: tuple[Fold, ...]
    taps: tuple[Tap, ...]
    notes: tuple[str, ...] = ()
    products: tuple[DotProduct, ...] = ()
    sizes: tuple[HeldSize, ...] = ()
    scaled: tuple[ScaledRows, ...] = ()
    read: frozenset[Place] = frozenset()
    written: frozenset[str] = frozenset()
    rewritings: tuple[Rewriting, ...] = ()

    def __getitem__(self, name: str) -> ChannelSpace:
        for space in self.spaces:
            if space.name == name:
                return space
        raise KeyError(name)

    @property
    def free(self) -> tuple[ChannelSpace, ...]:
        """The spaces that may get a smaller rank."""
        return tuple(space for space in self.spaces if space.free)

    @property
    def macs(self) -> int:
        """Multiply-adds of all convolutions and linear layers, at full width."""
        return sum(call.macs for call in self.calls)

    @property
    def reachable(self) -> float:
        """Share of the multiply-adds that stand in layers which a free space touches."""
        return self.share(*self.free)

    def share(self, *spaces: ChannelSpace) -> float:
        """Return the share of the multiply-adds in layers that a change of the spaces reaches."""
        touched = {port.module for space in spaces for port in space.ports}
        names = {space.name for space in spaces}
        macs = (
            call.macs
            for call in self.calls
            if call.module in touched or names & {n for n, _ in (call.beside or _NONE).parts}
        )
        return sum(macs) / max(1, self.macs)

    def __str__(self) -> str:
        return "\n".join(_table(self))

    def with_rewritings(self, found: Sequence[Rewriting], notes: Sequence[str]) -> SpaceGraph:
        """Return the graph with what forwards become, and without the sizes of any others."""
        paths = {rewriting.module for rewriting in found}
        hidden = tuple(f"{path}." for path in paths)
        layers = {
            f"{rewriting.module}.{node.target}"
            for rewriting in found
            for node in rewriting.graph.find_nodes(op="call_module")
        }
        return dataclasses.replace(
            self,
            rewritings=tuple(found),
            sizes=tuple(s for s in self.sizes if s.place.new is None or s.place.module in paths),
            taps=tuple(
                t for t in self.taps if t.module in layers or not t.module.startswith(hidden)
            ),
            notes=(*self.notes, *notes),
        )

    def after_folding(self) -> SpaceGraph:
        """Return the graph of the folded model: norms gone, every folded layer with a bias."""
        norms = {fold.norm for fold in self.folds if fold.norm is not None}
        biased = {fold.layer: fold.axis for fold in self.folds if fold.norm is not None}
        tensors = {
            name: shape
            for name, shape in self.tensors.items()
            if _owner(name) not in norms and not self._is_gain(name)
        }
        for layer, axis in biased.items():
            tensors[f"{layer}.bias"] = (self.tensors[f"{layer}.weight"][axis],)
        spaces = tuple(
            dataclasses.replace(
                space,
                producers=tuple(self._folded(space.producers, biased)),
                carriers=tuple(
                    port
                    for port in self._folded(space.carriers, biased)
                    if port.module not in norms
                ),
            )
            for space in self.spaces
        )
        return dataclasses.replace(self, spaces=spaces, tensors=tensors, folds=())

    def _is_gain(self, name: str) -> bool:
        return any(name == f"{fold.layer}.gain" for fold in self.folds)

    def _folded(self, ports: tuple[Port, ...], biased: Mapping[str, int]) -> Iterator[Port]:
        for port in ports:
            if self._is_gain(port.tensor):
                continue
            if port.module in biased and port.parameter == "bias":
                continue
            yield port
            if port.parameter == "weight" and biased.get(port.module) == port.axis:
                yield dataclasses.replace(port, parameter="bias", axis=0)


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _table(graph: SpaceGraph) -> Iterator[str]:
    free = graph.free
    yield (
        f"{graph.model}: {len(graph.spaces)} channel spaces, {len(free)} free, "
        f"{sum(space.channels for space in free)} channels in them; they touch "
        f"{graph.reachable:.1%} of {graph.macs:,} multiply-adds"
    )
    width = max([len(space.name) for space in graph.spaces] + [5])
    yield f"{'space':{width}}  channels  blocks  freedom     MACs  read by"
    for space in graph.spaces:
        readers = ", ".join(dict.fromkeys(port.module for port in space.consumers))
        note = f"  [{space.reason}]" if space.reason else ""
        yield (
            f"{space.name:{width}}  {space.channels:8d}  {space.blocks:6d}  {space.freedom:9s}  "
            f"{graph.share(space):6.1%}  {readers or '-'}{note}"
        )
    for note in graph.notes:
        yield f"note: {note}"
    words: set[str] = {space.freedom for space in graph.spaces}
    words |= {"blocks"} if any(space.blocks > 1 for space in graph.spaces) else set()
    yield ""
    yield from meanings(words)
    yield from hints({space.reason for space in graph.spaces if not space.free})
