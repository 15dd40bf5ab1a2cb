"""What a plan costs layer by layer: by hand, summed up, and on the materialized model."""

from __future__ import annotations

import pytest
import torch
from nets import NETS
from proofs import counted_cost, random_plan, random_student
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from torchcap import (
    Plan,
    PlanError,
    SpaceGraph,
    analyze,
    cost,
    materialize,
    measure_latency,
    predict_latency,
)
from torchcap.plan.cost import LayerCost, layer_costs
from torchcap.report import compare

EVERY_NET = pytest.mark.parametrize("net", NETS)
FREE_NETS = [net for net in NETS if any(space.free for space in NETS[net].spaces.values())]


def read(net: str) -> SpaceGraph:
    return analyze(NETS[net].model(), NETS[net].inputs())


# --------------------------------------------------------------------------------------------------
# By hand


def test_costs_of_a_chain_at_smaller_ranks() -> None:
    # Two images of 8 x 8: 128 positions, with kernels of 9 taps.
    graph = read("ConvChain")
    assert layer_costs(graph, Plan.of(graph, {"conv1": 5, "conv2": 2})) == (
        LayerCost("conv1", "conv", (5, 3, 3, 3), 128 * 9 * 3 * 5, 3 * 5 * 9 + 5, 128 * 5),
        LayerCost("conv2", "conv", (2, 5, 3, 3), 128 * 9 * 5 * 2, 5 * 2 * 9 + 2, 128 * 2),
        LayerCost("conv3", "conv", (4, 2, 3, 3), 128 * 9 * 2 * 4, 2 * 4 * 9 + 4, 128 * 4),
    )


def test_flattened_channels_are_read_by_a_linear_layer() -> None:
    graph = read("FlattenIntoLinear")
    # Two images; 3 channels at 16 positions, 2 features.
    conv, fc1, _ = layer_costs(graph, Plan.of(graph, {"conv": 3, "fc1": 2}))
    assert conv == LayerCost("conv", "conv", (3, 3, 3, 3), 128 * 9 * 3 * 3, 84, 128 * 3)
    assert fc1 == LayerCost("fc1", "linear", (2, 48), 2 * 48 * 2, 48 * 2 + 2, 2 * 2)


def test_depthwise_convolution_costs_its_taps_alone() -> None:
    graph = read("DepthwiseSeparable")
    _, depthwise, *_ = layer_costs(graph, Plan.of(graph, {"expand": 5, "project": 4}))
    assert depthwise.shape == (5, 1, 3, 3)
    assert (depthwise.macs, depthwise.parameters) == (128 * 9 * 5, 9 * 5 + 5)


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 4}])
def test_projections_of_an_attention_of_torch_are_linear_layers(widths: dict[str, int]) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
            self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.fc2(self.fc1(self.attend(q, value=v, key=k)[0]).relu())

    model = Attending().eval()
    k, v = (torch.randn(2, 7, widths.get(name, 8)) for name in ("kdim", "vdim"))
    inputs = torch.randn(2, 5, 8), k, v
    graph = analyze(model, inputs)
    macs, parameters = counted_cost(model, inputs)
    assert (cost(graph).macs, cost(graph).parameters) == (macs, parameters)
    assert compare(model, model, inputs, batch_sizes=()).model.macs == macs
    assert cost(graph, Plan.of(graph, {"fc1": 6})).macs == macs - 10 * 6 * (8 + 3)
    table = measure_latency(model, inputs, widths=(0.5,), seconds=1e-4)
    assert set(table.layers) == {"fc1", "fc2"}
    assert predict_latency(graph, None, table) == pytest.approx(table.whole)


def test_calls_of_one_layer_are_summed() -> None:
    graph = read("SharedLayer")
    _, shared, _ = layer_costs(graph, Plan.of(graph, {"stem": 4}))
    assert (shared.macs, shared.activations) == (2 * 128 * 9 * 4 * 4, 2 * 128 * 4)
    assert shared.parameters == 4 * 4 * 9 + 4


def test_weight_that_two_layers_share_counts_for_the_first() -> None:
    costs = {layer.layer: layer for layer in layer_costs(read("TiedWeights"))}
    tied = [layer for layer in costs.values() if layer.shape == (8, 8, 3, 3)]
    assert [layer.parameters for layer in tied] == [8 * 8 * 9 + 8, 8]
    assert [layer.macs for layer in tied] == [128 * 9 * 8 * 8] * 2


def test_parameters_of_a_parametrized_layer_are_its_own() -> None:
    conv = parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
    (layer,) = layer_costs(analyze(nn.Sequential(conv), torch.zeros(2, 3, 8, 8)))
    assert (layer.layer, layer.shape, layer.macs) == ("0", (8, 3, 3, 3), 128 * 9 * 3 * 8)
    assert layer.parameters == 8 + 8 * 3 * 9 + 8  # lengths, directions, bias


# --------------------------------------------------------------------------------------------------
# In general


@EVERY_NET
def test_layers_add_up_to_the_cost_of_the_plan(net: str) -> None:
    graph = read(net)
    plan = random_plan(graph, seed=2) if graph.free else None
    layers, whole = layer_costs(graph, plan), cost(graph, plan)
    assert sum(layer.macs for layer in layers) == whole.macs
    assert sum(layer.activations for layer in layers) == whole.activations
    assert sum(layer.parameters for layer in layers) <= whole.parameters


@pytest.mark.parametrize("net", FREE_NETS)
def test_predicted_layers_are_those_that_run_in_the_materialized_model(net: str) -> None:
    model, inputs = NETS[net].model(), NETS[net].inputs()
    graph = analyze(model, inputs)
    plan = random_plan(graph, seed=3)
    small = materialize(random_student(model, plan, inputs))
    report = compare(model, small, inputs, batch_sizes=())
    assert report.small.layers == layer_costs(graph, plan)
    assert report.small.parameters == cost(graph, plan).parameters


def test_plan_of_another_model_has_no_layer_costs() -> None:
    plan = Plan.uniform(read("Grouped"), 0.5)
    with pytest.raises(PlanError, match="Video"):
        layer_costs(read("Video"), plan)
