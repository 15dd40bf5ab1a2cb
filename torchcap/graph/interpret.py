"""Interpretation: operator rules walk over a model's graphs and collect its channel spaces."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from torchcap.graph.channels import ChannelTable, Ids
from torchcap.graph.escapes import Silent
from torchcap.graph.findings import (
    counted,
    dot_products_of,
    scaled_rows,
    spaces_of,
    taps_of,
)
from torchcap.graph.folds import find_folds
from torchcap.graph.heads import collapsed
from torchcap.graph.kinds import NOTHING_ASKED, Asked
from torchcap.graph.numbers import arithmetic, pin_settings
from torchcap.graph.rules import (
    COUNTED,
    LAYER_FUNCTIONS,
    LAYERS,
    Target,
    find_module_operator,
    find_operator,
)
from torchcap.graph.sizes import Place
from torchcap.graph.spaces import ChannelSpace, HeldSize, LayerCall, SpaceGraph
from torchcap.graph.taps import find_sights
from torchcap.graph.trace import Traced, Tracing, holds
from torchcap.graph.values import (
    Call,
    Channels,
    Extent,
    Heads,
    Held,
    Kind,
    Opaque,
    Operator,
    Root,
    Setting,
    Value,
    Weight,
    flat,
    followed_ids,
    opaque,
)
from torchcap.graph.weights import layer_calls, output_axis
from torchcap.nests import step_into, tensors_in


class Interpretation:
    """The work of one ``analyze()``."""

    def __init__(
        self,
        model: nn.Module,
        tracing: Tracing,
        operators: Mapping[Target, Operator],
        *,
        streams: bool,
        hidden: Collection[Silent] = (),
        unread_sides: Collection[str] = (),
        asked: Asked = NOTHING_ASKED,
        across: frozenset[str] = frozenset(),
    ) -> None:
        self.model = model
        self.tracing = tracing
        self.readings = tracing.graphs
        self.operators = operators
        self.streams = streams
        self.hidden, self.unread_sides, self.asked = hidden, unread_sides, asked
        self.table = ChannelTable(across=across)
        self.shared = self._shared_modules()
        self.read_outside = self._modules_read_outside()
        self.direct: set[tuple[str, str, int]] = set()
        self.astray: set[tuple[str, str]] = set()
        entangled = {*self.shared, *self.read_outside, *asked.layers}
        seen = {place.module for place, by in tracing.reads.items() if by - {place.module}}
        seen |= asked.norms
        self.folds = find_folds(self.readings, entangled, seen, operators)
        self.folded = {fold.norm for fold in self.folds if fold.norm is not None}
        self.notes: Counter[str] = Counter()
        self.values: dict[fx.Node, Value] = {}
        self.bound: list[tuple[Place, Ids]] = []

    def graph(self) -> SpaceGraph:
        """Read the graphs and return the spaces."""
        for reading in self.readings:
            self.table.begin()
            for node in reading.graph.nodes:
                self.values[node] = self._visit(reading, node)
            self._fix_kept(reading)
        self._list_all_layers()
        self.table.compare_scales()
        self._fix_hidden()
        self._fix_entangled()
        self._fix_auxiliary_layers()
        bound, scalings = self._bound_sizes(), self.table.scalings()
        self._fix_widths_looked_at(bound)
        self.bound = list(bound.items())
        sights = [
            sight
            for reading in self.tracing.evaluations
            for sight in find_sights(reading, self.values, self.operators)
        ]
        # Of all heads one tells how many channels each of them has.
        heads = [rows[0] for rows in (*bound.values(), *(scaling.ids for scaling in scalings))]
        heads += self.table.beside.values()
        resolved = self.table.resolve([*(sight.value.ids for sight in sights), *heads])
        layouts, head_layouts = resolved.layouts[: len(sights)], resolved.layouts[len(sights) :]
        spaces, names = spaces_of(self.table, resolved)
        counts = [
            counted(len(ids), layout, names)
            for ids, layout in zip(heads, head_layouts, strict=True)
        ]
        sizes = [HeldSize(place, count) for place, count in zip(bound, counts, strict=False)]
        scaled = [
            scaled_rows(self.table, scaling, count)
            for scaling, count in zip(scalings, counts[len(bound) :], strict=False)
        ]
        beside = dict(zip(self.table.beside, counts[len(bound) + len(scalings) :], strict=True))
        return SpaceGraph(
            model=type(self.model).__name__,
            spaces=tuple(sorted(spaces, key=self._place_in_forward())),
            tensors={name: tuple(p.shape) for name, p in self.model.named_parameters()},
            calls=tuple(replace(c, beside=beside.get(c.module)) for c in self._calls()),
            folds=self.folds,
            taps=tuple(taps_of(sights, layouts, names, spaces)),
            notes=tuple(self._all_notes()),
            products=tuple(dot_products_of(self.table, resolved, names)),
            sizes=tuple(sizes),
            scaled=tuple(scaled),
            read=frozenset(self.tracing.reads),
            written=frozenset(name for reading in self.readings for name in reading.written()),
        )

    def _all_notes(self) -> Iterator[str]:
        for path, why in self.tracing.unread.items():
            name = f"the forward of {path!r}" if path else f"the forward of {self.kind}"
            yield f"{name} is read in pieces: {why}"
        for name, count in self.notes.items():
            yield f"no rule for {name} ({count} {'uses' if count > 1 else 'use'})"
        for place in self.unread_sides:
            yield f"the forward branches on sizes at {place}; only the side taken here is read"

    def _place_in_forward(self) -> Callable[[ChannelSpace], int]:
        """Return what sorts spaces by the first call of their first producer."""
        order = {path: i for i, path in enumerate(dict.fromkeys(r.path for r in self.tracing.ran))}
        return lambda space: order.get(space.producers[0].module, len(order))

    @property
    def kind(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__

    # ----------------------------------------------------------------------------------------------
    # Walking the graph

    def _visit(self, reading: Traced, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return opaque(node.meta.get("val"))
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "output":
            return self._fix_outputs(reading, node)
        if "place" in node.meta:  # an entry of a list of sizes
            return Setting.of(node.meta["val"], (node.meta["place"],))
        return self._apply(reading, node)

    def _fix_outputs(self, reading: Traced, node: fx.Node) -> None:
        reason = "output of the model"
        if reading.piece:
            reason = f"leaves {reading.piece!r}, and where to is not read ({self._around(reading)})"
        for value in flat(_mapped(node.args, self.values)):
            self._fix(value, reason)

    def _around(self, reading: Traced) -> str:
        """Return why what stands around a piece is not read."""
        outer = [path for path in reading.unread if holds(path, reading.piece)]
        path = max(outer, key=len)
        return f"{path or self.kind!r}: {reading.unread[path]}"

    def _fix_kept(self, reading: Traced) -> None:
        for node, reason in reading.kept.items():
            for value in flat(self.values[node]):
                self._fix(value, reason)

    def _fix(self, value: Value, reason: str) -> None:
        ids = followed_ids(value)
        if ids is not None:
            self.table.fix(ids, reason)
        if isinstance(value, Held):
            self.astray.add((value.module, value.name))

    def _apply(self, reading: Traced, node: fx.Node) -> Value:
        call = self._call(reading, node)
        values = list(flat((call.args, call.kwargs)))
        plain = not any(isinstance(v, Opaque | Channels | Heads) for v in values)
        if plain and call.module is None and not any(True for _ in tensors_in(call.result)):
            return arithmetic(call)
        operator = find_operator(node, call.module, self.operators)
        return self._follow(reading, call, operator, values)

    def _follow(
        self, reading: Traced, call: Call, operator: Operator | None, values: list[Value]
    ) -> Value:
        """Let the rule of an operator follow the channels, where it knows these values."""
        knows = frozenset() if operator is None else operator.knows
        if Setting not in knows and Root not in knows:
            pin_settings(call)
        if Held not in knows:
            self.astray |= {(v.module, v.name) for v in values if isinstance(v, Held)}
        if operator is None:
            if call.path in reading.unread:  # what it holds is read piece by piece
                return replace(call, module=None).give_up(f"no rule for {call.label}")
            return self._boundary(call)
        if call.has_heads() and operator.heads is None:
            call = replace(call, args=collapsed(call, call.args), kwargs=dict(call.kwargs))
            if call.has_heads():
                return call.give_up(f"no rule for heads in {call.label}")
        if Root not in knows and any(isinstance(v, Root) for v in values):
            call = replace(call, args=_numbers(call.args), kwargs=_numbers(call.kwargs))
        sizes = [v for v in values if isinstance(v, Extent | Root) and followed_ids(v) is not None]
        if any(type(v) not in knows for v in sizes):
            return call.give_up(f"its number of channels is used in {call.label}")
        return self._obey(operator, call)

    def _obey(self, operator: Operator, call: Call) -> Value:
        """Return what the rule of an operator says."""
        rule = operator.channels
        if call.has_heads() and operator.heads is not None:
            rule = operator.heads
        try:
            value = rule(call)
            if value is None and call.result is not None:
                return call.give_up(f"the rule of {call.label} returns None")
            return value if _consistent(value, call.result) else call.give_up(call.unexpected)
        except Exception as error:  # a rule that fails is a boundary, not a crash
            self.notes[f"{call.label} (its rule failed: {error})"] += 1
            return call.give_up(f"the rule of {call.label} failed")

    def _call(self, reading: Traced, node: fx.Node) -> Call:
        return Call(
            node=node,
            args=_mapped(node.args, self.values),
            kwargs=_mapped(node.kwargs, self.values),
            result=node.meta.get("val"),
            module=reading.module(node),
            path=str(node.target) if node.op == "call_module" else "",
            table=self.table,
            operator_of=partial(find_module_operator, operators=self.operators),
            kind_of=lambda other: self._kind_of(reading, other),
            module_of=reading.module,
            layer_at=self.model.get_submodule,
            folds=self.folded,
            streams=self.streams,
            values=self.values,
        )

    def _kind_of(self, reading: Traced, node: fx.Node) -> Kind | None:
        found = find_operator(node, reading.module(node), self.operators)
        return None if found is None else found.kind

    def _boundary(self, call: Call) -> Value:
        values = list(flat((call.args, call.kwargs)))
        if any(isinstance(v, Extent | Root) for v in values):
            return call.give_up(f"its number of channels is computed with, in {call.label}")
        if any(isinstance(v, Channels | Heads) for v in values):
            self.notes[call.label] += 1
        return call.give_up(f"no rule for {call.label}")

    def _attribute(self, node: fx.Node) -> Value:
        """Follow a parameter that acts on channels directly (layer scale, positions)."""
        if "place" in node.meta:
            return Setting.of(node.meta["val"], (node.meta["place"],))
        path, _, name = str(node.target).rpartition(".")
        try:
            owner = self.model.get_submodule(path)
        except AttributeError:  # a constant that tracing has put into the graph
            return opaque(node.meta.get("val"))
        held = {**owner._parameters, **owner._buffers}.get(name)
        if held is None:
            return opaque(node.meta.get("val"))
        shape = tuple(held.shape)
        if self._is_handed_on(node, owner):
            return Weight(shape, path, name)
        return self._direct(owner, path, name, shape) or opaque(node.meta.get("val"))

    def _direct(
        self, owner: nn.Module, path: str, name: str, shape: tuple[int, ...]
    ) -> Value | None:
        """Return what the channels of a tensor are that a forward uses itself."""
        wide = [dim for dim, size in enumerate(shape) if size > 1]
        if not wide:
            return None
        if len(wide) > 1 and find_module_operator(owner, self.operators) is not None:
            return None
        self.direct |= {(path, name, dim) for dim in wide}
        if len(wide) > 1:
            return Held(shape, path, name)
        ids = self.table.axis(path, [(name, wide[0])], "carrier", shape[wide[0]])
        return Channels(shape, wide[0], ids)

    # ----------------------------------------------------------------------------------------------
    # What no operator shows

    def _shared_modules(self) -> dict[str, str]:
        """Return the modules that share a tensor with another one, with the reason."""
        owners: dict[int, list[tuple[str, str]]] = {}
        for path, module in self.model.named_modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append((path, name))
        reasons: dict[str, str] = {}
        for places in owners.values():
            for path, name in places if len(places) > 1 else ():
                reasons[path] = f"{path}.{name} is shared with another layer"
        return reasons

    def _modules_read_outside(self) -> dict[str, str]:
        """Return the modules that own a tensor which the forward reads directly, or goes past."""
        return {
            **self.tracing.past,
            **{
                str(node.target).rpartition(".")[0]: f"{node.target} is read outside of its layer"
                for reading in self.readings
                for node in reading.graph.find_nodes(op="get_attr")
                if not self._is_known(reading, node)
            },
        }

    def _is_known(self, reading: Traced, node: fx.Node) -> bool:
        """Whether what is read is no tensor of a layer, or one that a function is given."""
        if "place" in node.meta or node.target in reading.constants or not node.users:
            return True
        owner = self.model.get_submodule(str(node.target).rpartition(".")[0])
        return self._is_handed_on(node, owner)

    def _is_handed_on(self, node: fx.Node, owner: nn.Module) -> bool:
        """Whether a layer's tensor is read by functions alone that do what a layer does."""
        others = [user for user in node.users if not _reads_kernel(user)]
        users = [user for user in others if user.target in LAYER_FUNCTIONS]
        known = find_module_operator(owner, self.operators, patched=True) is not None
        return len(users) == len(others) > 0 and known

    def _list_all_layers(self) -> None:
        """Give every layer its axes, those too that no graph has led to, with the reason."""
        listed = {a.module for a in self.table.axes.values() if a.role == "producer"}
        listed |= {key[0] for key, a in self.table.axes.items() if key[1] == "weight"}
        for path, layer in self.model.named_modules():
            weight = getattr(layer, "weight", None)
            if not isinstance(layer, LAYERS) or path in listed or weight is None:
                continue
            axis = output_axis(layer)
            ids = self.table.axis(path, [("weight", axis)], "producer", weight.shape[axis])
            self.table.fix(ids, self.table.abandoned.get(path) or self._why_unlisted(path))

    def _why_unlisted(self, path: str) -> str:
        for outer in reversed([p for p, _ in self.model.named_modules() if p and holds(p, path)]):
            if outer in self.table.abandoned:
                return self.table.abandoned[outer]
        for reading in self.readings:
            for node in reading.graph.find_nodes(op="get_attr", target=f"{path}.weight"):
                for user in node.users:
                    return f"its weight is computed with, at {user.meta.get('where')}"
        if any(run.path == path for run in self.tracing.ran):
            return "its call is a part of an operator that is not read"
        return "the forward does not call it on the example inputs"

    def _fix_entangled(self) -> None:
        """Fix the layers that have another owner, name or reader, or a call without a rule."""
        for key, axis in self.table.axes.items():
            reason = self.shared.get(axis.module)
            reason = reason or self.asked.layers.get(axis.module)
            if key not in self.direct:  # what is only read directly has no layer to disagree with
                reason = reason or self.read_outside.get(axis.module)
            for path, why in self.table.abandoned.items():
                if axis.module == path or axis.module.startswith(f"{path}."):
                    reason = reason or why
            if key[:2] in self.astray:
                reason = reason or f"{'.'.join(filter(None, key[:2]))} is used in other ways too"
            if reason is not None:
                self.table.fix(axis.ids, reason)

    def _fix_auxiliary_layers(self) -> None:
        """Fix what auxiliary heads write: evaluation never runs them, so nothing is gained."""
        called = {run.path for run in self.tracing.ran}
        for axis in self.table.axes.values():
            if axis.role == "producer" and axis.module not in called:
                self.table.fix(axis.ids, f"{axis.module!r} runs in training mode only")

    # ----------------------------------------------------------------------------------------------
    # What follows the number of channels

    def _bound_sizes(self) -> dict[Place, Ids]:
        """Return the attributes that count channels, with the channels of each that they count.

        An attribute that is used in another way as well cannot follow, so what it counts stays.
        """
        unread = set(self.tracing.unread)
        unseen = {place.path for place, by in self.tracing.reads.items() if by & unread}
        pinned = self.table.pinned | {
            place for places, _ in self.table.bound for place in places if place.path in unseen
        }
        bound: dict[Place, list[Ids]] = {}
        stuck = [True]
        waiting = self.table.bound
        while any(stuck):
            free = [[p for p in places if p not in pinned] for places, _ in waiting]
            alone = {places[0] for places in free if len(places) == 1}
            for places in free:  # ratio * key_dim follows key_dim, if that counts channels itself
                if len(alone.intersection(places)) == 1 < len(places):
                    pinned.update(p for p in places if p not in alone)
                    places[:] = alone.intersection(places)
            stuck = [self.tracing.alone or len(places) != 1 for places in free]
            for counting, rows in compress(waiting, stuck):  # what they count stays: they stay
                names = " * ".join(map(str, counting))
                reason = f"counted by {names}, which is used in other ways too"
                self.table.fix(rows, reason)
                self.table.by_numbers.add(reason)
                pinned.update(counting)
            waiting = [entry for entry, why in zip(waiting, stuck, strict=True) if not why]
        for counting, rows in waiting:
            (place,) = (p for p in counting if p not in pinned)
            bound.setdefault(place, []).append(rows.reshape(-1, place.get(self.model)))
        found = {place: np.unique(np.concatenate(rows), axis=0) for place, rows in bound.items()}
        for place, rows in found.items():
            self.table.balance(rows, f"does not fall evenly into {place}", held=True)
        return found

    def _calls(self) -> Iterator[LayerCall]:
        for run in self.tracing.ran:
            module = self.model.get_submodule(run.path)
            if isinstance(module, COUNTED):
                yield from layer_calls(run.path, module, run.args, run.kwargs, run.output)

    def _fix_widths_looked_at(self, bound: Collection[Place]) -> None:
        """Fix the layers whose numbers of channels are read, and used otherwise.

        A layer with a forward of its own may hand them on to the functions of layers, and compare
        them with sizes.
        """
        for place in self.tracing.reads:
            module = self.model.get_submodule(place.module)
            layer = find_module_operator(module, self.operators, patched=True) is not None
            if place.name not in _WIDTHS or place in bound or not layer:
                continue
            if not self._is_layer(module) and self._is_only_compared(place):
                continue
            for axis in self.table.axes.values():
                if axis.module == place.module:
                    self.table.fix(axis.ids, f"{place} is read, and computed with")

    def _is_only_compared(self, place: Place) -> bool:
        """Whether an attribute is read, and goes to functions of layers and comparisons alone."""
        nodes = [
            node
            for reading in self.readings
            for node in reading.graph.find_nodes(op="get_attr")
            if (read := node.meta.get("place")) is not None
            and (read.module, read.name) == (place.module, place.name)
        ]
        return bool(nodes) and all(map(_is_only_compared, nodes))

    def _is_layer(self, module: nn.Module) -> bool:
        return find_module_operator(module, self.operators) is not None

    # ----------------------------------------------------------------------------------------------
    # Sizes of which C may have made something

    def branches(self) -> list[str]:
        """Return the places where sizes that are no numbers of channels are compared.

        Those are left out where comparisons of a module have come out in both ways.
        """
        found: dict[tuple[str, str], set[bool]] = {}
        for reading in self.tracing.evaluations:
            for node in reading.graph.nodes:
                if not node.meta.get("branch") or not isinstance(node.meta["val"], bool):
                    continue
                operands = list(flat(_mapped(node.args, self.values)))
                if any(map(_counts_channels, operands)) or not _measured(node):
                    continue
                key = str(node.meta["where"]), node.meta.get("path", "")
                found.setdefault(key, set()).add(node.meta["val"])
        return list(dict.fromkeys(place for (place, _), seen in found.items() if len(seen) == 1))

    def silent_sizes(self) -> list[Silent]:
        """Return the sizes that follow channels, about each of which C may be told a lie."""
        found = [
            Silent(("attribute", str(place)), str(place), place.name, ids[0], place)
            for place, ids in self.bound
            if place.new is None
        ]
        for dimension in self.tracing.dimensions:
            value = self.values.get(dimension.entry.node)
            for key in dimension.entry.path:
                value = step_into(value, key) if isinstance(value, tuple | list | dict) else None
            if not isinstance(value, Channels | Heads):
                continue
            if dimension.dim is None or dimension.dim % len(value.shape) == value.dim:
                where = str(dimension.where)
                found.append(Silent(dimension.key, where, where, value.ids.ravel()))
        return found

    def _fix_hidden(self) -> None:
        for silent in self.hidden:
            if silent.place is not None:
                self.table.pin((silent.place,))
                continue
            reason = (
                f"its number of channels is read by Python ({silent.name}), and used in ways that "
                "leave no trace (range, int, len, a key)"
            )
            self.table.fix(silent.ids, reason)
            self.table.by_numbers.add(reason)


