"""Deciding: prices of all ranks at once, the smallest sum of tables, and ranks for a budget."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS

import torchcap
from torchcap import (
    Curve,
    LatencyTable,
    LayerTimes,
    NothingToCompressError,
    Plan,
    PlanError,
    Sensitivity,
    SpaceGraph,
    allocate,
    analyze,
    cost,
    predict_latency,
)
from torchcap.plan import minimize as minimizing
from torchcap.plan.latency import LatencyPrice
from torchcap.plan.minimize import minimize
from torchcap.plan.price import Quadratic, Table, activations, as_vector, multiply_adds, parameters

PROPERTY = settings(deadline=None, print_blob=True, max_examples=60)
FREE_NETS = [net for net in NETS if any(space.free for space in NETS[net].spaces.values())]


def read(net: str) -> SpaceGraph:
    return analyze(NETS[net].model(), NETS[net].inputs())


def random_ranks(graph: SpaceGraph, rng: np.random.Generator) -> dict[str, int]:
    return {
        space.name: int(rng.integers(1, space.channels // space.blocks + 1)) * space.blocks
        for space in graph.free
    }


def curves_of(graph: SpaceGraph, seed: int = 0) -> Sensitivity:
    """Return made-up curves at every rank: the more channels, the less is lost."""
    rng = np.random.default_rng(seed)
    curves = []
    for space in graph.free:
        ranks = tuple(range(space.blocks, space.channels + 1, space.blocks))
        steps = rng.exponential(size=len(ranks)) * rng.exponential()
        errors = tuple(float(e) for e in np.cumsum(steps)[::-1] - steps[0])
        scores = tuple(1 / (1 + e) for e in errors)
        curves.append(Curve(space.name, space.channels, ranks, errors, errors, scores))
    return Sensitivity(graph.model, tuple(curves), "agreement", 1.0, 8)


def lost(curves: Sensitivity, ranks: dict[str, int]) -> float:
    """Return what ranks lose together, by the curves alone."""
    return sum(
        curves[name].output_errors[curves[name].ranks.index(rank)] for name, rank in ranks.items()
    )


def all_ranks(graph: SpaceGraph) -> list[dict[str, int]]:
    ladders = [range(s.blocks, s.channels + 1, s.blocks) for s in graph.free]
    names = [space.name for space in graph.free]
    return [dict(zip(names, ranks, strict=True)) for ranks in itertools.product(*ladders)]


# --------------------------------------------------------------------------------------------------
# Prices


@pytest.mark.parametrize("net", FREE_NETS)
def test_prices_are_the_predicted_costs_whatever_the_ranks(net: str) -> None:
    graph = read(net)
    rng = np.random.default_rng(0)
    prices = [multiply_adds(graph), parameters(graph), activations(graph)]
    for _ in range(5):
        ranks = random_ranks(graph, rng)
        found = cost(graph, Plan.of(graph, ranks))
        expected = [found.macs, found.parameters, found.activations]
        assert [p.total(as_vector(p.spaces, ranks)) for p in prices] == pytest.approx(expected)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4))
@PROPERTY
def test_tables_of_a_price_add_up_to_it(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    products = rng.normal(size=(count, count)) * (rng.random((count, count)) < 0.5)
    names = tuple(f"s{i}" for i in range(count))
    price = Quadratic(names, 0.0, rng.normal(size=count), products + products.T)
    ladders = [np.sort(rng.random(3)) for _ in range(count)]
    tables = list(price.tables(ladders))
    for chosen in itertools.product(range(3), repeat=count):
        ranks = np.array([ladder[i] for ladder, i in zip(ladders, chosen, strict=True)])
        assert total(tables, chosen) == pytest.approx(price.total(ranks))


def total(tables: list[Table], chosen: tuple[int, ...]) -> float:
    return float(sum(table[tuple(chosen[v] for v in variables)] for variables, table in tables))


# --------------------------------------------------------------------------------------------------
# The smallest sum


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[Table]]:
    """Draw tables over one, two or three of a few variables."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tables: list[Table] = []
    for _ in range(draw(st.integers(0, 8))):
        held = rng.permutation(len(sizes))[: rng.integers(1, 4)].tolist()
        tables.append((tuple(held), rng.normal(size=[sizes[v] for v in held])))
    return sizes, tables


