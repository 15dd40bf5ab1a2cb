"""The doors: calls that read, decide, change and set up learning in one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from torchcap.errors import ModelError, NothingToCompressError, PlanError
from torchcap.graph.analyze import analyze
from torchcap.graph.rules import Target
from torchcap.graph.trace import ExampleInputs
from torchcap.graph.values import Rule
from torchcap.plan.plan import Plan
from torchcap.projection.initialize import GreedySelection, Initializer, LargestNorm
from torchcap.training.taps import TeacherPass
from torchcap.transform.fold import fold_
from torchcap.transform.prepare import project_
from torchcap.transform.start import Batches, bases_for
from torchcap.transform.student import Student, find_attachment

M = TypeVar("M", bound=nn.Module)


def prepare(
    model: M,
    *,
    ratio: float | Mapping[str, float] = 0.5,
    plan: Plan | None = None,
    example_inputs: ExampleInputs | None = None,
    data: Batches | None = None,
    init: Initializer | None = None,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Mapping[Target, Rule] | None = None,
) -> M:
    """Return a copy of a trained model whose free channel spaces are projected to fewer channels.

    The copy is an instance of the same class. Its norms are folded, its own parameters frozen, and
    every planned space has a ``P``, which :func:`torchcap.projection_parameters` trains. A forward
    in training mode runs ``model`` beside it, for :func:`torchcap.reconstruction_loss`. The model
    itself is not changed, and serves as the teacher: leave its weights as they are while the
    student trains.

    Args:
        model: a trained model.
        ratio: share of channels *kept* in each free space, ``0 < ratio <= 1``; or a mapping of
            space name to share, where spaces that are not named stay as they are.
        plan: ranks by space, instead of ``ratio``.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments
            for ``forward``; may be left out for timm and torchvision models.
        data: batches of images, or of tuples that start with images, for the start of the
            projections; every batch is looked at once. Without it they start from the weights.
        init: where each projection starts; by default the greedy selection by the error of the next
            layer with ``data``, the channels of largest weight without.
        leaves: module classes that are read as one operator, as in :func:`torchcap.analyze`.
        rules: operator rules that are asked first, as in :func:`torchcap.analyze`.

    Returns:
        the student, in the mode of ``model``.

    Raises:
        ModelError: if the model cannot be prepared: frozen, prepared already, on the meta device,
            with weights that are not finite.
        NothingToCompressError: if no channel space is free; the reasons are listed.
        PlanError: for a ratio, rank or space that the model cannot take.
        TraceError, ExampleInputsError: if the model cannot be read.
        DataError: if the data is empty or not finite, or an initialiser needs data.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.3 and 3.6.
    """
    _check_model(model)
    graph = analyze(model, example_inputs, leaves=leaves, rules=rules)
    if not graph.free:
        Plan.uniform(graph, 1.0)  # raises with the reasons
    if plan is None:
        plan = Plan.uniform(graph, ratio)
    elif not isinstance(plan, Plan):
        raise PlanError(
            f"plan must be a torchcap.Plan, got {type(plan).__name__}; make one by "
            "Plan.uniform(analyze(model), 0.5), Plan.of(graph, ranks) or Plan.from_json(text)"
        )
    plan.check(graph)
    if init is None:
        init = LargestNorm() if data is None else GreedySelection()
    student = copy.deepcopy(model)
    fold_(student, graph.folds)
    bases = bases_for(student, graph.after_folding(), plan, init, data)
    state = project_(student, graph, plan, bases)
    TeacherPass(model, graph.taps, state).attach(student)
    return student


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{name!r} cannot be prepared: a torch.nn.Module was expected, not a scripted or "
            "frozen one; pass the module that it was made from"
        )
    if find_attachment(model, Student) is not None:
        raise ModelError(
            f"this {name!r} is already prepared; train it, or prepare the original model again "
            "with another ratio or plan"
        )
    parameters = dict(model.named_parameters())
    if not parameters:
        raise NothingToCompressError(f"{name!r} has no parameters; there is nothing to compress")
    if not any(p.requires_grad for p in parameters.values()):
        raise ModelError(
            f"all {len(parameters)} parameters of {name!r} are frozen (requires_grad=False), so "
            "the small model could not be trained either; call model.requires_grad_(True) first"
        )
    for label, tensor in [*parameters.items(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(f"{label!r} is on the meta device; load the model's weights first")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{label!r} holds NaN or infinite values; load sound weights first")
