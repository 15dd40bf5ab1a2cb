"""Limits: what a plan may cost, and how few channels its spaces may keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from numbers import Real
from typing import Final

from torchcap.errors import PlanError
from torchcap.graph.spaces import ChannelSpace, SpaceGraph
from torchcap.plan import price as prices
from torchcap.plan.latency import LatencyPrice, LatencyTable
from torchcap.plan.price import Price, as_vector

_COUNTED: Final = {
    "macs": ("multiply-adds", prices.multiply_adds),
    "params": ("parameters", prices.parameters),
    "activations": ("activations", prices.activations),
}


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """What may be paid.

    Attributes:
        price: what ranks cost.
        most: that they may cost.
        unit: of both, for messages.
    """

    price: Price
    most: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Limits:
    """What an allocation keeps to: the arguments of :func:`torchcap.allocate` of these names.

    Raises:
        PlanError: if no or several budgets are given, or a value is out of its range.
    """

    macs: float | None = None
    params: float | None = None
    activations: float | None = None
    latency_ms: float | None = None
    latency: LatencyTable | None = None
    multiple_of: int = 1
    minimum: float | Mapping[str, float] = 0.05
    fixed: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(given := self._given) != 1:
            raise PlanError(
                "give exactly one budget: macs=, params=, activations= or latency_ms=; got "
                f"{', '.join(given) or 'none'}"
            )
        for name, value in given.items():
            if not _is_number(value) or not value > 0:
                raise PlanError(f"{name} is a positive budget; got {value!r}")
        if not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise PlanError(f"multiple_of is a whole number from 1 on; got {self.multiple_of!r}")
        shares = self.minimum
        for share in shares.values() if isinstance(shares, Mapping) else [shares]:
            if not _is_number(share) or not 0 < share <= 1:
                raise PlanError(
                    f"minimum is a share of the channels, 0 < minimum <= 1; got {share!r}"
                )

    def budget(self, graph: SpaceGraph) -> Budget:
        """Return what may be paid for a model.

        Raises:
            PlanError: for names of spaces that are not there; for times of another model, or none;
                if the model costs less than the budget already.
        """
        self._check_names(graph)
        timed = self.latency_ms is not None
        budget, costs = self._timed(graph) if timed else self._counted(graph)
        if budget.most > costs * (1 + 1e-9):
            raise PlanError(
                f"a budget of {budget.most:,.6g} {budget.unit} leaves {graph.model!r} as it is: it "
                f"costs {costs:,.6g} already; give a smaller budget"
            )
        return budget

    def lowest(self, space: ChannelSpace) -> float:
        """Return how many channels a space keeps at least."""
        if space.name in self.fixed:
            return space.channels
        if isinstance(self.minimum, Mapping):
            return self.minimum.get(space.name, 0.0) * space.channels
        return self.minimum * space.channels

    @property
    def _given(self) -> dict[str, float]:
        budgets = {name: getattr(self, name) for name in (*_COUNTED, "latency_ms")}
        return {name: value for name, value in budgets.items() if value is not None}

    def _check_names(self, graph: SpaceGraph) -> None:
        named = {*self.fixed, *(self.minimum if isinstance(self.minimum, Mapping) else ())}
        if unknown := sorted(named - {space.name for space in graph.free}):
            raise PlanError(
                f"{graph.model!r} has no free space {', '.join(map(repr, unknown))}; see "
                "print(analyze(model))"
            )

    def _timed(self, graph: SpaceGraph) -> tuple[Budget, float]:
        """Return the budget in milliseconds, and what the model takes."""
        if self.latency is None:
            raise PlanError(
                "a budget in milliseconds needs latency=, the times of the model's layers; "
                "measure them on the target device: measure_latency(model)"
            )
        price = LatencyPrice(graph, self.latency)
        return Budget(price, self._given["latency_ms"], "milliseconds"), _full(graph, price)

    def _counted(self, graph: SpaceGraph) -> tuple[Budget, float]:
        """Return the budget of what can be counted, and what the model costs."""
        ((name, value),) = self._given.items()
        unit, make = _COUNTED[name]
        price = make(graph)
        # Of parameters a share is of those that the model has now: folding may add biases.
        full = _full(graph, price)
        now = sum(map(prod, graph.tensors.values())) if name == "params" else full
        most = value * now if value <= 1 else float(value)
        return Budget(price, most, unit), max(now, full)


def _full(graph: SpaceGraph, price: Price) -> float:
    channels = {space.name: space.channels for space in graph.free}
    return price.total(as_vector(price.spaces, channels))


def _is_number(value: object) -> bool:
    """Whether a value is a finite number of any kind (NumPy's, say), and no truth value."""
    return not isinstance(value, bool) and isinstance(value, Real) and isfinite(value)
