"""What a report says: against formulas, hand counts, other libraries, and figures of the paper."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS
from proofs import counted_cost
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.models.vgg import VGG, make_layers

from torchcap import (
    ExampleInputsError,
    ModelError,
    Plan,
    analyze,
    cost,
    materialize,
    prepare,
)
from torchcap.plan.cost import LayerCost, layer_costs
from torchcap.report import ModelCost, Report, compare

EVERY_NET = pytest.mark.parametrize("net", NETS)
IMAGES = torch.zeros(2, 3, 8, 8)


def cost_of(model: nn.Module, inputs: Any) -> ModelCost:
    return compare(model, model, inputs, batch_sizes=()).model


def small_pair() -> tuple[nn.Module, nn.Module]:
    """Return a network with a norm, and the same at half of its channels."""
    model = NETS["ConvNormChain"].model().float()
    return model, materialize(prepare(model, ratio=0.5, example_inputs=IMAGES)).eval()


# --------------------------------------------------------------------------------------------------
# Layers: what runs is what reading the model predicts, and what another counter counts


def without_bias(layers: tuple[LayerCost, ...]) -> list[tuple[object, ...]]:
    """Return all but the parameters, to which folding adds a bias."""
    return [(c.layer, c.kind, c.shape, c.macs, c.activations) for c in layers]


@EVERY_NET
def test_layers_that_run_are_those_that_are_read(net: str) -> None:
    model, inputs = NETS[net].model(), NETS[net].inputs()
    graph, found = analyze(model, inputs), cost_of(model, inputs)
    assert without_bias(found.layers) == without_bias(layer_costs(graph))
    assert found.macs == cost(graph).macs == graph.macs


MODELS = {
    "resnet18": torchvision.models.resnet18,
    "resnext": lambda: timm.create_model("resnext26ts"),
    "vgg11": lambda: torchvision.models.vgg11(init_weights=False),
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3),
}


@pytest.mark.parametrize("name", MODELS)
def test_counted_figures_are_those_of_cost_and_of_fvcore(name: str) -> None:
    model, images = MODELS[name]().eval(), torch.zeros(1, 3, 64, 64)
    graph, found = analyze(model, images), cost_of(model, images)
    assert without_bias(found.layers) == without_bias(layer_costs(graph))
    assert (found.macs, found.parameters) == counted_cost(model, (images,))


def test_model_that_cannot_be_traced_is_counted() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x) if x.sum() > 0 else x

    assert cost_of(Branch(), torch.ones(2, 4)).macs == 2 * 4 * 5
    assert cost_of(Branch(), torch.zeros(2, 4)).macs == 0


def test_model_may_be_a_layer_itself() -> None:
    assert cost_of(nn.Linear(3, 4), torch.zeros(2, 3)).layers == (
        LayerCost("", "linear", (4, 3), 2 * 3 * 4, 3 * 4 + 4, 2 * 4),
    )


def test_parameters_are_told_apart_by_kind() -> None:
    model, _ = small_pair()
    found = cost_of(model, IMAGES)
    assert found.conv_parameters == 3 * 8 * 9 + (8 * 6 * 9 + 6)
    assert found.linear_parameters == 6 * 5 + 5
    assert found.parameters == found.conv_parameters + found.linear_parameters + 2 * (8 + 6)
    # Two images of 8 x 8, then of 4 x 4; the linear layer writes no activations of convolutions.
    assert found.activations == 2 * (64 * 8 + 16 * 6)


# --------------------------------------------------------------------------------------------------
# Figures of the paper


def test_vgg_16_has_the_figures_of_the_papers_table_3() -> None:
    """Minnehan & Savakis (2019), table 3, on one image of 224 x 224.

    Its compressed network keeps a third of the channels of layers 1 to 7 and half of those of
    layers 8 to 10, each rounded to the nearest; the other layers, the fully connected ones too,
    are whole. Read as a third *removed*, layers 1 to 7 would lead to 13.4 billion.
    """
    with torch.device("meta"):
        model = torchvision.models.vgg16(init_weights=False).eval()
        graph = analyze(model)
        layers = [name for name, tensor in graph.tensors.items() if len(tensor) == 4]
        names = [name.removesuffix(".weight") for name in layers]
        shares = {**dict.fromkeys(names[:7], 1 / 3), **dict.fromkeys(names[7:10], 1 / 2)}
        plan = Plan.uniform(graph, shares)
        widths = [21, 21, "M", 43, 43, "M", 85, 85, 85, "M", 256, 256, 256, "M", 512, 512, 512, "M"]
        small = VGG(make_layers(widths), init_weights=False)
        report = compare(model, small, batch_sizes=())
    assert round(report.model.flops / 1e9, 2) == 30.94
    assert round(report.model.conv_parameters / 1e6, 2) == 14.71
    assert round(report.model.activations / 4e6, 3) == 3.387
    assert round(report.small.flops / 1e9, 1) == 6.8
    assert report.small.layers == layer_costs(graph, plan)


# --------------------------------------------------------------------------------------------------
# Bytes of the state


TENSORS = st.tuples(
    st.sampled_from([torch.float64, torch.float32, torch.complex64, torch.bfloat16, torch.float16])
    | st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]),
    st.lists(st.integers(0, 40), max_size=3),
)


@settings(deadline=None, print_blob=True)
@given(st.dictionaries(st.text("abcé_", min_size=1, max_size=9), TENSORS, max_size=6))
def test_state_has_the_bytes_of_its_safetensors_file(
    tensors: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for name, (dtype, shape) in tensors.items():
        model[0].register_buffer(f"of_{name}", torch.zeros(shape, dtype=dtype))
    assert cost_of(model, torch.zeros(4, 2)).state_bytes == len(save(model.state_dict()))


def test_state_holds_what_is_shared_once_and_nothing_that_is_not_saved() -> None:
    plain, tied = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1] = tied[0]
    plain[0].register_buffer("cache", torch.zeros(100), persistent=False)
    x = torch.zeros(1, 3)
    assert cost_of(tied, x).state_bytes == cost_of(plain, x).state_bytes
    assert cost_of(plain, x).state_bytes == len(save(plain.state_dict()))


# --------------------------------------------------------------------------------------------------
# Peak memory


@settings(deadline=None, max_examples=30, print_blob=True)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.integers(1, 4))
def test_peak_of_a_chain_is_its_largest_pair_of_neighbours(widths: list[int], batch: int) -> None:
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    made = [0, *widths[1:]]  # the input was there before
    pairs = [a + b for a, b in pairwise(made)]
    found = cost_of(nn.Sequential(*layers), torch.zeros(batch, widths[0]))
    assert found.peak_memory == 4 * batch * max(pairs)


class Keep(nn.Module):
    """Keeps what every step gives until the end."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = [x]
        for step in self.steps:
            kept.append(step(kept[-1]))
        return kept


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[None]


