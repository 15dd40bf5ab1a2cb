"""Building the student: projections registered on every port of the planned spaces."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from timm.models.vgg import ConvMlp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from torchcap.graph.sizes import Place
from torchcap.graph.spaces import ChannelSpace, Port, SpaceGraph
from torchcap.graph.weights import output_axis
from torchcap.plan.plan import Plan
from torchcap.projection.maps import Projection, Selection, Stiefel
from torchcap.projection.parametrizations import ProjectAxis, ProjectInput, ProjectOutput, Segment
from torchcap.transform.rewrite import rewrite_
from torchcap.transform.student import FrozenStatistics, Student


@dataclass(frozen=True, slots=True)
class _Axis:
    module: str
    parameter: str
    axis: int
    groups: int


def project_(
    model: nn.Module, graph: SpaceGraph, plan: Plan, bases: Mapping[str, Tensor]
) -> Student:
    """Register the projections of a plan on a folded model, in place, and freeze everything else.

    Args:
        model: a folded copy of the user's model.
        graph: the channel spaces of the user's model, before folding.
        plan: the ranks; it has been checked against the graph.
        bases: space name -> where its ``P`` starts, ``(blocks, channels / blocks, rank / blocks)``.

    Returns:
        the state that has been attached to the model.
    """
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(requires_grad=False)
    folded = graph.after_folding()
    _make_up_for_scales_(model, graph, plan)
    rewrite_(model, graph, plan.choices)
    spaces = {name: folded[name] for name in plan.choices}
    projections = {name: _projection(model, spaces[name], bases[name]) for name in spaces}
    ports: dict[_Axis, list[tuple[Port, ChannelSpace]]] = {}
    for space in spaces.values():
        for port in space.ports:
            key = _Axis(port.module, port.parameter, port.axis, port.groups)
            ports.setdefault(key, []).append((port, space))
    homeless = dict(projections)
    followed = _feature_attributes(model, graph)
    for axis, found in sorted(ports.items(), key=lambda entry: entry[0].axis):
        _register(model, axis, found, projections, homeless)
    ratios = _kept_shares(graph, plan)
    for held in graph.sizes:
        if (size := held.counted.kept(ratios)) != held.counted.size:
            held.place.set(model, size)
    for owner, name, layer, width in followed:
        with contextlib.suppress(AttributeError):  # a read-only property follows by itself
            setattr(owner, name, getattr(layer, width))
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            FrozenStatistics().attach(module)
    student = Student(
        graph=folded,
        plan=plan,
        projections=projections,
        trainable=trainable,
        folds=graph.folds,
    )
    student.attach(model)
    return student


def _kept_shares(graph: SpaceGraph, plan: Plan) -> dict[str, Fraction]:
    return {n: Fraction(choice.rank, graph[n].channels) for n, choice in plan.choices.items()}


@torch.no_grad()
def _make_up_for_scales_(model: nn.Module, graph: SpaceGraph, plan: Plan) -> None:
    """Scale queries whose product is divided by the root of the head's size: it becomes smaller."""
    ratios = _kept_shares(graph, plan)
    for scaled in graph.scaled:
        share = Fraction(scaled.counted.kept(ratios), scaled.counted.size)
        layer = model.get_submodule(scaled.module)
        for tensor in (layer.weight, getattr(layer, "bias", None)):
            for offset, length in scaled.rows if isinstance(tensor, Tensor) else ():
                assert isinstance(tensor, Tensor)  # noqa: S101 - has been seen above
                tensor[offset : offset + length] *= float(share) ** (0.5 * scaled.roots)


def _projection(model: nn.Module, space: ChannelSpace, basis: Tensor) -> Projection:
    """Make the ``P`` of a space, in float32 at least, where its first producer lives."""
    first = space.producers[0]
    like = getattr(model.get_submodule(first.module), first.parameter)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    kind = Selection if space.freedom == "selection" else Stiefel
    return kind(basis.to(device=like.device, dtype=dtype))


