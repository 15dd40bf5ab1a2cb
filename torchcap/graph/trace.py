"""Tracing: from a model to FX graphs whose nodes know their shapes.

The graphs are only *read*; the model that runs stays the user's own. A model is traced in
evaluation mode and in training mode, because some layers run in one of them only (the auxiliary
heads of GoogLeNet): a channel may be cut only if every reader in either mode can follow.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import get_notrace_functions, is_notrace_module
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torchvision.models import VisionTransformer
from torchvision.models.inception import Inception3
from torchvision.models.video import MViT, SwinTransformer3d, VideoResNet

from torchcap.errors import ExampleInputsError, ModelError, TraceError

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
LeafRule = Callable[[nn.Module], bool]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Example inputs of a forward, by position and by name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Traced:
    """One reading of a model.

    Attributes:
        module: the graph over the model's own modules; ``node.meta["val"]`` is a fake tensor (or a
            structure of them) with the shape that the example inputs give.
        outputs: graph node -> the (module path, call index) pairs whose output it is, for every
            module that runs, leaf or not.
        mode: ``"eval"`` or ``"train"``.
    """

    module: fx.GraphModule
    outputs: Mapping[fx.Node, tuple[tuple[str, int], ...]]
    mode: str


def trace(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, is_leaf: LeafRule
) -> tuple[Traced, ...]:
    """Read a model's graph in evaluation and in training mode. The model is not changed.

    Args:
        model: any module; a ``GraphModule`` is read as it stands.
        example_inputs: one tensor, a tuple of positional arguments, or a mapping of keyword
            arguments; may be left out where :func:`default_inputs` knows the shape.
        is_leaf: which modules are read as one operator, besides those of ``torch.nn``.

    Returns:
        The evaluation graph first; the training graph after it where it can be traced.

    Raises:
        TraceError: if the forward cannot be traced symbolically in evaluation mode.
        ModelError: if the model cannot be copied.
        ExampleInputsError: if the example inputs are missing, or the model does not accept them.
    """
    inputs = default_inputs(model) if example_inputs is None else as_inputs(example_inputs)
    if isinstance(model, fx.GraphModule):
        graph_module = fx.GraphModule(shadow(model), _copy_graph(model.graph))
        _propagate_shapes(graph_module, model, inputs, "eval")
        return (Traced(graph_module, {}, "eval"),)
    evaluation = _trace_in_mode(model, inputs, is_leaf, training=False)
    readings: tuple[Traced, ...] = (evaluation,)
    # A forward that only traces in evaluation mode (random masks drawn from shapes) is still read.
    with contextlib.suppress(TraceError):
        training = _trace_in_mode(model, inputs, is_leaf, training=True)
        if _signature(training) != _signature(evaluation):
            readings = (evaluation, training)
    for reading in readings:
        _propagate_shapes(reading.module, model, inputs, reading.mode)
    return readings


def shadow(model: nn.Module) -> nn.Module:
    """Copy a model's structure; the copy's tensors share the memory of the original's.

    Raises:
        ModelError: if the model cannot be copied.
    """
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


def as_inputs(example_inputs: ExampleInputs) -> Inputs:
    """Sort example inputs into positional and keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, tuple | list):
        return Inputs(tuple(example_inputs), {})
    return Inputs((example_inputs,), {})