ONE = IMAGES.nbytes
PEAKS = {
    "two results of the same size": (nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), 2 * ONE),
    "a result and no second one": (nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True)), ONE),
    "all results": (Keep(nn.ReLU(), nn.ReLU(), nn.ReLU()), 3 * ONE),
    "views": (Keep(nn.Flatten(), nn.Unflatten(1, (3, 8, 8)), nn.ReLU(), nn.Flatten()), ONE),
    "a view of what is a parameter or a buffer": (Scaled(), ONE),
    "a convolution and its pool": (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(2)),
        4 * 2 * 8 * (64 + 16),
    ),
}


@pytest.mark.parametrize("case", PEAKS)
def test_peak_holds(case: str) -> None:
    model, expected = PEAKS[case]
    assert cost_of(model, IMAGES).peak_memory == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda_is_what_is_counted_on_the_cpu() -> None:
    model, images = Keep(nn.ReLU(), nn.ReLU(), nn.ReLU()), torch.zeros(4, 128)  # 4 blocks of 512
    report = compare(model.cuda(), model, images.cuda(), batch_sizes=(1,), repeats=3)
    assert report.model.peak_memory == cost_of(model.cpu(), images).peak_memory
    assert report.device == "cuda:0"
    assert report.model.latencies[0].median > 0


# --------------------------------------------------------------------------------------------------
# Latency


class Noted(nn.Module):
    """Notes what its forward is given."""

    def __init__(self, name: str, log: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.name, self.log = name, log
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, scale: Tensor, flag: object = None) -> Tensor:
        self.log.append((self.name, x, scale, flag, self.training, torch.is_grad_enabled()))
        return self.norm(x) * scale


def test_models_are_timed_in_turns_in_evaluation_mode_without_gradients() -> None:
    log: list[tuple[Any, ...]] = []
    a, b = Noted("a", log), Noted("b", log)
    report = compare(a, b, (torch.randn(2, 3), torch.ones(1)), batch_sizes=(5,), repeats=4)
    timed = [name for name, x, *_ in log if len(x) == 5]
    turns = [set(timed[i : i + 2]) for i in range(0, len(timed), 2)]
    assert turns == [{"a", "b"}] * (3 + 4)
    assert {timed[i] for i in range(0, len(timed), 2)} == {"a", "b"}  # neither is always first
    assert {(training, grad) for *_, training, grad in log} == {(False, False)}
    for latency in (*report.model.latencies, *report.small.latencies):
        assert latency.batch == 5
        assert 0 < latency.low <= latency.median <= latency.high


def test_examples_are_repeated_along_their_batch_alone() -> None:
    log: list[tuple[Any, ...]] = []
    model = Noted("a", log)
    x, flag = torch.randn(2, 3), torch.randn(2, 2, 2)
    inputs = {"x": x, "scale": torch.ones(1, 3), "flag": flag}
    compare(model, model, inputs, batch_sizes=(5, 1), repeats=1)
    given = {len(x): (x, scale, flag) for _, x, scale, flag, *_ in log}
    assert set(given) == {1, 2, 5}
    torch.testing.assert_close(given[5][0], x[[0, 1, 0, 1, 0]], rtol=0, atol=0)
    torch.testing.assert_close(given[5][2], flag[[0, 1, 0, 1, 0]], rtol=0, atol=0)
    torch.testing.assert_close(given[1][0], x[:1], rtol=0, atol=0)
    assert {tuple(scale.shape) for _, scale, _ in given.values()} == {(1, 3)}


