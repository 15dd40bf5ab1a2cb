"""Tracing: from a model to FX graphs whose nodes know their shapes.

The graphs are only *read*; the model that runs stays the user's own. A forward is recorded on fake
tensors, in evaluation mode, and in training mode where it looks at the mode (the auxiliary heads of
GoogLeNet): a channel may be cut only if every reader in either mode can follow.

A module whose forward looks at the *values* of tensors takes a way that one example does not show.
Then the model is recorded once more, on real tensors, and such a module is one operator; what it
calls is read piece by piece. Nothing is known of what happens between pieces, so what enters and
leaves a piece never changes; and a piece whose insides are used past its forward stays as it is.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import DataParallel

from torchcap.errors import ExampleInputsError, TraceError
from torchcap.graph.calls import written_by
from torchcap.graph.copies import HOOKS, set_mode, shadow, without_collections
from torchcap.graph.inputs import ExampleInputs, Inputs, arranged, as_inputs, default_inputs
from torchcap.graph.recorder import (
    LeafRule,
    Recorder,
    SeenByDispatch,
    SeenByFakes,
    named_functions,
)
from torchcap.graph.records import Builder, Dimension, Entry, Frame, ModuleRun, Record, Seen
from torchcap.graph.sizes import Place, attribute_sizes, put_sizes_
from torchcap.graph.stand_ins import NOISE, SHAPES, TRANSFORMERS, plain_transformers
from torchcap.graph.surroundings import Surroundings, forget_
from torchcap.nests import mapped, tensors_in

Signature = list[tuple[str, str, str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """One graph of a model, or of a piece of it.

    Attributes:
        model: the model that was read; nodes name its modules.
        graph: ``node.meta["val"]`` is a tensor on the meta device (or a structure of them) with the
            shape that the example inputs give; ``"where"`` is the place in the user's code.
        outputs: graph node -> the (module path, call index) pairs whose output it is, for every
            module that runs, leaf or not.
        mode: ``"eval"`` or ``"train"``.
        piece: qualified name of the module whose forward this is, ``""`` for the model's own.
        unread: qualified names of the modules that stand in the graph as one operator because their
            forward looks at values, with the place.
        kept: nodes whose values are used past the graph, with the reason.
        constants: the tensors that the program holds, by their name in the graph.
        frames: the calls of modules that are read inside.
        strange: why the graph cannot be run by itself; None if it can.
        turned: whether it is what the forward would do if a comparison came out otherwise.
        signature: what tells two graphs of one model apart, down to the flag of a dropout.
    """

    model: nn.Module
    graph: fx.Graph
    outputs: Mapping[fx.Node, tuple[tuple[str, int], ...]]
    mode: str
    piece: str = ""
    unread: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[fx.Node, str] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    frames: Sequence[Frame] = ()
    strange: str | None = None
    turned: bool = False
    signature: Signature = field(default_factory=list)

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, if it calls one."""
        if node.op != "call_module":
            return None
        return self.model.get_submodule(str(node.target))

    def written(self) -> Iterator[str]:
        """Yield the qualified names of the model's tensors that the forward writes into."""
        for node in self.graph.nodes:
            target = written_by(node, self.module(node))
            while target is not None and target.op != "get_attr" and target.all_input_nodes:
                target = target.all_input_nodes[0]
            if target is not None and target.op == "get_attr":
                yield from {str(target.target)} - self.constants.keys()

    @property
    def outline(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """What tells the programs of two graphs apart, whatever numbers there are in them."""
        return [
            (n.op, str(n.target), tuple(source.name for source in n.all_input_nodes))
            for n in self.graph.nodes
        ]


@dataclass(frozen=True, slots=True)
class Tracing:
    """All graphs of a model.

    Attributes:
        graphs: of the model and of pieces, the evaluation graphs before the training graphs.
        ran: the calls of all modules in one evaluation forward; tensors are on the meta device.
        reads: the attributes of modules that the forwards read, sizes among them, with the modules
            that were running.
        past: module -> why it is not changed: something goes past the forwards that were read.
        unread: modules whose forward is not read -> why.
        moods: module -> what its forward depends on or changes that stands in no graph.
        dimensions: the sizes that were read from tensors in evaluation mode.
        alone: whether the training mode could not be read.
        graded: whether a forward asks if gradients are on.
        changing: whether a forward changes attributes, which the next one may ask for.
    """

    graphs: tuple[Traced, ...]
    ran: list[ModuleRun]
    reads: Mapping[Place, Set[str]] = field(default_factory=dict)
    past: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    moods: Mapping[str, str] = field(default_factory=dict)
    dimensions: Sequence[Dimension] = ()
    alone: bool = False
    graded: bool = False
    changing: bool = False

    @property
    def evaluations(self) -> tuple[Traced, ...]:
        """The graphs of evaluation on the example inputs."""
        return tuple(g for g in self.graphs if g.mode == "eval" and not g.turned)

    @property
    def whole(self) -> Traced | None:
        """The evaluation graph of the whole model, if its own forward can be read."""
        first = self.graphs[0]
        return first if not first.piece else None


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording: its graphs, and what else was noted."""

    graphs: list[Traced]
    record: Record


@dataclass(slots=True)
class Means:
    """How the forward of one mode is recorded.

    Attributes:
        real: whether on real tensors.
        unread: the modules whose forward is not read, with the reason.
    """

    real: bool = False
    unread: dict[str, str] = field(default_factory=dict)


class Tracer:
    """Records a model's forward, as often as it is asked to. The model is not changed.

    Args:
        model: any module.
        example_inputs: one tensor, a tuple of positional arguments, or a mapping of keyword
            arguments; may be left out where :func:`default_inputs` knows the shape.
        is_leaf: which modules are read as one operator.
        functions: Python functions that are one operator each.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs | None = None,
        *,
        is_leaf: LeafRule,
        functions: Collection[Callable[..., Any]] = (),
    ) -> None:
        self.model, self.is_leaf = model, is_leaf
        self.surroundings = Surroundings(model)
        self.named = named_functions(functions)
        self.inputs = default_inputs(model) if example_inputs is None else as_inputs(example_inputs)
        self.plain = False
        self.means = {"eval": Means(), "train": Means()}

    def tracing(self) -> Tracing:
        """Read the model's graphs, in evaluation and in training mode.

        Raises:
            TraceError: if neither the model nor a piece of it can be read.
            ModelError: if the model cannot be copied.
            ExampleInputsError: if the model does not run on the example inputs.
        """
        found = self._evaluation()
        graphs, record = different(found.graphs), found.record
        moods = dict(record.moods)
        alone = False
        if record.modal:
            try:
                training = self._training()
                graphs = different([*graphs, *training.graphs])
                moods |= training.record.moods
            except ExampleInputsError:  # it may want labels, or a larger batch
                alone = True
        if not graphs:
            raise TraceError(
                f"cannot read {type(self.model).__name__!r}, nor any part of it: "
                f"{self.unread['']}. What looks at values can be moved into a module of its own, "
                "which is then read as one operator"
            )
        return Tracing(
            tuple(graphs),
            record.ran,
            record.reads,
            record.outside,
            dict(self.unread),
            moods,
            record.dimensions,
            alone,
            record.graded,
            bool(record.changed),
        )

    @property
    def real(self) -> bool:
        """Whether the evaluation forward is recorded on real tensors."""
        return self.means["eval"].real

    @property
    def unread(self) -> Mapping[str, str]:
        """The modules whose forward is not read in evaluation mode, with the reason."""
        return self.means["eval"].unread

    def _evaluation(self) -> Recording:
        """Record the evaluation forward, on real tensors where fake ones won't do."""
        means = self.means["eval"]
        if not means.real:
            try:
                found = self.record(training=False)
            except ExampleInputsError:  # what fake tensors can't do, real ones may
                pass
            else:
                if not found.record.values:
                    return found
            means.real = True
        return self._in_pieces(training=False)

    def _training(self) -> Recording:
        """Record the training forward; what it leaves unread is its own."""
        self.means["train"] = Means(self.real, dict(self.unread))
        found = self.record(training=True)
        if found.record.values:
            self.means["train"].real = True
            found = self._in_pieces(training=True)
        return found

    def _in_pieces(self, *, training: bool) -> Recording:
        """Record until no forward that is read looks at a value."""
        means = self.means["train" if training else "eval"]
        while True:
            found = self.record(training=training)
            fresh = {read.path: str(read) for read in found.record.values}
            if fresh.keys() <= means.unread.keys():
                return found
            means.unread = fresh | means.unread

    def record(
        self,
        *,
        training: bool = False,
        gradients: bool = False,
        earlier: int = 0,
        inputs: Inputs | None = None,
        **changes: Any,
    ) -> Recording:
        """Record one forward.

        Args:
            training: in which mode.
            gradients: whether they are on; the parameters want none.
            earlier: forwards that run before it, on the same copy.
            inputs: others than those of the example.
            changes: what else a :class:`Recorder` may be told.

        Raises:
            ModelError: if the model cannot be copied.
            ExampleInputsError: if the model does not run on the inputs.
        """
        inputs = self.inputs if inputs is None else inputs
        mode = "train" if training else "eval"
        means = self.means[mode]
        fake = None if means.real else SeenByFakes(allow_non_fake_inputs=True)
        copied = shadow(self.model, _own if fake is None else fake.from_tensor)
        inner = (module for module in copied.modules() if module is not copied)
        leaves = {id(module) for module in inner if self.is_leaf(module)}
        for module in copied.modules():
            # Layers run as in evaluation: batch norm refuses one value a channel in training.
            module.training = training and id(module) not in leaves
            module._compiled_call_impl = None
        recorder = Recorder(
            copied,
            owners=_owners(copied, self.model),
            is_leaf=lambda module: id(module) in leaves,
            unread=means.unread,
            stand_ins=NOISE if fake is None else SHAPES,
            functions=self.named,
            plain=self.plain,
            **changes,
        )
        if not self.plain:
            places = attribute_sizes(copied, lambda module: id(module) in leaves)
            put_sizes_(copied, [(at, recorder.size_at(at, at.get(copied))) for at in places])
        try:
            self._run(recorder, fake, inputs, gradients=gradients, earlier=earlier)
        except Exception as error:  # a user's forward may raise anything on a wrong shape
            if recorder.record.values:
                return Recording([], recorder.record)
            raise _misfit(self.model, inputs, error, training=training) from error
        recorder.record.ran = [
            ModuleRun(*mapped(tuple(run), _on_meta)) for run in recorder.record.ran
        ]
        graphs = [
            _traced(self.model, builder, mode, means.unread) for builder in recorder.record.builders
        ]
        return Recording(graphs, recorder.record)

    def _run(
        self,
        recorder: Recorder,
        fake: SeenByFakes | None,
        inputs: Inputs,
        *,
        gradients: bool,
        earlier: int,
    ) -> None:
        """Run the forward, and note what is still alive behind it."""
        with (
            torch.inference_mode(mode=False),
            torch.set_grad_enabled(gradients),
            warnings.catch_warnings(action="ignore"),
            self.surroundings.undisturbed(),
            plain_transformers(),
            _eagerly(),
            _unlogged(),
        ):
            for _ in range(earlier):
                change = _own if fake is None else partial(_fake, fake)
                with fake or contextlib.nullcontext():
                    args, kwargs = mapped((inputs.args, dict(inputs.kwargs)), change)
                    recorder.model(*args, **kwargs)
            if fake is None:
                args, kwargs = mapped((inputs.args, dict(inputs.kwargs)), _own)
                given = arranged(self.model, Inputs(args, kwargs))
                with SeenByDispatch(recorder), _collecting(recorder):
                    output = recorder.run_forward(args, kwargs, given)
                _note_stored(recorder, list(tensors_in(output)))
                return
            try:
                with _collecting(recorder):
                    output = self._on_fakes(recorder, fake, inputs)
            except Exception:
                forget_(tensor for _, tensor in _alive(recorder))
                raise
            _note_stored(recorder, list(tensors_in(output)))

    def _on_fakes(self, recorder: Recorder, fake: SeenByFakes, inputs: Inputs) -> Any:
        with fake:
            faked = partial(_fake, fake)
            args, kwargs = mapped((inputs.args, dict(inputs.kwargs)), faked)
            given = arranged(self.model, Inputs(args, kwargs))
            fake.recorder = recorder
            return recorder.run_forward(args, kwargs, given)


