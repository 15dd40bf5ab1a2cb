"""Sensitivity: what every space loses when it alone is compressed, measured rank by rank.

A space loses its channels in the order of the greedy selection (a linear one in the order of its
best coordinates), and its readers' weights are regressed on the channels that are left, as the
closed form does. The moments for that come from one half of the batches, errors and scores from
the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchcap import processes
from torchcap.batches import Batch, Batches, Source, as_source
from torchcap.digest import digest
from torchcap.errors import DataError, PlanError, StateError
from torchcap.graph.analyze import Reader
from torchcap.graph.copies import copied, running, shadow
from torchcap.graph.inputs import ExampleInputs
from torchcap.graph.rules import Rules
from torchcap.graph.spaces import Port, SpaceGraph, Tap
from torchcap.modes import outside_inference_mode
from torchcap.nests import tensors_in
from torchcap.plan.cost import cost
from torchcap.plan.plan import Choice, Plan
from torchcap.plan.sensitivity import Curve, Metric, Sensitivity
from torchcap.projection.initialize import (
    LargestNorm,
    Readout,
    drop_cheapest,
    eliminations_of,
    selection_matrix,
)
from torchcap.training.fit import cross_entropy
from torchcap.training.progress import OnProgress, Progress
from torchcap.training.state import write_text
from torchcap.training.taps import Probe, TeacherPass, expansion
from torchcap.transform.balance import balance_
from torchcap.transform.fold import fold_
from torchcap.transform.prepare import project_
from torchcap.transform.start import Surroundings, surroundings
from torchcap.transform.student import student_of

SHARES: Final = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 0.99)
"""Shares of the channels that are kept in turn."""

RIDGE: Final = 1e-4
"""Of the selection and the regression, as a share of the moments' mean diagonal."""

_ROUNDING: Final = 1e-10
"""What rounding may leave between features that are the same, as a share of their square."""


@outside_inference_mode
def sensitivity(  # noqa: PLR0913 - an argument for each thing that may be said
    model: nn.Module,
    data: Batches | Source,
    *,
    shares: Sequence[float] = SHARES,
    spaces: Sequence[str] | None = None,
    images: int = 512,
    example_inputs: ExampleInputs | None = None,
    seed: int = 0,
    cache: Path | str | None = None,
    on_progress: OnProgress | None = None,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Rules | None = None,
    streams: bool = False,
) -> Sensitivity:
    """Measure what each space of a model loses when it alone keeps a share of its channels.

    Args:
        model: a trained model; it is not changed.
        data: batches, as for :func:`torchcap.compress`. Where all have labels, scores are
            accuracies; else agreements with the model. Every other batch is used to choose
            channels and to regress their readers, the rest to measure; a single batch serves both.
        shares: of the channels that are kept, within 0 and 1.
        spaces: names of the spaces to measure; by default all free ones.
        images: how many are measured on at most; they stay in memory.
        example_inputs: for reading the model; by default the first batch.
        seed: of the pass over ``data``.
        cache: JSON file that keeps the curves; a run that was interrupted goes on from it, and a
            finished one is read from it.
        on_progress: called after each space.
        leaves: as for :func:`torchcap.analyze`.
        rules: as for :func:`torchcap.analyze`.
        streams: as for :func:`torchcap.analyze`.

    Raises:
        PlanError: for shares outside of (0, 1], or an unknown or fixed space.
        NothingToCompressError: if no space is free.
        TraceError, ExampleInputsError: if the model cannot be read.
        DataError: if the data cannot be used, or the model puts out no class scores.
        StateError: if the cache belongs to another measurement, or cannot be written.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 4.1, figures 4 and 5.
    """
    source = as_source(data, model, seed)
    first = source.first()
    graph = Reader(leaves, rules, streams).proven(
        model, first.inputs if example_inputs is None else example_inputs
    )
    ranks = _ranks(graph, shares, spaces)
    identity = {
        "model": digest(model.state_dict(), repr(model)),
        "data": processes.shared_text(digest(first.named())),  # each process has its own part
        "ranks": {name: list(values) for name, values in ranks.items()},
        "images": images,
        "seed": seed,
    }
    cached = _Cache(None if cache is None else Path(cache), identity)
    found = cached.load()
    if found is None or len(found.curves) < len(ranks):
        trial = _Trial(model, graph, source, images)
        if found is None:
            counts = trial.images, cost(graph).parameters
            found = Sensitivity(graph.model, (), trial.metric, trial.baseline, *counts)
        done = {curve.space for curve in found.curves}
        missing = {n: values for n, values in ranks.items() if n not in done}
        for curve in trial.curves(missing):
            found = replace(found, curves=(*found.curves, curve))
            cached.keep(found)
            if on_progress is not None:
                error = curve.errors[0]
                on_progress(Progress("sensitivity", len(found.curves), len(ranks), error))
    return replace(found, curves=tuple(found[name] for name in ranks))


