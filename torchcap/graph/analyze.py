"""``analyze()``: run the operator rules over a model's graphs and collect its channel spaces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from torchcap.errors import ModelError, TraceError
from torchcap.graph.channels import ChannelTable, Ids
from torchcap.graph.escapes import escaped_sizes
from torchcap.graph.findings import (
    counted,
    dot_products_of,
    scaled_rows,
    spaces_of,
    taps_of,
)
from torchcap.graph.folds import find_folds
from torchcap.graph.heads import item, pin_sizes, reshaping
from torchcap.graph.inputs import ExampleInputs
from torchcap.graph.rules import (
    BINDS_SIZES,
    COUNTED,
    READS_HELD,
    READS_SIZES,
    RULES,
    RULES_ON_HEADS,
    Target,
    find_module_rule,
    find_rule,
)
from torchcap.graph.sizes import Place
from torchcap.graph.spaces import (
    HeldSize,
    LayerCall,
    SpaceGraph,
)
from torchcap.graph.taps import find_sights
from torchcap.graph.trace import LeafRule, Traced, Tracing, trace
from torchcap.graph.values import Call, Channels, Extent, Heads, Held, Rule, Value, flat, opaque
from torchcap.graph.weights import layer_calls


def analyze(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Mapping[Target, Rule] | None = None,
    streams: bool = False,
) -> SpaceGraph:
    """Read a model and return its channel spaces. The model is not changed, nor its mode.

    Args:
        model: any module, in training or evaluation mode, on any device (``meta`` too); a
            ``GraphModule`` is read as it stands.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. May be left out for timm models with a ``pretrained_cfg`` and for
            torchvision's models.
        leaves: module classes that are read as one operator; without a rule of their own they
            are boundaries.
        rules: operator rules that are asked before the table of torchcap: a module class, a
            function or a method name, to a function ``rule(call) -> value``.
        streams: whether residual streams, joined by skip additions, are spaces too; channels of
            theirs can be dropped, not mixed. The paper leaves them as they are.

    Returns:
        The spaces, each with its ports and its freedom, and a reason where it is not free.

    Raises:
        TraceError: if the forward cannot be traced.
        ExampleInputsError: if the example inputs are missing or do not fit.
        ModelError: if the model is no ``nn.Module`` that can be read (a ``ScriptModule``).

    Examples:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> graph = analyze(net, torch.zeros(1, 3, 16, 16))
        >>> [(space.name, space.channels, space.freedom) for space in graph.spaces]
        [('0', 8, 'stiefel'), ('2', 4, 'fixed')]

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.5 (what residual networks
        leave fixed).
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__!r} cannot be read: a torch.nn.Module was expected, not a "
            "scripted or frozen one; pass the module that it was made from"
        )
    table = {**RULES, **(rules or {})}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{path!r} is scripted and cannot be read; use what it was made from")
    is_leaf = leaf_rule(leaves, rules)
    tracing = trace(model, example_inputs, is_leaf=is_leaf)
    reading = _Reading(model, tracing, table, streams=streams)
    graph = reading.graph()
    places = [held.place for held in graph.sizes]
    escaped = escaped_sizes(model, tracing.graphs, places, is_leaf) if places else set()
    if escaped:
        reading = _Reading(model, tracing, table, streams=streams)
        reading.table.pinned |= escaped
        graph = reading.graph()
    return graph


@dataclass(frozen=True, slots=True)
class Reader:
    """How models are read: what the user said of it, handed on together."""

    leaves: Sequence[type[nn.Module]] = ()
    rules: Mapping[Target, Rule] | None = None
    streams: bool = False

    def __call__(self, model: nn.Module, example_inputs: ExampleInputs | None) -> SpaceGraph:
        """Return the spaces of a model; see :func:`analyze`."""
        return analyze(
            model, example_inputs, leaves=self.leaves, rules=self.rules, streams=self.streams
        )

    def trace(self, model: nn.Module, example_inputs: ExampleInputs) -> Traced:
        """Return the evaluation graph of a whole model.

        Raises:
            TraceError: if only pieces of it can be traced.
        """
        whole = trace(model, example_inputs, is_leaf=leaf_rule(self.leaves, self.rules)).whole
        if whole is None:
            raise TraceError(
                f"only pieces of {type(model).__name__!r} can be traced, and closed forms need its "
                "whole graph; start from the weights alone: recipe=Recipe(start=LargestNorm())"
            )
        return whole


def leaf_rule(
    leaves: Sequence[type[nn.Module]] = (), rules: Mapping[Target, Rule] | None = None
) -> LeafRule:
    """Return which modules are read as one operator: the user's leaves, and what has a rule."""
    table = {**RULES, **(rules or {})}

    def is_leaf(module: nn.Module) -> bool:
        if isinstance(module, tuple(leaves)) or parametrize.is_parametrized(module):
            return True
        return find_module_rule(module, table) is not None

    return is_leaf


