"""Kernel relaxation and fine-tuning: the small network's own kernels learn from the teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchcap import processes
from torchcap.batches import Batches, Source, as_source
from torchcap.errors import ModelError
from torchcap.graph.analyze import Reader
from torchcap.graph.rules import Rules
from torchcap.graph.spaces import SpaceGraph, Tap
from torchcap.modes import outside_inference_mode
from torchcap.projection.moments import JointMoments
from torchcap.training.fit import fit
from torchcap.training.norms import (
    fold_fresh_norms_,
    fresh_norm,
    insert_fresh_norms_,
    refresh_statistics_,
)
from torchcap.training.progress import OnProgress, Watch
from torchcap.training.recipe import Relaxation
from torchcap.training.regression import Affine, regress
from torchcap.training.replay import evaluated
from torchcap.training.taps import Lift, TeacherPass

_ROWS_PER_BATCH = 8192
_ROWS_PER_CHANNEL = 64


@outside_inference_mode
def relax(
    small: nn.Module,
    teacher: nn.Module,
    data: Batches,
    schedule: Relaxation | None = None,
    *,
    seed: int = 0,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Rules | None = None,
    on_progress: OnProgress | None = None,
    **changes: Any,
) -> None:
    """Train the kernels of a compressed model towards its teacher's features and logits, in place.

    Features are compared at the outputs of residual blocks, or behind each layer that reads what
    was cut; where they have fewer channels than the teacher's, through the linear map that predicts
    the teacher's best, found once at the beginning. Norms run on their statistics, and dropout is
    off. The parameters that train are those that require gradients.

    Args:
        small: a compressed model, of the class and structure of ``teacher``; it is changed.
        teacher: the original model; it is not changed.
        data: batches of images; or of ``(images, labels)``, if the schedule gives labels a weight.
        schedule: epochs, optimizer and losses; by default those of :class:`Relaxation`.
        seed: of the passes over the data, and of augmentation.
        leaves: as for :func:`torchcap.analyze`.
        rules: as for :func:`torchcap.analyze`.
        on_progress: called after every step.
        changes: values of the schedule that are to be others: ``epochs=5``, ``labels=1.0``…

    Raises:
        RecipeError: if a value of the schedule is out of range.
        DataError: if the data is empty, not finite, can be passed over only once, or its labels
            are missing or out of range.
        TrainingError: if the loss is not finite; ``small`` then has the weights of an earlier step.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.5.2 and 3.5.3.
    """
    schedule = (schedule or Relaxation()).but(**changes)
    watch = Watch("relaxation", on_progress)
    source = as_source(data, small, seed)
    train_kernels(small, teacher, source, schedule, Reader(leaves, rules), watch)


@outside_inference_mode
def fine_tune(
    small: nn.Module,
    teacher: nn.Module,
    data: Batches,
    schedule: Relaxation | None = None,
    *,
    seed: int = 0,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Rules | None = None,
    on_progress: OnProgress | None = None,
    **changes: Any,
) -> None:
    """Train the kernels by the mixture loss, in place: labels, and the teacher beside them.

    The same as :func:`relax` with other weights: cross entropy and distillation lead, and the
    reconstruction of features holds the network in place.

    Args:
        small: as for :func:`relax`; it is changed.
        teacher: as for :func:`relax`.
        data: batches of ``(images, labels)``.
        schedule: by default that of :class:`Relaxation`, with ``labels=1`` and
            ``reconstruction=0.1``.
        seed: as for :func:`relax`.
        leaves: as for :func:`torchcap.analyze`.
        rules: as for :func:`torchcap.analyze`.
        on_progress: called after every step.
        changes: values of the schedule that are to be others: ``epochs=5``…

    Raises:
        RecipeError, DataError, TrainingError: as for :func:`relax`.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.5.3 (mixture loss).
    """
    schedule = (schedule or Relaxation(reconstruction=0.1, labels=1.0)).but(**changes)
    watch = Watch("fine-tuning", on_progress)
    source = as_source(data, small, seed)
    train_kernels(small, teacher, source, schedule, Reader(leaves, rules), watch)


def train_kernels(
    small: nn.Module,
    teacher: nn.Module,
    source: Source,
    schedule: Relaxation,
    reader: Reader,
    watch: Watch,
) -> None:
    """Train the kernels of a small model, in place; see :func:`relax`."""
    first = source.first()
    evaluated(small, first)  # data that cannot be used is refused before anything changes
    inputs = first.inputs
    if not any(p.requires_grad for p in small.parameters()):
        raise ModelError(
            f"no parameter of the small {type(small).__name__!r} requires a gradient; call "
            "small.requires_grad_(True) first"
        )
    graphs = reader(small, inputs), reader(teacher, inputs)
    pairs = _pairs(*graphs)
    schedule = _without_places(schedule, small) if not pairs else schedule
    with evaluating(small), in_float32(small) as widened:
        source = source.in_float32() if widened else source
        lifts = _lifts(small, teacher, pairs, source) if schedule.reconstruction > 0 else None
        folds = graphs[1].folds if schedule.batch_norm else ()
        fresh = insert_fresh_norms_(small, folds, source)
        ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        own = graphs[1].written
        passed = TeacherPass(teacher, ours, lifts, twins=theirs, own=own, always=True)
        passed.attach(small)
        try:
            for layer in fresh if schedule.batch_statistics else ():
                fresh_norm(layer).train()
            trained = [p for p in small.parameters() if p.requires_grad]
            fit(small, trained, source, schedule, watch)
            if schedule.batch_statistics:
                refresh_statistics_(small, fresh, source)
        finally:
            passed.detach()
            fold_fresh_norms_(fresh)


def _without_places(schedule: Relaxation, small: nn.Module) -> Relaxation:
    """Leave the reconstruction out for a model without a place where features can be compared."""
    if schedule.distillation == 0 and schedule.labels == 0:
        raise ModelError(
            f"{type(small).__name__!r} has no place where its features can be compared with the "
            "teacher's; give distillation a weight"
        )
    return schedule.but(reconstruction=0.0)


def _pairs(ours: SpaceGraph, theirs: SpaceGraph) -> list[tuple[Tap, Tap]]:
    """Return the places where both models can be looked at, by the name of their value."""
    twins = {tap.name: tap for tap in theirs.taps}
    return [(tap, twins[tap.name]) for tap in ours.taps if tap.name in twins]


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[bool]:
    """Keep what a model has in float16 in float32 for a while: small steps would round to none.

    Yields:
        whether there is any.
    """

    def named() -> dict[str, Tensor]:
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    half = {name: t for name, t in named().items() if t.dtype == torch.float16}
    for tensor in half.values():
        tensor.data = tensor.data.float()
    try:
        yield bool(half)
    finally:
        for name, tensor in named().items():
            if name in half:
                tensor.data = tensor.data.half()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True, slots=True)
class LeastSquares:
    """Lifts features by the affine map that predicts the teacher's best."""

    map: Affine

    def __call__(self, rows: Tensor) -> Tensor:
        """Lift ``(kept, columns)`` to ``(channels, columns)``."""
        kind = torch.promote_types(rows.dtype, torch.float32)
        weight, bias = self.map.weight[0].to(kind), self.map.bias[0].to(kind)
        return weight.mT @ rows.to(kind) + bias.unsqueeze(1)


