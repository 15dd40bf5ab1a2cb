"""Measuring: what each space loses alone, and what layers take."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_nets import Plain, Residual, built, images, labels
from torch import Tensor, nn

from torchcap import (
    DataError,
    LatencyTable,
    LayerTimes,
    ModelError,
    Plan,
    PlanError,
    Progress,
    Recipe,
    Sensitivity,
    StateError,
    allocate,
    analyze,
    compress,
    cost,
    measure_latency,
    plan_for,
    predict_latency,
    sensitivity,
)
from torchcap import budget as budgets
from torchcap.training.clock import _step

SHARES = (0.25, 0.5, 1.0)


class TwoLayers(nn.Module):
    """One space between a convolution and a layer that puts out a score for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu()).mean((2, 3))


def batches(count: int = 4, size: int = 4, *, answers: bool = False) -> list[tuple[Tensor, ...]]:
    pairs = [(images(size, seed=10 + i), labels(size)) for i in range(count)]
    return pairs if answers else [pair[:1] for pair in pairs]


# --------------------------------------------------------------------------------------------------
# Errors and scores


def test_error_is_that_of_the_best_weights_for_the_channels_kept() -> None:
    model = built(TwoLayers)
    data = [images(6)]  # one batch, for choosing and for measuring
    curve = sensitivity(model, data, shares=(0.5,))["conv"]
    with torch.no_grad():
        features = model.conv(data[0]).relu()
        rows = features.movedim(1, -1).flatten(0, 2)
        target = model.head(features).movedim(1, -1).flatten(0, 2)
        score = model(data[0])
        errors = []
        for kept in itertools.combinations(range(6), 3):
            design = torch.cat([rows[:, kept], rows.new_ones(len(rows), 1)], 1)
            found = design @ torch.linalg.lstsq(design, target).solution
            # The mean over positions is linear, so scores are those of the regressed outputs.
            mean = found.reshape(len(data[0]), -1, 5).mean(1)
            errors.append(float((mean - score).square().sum() / score.square().sum()))
    assert curve.ranks == (3,)
    assert min(abs(error - curve.output_errors[0]) for error in errors) < 1e-3 * max(errors)


def test_nothing_is_lost_where_all_channels_are_kept() -> None:
    model = built(Residual)
    found = sensitivity(model, batches(), shares=SHARES)
    assert [curve.space for curve in found.curves] == [
        s.name for s in analyze(model, images()).free
    ]
    for curve in found.curves:
        assert curve.ranks[-1] == curve.channels
        assert max(curve.errors[-1], curve.output_errors[-1]) < 1e-12
        assert curve.scores[-1] == found.baseline == 1.0
        assert curve.errors[0] > curve.errors[1] > 0
    assert found.metric == "agreement"


def test_labels_make_scores_accuracies() -> None:
    model = built(Residual)
    data = batches(answers=True)
    found = sensitivity(model, data, shares=(1.0,))
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).double() for x, y in data[1::2]]
    assert found.metric == "accuracy"
    assert found.images == 8
    assert found.baseline == pytest.approx(float(torch.cat(right).mean()))
    assert found.curves[0].scores[-1] == pytest.approx(found.baseline)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda y: y + 100, "a label 10"),
        (lambda y: y[:, None], "do not fit logits"),
        (lambda y: torch.nn.functional.one_hot(y, 10), "do not fit logits"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, problem: str) -> None:
    data = [(x, change(y)) for x, y in batches(answers=True)]
    with pytest.raises(DataError, match=problem):
        sensitivity(built(Residual), data, shares=(0.5,))


def test_shares_of_classes_are_labels_too() -> None:
    data = batches(answers=True)
    classes = built(Residual)(data[0][0]).shape[1]
    mixed = [(x, torch.nn.functional.one_hot(y, classes).to(x.dtype)) for x, y in data]
    found, usual = (sensitivity(built(Residual), d, shares=(0.5,)) for d in (mixed, data))
    assert found.metric == "accuracy"
    assert found.baseline == usual.baseline


def test_plain_networks_are_measured_at_the_layer_that_reads() -> None:
    found = sensitivity(built(Plain), batches(), shares=SHARES)
    assert all(curve.errors[0] > 0 for curve in found.curves)


def test_heads_lose_channels_evenly_and_the_last_ones_least() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    data = [torch.randn(2, 3, 160, 160) for _ in range(2)]
    graph = analyze(model, data[0][:1])
    linear = [space.name for space in graph.free if space.freedom == "linear"][:2]
    assert linear
    found = sensitivity(model, data, spaces=linear, shares=SHARES)
    for curve in found.curves:
        assert all(rank % graph[curve.space].blocks == 0 for rank in curve.ranks)
        assert curve.errors[0] > curve.errors[1] > curve.errors[2]
        assert curve.errors[2] < 1e-6


