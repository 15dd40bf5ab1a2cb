"""``analyze()``: run the operator rules over a model's graphs and collect its channel spaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.nn.utils import parametrize

from torchcap.errors import ModelError, TraceError
from torchcap.graph.branches import other_calls, other_sides
from torchcap.graph.escapes import escaped_sizes
from torchcap.graph.inputs import ExampleInputs
from torchcap.graph.interpret import Interpretation
from torchcap.graph.kinds import NOTHING_ASKED, Asked, asked_of, changes_of
from torchcap.graph.proof import Changes, Proof, prove, untrue
from torchcap.graph.recorder import LeafRule
from torchcap.graph.rewriting import Opened, Refusal, rewriting_of
from torchcap.graph.rewritten import Rewriting
from torchcap.graph.rules import OPERATORS, Rules, Target, find_module_operator, is_patched
from torchcap.graph.spaces import SpaceGraph
from torchcap.graph.trace import Traced, Tracer, Tracing, is_builtin_leaf, on_meta
from torchcap.graph.values import Operator, as_operator
from torchcap.modes import outside_inference_mode


@outside_inference_mode
def analyze(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Rules | None = None,
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
    reader = Reader(leaves, rules, streams)
    return reader.read(model, example_inputs, most=_PROVEN_MACS)


_PROVEN_MACS = 3e9
"""Multiply-adds of a forward up to which ``analyze()`` proves its reading."""


def known_operators(rules: Rules | None) -> Mapping[Target, Operator]:
    """Return the records of all operators: torchcap's, and those that a user gives.

    A rule for a method of tensors is one for the function of ``torch`` of this name too, and the
    other way round, unless that has a rule of its own.

    Raises:
        ModelError: if a rule is none, or for nothing.
    """
    own: dict[Target, Operator] = {}
    for target, rule in (rules or {}).items():
        if not callable(rule) and not isinstance(rule, Operator):
            raise ModelError(
                f"rules={{{target!r}: …}} takes a function or an Operator; got {rule!r}"
            )
        for spelling in _spellings(target):
            own[spelling] = as_operator(rule)
    exact = {target: as_operator(rule) for target, rule in (rules or {}).items()}
    return {**OPERATORS, **own, **exact}


def _spellings(target: Any) -> Iterator[Target]:
    """Yield what else means an operator: the method of tensors, the function of torch."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    method, function = getattr(torch.Tensor, name, None), getattr(torch, name, None)
    if isinstance(target, str) and method is None:
        raise ModelError(
            f"rules= has a rule for {target!r}, which is no method of torch.Tensor; a rule is for "
            "a module class, a function, or the name of a method"
        )
    if not isinstance(target, str) and not callable(target):
        raise ModelError(
            f"rules= has a rule for {target!r}; a rule is for a module class, a function, or the "
            "name of a method"
        )
    if isinstance(target, str) or target in (method, function):
        yield from (name, *([] if function is None else [function]))


def _tracer(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    leaves: Sequence[type[nn.Module]],
    operators: Mapping[Target, Operator],
) -> Tracer:
    functions = [t for t in operators if isinstance(t, FunctionType) and not _is_seen(t)]
    is_leaf = leaf_rule(leaves, operators)
    return Tracer(model, example_inputs, is_leaf=is_leaf, functions=functions)


def _is_seen(function: FunctionType) -> bool:
    """Whether a recording sees a function by itself."""
    return function.__module__.startswith(("torch.", "torchcap."))


