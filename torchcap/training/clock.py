"""The clock: times of a model's layers on the device where it is, at several widths."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from torchcap.errors import ModelError, PlanError
from torchcap.graph.analyze import Reader
from torchcap.graph.copies import HOOKS, copied
from torchcap.graph.inputs import ExampleInputs, Inputs, as_inputs, default_inputs
from torchcap.graph.rules import Rules
from torchcap.graph.spaces import SpaceGraph
from torchcap.graph.weights import layer_input, output_axis
from torchcap.modes import outside_inference_mode
from torchcap.nests import cloned
from torchcap.plan.cost import cost
from torchcap.plan.latency import EVEN, LatencyTable, LayerTimes, predict_latency
from torchcap.plan.plan import Plan
from torchcap.plan.price import Sizes, weight_of
from torchcap.projection.initialize import LargestNorm
from torchcap.training.progress import OnProgress, Progress
from torchcap.transform.fold import fold_
from torchcap.transform.materialize import materialize
from torchcap.transform.prepare import project_
from torchcap.transform.start import bases_for

WIDTHS: Final = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of the channels at which layers are timed."""

NARROW: Final = 0.25
"""Share of the channels of the second network whose whole time is taken."""

UNEVEN: Final = 0.6
"""Share of the channels of the third one, whose widths are odd."""

COLD_BYTES: Final = 2**26
"""Weights of a layer are taken in turns until they are as large as this: more than caches hold."""

STEPS: Final = (8, 16, 32)
"""Channels that libraries compute together, of which one is looked for."""

LEAST_RISE: Final = 0.05
"""Share of a time by which it has to rise over a large step, to say something of smaller ones."""

MOST_TURNS: Final = 64
"""Weights of a small layer that are taken in turns; in a network they would stay in the cache."""