def test_memory_format_of_the_examples_is_kept() -> None:
    seen: list[bool] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x

    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    compare(Look(), Look(), images, batch_sizes=(5,), repeats=1)
    assert set(seen) == {True}


def test_nothing_is_timed_without_batch_sizes() -> None:
    log: list[tuple[Any, ...]] = []
    a, b = Noted("a", log), Noted("b", log)
    report = compare(a, b, (torch.randn(2, 3), torch.ones(1)), batch_sizes=())
    assert [name for name, *_ in log] == ["a", "a", "b", "b"]  # layers, then memory
    assert report.model.latencies == report.small.latencies == ()
    assert "atency" not in str(report)


# --------------------------------------------------------------------------------------------------
# What is left behind, and what is refused


def test_models_are_left_as_they_were() -> None:
    model, small = small_pair()
    model.train()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare(model, small, IMAGES, batch_sizes=(1,), repeats=1)
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_models_are_left_as_they_were_when_one_does_not_run() -> None:
    model, _ = small_pair()
    other = nn.Sequential(nn.Conv2d(4, 5, 3)).train()
    with pytest.raises(ExampleInputsError, match=r"Sequential.*\(2, 3, 8, 8\) float32.*channels"):
        compare(model.train(), other, IMAGES)
    assert model.training
    assert other[0].training
    assert not other[0]._forward_hooks


def test_the_same_model_twice_costs_the_same() -> None:
    report = compare(*[small_pair()[0].train()] * 2, IMAGES, batch_sizes=())
    assert report.model == report.small


def test_model_that_is_scripted_is_refused() -> None:
    model, _ = small_pair()
    with pytest.raises(ModelError, match=r"'0' is scripted"):
        compare(model, nn.Sequential(torch.jit.script(model)), IMAGES)


def test_parameter_without_a_shape_is_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ModelError, match=r"'0\.weight' has no shape"):
        compare(model, model, torch.zeros(1, 2))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ModelError, match="function"):
        compare(nn.ReLU(), torch.relu, IMAGES)


def test_input_size_that_nobody_knows_is_asked_for() -> None:
    with pytest.raises(ExampleInputsError, match="example_inputs"):
        compare(*small_pair())


@pytest.mark.parametrize("options", [{"batch_sizes": (1, 0)}, {"repeats": 0}])
def test_numbers_below_one_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ExampleInputsError, match=r"at least 1; got repeats=\d+, batch_sizes=\("):
        compare(*small_pair(), IMAGES, **options)


def test_lists_of_images_are_counted_and_not_timed() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return [self.conv(image) for image in images]

    model, inputs = Lists(), ([torch.zeros(3, 8, 8), torch.zeros(3, 4, 4)],)
    assert cost_of(model, inputs).macs == (64 + 16) * 3 * 4
    with pytest.raises(ExampleInputsError, match=r"batch_sizes=\(\)"):
        compare(model, model, inputs)


# --------------------------------------------------------------------------------------------------
# What is shown


def report_of_two_classes() -> Report:
    model, _ = small_pair()
    other = nn.Sequential(nn.Conv2d(3, 4, 1))
    other.add_module("conv2", nn.Conv2d(4, 2, 1))
    return compare(model, other, IMAGES, batch_sizes=(1, 3), repeats=2)


def test_layers_are_paired_by_name() -> None:
    pairs = report_of_two_classes().layers
    names = [[side and side.layer for side in pair] for pair in pairs]
    assert names == [["conv1", None], ["conv2", "conv2"], ["fc", None], [None, "0"]]


def test_dictionary_goes_through_json() -> None:
    report = report_of_two_classes()
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["model"]["macs"] == report.model.macs
    assert data["small"]["conv_activations"] == report.small.activations
    assert [entry["batch"] for entry in data["small"]["latencies_ms"]] == [1, 3]
    assert data["small"]["layers"][0]["shape"] == [4, 3, 1, 1]


def test_text_and_markdown_show_every_figure_and_the_convention() -> None:
    report = report_of_two_classes()
    for text in (str(report), report.to_markdown()):
        for side in (report.model, report.small):
            for figure in (side.macs, side.parameters, side.state_bytes, side.peak_memory):
                assert f"{figure:,}" in text
            for layer in side.layers:
                assert f"{layer.macs:,}" in text
            assert all(str(latency) in text for latency in side.latencies)
        assert "one multiply-add counts as one" in text
        assert "(2, 3, 8, 8) float32" in text


def test_rows_of_a_markdown_table_have_as_many_cells_as_its_header() -> None:
    text = report_of_two_classes().to_markdown()
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len({line.count("|") for line in table}) for table in tables] == [1, 1]
    assert [len(table) - 2 for table in tables] == [7 + 2, 4]
