"""Closed forms: every layer in turn is regressed on what the teacher puts out there.

The input of the regression is the *student's* own feature, with all that the layers before have
lost, and its target is the teacher's value: where a layer ends a residual block, what is missing
from the teacher's sum. So each layer also makes up for those before it. This is kernel relaxation
(paper, sec. 3.5.2) for one layer at a time, in seconds, without labels and without steps.

The same sweep over the full-width model also *chooses* channels: when it comes to the reader of a
space, the channels that this reader misses least go, and the reader's weight is solved for the
rest before the sweep goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchcap import processes
from torchcap.batches import Batches, Source, as_source, mixed_seed
from torchcap.graph.analyze import Reader
from torchcap.graph.copies import copied
from torchcap.graph.rules import OPERATORS, STANDARDIZED, Rules, find_module_operator
from torchcap.graph.spaces import ChannelSpace, SpaceGraph
from torchcap.graph.weights import output_axis
from torchcap.modes import outside_inference_mode
from torchcap.plan.plan import Plan
from torchcap.projection.initialize import (
    Elimination,
    GreedySelection,
    drop_cheapest,
    selection_matrix,
    without_still,
)
from torchcap.projection.moments import JointMoments, input_patches, output_rows
from torchcap.training.progress import OnProgress, Progress, Watch
from torchcap.training.recipe import ClosedForm
from torchcap.training.regression import ROUNDING, Affine, choose_ridge, regress, spread
from torchcap.training.replay import Replay, Station, evaluated
from torchcap.transform.balance import balance_
from torchcap.transform.fold import fold_
from torchcap.transform.materialize import erase_identities_
from torchcap.transform.rewrite import rewrite_alike_
from torchcap.transform.start import bases_for

ROWS_PER_BATCH: Final = 8192
"""Output positions of a layer that are looked at in one batch."""

_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | _Transposed


@dataclass(frozen=True, slots=True)
class Solved:
    """What a closed form did to one layer.

    Attributes:
        layer: qualified name.
        method: ``"kernel"`` (the whole kernel by regression), ``"mixing"`` (the teacher's kernel
            behind a regression of its input channels: in transposed convolutions, and where the
            kernel's moments are too large) or ``"kept"``, where neither did better than the
            weights that were there.
        ridge: that was chosen, as a share of the moments' mean diagonal.
        before, after: mean square error of the layer's output, as a share of the target's; NaN if
            the memory is too small to measure it.
    """

    layer: str
    method: Literal["kernel", "mixing", "kept"]
    ridge: float | None
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Solution:
    """What a sweep did.

    Attributes:
        layers: in the order of the forward.
        peak: bytes that moments and waiting batches took at most.
    """

    layers: tuple[Solved, ...]
    peak: int

    def __str__(self) -> str:
        width = max([len(solved.layer) for solved in self.layers] + [5])
        lines = [f"{'layer':{width}}  method   ridge  error before   after"]
        for solved in self.layers:
            ridge = "-" if solved.ridge is None else f"{solved.ridge:.0e}"
            lines.append(
                f"{solved.layer:{width}}  {solved.method:6s}  {ridge:>6s}  "
                f"{solved.before:12.4f}  {solved.after:6.4f}"
            )
        lines.append(f"peak of moments and waiting batches: {self.peak / 2**20:.1f} MiB")
        return "\n".join(lines)


@outside_inference_mode
def solve(
    small: nn.Module,
    teacher: nn.Module,
    data: Batches,
    schedule: ClosedForm | None = None,
    *,
    seed: int = 0,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Rules | None = None,
    on_progress: OnProgress | None = None,
    **changes: Any,
) -> Solution:
    """Solve every layer of a compressed model in closed form, in place; no labels, no steps.

    Each convolution and linear layer behind the first cut, in the order of the forward, gets the
    weight and the bias that predict the teacher's output best from the small model's own features,
    by ridge regression. Where the small layer writes fewer channels, the target is the teacher's
    output in the small layer's coordinates, which a regression finds too. Batch norms of ``small``
    that can be folded are folded first. Layers that are called twice stay as they are.

    Args:
        small: a compressed model, of the class and structure of ``teacher``; it is changed.
        teacher: the original model; it is not changed.
        data: batches of images; labels are not used. A few hundred images are enough.
        schedule: ridge and memory; by default those of :class:`ClosedForm`.
        seed: of the draw of output positions, and of the passes over ``data``.
        leaves: as for :func:`torchcap.analyze`.
        rules: as for :func:`torchcap.analyze`.
        on_progress: called after each layer.
        changes: values of the schedule that are to be others: ``memory=2**28``…

    Returns:
        what was done; it prints as a table.

    Raises:
        TraceError: if a graph cannot be read or replayed, or the two differ in structure.
        DataError: if the data is empty, not finite, or can be passed over only once.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.5.2 (kernel relaxation).
    """
    schedule = (schedule or ClosedForm()).but(**changes)
    source, watch = as_source(data, small, seed), Watch("closed form", on_progress)
    return solve_layers(small, teacher, source, schedule, Reader(leaves, rules), watch)


def solve_layers(
    small: nn.Module,
    teacher: nn.Module,
    source: Source,
    schedule: ClosedForm,
    reader: Reader,
    watch: Watch,
) -> Solution:
    """Solve every layer behind the first cut, in place; see :func:`solve`."""
    source = source.limited(schedule.batches)
    first = source.first()
    for model in (small, teacher):
        evaluated(model, first)  # raises with the number of the batch
    folded = copied(teacher)
    for model in (folded, small):
        graph = reader(model, first.inputs)
        if model is folded:
            rewrite_alike_(folded, graph, small)
        folds = graph.folds
        fold_(model, folds)
        erase_identities_(model, [fold.norm for fold in folds if fold.norm is not None])
    replay = Replay(folded, small, source, memory=schedule.memory // 2, reader=reader)
    shapes = {name: tensor.shape for name, tensor in folded.named_parameters()}
    cut = {
        name.rpartition(".")[0]
        for name, tensor in small.named_parameters()
        if tensor.shape != shapes.get(name)
    }
    return _Sweep(replay, folded, small, schedule, source.seed).run(cut, watch)


@dataclass(frozen=True, slots=True)
class Selected:
    """What a choosing sweep over the full-width model found.

    Attributes:
        model: a folded copy of the model, of full width, with every reader solved; columns of
            channels that go are zero.
        bases: space name -> selection, ``(blocks, channels / blocks, rank / blocks)``.
        solution: what was done to the layers.
    """

    model: nn.Module
    bases: Mapping[str, Tensor]
    solution: Solution


def select(
    model: nn.Module,
    plan: Plan,
    graph: SpaceGraph,
    source: Source,
    schedule: ClosedForm,
    reader: Reader,
    watch: Watch,
) -> Selected:
    """Choose channels and solve their readers, layer by layer on the student's own features.

    Channels are chosen like :class:`GreedySelection` does, when the sweep reaches the reader of
    their space: from the moments of the student's features, for the weight that predicts the
    teacher best. A space with several readers, or one with a grouped reader, is chosen before the
    sweep, from the teacher's features. Linear spaces change their coordinates before it, so that
    their first channels are the best ones to keep.

    Args:
        model: the original model; it is not changed.
        plan: the ranks.
        graph: the spaces of the model.
        source: batches.
        schedule: ridge and memory.
        reader: how models are read.
        watch: who looks on.
    """
    source = source.limited(schedule.batches)
    teacher = copied(model)
    fold_(teacher, graph.folds)
    folded = graph.after_folding()
    with source.passing(0) as batches:
        linear = balance_(teacher, folded, plan, batches)
    student = copied(teacher)
    replay = Replay(teacher, student, source, memory=schedule.memory // 2, reader=reader)
    sweep = _Sweep(replay, teacher, student, schedule, source.seed)
    sweep.plan_choices(folded, plan)
    for name, basis in linear.items():
        sweep.choosable.pop(name, None)
        sweep.restrict(folded[name], basis)
    decided = {*sweep.choosable, *linear}
    early = {n: choice for n, choice in plan.choices.items() if n not in decided}
    if early:
        part = Plan(early, plan.model)
        with source.passing(0) as batches:
            bases = bases_for(teacher, folded, part, GreedySelection(), batches)
        for name, basis in bases.items():
            sweep.restrict(folded[name], basis)
    cut = {port.module for name in plan.choices for port in folded[name].consumers}
    solution = sweep.run(cut, watch)
    return Selected(student, {name: sweep.bases[name] for name in plan.choices}, solution)


class _Sweep:
    """One pass over the layers of a student."""

    def __init__(
        self,
        replay: Replay,
        teacher: nn.Module,
        student: nn.Module,
        schedule: ClosedForm,
        seed: int,
    ) -> None:
        self.replay, self.teacher, self.student = replay, teacher, student
        self.ridge, self.memory, self.seed = schedule.ridge, schedule.memory // 2, seed
        self.bases: dict[str, Tensor] = {}
        self.choosable: dict[str, _Choice] = {}
        self.present: dict[str, Tensor] = {}  # layer -> which of its input channels are kept
        self.peak = 0

    @torch.no_grad()
    def run(self, cut: set[str], watch: Watch) -> Solution:
        """Solve the layers behind the first of the layers that are cut."""
        stations = list(self.replay.stations(self._behind(cut)))
        done = []
        for number, station in enumerate(stations, start=1):
            solved = self._solve(station)
            done.append(solved)
            if watch.on_progress is not None:
                watch.on_progress(Progress(watch.name, number, len(stations), solved.after))
        return Solution(tuple(done), max(self.peak, self.replay.peak))

    def _behind(self, cut: set[str]) -> set[str]:
        """Return the layers that read something that a cut has changed, or that are cut there."""
        changed = set()
        found = set()
        for node in self.replay.student.nodes:
            name = str(node.target) if node.op == "call_module" else ""
            reads = any(source in changed for source in node.all_input_nodes)
            mine = {c for c in cut if name and (c == name or c.startswith(f"{name}."))}
            if reads or mine:
                changed.add(node)
            narrow = name in cut and self._narrow(name)
            if (reads or narrow) and _plain_layer(self.student, name) is not None:
                found.add(name)
        return found

    def _narrow(self, name: str) -> bool:
        """Whether a layer reads fewer channels than in the teacher, or will after a choice."""
        ours, theirs = (_plain_layer(m, name) for m in (self.student, self.teacher))
        if ours is None or theirs is None:
            return False
        chosen = any(choice.layer == name for choice in self.choosable.values())
        return _inputs(ours) < _inputs(theirs) or chosen or name in self.present

    # ----------------------------------------------------------------------------------------------
    # One layer

    def _solve(self, station: Station) -> Solved:
        layer = _plain_layer(self.student, station.name)
        assert layer is not None  # noqa: S101 - stations are made of plain layers
        if isinstance(layer, _Transposed):
            return self._mix(station, layer)
        groups, _, outputs = _sizes(layer)
        columns = self._columns(station.name, layer)
        inputs = len(columns) // groups
        # Two halves and one solution, and what leads to the coordinates of the targets.
        bytes_needed = 3 * JointMoments.size(groups, inputs, outputs)
        bytes_needed += self._coordinates_size(station, layer)
        if bytes_needed > self.memory:
            return self._mix(station, layer)
        parts = self._moments(station, layer, columns)
        self.peak = max(self.peak, bytes_needed + self.replay.peak)
        whole = _merged(parts)
        start = _affine(layer, columns)
        self._choose(station.name, whole, start)
        mask = self._mask(station.name, layer)
        present = None if mask is None else mask.flatten()[columns].reshape(groups, inputs)
        if present is not None:
            start = Affine(start.weight * present.to(start.weight).unsqueeze(2), start.bias)
        before = start.error(whole)
        solution = partial(regress, intercept=layer.bias is not None, present=present)
        ridge = self.ridge if self.ridge is not None else choose_ridge(parts, start, solution)
        if ridge is None:
            _write(layer, start, columns)
            return Solved(station.name, "kept", None, before, start.error(whole))
        found = solution(whole, start, ridge=ridge)
        _write(layer, found, columns)
        return Solved(station.name, "kernel", ridge, before, found.error(whole))

    def _columns(self, name: str, layer: _Layer) -> Tensor:
        """Return which entries of a patch, over all groups, moments are gathered of.

        Channels that are gone already need none. Groups may keep different ones, so they keep all.
        """
        groups, inputs, _ = _sizes(layer)
        mask = self._mask(name, layer)
        undecided = any(choice.layer == name for choice in self.choosable.values())
        if mask is None or groups > 1 or undecided:
            return torch.arange(groups * inputs, device=layer.weight.device)
        return mask.flatten().nonzero().flatten()

    def _mask(self, name: str, layer: _Layer) -> Tensor | None:
        """Return which entries of patches a layer may read, ``(groups, inputs)``; None for all."""
        groups, inputs, _ = _sizes(layer)
        channels = self.present.get(name)
        return None if channels is None else _repeated(channels, groups, inputs)

    def _moments(
        self, station: Station, layer: _Layer, columns: Tensor
    ) -> tuple[JointMoments, JointMoments]:
        """Gather the moments of two halves of the images, for some columns of the patches."""
        groups, _, outputs = _sizes(layer)
        inputs = len(columns) // groups
        device = layer.weight.device
        halves = tuple(JointMoments(groups, inputs, outputs, device=device) for _ in range(2))
        coordinates = self._coordinates(station, layer)
        for number, (x, target) in enumerate(self.replay.visit(station)):
            rows = self._rows(layer, x, target, station, number)
            patches, targets = rows
            patches = patches if groups > 1 else patches[..., columns]
            targets = targets if coordinates is None else coordinates(targets)
            targets = targets.reshape(len(targets), groups, outputs).transpose(0, 1)
            middle = max(1, patches.shape[1] // 2)
            halves[number % 2].update(patches[:, :middle], targets[:, :middle])
            if patches.shape[1] > middle:
                halves[1 - number % 2].update(patches[:, middle:], targets[:, middle:])
        for half in halves:
            half.reduce()
        return halves[0], halves[1]

    def _rows(
        self, layer: _Layer, x: Tensor, target: Tensor, station: Station, number: int
    ) -> tuple[Tensor, Tensor]:
        """Return patches of the input, and the target at the same positions."""
        generator = self._generator(station, number)
        patches = input_patches(layer, x, max_rows=ROWS_PER_BATCH, generator=generator)
        return patches, self._output_rows(layer, target, station, number)

    def _output_rows(self, layer: _Layer, y: Tensor, station: Station, number: int) -> Tensor:
        generator = self._generator(station, number)
        return output_rows(layer, y, max_rows=ROWS_PER_BATCH, generator=generator)

    def _generator(self, station: Station, number: int) -> torch.Generator:
        """Return the source of the draw of positions, anew for each use."""
        return torch.Generator().manual_seed(mixed_seed(self.seed, station.index, number))

    def _coordinates_size(self, station: Station, layer: _Layer) -> int:
        twin = _plain_layer(self.teacher, station.name)
        assert twin is not None  # noqa: S101 - the structures are the same
        wide, narrow = _outputs(twin), _outputs(layer)
        return 0 if wide == narrow else JointMoments.size(1, wide, narrow)

    def _coordinates(self, station: Station, layer: _Layer) -> Callable[[Tensor], Tensor] | None:
        """Find how the teacher's output looks in the coordinates of a layer that writes fewer.

        The small layer's output is regressed on the teacher's; what the regression predicts is
        the teacher's output in the small layer's channels.
        """
        twin = _plain_layer(self.teacher, station.name)
        assert twin is not None  # noqa: S101 - the structures are the same
        wide, narrow = _outputs(twin), _outputs(layer)
        if wide == narrow:
            return None
        moments = JointMoments(1, wide, narrow, device=layer.weight.device)
        for number, (x, target) in enumerate(self.replay.visit(station)):
            rows, ours = (self._output_rows(layer, y, station, number) for y in (target, layer(x)))
            moments.update(rows.unsqueeze(0), ours.unsqueeze(0))
        moments.reduce()
        zero = Affine(
            *(torch.zeros(1, *n, dtype=torch.float64) for n in ((wide, narrow), (narrow,)))
        )
        found = regress(moments, _moved(zero, layer), ridge=1e-6)
        return lambda rows: rows.double() @ found.weight[0] + found.bias[0]

    def _mix(self, station: Station, layer: _Layer) -> Solved:
        """Put a regression of the teacher's input channels in front of the teacher's kernel."""
        old, new = layer.weight.detach().clone(), self._mixed_kernel(station, layer)
        before, after = self._errors(station, layer, (old, old if new is None else new))
        if new is None or not after < before:
            layer.weight.copy_(old)
            return Solved(station.name, "kept", None, before, before)
        return Solved(station.name, "mixing", 1e-4, before, after)

    def _errors(self, station: Station, layer: _Layer, kernels: Sequence[Tensor]) -> list[float]:
        """Return the error of a layer's output with each of some kernels; the last one stays."""
        if self._coordinates_size(station, layer) > self.memory:
            return [float("nan")] * len(kernels)
        coordinates = self._coordinates(station, layer)
        sums = torch.zeros(1 + len(kernels), dtype=torch.float64)
        for number, (x, target) in enumerate(self.replay.visit(station)):
            rows = self._output_rows(layer, target, station, number).double()
            rows = rows if coordinates is None else coordinates(rows)
            sums[0] += rows.square().sum().cpu()
            for place, kernel in enumerate(kernels, start=1):
                layer.weight.copy_(kernel)
                ours = self._output_rows(layer, layer(x), station, number)
                sums[place] += (ours.double() - rows).square().sum().cpu()
        total, *errors = processes.sum_(sums).tolist()
        return [error / total if total > 0 else 0.0 for error in errors]

    def _mixed_kernel(self, station: Station, layer: _Layer) -> Tensor | None:
        """Return the teacher's kernel behind the regression; None where there can be none."""
        twin = _plain_layer(self.teacher, station.name)
        assert twin is not None  # noqa: S101 - the structures are the same
        groups = getattr(layer, "groups", 1)
        narrow, wide = _inputs(layer), _inputs(twin)
        size = JointMoments.size(groups, narrow, wide)
        if size > self.memory or _outputs(layer) != _outputs(twin):
            return None
        moments = JointMoments(groups, narrow, wide, device=layer.weight.device)
        node = self.replay.student.nodes[station.index].all_input_nodes[0]
        before = self.replay.student.nodes.index(node)
        channels = -1 if isinstance(layer, nn.Linear) else 1
        inputs = Station(station.name, station.index, before)
        for number, (x, target) in enumerate(self.replay.visit(inputs)):
            ours, theirs = (
                v.movedim(channels, -1).reshape(-1, groups, v.shape[channels] // groups)
                for v in (x, target)
            )
            generator = self._generator(station, number)
            draw = torch.randperm(len(ours), generator=generator)[:ROWS_PER_BATCH].to(ours.device)
            moments.update(ours[draw].transpose(0, 1), theirs[draw].transpose(0, 1))
        moments.reduce()
        self.peak = max(self.peak, size + self.replay.peak)
        zero = Affine(
            torch.zeros(groups, narrow, wide, dtype=torch.float64),
            torch.zeros(groups, wide, dtype=torch.float64),
        )
        # Without an intercept: at the padded border a constant would not be a constant.
        present = self.present.get(station.name)
        present = None if present is None else present.reshape(groups, narrow)
        found = regress(moments, _moved(zero, layer), ridge=1e-4, intercept=False, present=present)
        if isinstance(layer, _Transposed):
            mixed = torch.tensordot(found.weight[0], twin.weight.double(), dims=1)
            return mixed.to(layer.weight)
        grouped = twin.weight.double().reshape(groups, -1, wide, twin.weight[0, 0].numel())
        mixed = torch.einsum("gowt,gnw->gont", grouped, found.weight)
        return mixed.reshape(layer.weight.shape).to(layer.weight)

    # ----------------------------------------------------------------------------------------------
    # Choosing channels

    def plan_choices(self, graph: SpaceGraph, plan: Plan) -> None:
        """Find the spaces that can be chosen at their one reader, when the sweep gets there."""
        readers: dict[str, list[ChannelSpace]] = {}
        for space in graph.spaces:
            for port in space.consumers:
                readers.setdefault(port.module, []).append(space)
        callable_once = {s.name for s in self.replay.stations(set(readers))}
        for name in plan.choices:
            space = graph[name]
            if len(space.consumers) != 1 or space.blocks != 1:
                continue
            port = space.consumers[0]
            layer = _plain_layer(self.student, port.module)
            plain = layer is not None and not isinstance(layer, _Transposed)
            if layer is None or not plain or port.groups > 1 or port.repeat > 1:
                continue
            size = JointMoments.size(*_sizes(layer))
            if port.module in callable_once and 3 * size <= self.memory:
                rank = plan.choices[name].rank
                self.choosable[name] = _Choice(space, port.module, port.offset, rank)

    @torch.no_grad()
    def restrict(self, space: ChannelSpace, basis: Tensor) -> None:
        """Cut the readers of a space that has been decided down to the channels that stay."""
        self.bases[space.name] = basis
        stays = basis.sum(-1).flatten() > 0.5
        for port in space.consumers:
            module = self.student.get_submodule(port.module)
            weight = getattr(module, port.parameter)
            width = weight.shape[port.axis] * port.groups
            mask = self.present.setdefault(
                port.module, torch.ones(width, dtype=torch.bool, device=weight.device)
            )
            mine = stays[port.start : port.start + port.channels].to(weight.device)
            stretch = slice(port.offset, port.offset + port.channels * port.repeat)
            mask[stretch] &= mine.repeat_interleave(port.repeat)
            rows = weight.movedim(port.axis, 1).unflatten(0, (port.groups, -1))
            rows.mul_(mask.reshape(port.groups, 1, -1, *(1 for _ in weight.shape[2:])))

    def _choose(self, name: str, moments: JointMoments, start: Affine) -> None:
        """Choose the channels of the spaces that a layer reads, and that are not decided yet."""
        choices = [choice for choice in self.choosable.values() if choice.layer == name]
        if choices:
            layer = _plain_layer(self.student, name)
            assert layer is not None  # noqa: S101 - choices are made at plain layers
            channels = layer.weight.shape[1]
            taps = moments.inputs // channels
            mask = self.present.get(name)  # of the spaces that were decided before
            there = None if mask is None else _repeated(mask, 1, moments.inputs)
            bias = layer.bias is not None
            full = regress(moments, start, ridge=1e-4, intercept=bias, present=there)
            plain, regular = spread(moments, ridge=1e-4, intercept=bias, present=there)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular[0]))
            moving = plain[0].diagonal() - ROUNDING * moments.input_moment[0].diagonal()
            weight = full.weight[0].mT.reshape(-1, channels, taps)
            weight = without_still(weight, moving)
            drops = sum(choice.space.channels - choice.rank for choice in choices)
            elimination = Elimination(weight, inverse, drops=max(1, drops))
            owner = torch.full((channels,), -1)
            for number, choice in enumerate(choices):
                owner[choice.offset : choice.offset + choice.space.channels] = number
            stays = drop_cheapest(
                [elimination], owner, [c.space.channels - c.rank for c in choices]
            )
            for choice in choices:
                mine = stays[choice.offset : choice.offset + choice.space.channels]
                basis = selection_matrix(mine.nonzero().flatten()[None], choice.space.channels)
                self.restrict(choice.space, basis.to(inverse.device))