def _labels(batch: Batch, output: Tensor) -> Tensor:
    """Return the classes of a batch, after checking that they fit the scores of a model."""
    cross_entropy(output, batch)
    assert batch.labels is not None  # noqa: S101 - it has just been computed with
    return batch.labels.argmax(1) if batch.labels.is_floating_point() else batch.labels


def _ranks(
    graph: SpaceGraph, shares: Sequence[float], spaces: Sequence[str] | None
) -> dict[str, tuple[int, ...]]:
    """Return the ranks to try in each space, rising."""
    if not shares:
        raise PlanError("shares is empty; give at least one share of channels to keep")
    names = [space.name for space in graph.free] if spaces is None else spaces
    plans = [
        Plan.uniform(graph, share if spaces is None else dict.fromkeys(names, share))
        for share in shares
    ]
    return {name: tuple(sorted({plan.ranks[name] for plan in plans})) for name in names}


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """One space at one rank.

    Attributes:
        rank: how many channels are kept.
        basis: which ones, ``(blocks, channels / blocks, rank / blocks)``.
        weights: tensor name -> value, of the readers that make up for what is gone.
    """

    rank: int
    basis: Tensor
    weights: Mapping[str, Tensor]


@dataclass(slots=True)
class _Sums:
    """What one student has lost so far: squared errors, squared norms, right answers."""

    student: nn.Module
    error: float = 0.0
    output_error: float = 0.0
    right: float = 0.0