def test_model_and_data_stay_as_they_are() -> None:
    model = built(Residual).train()
    before = copy.deepcopy(model.state_dict())
    sensitivity(model, batches(), shares=(0.5,))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_streams_are_measured_where_asked() -> None:
    model = built(Residual)
    names = {c.space for c in sensitivity(model, batches(), shares=(0.5,), streams=True).curves}
    assert names == {s.name for s in analyze(model, images(), streams=True).free}
    assert len(names) > len(analyze(model, images()).free)


def test_images_bound_what_is_looked_at() -> None:
    found = sensitivity(built(Residual), batches(count=8), shares=(0.5,), images=8)
    assert found.images == 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shares": ()}, PlanError, "shares is empty"),
        ({"shares": (0.0,)}, PlanError, "0 < ratio <= 1"),
        ({"spaces": ["nowhere"]}, PlanError, "no channel space 'nowhere'"),
        ({"cache": "nowhere/curves.json"}, StateError, "cannot be written"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        sensitivity(built(Residual), batches(), **arguments)


def test_outputs_that_are_no_scores_are_refused() -> None:
    class Mean(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean()

    with pytest.raises(DataError, match="puts out no class scores"):
        sensitivity(built(Mean), batches())


# --------------------------------------------------------------------------------------------------
# The cache


class Interrupted(Exception):  # noqa: N818 - no error
    """An interruption."""


def stop_after(spaces: int) -> Callable[[Progress], None]:
    """Return a callback that interrupts a run after some spaces."""

    def callback(progress: Progress) -> None:
        if progress.step == spaces:
            raise Interrupted

    return callback


def test_interrupted_run_goes_on_to_the_same_curves(tmp_path: Path) -> None:
    model, data, cache = built(Residual), batches(), tmp_path / "curves.json"
    whole = sensitivity(model, data, shares=SHARES)
    with pytest.raises(Interrupted):
        sensitivity(model, data, shares=SHARES, cache=cache, on_progress=stop_after(1))
    kept = json.loads(cache.read_text())["curves"]
    assert len(kept) == 1
    steps: list[int] = []
    again = sensitivity(
        model, data, shares=SHARES, cache=cache, on_progress=lambda p: steps.append(p.step)
    )
    assert again == whole
    assert steps == list(range(2, len(whole.curves) + 1))
    assert Sensitivity.from_json(cache.read_text()) == whole


def test_cache_of_another_measurement_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "curves.json"
    sensitivity(built(Residual), batches(), shares=(0.5,), cache=cache)
    before = cache.read_bytes()
    others = {
        "model": lambda: sensitivity(
            built(Residual, seed=1), batches(), shares=(0.5,), cache=cache
        ),
        "ranks": lambda: sensitivity(built(Residual), batches(), shares=(0.25,), cache=cache),
        "data": lambda: sensitivity(built(Residual), batches()[1:], shares=(0.5,), cache=cache),
    }
    for key, call in others.items():
        with pytest.raises(StateError, match=f"another measurement: its {key} differ"):
            call()
    assert cache.read_bytes() == before


def test_damaged_cache_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "curves.json"
    cache.write_text('{"format": "torchcap-sens')
    with pytest.raises(StateError, match="cannot be read as measured curves"):
        sensitivity(built(Residual), batches(), cache=cache)


# --------------------------------------------------------------------------------------------------
# Budgets in the one call


def test_compress_keeps_to_a_budget() -> None:
    model, data = built(Residual), batches()
    small = compress(model, data, macs=0.6, recipe=Recipe.seconds())
    before, after = (cost(analyze(m, images(1))) for m in (model, small))
    assert 0.4 * before.macs < after.macs <= 0.6 * before.macs


def test_curves_that_are_there_are_used() -> None:
    model, data = built(Residual), batches()
    curves = sensitivity(model, data, shares=SHARES)
    plan = allocate(analyze(model, images(1)), curves, params=0.7)
    small, same = (
        compress(model, data, recipe=Recipe.seconds(), **how)
        for how in ({"params": 0.7, "curves": curves}, {"plan": plan})
    )
    assert all(map(torch.equal, small.state_dict().values(), same.state_dict().values()))


def test_budget_of_milliseconds_goes_through_compress() -> None:
    model, data = built(Residual), batches()
    graph = analyze(model, images(1))
    table = made_up(model, images(1))
    budget = 0.7 * predict_latency(graph, None, table)
    small = compress(model, data, latency_ms=budget, latency=table, recipe=Recipe.seconds())
    took = sum(p.shape[:2].numel() for p in small.parameters() if p.ndim > 1)
    assert 0.5 * budget < took <= budget


def made_up(*arguments: Any, **how: Any) -> LatencyTable:
    """Measure, and then let a time be the product of two widths: a small network takes none."""
    table = measure_latency(*arguments, **how, seconds=1e-4)
    layers = {
        name: replace(t, milliseconds=products(t), steps=(1, 1)) for name, t in table.layers.items()
    }
    return replace(table, layers=layers, rest=1.0, rest_floor=0.5, uneven=0.0)


def products(times: LayerTimes) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(o * i) for i in times.inputs) for o in times.outputs)


