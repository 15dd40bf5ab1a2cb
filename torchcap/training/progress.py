"""Progress: where a step of learning stands, told to a callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Progress:
    """Where learning stands.

    Attributes:
        name: what is going on: ``"selection"``, ``"projections"``, ``"closed form"``,
            ``"relaxation"`` or ``"fine-tuning"``.
        step, steps: number of steps done, and of all; a step of a closed form is a layer.
        loss: of the last step, in units of its recipe; of a layer, the error that is left.
        reconstruction: the reconstruction loss in it, unweighted; 0 where it has no weight.
    """

    name: str
    step: int
    steps: int
    loss: float
    reconstruction: float = 0.0


OnProgress = Callable[[Progress], None]


class Keeper(Protocol):
    """Keeps the state of a training that is under way."""

    def resume(self) -> Mapping[str, Any] | None:
        """Return the state to go on from; None to begin."""

    def keep(self, step: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Save a state, if it is time to."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Who looks on while something is learnt.

    Attributes:
        name: of what is learnt, for progress and messages.
        on_progress: called after every step.
        keeper: saves the state, and has the one to go on from.
    """

    name: str
    on_progress: OnProgress | None = None
    keeper: Keeper | None = None
