"""Tracing: from a model to FX graphs whose nodes know their shapes.

The graphs are only *read*; the model that runs stays the user's own. A model is traced in
evaluation mode and in training mode, because some layers run in one of them only (the auxiliary
heads of GoogLeNet): a channel may be cut only if every reader in either mode can follow.

What cannot be traced is tried in this order:

1. the whole model, where modules with a rule are one operator each, and so are the functions that
   timm says not to trace;
2. the whole model, where every module whose forward cannot be traced is one operator too, the
   innermost such module first;
3. what such a module holds, piece by piece: each submodule that it calls is traced by itself, on
   what one real forward gives it. The model itself may be such a module (detectors, which loop over
   lists of images). Nothing is known of what happens between pieces, so what enters and leaves a
   piece never changes; and a piece whose insides are used past its forward stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from timm.layers import get_notrace_functions, is_notrace_module
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves

from torchcap.errors import ExampleInputsError, ModelError, TraceError
from torchcap.graph.inputs import (
    ExampleInputs,
    Inputs,
    as_inputs,
    default_inputs,
    frozen_arguments,
    placeholder_values,
)
from torchcap.graph.sizes import Place, reads_noted, track_sizes_
from torchcap.graph.stand_ins import TRANSFORMERS, plain_transformers, shapes_alone
from torchcap.graph.watch import Run, Watched, watch_forward

LeafRule = Callable[[nn.Module], bool]

_LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException)

_MOST_UNREAD = 100
"""Modules that may stand as one operator because they cannot be traced: each costs a reading."""


@dataclass(frozen=True, slots=True)
class Traced:
    """One graph of a model, or of a piece of it.

    Attributes:
        module: the graph over the model's own modules; ``node.meta["val"]`` is a fake tensor (or a
            structure of them) with the shape that the example inputs give.
        outputs: graph node -> the (module path, call index) pairs whose output it is, for every
            module that runs, leaf or not.
        mode: ``"eval"`` or ``"train"``.
        piece: qualified name of the module whose forward this is, ``""`` for the model's own.
        unread: qualified names of the modules that stand in the graph as one operator because their
            forward cannot be traced, with what stopped it.
        ran: the calls of all modules, in the order in which they end, those inside of unread
            modules too; tensors are fake.
        pinned: the sizes that the forward computes with.
        inputs: what the forward was traced for; None where the graph was given.
        alone: whether this is an evaluation graph of what could not be traced in training mode.
        read: the attributes of modules that the forward reads, sizes among them.
        hooked: qualified names of the modules with a hook that changes what they read or give.
    """

    module: fx.GraphModule
    outputs: Mapping[fx.Node, tuple[tuple[str, int], ...]]
    mode: str
    piece: str = ""
    unread: Mapping[str, str] = field(default_factory=dict)
    ran: list[Run] = field(default_factory=list)
    pinned: Set[Place] = frozenset()
    inputs: Inputs | None = None
    alone: bool = False
    read: Set[Place] = frozenset()
    hooked: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Tracing:
    """All graphs of a model.

    Attributes:
        graphs: of the model and of pieces, the evaluation graph of each before its training graph.
        ran: the calls of all modules in one evaluation forward.
        past: module -> why it is not changed: something goes past the forward that was traced.
        unseen: attributes that are read by forwards which cannot be traced.
    """

    graphs: tuple[Traced, ...]
    ran: list[Run]
    past: Mapping[str, str] = field(default_factory=dict)
    unseen: Set[Place] = frozenset()

    @property
    def evaluations(self) -> tuple[Traced, ...]:
        """The evaluation graphs."""
        return tuple(graph for graph in self.graphs if graph.mode == "eval")

    @property
    def whole(self) -> Traced | None:
        """The evaluation graph of the whole model, if its own forward can be traced."""
        first = self.graphs[0]
        return first if not first.piece else None


def trace(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, is_leaf: LeafRule
) -> Tracing:
    """Read a model's graphs, in evaluation and in training mode. The model is not changed.

    Args:
        model: any module; a ``GraphModule`` is read as it stands.
        example_inputs: one tensor, a tuple of positional arguments, or a mapping of keyword
            arguments; may be left out where :func:`default_inputs` knows the shape.
        is_leaf: which modules are read as one operator, besides those of ``torch.nn``.

    Raises:
        TraceError: if neither the model nor a piece of it can be traced.
        ModelError: if the model cannot be copied.
        ExampleInputsError: if the example inputs are missing, or the model does not accept them.
    """
    inputs = default_inputs(model) if example_inputs is None else as_inputs(example_inputs)
    with plain_transformers():
        if isinstance(model, fx.GraphModule):
            given = Traced(fx.GraphModule(shadow(model), _copy_graph(model.graph)), {}, "eval")
            _propagate_shapes(given, model, inputs)
            return Tracing((given,), given.ran)
        return _Search(model, inputs, is_leaf).tracing()


class _Search:
    """The work of one ``trace()``: the whole model, then pieces of what could not be traced."""

    def __init__(self, model: nn.Module, inputs: Inputs, is_leaf: LeafRule) -> None:
        self.model, self.inputs, self.is_leaf = model, inputs, is_leaf
        self.graphs: list[Traced] = []
        self.watched: Watched | None = None

    def tracing(self) -> Tracing:
        refusal: TraceError | None = None
        try:
            waiting = self._read("", self.inputs)
        except _Untraceable as error:
            refusal = TraceError(
                f"cannot trace {type(self.model).__name__!r}, nor any part of it: {error.why}. A "
                "forward must not branch on the values of tensors, nor iterate over them; what "
                "does can be moved into a module of its own, which is then read as one operator"
            )
            self.watched = self._watch()
            waiting = [""]
        else:
            with contextlib.suppress(ExampleInputsError):  # pieces are an extra here
                self.watched = self._watch() if waiting else None
        while waiting and self.watched is not None:
            for path, inputs in list(self._inside(waiting.pop(0))):
                try:
                    waiting += self._read(path, inputs)
                except (_Untraceable, ExampleInputsError):
                    waiting.append(path)
        if not self.graphs and refusal is not None:
            raise refusal
        ran = self.graphs[0].ran if self.watched is None else self.watched.ran
        return Tracing(tuple(self.graphs), ran, dict(self._past()), set(self._unseen()))

    def _read(self, piece: str, inputs: Inputs) -> list[str]:
        """Trace a piece, and return the modules in it that could not be traced."""
        evaluation = _trace_evaluation(self.model, piece, inputs, self.is_leaf)
        readings = [evaluation]
        try:
            training = _trace_in_mode(
                self.model, piece, inputs, self.is_leaf, evaluation.unread, training=True
            )
        except _Untraceable:  # random masks drawn from shapes, say; it is still read
            readings = [replace(evaluation, alone=True)]
        else:
            if signature(training.module.graph) != signature(evaluation.module.graph):
                readings.append(training)
        for reading in readings:
            _propagate_shapes(reading, self.model.get_submodule(piece), inputs)
        self.graphs += readings
        return list(evaluation.unread)

    def _watch(self) -> Watched:
        watched = shadow(self.model)
        set_mode(watched, training=False)
        try:
            return watch_forward(watched, self.inputs.args, dict(self.inputs.kwargs))
        except Exception as error:  # a user's forward may raise anything on a wrong shape
            raise _misfit(self.model, "eval", list(self.inputs.args), error) from error

    def _inside(self, path: str) -> Iterator[tuple[str, Inputs]]:
        """Yield the modules that a module calls, with what they were given first."""
        assert self.watched is not None  # noqa: S101 - the caller has looked
        for name, child in self.model.get_submodule(path).named_children():
            inner = f"{path}.{name}" if path else name
            if self.is_leaf(child) or not any(True for _ in child.children()):
                continue
            if inner in self.watched.inputs:
                yield inner, Inputs(*self.watched.inputs[inner])
            else:  # a container, which is not called itself
                yield from self._inside(inner)

    def _past(self) -> Iterator[tuple[str, str]]:
        """Yield the modules inside of pieces that something uses past the forward of the piece."""
        if self.watched is None:
            return
        pieces = [graph.piece for graph in self.graphs]
        for path in self.watched.inputs:
            piece = max((p for p in pieces if holds(p, path)), key=len, default="")
            if piece and not all(
                caller == piece or holds(piece, caller) for caller in self.watched.callers[path]
            ):
                yield path, f"{path!r} is called past {piece!r}"
        for path, reader in self.watched.read_by_others.items():
            yield path, f"a tensor of {path!r} is read in {reader!r}"

    def _unseen(self) -> Iterator[Place]:
        """Yield the attributes that a forward reads which is in no graph."""
        if self.watched is None:
            return
        pieces = [graph.piece for graph in self.graphs]
        unread = {path for graph in self.graphs for path in graph.unread}
        for place, readers in self.watched.reads.items():
            for reader in readers:
                traced = any(reader == piece or holds(piece, reader) for piece in pieces)
                if reader in unread or not traced:
                    yield place


def holds(outer: str, inner: str) -> bool:
    """Whether a qualified name stands for something inside of another."""
    return not outer or inner.startswith(f"{outer}.")


def shadow(model: nn.Module) -> nn.Module:
    """Copy a model's structure; the copy's tensors share the memory of the original's.

    Raises:
        ModelError: if the model cannot be copied.
    """
    for label, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(
                f"{label!r} has no shape yet (a lazy module); run the model once on example inputs"
            )
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    memo.update({id(b): b.detach() for b in model.buffers()})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a user's class cannot copy
        raise ModelError(
            f"{type(model).__name__!r} cannot be copied ({type(error).__name__}: {error}); "
            "copy.deepcopy(model) has to work: replace torch.nn.utils.weight_norm by "
            "torch.nn.utils.parametrizations.weight_norm, for one"
        ) from error


def _shadow_around(model: nn.Module, piece: str) -> nn.Module:
    """Copy the structure of a piece of a model, at its place in an otherwise empty one."""
    if not piece:
        return shadow(model)
    root = holder = nn.Module()
    *outer, last = piece.split(".")
    for name in outer:
        inner = holder._modules[name] = nn.Module()
        holder = inner
    holder._modules[last] = shadow(model.get_submodule(piece))
    return root


class GraphReader(fx.Tracer):
    """A tracer that also notes which module call produced which value, and where it failed."""

    def __init__(self, is_leaf: LeafRule, unread: Container[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._is_leaf = is_leaf
        self.unread = unread
        self._calls: dict[str, int] = {}
        self.outputs: dict[fx.Node, list[tuple[str, int]]] = {}
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stands as one operator."""
        if module_qualified_name in self.unread or self._is_leaf(m):
            return True
        whole = super().is_leaf_module(m, module_qualified_name)
        return whole and not isinstance(m, TRANSFORMERS)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace a call of a module."""
        path = self.path_of_module(m)
        index = self._calls.get(path, 0)
        self._calls[path] = index + 1
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = path if self.failed is None else self.failed  # the innermost comes first
            raise
        if isinstance(result, fx.Proxy):
            self.outputs.setdefault(result.node, []).append((path, index))
        return result


class _Untraceable(Exception):  # noqa: N818 - says what a forward is; never leaves this file
    """A forward cannot be traced.

    Attributes:
        path: the innermost module where tracing failed; None in the forward of the piece itself.
        why: what stopped it.
    """

    def __init__(self, path: str | None, why: str) -> None:
        super().__init__(why)
        self.path, self.why = path, why


def _trace_evaluation(model: nn.Module, piece: str, inputs: Inputs, is_leaf: LeafRule) -> Traced:
    """Trace in evaluation mode; what cannot be traced inside becomes one operator."""
    unread: dict[str, str] = {}
    while True:
        try:
            return _trace_in_mode(model, piece, inputs, is_leaf, unread, training=False)
        except _Untraceable as error:
            if error.path is None or error.path in unread or len(unread) >= _MOST_UNREAD:
                raise
            unread[error.path] = error.why
            kind = type(model.get_submodule(error.path))
            if is_notrace_module(kind):  # then the others of its kind need not be tried
                unread.update(
                    {
                        path: error.why
                        for path, module in model.named_modules()
                        if type(module) is kind and holds(piece, path)
                    }
                )


def _trace_in_mode(
    model: nn.Module,
    piece: str,
    inputs: Inputs,
    is_leaf: LeafRule,
    unread: Mapping[str, str],
    *,
    training: bool,
) -> Traced:
    reader = GraphReader(is_leaf, {path.removeprefix(f"{piece}.") for path in unread})
    mode = "train" if training else "eval"
    concrete = frozen_arguments(model.get_submodule(piece), inputs)
    # Some forwards keep what they compute on the module; a proxy kept there would spoil the model.
    copied = _shadow_around(model, piece)
    set_mode(copied, training=training)
    inside = f"{piece}." if piece else ""
    leaves = {
        module
        for path, module in copied.named_modules()
        if reader.is_leaf_module(module, path.removeprefix(inside))
        or any(holds(outer, path) for outer in unread)
    }
    numbers = _integers(copied)
    pinned = track_sizes_(copied, leaves.__contains__)
    graph, read = _graph_of(copied, piece, reader, concrete)
    if any(place in numbers for place in read):
        # To ``type(x) is int`` a size is none: then the program of plain numbers is the right one.
        plain = GraphReader(is_leaf, reader.unread)
        other = _shadow_around(model, piece)
        set_mode(other, training=training)
        same, _ = _graph_of(other, piece, plain, concrete)
        if signature(same) != signature(graph):
            copied, graph, reader = other, same, plain
    for node in graph.nodes:
        if node.op in {"call_module", "get_attr"}:
            node.target = joined(piece, str(node.target))
    for node in graph.find_nodes(op="placeholder"):  # an interpreter would put in a list
        node.target = str(node.target).removeprefix("**")
    outputs = {
        node: tuple((joined(piece, path), call) for path, call in calls)
        for node, calls in reader.outputs.items()
    }
    pinned = set(pinned)  # what looks at sizes from here on does not belong to the forward
    return Traced(
        fx.GraphModule(copied, graph),
        outputs,
        mode,
        piece,
        dict(unread),
        pinned=pinned,
        inputs=inputs,
        read=read,
    )


def _graph_of(
    model: nn.Module, piece: str, reader: GraphReader, concrete: dict[str, Any]
) -> tuple[fx.Graph, set[Place]]:
    """Trace a piece of a copied model; return the graph, and the attributes that were read."""
    read: set[Place] = set()
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of frozen arguments that are not asserted
            reads_noted(model, read.add),
        ):
            return reader.trace(model.get_submodule(piece), concrete_args=concrete), read
    except Exception as error:  # a user's forward may raise anything on a proxy
        failed = None if reader.failed is None else joined(piece, reader.failed)
        raise _Untraceable(failed, _first_line(error)) from error


def _integers(model: nn.Module) -> set[Place]:
    return {
        Place(path, name)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) in {int, list, tuple}
    }


def joined(outer: str, inner: str) -> str:
    """Join two qualified names, either of which may be empty."""
    return f"{outer}.{inner}" if outer and inner else outer or inner


def signature(graph: fx.Graph) -> list[tuple[str, str, str]]:
    """Return what tells two graphs of one model apart, down to the flag of a dropout."""
    return [(n.op, str(n.target), str((n.args, n.kwargs))) for n in graph.nodes]


def _propagate_shapes(reading: Traced, model: nn.Module, inputs: Inputs) -> None:
    """Give every node its shape, and note the layers that run."""
    graph_module, mode = reading.module, reading.mode
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    values = placeholder_values(model, inputs)
    try:
        # Shapes are those of evaluation: batch norm refuses one value a channel in training.
        set_mode(graph_module, training=False)
        with torch.no_grad(), _hooks_watched(reading), _noted(reading):
            try:
                with shapes_alone(graph_module):
                    _FakePropagation(graph_module, fake).propagate(*values)
            except _LOOKS_AT_VALUES:  # then it is run on real ones
                reading.ran.clear()
                _RealPropagation(graph_module).run(*values)
    except Exception as error:  # a user's forward may raise anything on a wrong shape
        raise _misfit(model, mode, values, error) from error


def _misfit(
    model: nn.Module, mode: str, values: Sequence[Any], error: Exception
) -> ExampleInputsError:
    shapes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in values]
    return ExampleInputsError(
        f"{type(model).__name__!r} does not run in {mode} mode on the example inputs of shape "
        f"{shapes}: {_first_line(error)}; pass example_inputs that its forward accepts in "
        "both modes (auxiliary heads may want larger images)"
    )


@contextlib.contextmanager
def _noted(reading: Traced) -> Iterator[None]:
    """Note the modules that run, with their outputs, for a while."""

    def note(path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        reading.ran.append(Run(path, args, kwargs, output))

    handles = [
        module.register_forward_hook(partial(note, path), with_kwargs=True)
        for path, module in reading.module.named_modules()
        if path
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _hooks_watched(reading: Traced) -> Iterator[None]:
    """Note the modules whose hooks change a tensor, for a while."""
    kept: list[tuple[Any, Any]] = []
    for path, module in reading.module.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            kept.append((hooks, dict(hooks)))
            for key, hook in kept[-1][1].items():
                hooks[key] = partial(_watched_hook, path, hook, reading.hooked)
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


def _watched_hook(
    path: str, hook: Callable[..., Any], changing: set[str], module: nn.Module, *args: Any
) -> Any:
    tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
    versions = [tensor._version for tensor in tensors]
    result = hook(module, *args)
    if result is not None or versions != [tensor._version for tensor in tensors]:
        changing.add(path)
    return result


class GraphRunner(fx.Interpreter):
    """Runs a graph node by node; functions get lists of their own, and may write into them."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a node's call."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _thawed(args), _thawed(kwargs)


def _thawed(value: Any) -> Any:
    """Return nested lists, tuples and dictionaries with plain lists in place of frozen ones."""
    if isinstance(value, list):
        return [_thawed(item) for item in value]
    if type(value) is tuple:
        return tuple(_thawed(item) for item in value)
    if isinstance(value, dict):
        return {key: _thawed(item) for key, item in value.items()}
    return value


class _FakePropagation(GraphRunner, FakeTensorProp):
    """Runs a graph on fake tensors, and keeps their shapes."""


class _RealPropagation(GraphRunner):
    """Runs a graph on real tensors, and keeps their shapes."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = fx.node.map_aggregate(
            result, lambda v: v.to("meta") if isinstance(v, Tensor) else v
        )
        return result


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Set the mode flags, without calling a ``train()`` that a user has overridden."""
    for module in model.modules():
        module.training = training
