"""Replay: two graphs of one structure, run node by node on the same batches.

The closed forms need a layer's input as the small network computes it, and its output as the
teacher does, one layer after the other. A whole forward for each layer would take time that grows
with the square of the depth. Here every batch waits at the last node that was asked for, with the
values that later nodes read; batches whose values don't fit into the memory that was granted run
again from their beginning.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchcap.batches import Batch, Source
from torchcap.errors import TraceError
from torchcap.graph.analyze import Reader, known_operators
from torchcap.graph.calls import written_by
from torchcap.graph.copies import running
from torchcap.graph.inputs import Inputs, flattened
from torchcap.graph.rules import find_operator
from torchcap.graph.trace import GraphRunner, Traced
from torchcap.nests import cloned, tensors_in

Values = dict[fx.Node, Any]
_VIEWS = {"move", "unchanged", "chunk", "split"}


@dataclass(slots=True)
class _Walker:
    """One graph, and the order in which its nodes have run so far."""

    model: nn.Module
    traced: Traced
    order: list[int] = field(default_factory=list)
    interpreter: GraphRunner = field(init=False)
    nodes: list[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = list(self.traced.graph.nodes)
        self.interpreter = GraphRunner(self.model, self.traced)

    def run(self, values: Values, start: int, batch: Batch) -> None:
        """Run the nodes of the order from one of its places on."""
        if start == 0:
            self.interpreter.args_iter = iter(
                cloned(flattened(self.model, Inputs(batch.args, batch.kwargs)))
            )
        self.interpreter.env = values
        done = {self.nodes[index] for index in self.order[:start]}
        for index in self.order[start:]:
            node = self.nodes[index]
            values[node] = self.interpreter.run_node(node)
            done.add(node)
            for read in node.all_input_nodes:  # a batch that starts again passes many layers
                if read in values and all(user in done for user in read.users):
                    del values[read]


@dataclass(slots=True)
class _Lane:
    """One batch on its way: what it has computed, how far it came in each graph, its bytes."""

    batch: Batch
    teacher: Values = field(default_factory=dict)
    student: Values = field(default_factory=dict)
    places: tuple[int, int] = (0, 0)
    size: int = 0

    def weigh(self) -> int:
        """Return the memory of the tensors that the lane holds, its batch among them."""
        held: dict[int, int] = {}
        for tensor in tensors_in([self.batch.args, self.batch.kwargs, self.teacher, self.student]):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())


@dataclass(frozen=True, slots=True)
class Station:
    """A layer call at which the replay stops.

    Attributes:
        name: qualified name of the layer.
        index: of its node in the graphs.
        end: index of the node whose value in the teacher is the target: the call itself, or the
            sum that it is a term of.
        other: index of the other term of that sum; None where the target is the call's own value.
    """

    name: str
    index: int
    end: int
    other: int | None = None


class Replay:
    """Runs a teacher and a student of the same structure on all batches, station by station.

    Both run in evaluation mode, without gradients. Neither is changed; what the caller writes into
    the student's weights between two stations is what the next stretch computes with.

    Args:
        teacher, student: models of one class, which differ in the widths of layers.
        source: the batches.
        memory: bytes that waiting batches may take together.
        reader: how the models are read.

    Raises:
        TraceError: if the graphs differ, or compute something else than the models do.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        source: Source,
        *,
        memory: int,
        reader: Reader,
    ) -> None:
        self.source, self.memory = source, memory
        self.operators = known_operators(reader.rules)
        first = source.first()
        walkers = []
        for model in (teacher, student):
            expected = evaluated(model, first, times=2)
            reading = reader.trace(model, first.inputs)
            _check_replay(model, reading, first, expected)
            walkers.append(_Walker(model, reading))
        self.teacher, self.student = walkers
        ours, theirs = ([(n.op, str(n.target)) for n in w.nodes] for w in walkers)
        if ours != theirs:
            raise TraceError(
                f"the graph of the small {type(student).__name__!r} has another structure than "
                f"that of its teacher {type(teacher).__name__!r}: {len(theirs)} nodes against "
                f"{len(ours)}; give the model that the small one was made from"
            )
        self._lanes: dict[int, _Lane] = {}
        self._done: set[int] = set()
        self._ahead: set[int] = set()  # nodes that have run in the teacher alone
        self.peak = 0

    def stations(self, layers: set[str]) -> Iterator[Station]:
        """Iterate over the calls of the layers, in the order of the forward.

        Layers that are called more than once are left out: one weight serves several inputs there.
        So are calls with more than an input (the size that a transposed convolution should give),
        and layers over positions, which run once for each channel: there are fewer in the student.
        """
        calls: dict[str, list[int]] = {}
        for index, node in enumerate(self.student.nodes):
            if node.op == "call_module" and str(node.target) in layers:
                calls.setdefault(str(node.target), []).append(index)
        once = {
            name: index
            for name, (index, *more) in calls.items()
            if not more and _only_reads(self.student.nodes[index]) and self._is_as_often(index)
        }
        for name, index in sorted(once.items(), key=operator.itemgetter(1)):
            yield self._station(name, index, set(once.values()))

    def _is_as_often(self, index: int) -> bool:
        """Whether a layer writes as many rows in the student as in the teacher."""
        rows = []
        for walker in (self.teacher, self.student):
            node = walker.nodes[index]
            weight = getattr(walker.traced.module(node), "weight", None)
            shape = list(_shape(node) or ())
            if not isinstance(weight, Tensor) or len(shape) < weight.dim() - 1:
                return False
            del shape[1 - weight.dim()]
            rows.append(shape)
        return rows[0] == rows[1]

    def visit(self, station: Station) -> Iterator[tuple[Tensor, Tensor]]:
        """Run all batches to a station.

        Yields:
            for each batch the input of the layer in the student, and the target of its output:
            what the teacher puts out there, or what is missing from the teacher's sum.
        """
        last = max(station.index, station.end)
        behind = self._dependants(station.index, last)
        before = [i for i in range(last) if i not in self._done and i not in behind]
        self.student.order += before
        self.teacher.order += [i for i in before if i not in self._ahead]
        ahead = [i for i in self._path(station) if i not in self._ahead]
        self.teacher.order += ahead
        self._done.update(before)
        self._ahead.update(ahead)
        for lane in self._advanced():
            yield self._pair(lane, station)

    def _pair(self, lane: _Lane, station: Station) -> tuple[Tensor, Tensor]:
        call = self.student.nodes[station.index]
        x = lane.student[call.all_input_nodes[0]]
        target = lane.teacher[self.teacher.nodes[station.end]]
        if station.other is not None:
            target = target - lane.student[self.student.nodes[station.other]]
        return x, target

    @torch.no_grad()
    def _advanced(self) -> Iterator[_Lane]:
        """Bring every batch to the present place, one after the other."""
        if len(self._lanes) == len(self.source):  # all of them are waiting: no need to read data
            for number in sorted(self._lanes):
                lane = self._lanes[number]
                self._advance(lane)
                yield lane
                self._account(number)
            return
        with self.source.passing(0) as batches:
            for number, batch in enumerate(batches):
                if number >= len(self.source):
                    break
                lane = self._lanes.get(number) or _Lane(batch)
                self._advance(lane)
                yield lane
                self._lanes[number] = lane
                self._account()

    def _advance(self, lane: _Lane) -> None:
        with lane.batch.blamed(self.student.model):
            self.teacher.run(lane.teacher, lane.places[0], lane.batch)
            self.student.run(lane.student, lane.places[1], lane.batch)
        lane.places = len(self.teacher.order), len(self.student.order)
        lane.size = lane.weigh()

    def _account(self, last: int | None = None) -> None:
        """Let go of batches until the others fit into the memory: the last ones first.

        Args:
            last: number of the last batch that may go; those behind it have still to be seen.
        """
        held = sum(lane.size for lane in self._lanes.values())
        for number in sorted(self._lanes, reverse=True):
            if held > self.memory and (last is None or number <= last):
                held -= self._lanes.pop(number).size
        self.peak = max(self.peak, held)

    def _station(self, name: str, index: int, stops: set[int]) -> Station:
        """Follow a call to the sum that it is a term of, if no other operator stands between.

        Of two layers that are added, the later one makes up for what is missing from the sum: the
        value of the other has to be final.
        """
        nodes = self.student.nodes
        number = {node: i for i, node in enumerate(nodes)}
        node = nodes[index]
        while len(node.users) == 1:
            (user,) = node.users
            known = find_operator(user, self.student.traced.module(user), self.operators)
            kind = None if known is None else known.kind
            if kind == "unchanged":
                node = user
                continue
            if kind == "sum" and len(user.args) == 2 and not user.kwargs:
                other = user.args[1] if user.args[0] is node else user.args[0]
                if isinstance(other, fx.Node) and other is not node and self._adds(user, other):
                    end = number[user]
                    if not stops & set(range(index + 1, end)):
                        return Station(name, index, end, number[other])
            break
        return Station(name, index, index)

    def _adds(self, total: fx.Node, other: fx.Node) -> bool:
        """Whether a sum has the shape of its terms, in the teacher as in the student."""
        twin = self.teacher.nodes[self.student.nodes.index(total)]
        shapes = {_shape(node) for node in (total, other, *total.all_input_nodes, twin)}
        return len(shapes) == 1 and None not in shapes

    def _dependants(self, index: int, last: int) -> set[int]:
        """Return the nodes, up to a last one, that can run only after another one.

        What writes into a tensor runs after those that read it before, so it waits for them too.
        """
        nodes, traced = self.student.nodes, self.student.traced
        found = {nodes[index]}
        behind = {index}
        for i in range(index + 1, last + 1):
            writes = written_by(nodes[i], traced.module(nodes[i]))
            waits = any(source in found for source in nodes[i].all_input_nodes)
            if waits or (writes is not None and any(self._shares(n, writes) for n in found)):
                found.add(nodes[i])
                behind.add(i)
        return behind

    def _shares(self, node: fx.Node, written: fx.Node) -> bool:
        """Whether a node reads what another one is written to, or a view of it."""
        roots = {self._root(source) for source in node.all_input_nodes}
        return self._root(written) in roots

    def _root(self, node: fx.Node) -> fx.Node:
        while node.all_input_nodes:
            known = find_operator(node, self.student.traced.module(node), self.operators)
            writes = written_by(node, self.student.traced.module(node))
            if writes is None and (known is None or known.kind not in _VIEWS):
                break
            node = node.all_input_nodes[0] if writes is None else writes
        return node

    def _path(self, station: Station) -> list[int]:
        """Return the nodes that the teacher runs to get from the call to its target."""
        nodes = self.teacher.nodes
        needed = {station.end}
        for i in range(station.end, station.index - 1, -1):
            if i in needed:
                sources = {nodes.index(source) for source in nodes[i].all_input_nodes}
                needed |= {s for s in sources if s >= station.index}
        return sorted(i for i in needed if i in self._dependants(station.index, station.end))