@dataclass(frozen=True, slots=True)
class Reader:
    """How models are read: what the user said of it, handed on together."""

    leaves: Sequence[type[nn.Module]] = ()
    rules: Rules | None = None
    streams: bool = False

    def __call__(self, model: nn.Module, example_inputs: ExampleInputs | None) -> SpaceGraph:
        """Return the spaces of a model whose kind has been proven; see :func:`analyze`."""
        return self.read(model, example_inputs)

    def proven(self, model: nn.Module, example_inputs: ExampleInputs | None) -> SpaceGraph:
        """Return the spaces of a model, after a proof; see :func:`analyze`."""
        return self.read(model, example_inputs, most=inf)

    def read(
        self, model: nn.Module, example_inputs: ExampleInputs | None, *, most: float = 0
    ) -> SpaceGraph:
        """Return the spaces of a model; see :func:`analyze`.

        Args:
            model: any module.
            example_inputs: of its forward.
            most: multiply-adds of a forward up to which the reading is proven.

        Raises:
            TraceError: if the model cannot be read, or the proof fails.
        """
        check_kind(model)
        operators = known_operators(self.rules)
        tracer = _tracer(model, example_inputs, self.leaves, operators)
        found = _read(tracer, operators, streams=self.streams, most=most)
        if found.mismatch is not None:  # to ``type(n) is int`` a size is none
            tracer.plain = True
            sides = found.sides  # plain sizes do not tell where they are compared
            found = _read(tracer, operators, streams=self.streams, most=most, sides=sides)
        if found.mismatch is not None:
            raise TraceError(
                f"the reading of {type(model).__name__!r} does not hold: run on the same inputs, "
                f"it computes something else than the forward at {found.mismatch}. Make the module "
                "that this belongs to one operator: leaves=[...]"
            )
        return found.graph

    def trace(self, model: nn.Module, example_inputs: ExampleInputs) -> Traced:
        """Return the evaluation graph of a whole model.

        Raises:
            TraceError: if only pieces of it can be read.
        """
        tracer = _tracer(model, example_inputs, self.leaves, known_operators(self.rules))
        whole = tracer.tracing().whole
        if whole is None or whole.strange is not None:
            why = next(iter(tracer.unread.values()), "") if whole is None else whole.strange
            raise TraceError(
                f"only pieces of {type(model).__name__!r} can be read, and closed forms need its "
                f"whole graph: {why}. Start from the weights alone: "
                "recipe=Recipe(start=LargestNorm())"
            )
        return whole


def check_kind(model: Any) -> None:
    """Raise a ModelError if a model is of a kind that cannot be read, or wraps another one."""
    if not isinstance(model, nn.Module):
        given = model.__name__ if isinstance(model, type) else type(model).__name__
        kind = "the class" if isinstance(model, type) else "a"
        raise ModelError(f"a torch.nn.Module was expected as the model; got {kind} {given}")
    attribute = _inner_attribute(model)
    if attribute is not None:
        raise ModelError(
            f"{type(model).__name__!r} wraps a model; pass the model inside: model.{attribute}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__!r} cannot be read: a torch.nn.Module was expected, not a "
            "scripted or frozen one; pass the module that it was made from"
        )
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    if any(isinstance(n.target, OpOverload) and n.target.namespace == "aten" for n in nodes):
        raise ModelError("the model is an exported program; pass the module that it was made from")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{path!r} is scripted and cannot be read; use what it was made from")


