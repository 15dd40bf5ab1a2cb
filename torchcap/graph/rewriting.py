"""Rewriting a forward in which numbers are written that would have to follow the channels.

``x.reshape(B, N, C)`` puts heads side by side, as many channels as the residual stream has, so they
could not become fewer. In a recording that number is an argument of a node. Here it becomes an
attribute of the module (``width_0``), which the module's heads then follow like any other size that
a module holds; and the part of the recording that is the module's forward becomes its forward (see
:mod:`torchcap.graph.rewritten`).

A part of a recording stands for a forward if it is the same in every call, in both modes and on
either side of every branch on sizes, and touches nothing but the module's own arguments, tensors
and layers. Arguments that are no tensors must be in later calls what they were in the example; the
new forward asserts it.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from torchcap.graph.calls import written_by
from torchcap.graph.copies import HOOKS
from torchcap.graph.records import UNUSED, Frame
from torchcap.graph.rewritten import Number, Rewriting, Slot
from torchcap.graph.sizes import Place
from torchcap.graph.trace import Traced, first_line, holds
from torchcap.nests import leaves_of, mapped


@dataclass(slots=True)
class Opened:
    """The numbers of a model's forwards that are attributes for now."""

    model: nn.Module
    numbers: dict[tuple[str, str, Slot, int], Number] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    changes: list[tuple[fx.Node, tuple[Any, ...], dict[str, Any], str]] = field(
        default_factory=list
    )

    def open_all(self, numbers: Iterable[tuple[fx.Node, int]]) -> bool:
        """Let numbers of nodes be attributes; whether there is one that was not yet."""
        opened = [self._open(node, position) for node, position in numbers]
        return any(opened)

    def by_module(self) -> dict[str, list[Number]]:
        """Return the numbers by the module that they belong to."""
        found: dict[str, list[Number]] = {}
        for number in self.numbers.values():
            found.setdefault(number.place.module, []).append(number)
        return found

    def _open(self, node: fx.Node, position: int) -> bool:
        path = node.meta.get("path", "")
        slot, value = _slot(node, position)
        if slot is None or path in self.refused or not path:
            return False
        key = (path, str(node.meta["where"]), slot, value)
        if fresh := key not in self.numbers:
            taken = set(vars(self.model.get_submodule(path)))
            taken |= {n.place.name for n in self.numbers.values() if n.place.module == path}
            name = next(f"width_{i}" for i in range(len(taken) + 1) if f"width_{i}" not in taken)
            self.numbers[key] = Number(key[1], slot, value, Place(path, name, new=value))
        return fresh

    def apply_(self, traced: Traced) -> None:
        """Put the attributes in the place of the numbers of a graph."""
        known = {key[:2] for key in self.numbers}
        for node in list(traced.graph.nodes) if known else ():
            path, where = node.meta.get("path", ""), str(node.meta.get("where"))
            if (path, where) not in known:
                continue
            for number in list(self.numbers.values()):
                if (number.place.module, number.where) != (path, where):
                    continue
                if _value_at(node, number.slot) == number.value:
                    self.changes.append((node, node.args, dict(node.kwargs), path))
                    _put(traced, node, number)

    def close_(self, path: str) -> None:
        """Put the numbers of one module back, for good."""
        for node, args, kwargs, owner in reversed(self.changes):
            if owner == path:
                held = [n for n in node.all_input_nodes if _is_new(n)]
                node.args, node.kwargs = args, kwargs
                for number in held:
                    if not number.users:
                        number.graph.erase_node(number)
        self.refused.add(path)
        self.changes = [change for change in self.changes if change[3] != path]
        self.numbers = {key: n for key, n in self.numbers.items() if key[0] != path}


def _put(traced: Traced, node: fx.Node, number: Number) -> None:
    with traced.graph.inserting_before(node):
        held = traced.graph.create_node("get_attr", number.place.path, (), {})
    held.meta |= {
        "val": number.value,
        "place": number.place,
        "path": number.place.module,
        "where": node.meta.get("where"),
    }
    kind, index, inner = number.slot
    if kind == "kwargs":
        value = node.kwargs[str(index)]
        node.kwargs = {**node.kwargs, str(index): _replaced(value, inner, held)}
    else:
        args = list(node.args)
        args[int(index)] = _replaced(args[int(index)], inner, held)
        node.args = tuple(args)