def is_builtin_leaf(module: nn.Module) -> bool:
    """Whether a module of ``torch.nn`` is one operator, whatever rules there are for it."""
    of_torch = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    made_of_others = isinstance(module, (*TRANSFORMERS, nn.Sequential, DataParallel))
    return of_torch and not made_of_others


def on_meta(model: nn.Module) -> bool:
    """Whether a model has tensors without values."""
    return any(
        t.is_meta
        for m in model.modules()
        for t in (*m._parameters.values(), *m._buffers.values())
        if t is not None
    )


def holds(outer: str, inner: str) -> bool:
    """Whether a qualified name stands for something inside of another."""
    return not outer or inner.startswith(f"{outer}.")


def different(graphs: Iterable[Traced], known: Iterable[Traced] = ()) -> list[Traced]:
    """Return the graphs that say something else than those before them, and than known ones."""
    found: list[Traced] = []
    told = [(graph.piece, graph.signature) for graph in known]
    for graph in graphs:
        if (graph.piece, graph.signature) not in told:
            told.append((graph.piece, graph.signature))
            found.append(graph)
    return found


def _owners(*models: nn.Module) -> dict[int, Place]:
    """Return the places of all parameters and buffers, by the identity of the tensor."""
    owners: dict[int, Place] = {}
    for model in models:
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    owners.setdefault(id(tensor), Place(path, name))
    return owners