class _Trial:
    """A model of which one space at a time is compressed."""

    def __init__(self, model: nn.Module, graph: SpaceGraph, source: Source, images: int) -> None:
        self.model, self.graph = model, graph
        self.teacher = running(model, graph.written)
        self.fitting, self.batches = _halves(source, images)
        with torch.no_grad():
            self.outputs = [_class_scores(self.teacher, batch) for batch in self.batches]
        guesses = [output.argmax(1) for output in self.outputs]
        pairs = list(zip(self.batches, self.outputs, strict=True))
        given = [_labels(b, output) for b, output in pairs if b.labels is not None]
        labelled = len(given) == len(pairs)
        self.metric: Metric = "accuracy" if labelled else "agreement"
        self.answers = given if labelled else guesses
        self.answered = _total(guess.numel() for guess in guesses)
        self.images = int(_total(len(guess) for guess in guesses))
        right = (_right(o, a) for o, a in zip(self.outputs, self.answers, strict=True))
        self.baseline = _total(right) / self.answered

    def curves(self, ranks: Mapping[str, tuple[int, ...]]) -> Iterator[Curve]:
        """Measure spaces one after the other."""
        folded = copied(self.model)
        fold_(folded, self.graph.folds)
        graph = self.graph.after_folding()
        full = {name: Choice(graph[name].channels, graph[name].channels) for name in ranks}
        linear = balance_(folded, graph, Plan(full, graph.model), self.fitting)
        for name, basis in linear.items():
            width = [rank // graph[name].blocks for rank in ranks[name]]
            cuts = [_Cut(r, basis[..., :w], {}) for r, w in zip(ranks[name], width, strict=True)]
            yield self._curve(name, cuts, folded)
        least = {n: Choice(full[n].channels, r[0]) for n, r in ranks.items() if n not in linear}
        for around in surroundings(folded, graph, Plan(least, graph.model), self.fitting):
            name = around.context.name
            yield self._curve(name, _cuts(around, folded, ranks[name]), folded)

    @torch.no_grad()
    def _curve(self, name: str, cuts: Sequence[_Cut], folded: nn.Module) -> Curve:
        every = [_Sums(self._student(name, cut, folded)) for cut in cuts]
        tap = self._tap_behind(every[0].student)
        feature_norm = output_norm = 0.0
        for batch, output, answers in zip(self.batches, self.outputs, self.answers, strict=True):
            expected = output if tap is None else _feature(self.teacher, tap, batch)[0]
            feature_norm += _square(expected)
            output_norm += _square(output)
            for sums in every:
                found, ours = _feature(sums.student, tap, batch)
                _check_shapes(output, ours)
                sums.output_error += _square(ours - output)
                sums.error += _square((ours if tap is None else found) - expected)
                sums.right += _right(ours, answers)
        feature_norm, output_norm = (
            max(_total([norm]), torch.finfo(torch.float32).tiny)
            for norm in (feature_norm, output_norm)
        )
        return Curve(
            name,
            self.graph[name].channels,
            tuple(cut.rank for cut in cuts),
            tuple(_total([sums.error]) / feature_norm for sums in every),
            tuple(_total([sums.output_error]) / output_norm for sums in every),
            tuple(_total([sums.right]) / self.answered for sums in every),
        )

    def _student(self, name: str, cut: _Cut, folded: nn.Module) -> nn.Module:
        """Return the model with one space cut; it shares the memory of the folded model."""
        student = shadow(folded)
        scaled = {f"{s.module}.{p}" for s in self.graph.scaled for p in ("weight", "bias")}
        for tensor, parameter in student.named_parameters():
            if tensor in cut.weights:
                parameter.data = cut.weights[tensor]
            elif tensor in scaled:  # these are going to be changed in place
                parameter.data = parameter.data.clone()
        choice = Choice(self.graph[name].channels, cut.rank)
        project_(student, self.graph, Plan({name: choice}, self.graph.model), {name: cut.basis})
        return student.eval()

    def _tap_behind(self, student: nn.Module) -> Tap | None:
        """Return the first place to compare at which a student differs from the teacher."""
        state = student_of(student)
        lifts = [expansion(tap, state) for tap in self.graph.taps]
        beside = TeacherPass(
            self.model, self.graph.taps, lifts, own=self.graph.written, always=True
        )
        beside.attach(student)
        try:
            self.batches[0].run(student)
        finally:
            beside.detach()
        behind = [
            tap
            for tap, lift in zip(self.graph.taps, lifts, strict=True)
            if lift is None and float(beside.terms.get(tap.name, 0.0)) > _ROUNDING
        ]
        return behind[0] if behind else None


def _cuts(around: Surroundings, model: nn.Module, ranks: Sequence[int]) -> list[_Cut]:
    """Return the cuts of a space, the rank rising: channels go in the order of the selection."""
    space = around.context
    if not space.readouts or any(readout.moment is None for readout in space.readouts):
        by_weight = LargestNorm()  # nothing is known of its readers
        return [_Cut(rank, by_weight(replace(space, rank=rank)), {}) for rank in ranks]
    eliminations = eliminations_of(space, RIDGE)
    block = torch.arange(space.blocks).repeat_interleave(space.block_channels)
    stays = torch.ones(space.channels, dtype=torch.bool)
    cuts = []
    for before, rank in pairwise((space.channels, *reversed(ranks))):
        drops = [(before - rank) // space.blocks] * space.blocks
        stays = drop_cheapest(eliminations, block, drops, stays)
        kept = stays.reshape(space.blocks, -1).nonzero()[:, 1].reshape(space.blocks, -1)
        weights: dict[str, Tensor] = {}
        for port, readout in zip(around.readers, space.readouts, strict=False):
            weights |= _made_up(model, port, readout, stays, weights)
        cuts.append(_Cut(rank, selection_matrix(kept, space.block_channels), weights))
    return cuts[::-1]


def _made_up(
    model: nn.Module, port: Port, readout: Readout, stays: Tensor, done: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weight and bias of a reader that makes up for the channels that are gone."""
    layer = model.get_submodule(port.module)
    if port.groups > 1 or port.axis != 1 or not isinstance(layer.weight, Tensor):
        return {}
    weight = done.get(port.tensor, layer.weight.detach()).clone()
    name = f"{port.module}.bias" if port.module else "bias"
    bias = done.get(name, layer.bias) if isinstance(layer.bias, Tensor) else None
    found, shift = _regressed(readout, stays.to(weight.device), intercept=bias is not None)
    part = found[:, port.start : port.start + port.channels]
    stretch = slice(port.offset, port.offset + port.channels * port.repeat)
    weight[:, stretch] = part.reshape(weight[:, stretch].shape).to(weight)
    if bias is None:
        return {port.tensor: weight}
    return {port.tensor: weight, name: (bias.detach() + shift).to(bias)}


def _regressed(readout: Readout, stays: Tensor, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """Return the weight that predicts a readout best from some channels, and the bias to add."""
    assert readout.moment is not None  # noqa: S101 - the selection has needed it
    out, channels, taps = readout.weight.shape
    size = len(readout.moment) // channels
    W = readout.weight.to(readout.moment)
    if size != taps:  # the moment is that of one position, and taps are further outputs
        W, intercept = W.mT.reshape(out * taps, channels, 1), False
    W = W.flatten(1)
    H = readout.moment
    mean = H.new_zeros(len(H)) if readout.mean is None or not intercept else readout.mean
    H = H - mean[:, None] * mean
    kept = stays.repeat_interleave(size)
    regular = H[kept][:, kept]
    added = RIDGE * regular.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    regular.diagonal().add_(added)
    lost = H[kept][:, ~kept] @ W[:, ~kept].mT
    found = torch.zeros_like(W)
    found[:, kept] = W[:, kept] + torch.cholesky_solve(lost, torch.linalg.cholesky(regular)).mT
    shift = (W - found) @ mean
    if size != taps:
        return found.reshape(out, taps, channels).mT, found.new_zeros(out)
    return found.reshape(out, channels, taps), shift


def _halves(source: Source, images: int) -> tuple[list[Batch], list[Batch]]:
    """Return the batches to choose channels with, and those to measure on, in turns."""
    halves: tuple[list[Batch], list[Batch]] = [], []
    counts = [0, 0]
    with source.passing(0) as batches:
        for batch in batches:
            half = batch.number % 2
            size = len(batch.tensors[0]) if batch.tensors else 1
            if not halves[half] or counts[half] + size <= images:
                halves[half].append(batch)
                counts[half] += size
            if min(counts) >= images:
                break
    first, second = halves
    return first, second or first


def _feature(model: nn.Module, tap: Tap | None, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run a model; return what is seen at a tap, and its class scores (twice without a tap)."""
    if tap is None:
        scores = _class_scores(model, batch)
        return scores, scores
    seen: list[Tensor] = []
    probe = Probe(lambda value: seen.append(value.clone()), tap)
    handle = probe.attach(model)
    probe.start()
    try:
        scores = _class_scores(model, batch)
    finally:
        handle.remove()
    return seen[0], scores


def _class_scores(model: nn.Module, batch: Batch) -> Tensor:
    output = batch.run(model)
    found = next((t for t in tensors_in(output) if t.is_floating_point() and t.ndim >= 2), None)
    if found is None:
        raise DataError(
            f"{type(model).__name__!r} puts out no class scores of shape (N, classes, …), so there "
            "are no answers to compare; measure a classifier, or a wrapper whose forward returns "
            "scores"
        )
    return found


def _check_shapes(expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape:
        raise DataError(
            f"the shape of the output hangs on the weights: {tuple(expected.shape)} of the model, "
            f"{tuple(found.shape)} of a smaller one (a detector's boxes?); measure the part of it "
            "that puts out scores of one shape, its backbone with a head"
        )


def _right(scores: Tensor, answers: Tensor) -> float:
    return float((scores.argmax(1) == answers).sum())


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())


def _total(values: Iterable[float]) -> float:
    """Return the sum of numbers, over all processes."""
    return float(processes.sum_(torch.tensor(sum(values), dtype=torch.float64)))


@dataclass(frozen=True, slots=True)
class _Cache:
    """A JSON file with the curves that have been measured."""

    path: Path | None
    identity: Mapping[str, Any]

    def load(self) -> Sensitivity | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            content = json.loads(self.path.read_text("utf-8"))
            found = Sensitivity.from_dict(content)
        except (OSError, ValueError, AttributeError) as error:
            raise StateError(
                f"{str(self.path)!r} cannot be read as measured curves ({error}); give another "
                "cache, or remove it to begin anew"
            ) from error
        for key, value in self.identity.items():
            if content.get("of", {}).get(key) != value:
                raise StateError(
                    f"{str(self.path)!r} holds curves of another measurement: its {key} differ; "
                    "give another cache, or remove it to begin anew"
                )
        return found

    def keep(self, found: Sensitivity) -> None:
        if self.path is None or processes.rank() > 0:
            return
        content = json.dumps({**found.to_dict(), "of": self.identity}, indent=1)
        write_text(self.path, content)
