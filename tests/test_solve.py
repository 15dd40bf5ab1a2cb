"""Closed forms: exact where that can be, never worse, and nothing else is changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import NETS as READ_NETS
from proofs import random_plan
from small_nets import EVERY_NET, NETS, Block, Residual, built, fingerprint, images, values
from strategies import Network, networks
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from torchcap import (
    ClosedForm,
    DataError,
    GreedySelection,
    Plan,
    Progress,
    RandomOrthonormal,
    RecipeError,
    Solution,
    SpaceGraph,
    TraceError,
    analyze,
    materialize,
    prepare,
    solve,
)
from torchcap.batches import Source
from torchcap.graph.analyze import Reader
from torchcap.graph.spaces import ChannelSpace
from torchcap.projection.initialize import Initializer, SpaceContext, selection_matrix
from torchcap.training import solve as module
from torchcap.training.progress import Watch
from torchcap.training.solve import Selected, select
from torchcap.transform.fold import fold_
from torchcap.transform.prepare import project_

MIB = 2**20
EXACT = ClosedForm(ridge=1e-12)


def batches(count: int = 3, size: int = 16) -> list[Tensor]:
    return [images(size, seed=10 + number) for number in range(count)]


def made(net: str, seed: int = 0) -> nn.Module:
    return built(NETS[net], seed=seed)


def random_start(seed: int = 0) -> Initializer:
    return RandomOrthonormal(torch.Generator().manual_seed(seed))


def cut(model: nn.Module, **options: Any) -> nn.Module:
    """A small model, from a random start unless a test says otherwise."""
    options.setdefault("init", random_start())
    options.setdefault("example_inputs", images())
    return materialize(prepare(model, **options))


@torch.no_grad()
def error(small: nn.Module, teacher: nn.Module, data: Iterable[Any] | None = None) -> float:
    """The mean square of what the outputs differ by, as a share of the teacher's."""
    left = total = 0.0
    small, teacher = (copy.deepcopy(model).eval() for model in (small, teacher))
    for x in batches() if data is None else data:
        ours, theirs = (m(*x) if isinstance(x, tuple) else m(x) for m in (small, teacher))
        left += float((ours - theirs).square().sum())
        total += float(theirs.square().sum())
    return left / total


def assert_never_worse(solution: Solution) -> None:
    for solved in solution.layers:
        assert solved.after <= solved.before + 1e-9, solved


# --------------------------------------------------------------------------------------------------
# Exact where that can be


def first_of_each_block(space: SpaceContext) -> Tensor:
    indices = torch.arange(space.block_rank).expand(space.blocks, -1)
    return selection_matrix(indices, space.block_channels)


def writers_of(space: ChannelSpace) -> ChannelSpace:
    """The space without its readers; with the statistics of the norms that it passes."""
    own = [*space.producers, *space.carriers]
    norms = [p for p in space.carriers if p.parameter == "weight"]
    statistics = [replace(p, parameter=f"running_{n}") for p in norms for n in ("mean", "var")]
    return replace(space, producers=tuple(own), consumers=(), carriers=tuple(statistics))


def statistics_of(model: nn.Module, space: ChannelSpace) -> ChannelSpace:
    held = [p for p in space.carriers if hasattr(model.get_submodule(p.module), p.parameter)]
    return replace(space, carriers=tuple(held))