class _LiftSearch(TeacherPass):
    """Gathers, at every tap with fewer channels than the teacher's, what a lift is found from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, always=True, **kwargs)
        self.moments: dict[int, JointMoments] = {}

    def _compare(self, index: int, feature: Tensor) -> None:
        expected = self._features.pop(index, None)
        if expected is None:
            return
        self.terms[self.taps[index].name] = feature.new_zeros(())
        dim = self.taps[index].dim
        narrow, wide = feature.shape[dim], expected.shape[dim]
        if narrow == wide:
            return
        if index not in self.moments:
            self.moments[index] = JointMoments(1, narrow, wide, device=feature.device)
        moments = self.moments[index]
        rows = feature.movedim(dim, -1).reshape(-1, narrow)
        targets = expected.movedim(dim, -1).reshape(-1, wide)
        draw = torch.randperm(len(rows))[:_ROWS_PER_BATCH].to(rows.device)
        moments.update(rows[draw].unsqueeze(0), targets[draw].unsqueeze(0))

    def enough(self) -> bool:
        """Whether every process has seen enough: they read on, or stop, together."""
        found = all(m.count >= _ROWS_PER_CHANNEL * m.inputs for m in self.moments.values())
        return bool(processes.smallest(int(found)))


@torch.no_grad()
def _lifts(
    small: nn.Module, teacher: nn.Module, pairs: Sequence[tuple[Tap, Tap]], source: Source
) -> list[Lift | None]:
    """Find how the features of a small model lift to the teacher's, where they are fewer."""
    search = _LiftSearch(teacher, [m for m, _ in pairs], twins=[twin for _, twin in pairs])
    search.attach(small)
    try:
        with source.passing(0) as batches:
            for number, batch in enumerate(batches):
                batch.run(small)
                if number + 1 >= len(source) or search.enough():
                    break
    finally:
        search.detach()
    lifts: list[Lift | None] = [None] * len(pairs)
    for index, moments in search.moments.items():
        moments.reduce()
        zero = Affine(torch.zeros_like(moments.cross_moment), torch.zeros_like(moments.output_mean))
        lifts[index] = LeastSquares(regress(moments, zero, ridge=1e-4))
    return lifts
