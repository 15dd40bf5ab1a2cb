"""A small network of every kind that timm and torchvision have, read right and rewritten right.

None of these is in ``test_networks.py``. Widths and depths are cut where a constructor lets them
be, and images are as small as a network takes. ``examples/benchmarks/coverage.py`` does the same,
and more, for all of both libraries.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import pytest
import timm
import torch
import torchvision
from proofs import (
    RandomReflection,
    permute_space_,
    random_plan,
    randomize_,
    relative_difference,
    selection_error,
    tensors_of,
)
from timm.layers import DropPath
from timm.models import mlp_mixer
from timm.models.metaformer import (
    Attention,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    Pooling,
    SepConv,
)
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.models.video import SwinTransformer3d

from torchcap import (
    ChannelSpace,
    Plan,
    SpaceGraph,
    analyze,
    cost,
    layer_costs,
    materialize,
    prepare,
    projection_parameters,
)

IMAGE = (1, 3, 64, 64)
COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Family:
    """How one network of a family is built.

    Attributes:
        build: makes it, without trained weights.
        shape: of its input.
        streams: whether its residual streams are compressed too, for else nothing could be.
        parts: modules, or chains of modules, that are compared instead of the network. Which boxes
            a detector puts out, and how many, hangs on ties, which rounding breaks.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE
    streams: bool = False
    parts: tuple[tuple[str, ...], ...] = ()


def of_timm(name: str, size: int = 64, *, streams: bool = False, **options: Any) -> Family:
    return Family(lambda: timm.create_model(name, **options), (1, 3, size, size), streams)


def mixer(**options: Any) -> Family:
    return Family(lambda: mlp_mixer.MlpMixer(img_size=64, num_blocks=2, embed_dim=96, **options))


def metaformer(*mixers: type[nn.Module], **options: Any) -> Family:
    depths, dims = (1, 1, 2, 1), (24, 48, 64, 96)
    return Family(lambda: MetaFormer(depths=depths, dims=dims, token_mixers=mixers, **options))


def swin_of_videos() -> nn.Module:
    return SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=24, depths=[1, 2], num_heads=[2, 4], window_size=[2, 3, 3]
    )


def detector() -> nn.Module:
    return torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=96, max_size=128
    )


FAMILIES: dict[str, Family] = {
    # convolutions
    "ResNeSt, split attention": of_timm("resnest14d"),
    "SKNet, selective kernels": of_timm("skresnet18"),
    "Res2Net, splits": of_timm("res2net50_48w_2s"),
    "DPN, dual path": of_timm("dpn48b"),
    "DLA, aggregation": of_timm("dla46_c"),
    "VoVNet, one-shot aggregation": of_timm("ese_vovnet19b_slim_dw"),
    "CSPNet, partial stages": of_timm("cs3darknet_focus_s"),
    "NF-RegNet, standardised weights": of_timm("nf_regnet_b0"),
    "GhostNet": of_timm("ghostnet_050"),
    "RepVGG, parallel branches": of_timm("repvgg_a0", streams=True),
    "ConvNeXtV2": of_timm("convnextv2_atto"),
    "InceptionNeXt": of_timm("inception_next_atto"),
    "StarNet": of_timm("starnet_s050"),
    # tokens
    "ViT": of_timm("vit_tiny_patch16_224", img_size=64, depth=2),
    "EVA02, SwiGLU": of_timm("eva02_tiny_patch14_224", 56, img_size=56, depth=2),
    "CaiT, class attention": of_timm("cait_xxs24_224", img_size=64, depth=2),
    "Swin": of_timm(
        "swin_tiny_patch4_window7_224", 56, img_size=56, embed_dim=48, depths=(1, 1, 2, 1)
    ),
    "PVTv2": of_timm("pvt_v2_b0"),
    "MLP-Mixer": mixer(),
    "ResMLP": mixer(mlp_ratio=4, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine),
    "PoolFormer": metaformer(Pooling, Pooling, Pooling, Pooling),
    "CAFormer": metaformer(
        SepConv, SepConv, Attention, Attention,
        norm_layers=[LayerNorm2dNoBias, LayerNorm2dNoBias, LayerNormNoBias, LayerNormNoBias],
    ),
    # both
    "LeViT": of_timm("levit_128s", img_size=64),
    "MobileViT": of_timm("mobilevit_xxs"),
    # other tasks
    "LR-ASPP, segmentation": Family(
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None
        )
    ),
    "Video Swin": Family(swin_of_videos, (1, 3, 8, 32, 32)),
    "Faster R-CNN, detection": Family(
        detector,
        (1, 3, 96, 96),
        parts=(
            ("backbone",),
            ("rpn.head",),
            ("roi_heads.box_head", "roi_heads.box_predictor"),
        ),
    ),
}  # fmt: skip