@given(problem=problems())
@PROPERTY
def test_smallest_sum_is_that_of_trying_everything(
    problem: tuple[list[int], list[Table]],
) -> None:
    sizes, tables = problem
    found = minimize(sizes, tables)
    every = itertools.product(*map(range, sizes))
    assert total(tables, tuple(found)) == pytest.approx(min(total(tables, c) for c in every))


@given(problem=problems())
@PROPERTY
def test_where_tables_would_be_too_large_no_single_change_improves(
    problem: tuple[list[int], list[Table]],
) -> None:
    sizes, tables = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimizing, "LARGEST_TABLE", 1)
        found = minimize(sizes, tables)
    reached = total(tables, tuple(found))
    for variable, size in enumerate(sizes):
        for value in range(size):
            other = (*found[:variable], value, *found[variable + 1 :])
            assert total(tables, other) >= reached - 1e-12


def test_long_chain_is_minimised_exactly() -> None:
    # Viterbi by hand: forty variables of thirty values, too many to try, but a chain.
    rng = np.random.default_rng(0)
    pairs: list[Table] = [((i, i + 1), rng.normal(size=(30, 30))) for i in range(39)]
    best = np.zeros(30)
    for _, table in pairs:
        best = (best[:, None] + table).min(0)
    assert total(pairs, tuple(minimize([30] * 40, pairs))) == pytest.approx(best.min())


# --------------------------------------------------------------------------------------------------
# Ranks for a budget


@pytest.mark.parametrize("net", ["ConvChain", "Bottleneck", "FlattenIntoLinear", "Fire"])
@pytest.mark.parametrize("seed", range(4))
def test_no_ranks_of_the_same_cost_lose_less(net: str, seed: int) -> None:
    graph = read(net)
    curves = curves_of(graph, seed)
    everything = [(lost(curves, r), cost(graph, Plan.of(graph, r)).macs) for r in all_ranks(graph)]
    full = cost(graph).macs
    prices = [0.1 / full, 1 / full, 5 / full, 25 / full]
    for price in prices:
        # Where a budget is what the best ranks at some price cost, no others are as good.
        loss, budget = min(everything, key=lambda entry: entry[0] + price * entry[1])
        plan = allocate(graph, curves, macs=budget, minimum=1e-9)
        assert cost(graph, plan).macs <= budget
        assert lost(curves, plan.ranks) == pytest.approx(loss, abs=1e-4 * max(1.0, loss))