def _register(
    model: nn.Module,
    axis: _Axis,
    found: list[tuple[Port, ChannelSpace]],
    projections: Mapping[str, Projection],
    homeless: dict[str, Projection],
) -> None:
    module = model.get_submodule(axis.module)
    length = _stored(module, axis.parameter).shape[axis.axis] * axis.groups
    segments = _segments(found, length, projections)
    parametrization: ProjectAxis
    if any(port in space.consumers for port, space in found):
        parametrization = ProjectInput(segments, groups=axis.groups, axis=axis.axis)
    else:
        owned = [homeless.pop(space.name) for _, space in found if space.name in homeless]
        parametrization = ProjectOutput(segments, owned=owned, axis=axis.axis)
    kept = axis.parameter not in module._non_persistent_buffers_set
    parametrize.register_parametrization(module, axis.parameter, parametrization, unsafe=True)
    if not kept:  # what the state leaves out of the model it leaves out of the student
        held = module.get_submodule(f"parametrizations.{axis.parameter}")
        held._non_persistent_buffers_set.add("original")
    carried = any(port in space.carriers for port, space in found)
    width = sum(segment.kept for segment in segments)
    if carried and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        _set_depthwise_width_(module, width)
    else:
        _set_width_(module, axis.parameter, axis.axis, width)


def _stored(module: nn.Module, name: str) -> Tensor:
    """Return a tensor of a layer as it is stored, without computing its parametrization."""
    if parametrize.is_parametrized(module, name):
        stored = module.parametrizations[name].original  # type: ignore[index, union-attr]
    else:
        stored = getattr(module, name)
    assert isinstance(stored, Tensor)  # noqa: S101 - a port names a tensor
    return stored


def _segments(
    found: list[tuple[Port, ChannelSpace]], length: int, projections: Mapping[str, Projection]
) -> list[Segment]:
    segments: list[Segment] = []
    position = 0
    for port, space in sorted(found, key=lambda entry: entry[0].offset):
        if port.offset > position:
            segments.append(Segment(port.offset - position))
        width = space.channels // space.blocks
        segments.append(
            Segment(
                port.channels * port.repeat,
                projections[space.name],
                port.start // width,
                port.channels // width,
                port.repeat,
            )
        )
        position = port.offset + port.channels * port.repeat
    if position < length:
        segments.append(Segment(length - position))
    return segments


def _set_width_(module: nn.Module, parameter: str, axis: int, width: int) -> None:
    """Set the size attributes of a layer after one axis of a parameter got a new width."""
    written = axis == output_axis(module)
    if isinstance(module, _ConvNd) and parameter == "weight":
        setattr(module, "out_channels" if written else "in_channels", width)
    elif isinstance(module, nn.Linear) and parameter == "weight":
        setattr(module, "out_features" if written else "in_features", width)
    elif isinstance(module, _NormBase):
        module.num_features = width
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = width
    elif isinstance(getattr(module, "normalized_shape", None), tuple):  # layer and RMS norms
        setattr(module, "normalized_shape", (width,))  # noqa: B010 - of no known type
    elif isinstance(module, nn.PReLU):
        module.num_parameters = width


def _set_depthwise_width_(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, width: int) -> None:
    """Set the sizes of a depthwise convolution: input and groups shrink with the output."""
    module.in_channels = module.groups = width * module.in_channels // module.out_channels
    module.out_channels = width


def _feature_attributes(
    model: nn.Module, graph: SpaceGraph
) -> list[tuple[nn.Module, str, nn.Module, str]]:
    """Find timm's size attributes that ``reset_classifier`` builds from; no forward reads them.

    Returns:
        (module, attribute, layer, the layer's attribute that it repeats).
    """
    getter = getattr(model, "get_classifier", None)
    classifier = getter() if callable(getter) else None
    conv = getattr(model, "conv_head", None)  # behind the pooling in the MobileNetV3 family
    sources: list[tuple[nn.Module, str]] = []
    if isinstance(classifier, nn.Linear):
        sources.append((classifier, "in_features"))
    if isinstance(conv, nn.Conv2d):
        sources.append((conv, "in_channels"))
    if isinstance(mlp := getattr(model, "pre_logits", None), ConvMlp):
        sources.append((mlp.fc1, "in_channels"))
    found = []
    for path, owner in (("", model), ("head", getattr(model, "head", None))):
        for name in ("num_features", "head_hidden_size", "in_features"):
            if Place(path, name) in graph.read:
                continue
            value = getattr(owner, name, None)
            fitting = [source for source in sources if getattr(*source) == value]
            if isinstance(owner, nn.Module) and fitting and fitting[0][0] is not owner:
                found.append((owner, name, *fitting[0]))
    return found
