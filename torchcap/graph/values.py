"""Abstract values: what is known of a tensor's channels while a graph is read.

A :class:`Channels` is a tensor whose channels are followed, a :class:`Heads` one whose channels are
spread over several dimensions, an :class:`Opaque` any other tensor, an :class:`Extent` a size that
follows channels, a :class:`Setting` one that a module holds; everything else is the plain Python
value. A :class:`Call` is one operator with its abstract arguments, as a rule sees it, and an
:class:`Operator` is all that is known of one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from torchcap.graph.channels import ChannelTable, Ids, ProductKey, Share
from torchcap.graph.sizes import Place


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A tensor whose channels are not followed: they never change."""

    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Held(Opaque):
    """A parameter of several dimensions that the forward reads directly (a positional embedding).

    Attributes:
        module: qualified name of its module, ``""`` for the model itself.
        name: of the parameter.
    """

    module: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Weight(Opaque):
    """A tensor of a layer that is handed to a function, which may do what the layer does.

    Attributes:
        module: qualified name of the layer.
        name: of the tensor in it.
    """

    module: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """A tensor whose channels are followed along one dimension.

    Attributes:
        shape: the shape with the example inputs.
        dim: the dimension that holds the channels.
        ids: the identity of each entry along ``dim``, shape ``(shape[dim],)``.
    """

    shape: tuple[int, ...]
    dim: int
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """A tensor whose channels are followed along several dimensions, as attention has them.

    Attributes:
        shape: the shape with the example inputs.
        dims: the dimensions that hold channels, in any order.
        ids: the identity at each place of these dimensions, shape ``(shape[d] for d in dims)``.
        width: which of ``dims`` may become smaller, by its place among them; the others (the heads)
            stay, and all of them keep equally many channels.
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    ids: Ids
    width: int

    @property
    def dim(self) -> int:
        """The dimension that may become smaller."""
        return self.dims[self.width]

    @property
    def rows(self) -> Ids:
        """The identities of each head, ``(heads, channels of one)``."""
        size = self.ids.shape[self.width]
        return np.moveaxis(self.ids, self.width, -1).reshape(-1, size)


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """An integer of the forward that follows a number of channels.

    It is ``len(ids) * times / parts``.

    Attributes:
        ids: the identities of the channels.
        parts: what their number is divided by.
        times: what it is multiplied with.
    """

    ids: Ids
    parts: int = 1
    times: int = 1

    @property
    def number(self) -> int:
        """The integer, with the example inputs."""
        return len(self.ids) * self.times // self.parts

    def scaled(self, times: int, parts: int = 1) -> Extent:
        """Return it multiplied with one integer and divided by another."""
        share = Fraction(self.times * times, self.parts * parts)
        return Extent(self.ids, share.denominator, share.numerator)

    def joined(self, other: Extent) -> Extent:
        """Return the sum with another one that is a plain number of channels too."""
        return Extent(np.concatenate([self.ids.ravel(), other.ids.ravel()]))

    @property
    def share(self) -> Share:
        """The channels, and what their number is multiplied with."""
        return self.ids.ravel(), Fraction(self.times, self.parts)


class Setting(int):
    """An integer that the forward has from attributes of modules (``self.head_dim``).

    Attributes:
        places: of the attributes that it is the product of.
        times: its other factor, a constant.
    """

    places: tuple[Place, ...]
    times: int

    @classmethod
    def of(cls, value: int, places: tuple[Place, ...], times: int = 1) -> Setting:
        """Make one."""
        setting = cls(value)
        setting.places, setting.times = places, times
        return setting


@dataclass(frozen=True, slots=True, eq=False)
class Root:
    """The root of a size, or one by it: what attention divides its scores by.

    Attributes:
        size: that follows channels, or that a module holds.
        power: 0.5 or -0.5.
    """

    size: Extent | Setting
    power: float

    @property
    def number(self) -> float:
        """The number, with the example inputs."""
        whole = self.size.number if isinstance(self.size, Extent) else int(self.size)
        return float(whole**self.power)


@dataclass(frozen=True, slots=True, eq=False)
class Scores(Opaque):
    """The products of queries and keys.

    Attributes:
        key: what the table calls the product.
        rows: the channels of the queries, ``(heads, channels of one)``.
        writer: the layer that has written them; None if it is not known.
    """

    key: ProductKey
    rows: Ids
    writer: str | None


Value = Any
Rule = Callable[["Call"], Value]
Kind = Literal[
    "convolution", "transposed convolution", "linear", "layers", "batch norm", "norm", "pointwise",
    "unchanged", "sum", "difference", "product", "move", "chunk", "split", "other",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operator:
    """What is known of one operator: the one record that everybody asks.

    Attributes:
        channels: the rule for tensors whose channels are followed along one dimension, or not.
        heads: the rule where channels of an argument are spread over several dimensions, as
            attention has them; None where nothing is known of that, so that the channels stay.
        kind: what sort of operator it is. Features are compared behind a ``"sum"``, once it has
            passed what is ``"pointwise"`` or ``"unchanged"``; a ``"batch norm"`` folds into a
            ``"convolution"`` or a ``"linear"`` layer before it; a ``"move"`` leaves all entries as
            they are.
        knows: what the rules expect among the arguments besides tensors and plain numbers:
            :class:`Extent`, :class:`Setting` or :class:`Held`. Where it finds another of these,
            the reading gives up in place of the rule.
    """

    channels: Rule
    heads: Rule | None = None
    kind: Kind = "other"
    knows: frozenset[type] = frozenset()


def as_operator(rule: Operator | Rule) -> Operator:
    """Return the record of a rule that a user gives by itself."""
    return rule if isinstance(rule, Operator) else Operator(rule)


def flat(value: Value) -> Iterator[Value]:
    """Iterate over the leaves of a nested value."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from flat(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from flat(item)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def followed_ids(value: Value) -> Ids | None:
    """Return the channels that a value holds or counts; None if it does not follow any."""
    if isinstance(value, Channels | Heads | Extent):
        return value.ids
    return followed_ids(value.size) if isinstance(value, Root) else None