def _own(value: Any) -> Any:
    """Return a copy of a tensor; one without values gets some."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_meta:
        return value.clone()
    made = torch.zeros(value.shape, dtype=value.dtype)
    if value.is_floating_point():
        made = torch.rand(
            value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(0)
        )
    return nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def _on_meta(value: Any) -> Any:
    return value.on_meta() if isinstance(value, Seen) else value


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Let torch not report to its log what fails on fake tensors: what fails here is expected."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Let compiled functions run as they are written, for a while."""
    if "torch._dynamo" not in sys.modules:  # then nothing has been compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _traced(model: nn.Module, builder: Builder, mode: str, unread: Mapping[str, str]) -> Traced:
    for node in builder.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = mapped(node.meta["val"], _on_meta)
    return Traced(
        model,
        builder.graph,
        {node: tuple(calls) for node, calls in builder.outputs.items()},
        mode,
        builder.piece,
        dict(unread),
        dict(builder.kept),
        dict(builder.constants),
        builder.settled(),
        builder.strange,
        signature=[
            (
                n.op,
                str(n.target),
                str((n.args, n.kwargs)),
                _told(builder.constants.get(str(n.target))),
            )
            for n in builder.graph.nodes
        ],
    )


def _told(constant: Tensor | None) -> Any:
    """Return what tells a constant of one recording from that of another."""
    if constant is None or constant.is_meta or hasattr(constant, "fake_mode"):
        return None
    try:
        values = constant.detach().cpu().tolist() if constant.numel() <= _MOST_TOLD else None
    except Exception:  # of torch.func, which has none outside of its functions
        values = None
    return tuple(constant.shape), hash(str(values))