def _inner_attribute(model: Any) -> str | None:
    """Return where a wrapper keeps its model; None if the model is no wrapper that is known."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if kinds & {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}:
        return "module"
    if kinds & {"AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3"}:
        return "module"
    return "_orig_mod" if "OptimizedModule" in kinds else None


@dataclass(frozen=True, slots=True)
class _Found:
    """A reading.

    Attributes:
        graph: the spaces.
        mismatch: where its proof failed; None if it did not.
        sides: what forwards may do in other ways than in the example.
    """

    graph: SpaceGraph
    mismatch: str | None = None
    sides: Sequence[Traced] = ()


def _read(
    tracer: Tracer,
    operators: Mapping[Target, Operator],
    *,
    streams: bool,
    most: float,
    sides: Sequence[Traced] = (),
    asked: Asked = NOTHING_ASKED,
) -> _Found:
    again = partial(_read, tracer, operators, streams=streams, most=most, sides=sides)
    tracing = tracer.tracing()
    opened = Opened(tracer.model)
    interpret = partial(
        Interpretation, tracer.model, operators=operators, streams=streams, asked=asked
    )
    reading, graph = _open(opened, tracing, interpret)
    escaped = escaped_sizes(tracer, tracing, reading.silent_sizes())
    more, unread = other_sides(tracer, tracing, reading.branches())
    more += [*escaped.graphs, *other_calls(tracer, tracing), *sides]
    changes = changes_of(graph, opened.by_module())
    proof = _proof(tracer, tracing, changes, graph, most)
    if proof.values:
        tracer.means["eval"].real = True
        return again(asked=asked)
    if not proof.holds and (proof.run or most == 0):
        found = asked | asked_of(tracer, changes, graph)
        if found != asked:
            return again(asked=found)
    if proof.mismatch is not None:
        return _Found(graph, proof.mismatch, more)
    more = [*more, *proof.graphs]
    if escaped.channels or more or unread:
        tracing = replace(tracing, graphs=(*tracing.graphs, *more))
        interpret = partial(interpret, hidden=escaped.channels, unread_sides=unread)
        reading, graph = _open(opened, tracing, interpret)
    wrong = {path: asked.layers[path] for path in opened.by_module() if path in asked.layers}
    graph = _rewritten(opened, tracing, interpret, graph, wrong)
    if proof.run and graph.rewritings:
        wrong = untrue(tracer, graph.rewritings)
        graph = _rewritten(opened, tracing, interpret, graph, wrong) if wrong else graph
    if most > 0 and proof.missing is not None:
        graph = replace(graph, notes=(*graph.notes, proof.missing))
    return _Found(graph)


def _proof(
    tracer: Tracer, tracing: Tracing, changes: Changes, graph: SpaceGraph, most: float
) -> Proof:
    """Return the proof of a reading of at most so many multiply-adds, or why there is none."""
    if on_meta(tracer.model):
        return Proof(missing="not proven: the model has no weights (meta device)", run=False)
    if most < graph.macs:
        why = "not proven, because a forward is long; prepare() and compress() do it"
        return Proof(missing=why, run=False)
    return prove(tracer, tracing, changes)


_MOST_ROUNDS = 8
"""How often numbers in the code are opened: behind one there may be others."""


def _open(
    opened: Opened, tracing: Tracing, interpret: Callable[..., Interpretation]
) -> tuple[Interpretation, SpaceGraph]:
    """Read graphs; the numbers in the code for which channels stay become attributes."""
    for traced in tracing.graphs:
        opened.apply_(traced)
    across: frozenset[str] = frozenset()
    reading = interpret(tracing)
    graph = reading.graph()
    for _ in range(_MOST_ROUNDS):
        fixed = _across_what_stays(graph)
        if not opened.open_all(reading.table.stuck()) and fixed <= across:
            break
        across |= fixed
        for traced in tracing.graphs:
            opened.apply_(traced)
        reading = interpret(tracing, across=across)
        graph = reading.graph()
    return reading, graph


def _across_what_stays(graph: SpaceGraph) -> frozenset[str]:
    """Return the layers over positions that run for channels which stay anyway."""
    return frozenset(
        call.module
        for call in graph.calls
        if call.beside is not None and not any(graph[name].free for name, _ in call.beside.parts)
    )


def _rewritten(
    opened: Opened,
    tracing: Tracing,
    interpret: Callable[..., Interpretation],
    graph: SpaceGraph,
    wrong: Mapping[str, str] = MappingProxyType({}),
) -> SpaceGraph:
    """Add what forwards become in which numbers follow; numbers of others are as they were.

    Args:
        opened: the numbers.
        tracing: what has been recorded.
        interpret: reads it.
        graph: the spaces with all numbers open.
        wrong: modules whose new forward would do something else, with the reason.
    """
    notes: dict[str, str] = {}
    stuck: list[tuple[fx.Node, int]] = []
    refused = dict(wrong)
    while True:
        for path, reason in refused.items():
            notes[path] = f"the forward of {path!r} cannot be rewritten: {reason}"
            opened.close_(path)
        if refused:
            reading, graph = _open(opened, tracing, interpret)
            stuck = reading.table.stuck()
        refused = {}
        used = {size.place for size in graph.sizes if size.counted.parts}
        found: list[Rewriting] = []
        for path, numbers in opened.by_module().items():
            if used.intersection(number.place for number in numbers):
                try:
                    found.append(rewriting_of(path, numbers, tracing.graphs, tracing.moods))
                except Refusal as refusal:
                    refused[path] = str(refusal)
        if not refused:
            where = {node.meta.get("path") for node, _ in stuck}
            left = [note for path, note in notes.items() if path in where]
            return graph.with_rewritings(found, left)


def leaf_rule(leaves: Sequence[type[nn.Module]], operators: Mapping[Target, Operator]) -> LeafRule:
    """Return which modules are read as one operator: the user's leaves, and what has a rule."""

    def is_leaf(module: nn.Module) -> bool:
        if isinstance(module, tuple(leaves)) or parametrize.is_parametrized(module):
            return True
        known = find_module_operator(module, operators) is not None
        return known or (is_builtin_leaf(module) and not is_patched(module))

    return is_leaf
