"""What a plan costs: multiply-adds, parameters and activations of the materialized model, exactly.

Convention: one multiply-add counts as one, and only convolutions and linear layers count, in
evaluation mode on the example inputs. This is what fvcore reports for its operators ``conv`` and
``linear``; it counts norms and pools besides. Transposed convolutions, and convolutions that are
called as functions, are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torchcap.graph.spaces import SpaceGraph
from torchcap.plan.plan import Plan


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


def cost(graph: SpaceGraph, plan: Plan | None = None) -> Cost:
    """Predict the cost of the model that ``materialize`` gives for a plan.

    Args:
        graph: what :func:`torchcap.analyze` found.
        plan: ranks; None for the folded model at its full width.

    Raises:
        PlanError: if the plan does not fit the graph.
    """
    if plan is not None:
        plan.check(graph)
    folded = graph.after_folding()
    shapes = shapes_under(folded, plan.ranks if plan is not None else {})
    macs = activations = 0
    for call in folded.calls:
        # Weights that are tied or parametrized stand under other names, and never change.
        shape = shapes.get(f"{call.module}.weight" if call.module else "weight", call.shape)
        macs += call.positions * prod(shape)
        activations += call.positions * shape[0]
    return Cost(macs, sum(prod(shape) for shape in shapes.values()), activations)


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