@torch.no_grad()
def redundant(model: nn.Module, kind: str, x: Any) -> nn.Module:
    """Fold a model, and let the last half of every block's channels be dead, or like the first."""
    graph = analyze(model, x)
    fold_(model, graph.folds)
    for space in graph.after_folding().free:
        writers = statistics_of(model, writers_of(space))
        width = space.channels // space.blocks
        half = torch.arange(space.channels) % width >= (width + 1) // 2
        for port in writers.ports:
            tensor = getattr(model.get_submodule(port.module), port.parameter).data
            ends = range(port.start, port.start + port.channels)
            rows = [port.offset + i - port.start for i in ends if half[i]]
            if kind == "dead" and not port.parameter.startswith("running"):
                tensor.index_fill_(0, torch.tensor(rows), 0.0)
            elif kind == "double":
                like = [row - (width + 1) // 2 for row in rows]
                tensor[rows] = tensor[like]
    return model


@torch.no_grad()
def perturb_readers_(small: nn.Module, teacher: nn.Module) -> None:
    """Spoil the layers that read fewer channels than in the teacher, and write as many."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in teacher.named_parameters()}
    for name, weight in small.named_parameters():
        if weight.shape != shapes[name] and len(weight) == shapes[name][0]:
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.add_(noise * weight.std())


@EVERY_NET
def test_a_model_whose_channels_half_are_dead_is_recovered(net: str) -> None:
    teacher = redundant(made(net), "dead", images())
    small = cut(teacher, init=first_of_each_block)
    assert error(small, teacher) < 1e-20
    perturb_readers_(small, teacher)
    assert error(small, teacher) > 1e-3
    solution = solve(small, teacher, batches(6), EXACT)
    assert error(small, teacher) < 1e-14
    assert {solved.method for solved in solution.layers} == {"kernel"}


RESIDUAL = ["residual", "module ends", "shared activation", "pre-activation", "inline"]


@pytest.mark.parametrize("net", RESIDUAL)
def test_a_model_whose_channels_come_in_pairs_is_recovered(net: str) -> None:
    teacher = redundant(made(net), "double", images())
    small = cut(teacher, init=first_of_each_block)
    perturb_readers_(small, teacher)
    assert error(small, teacher) > 1e-3
    solve(small, teacher, batches(), EXACT)
    assert error(small, teacher) < 1e-14


@pytest.mark.parametrize("net", RESIDUAL)
def test_a_ridge_that_is_chosen_is_close_to_exact_where_that_can_be(net: str) -> None:
    teacher = redundant(made(net), "double", images())
    small = cut(teacher, init=first_of_each_block)
    perturb_readers_(small, teacher)
    before = error(small, teacher)
    solution = solve(small, teacher, batches())
    assert error(small, teacher) < 1e-6 * before
    assert min(s.ridge for s in solution.layers if s.ridge is not None) == 1e-6


def test_a_model_that_is_not_cut_has_nothing_to_solve() -> None:
    teacher = made("residual")
    small = copy.deepcopy(teacher)
    with torch.no_grad():
        small.fc.weight.add_(1.0)
    before = values(small)["fc.weight"]
    assert solve(small, teacher, batches()).layers == ()
    assert torch.equal(small.fc.weight, before)


def test_layers_in_front_of_the_first_cut_stay() -> None:
    teacher = made("residual")
    small = cut(teacher, ratio={"block2.conv1": 0.5})
    before = values(small)
    solution = solve(small, teacher, batches())
    assert [solved.layer for solved in solution.layers] == ["block2.conv2", "fc"]
    changed = {
        name for name, value in values(small).items() if not torch.equal(value, before[name])
    }
    assert changed == {"block2.conv2.weight", "block2.conv2.bias", "fc.weight", "fc.bias"}


# --------------------------------------------------------------------------------------------------
# Better, and never worse

KINDS = [
    "Signal", "Video", "FlattenIntoLinear", "Bottleneck", "ResidualOptionA", "Fire", "DenseBlock",
    "ChunkByAxis", "DepthwiseSeparable", "DepthwiseMultiplier", "Grouped", "SwappedHalves",
    "GroupedAfterConcatenation", "SqueezeExcite", "Slopes", "GroupNormed", "LayerNormed",
    "Standardised", "LayerScale", "SharedLayer", "TiedWeights", "Decoder",
]  # fmt: skip


@EVERY_NET
@pytest.mark.parametrize("init", [None, random_start()])
def test_no_layer_gets_worse_and_the_output_gets_better(net: str, init: Initializer) -> None:
    teacher = made(net)
    small = cut(teacher, init=init)
    before = error(small, teacher)
    solution = solve(small, teacher, batches())
    assert_never_worse(solution)
    assert error(small, teacher) < 0.5 * before


@pytest.mark.parametrize("net", KINDS)
def test_every_kind_of_layer_gets_better(net: str) -> None:
    truth = READ_NETS[net]
    teacher = truth.model()
    generator = torch.Generator().manual_seed(3)
    shapes = [(8 * x.shape[0], *x.shape[1:]) for x in truth.inputs()]
    data = [tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)]
    small = cut(teacher, example_inputs=truth.inputs())
    before = error(small, teacher, data)
    assert_never_worse(solve(small, teacher, [by_name(teacher, x) for x in data]))
    assert error(small, teacher, data) < 0.8 * before


def by_name(model: nn.Module, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = model.forward.__code__.co_varnames[1:]
    return dict(zip(names, args, strict=False))


@settings(
    deadline=None, max_examples=6, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(network=networks(), seed=st.integers(0, 2**16))
def test_random_networks_at_any_plan_get_no_worse(network: Network, seed: int) -> None:
    teacher, x = network.build(), network.inputs()
    plan = random_plan(analyze(teacher, x), seed)
    small = cut(teacher, plan=plan, init=random_start(seed), example_inputs=x)
    before = error(small, teacher)
    assert_never_worse(solve(small, teacher, batches()))
    assert error(small, teacher) <= before + 1e-9


def test_images_that_were_not_seen_get_better_too() -> None:
    teacher, fresh = made("residual"), [images(64, seed=99)]
    small = cut(teacher)
    before = error(small, teacher, fresh)
    solve(small, teacher, batches())
    assert error(small, teacher, fresh) < 0.2 * before


@EVERY_NET
@pytest.mark.parametrize(
    "data", [[images(1)], [torch.zeros(4, 3, 8, 8).double()] * 2, [images(1).expand(3, -1, -1, -1)]]
)
def test_images_that_say_nothing_do_no_harm(net: str, data: list[Tensor]) -> None:
    teacher = made(net)
    small = cut(teacher)
    largest = max(float(p.detach().abs().max()) for p in teacher.parameters())
    assert_never_worse(solve(small, teacher, data))
    assert error(small, teacher, data) < 1e-3
    assert max(float(p.detach().abs().max()) for p in small.parameters()) < 100 * largest


# --------------------------------------------------------------------------------------------------
# What stays as it is


def described(model: nn.Module) -> dict[str, Any]:
    """Everything that a solved model has in common with the one before, tensors' values aside."""
    return {
        path: (type(module), [list(v) for k, v in vars(module).items() if "_hooks" in k],
               {n: (p.shape, p.dtype, p.requires_grad) for n, p in module.named_parameters()},
               {k: v for k, v in vars(module).items() if isinstance(v, int | tuple)})
        for path, module in model.named_modules()
    }  # fmt: skip


@EVERY_NET
def test_shapes_classes_flags_modes_and_hooks_stay(net: str) -> None:
    teacher = made(net).train()
    teacher.register_forward_hook(lambda module, args, output: None)
    first, *_, last = teacher.parameters()
    first.requires_grad = last.requires_grad = False
    small = cut(teacher, example_inputs=images())
    next(small.children()).eval()
    before, whole = described(small), fingerprint(teacher)
    solve(small, teacher, batches())
    assert described(small) == before
    assert fingerprint(teacher) == whole
    assert all(p.grad is None for p in small.parameters())


@pytest.mark.parametrize("net", ["pre-activation", "dense"])
def test_layers_without_a_bias_stay_without(net: str) -> None:
    teacher = made(net)
    small = cut(teacher)
    bare = {name for name, m in small.named_modules() if getattr(m, "bias", 0) is None}
    solution = solve(small, teacher, batches())
    assert bare & {solved.layer for solved in solution.layers if solved.method == "kernel"}
    assert {name for name, m in small.named_modules() if getattr(m, "bias", 0) is None} == bare


def test_a_model_in_training_mode_is_solved_for_evaluation_and_stays_in_training_mode() -> None:
    teacher = made("pre-activation")
    small = cut(teacher)
    twin = copy.deepcopy(small).train()
    solve(small, teacher, batches())
    solve(twin, copy.deepcopy(teacher).train(), batches())
    assert all(m.training for m in twin.modules())
    torch.testing.assert_close(values(twin), values(small), rtol=0, atol=0)


def test_norms_of_a_small_model_that_fold_are_folded_first() -> None:
    teacher, small = made("residual"), built(lambda: Residual(width=3), seed=1)
    before = error(small, teacher)
    assert_never_worse(solve(small, teacher, batches()))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    assert error(small, teacher) < 0.1 * before


def test_a_graph_module_is_solved_as_its_model_is() -> None:
    teacher = made("residual")
    traced = fx.symbolic_trace(teacher)
    small, graph = cut(teacher, init=first_of_each_block), cut(traced, init=first_of_each_block)
    solve(small, teacher, batches())
    solve(graph, traced, batches())
    assert isinstance(graph, fx.GraphModule)
    torch.testing.assert_close(graph(images()), small(images()), rtol=1e-10, atol=1e-10)


class Scaled(nn.Conv2d):
    """A convolution that does something else with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_leaf_that_is_no_plain_layer_stays_as_it_is() -> None:
    teacher = built(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), Scaled(6, 4, 1), nn.Conv2d(4, 2, 1)
        )
    )
    graph = analyze(teacher, images(), leaves=[Scaled])
    small = cut(teacher, plan=Plan.of(graph, {"0": 4}), leaves=[Scaled])
    solution = solve(small, teacher, batches(), leaves=[Scaled])
    assert [solved.layer for solved in solution.layers] == ["2", "4"]
    assert torch.equal(small[3].weight, teacher[3].weight)


# --------------------------------------------------------------------------------------------------
# Memory


class Wide(nn.Module):
    """Kernels that take more than half a mebibyte of moments, but for the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1, self.block2 = Block(8, 48), Block(8, 48)
        self.conv = nn.Conv2d(8, 64, 3, padding=1)
        self.tail = nn.Conv2d(64, 40, 3, padding=1)
        self.fc = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.fc(F.relu(self.tail(F.relu(self.conv(x)))).mean((2, 3)))


def methods(solution: Solution) -> dict[str, str]:
    return {solved.layer: solved.method for solved in solution.layers}


def test_kernels_that_do_not_fit_are_mixed_or_kept_within_the_memory() -> None:
    teacher = built(Wide)
    small = cut(teacher)
    before = error(small, teacher)
    solution = solve(small, teacher, batches(), memory=MIB)
    found = methods(solution)
    assert {found["block1.conv2"], found["block2.conv2"]} == {"mixing"}
    assert found["tail"] == "kept"  # it writes fewer channels than the teacher's
    assert found["fc"] == "kernel"
    assert solution.peak <= MIB
    assert_never_worse(solution)
    assert error(small, teacher) < 0.5 * before


def test_a_layer_whose_outputs_cannot_be_compared_in_the_memory_stays_as_it_is() -> None:
    wide = [nn.Conv2d(i, o, 1) for i, o in ((3, 8), (8, 256), (256, 5))]
    teacher = built(lambda: nn.Sequential(wide[0], nn.ReLU(), wide[1], nn.ReLU(), wide[2]))
    small = cut(teacher)
    before = values(small)
    solution = solve(small, teacher, batches(), memory=MIB)
    assert methods(solution) == {"2": "kept", "4": "kernel"}
    assert math.isnan(solution.layers[0].before)
    assert torch.equal(small[2].weight, before["2.weight"])


def test_mixing_is_exact_where_channels_come_in_pairs() -> None:
    teacher = redundant(built(lambda: Residual(width=48)), "double", images())
    small = cut(teacher, init=first_of_each_block)
    perturb_readers_(small, teacher)
    before = error(small, teacher)
    solution = solve(small, teacher, batches(), memory=MIB)
    assert {methods(solution)[f"block{i}.conv2"] for i in (1, 2)} == {"mixing"}
    assert error(small, teacher) < 1e-6 * before


def test_mixing_never_spoils_a_kernel_that_is_better_already() -> None:
    teacher = built(Wide)
    small = cut(teacher)
    solve(small, teacher, batches())
    best = error(small, teacher)
    solution = solve(small, teacher, batches(), memory=MIB)
    assert_never_worse(solution)
    assert error(small, teacher) < 2 * best


@pytest.mark.parametrize("net", ["residual", "dense", "plain"])
@pytest.mark.parametrize("memory", [0, 300, 3_000, 30_000, 300_000])
def test_any_memory_will_do(net: str, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClosedForm, "__post_init__", lambda self: None)  # which wants a mebibyte
    teacher = made(net)
    small = cut(teacher)
    before = error(small, teacher)
    solution = solve(small, teacher, batches(), memory=memory)
    assert solution.peak <= memory
    assert not any(solved.after > solved.before + 1e-9 for solved in solution.layers)
    assert error(small, teacher) <= 1.2 * before


def test_less_memory_gives_the_same_kernels_where_they_fit() -> None:
    teacher = made("residual")
    small = cut(teacher)
    twin = copy.deepcopy(small)
    data = batches(8, 24)
    assert solve(small, teacher, data).peak > MIB
    assert solve(twin, teacher, data, memory=MIB).peak <= MIB
    torch.testing.assert_close(values(twin), values(small), rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# Data and seeds


def solved_values(data: Any, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    teacher = made("residual")
    small = cut(teacher)
    solve(small, teacher, data, seed=seed, **changes)
    return values(small)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_same_seed_gives_the_same_model_and_another_one_another(
    *, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_PER_BATCH", 100 if not shuffle else 10**6)
    dataset = TensorDataset(images(48))

    def run(seed: int) -> dict[str, Tensor]:
        torch.rand(3)
        return solved_values(DataLoader(dataset, batch_size=10, shuffle=shuffle), seed)

    first = run(1)
    assert_equal(run(1), first)
    assert not torch.equal(run(2)["fc.weight"], first["fc.weight"])


def test_a_sweep_leaves_the_random_state_alone() -> None:
    teacher = made("residual")
    small, before = cut(teacher), torch.get_rng_state()
    solve(small, teacher, batches())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fill", [0, 10**6])
def test_labels_are_not_used(fill: int) -> None:
    labels = torch.full((16,), fill)
    expected = solved_values(batches())
    assert_equal(solved_values([(x, labels) for x in batches()]), expected)
    assert_equal(solved_values([{"x": x, "labels": labels} for x in batches()]), expected)


def test_batches_beyond_the_limit_are_not_looked_at() -> None:
    bad = images(16) * float("nan")
    assert_equal(solved_values([*batches(2), bad], batches=2), solved_values(batches(2)))


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        (iter([images()]), "only once"),
        ((x for x in [images()]), "only once"),
        ([], "empty"),
        (images(), "wrap one batch into a list"),
        ([images(), images() * float("nan")], "batch 1 .*NaN"),
        ([images(), images()[:, :2]], r"batch 1 .*\(4, 2, 8, 8\)"),
        ([images(dtype=torch.float32)], r"batch 0 .*float32"),
        (["images"], "got str"),
    ],
)
def test_data_that_cannot_be_used_is_refused_and_nothing_is_solved(data: Any, facts: str) -> None:
    teacher = made("residual")
    small = cut(teacher)
    before = values(small)
    with pytest.raises(DataError, match=facts):
        solve(small, teacher, data)
    assert_equal(values(small), before)


@pytest.mark.parametrize("net", ["inline", "plain", "dense"])
def test_a_teacher_of_another_structure_is_refused_and_nothing_is_solved(net: str) -> None:
    small = cut(made("residual"))
    before = values(small)
    with pytest.raises(TraceError, match="another structure"):
        solve(small, made(net), batches())
    assert_equal(values(small), before)


@pytest.mark.parametrize("changes", [{"memory": 1000}, {"ridge": 0.0}, {"batches": 0}])
def test_schedules_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(changes))):
        solved_values(batches(), **changes)