def _replaced(value: Any, inner: int | None, held: fx.Node) -> Any:
    if inner is None:
        return held
    items = list(value)
    items[inner] = held
    return type(value)(items) if isinstance(value, tuple) else items


def _slot(node: fx.Node, position: int) -> tuple[Slot, int] | tuple[None, int]:
    """Return where the size of one of the new dimensions, or pieces, stands, and its value."""
    rest = node.args[1:]
    slot: Slot
    if len(rest) >= 1 and isinstance(rest[0], list | tuple):
        slot = ("args", 1, position)
    elif len(rest) > position and node.target not in _SPLITS:
        slot = ("args", 1 + position, None)
    else:
        name = next((n for n in ("shape", "size", "split_size") if n in node.kwargs), None)
        if name is None or not isinstance(node.kwargs[name], list | tuple):
            return None, 0
        slot = ("kwargs", name, position)
    value = _value_at(node, slot)
    return (slot, value) if value is not None and value > 0 else (None, 0)


_SPLITS = {torch.split, "split", "split_with_sizes"}


def _value_at(node: fx.Node, slot: Slot) -> int | None:
    """Return the number in a slot; None if there is none, or an attribute by now."""
    kind, index, inner = slot
    try:
        value: Any = node.kwargs[str(index)] if kind == "kwargs" else node.args[int(index)]
        value = value if inner is None else value[inner]
    except (LookupError, TypeError):
        return None
    if isinstance(value, fx.Node):
        value = None if _is_new(value) else value.meta.get("val")
    return value if type(value) is int else None


def _is_new(node: fx.Node) -> bool:
    """Whether a node reads an attribute that a module holds only once its forward is rewritten."""
    place = node.meta.get("place")
    return isinstance(place, Place) and place.new is not None


# --------------------------------------------------------------------------------------------------
# A part of a recording as a forward


class Refusal(Exception):  # noqa: N818 - it is no error
    """Why a part of a recording cannot be the forward of its module."""


def rewriting_of(
    path: str, numbers: Sequence[Number], graphs: Sequence[Traced], moods: Mapping[str, str]
) -> Rewriting:
    """Return what a module's forward becomes.

    Args:
        path: qualified name of the module.
        numbers: of its forward, that are attributes in the graphs.
        graphs: all recordings of the model.
        moods: module -> what its forward depends on or changes that stands in no graph.

    Raises:
        Refusal: if it cannot be rewritten.
    """
    _check_module(graphs[0].model, path, moods)
    bodies: dict[str, list[fx.Graph]] = {"eval": [], "train": []}
    for traced in graphs:
        for frame in traced.frames:
            if frame.path == path:
                bodies[traced.mode].append(_Body(traced, frame).graph)
    for found in bodies.values():
        for other in found[1:]:
            _unify_(found[0], other)
    first = [found[0] for found in bodies.values() if found]
    if not first:
        raise Refusal("no call of it comes to its end")
    graph, *more = first
    for other in more:
        _unify_(graph, other, training=True)
    graph.lint()
    reads = graph.find_nodes(op="get_attr")
    widths = {str(node.target): node.meta["val"] for node in reads if _is_new(node)}
    for node in graph.nodes:
        node.meta.clear()
    code = graph.python_code("self").src
    rewriting = Rewriting(path, tuple(numbers), widths, graph, code)
    try:
        rewriting.class_from(type(graphs[0].model.get_submodule(path)))
    except Exception as error:  # whatever cannot be said in code
        raise Refusal(f"it cannot be written down ({first_line(error)})") from error
    return rewriting


def _check_module(model: nn.Module, path: str, moods: Mapping[str, str]) -> None:
    """Refuse a module with hooks, or whose forward does what stands in no graph."""
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        if any(getattr(module, held) for held in HOOKS):
            raise Refusal(f"{name!r} has hooks")
        if name in moods:
            where = "" if name == path else f", in {name!r}"
            raise Refusal(moods[name] + where)


