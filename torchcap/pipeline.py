"""The doors: calls that read, decide, change and set up learning in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from torchcap import processes
from torchcap.batches import Batch, Batches, Source, as_source, mixed_seed
from torchcap.budget import Measurements
from torchcap.digest import digest
from torchcap.errors import (
    ModelError,
    NothingToCompressError,
    PlanError,
    RecipeError,
)
from torchcap.graph.analyze import Reader, check_kind
from torchcap.graph.copies import copied, hand_over_
from torchcap.graph.inputs import ExampleInputs
from torchcap.graph.rules import Rules
from torchcap.graph.spaces import SpaceGraph
from torchcap.modes import outside_inference_mode
from torchcap.plan.latency import LatencyTable
from torchcap.plan.plan import Plan
from torchcap.plan.sensitivity import Sensitivity
from torchcap.projection.initialize import GreedySelection, Initializer, LargestNorm
from torchcap.training.fit import cross_entropy
from torchcap.training.progress import OnProgress, Watch
from torchcap.training.projections import train_round
from torchcap.training.recipe import ClosedForm, Projections, Recipe
from torchcap.training.relax import train_kernels
from torchcap.training.rounds import Round
from torchcap.training.solve import select, solve_layers
from torchcap.training.state import StateFile
from torchcap.training.taps import TeacherPass, expansion
from torchcap.transform.balance import Balance
from torchcap.transform.fold import fold_
from torchcap.transform.materialize import materialize
from torchcap.transform.observe import observe
from torchcap.transform.prepare import project_
from torchcap.transform.start import Moments, bases_for
from torchcap.transform.student import Student, find_attachment

M = TypeVar("M", bound=nn.Module)


@outside_inference_mode
def prepare(  # noqa: PLR0913 - an argument for each thing that may be said
    model: M,
    *,
    ratio: float | Mapping[str, float] | None = None,
    plan: Plan | None = None,
    example_inputs: ExampleInputs | None = None,
    data: Batches | None = None,
    init: Initializer | None = None,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Rules | None = None,
    streams: bool = False,
    seed: int = 0,
) -> M:
    """Return a copy of a trained model whose free channel spaces are projected to fewer channels.

    The copy is an instance of the same class. Its norms are folded, its own parameters frozen, and
    every planned space has a ``P``, which :func:`torchcap.projection_parameters` trains. A forward
    in training mode runs ``model`` beside it, for :func:`torchcap.reconstruction_loss`. The model
    itself is not changed, and serves as the teacher: leave its weights as they are while the
    student trains.

    Args:
        model: a trained model.
        ratio: share of channels *kept* in each free space, ``0 < ratio <= 1``, by default a half;
            or a mapping of space name to share, where spaces that are not named stay as they are.
        plan: ranks by space, instead of ``ratio``.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments
            for ``forward``; may be left out for timm and torchvision models.
        data: batches of images, or of tuples that start with images, for the start of the
            projections; every batch is looked at once. Without it they start from the weights.
        init: where each projection starts; by default, with ``data``, the greedy selection by the
            error of the next layer, and the exact optimum where a space is linear (values and
            queries of attention); without, the channels of largest weight.
        leaves: module classes that are read as one operator, as in :func:`torchcap.analyze`.
        rules: operator rules that are asked first, as in :func:`torchcap.analyze`.
        streams: whether residual streams are spaces too, as in :func:`torchcap.analyze`.
        seed: of everything that is drawn: the order of ``data``, and positions in large features.

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
    _check_trainable(model)
    graph = Reader(leaves, rules, streams).proven(model, example_inputs)
    plan = _resolved(graph, ratio, plan)
    student = copied(model)
    fold_(student, graph.folds)
    folded = graph.after_folding()
    bases = _starts(student, folded, plan, init, data, seed)
    state = project_(student, graph, plan, bases)
    lifts = [expansion(tap, state) for tap in graph.taps]
    TeacherPass(model, graph.taps, lifts, own=graph.written).attach(student)
    hand_over_(student, model)
    return student


def _starts(
    student: nn.Module,
    graph: SpaceGraph,
    plan: Plan,
    init: Initializer | None,
    data: Batches | None,
    seed: int,
) -> dict[str, Tensor]:
    """Choose where projections start; linear spaces change their coordinates, in place."""
    if data is None:
        return bases_for(student, graph, plan, init or LargestNorm())
    balance = Balance(student, graph, plan if init is None else Plan({}, plan.model))
    rest = {n: choice for n, choice in plan.choices.items() if n not in balance.spaces}
    generator = torch.Generator().manual_seed(mixed_seed(seed))
    moments = Moments(student, [graph[name] for name in rest], generator)
    with as_source(data, student, seed, once=True).passing(0) as batches:
        observe(student, batches, balance, moments)
    bases = balance.apply_()
    others = Plan(rest, plan.model)
    return bases | bases_for(student, graph, others, init or GreedySelection(), moments)