@pytest.mark.parametrize("net", FREE_NETS)
def test_budget_holds_and_uniform_ranks_lose_no_less(net: str) -> None:
    graph = read(net)
    curves = curves_of(graph)
    uniform = Plan.uniform(graph, 0.5)
    spent = cost(graph, uniform)
    for name, figure in [
        ("macs", spent.macs),
        ("params", spent.parameters),
        ("activations", spent.activations),
    ]:
        plan = allocate(graph, curves, **{name: figure}, minimum=1e-9)
        found = cost(graph, plan)
        reached = {
            "macs": found.macs,
            "params": found.parameters,
            "activations": found.activations,
        }
        assert reached[name] <= figure
        floor = {s.name: max(1, s.channels // s.blocks // 2) * s.blocks for s in graph.free}
        assert lost(curves, plan.ranks) <= lost(curves, floor) + 1e-4


def test_share_of_a_budget_is_of_the_whole_model() -> None:
    graph = read("ConvChain")
    plan = allocate(graph, curves_of(graph), macs=0.5, minimum=1e-9)
    assert cost(graph, plan).macs <= 0.5 * cost(graph).macs
    assert allocate(graph, curves_of(graph), macs=1.0).ranks == {"conv1": 8, "conv2": 6}


def test_what_is_fixed_stays_and_the_least_share_holds() -> None:
    graph = read("ConvChain")
    plan = allocate(graph, curves_of(graph), macs=0.7, fixed=["conv2"], minimum=1e-9)
    assert plan.ranks["conv2"] == 6
    plan = allocate(graph, curves_of(graph), macs=0.7, minimum={"conv1": 0.75})
    assert plan.ranks["conv1"] >= 6


def test_ranks_are_multiples_where_asked() -> None:
    graph = analyze(torchvision.models.resnet18())
    curves = curves_of(graph)
    plan = allocate(graph, curves, macs=0.5, multiple_of=8)
    assert all(rank % 8 == 0 for rank in plan.ranks.values())


def test_spaces_without_a_curve_keep_their_channels() -> None:
    graph = read("ConvChain")
    whole = curves_of(graph)
    part = Sensitivity(whole.model, whole.curves[:1], "agreement", 1.0, 8)
    plan = allocate(graph, part, macs=0.8, minimum=1e-9)
    assert set(plan.ranks) == {"conv1"}


@pytest.mark.parametrize("loss", ["errors", "output_errors", "scores"])
def test_each_row_of_the_curves_can_be_the_loss(loss: str) -> None:
    graph = read("Bottleneck")
    plan = allocate(graph, curves_of(graph), macs=0.6, loss=loss, minimum=1e-9)
    assert cost(graph, plan).macs <= 0.6 * cost(graph).macs


BAD = {
    "no budget": ({}, "exactly one budget.*got none"),
    "two budgets": ({"macs": 0.5, "params": 0.5}, "exactly one budget.*macs, params"),
    "no channels left": ({"macs": 1e-6}, r"(?s)cannot be reached.*costs"),
    "more than it costs": ({"macs": 1e9}, r"(?s)'ConvChain' as it is.*costs .* already"),
    "negative": ({"macs": -1.0}, "positive budget; got -1.0"),
    "not a number": ({"params": float("nan")}, "positive budget"),
    "a truth value": ({"macs": True}, "positive budget; got True"),
    "milliseconds without a table": ({"latency_ms": 5.0}, "needs latency="),
    "unknown fixed space": ({"macs": 0.5, "fixed": ["nowhere"]}, "no free space 'nowhere'"),
    "unknown loss": ({"macs": 0.5, "loss": "error"}, "loss is one of output_errors, errors"),
    "multiple of nothing": ({"macs": 0.5, "multiple_of": 0}, "multiple_of is a whole number"),
    "more than all": ({"macs": 0.5, "minimum": 1.5}, "0 < minimum <= 1; got 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_budget_is_refused(case: str) -> None:
    arguments, message = BAD[case]
    graph = read("ConvChain")
    with pytest.raises(PlanError, match=message):
        allocate(graph, curves_of(graph), **arguments)


@pytest.mark.parametrize("name", ["macs", "params", "activations"])
def test_budget_of_what_the_model_costs_is_allowed_and_more_is_not(name: str) -> None:
    graph = read("ConvChain")
    whole = cost(graph)
    figure = {"macs": whole.macs, "params": whole.parameters, "activations": whole.activations}[
        name
    ]
    plan = allocate(graph, curves_of(graph), **{name: figure})
    assert plan.ranks == {"conv1": 8, "conv2": 6}
    with pytest.raises(PlanError, match=f"costs {figure:,} already"):
        allocate(graph, curves_of(graph), **{name: figure + 1})


def test_curves_of_another_model_are_refused() -> None:
    with pytest.raises(PlanError, match=r"measured on another model.*'ConvChain'"):
        allocate(read("Signal"), curves_of(read("ConvChain")), macs=0.5)


def test_curves_of_a_deeper_model_are_refused() -> None:
    graph = read("ConvChain")
    curves = replace(curves_of(graph), parameters=cost(graph).parameters + 1)
    with pytest.raises(PlanError, match=r"another model.*parameters, norms folded"):
        allocate(graph, curves, macs=0.5)


def test_budgets_may_be_numbers_of_numpy() -> None:
    graph = read("ConvChain")
    found = allocate(graph, curves_of(graph), macs=np.float32(0.5), minimum=1e-9)
    assert found == allocate(graph, curves_of(graph), macs=0.5, minimum=1e-9)


def test_curves_of_nothing_are_refused() -> None:
    with pytest.raises(NothingToCompressError, match="no curves"):
        allocate(read("ConvChain"), Sensitivity("ConvChain", (), "agreement", 1.0, 8), macs=0.5)


# --------------------------------------------------------------------------------------------------
# Latency


def table_of(graph: SpaceGraph, *, rest: float = 0.0, floor: float = 0.0) -> LatencyTable:
    """Return a table in which a layer takes as long as the product of its two widths."""
    layers = {}
    folded = graph.after_folding()
    for call in folded.calls:
        rows, columns = folded.tensors[f"{call.module}.weight"][:2]
        outputs, inputs = sorted({1, rows}), sorted({1, columns})
        times = tuple(tuple(float(o * i) for i in inputs) for o in outputs)
        layers[call.module] = LayerTimes(tuple(outputs), tuple(inputs), times)
    return LatencyTable(graph.model, "made up", layers, rest, floor, 0.0)


@pytest.mark.parametrize(
    "net", ["ConvChain", "Bottleneck", "Fire", "DepthwiseSeparable", "Grouped"]
)
def test_time_of_a_plan_is_the_sum_over_its_layers(net: str) -> None:
    graph = read(net)
    table = table_of(graph)
    rng = np.random.default_rng(1)
    for _ in range(4):
        plan = Plan.of(graph, random_ranks(graph, rng))
        layers = torchcap.layer_costs(graph, plan)
        assert predict_latency(graph, plan, table) == pytest.approx(
            sum(layer.shape[0] * layer.shape[1] for layer in layers)
        )


def test_rest_falls_with_the_values_written() -> None:
    graph = read("ConvChain")
    table = table_of(graph, rest=10.0, floor=4.0)
    plan = Plan.of(graph, {"conv1": 4, "conv2": 3})
    share = cost(graph, plan).activations / cost(graph).activations
    alone = predict_latency(graph, plan, table_of(graph))
    assert predict_latency(graph, plan, table) == pytest.approx(alone + 4 + 6 * share)


@pytest.mark.parametrize("net", ["ConvChain", "Bottleneck", "Fire", "Inception", "Grouped"])
def test_budget_of_milliseconds_holds(net: str) -> None:
    graph = read(net)
    table = table_of(graph, rest=5.0, floor=1.0)
    budget = 0.6 * predict_latency(graph, None, table)
    plan = allocate(graph, curves_of(graph), latency_ms=budget, latency=table, minimum=1e-9)
    assert predict_latency(graph, plan, table) <= budget


def test_times_are_linear_between_widths_and_end_with_them() -> None:
    times = LayerTimes((2, 4), (1, 3), ((1.0, 3.0), (5.0, 11.0)))
    at = lambda o, i: float(times.at(np.array(float(o)), np.array(float(i))))  # noqa: E731
    assert (at(2, 1), at(4, 3), at(3, 1), at(2, 2)) == (1.0, 11.0, 3.0, 2.0)
    assert at(3, 2) == 5.0
    assert (at(1, 1), at(9, 9)) == (1.0, 11.0)


def test_times_follow_widths_in_steps_up_to_the_full_one() -> None:
    times = LayerTimes((4, 8, 14), (3,), ((1.0,), (2.0,), (5.0,)), (4, 1))
    at = lambda o: float(times.at(np.array(float(o)), np.array(3.0)))  # noqa: E731
    assert [at(o) for o in (1, 4, 5, 8)] == [1.0, 1.0, 2.0, 2.0]
    assert at(9) == at(12) == pytest.approx(4.0)
    assert at(13) == at(14) == 5.0


def test_layers_of_uneven_widths_take_longer() -> None:
    graph = analyze(torch.nn.Sequential(*layers_of(24, 32)), torch.zeros(1, 3, 8, 8))
    even = table_of(graph)
    table = replace(even, uneven=0.5)
    for ranks, uneven in (((24, 32), set()), ((16, 24), set()), ((15, 24), {"0", "2"})):
        plan = Plan.of(graph, dict(zip(("0", "2"), ranks, strict=True)))
        times = {
            layer.layer: layer.shape[0] * layer.shape[1]
            for layer in torchcap.layer_costs(graph, plan)
        }
        expected = sum(t * (1.5 if name in uneven else 1.0) for name, t in times.items())
        assert predict_latency(graph, plan, table) == pytest.approx(expected)
    assert predict_latency(graph, None, table) == predict_latency(graph, None, even)


def layers_of(first: int, second: int) -> list[torch.nn.Module]:
    conv = torch.nn.Conv2d
    return [conv(3, first, 1), torch.nn.ReLU(), conv(first, second, 1), torch.nn.ReLU(),
            conv(second, 5, 1)]  # fmt: skip


def test_table_goes_through_json() -> None:
    table = replace(table_of(read("Bottleneck"), rest=1.5, floor=0.25), uneven=0.1)
    assert LatencyTable.from_json(table.to_json()) == table


@pytest.mark.parametrize(
    "text", ["nonsense", "[]", "{}", '{"format": "torchcap-latency", "version": 1}']
)
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a latency table"):
        LatencyTable.from_json(text)


EDITED_TABLES: dict[str, tuple[Any, str]] = {
    "unknown key": (lambda d: d.update(wole=1.0), "unknown key 'wole'; did you mean 'whole'"),
    "missing": (lambda d: d.pop("rest"), "it has no 'rest'"),
    "not finite": (
        lambda d: d.update(whole=float("nan")),
        "'whole' must be a finite number; got nan",
    ),
    "huge": (lambda d: d.update(whole=10**400), "'whole' must be a finite number"),
    "a list of layers": (lambda d: d.update(layers=[1]), r"'layers' must be an object.*got \[1\]"),
    "unknown key of a layer": (
        lambda d: d["layers"]["conv1"].update(step=[1, 1]),
        "layer 'conv1' has an unknown key 'step'; did you mean 'steps'",
    ),
    "a number for a layer": (
        lambda d: d["layers"].update(conv1=4),
        "layer 'conv1' must be an object",
    ),
    "a truth value": (
        lambda d: d["layers"]["conv1"].update(inputs=[True]),
        "'inputs' of layer 'conv1' must be a whole number; got True",
    ),
    "negative": (
        lambda d: d["layers"]["conv1"].update(milliseconds=[[-1.0]], outputs=[8], inputs=[3]),
        "layer 'conv1': times of a layer are finite and not negative",
    ),
    "a row that is none": (
        lambda d: d["layers"]["conv1"].update(milliseconds=[1.0]),
        "'milliseconds' of layer 'conv1' must be a list; got 1.0",
    ),
}


@pytest.mark.parametrize("case", EDITED_TABLES)
def test_slip_in_a_latency_table_is_named_with_its_place(case: str) -> None:
    edit, message = EDITED_TABLES[case]
    data = json.loads(table_of(read("ConvChain")).to_json())
    edit(data)
    with pytest.raises(PlanError, match=message):
        LatencyTable.from_json(json.dumps(data))


def test_table_of_other_widths_or_spaces_is_refused() -> None:
    graph, table = read("Bottleneck"), table_of(read("Bottleneck"))
    name, times = next(iter(table.layers.items()))
    for other in (
        LayerTimes(
            (*times.outputs, times.outputs[-1] + 1),
            times.inputs,
            (*times.milliseconds, (9.0,) * len(times.inputs)),
        ),
        LayerTimes(times.outputs[-1:], times.inputs, times.milliseconds[-1:]),
    ):
        layers = {**table.layers, name: other}
        with pytest.raises(PlanError, match="measured on another model, or with other spaces"):
            LatencyPrice(graph, replace(table, layers=layers))


def test_table_of_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="not in the latency table"):
        LatencyPrice(read("Bottleneck"), table_of(read("ConvChain")))


# --------------------------------------------------------------------------------------------------
# Curves as data


def test_curves_go_through_json() -> None:
    curves = curves_of(read("Bottleneck"))
    assert Sensitivity.from_json(curves.to_json()) == curves
    assert curves.curves[0].space in str(curves)


@pytest.mark.parametrize("text", ["nonsense", "[]", "{}", json.dumps({"format": "torchcap-plan"})])
def test_what_is_no_sensitivity_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a sensitivity"):
        Sensitivity.from_json(text)


EDITED_CURVES: dict[str, tuple[Any, str]] = {
    "unknown key": (lambda d: d.update(curvs=[]), "unknown key 'curvs'; did you mean 'curves'"),
    "no curves": (lambda d: d.pop("curves"), "it has no 'curves'"),
    "a word for a curve": (lambda d: d["curves"].insert(1, "a"), "curve 2 must be an object.*'a'"),
    "curve of nothing": (lambda d: d["curves"][1].pop("space"), "curve 2 has no 'space'"),
    "unknown key of a curve": (
        lambda d: d["curves"][0].update(rank=[1]),
        "the curve of space 'conv1' has an unknown key 'rank'; did you mean 'ranks'",
    ),
    "a word for ranks": (
        lambda d: d["curves"][0].update(ranks="12"),
        "'ranks' of the curve of space 'conv1' must be a list; got '12'",
    ),
    "half a channel": (
        lambda d: d["curves"][0].update(channels=8.5),
        "'channels' of .* whole number",
    ),
    "a truth value": (
        lambda d: d.update(baseline=True),
        "'baseline' must be a finite number; got True",
    ),
    "two curves": (lambda d: d["curves"].append(d["curves"][0]), "'conv1' has more than one curve"),
    "another metric": (lambda d: d.update(metric="luck"), "'accuracy' or 'agreement'; got 'luck'"),
    "a baseline of percent": (lambda d: d.update(baseline=92.5), "share within 0..1.*92.5"),
}


@pytest.mark.parametrize("case", EDITED_CURVES)
def test_slip_in_measured_curves_is_named_with_its_place(case: str) -> None:
    edit, message = EDITED_CURVES[case]
    data = curves_of(read("ConvChain")).to_dict() | {"of": {"seed": 0}}
    data = json.loads(json.dumps(data))
    assert Sensitivity.from_dict(data) == curves_of(read("ConvChain"))
    edit(data)
    with pytest.raises(PlanError, match=message):
        Sensitivity.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "rows",
    [
        ((), (), (), ()),
        ((2, 1), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
        ((1, 9), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
        ((1, 2), (0.0,), (0.0, 0.0), (0.0, 0.0)),
        ((1, 2), (0.0, float("nan")), (0.0, 0.0), (0.0, 0.0)),
        ((1, 2), (0.0, 0.0), (0.0, -0.5), (0.0, 0.0)),
    ],
)
def test_curve_that_makes_no_sense_is_refused(rows: tuple) -> None:
    with pytest.raises(PlanError, match="the curve of space 'conv'"):
        Curve("conv", 8, *rows)
