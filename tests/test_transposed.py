"""Transposed convolutions, which hold their inputs along the first axis of the weight."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from proofs import (
    RandomSelection,
    counted_cost,
    identity_error,
    materialize_error,
    permutation_error,
    random_plan,
    random_student,
    relative_difference,
    selection_error,
)
from small_nets import built, images
from torch import Tensor, nn

import torchcap
from torchcap import ClosedForm, Plan, Recipe, analyze, compress, cost, layer_costs, materialize
from torchcap.transform.fold import fold_


class UNet(nn.Module):
    """Down, down, up with a norm, a concatenation with what was before, and up once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 10, 3, stride=2, padding=1, output_padding=1, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.joined = nn.Conv2d(18, 6, 3, padding=1)
        self.large = nn.ConvTranspose2d(6, 5, (2, 3), stride=(2, 3), dilation=(1, 2))
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x).relu()
        up = self.norm(self.up(self.down(first).relu())).relu()
        return self.last(self.large(self.joined(torch.cat([up, first], 1)).relu()).relu())


def batches(count: int = 3) -> list[Tensor]:
    return [images(16, seed=10 + number) for number in range(count)]


@pytest.fixture
def model() -> nn.Module:
    return built(UNet)


def test_every_space_around_them_is_free_and_proven(model: nn.Module) -> None:
    graph = analyze(model, images())
    assert {s.name for s in graph.free} == {"first", "down", "up", "joined", "large"}
    assert {fold.layer: fold.axis for fold in graph.folds} == {"up": 1}
    student = random_student(model, random_plan(graph, 3), images())
    assert permutation_error(model, graph.free, (images(),)) < 1e-10
    assert identity_error(model, (images(),)) < 1e-10
    assert materialize_error(student, (images(),)) < 1e-10
    error = selection_error(model, random_plan(graph, 4), (images(),))
    assert error is not None
    assert error < 1e-10
    small = materialize(student)
    assert small.up.weight.shape[:2] == (small.up.in_channels, small.up.out_channels)


def test_a_norm_folds_along_the_outputs(model: nn.Module) -> None:
    folded = copy.deepcopy(model)
    fold_(folded, analyze(model, images()).folds)
    assert isinstance(folded.norm, nn.Identity)
    assert relative_difference(folded(images()), model(images())) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "extra", "asked"),
    [(2, 2, 0, 1, 0, None), (5, 3, 2, 2, 1, None), (1, 4, 0, 1, 3, None), (3, 2, 1, 1, 0, 14),
     (3, 1, 1, 3, 2, None), (2, 1, 1, 2, 1, 7)],
)  # fmt: skip
def test_their_cost_is_that_of_fvcore(groups, kernel, stride, padding, dilation, extra, asked):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 1)
            self.up = nn.ConvTranspose2d(
                6, 8, kernel, stride, padding, extra, groups, dilation=dilation
            )

        def forward(self, x: Tensor) -> Tensor:
            size = None if asked is None else [asked, asked]
            return self.up(self.a(x).relu(), output_size=size)

    net, x = Net().eval(), torch.randn(2, 3, 7, 7)
    found = cost(analyze(net, x))
    assert (found.macs, found.parameters) == counted_cost(net, (x,))
    assert found.activations == 2 * 6 * 49 + net(x).numel()


def test_predicted_and_counted_cost_of_the_small_model_agree(model: nn.Module) -> None:
    graph = analyze(model, images())
    plan = random_plan(graph, 5)
    small = materialize(random_student(model, plan, images()))
    assert (cost(graph, plan).macs, cost(graph, plan).parameters) == counted_cost(
        small, (images(),)
    )
    of_layers = {layer.layer: layer.shape for layer in layer_costs(graph, plan)}
    assert of_layers["up"] == tuple(small.up.weight.shape)


def test_the_closed_form_makes_up_for_channels_that_they_read(model: nn.Module) -> None:
    x, graph = images(32, seed=5), analyze(model, images())
    plan = Plan.of(graph, {"down": 4, "joined": 3})
    recipe = Recipe(start=ClosedForm())
    solved = compress(model, batches(), plan=plan, recipe=recipe).double()
    dropped = torchcap.prepare(
        model, plan=plan, example_inputs=images(), init=torchcap.GreedySelection(), data=batches()
    )
    with torch.no_grad():
        errors = [relative_difference(m.eval()(x), model(x)) for m in (solved, dropped)]
    assert errors[0] < 0.9 * errors[1]


def test_solving_puts_a_regression_in_front_of_their_kernels(model: nn.Module) -> None:
    graph = analyze(model, images())
    plan = Plan.of(graph, {"down": 4, "joined": 3})
    student = torchcap.prepare(model, plan=plan, example_inputs=images(), init=RandomSelection(0))
    small = materialize(student)
    solution = torchcap.solve(small, model, batches())
    methods = {solved.layer: solved for solved in solution.layers}
    assert methods["up"].method == "mixing"
    assert methods["up"].after < 0.6 * methods["up"].before
    assert all(solved.after <= solved.before for solved in solution.layers)


def test_one_with_groups_behind_a_cut_stays_and_the_others_are_solved() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1),
        )  # fmt: skip

    model = built(build)
    small = compress(model, batches(), ratio=0.5, recipe=Recipe.seconds())
    assert small[0].out_channels == 4
    assert torch.equal(small[4].weight, model[4].weight)
    solved = {layer.layer for layer in torchcap.solve(small, model, batches()).layers}
    assert solved == {"2", "6"}


class Sized(nn.Module):
    """A transposed convolution that is told the size of its output, and its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 6, 3, 2, 1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x).relu()
        return self.last(self.up(output_size=x.shape[2:], input=low).relu())


def test_one_that_is_told_its_size_is_not_solved() -> None:
    model = built(Sized)
    small = compress(model, batches(), ratio=0.5, recipe=Recipe.seconds())
    assert small.up.weight.shape[:2] == (4, 3)
    solution = torchcap.solve(small, model, batches())
    assert "up" not in {solved.layer for solved in solution.layers}
    assert set(torchcap.measure_latency(model, images(1), seconds=1e-4).layers) == {
        "down", "up", "last"
    }  # fmt: skip


class Own(nn.ConvTranspose2d):
    """A class of its own."""


def test_bias_of_a_folded_norm_has_its_place_in_the_file(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            Own(3, 12, 2, 2, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 2, 1)
        )

    model = built(build)
    small = compress(model, example_inputs=images(1), ratio=0.75)
    torchcap.save(small, tmp_path / "small.safetensors")
    loaded = torchcap.load(tmp_path / "small.safetensors", model=build())
    assert torch.equal(loaded(images(1)), small(images(1)))


def test_they_are_saved_and_loaded(model: nn.Module, tmp_path: Path) -> None:
    small = compress(model, batches(), ratio=0.5, recipe=Recipe.seconds())
    torchcap.save(small, tmp_path / "small.safetensors")
    loaded = torchcap.load(tmp_path / "small.safetensors", model=UNet()).to(images().dtype)
    assert torch.equal(loaded(images()), small(images()))


def test_latency_is_measured_at_several_widths(model: nn.Module) -> None:
    table = torchcap.measure_latency(model, images(1), widths=(0.5,), seconds=1e-4)
    up = table.layers["up"]
    assert (up.outputs, up.inputs) == ((6, 12), (5, 10))