# --------------------------------------------------------------------------------------------------
# What is told


def test_progress_is_told_layer_by_layer_and_the_solution_prints_as_a_table() -> None:
    teacher, told = made("residual"), list[Progress]()
    solution = solve(cut(teacher), teacher, batches(), on_progress=told.append)
    layers = ["block1.conv2", "block2.conv1", "block2.conv2", "fc"]
    assert [solved.layer for solved in solution.layers] == layers
    assert [(p.name, p.step, p.steps) for p in told] == [("closed form", i, 4) for i in range(1, 5)]
    assert [p.loss for p in told] == [solved.after for solved in solution.layers]
    header, *rows, peak = str(solution).splitlines()
    assert header.split() == ["layer", "method", "ridge", "error", "before", "after"]
    assert [row.split()[0] for row in rows] == layers
    assert f"{solution.peak / MIB:.1f} MiB" in peak


@EVERY_NET
@torch.no_grad()
def test_the_errors_told_are_those_of_the_layers_outputs(net: str) -> None:
    teacher = made(net)
    fold_(teacher, analyze(teacher, images()).folds)
    small = cut(teacher)
    start = copy.deepcopy(small)
    solution = solve(small, teacher, batches())
    last = solution.layers[-1]
    assert last.layer.startswith(("fc", "classifier"))
    assert last.after == pytest.approx(error(small, teacher), rel=1e-6)
    before = copy.deepcopy(small)
    before.get_submodule(last.layer).load_state_dict(start.get_submodule(last.layer).state_dict())
    assert last.before == pytest.approx(error(before, teacher), rel=1e-6)