def test_interrupted_budget_goes_on_to_the_same_model(tmp_path: Path) -> None:
    model, data, state = built(Residual), batches(), tmp_path / "run"
    recipe = Recipe.seconds()
    whole = compress(model, data, macs=0.6, recipe=recipe)
    with pytest.raises(Interrupted):
        compress(model, data, macs=0.6, recipe=recipe, state=state, on_progress=stop_after(1))
    assert [path.name for path in tmp_path.iterdir()] == ["run.curves"]
    again = compress(model, data, macs=0.6, recipe=recipe, state=state)
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [{"macs": 0.6}, {"params": 0.6}, {"latency_ms": 0.7}])
def test_the_plan_that_compress_follows_for_a_budget(
    budget: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = built(Residual), tmp_path / "run"
    if "latency_ms" in budget:
        monkeypatch.setattr(budgets, "measure_latency", made_up)
        full = predict_latency(analyze(model, images(1)), None, made_up(model, images(1)))
        budget = {"latency_ms": 0.7 * full}
    plan = plan_for(model, batches(), **budget, state=state)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"run.curves", "run.latency"} if "latency_ms" in budget else {"run.curves"}
    recipe = Recipe.seconds()
    small = compress(model, batches(), **budget, recipe=recipe, state=state)
    same = compress(model, batches(), plan=plan, recipe=recipe)
    assert all(map(torch.equal, small.state_dict().values(), same.state_dict().values()))


def test_limits_of_a_plan_go_on_to_the_allocation() -> None:
    model = built(Residual)
    curves = sensitivity(model, batches(), shares=SHARES)
    first, *_ = analyze(model, images(1)).free
    limits = {"multiple_of": 2, "fixed": [first.name], "minimum": 0.5}
    plan = plan_for(model, curves=curves, macs=0.8, example_inputs=images(1), **limits)
    assert plan == allocate(analyze(model, images(1)), curves, macs=0.8, **limits)
    assert plan.ranks.get(first.name, first.channels) == first.channels


class Refused(Exception):  # noqa: N818 - no error
    """Work was begun that is not needed."""


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise Refused

    monkeypatch.setattr(budgets, "sensitivity", refuse)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("name", ["macs", "params", "activations", "latency_ms"])
def test_budget_out_of_reach_is_refused_before_curves_are_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "measure_latency", made_up)
    model, state = built(Residual), tmp_path / "run"
    for budget, problem in ((0.01, "cannot be reached"), (1e9, r"as it is: it\s+costs .* already")):
        with pytest.raises(PlanError, match=problem):
            compress(model, batches(), **{name: budget}, state=state)
    assert not (tmp_path / "run.curves").exists()
    full = predict_latency(analyze(model, images(1)), None, made_up(model, images(1)))
    with pytest.raises(Refused):
        compress(model, batches(), **{name: 0.8 * (full if name == "latency_ms" else 1)})


@pytest.mark.usefixtures("no_curves")
def test_the_least_share_is_in_what_can_be_reached() -> None:
    with pytest.raises(PlanError, match="cannot be reached"):
        plan_for(built(Residual), batches(), macs=0.6, minimum=0.9)
    with pytest.raises(Refused):
        plan_for(built(Residual), batches(), macs=0.6, minimum=0.1)


@pytest.mark.usefixtures("no_curves")
def test_times_of_another_model_are_refused_before_curves_are_measured() -> None:
    table = made_up(built(Plain), images(1))
    with pytest.raises(PlanError, match="latency table"):
        compress(built(Residual), batches(), latency_ms=1.0, latency=table)


def test_nothing_is_timed_for_a_budget_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "measure_latency", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(DataError, match="measured on images"):
        plan_for(built(Residual), latency_ms=1.0, example_inputs=images(1))


def test_budget_and_plan_are_too_much() -> None:
    model = built(Residual)
    plan = Plan.uniform(analyze(model, images(1)), 0.5)
    with pytest.raises(PlanError, match="only one of them"):
        compress(model, batches(), macs=0.5, plan=plan)


@pytest.mark.parametrize("more", [{"ratio": 0.5}, {"macs": 0.5, "ratio": 0.25}])
def test_plan_or_budget_and_a_ratio_are_too_much(more: dict) -> None:
    model = built(Residual)
    plan = Plan.uniform(analyze(model, images(1)), 0.5)
    how = more if "macs" in more else {**more, "plan": plan}
    with pytest.raises(PlanError, match="only one of them"):
        compress(model, batches(), **how)


