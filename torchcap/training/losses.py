"""The losses that train projections, each read from the last training-mode forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcap.errors import StudentError
from torchcap.nests import tensors_in
from torchcap.training.taps import TeacherPass
from torchcap.transform.student import find_attachment, student_of


def reconstruction_loss(student: nn.Module) -> Tensor:
    """Return the reconstruction loss of the last training-mode forward.

    It is ``Σ_i ‖I_i − Î_i‖² / ‖I_i‖²`` over the taps, with the teacher's features ``I_i`` and the
    student's ``Î_i`` on its own propagated input; norms are taken over the whole batch. Taps stand
    behind the skip addition (and its activation) of every residual block, and behind the next layer
    where there is none. Features that are compressed themselves are compared in the teacher's
    coordinates, ``P Î_i``.

    Under ``DistributedDataParallel`` the mean over processes is the loss of the whole batch.

    Args:
        student: a prepared model; or the ``DistributedDataParallel`` around one.

    Returns:
        a scalar in float32 (float64 for a float64 student), which ``backward()`` may be called on
        once a forward.

    Raises:
        StudentError: if the model is not a prepared one, or has run no training-mode forward.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.5, eq. 11.
    """
    passed = _teacher_pass(student)
    if not passed.taps:
        raise StudentError(
            f"{type(student).__name__!r} has no place where its features can be compared with the "
            "teacher's; train on distillation_loss(student, output) alone"
        )
    loss = passed.loss
    if loss is None:
        raise StudentError(
            "there is no reconstruction loss yet: run student(x) in training mode first "
            "(student.train(); in eval mode the teacher does not run)"
        )
    return loss


def distillation_loss(student: nn.Module, output: Any, *, temperature: float = 4.0) -> Tensor:
    """Return the distance of the student's output to the teacher's, without labels.

    It is ``T² KL(softmax(t / T) ‖ softmax(s / T))`` over the classes (dimension 1), averaged over
    images and positions, and summed over the outputs where there are several.

    Args:
        student: a prepared model, after a training-mode forward.
        output: what that forward returned: logits ``(N, classes, …)``, or a nested structure of
            them.
        temperature: ``T``; larger values weigh the unlikely classes more.

    Raises:
        StudentError: if no training-mode forward has run, or the output has another structure or
            shape than the teacher's.

    References:
        Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, sec. 2.
    """
    passed = _teacher_pass(student)
    if passed.output is None:
        raise StudentError("there is no teacher output yet: run student(x) in training mode first")
    ours, theirs = _logits(output), _logits(passed.output)
    shapes = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in theirs]
    if shapes[0] != shapes[1] or not ours:
        raise StudentError(
            f"the student's output has shapes {shapes[0]}, the teacher's {shapes[1]}; pass what "
            "student(x) returned, without auxiliary outputs that only training mode has"
        )
    terms = [_divergence(s, t, temperature) for s, t in zip(ours, theirs, strict=True)]
    return torch.stack(terms).sum()


def mixture_loss(
    student: nn.Module,
    output: Any,
    labels: Tensor | None = None,
    *,
    gamma: float = 1.0,
    temperature: float = 4.0,
) -> Tensor:
    """Return the reconstruction loss plus ``gamma`` times the classification loss.

    Args:
        student: a prepared model, after a training-mode forward.
        output: what that forward returned: logits ``(N, classes, …)``.
        labels: class indices, as ``cross_entropy`` takes them; None for distillation to the
            teacher's logits in their place.
        gamma: weight of the classification loss.
        temperature: of the distillation.

    Raises:
        StudentError: if no training-mode forward has run.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.5.
    """
    if labels is None:
        task = distillation_loss(student, output, temperature=temperature)
    else:
        task = F.cross_entropy(output, labels)
    return reconstruction_loss(student) + gamma * task


def _teacher_pass(student: nn.Module) -> TeacherPass:
    passed = find_attachment(student, TeacherPass)
    if passed is None:
        student_of(student)  # raises with the reason if it is no student at all
        raise StudentError(f"{type(student).__name__!r} has been prepared without a teacher")
    return passed


def _logits(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    kind = torch.promote_types(student.dtype, torch.float32)
    classes = min(1, student.dim() - 1)  # one row of logits has no batch
    ours = F.log_softmax(student.to(kind) / temperature, dim=classes)
    theirs = F.log_softmax(teacher.to(kind) / temperature, dim=classes)
    pointwise = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(classes)
    return temperature**2 * pointwise.mean()
