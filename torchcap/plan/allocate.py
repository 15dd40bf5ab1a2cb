"""Allocation: the ranks that lose least for a budget, from the measured curves of each space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from torchcap.errors import NothingToCompressError, PlanError
from torchcap.graph.spaces import ChannelSpace, SpaceGraph
from torchcap.plan.cost import cost
from torchcap.plan.latency import LatencyTable
from torchcap.plan.limits import Budget, Limits
from torchcap.plan.minimize import minimize
from torchcap.plan.plan import Plan
from torchcap.plan.price import Table, Vector
from torchcap.plan.sensitivity import Curve, Sensitivity

CANDIDATES: Final = 64
"""Ranks that are considered for a space, at most."""

Loss = Literal["output_errors", "errors", "scores"]


def allocate(  # noqa: PLR0913 - an argument for each thing that may be said
    graph: SpaceGraph,
    sensitivity: Sensitivity,
    *,
    macs: float | None = None,
    params: float | None = None,
    activations: float | None = None,
    latency_ms: float | None = None,
    latency: LatencyTable | None = None,
    loss: Loss = "errors",
    multiple_of: int = 1,
    minimum: float | Mapping[str, float] = 0.05,
    fixed: Sequence[str] = (),
) -> Plan:
    """Return the plan that loses least within a budget, if the losses of the spaces add up.

    Exactly one budget is given. What a plan costs is not a sum over the spaces: the layer between
    two of them costs as much as the product of their ranks. Such products, in bottlenecks and along
    plain chains, are part of the optimisation: for each price of the budget's unit the best ranks
    are found exactly, by eliminating one space after the other; the price is then the one at which
    they fit, and what is left of the budget goes where it helps most.

    Args:
        graph: what :func:`torchcap.analyze` found.
        sensitivity: the curves of its free spaces, from :func:`torchcap.sensitivity`; spaces
            without a curve keep their channels.
        macs: multiply-adds: as a share of the model's, within 0 and 1, or as a number above 1.
        params: the same for the number of parameters.
        activations: the same for the number of values that layers write.
        latency_ms: milliseconds of one forward, by the table ``latency``.
        latency: measured times of the layers, from :func:`torchcap.measure_latency`.
        loss: which row of the curves adds up: the errors of the features behind each space, those
            of the output, or what the scores have lost. The first are the least noisy.
        multiple_of: ranks are multiples of this, as far as a space has the channels; those of
            spaces with blocks are multiples of their number of blocks.
        minimum: least share of the channels that a space keeps; or a mapping by name.
        fixed: names of spaces that keep all channels.

    Raises:
        PlanError: if no or several budgets are given, one that cannot be reached, or one that the
            model keeps to as it is; for curves or times of another model, unknown spaces and
            shares outside of (0, 1].
        NothingToCompressError: if no curve belongs to a free space.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 4.1 (the plan "CaP Optimal").
        Everett, "Generalized Lagrange multiplier method", Operations Research 1963.
    """
    if loss not in get_args(Loss):
        raise PlanError(f"loss is one of {', '.join(get_args(Loss))}; got {loss!r}")
    limits = Limits(
        macs=macs,
        params=params,
        activations=activations,
        latency_ms=latency_ms,
        latency=latency,
        multiple_of=multiple_of,
        minimum=minimum,
        fixed=fixed,
    )
    curves = _curves(graph, sensitivity)
    losses = {n: _losses(curve, loss, sensitivity.baseline) for n, curve in curves.items()}
    search = _search(graph, limits, losses)
    chosen = dict(zip(search.budget.price.spaces, map(int, search.ranks()), strict=True))
    return Plan.of(graph, {name: rank for name, rank in chosen.items() if name in curves})


def check_reachable(graph: SpaceGraph, limits: Limits, fewest: Mapping[str, int]) -> None:
    """Raise what :func:`allocate` would raise for its limits, before there are any curves.

    Args:
        graph: what :func:`torchcap.analyze` found.
        limits: of the plan.
        fewest: space name -> the fewest channels that its curve is going to be measured at.

    Raises:
        PlanError: as for :func:`allocate`.
    """
    nothing = {name: {rank: 0.0, graph[name].channels: 0.0} for name, rank in fewest.items()}
    _search(graph, limits, nothing).cheapest()


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """The ranks that are considered for a space, rising, and what each of them loses."""

    ranks: Vector
    losses: Vector


class _Search:
    """Looks for the ranks of least loss within a budget.

    Attributes:
        ladders: of each space.
        budget: what ranks may cost together.
    """

    def __init__(self, ladders: Sequence[Ladder], budget: Budget) -> None:
        self.ladders, self.budget, self.most = ladders, budget, budget.most
        self.sizes = [len(ladder.ranks) for ladder in ladders]
        self.losses: list[Table] = [((i,), ladder.losses) for i, ladder in enumerate(ladders)]
        self.costs = list(budget.price.tables([ladder.ranks for ladder in ladders]))

    def ranks(self) -> Vector:
        """Return the ranks.

        Raises:
            PlanError: if the budget cannot be reached.
        """
        tried = [self.cheapest(), self._uniform(), *self._by_price()]
        fitting = [chosen for chosen in tried if self._cost(chosen) <= self.most]
        return self._at(self._filled(min(fitting, key=self._loss)))

    def cheapest(self) -> list[int]:
        """Return where on the ladders the ranks stand that cost least.

        Raises:
            PlanError: if the budget cannot be reached.
        """
        cheapest = minimize(self.sizes, self.costs)
        if (cost := self._cost(cheapest)) > self.most:
            raise PlanError(
                f"a budget of {self.most:,.6g} {self.budget.unit} cannot be reached: with the "
                f"fewest channels that are allowed the model costs {cost:,.6g}. Raise the budget, "
                "lower the least share that a space keeps (minimum), measure smaller shares, or "
                "let residual streams be spaces too (streams)"
            )
        return cheapest

    def _uniform(self) -> list[int]:
        """Return the largest ranks that are about the same share of every space, and fit."""
        chosen = [0] * len(self.ladders)
        for share in np.linspace(0, 1, 101):
            wanted = [share * ladder.ranks[-1] for ladder in self.ladders]
            tried = [
                max(0, int(np.searchsorted(ladder.ranks, rank, "right")) - 1)
                for ladder, rank in zip(self.ladders, wanted, strict=True)
            ]
            if self._cost(tried) <= self.most:
                chosen = tried
        return chosen

    def _by_price(self) -> list[list[int]]:
        """Return the best ranks at several prices of a unit of the budget, about where they fit."""
        low, high = 0.0, 1e-9 / max(self.most, 1e-9)
        found = [self._best(0.0)]
        if self._cost(found[0]) <= self.most:
            return found
        while self._cost(found[-1]) > self.most and high < _HIGHEST_PRICE:
            low, high = high, 4 * high
            found.append(self._best(high))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found.append(self._best(middle))
            if self._cost(found[-1]) > self.most:
                low = middle
            else:
                high = middle
        return found

    def _best(self, price: float) -> list[int]:
        """Return the ranks of least loss plus cost, at a price for a unit of cost."""
        costs = [(variables, price * table) for variables, table in self.costs]
        return minimize(self.sizes, [*self.losses, *costs])

    def _filled(self, chosen: list[int]) -> list[int]:
        """Spend what is left of the budget, space by space, where it takes most loss away."""
        chosen = list(chosen)
        while True:
            cost = self._cost(chosen)
            best, worth = None, 0.0
            for space, ladder in enumerate(self.ladders):
                for index in range(chosen[space] + 1, self.sizes[space]):
                    gain = ladder.losses[chosen[space]] - ladder.losses[index]
                    tried = [*chosen[:space], index, *chosen[space + 1 :]]
                    added = self._cost(tried) - cost
                    if cost + added > self.most:
                        break
                    rate = gain / max(added, 1e-12)
                    if gain > 0 and rate > worth:
                        best, worth = tried, rate
            if best is None:
                return chosen
            chosen = best

    def _at(self, chosen: Sequence[int]) -> Vector:
        return np.array([ladder.ranks[i] for ladder, i in zip(self.ladders, chosen, strict=True)])

    def _cost(self, chosen: Sequence[int]) -> float:
        return self.budget.price.total(self._at(chosen))

    def _loss(self, chosen: Sequence[int]) -> float:
        return float(sum(ladder.losses[i] for ladder, i in zip(self.ladders, chosen, strict=True)))


def _search(
    graph: SpaceGraph, limits: Limits, losses: Mapping[str, Mapping[int, float]]
) -> _Search:
    """Set up the search, where spaces without measured losses keep their channels."""
    ladders = [
        _ladder(space, losses[space.name], limits.lowest(space), limits.multiple_of)
        if space.name in losses and space.name not in limits.fixed
        else Ladder(np.array([float(space.channels)]), np.zeros(1))
        for space in graph.free
    ]
    return _Search(ladders, limits.budget(graph))


_HALVINGS: Final = 30
_HIGHEST_PRICE: Final = 1e12


def _losses(curve: Curve, loss: Loss, baseline: float) -> Mapping[int, float]:
    """Return the measured losses by rank: more channels never lose more, and all lose nothing."""
    if loss == "scores":
        measured = np.maximum(baseline - np.array(curve.scores), 0.0)
    else:
        measured = np.array(getattr(curve, loss))
    falling = np.maximum.accumulate(measured[::-1])[::-1]
    return dict(zip(curve.ranks, map(float, falling), strict=True)) | {curve.channels: 0.0}


def _ladder(
    space: ChannelSpace, losses: Mapping[int, float], lowest: float, multiple_of: int
) -> Ladder:
    """Return the ranks that a space may get, and their losses, between those that were measured.

    Between two ranks the logarithm of the loss is linear.
    """
    step = space.blocks if space.blocks > 1 else multiple_of
    first = min(space.channels, int(-(-max(lowest, min(losses)) // step)) * step)
    ranks = np.unique([*range(first, space.channels, step), space.channels])
    if len(ranks) > CANDIDATES:
        ranks = ranks[np.unique(np.linspace(0, len(ranks) - 1, CANDIDATES).round().astype(int))]
    known, lost = np.array(list(losses)), np.array(list(losses.values()))
    floor = max(float(lost.max()), 1e-12) * 1e-6
    between = np.exp(np.interp(ranks, known, np.log(lost + floor))) - floor
    return Ladder(ranks.astype(float), np.maximum(between, 0.0))


def _curves(graph: SpaceGraph, sensitivity: Sensitivity) -> dict[str, Curve]:
    """Return the curves by space, if they are those of this graph."""
    curves = {curve.space: curve for curve in sensitivity.curves}
    channels = {space.name: space.channels for space in graph.free}
    other = [n for n, c in curves.items() if channels.get(n) != c.channels]
    if other:
        raise PlanError(
            f"the curves were measured on another model ({sensitivity.model!r}): {graph.model!r} "
            f"has no free space {other[0]!r} of {curves[other[0]].channels} channels; measure the "
            "sensitivity of this one"
        )
    counted = cost(graph).parameters
    if sensitivity.parameters not in {0, counted}:
        raise PlanError(
            f"the curves were measured on another model ({sensitivity.model!r}, of "
            f"{sensitivity.parameters:,} parameters, norms folded) than this {graph.model!r} of "
            f"{counted:,}; measure the sensitivity of this one"
        )
    if not curves:
        raise NothingToCompressError(
            f"there are no curves of {graph.model!r} to allocate by; measure its sensitivity"
        )
    return curves
