"""Layers with parameters and buffers: who carries channels along, and who makes them stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from between import IMAGE, check_first_space, made
from proofs import materialize_error, permutation_error, random_plan, random_student
from timm import layers as tl
from timm.layers import evo_norm, norm, norm_act
from timm.layers.blur_pool import BlurPool2d
from timm.layers.filter_response_norm import FilterResponseNormAct2d, FilterResponseNormTlu2d
from timm.models.metaformer import GroupNorm1NoBias, LayerNorm2dNoBias, LayerNormNoBias
from torch import Tensor, nn
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from torchcap import analyze, materialize, prepare

Layer = Callable[[], nn.Module]


class Tokens(nn.Module):
    """A layer that reads ``(batch, height, width, channels)``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Volume(nn.Module):
    """A layer that reads ``(batch, channels, depth, height, width)``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(2)).squeeze(2)


class Positions(nn.Module):
    """A layer that reads ``(batch, channels, positions)``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2)).unsqueeze(3)


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return self.layer(x, x, x, need_weights=False)[0].transpose(1, 2).unsqueeze(3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unsqueeze(3)


SELECTED: dict[str, Layer] = {
    "InstanceNorm1d": lambda: Positions(nn.InstanceNorm1d(6, affine=True)),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(6, affine=True),
    "InstanceNorm3d": lambda: Volume(nn.InstanceNorm3d(6, affine=True, track_running_stats=True)),
    "InstanceNorm2d with statistics": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
    "BlurPool2d": lambda: tl.BlurPool2d(6, filt_size=4, stride=1, pad_mode="constant"),
    "LayerNormNoBias": lambda: Tokens(LayerNormNoBias(6)),
    "LayerNorm2dNoBias": lambda: LayerNorm2dNoBias(6),
    "GroupNorm1NoBias": lambda: GroupNorm1NoBias(6),
    "LayerNormExp2d": lambda: norm.LayerNormExp2d(6),
    "LayerNormAct": lambda: Tokens(norm_act.LayerNormAct(6)),
    "RmsNormAct": lambda: Tokens(norm_act.RmsNormAct(6)),
    "RmsNormAct2d": lambda: norm_act.RmsNormAct2d(6, act_layer=nn.SiLU),
    "GroupNorm1Act": lambda: norm_act.GroupNorm1Act(6),
    "FilterResponseNormAct2d": lambda: FilterResponseNormAct2d(6),
    "FilterResponseNormTlu2d": lambda: FilterResponseNormTlu2d(6),
    "FilterResponseNormTlu2d without threshold": lambda: FilterResponseNormTlu2d(6, False),  # noqa: FBT003
    "EvoNorm2dS0": lambda: evo_norm.EvoNorm2dS0(6, groups=1),
    "EvoNorm2dS0 in groups": lambda: evo_norm.EvoNorm2dS0(6, group_size=3),
    "EvoNorm2dS0a": lambda: evo_norm.EvoNorm2dS0a(6, groups=2),
    "EvoNorm2dS1": lambda: evo_norm.EvoNorm2dS1(6, groups=2),
    "GatherExcite": lambda: tl.GatherExcite(6, use_mlp=False),
    "EvoNorm2dS2a": lambda: evo_norm.EvoNorm2dS2a(6, groups=2, act_layer=nn.GELU),
}
REFUSED: dict[str, tuple[Layer, str]] = {
    "InstanceNorm2d of tokens": (
        lambda: Tokens(nn.InstanceNorm2d(6, affine=True)),
        "does not normalise along the channels",
    ),
    "EvoNorm2dS1 with a slope for each channel": (
        lambda: evo_norm.EvoNorm2dS1(6, groups=2, act_layer=partial(nn.PReLU, 6)),
        "activation inside",
    ),
    "EvoNorm2dB0": (lambda: evo_norm.EvoNorm2dB0(6), "measures every batch"),
    "SplitBatchNorm2d": (lambda: tl.SplitBatchNorm2d(6, num_splits=2), "in another way than it"),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(6, 6, 2, groups=2),
        "transposed convolution with groups",
    ),
    "MultiheadAttention": (Attended, "computes with all of its weights"),
    "LSTM": (Recurrent, "no rule"),
    "EcaModule": (lambda: tl.EcaModule(6), "convolves along the channels"),
    "normalised weights": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1)),
        "already parametrized",
    ),
    "observed for quantisation": (lambda: observed(nn.Conv2d(6, 6, 1)), "no rule"),
}


def observed(conv: nn.Conv2d) -> nn.Module:
    """Return a convolution that is trained for quantisation."""
    conv.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.nn.qat.Conv2d.from_float(conv)


@pytest.mark.parametrize("case", SELECTED)
def test_channels_are_followed_through_the_layer(case: str) -> None:
    check_first_space(made(SELECTED[case]()), "selection", 1e-6)  # some compute in float32


@pytest.mark.parametrize("case", REFUSED)
def test_channels_stay_before_a_layer_without_a_sure_rule(case: str) -> None:
    layer, reason = REFUSED[case]
    graph = analyze(made(layer()), IMAGE)
    assert not graph.free
    assert reason in graph["first"].reason


def test_instance_norm_without_parameters_is_one_function_of_each_channel() -> None:
    check_first_space(made(nn.InstanceNorm2d(6)), "stiefel")


@pytest.mark.parametrize("affine", [False, True])
def test_small_instance_norm_counts_its_own_channels(*, affine: bool) -> None:
    model = made(nn.InstanceNorm2d(6, affine=affine))
    graph = analyze(model, IMAGE)
    plan = random_plan(graph, 0)
    small = materialize(random_student(model, plan, (IMAGE,)))
    assert small.between.num_features == plan.choices["first"].rank < 6


@pytest.mark.filterwarnings("ignore:input's size")
def test_instance_norm_that_was_made_for_another_width_keeps_its_channels() -> None:
    assert "another number" in analyze(made(nn.InstanceNorm2d(5)), IMAGE)["first"].reason


def test_groups_of_an_evonorm_keep_equally_many_channels() -> None:
    graph = analyze(made(evo_norm.EvoNorm2dS0(6, groups=3)), IMAGE)
    assert graph["first"].blocks == 3


@pytest.mark.parametrize("kind", [Conv3DSimple, Conv3DNoTemporal])
def test_convolutions_of_videos_are_convolutions(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(3, 6), nn.ReLU(), kind(6, 4)).double()
    video = IMAGE.unsqueeze(2)
    graph = analyze(model, video)
    assert [(space.name, space.freedom) for space in graph.free] == [("0", "stiefel")]
    assert permutation_error(model, graph.free, (video,)) < 1e-12
    student = random_student(model, random_plan(graph, 0), (video,))
    assert materialize_error(student, (video,)) < 1e-12


def test_a_filter_that_the_state_leaves_out_stays_out_of_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), BlurPool2d(8), nn.Conv2d(8, 4, 1)).eval()
    student = prepare(model, ratio=0.5, example_inputs=torch.zeros(1, 3, 8, 8))
    assert not any("filt" in name for name in student.state_dict())
    assert materialize(student).state_dict().keys() == model.state_dict().keys()