@torch.no_grad()
def fill_(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the matrices that a network starts with at zero: behind them nothing would show."""
    for tensor in model.parameters():
        if tensor.dim() > 1 and not tensor.any():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


class Proven:
    """One network and all that is found out about it, each when it is first asked for."""

    def __init__(self, family: Family) -> None:
        with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
            torch.manual_seed(0)
            self.model = family.build().double().eval()
        for module in self.model.modules():  # training must not draw anything
            if isinstance(module, _DropoutNd | torchvision.ops.StochasticDepth):
                module.p = 0.0
            elif isinstance(module, DropPath):
                module.drop_prob = 0.0
        generator = torch.Generator().manual_seed(1)
        randomize_(self.model, generator)
        fill_(self.model, generator)
        image = torch.randn(family.shape, generator=generator, dtype=torch.float64)
        self.inputs: tuple[Any, ...] = ([image[0]],) if family.parts else (image,)
        self.streams = family.streams
        self.calls = self._calls(family.parts)

    def _calls(
        self, parts: tuple[tuple[str, ...], ...]
    ) -> Mapping[tuple[str, ...], tuple[Any, ...]]:
        """Return what each part is given in a forward of the network, or the network itself."""
        calls: dict[tuple[str, ...], tuple[Any, ...]] = {}

        def keep(part: tuple[str, ...]) -> Callable[..., None]:
            return lambda module, args: calls.update({part: args})

        handles = [
            self.model.get_submodule(part[0]).register_forward_pre_hook(keep(part))
            for part in parts
        ]
        if parts:
            with torch.no_grad():
                self.model(*self.inputs)
        for handle in handles:
            handle.remove()
        return calls or {("",): self.inputs}

    def run(self, model: nn.Module) -> list[Any]:
        return [
            nn.Sequential(*map(model.get_submodule, rest))(model.get_submodule(first)(*args))
            for (first, *rest), args in self.calls.items()
        ]

    @cached_property
    def graph(self) -> SpaceGraph:
        return analyze(self.model, self.inputs, streams=self.streams)

    @cached_property
    def plan(self) -> Plan:
        return random_plan(self.graph, seed=0)

    @cached_property
    def student(self) -> nn.Module:
        return self.prepared(seed=0)

    def prepared(self, seed: int) -> nn.Module:
        return prepare(
            self.model,
            plan=self.plan,
            example_inputs=self.inputs,
            init=RandomReflection(seed),
            streams=self.streams,
        )

    @cached_property
    def small(self) -> nn.Module:
        return materialize(self.student)

    @cached_property
    def small_output(self) -> list[Any]:
        with torch.no_grad():
            return self.run(self.small)


@pytest.fixture(scope="module", params=FAMILIES)
def proven(request: pytest.FixtureRequest) -> Proven:
    return Proven(FAMILIES[request.param])


@torch.no_grad()
def test_permuting_every_free_space_leaves_the_output_unchanged(proven: Proven) -> None:
    spaces = proven.graph.free
    assert spaces
    output = proven.run(permuted(proven.model, spaces))
    assert relative_difference(output, proven.run(proven.model)) <= 1e-10


@torch.no_grad()
def test_permuting_the_producers_alone_changes_the_output(proven: Proven) -> None:
    """So the proof above can fail."""
    spaces = [dataclasses.replace(s, consumers=(), carriers=()) for s in proven.graph.free]
    output = proven.run(permuted(proven.model, spaces))
    assert relative_difference(output, proven.run(proven.model)) > 1e-6


def permuted(model: nn.Module, spaces: Sequence[ChannelSpace]) -> nn.Module:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for space in spaces:
        permute_space_(changed, space, generator)
    return changed


@torch.no_grad()
def test_materialized_model_equals_prepared_model(proven: Proven) -> None:
    assert relative_difference(proven.small_output, proven.run(proven.student)) <= 1e-11


def test_selection_is_the_original_without_the_channels_that_are_dropped(proven: Proven) -> None:
    if ("",) not in proven.calls:
        pytest.skip("a detector's boxes hang on ties")
    error = selection_error(proven.model, proven.plan, proven.inputs, streams=proven.streams)
    assert error is None or error <= 1e-10


def test_predicted_multiply_adds_are_those_counted(proven: Proven) -> None:
    counted: list[int] = []

    def count(layer: Any, args: Any, output: Tensor) -> None:
        counted.append(output.numel() // layer.weight.shape[0] * layer.weight.numel())

    chains = {part for part in proven.calls if len(part) > 1}  # called as often as there are boxes
    varying = tuple(module for chain in chains for module in chain)
    called = {c.module for c in proven.graph.calls if not c.module.startswith(varying or ("-",))}
    handles = [
        layer.register_forward_hook(count)
        for name, layer in proven.small.named_modules()
        if isinstance(layer, COUNTED) and name in called
    ]
    with torch.no_grad():
        proven.small(*proven.inputs)
    for handle in handles:
        handle.remove()
    costs = layer_costs(proven.graph, proven.plan)
    assert sum(c.macs for c in costs if c.layer in called) == sum(counted)
    assert cost(proven.graph, proven.plan).macs == sum(c.macs for c in costs)


def test_one_backward_reaches_every_projection_that_is_trained(proven: Proven) -> None:
    proxies = projection_parameters(proven.student)
    trained = [space.name for space in proven.graph.free if space.freedom != "selection"]
    assert len(proxies) == len(trained)
    if not proxies:
        return
    generator = torch.Generator().manual_seed(0)
    proven.student.train()
    try:
        outputs = tensors_of(proven.run(proven.student))
        loss = sum((torch.randn(x.shape, generator=generator) * x).sum() for x in outputs)
        gradients = torch.autograd.grad(loss, proxies)
    finally:
        proven.student.eval()
    norms = dict(zip(trained, (float(g.norm()) for g in gradients), strict=True))
    still = [name for name, norm in norms.items() if not isfinite(norm) or norm == 0]
    assert not still


@torch.no_grad()
def test_state_of_the_small_model_makes_the_same_of_another(proven: Proven) -> None:
    other = materialize(proven.prepared(seed=1))
    other.load_state_dict(proven.small.state_dict())
    assert relative_difference(proven.run(other), proven.small_output) == 0.0
