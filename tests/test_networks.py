"""Tiny networks and those that people use: read right, rewritten right, their cost predicted.

Images are as small as a network allows, since nothing here depends on their size.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import timm
import torch
import torchvision
from nets import NETS, CifarResNet
from proofs import (
    counted_cost,
    identity_error,
    materialize_error,
    permutation_error,
    random_plan,
    random_student,
    randomize_,
    relative_difference,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchcap import Plan, SpaceGraph, analyze, cost, materialize

models = torchvision.models

# --------------------------------------------------------------------------------------------------
# The tiny networks, whose spaces test_spaces.py knows

TINY = pytest.mark.parametrize(
    "net", [name for name, truth in NETS.items() if any(s.free for s in truth.spaces.values())]
)


@TINY
@pytest.mark.parametrize("seed", [0, 1])
def test_tiny_network_materialized_equals_prepared(net: str, seed: int) -> None:
    model, inputs = NETS[net].model(), NETS[net].inputs()
    randomize_(model, torch.Generator().manual_seed(seed))
    plan = random_plan(analyze(model, inputs), seed)
    assert materialize_error(random_student(model, plan, inputs, seed), inputs) <= 1e-12


@TINY
def test_tiny_network_at_full_width_from_the_identity_is_the_original(net: str) -> None:
    model, inputs = NETS[net].model(), NETS[net].inputs()
    randomize_(model, torch.Generator().manual_seed(2))
    assert identity_error(model, inputs) <= 1e-12


@TINY
def test_tiny_network_materialized_has_no_projection_left(net: str) -> None:
    model, inputs = NETS[net].model(), NETS[net].inputs()
    small = materialize(random_student(model, random_plan(analyze(model, inputs), 0), inputs))
    parametrized = [name for name, m in small.named_modules() if parametrize.is_parametrized(m)]
    # The one network with a parametrization of its own keeps that.
    assert parametrized == (["conv1"] if net == "Parametrized" else [])
    assert type(small) is type(model)
    assert not any(type(m).__module__.startswith("torchcap") for m in small.modules())


# --------------------------------------------------------------------------------------------------
# The networks that people use


@dataclass(frozen=True)
class Subject:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (1, 3, 64, 64)


def slim(model: nn.Module) -> nn.Module:
    """Give a classifier of 4096 features a hundredth of them: the flatten before it stays."""
    first, second, last = (
        name for name, layer in model.classifier.named_children() if isinstance(layer, nn.Linear)
    )
    layers = model.classifier._modules
    layers[first] = nn.Linear(layers[first].in_features, 40)
    layers[second] = nn.Linear(40, 48)
    layers[last] = nn.Linear(48, 10)
    return model


def from_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


def segmentation(name: str) -> Callable[[], nn.Module]:
    make = getattr(models.segmentation, name)
    return lambda: make(weights=None, weights_backbone=None, aux_loss=True)


def convnext() -> nn.Module:
    """Return ConvNeXt-T with one or two blocks in each stage, for the time that its widths take."""
    stages = ((96, 192, 1), (192, 384, 1), (384, 768, 2), (768, None, 1))
    return models.convnext.ConvNeXt([models.convnext.CNBlockConfig(*stage) for stage in stages])


SUBJECTS: dict[str, Subject] = {
    "cifar_resnet20": Subject(lambda: CifarResNet(20), (1, 3, 32, 32)),
    "cifar_resnet56": Subject(lambda: CifarResNet(56), (1, 3, 32, 32)),
    "torchvision/resnet18": Subject(models.resnet18),
    "torchvision/resnet50": Subject(models.resnet50),
    "timm/resnet18": Subject(from_timm("resnet18")),
    "timm/resnet50": Subject(from_timm("resnet50")),
    "timm/resnet10t": Subject(from_timm("resnet10t")),
    "timm/resnetv2_50": Subject(from_timm("resnetv2_50")),
    "timm/resnetv2_50x1_bit": Subject(from_timm("resnetv2_50x1_bit")),
    "timm/resnetv2_50d_gn": Subject(from_timm("resnetv2_50d_gn")),
    "torchvision/vgg16": Subject(lambda: slim(models.vgg16(init_weights=False)), (1, 3, 32, 32)),
    "torchvision/vgg16_bn": Subject(
        lambda: slim(models.vgg16_bn(init_weights=False)), (1, 3, 32, 32)
    ),
    "torchvision/alexnet": Subject(lambda: slim(models.alexnet())),
    "torchvision/squeezenet1_1": Subject(models.squeezenet1_1),
    # The pool in its auxiliary head needs an image of the size that the network was made for.
    "torchvision/inception_v3": Subject(
        lambda: models.inception_v3(init_weights=False), (1, 3, 299, 299)
    ),
    "torchvision/googlenet": Subject(lambda: models.googlenet(init_weights=False)),
    "torchvision/densenet121": Subject(models.densenet121),
    "torchvision/mobilenet_v2": Subject(models.mobilenet_v2),
    "torchvision/mobilenet_v3_small": Subject(models.mobilenet_v3_small),
    "timm/mobilenetv2_100": Subject(from_timm("mobilenetv2_100")),
    "timm/mobilenetv3_small_100": Subject(from_timm("mobilenetv3_small_100")),
    "torchvision/efficientnet_b0": Subject(models.efficientnet_b0),
    "timm/efficientnet_b0": Subject(from_timm("efficientnet_b0")),
    "timm/tf_efficientnet_lite0": Subject(from_timm("tf_efficientnet_lite0")),
    "torchvision/regnet_x_400mf": Subject(models.regnet_x_400mf),
    "torchvision/regnet_y_400mf": Subject(models.regnet_y_400mf),
    "torchvision/resnext50_32x4d": Subject(models.resnext50_32x4d),
    "torchvision/mnasnet1_0": Subject(models.mnasnet1_0),
    "torchvision/convnext_tiny": Subject(convnext),
    "timm/convnext_tiny": Subject(
        lambda: timm.create_model("convnext_tiny", depths=(1, 1, 2, 1), dims=(48, 96, 192, 384))
    ),
    "torchvision/shufflenet_v2_x1_0": Subject(models.shufflenet_v2_x1_0),
    "torchvision/fcn_resnet50": Subject(segmentation("fcn_resnet50")),
    "torchvision/deeplabv3_resnet50": Subject(segmentation("deeplabv3_resnet50")),
    "torchvision/r3d_18": Subject(models.video.r3d_18, (1, 3, 4, 32, 32)),
}


class Proofs:
    """One network and all that is measured on it, each when it is first asked for."""

    def __init__(self, subject: Subject) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = subject.build().double().eval()
        generator = torch.Generator().manual_seed(1)
        randomize_(self.model, generator)
        self.inputs = (torch.randn(subject.shape, generator=generator, dtype=torch.float64),)

    @cached_property
    def graph(self) -> SpaceGraph:
        return analyze(self.model, self.inputs)

    @cached_property
    def plan(self) -> Plan:
        return random_plan(self.graph, seed=0)

    @cached_property
    def differences(self) -> dict[torch.dtype, float]:
        """How far materialized is from prepared. The student is rounded in the second turn."""
        student = random_student(self.model, self.plan, self.inputs)
        found = {}
        for dtype in (torch.float64, torch.float32):
            student.to(dtype)
            inputs = [tensor.to(dtype) for tensor in self.inputs]
            self.small = materialize(student)
            with torch.no_grad():
                found[dtype] = relative_difference(self.small(*inputs), student(*inputs))
        return found

    @cached_property
    def counted(self) -> tuple[int, int]:
        assert self.differences  # makes the small model
        inputs: tuple[Tensor, ...] = tuple(tensor.float() for tensor in self.inputs)
        return counted_cost(self.small, inputs)


@pytest.fixture(scope="module", params=SUBJECTS)
def proofs(request: pytest.FixtureRequest) -> Proofs:
    return Proofs(SUBJECTS[request.param])


def test_permuting_every_free_space_leaves_the_output_unchanged(proofs: Proofs) -> None:
    assert proofs.graph.free
    assert permutation_error(proofs.model, proofs.graph.free, proofs.inputs) <= 1e-10


def test_a_port_that_is_left_out_changes_the_output(proofs: Proofs) -> None:
    """The proof above can fail: permute one space without one of its consumers."""
    space = random.Random(0).choice(proofs.graph.free)
    wrong = dataclasses.replace(space, consumers=space.consumers[1:])
    assert permutation_error(proofs.model, [wrong], proofs.inputs) > 1e-8


def test_materialized_model_equals_prepared_model(proofs: Proofs) -> None:
    assert proofs.differences[torch.float64] <= 1e-12


def test_materialized_model_equals_prepared_model_in_single_precision(proofs: Proofs) -> None:
    assert proofs.differences[torch.float32] <= 1e-5


def test_predicted_multiply_adds_are_those_counted(proofs: Proofs) -> None:
    assert cost(proofs.graph, proofs.plan).macs == proofs.counted[0]


def test_predicted_parameters_are_those_counted(proofs: Proofs) -> None:
    assert cost(proofs.graph, proofs.plan).parameters == proofs.counted[1]


def test_full_width_from_the_identity_is_the_original_network(proofs: Proofs) -> None:
    assert identity_error(proofs.model, proofs.inputs) <= 1e-12