# --------------------------------------------------------------------------------------------------
# Choosing channels on the way


def selected(
    model: nn.Module,
    ratio: float = 0.5,
    data: Sequence[Any] | None = None,
    x: Any = None,
    **options: Any,
) -> tuple[SpaceGraph, Plan, Selected]:
    graph = analyze(model, images() if x is None else x)
    plan = Plan.uniform(graph, ratio)
    source = Source(batches() if data is None else data)
    schedule = ClosedForm(**options)
    return graph, plan, select(model, plan, graph, source, schedule, Reader(), Watch("selection"))


def narrowed(model: nn.Module, graph: SpaceGraph, plan: Plan, found: Selected) -> nn.Module:
    """The small model that compress() makes of a selection."""
    student = copy.deepcopy(model)
    fold_(student, graph.folds)
    student.load_state_dict(found.model.state_dict())
    project_(student, graph, plan, dict(found.bases))
    return materialize(student)


@EVERY_NET
@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
def test_selections_are_valid_and_have_the_ranks_of_the_plan(net: str, ratio: float) -> None:
    graph, plan, found = selected(made(net), ratio)
    assert list(found.bases) == list(plan.choices)
    for name, basis in found.bases.items():
        blocks, channels = graph[name].blocks, graph[name].channels
        assert basis.shape == (blocks, channels // blocks, plan.ranks[name] // blocks)
        assert torch.equal(basis.sum(1), torch.ones_like(basis.sum(1)))
        assert set(basis.unique().tolist()) <= {0.0, 1.0}
        assert basis.sum(2).max() == 1


def readings(model: nn.Module, space: ChannelSpace) -> Iterable[tuple[str, Tensor]]:
    """What every reader does with every channel, ``(channels, …)``."""
    for port in space.consumers:
        weight = model.get_submodule(port.module).weight.detach()
        if port.groups == 1:
            columns = weight.movedim(1, 0)[port.offset :][: port.channels * port.repeat]
            yield port.module, columns.reshape(port.channels, -1)
        else:
            grouped = weight.reshape(port.groups, -1, *weight.shape[1:]).transpose(1, 2)
            yield port.module, grouped.flatten(0, 1)[port.offset :][: port.channels].flatten(1)


@pytest.mark.parametrize("net", [*NETS, "Grouped", "ConcatenationWithItself", "Fire", "Bottleneck"])
def test_readers_use_the_chosen_channels_and_no_others(net: str) -> None:
    truth = READ_NETS.get(net)
    model, x = (truth.model(), truth.inputs()) if truth else (made(net), images())
    graph, plan, found = selected(model, x=x)
    for name, basis in found.bases.items():
        kept = basis.sum(-1).flatten() > 0.5
        assert int(kept.sum()) == plan.ranks[name]
        for reader, columns in readings(found.model, graph[name]):
            assert bool((columns[~kept] == 0).all()), (name, reader)
            assert bool((columns[kept] != 0).any(1).all()), (name, reader)


@pytest.mark.parametrize("net", [*NETS, "Grouped", "Fire", "Bottleneck", "DepthwiseMultiplier"])
def test_the_narrowed_model_computes_what_the_sweep_has_solved(net: str) -> None:
    truth = READ_NETS.get(net)
    model, x = (truth.model(), truth.inputs()) if truth else (made(net), images())
    graph, plan, found = selected(model, x=x)
    small = narrowed(model, graph, plan, found)
    assert {n: p.shape for n, p in small.named_parameters()} != {
        n: p.shape for n, p in found.model.named_parameters()
    }
    torch.testing.assert_close(small(images()), found.model(images()), rtol=1e-10, atol=1e-10)
    assert_never_worse(found.solution)


@settings(
    deadline=None, max_examples=6, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(network=networks(4))
def test_a_selection_in_random_networks_is_never_worse(network: Network) -> None:
    model = network.build()
    _, _, found = selected(model, x=network.inputs())
    assert_never_worse(found.solution)
    assert error(found.model, model) < 1


def test_all_channels_are_the_model_itself() -> None:
    model = made("plain")
    _, _, found = selected(model, 1.0)
    assert error(found.model, model) < 1e-20


def test_a_model_with_channels_to_spare_loses_nothing() -> None:
    model = redundant(made("residual"), "double", images())
    _, _, found = selected(model)
    assert error(found.model, model) < 1e-8


def test_choosing_on_the_students_features_is_better_than_on_the_teachers_on_average() -> None:
    ratios = []
    for net in ("residual", "inline", "plain", "dense", "separable"):
        for seed in range(2):
            model = made(net, seed)
            *_, found = selected(model)
            small = cut(model, init=GreedySelection(), data=batches())
            solve(small, model, batches())
            ratios.append(math.log(error(found.model, model) / error(small, model)))
    assert len(ratios) == 10
    assert sum(ratios) / len(ratios) < 0


def test_a_selection_changes_nothing_but_its_copy() -> None:
    model = made("dense").train()
    before, state = fingerprint(model), torch.get_rng_state()
    _, _, found = selected(model)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in found.model.modules())
    assert all(p.requires_grad for p in found.model.parameters())


def test_a_selection_stays_within_its_memory() -> None:
    model = built(Wide)
    _, plan, found = selected(model, memory=MIB)
    assert found.solution.peak <= MIB
    assert methods(found.solution)["tail"] == "mixing"
    assert {name: basis.shape[2] for name, basis in found.bases.items()} == plan.ranks
    assert_never_worse(found.solution)


class ConstantChannel(nn.Module):
    """The first of two channels is large and always the same; the other one varies a little."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.read = nn.Conv2d(2, 3, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(F.relu(self.conv(x)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_channel_is_needed_where_no_bias_makes_up_for_it(*, bias: bool) -> None:
    model = built(lambda: ConstantChannel(bias=bias))
    with torch.no_grad():
        model.conv.weight[0], model.conv.bias[0] = 0.0, 5.0
        model.conv.weight[1].mul_(0.1)
    *_, found = selected(model)
    assert found.bases["conv"].flatten().tolist() == ([0.0, 1.0] if bias else [1.0, 0.0])


class DecidedBefore(nn.Module):
    """`both` reads a space that was decided before, and one that it decides about."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)
        self.other, self.both = nn.Conv2d(2, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.first(x)), F.relu(self.second(x))
        return torch.cat([self.other(first), self.both(torch.cat([first, second], 1))], 1)


def test_channels_that_are_gone_make_up_for_no_others() -> None:
    model = built(DecidedBefore)
    with torch.no_grad():
        model.second.weight[0], model.second.bias[0] = model.first.weight[0], model.first.bias[0]
        model.other.weight[:, 0] = 0.0  # so the first channel goes, and its twin has to stay
        model.both.weight[:, :2] = 0.0
        model.both.weight[:, 3].mul_(0.1)
    *_, found = selected(model)
    assert found.bases["first"].flatten().tolist() == [0.0, 1.0]
    assert found.bases["second"].flatten().tolist() == [1.0, 0.0]