_MOST_TOLD = 2**16


@contextlib.contextmanager
def _collecting(recorder: Recorder) -> Iterator[None]:
    """Let nothing that a forward has computed be alive after it only because it is in a cycle.

    What was there before is not looked at, which takes most of a collection's time: without
    collections in between, all that the forward has made is in the youngest generation.
    """
    with without_collections():
        yield
        if any(True for _ in _alive(recorder)):
            gc.collect(0)


def _note_stored(recorder: Recorder, outputs: Sequence[Tensor]) -> None:
    """Note the tensors that are alive after the forward, and are not what it returned.

    A module, a hook or a closure has stored them, for somebody who will read them.
    """
    returned = {id(tensor) for tensor in outputs}
    found = [(entry, tensor) for entry, tensor in _alive(recorder) if id(tensor) not in returned]
    places = _storages(recorder.model) if found else {}
    for entry, tensor in found:
        where = places.get(id(tensor), "by a hook or a closure")
        entry.builder.kept.setdefault(entry.at(), f"kept after the forward, {where}")
    forget_(tensor for _, tensor in found)


def _alive(recorder: Recorder) -> Iterator[tuple[Entry, Tensor]]:
    """Yield what a forward has computed, and somebody still holds."""
    for builder in recorder.record.builders:
        for entry in builder.entries.values():
            tensor = entry.reference()
            if tensor is not None and entry.node.op not in {"placeholder", "get_attr"}:
                yield entry, tensor


def _storages(model: nn.Module) -> dict[int, str]:
    """Return as what modules keep tensors that are attributes of theirs, by the id of these."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for tensor in () if name.startswith("_") else tensors_in(value):
                found.setdefault(id(tensor), f"as {Place(path, name)}")
    return found


def _misfit(
    model: nn.Module, inputs: Inputs, error: Exception, *, training: bool
) -> ExampleInputsError:
    shapes = [
        tuple(v.shape) if isinstance(v, Tensor) else v
        for v in (*inputs.args, *inputs.kwargs.values())
    ]
    mode = "train" if training else "eval"
    return ExampleInputsError(
        f"{type(model).__name__!r} does not run in {mode} mode on the example inputs of shape "
        f"{shapes}: {first_line(error)}; pass example_inputs that its forward accepts in "
        "both modes (auxiliary heads may want larger images)"
    )


def first_line(error: Exception) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# --------------------------------------------------------------------------------------------------
# Running graphs


class GraphRunner(fx.Interpreter):
    """Runs a graph node by node on a model's tensors.

    The model's forwards and their hooks don't run, since the graph holds what they do; only modules
    that are one operator are called. Writing into the model's tensors changes what is computed.

    Args:
        model: of the structure of the one that was read.
        traced: its graph.
        keep: whether values are kept when nothing reads them any more.
    """

    def __init__(self, model: nn.Module, traced: Traced, *, keep: bool = True) -> None:
        twin = shadow(model)
        set_mode(twin, training=traced.mode == "train")
        for node in traced.graph.find_nodes(op="call_module"):
            for name in HOOKS:  # they are in the graph
                getattr(twin.get_submodule(str(node.target)), name).clear()
        for node in traced.graph.find_nodes(op="get_attr"):
            place = node.meta.get("place")
            if isinstance(place, Place) and place.new is not None:
                place.set(twin, place.get(twin))
        for name, constant in traced.constants.items():
            setattr(twin, name, constant)
        super().__init__(twin, garbage_collect_values=not keep, graph=traced.graph)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward of a module; a class may do more when it is called."""
        return self.fetch_attr(target).forward(*args, **kwargs)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a node's call, in lists of its own that it may write into."""
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