@outside_inference_mode
def compress(  # noqa: PLR0913 - the one call has an argument for each thing that may be said
    model: M,
    data: Batches | None = None,
    *,
    ratio: float | Mapping[str, float] | None = None,
    plan: Plan | None = None,
    macs: float | None = None,
    params: float | None = None,
    activations: float | None = None,
    latency_ms: float | None = None,
    curves: Sensitivity | None = None,
    latency: LatencyTable | None = None,
    recipe: Recipe | None = None,
    example_inputs: ExampleInputs | None = None,
    seed: int = 0,
    state: Path | str | None = None,
    save_every: int = 200,
    on_progress: OnProgress | None = None,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Rules | None = None,
    streams: bool = False,
) -> M:
    """Return a smaller copy of a trained model, as accurate as its recipe can make it.

    The steps are those of the recipe: channels are chosen, projections trained, layers solved in
    closed form, kernels relaxed and fine-tuned, always towards the features and logits of
    ``model``, which is not changed and need not be in evaluation mode. Labels are needed only
    where the recipe gives them a weight.

    Under ``torch.distributed`` every process gives its own part of the data, and all return the
    same model.

    Args:
        model: a trained model.
        data: batches of images; of ``(images, labels)``; or of forward's arguments by name, with
            the labels under ``labels``. It is passed over many times: a list, a ``DataLoader``, or
            anything whose ``__iter__`` starts again. Without data, channels are kept by the size
            of their weights, and nothing is learnt.
        ratio: share of channels *kept* in each free space, ``0 < ratio <= 1``, by default a half;
            or a mapping of space name to share.
        plan: ranks by space, instead of ``ratio``.
        macs: budget of multiply-adds, instead of ``ratio``: as a share of the model's, within 0
            and 1, or a number above 1. Ranks then are those that lose least, see
            :func:`torchcap.allocate`.
        params: budget of parameters, likewise.
        activations: budget of the values that layers write, likewise.
        latency_ms: budget in milliseconds of one forward on ``example_inputs``, on the device of
            the model.
        curves: for a budget: what :func:`torchcap.sensitivity` has measured; by default it is
            measured now, on the data.
        latency: for ``latency_ms``: what :func:`torchcap.measure_latency` has measured; by default
            it is measured now.
        recipe: what to do; by default :meth:`Recipe.minutes`.
        example_inputs: for reading the model; by default the first batch.
        seed: of everything that is drawn. The same seed gives the same model.
        state: file that keeps the state of the run. If it is there, the run goes on from it, and
            ends where it would have ended without the interruption. It is removed at the end.
        save_every: number of training steps after which the state is saved; it is also saved
            behind every step of the recipe.
        on_progress: called after every layer solved, and every training step.
        leaves: module classes that are read as one operator, as in :func:`torchcap.analyze`.
        rules: operator rules that are asked first, as in :func:`torchcap.analyze`.
        streams: whether residual streams are spaces too, as in :func:`torchcap.analyze`.

    Returns:
        a new model of the class of ``model``, in its mode, with plain layers.

    Raises:
        ModelError, NothingToCompressError, TraceError, ExampleInputsError: as for
            :func:`prepare`.
        PlanError: for a ratio, rank or space that the model cannot take; for a budget that cannot
            be reached, or more than one of a ratio, a plan and the budgets.
        DataError: if the data cannot be used: empty, not finite, of a wrong shape or dtype, can be
            passed over only once, labels missing or out of range.
        RecipeError: if a recipe needs data, and there is none.
        TrainingError: if a loss is not finite.
        StateError: if the state cannot be written or read, or belongs to another run.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.
    """
    _check_model(model)
    if recipe is not None and not isinstance(recipe, Recipe):
        raise RecipeError(
            f"recipe must be a torchcap.Recipe, got {recipe!r}; take Recipe.seconds(), "
            "Recipe.minutes() or Recipe.full(), or make your own"
        )
    if recipe is None:
        recipe = Recipe(start=LargestNorm(), name="weights") if data is None else Recipe.minutes()
    if recipe.trains:
        _check_trainable(model)
    source = None
    if data is not None:
        source = as_source(data, model, seed)
        first = _checked_batch(model, recipe, source)
        example_inputs = first.inputs if example_inputs is None else example_inputs
    elif recipe.needs_data:
        raise RecipeError(
            f"recipe {recipe.name!r} learns from images; give data=, or start from the weights "
            "alone: recipe=Recipe(start=LargestNorm())"
        )
    reader = Reader(leaves, rules, streams)
    graph = reader.proven(model, example_inputs)
    budgets: dict[str, Any] = {
        "macs": macs, "params": params, "activations": activations, "latency_ms": latency_ms
    }  # fmt: skip
    kept = None
    if any(budget is not None for budget in budgets.values()):
        if plan is not None or ratio is not None:
            raise PlanError("give a budget, a plan or a ratio: only one of them")
        kept = Measurements(model, source, example_inputs, seed, state, on_progress, reader)
        plan = kept.plan(graph, curves, latency, **budgets)
    elif curves is not None or latency is not None:
        raise PlanError(
            "curves= and latency= are for a budget: give macs=, params=, activations= or "
            "latency_ms= too"
        )
    plan = _resolved(graph, ratio, plan)
    identity = {
        "plan": plan.to_dict(),
        "recipe": str(recipe),
        "seed": seed,
        "model": digest(model.state_dict(), _classes(model)),
        "data": "none" if source is None else processes.shared_text(_in_words(source)),
        "processes": processes.count(),
    }
    file = StateFile(state, identity, save_every)
    run = _Run(model, graph, plan, recipe, source, file, reader, on_progress)
    small = run.result()
    hand_over_(small, model)
    file.remove()
    if kept is not None:
        kept.remove()
    return small


