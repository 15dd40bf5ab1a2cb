"""The training loop: parameters, a recipe, data; with a state that can be saved and continued.

A step depends on its number alone: the pass is seeded by its epoch, and augmentation by the step.
So a run that was killed and goes on from a saved state ends where an uninterrupted one ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcap import processes
from torchcap.batches import Batch, Source, seeded
from torchcap.errors import DataError, TrainingError
from torchcap.training.losses import distillation_loss, reconstruction_loss
from torchcap.training.progress import Progress, Watch
from torchcap.training.recipe import Training
from torchcap.training.taps import TeacherPass
from torchcap.transform.student import find_attachment

_SNAPSHOT_EVERY = 50  # steps; what a loss that is not finite falls back to


def fit(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    source: Source,
    training: Training,
    watch: Watch,
    *,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Train parameters of a model, in place.

    The model has a :class:`TeacherPass` that is always on. It stays in the mode that it is in.

    Raises:
        DataError: if a batch cannot be used: not finite, of a wrong shape, labels out of range.
        TrainingError: if the loss or a parameter is not finite. The parameters then are those of an
            earlier step.
    """
    try:
        _take_steps(model, parameters, source, training, watch, after_step)
    finally:
        for parameter in parameters:
            parameter.grad = None


@torch.enable_grad()  # whatever the caller is in
def _take_steps(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    source: Source,
    training: Training,
    watch: Watch,
    after_step: Callable[[], None] | None,
) -> None:
    passed = find_attachment(model, TeacherPass)
    assert passed is not None  # noqa: S101 - the callers attach one
    optimizer = training.optimizer(parameters)
    length = len(source)
    total = training.epochs * length
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _step_sizes(training, total))
    step = _resumed(watch, model, optimizer, schedule)
    good = _snapshot(model)
    for epoch in range(step // length, training.epochs):
        skip = step - epoch * length
        with source.passing(epoch, skip=skip) as batches:
            for batch in _first(batches, length - skip):
                with seeded(source.seed, epoch, batch.number, processes.rank()):
                    loss, reconstruction = _losses(model, batch, training)
                    place = f"step {step + 1} of {total} of the {watch.name}"
                    # All processes stop together: one that went on would wait for the others.
                    if not processes.smallest(int(math.isfinite(loss.item()))):
                        _restore(model, good)
                        raise _broken(f"the loss of {place}", training, _origin(loss, passed))
                    if step % _SNAPSHOT_EVERY == 0:
                        good = _snapshot(model)
                    _descend(loss, parameters, optimizer, training.clip)
                    if not _finite(parameters):
                        _restore(model, good)
                        raise _broken(f"a weight after {place}", training)
                schedule.step()
                if after_step is not None:
                    after_step()
                step += 1
                if watch.on_progress is not None:
                    watch.on_progress(
                        Progress(watch.name, step, total, loss.item(), reconstruction)
                    )
                if watch.keeper is not None and step < total:
                    watch.keeper.keep(step, partial(_state, model, optimizer, schedule, step))
        if step < (epoch + 1) * length:
            raise DataError(
                f"pass {epoch} of the data had {step - epoch * length} batches, and an earlier one "
                f"{length}; data has to give as many in every pass"
            )


def _descend(
    loss: Tensor,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    clip: float | None,
) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    _average_gradients(parameters)
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def _losses(model: nn.Module, batch: Batch, training: Training) -> tuple[Tensor, float]:
    output = batch.augmented(training.augment).run(model)
    terms: list[Tensor] = []
    reconstruction = 0.0
    if training.reconstruction > 0:
        term = reconstruction_loss(model)
        reconstruction = term.item()
        terms.append(training.reconstruction * term)
    if training.distillation > 0:
        term = distillation_loss(model, output, temperature=training.temperature)
        terms.append(training.distillation * term)
    if training.labels > 0:
        terms.append(training.labels * cross_entropy(output, batch))
    return torch.stack([term.double() for term in terms]).sum(), reconstruction


def cross_entropy(output: Any, batch: Batch) -> Tensor:
    """Return the cross entropy of logits with the labels of a batch.

    Raises:
        DataError: if labels are missing, out of range or of a wrong shape, or the output is no
            tensor of logits.
    """
    if batch.labels is None:
        raise DataError(
            f"the recipe gives labels a weight, and batch {batch.number} of the data has none; "
            "give (images, labels), or set labels=0 to learn from the teacher alone"
        )
    if not isinstance(output, Tensor):
        raise DataError(
            f"labels need a model that puts out one tensor of logits, got {type(output).__name__}; "
            "set labels=0 to learn from the teacher alone"
        )
    labels = batch.labels
    if not labels.is_floating_point():
        classes = output.shape[1]
        valid = (labels >= 0) & (labels < classes) | (labels == -100)
        if not bool(valid.all()):
            wrong = int(labels[~valid].flatten()[0])
            raise DataError(
                f"batch {batch.number} of the data has a label {wrong}; the model has {classes} "
                f"classes, so labels must be within 0..{classes - 1}"
            )
        labels = labels.long()
    try:
        return F.cross_entropy(output, labels)
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"the labels of batch {batch.number} of the data, {tuple(labels.shape)} {labels.dtype},"
            f" do not fit logits {tuple(output.shape)}: {error}"
        ) from error


def _step_sizes(training: Training, total: int) -> Callable[[int], float]:
    rising = max(1, round(training.warmup * total))
    largest = min(1.0, total / training.healing)

    def factor(step: int) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * step / total))
        return largest * min(1.0, (step + 1) / rising) * fall

    return factor


def _first(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    for _ in range(count):
        batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _resumed(watch: Watch, model: nn.Module, optimizer: Any, schedule: Any) -> int:
    """Load the state that was kept, if there is one, and return the number of steps done."""
    state = watch.keeper.resume() if watch.keeper is not None else None
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])


def _state(model: nn.Module, optimizer: Any, schedule: Any, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])


@torch.no_grad()
def _finite(tensors: Sequence[Tensor]) -> bool:
    # A sum is finite where all of its terms are, and takes a tenth of the time of isfinite().
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).double() for t in tensors]
    return bool(torch.stack(sums).isfinite().all())


def _origin(loss: Tensor, passed: TeacherPass) -> str:
    """Return where a loss that is not finite comes from."""
    if math.isfinite(loss.item()):
        return ", in another process"
    broken = [tap for tap, term in passed.terms.items() if not math.isfinite(term.item())]
    return f", first at the features of {broken[0]!r}" if broken else ", at the output of the model"


def _broken(what: str, training: Training, place: str = "") -> TrainingError:
    return TrainingError(
        f"{what} is not finite{place}; the weights are those of an earlier step. Try a smaller "
        f"step size than {training.optimizer}, or clip="
    )


def _average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients over all processes, as DistributedDataParallel does."""
    if processes.count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = processes.mean_(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(
        gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))
