"""Folded norms and weight standardisation: the same function of the input, in evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_nets import built, fingerprint, values
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import torchcap
from torchcap.transform.fold import fold_

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def pair(layer: nn.Module, norm: nn.Module) -> Callable[[], nn.Module]:
    """Make nets with a layer, its norm, and a reader behind them."""
    reader = {nn.Conv1d: nn.Conv1d, nn.Conv3d: nn.Conv3d}.get(type(layer), nn.Conv2d)
    last = nn.Linear(6, 3) if isinstance(layer, nn.Linear) else reader(6, 3, 1)
    return lambda: nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm), nn.Tanh(), last)


def standardized(kind: type[nn.Module], **kwargs: object) -> Callable[[], nn.Module]:
    layer = kind(4, 6, 3, stride=2, **kwargs)
    return lambda: nn.Sequential(copy.deepcopy(layer), nn.Tanh(), nn.Conv2d(6, 3, 1))


IMAGE, LINE, VOLUME, VECTOR = (2, 4, 8, 7), (2, 4, 9), (2, 4, 5, 4, 6), (5, 4)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d behind Conv1d": (pair(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), LINE),
    "BatchNorm1d behind Linear": (pair(nn.Linear(4, 6), nn.BatchNorm1d(6)), VECTOR),
    "BatchNorm2d": (pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), IMAGE),
    "BatchNorm3d": (pair(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), VOLUME),
    "SyncBatchNorm": (pair(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), IMAGE),
    "no bias": (pair(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), IMAGE),
    "no affine": (pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), IMAGE),
    "large eps": (pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.3)), IMAGE),
    "grouped": (pair(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), IMAGE),
    "BatchNormAct2d": (pair(nn.Conv2d(4, 6, 3), BatchNormAct2d(6)), IMAGE),
    "BatchNormAct2d of SiLU": (
        pair(nn.Conv2d(4, 6, 3, bias=False), BatchNormAct2d(6, act_layer=nn.SiLU)),
        IMAGE,
    ),
    "BatchNormAct2d without act": (
        pair(nn.Conv2d(4, 6, 3), BatchNormAct2d(6, apply_act=False)),
        IMAGE,
    ),
    "FrozenBatchNormAct2d": (pair(nn.Conv2d(4, 6, 3), FrozenBatchNormAct2d(6)), IMAGE),
    "FrozenBatchNorm2d": (pair(nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6)), IMAGE),
    "StdConv2d": (standardized(StdConv2d), IMAGE),
    "StdConv2d with bias": (standardized(StdConv2d, bias=True), IMAGE),
    "StdConv2dSame": (standardized(StdConv2dSame), IMAGE),
    "StdConv2d and BatchNorm2d": (pair(StdConv2d(4, 6, 3), nn.BatchNorm2d(6)), IMAGE),
    "ScaledStdConv2d": (standardized(ScaledStdConv2d, gamma=1.7), IMAGE),
    "ScaledStdConv2d without bias": (standardized(ScaledStdConv2d, bias=False), IMAGE),
    "ScaledStdConv2dSame": (standardized(ScaledStdConv2dSame, gamma=1.7), IMAGE),
}
EVERY_NET = pytest.mark.parametrize("name", NETS)


def net_and_input(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = NETS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return built(make), x


def folded(net: nn.Module, x: Tensor) -> nn.Module:
    result = copy.deepcopy(net)
    fold_(result, torchcap.analyze(net, x).folds)
    return result


@EVERY_NET
@torch.no_grad()
def test_folded_net_computes_the_same(name: str) -> None:
    net, x = net_and_input(name)
    torch.testing.assert_close(folded(net, x)(x), net(x), **EXACT)


@EVERY_NET
def test_folding_leaves_plain_layers_and_activations(name: str) -> None:
    net, x = net_and_input(name)
    result = folded(net, x)
    norms = (nn.modules.batchnorm._NormBase, FrozenBatchNorm2d, FrozenBatchNormAct2d)
    standard = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
    assert not [m for m in result.modules() if isinstance(m, norms + standard)]
    assert not [n for n, _ in result.named_parameters() if n.rpartition(".")[2] == "gain"]


def test_folding_keeps_the_activation_inside_a_norm() -> None:
    net, x = net_and_input("BatchNormAct2d of SiLU")
    assert isinstance(folded(net, x)[1], nn.SiLU)


@EVERY_NET
def test_preparing_at_full_width_computes_the_same_and_leaves_the_model_alone(name: str) -> None:
    net, x = net_and_input(name)
    before, numbers = fingerprint(net), values(net)
    student = torchcap.prepare(net, ratio=1.0, example_inputs=x)

    with torch.no_grad():
        torch.testing.assert_close(student(x), net(x), **EXACT)
    assert fingerprint(net) == before
    for key, value in values(net).items():
        torch.testing.assert_close(value, numbers[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["BatchNorm2d", "no bias", "ScaledStdConv2d"])
@pytest.mark.parametrize("trainable", [True, False])
def test_folded_layer_is_trainable_where_it_was(name: str, *, trainable: bool) -> None:
    net, x = net_and_input(name)
    net[0].requires_grad_(trainable)
    result = folded(net, x)
    assert {p.requires_grad for p in result[0].parameters()} == {trainable}
    assert {p.requires_grad for p in result[-1].parameters()} == {True}


@pytest.mark.parametrize("name", ["BatchNorm2d", "StdConv2d", "BatchNormAct2d of SiLU"])
@pytest.mark.parametrize("training", [True, False])
def test_folded_net_has_the_mode_of_the_net(name: str, *, training: bool) -> None:
    net, x = net_and_input(name)
    net.train(training)
    assert {m.training for m in folded(net, x).modules()} == {training}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_weights_are_folded_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    net, x = net_and_input("BatchNorm2d")
    net = net.to(dtype)
    wide = folded(copy.deepcopy(net).double(), x)
    result = folded(net, x.to(dtype))
    assert result[0].weight.dtype == result[0].bias.dtype == dtype
    for name in ("weight", "bias"):
        expected = getattr(wide[0], name).to(dtype)
        torch.testing.assert_close(getattr(result[0], name), expected, rtol=0, atol=0)


def test_folded_weight_keeps_channels_last() -> None:
    net, x = net_and_input("BatchNorm2d")
    net = net.to(memory_format=torch.channels_last)
    assert folded(net, x)[0].weight.is_contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------------
# What does not fold


class TwoReaders(nn.Module):
    """The convolution's own output is read beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last(torch.tanh(self.norm(y)) + torch.sigmoid(y))


class TwoNorms(nn.Module):
    """One convolution, called twice, with a norm for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv(torch.tanh(self.norm1(self.conv(x)))))


class Backwards(nn.Module):
    """A norm in front of the convolution, and one of the batch's own statistics behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)
        self.instant = nn.BatchNorm2d(6, track_running_stats=False)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.instant(self.conv(self.norm(x)))))


@pytest.mark.parametrize("make", [TwoReaders, TwoNorms, Backwards])
def test_norms_that_are_no_part_of_one_layer_stay(make: Callable[[], nn.Module]) -> None:
    net = built(make)
    x = torch.randn(2, 4, 8, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result = folded(net, x)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in result.modules()) == count
    with torch.no_grad():
        torch.testing.assert_close(result(x), net(x), rtol=0, atol=0)
