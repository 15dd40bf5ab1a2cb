"""What a recording is made of: graphs in the making, and all else that was noted.

Tensors are known by identity: an :class:`Entry` says which node of which graph a tensor is. A
:class:`Builder` makes one graph, of the model or of a module that is read by itself.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from torchcap.graph.sizes import Place, Ratio, Size
from torchcap.graph.where import Where
from torchcap.nests import Key, mapped


class ModuleRun(NamedTuple):
    """One call of a module.

    Attributes:
        path: qualified name of the module.
        args: what it was given by position.
        kwargs: what it was given by name.
        output: what it gave.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


class Seen:
    """The shape and dtype of a tensor that has been seen, without the tensor.

    It is no data class, because those are walked into like other nested values.
    """

    __slots__ = ("dtype", "shape")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def on_meta(self) -> Tensor:
        """Return a tensor of this shape without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True, slots=True, eq=False)
class Dimension:
    """The origin of a size: a dimension of a tensor.

    Attributes:
        entry: of the tensor.
        dim: which of its dimensions; None for the number of all its entries.
        key: what it is called in every recording of the same forward.
        where: it was read.
    """

    entry: Entry
    dim: int | None
    key: tuple[Any, ...]
    where: Where | None


@dataclass(slots=True, eq=False)
class Entry:
    """A tensor that a builder knows.

    Attributes:
        builder: whose graph it stands in.
        node: what made it.
        path: where in the node's result it is.
        reference: to the tensor itself, which the record does not keep alive.
        dims: the origins of its sizes that have been asked for.
    """

    builder: Builder
    node: fx.Node
    path: tuple[Key, ...]
    reference: weakref.ref[Tensor]
    dims: dict[int | None, Dimension] = field(default_factory=dict)

    def at(self) -> fx.Node:
        """Return the node of the tensor itself, taken out of its maker's result where need be."""
        while self.path:
            (kind, name), *rest = self.path
            take = operator.getitem if kind == "item" else getattr
            value = self.node.meta["val"]
            path = self.node.meta.get("path", "")
            self.node = self.builder.add("call_function", take, (self.node, name), {})
            self.node.meta["val"] = value[name] if kind == "item" else getattr(value, name)
            self.node.meta["path"] = path
            self.path = tuple(rest)
        return self.node


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One call of a module whose forward is read inside.

    Attributes:
        path: qualified name of the module.
        given: its arguments, by position and by name: nodes in the place of tensors and sizes,
            :data:`UNUSED` where no node reads them.
        output: what it returned, likewise.
        before: the last node of the graph when it began; None if there was none.
        last: the last node of the graph when it had ended.
    """

    path: str
    given: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    before: fx.Node | None
    last: fx.Node | None


UNUSED = object()
"""Stands for a tensor or a size that no node of a graph reads."""


class _Known:
    """Stands for a tensor in nested values; no data class, because those are walked into."""

    __slots__ = ("entry",)

    def __init__(self, builder: Builder, tensor: Tensor) -> None:
        self.entry = builder.entry(tensor)

    def node(self) -> Any:
        """Return the node that made the tensor, or where nothing has taken it out of another's."""
        return UNUSED if self.entry is None or self.entry.path else self.entry.node


@dataclass(slots=True)
class Builder:
    """One graph in the making: of the whole forward, or of a piece of it.

    Attributes:
        piece: qualified name of the module whose forward it is, ``""`` for the model's own.
        graph: so far.
        entries: the tensors that it knows, by identity.
        outputs: node -> the (module path, call) pairs whose output it is.
        kept: nodes whose values are used past the graph in other ways than by being returned.
        held: nodes of the tensors that modules or the program hold.
        sizes: nodes of sizes, by their origin.
        constants: the tensors that the program holds, by their name in the graph.
        frames: the calls of modules that are read inside.
        strange: why the graph cannot be run by itself, if it cannot.
    """

    piece: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    entries: dict[int, Entry] = field(default_factory=dict)
    outputs: dict[fx.Node, list[tuple[str, int]]] = field(default_factory=dict)
    kept: dict[fx.Node, str] = field(default_factory=dict)
    held: dict[Any, fx.Node] = field(default_factory=dict)
    sizes: dict[int, tuple[Any, fx.Node]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    strange: str | None = None
    end: fx.Node | None = None

    def add(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> fx.Node:
        """Append a node, or put it before the output where there is one already."""
        if self.end is None:
            return self.graph.create_node(op, target, args, dict(kwargs))
        with self.graph.inserting_before(self.end):
            return self.graph.create_node(op, target, args, dict(kwargs))

    def know(self, tensor: Tensor, node: fx.Node, path: tuple[Key, ...] = ()) -> Entry:
        """Note which node has made a tensor."""
        entry = self.entries[id(tensor)] = Entry(self, node, path, weakref.ref(tensor))
        return entry

    def entry(self, tensor: Tensor) -> Entry | None:
        """Return what is known of a tensor."""
        found = self.entries.get(id(tensor))
        return found if found is not None and found.reference() is tensor else None

    def last(self) -> fx.Node | None:
        """Return the last node so far."""
        return next(iter(reversed(self.graph.nodes)), None)

    def noted(self, value: Any) -> Any:
        """Return a nested value with what is known of tensors in their place."""
        return mapped(value, lambda leaf: _Known(self, leaf) if isinstance(leaf, Tensor) else leaf)

    def settled(self) -> list[Frame]:
        """Return the frames with nodes in the place of tensors and sizes."""

        def node_of(leaf: Any) -> Any:
            if isinstance(leaf, _Known):
                return leaf.node()
            if isinstance(leaf, Size | Ratio):
                return self.sizes.get(id(leaf.origin), (None, UNUSED))[1]
            return leaf

        return [
            replace(
                frame,
                given=mapped(frame.given, node_of),
                output=mapped(frame.output, node_of),
            )
            for frame in self.frames
        ]


@dataclass(frozen=True, slots=True)
class ValueRead:
    """A forward has looked at the value of a tensor.

    Attributes:
        path: of the module whose forward it was.
        what: the operator that showed the value.
        where: in its code.
    """

    path: str
    what: str
    where: Where | None

    def __str__(self) -> str:
        place = "" if self.where is None else f" at {self.where}"
        return f"its forward looks at the values of a tensor ({self.what}){place}"


@dataclass(slots=True)
class Record:
    """What one recording has found.

    Attributes:
        builders: the graphs, of the model or of pieces, in the order in which they began.
        ran: the calls of all modules; tensors are :class:`Seen`.
        values: where forwards have looked at values.
        branches: the places where sizes are compared, which the forward may branch on.
        moods: module -> what its forward depends on or changes that stands in no graph (a dtype, a
            device, whether gradients are on, Python's random numbers).
        dimensions: the sizes that were read from tensors.
        reads: attribute of a module -> the modules that were running when it was read.
        outside: module -> why it is not changed: something goes past the forwards that were read.
        modal: whether a forward that was read has looked at the mode (``self.training``).
        changed: attributes of modules that forwards have changed, but for tensors.
        graded: whether one has asked if gradients are on (``torch.is_grad_enabled()``).
    """

    builders: list[Builder] = field(default_factory=list)
    ran: list[ModuleRun] = field(default_factory=list)
    values: list[ValueRead] = field(default_factory=list)
    branches: set[str] = field(default_factory=set)
    moods: dict[str, str] = field(default_factory=dict)
    dimensions: list[Dimension] = field(default_factory=list)
    reads: dict[Place, set[str]] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    modal: bool = False
    changed: set[Place] = field(default_factory=set)
    graded: bool = False