def _reads_kernel(node: fx.Node) -> bool:
    """Whether a node reads how large the kernel of a weight is: channels don't lie there."""
    return (
        node.target == "size"
        and len(node.args) == 2
        and type(node.args[1]) is int
        and node.args[1] >= 2
    )


_WIDTHS = frozenset(
    {
        "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features",
        "num_channels", "num_groups", "num_parameters", "normalized_shape",
    }
)  # fmt: skip
"""Attributes of layers that change with their channels."""


def _numbers(value: Value) -> Any:
    """Return nested values with the number in the place of a root of what a module holds."""
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_numbers, value))
    return value.number if isinstance(value, Root) and followed_ids(value) is None else value


def _is_only_compared(node: fx.Node) -> bool:
    """Whether a number, or a row of them, goes to functions of layers and comparisons alone."""
    return all(
        user.target in LAYER_FUNCTIONS
        or user.meta.get("branch")
        or (user.target is operator.getitem and _is_only_compared(user))
        for user in node.users
    )


def _counts_channels(value: Value) -> bool:
    """Whether a value follows channels, and is no number of entries, which positions change too."""
    size = value.size if isinstance(value, Root) else value
    return followed_ids(value) is not None and not (isinstance(size, Extent) and size.times > 1)


def _measured(node: fx.Node) -> bool:
    """Whether a number has been computed from the sizes of tensors."""
    inputs = node.all_input_nodes
    tensors = any(isinstance(n.meta.get("val"), Tensor) for n in inputs)
    return tensors or any(_measured(n) for n in inputs)


def _consistent(value: Value, result: Any) -> bool:
    """Whether what a rule says of a result fits its shape: a last guard against a wrong rule."""
    if isinstance(value, Heads):
        fits = isinstance(result, Tensor) and value.shape == tuple(result.shape)
        return fits and tuple(value.shape[d] for d in value.dims) == value.ids.shape
    if isinstance(value, Channels):
        fits = isinstance(result, Tensor) and value.shape == tuple(result.shape)
        return fits and value.shape[value.dim] == len(value.ids)
    if isinstance(value, tuple) and isinstance(result, tuple | list):
        return len(value) == len(result) and all(map(_consistent, value, result))
    return True


def _mapped(value: Any, values: Mapping[fx.Node, Value]) -> Any:
    """Replace the nodes in an argument by their values, slices and mappings included."""
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, Mapping):
        return {key: _mapped(item, values) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_mapped(item, values) for item in value)
    if isinstance(value, slice):
        return slice(*(_mapped(v, values) for v in (value.start, value.stop, value.step)))
    return value