@torch.no_grad()
def evaluated(model: nn.Module, batch: Batch, *, times: int = 1) -> list[Tensor]:
    """Return what a model puts out in evaluation mode, when it is called for the n-th time.

    Raises:
        DataError: if it does not accept the batch.
    """
    twin = running(model)
    for _ in range(times - 1):
        batch.run(twin)
    return list(tensors_in([batch.run(twin)]))


@torch.no_grad()
def _check_replay(
    model: nn.Module, reading: Traced, batch: Batch, expected: Sequence[Tensor]
) -> None:
    """Raise a TraceError if the graph computes something else than the model."""
    given = cloned(flattened(model, Inputs(batch.args, batch.kwargs)))
    found = list(tensors_in(GraphRunner(model, reading).run(*given)))
    same = len(found) == len(expected) and all(
        f.shape == e.shape and torch.allclose(f, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()))
        for f, e in zip(found, expected, strict=True)
    )
    if not same:
        raise TraceError(
            f"the graph of {type(model).__name__!r} computes something else than its forward on "
            "this data, so it cannot be solved layer by layer; leave the closed forms out: "
            "Recipe.minutes().but(solve=None, start=GreedySelection())"
        )


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _only_reads(call: fx.Node) -> bool:
    return len(call.args) + len(call.kwargs) == 1