def opaque(result: Any) -> Value:
    """Return the opaque counterpart of a concrete (fake) result."""
    if isinstance(result, Tensor):
        return Opaque(tuple(result.shape))
    if isinstance(result, Mapping):
        return {key: opaque(item) for key, item in result.items()}
    if isinstance(result, tuple | list):
        return tuple(opaque(item) for item in result)
    return result


@dataclass(slots=True)
class Call:
    """One operator of the graph, as its rule sees it.

    Attributes:
        node: the FX node.
        args, kwargs: abstract values of the arguments.
        result: the concrete result on the example inputs (fake tensors).
        module, path: the module that is called and its qualified name, for a module call.
        table: where channels are joined, fixed and restricted.
        operator_of: finds the operator of a module, for layers that hold others inside.
        kind_of: tells the kind of the operator at another node.
        module_of: finds the module that another node calls.
        layer_at: finds the module of a qualified name.
        folds: qualified names of the normalisations that will be folded into the layer before.
        streams: whether channels that are joined by a skip addition may be dropped.
        values: what is known of the nodes before this one.
    """

    node: fx.Node
    args: tuple[Value, ...]
    kwargs: Mapping[str, Value]
    result: Any
    module: nn.Module | None
    path: str
    table: ChannelTable
    operator_of: Callable[..., Operator | None]
    kind_of: Callable[[fx.Node], Kind | None]
    module_of: Callable[[fx.Node], nn.Module | None]
    layer_at: Callable[[str], nn.Module]
    folds: Container[str] = ()
    streams: bool = False
    values: Mapping[fx.Node, Value] = field(default_factory=dict)

    @property
    def folded(self) -> bool:
        """Whether this is a normalisation that will be folded into the layer before it."""
        return self.path in self.folds

    @property
    def label(self) -> str:
        """How messages name this operator."""
        target = self.path if self.module is not None else _function_name(self.node.target)
        return (
            f"{target!r}" if self.module is None else f"{target!r} ({type(self.module).__name__})"
        )

    @property
    def unexpected(self) -> str:
        """The reason of a rule that finds arguments which it was not made for."""
        return f"{self.label} has arguments that its rule does not know"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(self.result.shape)

    def argument(self, index: int, name: str, default: Value = None) -> Value:
        """Return an argument by position or name, or by NumPy's name for it."""
        if index < len(self.args):
            return self.args[index]
        numpy_name = {"dim": "axis", "keepdim": "keepdims", "input": "x"}.get(name, name)
        return self.kwargs.get(name, self.kwargs.get(numpy_name, default))

    def followed(self) -> list[Channels]:
        """Return the tensors among the arguments whose channels are followed."""
        return [v for v in flat((self.args, self.kwargs)) if isinstance(v, Channels)]

    def has_heads(self) -> bool:
        """Whether channels of an argument are spread over several dimensions."""
        return any(isinstance(v, Heads) for v in flat((self.args, self.kwargs)))

    def restrict_sum(self, left: Ids, right: Ids) -> None:
        """Note that two tensors are added up; channels that go past a layer stay, or are a choice.

        A sum is a *skip* if what one of the two holds has been there on the way to the other: the
        stream of a residual network. Any other sum, of parallel branches, mixes no channels.
        """
        if np.array_equal(left, right) or not self._is_skip():
            return
        restrict = self.table.select if self.streams else self.table.fix
        restrict(left, self.at("residual stream: joined"))

    def _is_skip(self) -> bool:
        nodes = self.node.all_input_nodes
        held = [(node, self.values.get(node)) for node in nodes]
        return any(
            self._passed(other, value.ids)
            for node, value in held
            for other in nodes
            if other is not node and isinstance(value, Channels | Heads)
        )

    def _passed(self, node: fx.Node, ids: Ids) -> bool:
        """Whether some of these channels have been met on the way to a node."""
        waiting, seen = [node], {node}
        wanted = set(ids.ravel().tolist())
        tried: set[int] = set()  # most operators hand on the very array that they are given
        while waiting:
            for before in waiting.pop().all_input_nodes:
                if before in seen:
                    continue
                value = self.values.get(before)
                if isinstance(value, Channels | Heads) and id(value.ids) not in tried:
                    if not wanted.isdisjoint(value.ids.ravel().tolist()):
                        return True
                    tried.add(id(value.ids))
                seen.add(before)
                waiting.append(before)
        return False

    def like(self, x: Channels, dim: int | None = None) -> Channels:
        """Return the result as a tensor with the channels of ``x``."""
        return Channels(self.shape, x.dim if dim is None else dim, x.ids)

    @property
    def where(self) -> str:
        """Where the operator stands in the user's code; else its name in the graph."""
        place = self.node.meta.get("where")
        return repr(self.node.name) if place is None else str(place)

    def at(self, reason: str) -> str:
        """Return a reason, with the place."""
        return f"{reason}, at {self.where}"

    def select(self, ids: Ids, reason: str) -> None:
        """Note that channels are told apart here, so that they may be dropped but not mixed."""
        self.table.select(ids, self.at(reason))

    def fix(self, ids: Ids, reason: str) -> None:
        """Note that channels must stay as they are because of what happens here."""
        self.table.fix(ids, self.at(reason))

    def agree(self, left: Extent, right: Extent) -> None:
        """Note that two sizes must stay equal."""
        reason = self.at("its number of channels must stay equal to another one")
        self.table.agree(left.share, right.share, reason)

    def number(self, position: int, ids: Ids) -> None:
        """Note that a new dimension, or a piece, is as large as there are channels."""
        self.table.numbers.append((self.node, position, ids))

    def give_up(self, reason: str, *, number: bool = False) -> Value:
        """Fix every channel that enters this operator or its module; return an opaque result.

        Args:
            reason: why.
            number: whether it is a number in the code.
        """
        reason = self.at(reason)
        if number:
            self.table.by_numbers.add(reason)
        if self.module is not None:
            self.table.abandoned.setdefault(self.path, reason)
        for value in flat((self.args, self.kwargs)):
            if isinstance(value, Weight):
                self.table.abandoned.setdefault(value.module, reason)
            ids = followed_ids(value)
            if ids is not None:
                self.table.fix(ids, reason)
        return opaque(self.result)

    def inside(self, name: str, x: Value, shape: tuple[int, ...]) -> Value:
        """Apply the rule of a module that this one holds and calls.

        Args:
            name: its name in this module.
            x: its input.
            shape: the shape of its result.
        """
        module = getattr(self.module, name)
        result = torch.empty(shape, device="meta")
        path = f"{self.path}.{name}"
        call = replace(self, args=(x,), kwargs={}, result=result, module=module, path=path)
        operator = self.operator_of(module)
        if operator is None:
            return call.give_up(f"no rule for {call.label}")
        return operator.channels(call)

    def has(self, name: str) -> bool:
        """Whether the module has a tensor of this name."""
        return isinstance(getattr(self.module, name, None), Tensor)

    def plain(self, *names: str) -> bool:
        """Whether the named tensors are ordinary parameters or buffers of the module, or absent."""
        module = self.module
        if module is None or parametrize.is_parametrized(module):
            return False
        held = {**module._parameters, **module._buffers}
        return all(getattr(module, n, None) is None or held.get(n) is not None for n in names)


def _function_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