class _Body:
    """The part of one recording that one call of a module is."""

    def __init__(self, traced: Traced, frame: Frame) -> None:
        self.traced, self.frame = traced, frame
        self.module = traced.model.get_submodule(frame.path)
        if "forward" in vars(self.module):
            raise Refusal("its forward has been replaced")
        self.graph = fx.Graph()
        self.twins: dict[fx.Node, Any] = {}
        if any(holds(frame.path, path) or path == frame.path for path in traced.unread):
            raise Refusal("a part of it is not read")
        self.inside = dict.fromkeys(self._nodes_inside())
        self._take_arguments()
        for node in self.inside:
            if isinstance(node.meta.get("val"), int | float | bool):
                continue  # numbers are taken along where something needs them
            self._twin(node)
        self._check_effects()
        self.graph.output(self._result(frame.output))

    def _nodes_inside(self) -> list[fx.Node]:
        nodes = list(self.traced.graph.nodes)
        start = 0 if self.frame.before is None else nodes.index(self.frame.before) + 1
        stop = 0 if self.frame.last is None else nodes.index(self.frame.last) + 1
        return nodes[start:stop]

    def _take_arguments(self) -> None:
        """Make the placeholders, and take what the example gave them."""
        args, kwargs = self.frame.given
        signature = inspect.signature(type(self.module).forward)
        bound = signature.bind(self.module, *args, **kwargs)
        guards: list[tuple[fx.Node, Any]] = []
        given: list[tuple[fx.Node, Any]] = []
        for name, parameter in list(signature.parameters.items())[1:]:
            if parameter.kind is parameter.VAR_POSITIONAL:
                if bound.arguments.get(name):
                    raise Refusal(f"it takes any number of arguments (*{name})")
                continue
            if parameter.kind is parameter.VAR_KEYWORD:
                value: Any = bound.arguments.get(name, {})
                node = self.graph.placeholder(f"**{name}")
            else:
                missing = parameter.default is parameter.empty
                value = bound.arguments.get(name, parameter.default)
                default = () if missing else (parameter.default,)
                if missing and parameter.kind is parameter.KEYWORD_ONLY:
                    default = (None,)  # there may be others with a default before it
                if not missing and not _is_constant(parameter.default):
                    raise Refusal(f"the default of its argument {name!r} is an object")
                node = self.graph.create_node("placeholder", name, default)
            given.append((node, value))
        for node, value in given:
            self._take(node, value, guards)
        for node, value in guards:
            same = self.graph.call_function(operator.eq, (node, value))
            asked = "another value" if value is not None else "a value"
            text = f"argument {node.name} had {value!r} in the example inputs, and is given {asked}"
            self.graph.call_function(torch._assert, (same, text))

    def _take(self, node: fx.Node, value: Any, guards: list[tuple[fx.Node, Any]]) -> None:
        if value is UNUSED:
            return
        if isinstance(value, fx.Node):
            if value in self.twins:
                raise Refusal("one tensor is given to it twice")
            self.twins[value] = node
        elif _is_constant(value):
            guards.append((node, value))
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                self._take(self.graph.call_function(operator.getitem, (node, key)), item, guards)
        else:
            raise Refusal(f"it is given a {type(value).__name__}")

    def _twin(self, node: fx.Node) -> Any:
        if node in self.twins:
            return self.twins[node]
        if node.op in {"placeholder", "output"}:
            raise Refusal(f"it uses {node.name!r}, which is no argument of its own")
        number = not isinstance(node.meta.get("val"), Tensor)
        held = node.op == "get_attr"
        if node not in self.inside and not number and not held:
            raise Refusal(f"it uses {node.name!r}, which is no argument of its own")
        args = fx.map_arg(_sayable(node.args), self._twin)
        kwargs = fx.map_arg(_sayable(dict(node.kwargs)), self._twin)
        target = node.target
        if node.op in {"get_attr", "call_module"}:
            if not holds(self.frame.path, str(target)):
                raise Refusal(f"it uses {target!r}, which is not a part of it")
            target = str(target)[len(self.frame.path) + 1 :]
        elif getattr(target, "__module__", "").startswith("torchcap"):
            raise Refusal(f"it writes into a tensor, at {node.meta.get('where')}")
        twin = self.graph.create_node(node.op, target, args, kwargs)
        twin.meta |= {key: node.meta[key] for key in ("where", "place", "val") if key in node.meta}
        self.twins[node] = twin
        return twin

    def _result(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._twin(value)
        if type(value) in {list, tuple}:
            return type(value)(map(self._result, value))
        if type(value) is dict:
            return {key: self._result(item) for key, item in value.items()}
        if not _is_constant(value):
            raise Refusal(f"it returns a {type(value).__name__}")
        return value

    def _check_effects(self) -> None:
        """Refuse what reaches further than to the outputs."""
        returned = {leaf for _, leaf in leaves_of(self.frame.output) if isinstance(leaf, fx.Node)}
        inside = self.inside
        for node in self.inside:
            if node in self.traced.kept and node not in returned:
                raise Refusal(f"{node.name!r} is {self.traced.kept[node]}")
            written = written_by(node, self.traced.module(node))
            if written is not None and written not in inside:
                raise Refusal(f"it writes into its argument, at {node.meta.get('where')}")
            if not isinstance(node.meta.get("val"), Tensor) or node in returned:
                continue
            users = [user for user in node.users if user not in inside and not _is_number(user)]
            if node.op != "get_attr" and users:
                raise Refusal(f"{node.name!r} is used outside of it")


def _sayable(arguments: Any) -> Any:
    """Return arguments with numbers of NumPy as Python's; refuse what no code can name."""
    plain = mapped(arguments, lambda leaf: leaf.item() if isinstance(leaf, np.generic) else leaf)
    for _, leaf in leaves_of(plain):
        if not isinstance(leaf, (fx.Node, *fx.node.base_types, EllipsisType, type(None))):
            raise Refusal(f"it hands on a {type(leaf).__name__}")
    return plain


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float)