def default_inputs(model: nn.Module) -> Inputs:
    """Return one zero image of the size that a timm or torchvision model was made for.

    Raises:
        ExampleInputsError: if the model carries no sign of its input size.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size: Sequence[int] | None = config.get("input_size") if isinstance(config, Mapping) else None
    if size is None and type(model).__module__.startswith("torchvision.models"):
        size = _torchvision_input_size(model)
    if size is None:
        raise ExampleInputsError(
            f"the input shape of {type(model).__name__!r} is not known: it has no timm "
            "pretrained_cfg and is no torchvision model; pass example_inputs=torch.zeros(...)"
        )
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return Inputs((torch.zeros(1, *size, dtype=parameter.dtype, device=parameter.device),), {})


def _torchvision_input_size(model: nn.Module) -> tuple[int, ...]:
    if isinstance(model, VideoResNet):
        return (3, 16, 112, 112)
    if isinstance(model, MViT | SwinTransformer3d):
        return (3, 16, 224, 224)
    if isinstance(model, Inception3):
        return (3, 299, 299)
    if isinstance(model, VisionTransformer):
        return (3, model.image_size, model.image_size)
    return (3, 224, 224)


class _Reader(fx.Tracer):
    """A tracer that also notes which module call produced which value."""

    def __init__(self, is_leaf: LeafRule) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._is_leaf = is_leaf
        self._calls: dict[str, int] = {}
        self.outputs: dict[fx.Node, list[tuple[str, int]]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            is_notrace_module(type(m))
            or self._is_leaf(m)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        index = self._calls.get(path, 0)
        self._calls[path] = index + 1
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.outputs.setdefault(result.node, []).append((path, index))
        return result


def _trace_in_mode(
    model: nn.Module, inputs: Inputs, is_leaf: LeafRule, *, training: bool
) -> Traced:
    reader = _Reader(is_leaf)
    mode = "train" if training else "eval"
    concrete = _frozen_arguments(model, inputs)
    # Some forwards keep what they compute on the module; a proxy kept there would spoil the model.
    copied = shadow(model)
    _set_mode(copied, training=training)
    try:
        with warnings.catch_warnings(action="ignore"):  # of frozen arguments that are not asserted
            graph = reader.trace(copied, concrete_args=concrete)
    except Exception as error:  # a user's forward may raise anything on a proxy
        raise TraceError(
            f"cannot trace {type(model).__name__!r} in {mode} mode: "
            f"{type(error).__name__}: {error}. Pass the class of the module whose forward "
            "cannot be traced: analyze(model, leaves=[TheClass])"
        ) from error
    graph_module = fx.GraphModule(reader.root, graph)
    outputs = {node: tuple(calls) for node, calls in reader.outputs.items()}
    return Traced(graph_module, outputs, mode)


def _signature(traced: Traced) -> list[tuple[str, str, str]]:
    """Return what tells two graphs of one model apart, down to the flag of a dropout."""
    return [(n.op, str(n.target), str((n.args, n.kwargs))) for n in traced.module.graph.nodes]


def _frozen_arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Freeze the arguments that are no tensors, defaults too, so that branches on them trace."""
    bound = _bind(model, inputs)
    bound.apply_defaults()
    variadic = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return {
        name: bound.arguments[name]
        for name, parameter in bound.signature.parameters.items()
        if parameter.kind not in variadic and not _holds_tensor(bound.arguments[name])
    }


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _bind(model: nn.Module, inputs: Inputs) -> inspect.BoundArguments:
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error


def placeholder_values(model: nn.Module, inputs: Inputs) -> list[Any]:
    """Return a value for every placeholder: the graph has them in the order of the signature."""
    bound = _bind(model, inputs)
    bound.apply_defaults()
    values: list[Any] = []
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            values.extend(bound.arguments[name])
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            values.append(bound.arguments[name])
    return values


def _propagate_shapes(
    graph_module: fx.GraphModule, model: nn.Module, inputs: Inputs, mode: str
) -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    values = placeholder_values(model, inputs)
    try:
        # Shapes are those of evaluation: batch norm refuses one value a channel in training.
        _set_mode(graph_module, training=False)
        with torch.no_grad():
            try:
                FakeTensorProp(graph_module, fake).propagate(*values)
            except DataDependentOutputException:  # a leaf looks at values: run it on real ones
                _RealPropagation(graph_module).run(*values)
    except Exception as error:  # a user's forward may raise anything on a wrong shape
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in values]
        raise ExampleInputsError(
            f"{type(model).__name__!r} does not run in {mode} mode on the example inputs of shape "
            f"{shapes}: {_first_line(error)}; pass example_inputs that its forward accepts in "
            "both modes (auxiliary heads may want larger images)"
        ) from error


class _RealPropagation(fx.Interpreter):
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


def _set_mode(model: nn.Module, *, training: bool) -> None:
    """Set the mode flags, without calling a ``train()`` that a user has overridden."""
    for module in model.modules():
        module.training = training
