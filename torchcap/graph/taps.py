"""Where the features of teacher and student can be compared.

Candidates are the values after the skip addition (and its activation) of every residual block; a
layer that reads a free space and from which no such place can be reached is tapped itself, after
its norm and activation. A value can be compared where a hook sees it: as the output of a module, or
as the input of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

from torchcap.graph.rules import Target, find_operator
from torchcap.graph.trace import Traced
from torchcap.graph.values import Channels, Opaque, Operator, Value


@dataclass(frozen=True, slots=True)
class Sight:
    """A value of the graph, and the module call at which a hook sees it.

    Attributes:
        reader: the layer behind which the value stands; None behind a skip addition.
    """

    name: str
    reader: str | None
    module: str
    call: int
    side: Literal["output", "input"]
    value: Channels


def find_sights(
    reading: Traced, values: Mapping[fx.Node, Value], operators: Mapping[Target, Operator]
) -> list[Sight]:
    """Find the places to compare, in the order of the forward.

    Args:
        reading: the evaluation graph.
        values: the abstract value of each of its nodes.
        operators: what is known of operators.
    """
    return _Search(reading, values, operators).sights()


_LAYERS = {"convolution", "linear", "layers"}
_FOLLOWING = {"pointwise", "unchanged", "batch norm"}


class _Search:
    def __init__(
        self,
        reading: Traced,
        values: Mapping[fx.Node, Value],
        operators: Mapping[Target, Operator],
    ) -> None:
        self.reading, self.values, self.operators = reading, values, operators
        self.nodes = list(reading.graph.nodes)
        self.calls = self._call_indices()

    def sights(self) -> list[Sight]:
        residual = [self._settled(node) for node in self.nodes if self._joins(node)]
        reaching = self._upstream(set(residual))
        wanted: dict[fx.Node, str | None] = dict.fromkeys(residual)
        for node in self.nodes:
            if self._kind(node) in _LAYERS and node not in reaching:
                source = node.args[0] if node.args else None
                if isinstance(source, fx.Node) and isinstance(self.values[source], Channels):
                    wanted.setdefault(self._settled(node), str(node.target))
        order = {node: index for index, node in enumerate(self.nodes)}
        found: dict[str, Sight] = {}
        for node in sorted(wanted, key=order.__getitem__):
            # Where no hook sees a sum, its summands are the next best.
            sights = [self._sight(node, wanted[node])]
            if sights == [None] and node in residual:
                summands = self._sum_of(node).all_input_nodes
                sights = [self._sight(summand, None) for summand in summands]
            found.update({sight.name: sight for sight in sights if sight is not None})
        return list(found.values())

    def _kind(self, node: fx.Node) -> str | None:
        found = find_operator(node, self.reading.module(node), self.operators)
        return None if found is None else found.kind

    def _joins(self, node: fx.Node) -> bool:
        """Whether a node adds two feature maps of one shape: the end of a residual block."""
        if self._kind(node) not in {"sum", "difference"} or len(node.args) < 2:
            return False
        sides = [self.values.get(arg) for arg in node.args[:2] if isinstance(arg, fx.Node)]
        tensors = [side for side in sides if isinstance(side, Channels | Opaque)]
        shapes = {side.shape for side in tensors}
        followed = any(isinstance(side, Channels) for side in tensors)
        return len(tensors) == 2 and followed and len(shapes) == 1 and len(shapes.pop()) > 2

    def _settled(self, node: fx.Node) -> fx.Node:
        """Follow a value through the norm and activation that alone read it."""
        while len(node.users) == 1:
            (user,) = node.users
            if self._kind(user) not in _FOLLOWING:
                break
            node = user
        return node

    def _upstream(self, targets: set[fx.Node]) -> set[fx.Node]:
        reaching = set(targets)
        for node in reversed(self.nodes):
            if any(user in reaching for user in node.users):
                reaching.add(node)
        return reaching

    def _sight(self, node: fx.Node, reader: str | None, steps: int = 4) -> Sight | None:
        value = self.values[node]
        if not isinstance(value, Channels):
            # Option A: the sum itself is opaque to the rules where a side of it is.
            value = self._summand(node)
        if value is None:
            return None
        for place in self._places(node):
            piece = self.reading.piece
            name = f"{piece}/{node.name}" if piece else node.name
            return Sight(name, reader, *place, value)
        if steps and len(node.users) == 1:
            return self._sight(next(iter(node.users)), reader, steps - 1)
        return None

    def _sum_of(self, node: fx.Node) -> fx.Node:
        """Follow a settled value back to the sum that it came from."""
        while self._kind(node) in _FOLLOWING and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def _summand(self, node: fx.Node) -> Channels | None:
        shape = node.meta.get("val")
        for arg in self._sum_of(node).args:
            value = self.values.get(arg) if isinstance(arg, fx.Node) else None
            if isinstance(value, Channels) and isinstance(shape, Tensor):
                return value if value.shape == tuple(shape.shape) else None
        return None

    def _places(self, node: fx.Node) -> Iterator[tuple[str, int, Literal["output", "input"]]]:
        if node in self.calls:
            yield str(node.target), self.calls[node], "output"
        for path, call in self.reading.outputs.get(node, ()):
            if path:
                yield path, call, "output"
        for user in node.users:
            if user in self.calls and user.args and user.args[0] is node:
                yield str(user.target), self.calls[user], "input"

    def _call_indices(self) -> dict[fx.Node, int]:
        seen: Counter[str] = Counter()
        indices = {}
        for node in self.nodes:
            if node.op == "call_module":
                indices[node] = seen[str(node.target)]
                seen[str(node.target)] += 1
        return indices