@dataclass(frozen=True, slots=True)
class _Choice:
    """A space that is chosen at its one reader, where its channels start at ``offset``."""

    space: ChannelSpace
    layer: str
    offset: int
    rank: int


def _plain_layer(model: nn.Module, name: str) -> _Layer | None:
    """Return a layer that can be solved: it multiplies patches with a weight of its own."""
    try:
        layer = model.get_submodule(name) if name else None
    except AttributeError:
        return None
    if not isinstance(layer, _Layer) or (isinstance(layer, _Transposed) and layer.groups > 1):
        return None
    # A subclass may do something else, and a standardised weight is not the one that is stored.
    known = find_module_operator(layer, OPERATORS) is not None and not isinstance(
        layer, STANDARDIZED
    )
    own = not parametrize.is_parametrized(layer) and isinstance(layer.weight, nn.Parameter)
    return layer if known and own else None


def _inputs(layer: _Layer) -> int:
    """Return the number of channels that an output reads."""
    return layer.weight.shape[1 - output_axis(layer)]


def _outputs(layer: _Layer) -> int:
    return layer.weight.shape[output_axis(layer)]


def _sizes(layer: _Layer) -> tuple[int, int, int]:
    """Return the groups of a layer, and the length of a patch and of an output in each."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return groups, layer.weight[0].numel(), layer.weight.shape[0] // groups


def _affine(layer: _Layer, columns: Tensor) -> Affine:
    """Return what a layer does to some columns of its patches."""
    groups, inputs, outputs = _sizes(layer)
    weight = layer.weight.detach().double().reshape(groups, outputs, inputs).mT
    weight = weight if groups > 1 else weight[:, columns]
    if layer.bias is None:
        return Affine(weight, weight.new_zeros(groups, outputs))
    return Affine(weight, layer.bias.detach().double().reshape(groups, outputs))


def _write(layer: _Layer, affine: Affine, columns: Tensor) -> None:
    """Let a layer do that to these columns, and nothing to the others."""
    groups, inputs, outputs = _sizes(layer)
    weight = affine.weight.new_zeros(groups, inputs, outputs)
    weight.reshape(groups * inputs, outputs)[columns] = affine.weight.flatten(0, 1)
    layer.weight.copy_(weight.mT.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(affine.bias.flatten())


def _moved(affine: Affine, layer: _Layer) -> Affine:
    device = layer.weight.device
    return Affine(affine.weight.to(device), affine.bias.to(device))


def _repeated(mask: Tensor, groups: int, inputs: int) -> Tensor:
    """Turn a mask of input channels into one of the entries of patches, ``(groups, inputs)``."""
    by_group = mask.reshape(groups, -1)
    return by_group.repeat_interleave(inputs // by_group.shape[1], dim=1)


def _merged(parts: tuple[JointMoments, JointMoments]) -> JointMoments:
    first, second = parts
    whole = JointMoments(first.groups, first.inputs, first.outputs, device=first.input_mean.device)
    whole.merge(first)
    whole.merge(second)
    return whole
