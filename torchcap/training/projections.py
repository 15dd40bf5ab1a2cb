"""Training of the projections, in rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchcap.batches import Batches, Source, as_source
from torchcap.errors import RecipeError
from torchcap.modes import outside_inference_mode
from torchcap.projection.maps import Stiefel
from torchcap.projection.polar import polar
from torchcap.training.fit import fit
from torchcap.training.progress import OnProgress, Watch
from torchcap.training.recipe import Projections
from torchcap.training.relax import evaluating
from torchcap.training.taps import TeacherPass
from torchcap.transform.student import find_attachment, student_of, unwrapped


@outside_inference_mode
def train_projections(
    student: nn.Module,
    data: Batches,
    schedule: Projections | None = None,
    *,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    **changes: Any,
) -> None:
    """Train the projections of a prepared model, in place, in the rounds of the schedule.

    Args:
        student: what :func:`torchcap.prepare` returned.
        data: batches of images; or of ``(images, labels)``, if the schedule gives labels a weight.
        schedule: epochs, optimizer, losses and rounds; by default those of :class:`Projections`.
        seed: of the passes over the data, and of augmentation.
        on_progress: called after every step.
        changes: values of the schedule that are to be others: ``epochs=5``…

    Raises:
        StudentError: if the model is not a prepared one.
        RecipeError: if a value is out of range, or the rounds leave spaces at full width: only
            :func:`torchcap.compress` can do that, since here all of them are projected.
        DataError, TrainingError: as for :func:`torchcap.relax`.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.5.1 and 3.6.
    """
    schedule = (schedule or Projections()).but(**changes)
    state = student_of(student)
    rounds = schedule.rounds(state.graph, state.plan)
    for number, turn in enumerate(rounds):
        if set(turn.present) != set(state.projections):
            raise RecipeError(
                f"round {number} of {getattr(schedule.rounds, '__name__', schedule.rounds)} leaves "
                f"{len(state.projections) - len(turn.present)} spaces at full width, and all of "
                "this model are projected already; use torchcap.compress(), which prepares anew "
                "for every round"
            )
    source = as_source(data, unwrapped(student), seed)
    for turn in rounds:
        train_round(student, turn.train, source, schedule, Watch("projections", on_progress))


def train_round(
    student: nn.Module,
    names: Sequence[str],
    source: Source,
    schedule: Projections,
    watch: Watch,
) -> None:
    """Train the projections of some spaces, in place; the others and frozen ones stay."""
    root = unwrapped(student)
    projections = student_of(root).projections
    stiefel = [p for name in names if isinstance(p := projections[name], Stiefel)]
    ours = [projection for projection in stiefel if projection.proxy.requires_grad]
    if not ours:
        return
    passed = find_attachment(root, TeacherPass)
    assert passed is not None  # noqa: S101 - prepare attaches one
    every = [p.proxy for p in projections.values() if isinstance(p, Stiefel)]
    flags = [proxy.requires_grad for proxy in every]
    trained = [projection.proxy for projection in ours]
    always = passed.always
    try:
        for proxy in every:
            proxy.requires_grad_(any(proxy is mine for mine in trained))
        passed.always = True
        with evaluating(root):
            fit(
                root,
                trained,
                source,
                schedule,
                watch,
                after_step=(lambda: recentre_(ours)) if schedule.recentre else None,
            )
    finally:
        passed.always = always
        for proxy, flag in zip(every, flags, strict=True):
            proxy.requires_grad_(flag)


@torch.no_grad()
def recentre_(projections: Sequence[Stiefel]) -> None:
    """Write every ``P`` back into its proxy, in place: ``P`` stays, the proxy is orthonormal."""
    for projection in projections:
        projection.proxy.copy_(polar(projection.proxy))