class _Reading:
    """The work of one ``analyze()``."""

    def __init__(
        self,
        model: nn.Module,
        tracing: Tracing,
        rules: Mapping[Target, Rule],
        *,
        streams: bool,
    ) -> None:
        self.model = model
        self.tracing = tracing
        self.readings = tracing.graphs
        self.rules = rules
        self.streams = streams
        self.table = ChannelTable()
        self.hooked = {path for reading in self.readings for path in reading.hooked}
        self.shared = self._shared_modules()
        self.read_outside = self._modules_read_outside()
        self.direct: set[tuple[str, str, int]] = set()
        self.astray: set[tuple[str, str]] = set()
        self.folds = find_folds(
            [reading.module for reading in self.readings], {*self.shared, *self.read_outside}
        )
        self.folded = {fold.norm for fold in self.folds if fold.norm is not None}
        self.notes: Counter[str] = Counter()
        self.values: dict[fx.Node, Value] = {}

    def graph(self) -> SpaceGraph:
        for reading in self.readings:
            for node in reading.module.graph.nodes:
                self.values[node] = self._visit(reading, node)
        self._fix_entangled()
        self._fix_auxiliary_layers()
        bound, scalings = self._bound_sizes(), self.table.scalings()
        sights = [
            sight
            for reading in self.tracing.evaluations
            for sight in find_sights(reading, self.values)
        ]
        # Of all heads one tells how many channels each of them has.
        heads = [rows[0] for rows in (*bound.values(), *(scaling.ids for scaling in scalings))]
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
            for scaling, count in zip(scalings, counts[len(bound) :], strict=True)
        ]
        return SpaceGraph(
            model=type(self.model).__name__,
            spaces=spaces,
            tensors={name: tuple(p.shape) for name, p in self.model.named_parameters()},
            calls=tuple(self._calls()),
            folds=self.folds,
            taps=tuple(taps_of(sights, layouts, names, spaces)),
            notes=tuple(self._all_notes()),
            products=tuple(dot_products_of(self.table, resolved, names)),
            sizes=tuple(sizes),
            scaled=tuple(scaled),
            read=frozenset(place for reading in self.readings for place in reading.read),
        )

    def _all_notes(self) -> Iterator[str]:
        if self.tracing.whole is None:
            yield f"the forward of {type(self.model).__name__} cannot be traced; pieces of it are"
        for reading in self.tracing.evaluations:
            for path, why in reading.unread.items():
                yield f"{path!r} is read as one operator: its forward cannot be traced ({why})"
        for name, count in self.notes.items():
            yield f"no rule for {name} ({count} {'uses' if count > 1 else 'use'})"

    # ----------------------------------------------------------------------------------------------
    # Walking the graph

    def _visit(self, reading: Traced, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return opaque(node.meta.get("val"))
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "output":
            return self._fix_outputs(node)
        return self._apply_rule(reading, node)

    def _fix_outputs(self, node: fx.Node) -> None:
        for value in flat(_mapped(node.args, self.values)):
            if isinstance(value, Channels | Heads | Extent):
                self.table.fix(value.ids, "output of the model")

    def _apply_rule(self, reading: Traced, node: fx.Node) -> Value:
        call = self._call(reading, node, node.meta.get("val"))
        if call.path in self.hooked:
            return call.give_up(f"a hook changes what {call.label} reads or gives")
        rule = find_rule(node, call.module, self.rules)
        values = list(flat((call.args, call.kwargs)))
        if any(isinstance(v, Heads) for v in values) and rule is not None:
            ours = rule is find_rule(node, call.module, RULES)
            on_heads = find_rule(node, call.module, RULES_ON_HEADS) if ours else None
            rule = on_heads or _no_rule_for_heads
        if rule not in BINDS_SIZES:
            pin_sizes(call)
        if rule not in READS_HELD:
            self.astray |= {(v.module, v.name) for v in values if isinstance(v, Held)}
        if rule is None:
            if call.path in reading.unread:  # what it holds is read piece by piece
                return replace(call, module=None).give_up(f"no rule for {call.label}")
            return self._boundary(call)
        extents = [v for v in values if isinstance(v, Extent)]
        divided = any(extent.parts > 1 for extent in extents) and rule not in {reshaping, item}
        if divided or (extents and rule not in READS_SIZES):
            return call.give_up(f"its number of channels is used in {call.label}")
        try:
            value = rule(call)
            return value if _consistent(value, call.result) else call.give_up(call.unexpected)
        except Exception as error:  # a rule that fails is a boundary, not a crash
            self.notes[f"{call.label} (its rule failed: {error})"] += 1
            return call.give_up(f"the rule of {call.label} failed")

    def _call(self, reading: Traced, node: fx.Node, result: Any) -> Call:
        path = str(node.target) if node.op == "call_module" else ""
        return Call(
            node=node,
            args=_mapped(node.args, self.values),
            kwargs=_mapped(node.kwargs, self.values),
            result=result,
            module=reading.module.get_submodule(path) if node.op == "call_module" else None,
            path=path,
            table=self.table,
            rule_of=lambda module: find_module_rule(module, self.rules),
            folds=self.folded,
            streams=self.streams,
            values=self.values,
        )

    def _boundary(self, call: Call) -> Value:
        values = list(flat((call.args, call.kwargs)))
        if any(isinstance(v, Extent) for v in values):
            return call.give_up(f"its number of channels is computed with, in {call.label}")
        if any(isinstance(v, Channels | Heads) for v in values):
            self.notes[call.label] += 1
        return call.give_up(f"no rule for {call.label}")

    def _attribute(self, node: fx.Node) -> Value:
        """Follow a parameter that acts on channels directly (layer scale, positions)."""
        path, _, name = str(node.target).rpartition(".")
        try:
            owner = self.model.get_submodule(path)
        except AttributeError:  # a constant that tracing has put into the graph
            return opaque(node.meta.get("val"))
        tensor = getattr(owner, name, None)
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
        wide = [dim for dim, size in enumerate(shape) if size > 1]
        held = {**owner._parameters, **owner._buffers}
        if not wide or held.get(name) is None:
            return opaque(node.meta.get("val"))
        if len(wide) > 1 and find_module_rule(owner, self.rules) is not None:
            return opaque(node.meta.get("val"))
        self.direct |= {(path, name, dim) for dim in wide}
        if len(wide) > 1:
            return Held(shape, path, name)
        ids = self.table.axis(path, [(name, wide[0])], "carrier", shape[wide[0]])
        return Channels(shape, wide[0], ids)

    # ----------------------------------------------------------------------------------------------
    # What no operator shows

    def _shared_modules(self) -> dict[str, str]:
        """Return the modules that have two names, or a tensor with two owners, with the reason."""
        owners: dict[int, list[tuple[str, str]]] = {}
        names: dict[int, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(path)
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and len(names[id(module)]) == 1:
                    owners.setdefault(id(tensor), []).append((path, name))
        reasons: dict[str, str] = {}
        for places in owners.values():
            for path, name in places if len(places) > 1 else ():
                reasons[path] = f"{path}.{name} is shared with another layer"
        for paths in names.values():
            for path in paths if len(paths) > 1 else ():
                reasons[path] = f"{path!r} is registered under two names"
        return reasons

    def _modules_read_outside(self) -> dict[str, str]:
        """Return the modules that own a tensor which the forward reads directly, or goes past."""
        hooked = {path: f"a hook changes what {path!r} reads or gives" for path in self.hooked}
        looked_at = {
            place.module: f"{place} is read outside of its layer"
            for reading in self.readings
            for place in reading.read
            if find_module_rule(self.model.get_submodule(place.module), self.rules) is not None
        }
        return {
            **looked_at,
            **hooked,
            **self.tracing.past,
            **{
                str(node.target).rpartition(".")[0]: f"{node.target} is read outside of its layer"
                for reading in self.readings
                for node in reading.module.graph.find_nodes(op="get_attr")
            },
        }

    def _fix_entangled(self) -> None:
        """Fix the layers that have another owner, name or reader, or a call without a rule."""
        for key, axis in self.table.axes.items():
            reason = self.shared.get(axis.module)
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
        pinned = self.table.pinned.union(*(reading.pinned for reading in self.readings))
        unseen = {(place.module, place.name) for place in self.tracing.unseen}
        pinned |= {
            place
            for size, _ in self.table.bound
            for place in size.places
            if (place.module, place.name) in unseen
        }
        bound: dict[Place, list[Ids]] = {}
        for size, rows in self.table.bound:
            free = [place for place in size.places if place not in pinned]
            if len(free) != 1:
                names = " * ".join(map(str, size.places))
                self.table.fix(rows, f"counted by {names}, which is used in other ways too")
                continue
            bound.setdefault(free[0], []).append(rows.reshape(-1, free[0].get(self.model)))
        found = {place: np.unique(np.concatenate(rows), axis=0) for place, rows in bound.items()}
        for place, rows in found.items():
            self.table.balance(rows, f"does not fall evenly into {place}")
        return found

    def _calls(self) -> Iterator[LayerCall]:
        for run in self.tracing.ran:
            module = self.model.get_submodule(run.path)
            if isinstance(module, COUNTED):
                yield from layer_calls(run.path, module, run.args, run.kwargs, run.output)


def _no_rule_for_heads(call: Call) -> Value:
    return call.give_up(f"no rule for heads in {call.label}")


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