def _classes(model: nn.Module) -> str:
    """Return the classes of all modules by name; what they say of themselves may be anything."""
    return "\n".join(f"{path}: {type(m).__qualname__}" for path, m in model.named_modules())


def _in_words(source: Source) -> str:
    """Return what two passes over the same data have in common, whatever is drawn."""
    first = source.first()
    shapes = [f"{tuple(t.shape)} {t.dtype}" for t in first.tensors]
    labels = "no labels" if first.labels is None else f"labels {tuple(first.labels.shape)}"
    content, again = (digest(batch.named()) for batch in (first, source.first()))
    known = [f"the first one {content}"] if content == again else []  # nothing new is drawn
    return ", ".join([f"{len(source)} batches", *shapes, labels, *known])


class _Run(Generic[M]):
    """The steps of one ``compress()``. Each is a phase, whose result the state file keeps."""

    def __init__(
        self,
        model: M,
        graph: SpaceGraph,
        plan: Plan,
        recipe: Recipe,
        source: Source | None,
        file: StateFile,
        reader: Reader,
        on_progress: OnProgress | None,
    ) -> None:
        self.model, self.graph, self.plan, self.recipe = model, graph, plan, recipe
        self.source, self.file, self.reader, self.on_progress = source, file, reader, on_progress
        self.phase = 0
        self.bases: dict[str, Tensor] = {}
        self.solved: dict[str, Tensor] | None = None

    def result(self) -> M:
        """Take the steps of the recipe; those that the state file has done are not done again."""
        self.file.load()
        self._start()
        if self.recipe.projections is not None:
            for turn in self.recipe.projections.rounds(self.graph, self.plan):
                self._train(turn, self.recipe.projections)
        small = self._materialized()
        closed, start = self.recipe.solve, self.recipe.start
        if closed is not None and (self.solved is None or closed != start):
            self._improve(small, "closed form", partial(solve_layers, schedule=closed))
        for name, schedule in (
            ("relaxation", self.recipe.relaxation),
            ("fine-tuning", self.recipe.fine_tuning),
        ):
            if schedule is not None:
                self._improve(small, name, partial(train_kernels, schedule=schedule))
        return small

    def _watch(self, name: str) -> Watch:
        return Watch(name, self.on_progress, self.file)

    def _is_done(self) -> bool:
        """Whether the phase that is to come has been done before an interruption."""
        self.phase += 1
        return self.phase <= self.file.phase

    def _start(self) -> None:
        """Choose the bases; where readers were solved on the way, keep their weights."""
        if self._is_done():
            self.bases, self.solved = self.file.parts["bases"], self.file.parts["solved"]
            return
        start = self.recipe.start
        if isinstance(start, ClosedForm):
            assert self.source is not None  # noqa: S101 - the recipe needs data
            found = select(
                self.model,
                self.plan,
                self.graph,
                self.source,
                start,
                self.reader,
                self._watch("selection"),
            )
            self.bases = dict(found.bases)
            if self.recipe.projections is None:
                self.solved = found.model.state_dict()
        else:
            folded = self._folded()
            if self.source is None:
                bases = bases_for(folded, self.graph.after_folding(), self.plan, start)
            else:
                with self.source.passing(0) as batches:
                    bases = bases_for(folded, self.graph.after_folding(), self.plan, start, batches)
            self.bases = bases
        # Equal costs may round to another choice in another process.
        self.bases = {name: processes.shared(basis) for name, basis in self.bases.items()}
        self.file.finish_phase(bases=self.bases, solved=self.solved)

    def _folded(self) -> M:
        folded = copied(self.model)
        fold_(folded, self.graph.folds)
        return folded

    def _student(self, plan: Plan) -> tuple[M, Student]:
        """Prepare a student from the bases, for all spaces of a plan."""
        student = self._folded()
        if self.solved is not None:
            student.load_state_dict(self.solved)
        return student, project_(student, self.graph, plan, self.bases)

    def _train(self, turn: Round, schedule: Projections) -> None:
        if self._is_done():
            self.bases = self.file.parts["bases"]
            return
        assert self.source is not None  # noqa: S101 - the recipe needs data
        part = {name: self.plan.choices[name] for name in turn.present}
        student, state = self._student(Plan(part, self.plan.model))
        lifts = [expansion(tap, state) for tap in self.graph.taps]
        TeacherPass(self.model, self.graph.taps, lifts, own=self.graph.written).attach(student)
        train_round(student, turn.train, self.source, schedule, self._watch("projections"))
        with torch.no_grad():
            trained = {name: state.projections[name]().detach().clone() for name in turn.train}
        self.bases = {**self.bases, **trained}
        self.file.finish_phase(bases=self.bases)

    def _materialized(self) -> M:
        student, _ = self._student(self.plan)
        small = materialize(student)
        if "small" in self.file.parts:
            small.load_state_dict(self.file.parts["small"])
        return small

    def _improve(self, small: M, name: str, step: Callable[..., object]) -> None:
        """Take one step that changes the small model in place."""
        if self._is_done():
            return
        watch = self._watch(name)
        step(small, self.model, self.source, reader=self.reader, watch=watch)
        self.file.finish_phase(small=small.state_dict())


