"""What a plan costs: multiply-adds, parameters and activations of the materialized model, exactly.

Convention: one multiply-add counts as one, and only convolutions and linear layers count, in
evaluation mode on the example inputs. This is what fvcore reports for its operators ``conv`` and
``linear``; it counts norms and pools besides. The projections of ``nn.MultiheadAttention`` count as
linear layers. What no layer does is not counted: products of queries, keys and values, and
convolutions and linear maps that are called as functions.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Literal

from torchcap.graph.spaces import LayerCall, SpaceGraph
from torchcap.plan.plan import Plan

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one forward on the example inputs.

    Attributes:
        macs: multiply-adds of convolutions and linear layers.
        parameters: number of trained values.
        activations: number of values that convolutions and linear layers write.
    """

    macs: int
    parameters: int
    activations: int


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one convolution or linear layer costs in one forward on the example inputs.

    Attributes:
        layer: qualified name of the layer, ``""`` for a model that is one itself.
        kind: ``"conv"`` or ``"linear"``.
        shape: of the weight, ``(out, in / groups, …)``, or ``(in, out / groups, …)`` of a
            transposed convolution.
        macs: multiply-adds of all its calls.
        parameters: number of its trained values; those that it shares with another layer count
            where the model names them first.
        activations: number of values that its calls write.
    """

    layer: str
    kind: Literal["conv", "linear"]
    shape: tuple[int, ...]
    macs: int
    parameters: int
    activations: int


def cost(graph: SpaceGraph, plan: Plan | None = None) -> Cost:
    """Predict the cost of the model that ``materialize`` gives for a plan.

    Args:
        graph: what :func:`torchcap.analyze` found.
        plan: ranks; None for the folded model at its full width.

    Raises:
        PlanError: if the plan does not fit the graph.
    """
    shapes = _planned_shapes(graph, plan)
    layers = costs_of_calls(_planned_calls(graph, plan), shapes)
    return Cost(
        sum(layer.macs for layer in layers),
        sum(map(prod, shapes.values())),
        sum(layer.activations for layer in layers),
    )


def layer_costs(graph: SpaceGraph, plan: Plan | None = None) -> tuple[LayerCost, ...]:
    """Predict the cost of every layer of the model that ``materialize`` gives for a plan.

    Args:
        graph: what :func:`torchcap.analyze` found.
        plan: ranks; None for the folded model at its full width.

    Returns:
        The convolutions and linear layers that run, in the order of their first calls. Their
        multiply-adds and activations add up to those of :func:`cost`.

    Raises:
        PlanError: if the plan does not fit the graph.

    Examples:
        >>> import torch, torchcap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3))
        >>> graph = torchcap.analyze(net, torch.zeros(1, 3, 8, 8))
        >>> for layer in layer_costs(graph, torchcap.Plan.of(graph, {"0": 2})):
        ...     print(layer.layer, layer.kind, layer.shape, layer.macs, layer.parameters)
        0 conv (2, 3, 3, 3) 1944 56
        1 conv (4, 2, 3, 3) 1152 76
    """
    shapes = _planned_shapes(graph, plan)
    return costs_of_calls(_planned_calls(graph, plan), shapes)


def costs_of_calls(calls: Iterable[LayerCall], shapes: Shapes) -> tuple[LayerCost, ...]:
    """Return the costs of the layers that were called.

    Args:
        calls: of one forward.
        shapes: of every parameter of the model, by qualified name.
    """
    positions: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    weights: dict[str, tuple[int, ...]] = {}
    for call in calls:
        positions[call.module] += call.positions
        # Weights that are tied or parametrized stand under other names, and never change.
        name = f"{call.module}.weight" if call.module else "weight"
        weights[call.module] = shape = shapes.get(name, call.shape)
        activations[call.module] += call.written * shape[call.axis]
    parameters: Counter[str] = Counter()
    for name, shape in shapes.items():
        parameters[_owner(name)] += prod(shape)
    return tuple(
        LayerCost(
            layer=layer,
            kind="linear" if len(shape) == 2 else "conv",
            shape=shape,
            macs=positions[layer] * prod(shape),
            parameters=parameters[layer],
            activations=activations[layer],
        )
        for layer, shape in weights.items()
    )


def _owner(tensor: str) -> str:
    """Return the layer that a parameter belongs to, be it parametrized or plain."""
    layer, parametrized, _ = f".{tensor}".partition(".parametrizations.")
    return (layer if parametrized else layer.rpartition(".")[0])[1:]


def _planned_calls(graph: SpaceGraph, plan: Plan | None) -> Iterator[LayerCall]:
    """Yield the calls of a smaller model: some layers run once for each channel beside them."""
    choices = {} if plan is None else plan.choices
    ratios = {n: Fraction(choice.rank, graph[n].channels) for n, choice in choices.items()}
    for call in graph.calls:
        if call.beside is None:
            yield call
            continue
        kept, size = call.beside.kept(ratios), call.beside.size
        positions, written = (count * kept // size for count in (call.positions, call.written))
        yield dataclasses.replace(call, positions=positions, written=written)


def _planned_shapes(graph: SpaceGraph, plan: Plan | None) -> Shapes:
    if plan is not None:
        plan.check(graph)
    return shapes_under(graph.after_folding(), plan.ranks if plan is not None else {})


def shapes_under(graph: SpaceGraph, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter when the named spaces have the given ranks."""
    removed: dict[tuple[str, int, int], int] = {}
    for space in graph.spaces:
        dropped = space.channels - ranks.get(space.name, space.channels)
        for port in space.ports:
            key = (port.tensor, port.axis, port.groups)
            gone = dropped * port.channels // space.channels * port.repeat
            removed[key] = removed.get(key, 0) + gone
    shapes = {name: list(shape) for name, shape in graph.tensors.items()}
    for (tensor, axis, groups), gone in removed.items():
        if tensor in shapes:  # buffers are no parameters
            shapes[tensor][axis] -= gone // groups  # the groups of a layer share its entries
    return {name: tuple(shape) for name, shape in shapes.items()}
