"""Rounds: which projections train together, and which are there meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchcap.graph.spaces import SpaceGraph
from torchcap.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Round:
    """One round of training.

    Attributes:
        train: names of the spaces whose projections train.
        present: names of the spaces that are projected meanwhile; the others have full width.
    """

    train: tuple[str, ...]
    present: tuple[str, ...]


Rounds = Callable[[SpaceGraph, Plan], tuple[Round, ...]]


def all_at_once(graph: SpaceGraph, plan: Plan) -> tuple[Round, ...]:
    """Train every projection in one round."""
    names = _ordered(graph, plan)
    return (Round(names, names),)


def odd_then_even(graph: SpaceGraph, plan: Plan) -> tuple[Round, ...]:
    """Train the odd layers of every block in one round, then the even ones.

    Where one layer reads a space and writes the next, both trained at once would move each other's
    target. So every second space of such a chain waits for the others. Without a chain (basic
    blocks) there is one round.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.5.1.
    """
    names = _ordered(graph, plan)
    writers = {name: {port.module for port in graph[name].producers} for name in names}
    readers = {name: {port.module for port in graph[name].consumers} for name in names}
    parity: dict[str, int] = {}
    for name in names:  # in the order of the forward: what a space follows has its parity
        before = [parity[other] for other in parity if readers[other] & writers[name]]
        parity[name] = 1 - max(before) if before else 0
    groups = [tuple(name for name in names if parity[name] == side) for side in (0, 1)]
    return tuple(Round(group, names) for group in groups if group)


def layer_by_layer(graph: SpaceGraph, plan: Plan) -> tuple[Round, ...]:
    """Train one projection after the other, with the layers behind it at full width.

    This is how the paper compresses plain networks (VGG), sec. 3.4.
    """
    names = _ordered(graph, plan)
    return tuple(Round((name,), names[: index + 1]) for index, name in enumerate(names))


def _ordered(graph: SpaceGraph, plan: Plan) -> tuple[str, ...]:
    """Return the planned spaces in the order of the forward."""
    return tuple(space.name for space in graph.spaces if space.name in plan.choices)