@torch.no_grad()
def _checked_batch(model: nn.Module, recipe: Recipe, source: Source) -> Batch:
    """Return the first batch, if the model and the recipe can use it: before any work is done."""
    first = source.first()
    output = first.run(copied(model).eval())
    steps = (recipe.projections, recipe.relaxation, recipe.fine_tuning)
    if any(step is not None and step.labels > 0 for step in steps):
        cross_entropy(output, first)
    return first


def _resolved(
    graph: SpaceGraph, ratio: float | Mapping[str, float] | None, plan: Plan | None
) -> Plan:
    """Turn a ratio into a plan, and check what is given."""
    if not graph.free:
        Plan.uniform(graph, 1.0)  # raises with the reasons
    if plan is None:
        plan = Plan.uniform(graph, 0.5 if ratio is None else ratio)
    elif ratio is not None:
        raise PlanError("give a plan or a ratio: only one of them")
    elif not isinstance(plan, Plan):
        raise PlanError(
            f"plan must be a torchcap.Plan, got {type(plan).__name__}; make one by "
            "Plan.uniform(analyze(model), 0.5), Plan.of(graph, ranks) or Plan.from_json(text)"
        )
    plan.check(graph)
    return plan


def _check_model(model: nn.Module) -> None:
    check_kind(model)
    name = type(model).__name__
    if find_attachment(model, Student) is not None:
        raise ModelError(
            f"this {name!r} is already prepared; train it, or prepare the original model again "
            "with another ratio or plan"
        )
    parameters = dict(model.named_parameters())
    if not parameters:
        raise NothingToCompressError(f"{name!r} has no parameters; there is nothing to compress")
    for label, tensor in [*parameters.items(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(f"{label!r} is on the meta device; load the model's weights first")
        if tensor.is_inference():
            raise ModelError(
                f"{label!r} was made under torch.inference_mode(), so no copy of it can be "
                "trained; make or load the model outside of inference mode"
            )
        if not _is_sound(model, label, tensor):
            raise ModelError(f"{label!r} holds NaN or infinite values; load sound weights first")


def _check_trainable(model: nn.Module) -> None:
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ModelError(
            f"all {len(parameters)} parameters of {type(model).__name__!r} are frozen "
            "(requires_grad=False), so those of the small model could not be trained; call "
            "model.requires_grad_(True) first, or take a recipe without training: Recipe.seconds()"
        )


def _is_sound(model: nn.Module, label: str, tensor: Tensor) -> bool:
    """Whether a tensor is finite; a buffer that is no statistic may be a mask or a bound."""
    if not tensor.is_floating_point():
        return True
    owner = model.get_submodule(label.rpartition(".")[0])
    if isinstance(tensor, nn.Parameter) or isinstance(owner, _NormBase):
        return bool(tensor.isfinite().all())
    return not bool(tensor.isnan().any())