ROUNDS: Final = 30
"""How often the whole networks run in turns."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a layer: the shape and dtype of its input."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@outside_inference_mode
def measure_latency(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    widths: Sequence[float] = WIDTHS,
    seconds: float = 0.05,
    on_progress: OnProgress | None = None,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Rules | None = None,
    streams: bool = False,
) -> LatencyTable:
    """Time the layers of a model at several widths, on the device where it is.

    Every layer is timed alone, with as many outputs and inputs as its spaces may leave it, in
    evaluation mode with its batch norm folded, and its weights not in the cache. What one channel
    more than a block takes tells how finely its times follow the widths. All else (norms
    that don't fold, activations, sums, what Python takes) is what the whole network takes beyond
    that, at full width and at a quarter of it; and a third network, of odd widths, tells how much
    longer they take.

    Times are those of the number of threads, the dtype, the memory format and the batch that the
    model and its example have now. Nothing else should run meanwhile.

    Args:
        model: the model; it is not changed.
        example_inputs: of the batch size that matters; may be left out as for
            :func:`torchcap.analyze`.
        widths: shares of the channels at which layers are timed, within 0 and 1.
        seconds: that each layer is timed for at each width, at least.
        on_progress: called after each layer.
        leaves: as for :func:`torchcap.analyze`.
        rules: as for :func:`torchcap.analyze`.
        streams: as for :func:`torchcap.analyze`.

    Raises:
        TraceError, ExampleInputsError: if the model cannot be read.
        NothingToCompressError: if no space is free.
        ModelError: if the model is on the meta device.
        PlanError: for widths outside of (0, 1].
    """
    if not widths or not all(0 < width <= 1 for width in widths):
        raise PlanError(f"widths are shares of the channels within 0 and 1; got {tuple(widths)}")
    if any(p.is_meta for p in model.parameters()):
        raise ModelError("a model on the meta device takes no time; load its weights first")
    inputs = default_inputs(model) if example_inputs is None else as_inputs(example_inputs)
    inputs = Inputs(*cloned((inputs.args, dict(inputs.kwargs))))  # a forward may write into them
    graph = Reader(leaves, rules, streams).proven(model, inputs.args or inputs.kwargs)
    narrow, uneven = Plan.uniform(graph, NARROW, multiple_of=EVEN), _uneven_plan(graph)
    folded = copied(model).eval()
    fold_(folded, graph.folds)
    calls = _calls(folded, graph, inputs)
    sizes = Sizes(graph)
    like = next(folded.parameters())
    memory = torch.full((COLD_BYTES // like.element_size(),), 0.01).to(like)
    known: dict[Any, LayerTimes] = {}
    layers: dict[str, LayerTimes] = {}
    for number, (name, found) in enumerate(calls.items(), start=1):
        layer = folded.get_submodule(name)
        free = _free_axes(sizes, name)
        key = (str(layer), tuple(found), free)  # layers of one shape are timed once
        if key not in known:
            known[key] = _layer_times(layer, found, free, widths, memory=memory, seconds=seconds)
        layers[name] = known[key]
        if on_progress is not None:
            slowest = known[key].milliseconds[-1][-1]
            on_progress(Progress("latency", number, len(calls), slowest))
    networks = [folded, *(_materialized(folded, graph, p).eval() for p in (narrow, uneven))]
    whole, whole_narrow, whole_uneven = _whole(networks, inputs)
    alone = LatencyTable(graph.model, _device(folded), layers, 0.0, 0.0, whole)
    rest = whole - predict_latency(graph, None, alone)
    rest_narrow = whole_narrow - predict_latency(graph, narrow, alone)
    written, written_narrow = cost(graph).activations, cost(graph, narrow).activations
    slope = (rest - rest_narrow) / max(1, written - written_narrow)
    even = replace(alone, rest=rest, rest_floor=rest - slope * written)
    share = _share_uneven(graph, uneven, even, whole_uneven)
    return replace(even, uneven=share)


def _uneven_plan(graph: SpaceGraph) -> Plan:
    """Return a plan of odd widths, as far as the blocks of spaces allow them."""
    widths = {space.name: space.channels // space.blocks for space in graph.free}
    ranks = {n: min(width, 2 * int(UNEVEN * width / 2) + 1) for n, width in widths.items()}
    return Plan.of(graph, {n: rank * graph[n].blocks for n, rank in ranks.items()})


def _share_uneven(graph: SpaceGraph, plan: Plan, even: LatencyTable, whole: float) -> float:
    """Return by which share of their times the layers of uneven widths take longer."""
    expected = predict_latency(graph, plan, even)
    layers = predict_latency(graph, plan, replace(even, uneven=1.0)) - expected
    return max(0.0, (whole - expected) / layers) if layers > 0 else 0.0


def _calls(model: nn.Module, graph: SpaceGraph, inputs: Inputs) -> dict[str, list[_Call]]:
    """Return the calls of every layer in one forward."""
    modules = dict(model.named_modules())
    names = [n for n in dict.fromkeys(call.module for call in graph.calls) if n in modules]
    names = [n for n in names if not isinstance(modules[n], nn.MultiheadAttention)]
    found: dict[str, list[_Call]] = {}

    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = layer_input(args, kwargs)
            found.setdefault(name, []).append(_Call(tuple(x.shape), x.dtype))

        return note

    handles = [
        modules[name].register_forward_pre_hook(noting(name), with_kwargs=True) for name in names
    ]
    try:
        with torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _free_axes(sizes: Sizes, name: str) -> tuple[bool, bool]:
    """Return whether the size of a layer's weight varies, along each of its first two axes."""
    tensor = weight_of(name)
    known = tensor in sizes.graph.tensors  # tied or parametrized weights never change
    rows, columns = (known and bool(sizes(tensor, axis).parts.any()) for axis in (0, 1))
    return rows, columns


def _multiple(layer: nn.Module) -> int:
    """Return what the number of a layer's outputs is a multiple of."""
    groups = getattr(layer, "groups", 1)
    return len(layer.weight) // groups if _is_depthwise(layer) else groups  # type: ignore[arg-type]


def _is_depthwise(layer: nn.Module) -> bool:
    grouped = getattr(layer, "groups", 1) > 1 and output_axis(layer) == 0
    return grouped and layer.groups == layer.in_channels


def _width_written(layer: nn.Module, weight: Tensor) -> int:
    if output_axis(layer) == 0:
        return len(weight)
    return weight.shape[1] * int(layer.groups)  # type: ignore[arg-type]


def _layer_times(
    layer: nn.Module,
    calls: Sequence[_Call],
    free: tuple[bool, bool],
    widths: Sequence[float],
    *,
    memory: Tensor,
    seconds: float,
) -> LayerTimes:
    shape = layer.weight.shape
    assert isinstance(shape, torch.Size)  # noqa: S101 - of a convolution or linear layer

    def taken(rows: int, columns: int) -> float:
        return sum(_milliseconds(layer, call, rows, columns, memory, seconds) for call in calls)

    of_rows, of_columns = partial(taken, columns=shape[1]), partial(taken, shape[0])
    steps = [1, 1]
    grid = []
    for axis, of_axis in enumerate((of_rows, of_columns)):
        multiple = _multiple(layer) if axis == 0 else 1
        if free[axis] and multiple == 1:
            steps[axis] = multiple = _step(of_axis, shape[axis])
        shares = widths if free[axis] else ()
        rounded = (multiple * max(1, math.ceil(shape[axis] * s / multiple)) for s in shares)
        grid.append(tuple(sorted({*(min(n, shape[axis]) for n in rounded), shape[axis]})))
    times = tuple(tuple(taken(rows, columns) for columns in grid[1]) for rows in grid[0])
    return LayerTimes(grid[0], grid[1], times, (steps[0], steps[1]))


def _step(milliseconds: Callable[[int], float], full: int) -> int:
    """Return how finely times follow a width, by what one channel more than a block takes."""
    span = max((step for step in STEPS if 2 * step <= full), default=1)
    low = full // 2 // span * span
    before, one_more, after = (milliseconds(low + more) for more in (0, 1, span))
    if span == 1 or after - before < LEAST_RISE * after:
        return 1
    share = (one_more - before) / (after - before)
    return min((1, *(s for s in STEPS if s <= span)), key=lambda step: abs(share - step / span))


@torch.no_grad()
def _milliseconds(
    layer: nn.Module, call: _Call, rows: int, columns: int, memory: Tensor, seconds: float
) -> float:
    """Time one call of a layer whose weight has other sizes along its first two axes."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - of a convolution or linear layer
    shape = [rows, columns, *weight.shape[2:]]
    turns = [_resized(layer, resized) for resized in _weights(shape, weight, memory)]
    shape = list(call.shape)
    read = columns if output_axis(layer) == 0 else rows
    shape[-1 if isinstance(layer, nn.Linear) else 1] = read * getattr(turns[0], "groups", 1)
    x = torch.randn(shape, dtype=call.dtype, device=weight.device)
    x = x.to(memory_format=_order(weight)) if x.dim() == 4 else x
    known = {"turns": cycle(turns), "x": x}
    timer = Timer("next(turns)(x)", globals=known, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def _weights(shape: Sequence[int], like: Tensor, memory: Tensor) -> list[Tensor]:
    """Return as many weights of a shape as caches do not hold; they share one memory."""
    entries = math.prod(shape)
    count = max(1, min(MOST_TURNS, memory.nbytes // (entries * like.element_size())))
    if memory.dtype != like.dtype or count * entries > memory.numel():
        memory = torch.full((count * entries,), 0.01, dtype=like.dtype, device=like.device)
    weights = list(memory[: count * entries].view(count, *shape))
    return [weight.to(memory_format=_order(like)) for weight in weights]


def _order(weight: Tensor) -> torch.memory_format:
    """Return the order that a weight is stored in: channels last, or as its dimensions are."""
    last = weight.dim() == 4 and not weight.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _resized(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return a layer of the same kind with another weight."""
    shell: Any = copy.copy(layer)
    shell._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    if layer._parameters.get("bias") is not None:
        bias = weight.new_zeros(_width_written(layer, weight))
        shell._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    else:
        shell._parameters["bias"] = None
    for name in HOOKS:
        setattr(shell, name, OrderedDict())
    if _is_depthwise(layer):
        width = shell.in_channels * len(weight) // shell.out_channels
        shell.groups = shell.in_channels = width
    return shell


def _materialized(folded: nn.Module, graph: SpaceGraph, plan: Plan) -> nn.Module:
    student = copied(folded)
    bases = bases_for(student, graph.after_folding(), plan, LargestNorm())
    project_(student, graph, plan, bases)
    return materialize(student)


@torch.no_grad()
def _whole(models: Sequence[nn.Module], inputs: Inputs) -> list[float]:
    """Return the milliseconds of each model's forward, taken in turns."""
    timers = [
        Timer(
            "model(*args, **kwargs)",
            globals={"model": model, "args": inputs.args, "kwargs": dict(inputs.kwargs)},
            num_threads=torch.get_num_threads(),
        )
        for model in models
    ]
    for timer in timers:
        timer.timeit(2)
    taken: list[list[float]] = [[] for _ in timers]
    for _ in range(ROUNDS):
        for timer, times in zip(timers, taken, strict=True):
            times.append(1e3 * timer.timeit(1).median)
    return [float(torch.tensor(times).median()) for times in taken]


def _device(model: nn.Module) -> str:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