def test_curves_without_a_budget_are_refused() -> None:
    model = built(Residual)
    curves = sensitivity(model, batches(), shares=(0.5,))
    with pytest.raises(PlanError, match="are for a budget"):
        compress(model, batches(), curves=curves)


@pytest.mark.parametrize(("full", "block"), [(256, b) for b in (1, 8, 16, 32)] + [(24, 8), (9, 1)])
def test_the_blocks_that_are_computed_together_are_found(full: int, block: int) -> None:
    assert _step(lambda width: 1 + math.ceil(width / block) * block / 16, full) == block


def test_times_that_hardly_rise_say_nothing_of_blocks() -> None:
    assert _step(lambda width: 1 + (width > 128) * 0.01, 256) == 1


def test_times_of_other_inputs_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "measure_latency", made_up)
    model, state = built(Residual), tmp_path / "run"
    curves = sensitivity(model, batches(), shares=SHARES)
    budget = 0.7 * predict_latency(analyze(model, images(1)), None, made_up(model, images(1)))
    how = {"latency_ms": budget, "curves": curves, "recipe": Recipe.minutes(2), "state": state}
    layers = len(measure_latency(model, images(2), seconds=1e-4).layers)
    with pytest.raises(Interrupted):
        compress(model, batches(), **how, on_progress=stop_after(layers + 1))
    assert (tmp_path / "run.latency").exists()
    with pytest.raises(StateError, match="of other inputs"):
        compress(model, batches(size=3), **how)


def test_files_of_others_beside_the_state_stay(tmp_path: Path) -> None:
    kept = tmp_path / "run.curves"
    kept.write_text("mine")
    compress(built(Residual), batches(), state=tmp_path / "run", recipe=Recipe.seconds())
    assert kept.read_text() == "mine"


def test_network_that_puts_out_nothing_is_measured() -> None:
    model = built(TwoLayers)
    torch.nn.init.zeros_(model.head.weight), torch.nn.init.zeros_(model.head.bias)
    curve = sensitivity(model, [images(4)], shares=(0.5,))["conv"]
    assert curve.output_errors == (0.0,)


def test_layers_may_get_their_input_by_name() -> None:
    class Named(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(input=self.conv(input=x).relu()).mean((2, 3))

    model = built(Named)
    found, usual = (sensitivity(built(n), batches(), shares=(0.5,)) for n in (Named, TwoLayers))
    assert found["conv"].output_errors == usual["conv"].output_errors
    assert found["conv"].scores == usual["conv"].scores
    assert set(measure_latency(model, images(1), seconds=1e-4).layers) == {"conv", "head"}


def test_budget_without_data_is_refused() -> None:
    with pytest.raises(DataError, match=r"measured on images: give data="):
        compress(built(Residual), macs=0.5, example_inputs=images(1))


# --------------------------------------------------------------------------------------------------
# The clock


def test_every_layer_is_timed_and_the_whole_is_their_sum() -> None:
    model = built(Residual)
    graph = analyze(model, images(1))
    seen: list[Progress] = []
    table = measure_latency(model, images(1), seconds=1e-4, on_progress=seen.append)
    assert set(table.layers) == {call.module for call in graph.calls}
    assert seen[-1].step == seen[-1].steps == len(table.layers)
    assert predict_latency(graph, None, table) == pytest.approx(table.whole)
    assert LatencyTable.from_json(table.to_json()) == table
    for name, times in table.layers.items():
        weight = model.get_submodule(name).weight
        assert (times.outputs[-1], times.inputs[-1]) == tuple(weight.shape[:2])


def test_depthwise_grouped_and_linear_layers_are_timed() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 1, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 6),
        nn.ReLU(),
        nn.Linear(6, 2),
    ).eval()
    table = measure_latency(model, torch.randn(2, 3, 8, 8), seconds=1e-4)
    wider = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Conv2d(10, 20, 3, groups=10), nn.Conv2d(20, 2, 1))
    many = measure_latency(wider, torch.randn(2, 3, 8, 8), seconds=1e-4)
    assert all(outputs % 2 == 0 for outputs in many.layers["1"].outputs)
    assert table.layers["1"].inputs == (1,)
    assert all(o % 4 == 0 for o in table.layers["2"].outputs)
    assert table.layers["8"].outputs == (2,)
    assert len(table.layers["6"].inputs) > 1


def test_clock_refuses_what_takes_no_time() -> None:
    with pytest.raises(ModelError, match="meta device"):
        measure_latency(built(Residual).to("meta"), images(1))
    with pytest.raises(PlanError, match="widths are shares"):
        measure_latency(built(Residual), images(1), widths=(0.5, 2.0))