def _is_constant(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_constant(v) for k, v in value.items())
    if type(value) in {list, tuple}:
        return all(map(_is_constant, value))
    return value is None or type(value) in {bool, int, float, str}


def _unify_(graph: fx.Graph, other: fx.Graph, *, training: bool = False) -> None:
    """Let a graph stand for another one too, which may differ in flags of the mode if that does."""
    unification = _Unification(graph, other, training)
    nodes, others = list(graph.nodes), list(other.nodes)
    for node, there in zip_longest(nodes, others):
        if node is None or there is None or (node.op, node.target) != (there.op, there.target):
            places = [n and n.meta.get("where") for n in (node, there)]
            raise unification.difference(*places)
    for node, there in zip(nodes, others, strict=True):
        node.args = unification.of(node.args, there.args)
        node.kwargs = unification.of(dict(node.kwargs), there.kwargs)


class _Unification:
    """Finds what arguments of two graphs have in common."""

    def __init__(self, graph: fx.Graph, other: fx.Graph, training: bool) -> None:  # noqa: FBT001
        self.graph = graph
        self.training = training
        self.twin = dict(zip(other.nodes, graph.nodes, strict=False))
        self.flag: list[fx.Node] = []

    def of(self, here: Any, there: Any) -> Any:
        """Return an argument that stands for both."""
        pairs = _paired(here, there)
        if pairs is not None:
            parts = {key: self.of(*pair) for key, pair in pairs.items()}
            if isinstance(here, slice):
                return slice(*parts.values())
            if isinstance(here, Mapping):
                return parts
            return list(parts.values()) if isinstance(here, list) else tuple(parts.values())
        if isinstance(there, fx.Node):
            same = self.twin[there] is here
        else:
            same = type(here) is type(there) and here == there
        return here if same else self._by_mode(here, there)

    def _by_mode(self, here: Any, there: Any) -> Any:
        """Return what is one thing in evaluation, another in training."""
        if self.training and here is False and there is True:
            return _mode(self.graph, self.flag)
        if self.training and here == 0 and type(here) is type(there) is float:
            with self.graph.inserting_after(_mode(self.graph, self.flag)):
                return self.graph.call_function(operator.mul, (self.flag[0], there))
        raise self.difference(here, there)

    def difference(self, here: Any, there: Any) -> Refusal:
        """Return the refusal of what is not the same."""
        mode = " in training mode" if self.training else ""
        return Refusal(f"it differs from call to call{mode} ({here!s:.40} and {there!s:.40})")


def _paired(here: Any, there: Any) -> dict[Any, tuple[Any, Any]] | None:
    """Return the parts of two containers of one form, side by side; None if they are not that."""
    if isinstance(here, slice) and isinstance(there, slice):
        return {end: (getattr(here, end), getattr(there, end)) for end in ("start", "stop", "step")}
    if isinstance(here, Mapping) and isinstance(there, Mapping) and here.keys() == there.keys():
        return {key: (here[key], there[key]) for key in here}
    listed = isinstance(here, list | tuple) and isinstance(there, list | tuple)
    if listed and len(here) == len(there):
        return dict(enumerate(zip(here, there, strict=True)))
    return None


def _mode(graph: fx.Graph, flag: list[fx.Node]) -> fx.Node:
    """Return the node that tells whether the module is in training mode."""
    if not flag:
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            flag.append(graph.create_node("get_attr", "training"))
    return flag[0]
