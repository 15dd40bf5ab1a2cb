"""What a plan costs: against sums by hand, figures of papers, and another library's counter."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, CifarResNet
from proofs import counted_cost, random_plan, random_student

from torchcap import Cost, Plan, PlanError, SpaceGraph, analyze, cost, materialize
from torchcap.plan.cost import shapes_under

EVERY_NET = pytest.mark.parametrize("net", NETS)


def read(net: str) -> SpaceGraph:
    return analyze(NETS[net].model(), NETS[net].inputs())


FREE_NETS = [net for net in NETS if any(space.free for space in NETS[net].spaces.values())]


# --------------------------------------------------------------------------------------------------
# By hand


def test_cost_of_a_chain_of_convolutions() -> None:
    # Two images of 8 x 8: 128 positions, with kernels of 9 taps.
    assert cost(read("ConvChain")) == Cost(
        macs=128 * 9 * (3 * 8 + 8 * 6 + 6 * 4),
        parameters=(3 * 8 * 9 + 8) + (8 * 6 * 9 + 6) + (6 * 4 * 9 + 4),
        activations=128 * (8 + 6 + 4),
    )


def test_cost_of_a_chain_at_smaller_ranks() -> None:
    graph = read("ConvChain")
    assert cost(graph, Plan.of(graph, {"conv1": 5, "conv2": 2})) == Cost(
        macs=128 * 9 * (3 * 5 + 5 * 2 + 2 * 4),
        parameters=(3 * 5 * 9 + 5) + (5 * 2 * 9 + 2) + (2 * 4 * 9 + 4),
        activations=128 * (5 + 2 + 4),
    )


def test_folded_norm_costs_one_bias() -> None:
    # conv1 has no bias of its own; both norms go, and each leaves a bias behind.
    assert cost(read("ConvNormChain")).parameters == (
        (3 * 8 * 9 + 8) + (8 * 6 * 9 + 6) + (6 * 5 + 5)
    )


def test_norm_that_stays_costs_its_affine_map() -> None:
    graph = read("NormBehindActivation")
    plan = Plan.of(graph, {"conv1": 5})
    assert cost(graph, plan).parameters == (3 * 5 * 9 + 5) + 2 * 5 + (5 * 4 * 9 + 4)


def test_flattened_channel_is_dropped_at_every_position() -> None:
    graph = read("FlattenIntoLinear")
    # Two images; 4 -> 3 channels at 16 positions, 7 -> 2 features, 5 classes.
    assert cost(graph, Plan.of(graph, {"conv": 3, "fc1": 2})) == Cost(
        macs=128 * 9 * 3 * 3 + 2 * (3 * 16 * 2 + 2 * 5),
        parameters=(3 * 3 * 9 + 3) + (3 * 16 * 2 + 2) + (2 * 5 + 5),
        activations=128 * 3 + 2 * 2 + 2 * 5,
    )


def test_depthwise_convolution_costs_its_taps_alone() -> None:
    graph = read("DepthwiseSeparable")
    plan = Plan.of(graph, {"expand": 5, "project": 4})
    assert cost(graph, plan) == Cost(
        macs=128 * (3 * 5 + 9 * 5 + 5 * 4 + 4 * 4 * 9),
        parameters=(3 * 5 + 5) + (9 * 5 + 5) + (5 * 4 + 4) + (4 * 4 * 9 + 4),
        activations=128 * (5 + 5 + 4 + 4),
    )


def test_depthwise_multiplier_costs_twice() -> None:
    graph = read("DepthwiseMultiplier")
    # 4 -> 3 channels, each with two outputs.
    assert cost(graph, Plan.of(graph, {"expand": 3})) == Cost(
        macs=128 * (3 * 3 + 9 * 6 + 6 * 5),
        parameters=(3 * 3 + 3) + (9 * 6 + 6) + (6 * 5 + 5),
        activations=128 * (3 + 6 + 5),
    )


def test_grouped_convolution_reads_its_share_of_the_channels() -> None:
    graph = read("Grouped")
    # 4 of 8 channels: one for each of four groups; 8 of 12 outputs: two of each group.
    plan = Plan.of(graph, {"conv1": 4, "grouped": 8})
    assert cost(graph, plan) == Cost(
        macs=128 * 9 * (3 * 4 + 8 * 1 + 8 * 5),
        parameters=(3 * 4 * 9 + 4) + (8 * 1 * 9 + 8) + (8 * 5 * 9 + 5),
        activations=128 * (4 + 8 + 5),
    )
    assert shapes_under(graph, plan.ranks)["grouped.weight"] == (8, 1, 3, 3)


def test_layer_that_is_called_twice_costs_twice_and_is_stored_once() -> None:
    graph = read("SharedLayer")
    assert cost(graph, Plan.of(graph, {"stem": 4})) == Cost(
        macs=128 * 9 * (3 * 4 + 2 * 4 * 4 + 4 * 4),
        parameters=(3 * 4 * 9 + 4) + (4 * 4 * 9 + 4) + (4 * 4 * 9 + 4),
        activations=128 * (4 + 2 * 4 + 4),
    )


def test_head_that_runs_in_training_only_is_stored_and_not_run() -> None:
    graph = read("AuxiliaryHead")
    # The head still reads conv1, 8 -> 4, and is stored at 7 and 5 channels.
    plan = Plan.of(graph, {"conv1": 4})
    assert cost(graph, plan) == Cost(
        macs=128 * 9 * (3 * 4 + 4 * 6) + 2 * 6 * 5,
        parameters=sum(
            [3 * 4 * 9 + 4, 4 * 7 * 9 + 7, 7 * 5 * 9 + 5, 4 * 6 * 9 + 6, 6 * 5 + 5],
        ),
        activations=128 * (4 + 6) + 2 * 5,
    )


def test_gate_and_value_of_one_layer_shrink_together() -> None:
    graph = read("GatedHalves")
    assert shapes_under(graph, {"conv1": 4})["conv1.weight"] == (8, 3, 3, 3)
    assert shapes_under(graph, {"conv1": 4})["conv2.weight"] == (4, 4, 3, 3)


def test_weight_that_two_layers_share_is_stored_once() -> None:
    layers = [3 * 8 * 9 + 8, 8 * 8 * 9 + 8, 8, 8 * 6 * 9 + 6, 6 * 4 * 9 + 4]
    assert cost(read("TiedWeights")).parameters == sum(layers)
    assert cost(read("TiedWeights")).macs == 128 * 9 * (3 * 8 + 2 * 8 * 8 + 8 * 6 + 6 * 4)


# --------------------------------------------------------------------------------------------------
# Figures of papers


def test_vgg_16_has_the_figures_of_its_paper() -> None:
    """Simonyan & Zisserman (2015), configuration D, on one image of 224 x 224."""
    with torch.device("meta"):
        model = torchvision.models.vgg16(init_weights=False)
        graph = analyze(model)
    # Pairs of channels at each size of the image; nine taps; then the three linear layers.
    convolutions = (
        224**2 * (3 * 64 + 64 * 64)
        + 112**2 * (64 * 128 + 128 * 128)
        + 56**2 * (128 * 256 + 2 * 256 * 256)
        + 28**2 * (256 * 512 + 2 * 512 * 512)
        + 14**2 * (3 * 512 * 512)
    ) * 9
    linear = 25088 * 4096 + 4096 * 4096 + 4096 * 1000
    found = cost(graph)
    assert found.macs == convolutions + linear
    assert round(2 * found.macs / 1e9, 2) == 30.94

    weights = [n for name, n in graph.tensors.items() if name.startswith("features")]
    assert round(sum(torch.Size(shape).numel() for shape in weights) / 1e6, 2) == 14.71
    # The "memory" of Minnehan & Savakis: what the convolutions write, in units of 4e6.
    written = found.activations - (4096 + 4096 + 1000)
    assert round(written / 4e6, 3) == 3.387


@pytest.mark.parametrize(("depth", "kept"), [(56, 50.18), (110, 50.09)])
def test_half_of_the_interior_channels_is_half_of_the_multiply_adds(
    depth: int, kept: float
) -> None:
    """Minnehan & Savakis (2019) print 50.2 and 50.1 for the first layer of every block."""
    graph = analyze(CifarResNet(depth), torch.zeros(1, 3, 32, 32))
    plan = Plan.uniform(graph, 0.5)
    assert set(plan.choices) == {f"blocks.{i}.conv1" for i in range((depth - 2) // 2)}
    full, small = cost(graph).macs, cost(graph, plan).macs
    # n blocks of 16 channels at 32 x 32, of 32 at 16 x 16, of 64 at 8 x 8: a layer of each has the
    # same cost, but the first of a stage reads half as many channels.
    blocks, layer = (depth - 2) // 6, 32 * 32 * 16 * 16 * 9
    ends = 32 * 32 * 3 * 16 * 9 + 64 * 10
    assert full == ends + (6 * blocks - 1) * layer
    assert small == ends + (6 * blocks - 1) * layer // 2
    assert round(100 * small / full, 2) == kept


# --------------------------------------------------------------------------------------------------
# Against the counter, and in general


@pytest.mark.parametrize("net", FREE_NETS)
def test_predicted_cost_is_what_is_counted_on_the_materialized_model(net: str) -> None:
    model, inputs = NETS[net].model(), NETS[net].inputs()
    graph = analyze(model, inputs)
    plan = random_plan(graph, seed=0)
    small = materialize(random_student(model, plan, inputs))
    predicted = cost(graph, plan)
    assert (predicted.macs, predicted.parameters) == counted_cost(small, inputs)


@pytest.mark.parametrize("net", FREE_NETS)
def test_predicted_shapes_are_those_of_the_materialized_model(net: str) -> None:
    model, inputs = NETS[net].model(), NETS[net].inputs()
    graph = analyze(model, inputs)
    plan = random_plan(graph, seed=1)
    small = materialize(random_student(model, plan, inputs))
    found = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert found == shapes_under(graph.after_folding(), plan.ranks)


GRAPHS = {
    net: read(net) for net in ("Inception", "DenseBlock", "Grouped", "SqueezeExcite", "Video")
}


@settings(deadline=None, print_blob=True)
@given(net=st.sampled_from(sorted(GRAPHS)), data=st.data())
def test_no_cost_rises_when_a_rank_falls(net: str, data: st.DataObject) -> None:
    graph = GRAPHS[net]
    steps = {space.name: space.blocks for space in graph.free}
    ranks = {
        space.name: data.draw(st.integers(1, space.channels // space.blocks)) * space.blocks
        for space in graph.free
    }
    name = data.draw(st.sampled_from(sorted(ranks)))
    lower = {**ranks, name: max(steps[name], ranks[name] - steps[name])}
    before, after = cost(graph, Plan.of(graph, ranks)), cost(graph, Plan.of(graph, lower))
    assert after.macs <= before.macs
    assert after.parameters <= before.parameters
    assert after.activations <= before.activations
    assert (after == before) == (lower == ranks)


@EVERY_NET
def test_full_width_costs_what_no_plan_costs(net: str) -> None:
    graph = read(net)
    assert not graph.free or cost(graph, Plan.uniform(graph, 1.0)) == cost(graph)


def test_plan_of_another_model_has_no_cost() -> None:
    plan = Plan.uniform(GRAPHS["Grouped"], 0.5)
    with pytest.raises(PlanError, match=r"Video"):
        cost(GRAPHS["Video"], plan)
