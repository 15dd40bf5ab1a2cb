"""Saved models come back exactly, from the file alone or with a fresh model, or not at all."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from small_nets import NETS, Residual, built, fingerprint, images
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, fx, nn
from torchvision.models.densenet import DenseNet

import torchcap
from torchcap import FileError, Plan
from torchcap.checkpoint.load import describe, load
from torchcap.checkpoint.save import save
from torchcap.checkpoint.structure import structure_of, tensors_of
from torchcap.digest import digest


def small_of(net: str) -> nn.Module:
    return torchcap.compress(built(NETS[net]), ratio=0.5, example_inputs=images())


@torch.no_grad()
def assert_same(loaded: nn.Module, saved: nn.Module, *inputs: Tensor) -> None:
    """Compare every class, attribute and tensor (strides too), and the outputs, bit for bit."""
    assert structure_of(loaded) == structure_of(saved)
    before, after = tensors_of(saved), tensors_of(loaded)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.stride() == before[name].stride(), name
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert not any(module.training for module in loaded.modules())
    torch.testing.assert_close(loaded(*inputs), saved.eval()(*inputs), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# Models of timm and torchvision, from the path alone


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    size: tuple[int, int, int]
    name: str


LIBRARY = {
    "torchvision resnet": Case(torchvision.models.resnet18, (3, 64, 64), "torchvision:resnet18"),
    "torchvision mobilenet": Case(
        torchvision.models.mobilenet_v3_small, (3, 64, 64), "torchvision:mobilenet_v3_small"
    ),
    "torchvision squeezenet, more classes": Case(
        lambda: torchvision.models.squeezenet1_1(num_classes=1100),
        (3, 64, 64),
        "torchvision:squeezenet1_1",
    ),
    "torchvision googlenet": Case(
        lambda: torchvision.models.googlenet(aux_logits=False, init_weights=False),
        (3, 64, 64),
        "torchvision:googlenet",
    ),
    "timm resnet, other images": Case(
        lambda: timm.create_model("test_resnet", in_chans=5, num_classes=1200, global_pool="max"),
        (5, 64, 64),
        "timm:test_resnet",
    ),
    "timm norms with activations": Case(
        lambda: timm.create_model("test_efficientnet"), (3, 64, 64), "timm:test_efficientnet"
    ),
    "timm regnet": Case(lambda: timm.create_model("regnetx_002"), (3, 64, 64), "timm:regnetx_002"),
    "timm standardised convolutions": Case(
        lambda: timm.create_model("test_nfnet"), (3, 64, 64), "timm:test_nfnet"
    ),
    "timm vision transformer, other size": Case(
        lambda: timm.create_model("test_vit", img_size=80), (3, 80, 80), "timm:test_vit"
    ),
}


def library_model(case: Case) -> tuple[nn.Module, Tensor]:
    """Return a model with numbers of its own in every norm, and an image."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.build().eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model, torch.randn(1, *case.size, generator=generator)


@pytest.mark.parametrize("case", LIBRARY)
def test_library_model_comes_back_from_the_path_alone(tmp_path: Path, case: str) -> None:
    model, image = library_model(LIBRARY[case])
    small = torchcap.compress(model, ratio=0.5, example_inputs=image)
    path = tmp_path / "small.safetensors"
    save(small, path)
    assert describe(path).builder.name == LIBRARY[case].name
    loaded = load(path)
    assert type(loaded) is type(model)
    assert_same(loaded, small, image)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (loaded, model)]
    assert sizes[0] < sizes[1]


def test_sizes_that_the_forward_reads_are_restored(tmp_path: Path) -> None:
    model, image = library_model(LIBRARY["timm vision transformer, other size"])
    small = torchcap.compress(model, ratio=0.5, example_inputs=image)
    save(small, tmp_path / "vit")
    loaded = load(tmp_path / "vit")
    assert loaded.blocks[0].attn.head_dim == model.blocks[0].attn.head_dim // 2
    assert loaded.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads


class Anchored(nn.Module):
    """Keeps what it has computed for the last size, in attributes that were empty before."""

    anchors = torch.empty(0)
    size: torch.Size | None = None

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.grid = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3), None

    def forward(self, x: Tensor) -> Tensor:
        if self.size != x.shape:
            self.size, self.anchors = x.shape, torch.arange(float(x.shape[-1]))
            self.grid = 2 * self.anchors
        return self.b(self.a(x).relu()) + self.grid.mean() + self.anchors.sum()


def test_what_a_forward_has_kept_in_empty_attributes_comes_back(tmp_path: Path) -> None:
    small = torchcap.compress(Anchored(), ratio=0.5, example_inputs=torch.zeros(1, 3, 8, 8))
    small.eval()
    for width in (8, 10):
        x = torch.randn(1, 3, 8, width)
        expected = small(x)
        save(small, tmp_path / "kept")
        loaded = load(tmp_path / "kept", Anchored())
        assert torch.equal(loaded.anchors, small.anchors)
        assert loaded.size == x.shape
        assert torch.equal(loaded(x), expected)


def test_scores_keep_their_scale_where_timm_chooses_another_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = library_model(LIBRARY["timm vision transformer, other size"])
    small = torchcap.compress(model, ratio=0.5, example_inputs=image)
    save(small, tmp_path / "vit")
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", 0)
    assert not timm.create_model("test_vit").blocks[0].attn.fused_attn
    assert_same(load(tmp_path / "vit"), small, image)


def test_images_and_labels_of_timm_are_restored(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)})
    save(model, tmp_path / "model")
    assert describe(tmp_path / "model").images["mean"] == [0.1, 0.2, 0.3]
    data = timm.data.resolve_data_config(model=load(tmp_path / "model"))
    assert data["mean"] == (0.1, 0.2, 0.3)
    assert "url" not in describe(tmp_path / "model").images


def test_another_process_needs_nothing_but_the_path(tmp_path: Path) -> None:
    model, image = library_model(LIBRARY["timm norms with activations"])
    small = torchcap.compress(model, ratio=0.5, example_inputs=image)
    path, answer = tmp_path / "small.safetensors", tmp_path / "answer"
    save(small, path)
    safetensors.torch.save_file({"image": image}, tmp_path / "image")
    script = f"""
import torch
from safetensors.torch import load_file, save_file
from torchcap.checkpoint.load import load
torch.set_num_threads(1)
with torch.no_grad():
    output = load({str(path)!r})(load_file({str(tmp_path / "image")!r})["image"])
save_file({{"output": output}}, {str(answer)!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    with torch.no_grad():
        expected = small(image)
    torch.testing.assert_close(
        safetensors.torch.load_file(answer)["output"], expected, rtol=0, atol=0
    )


def test_tensors_in_lists_are_those_of_the_builder(tmp_path: Path) -> None:
    model = torchvision.models.optical_flow.raft_small()  # keeps a list of tensors
    save(model, tmp_path / "model")
    state = torch.random.get_rng_state()
    loaded = load(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [tensor.device.type for tensor in loaded.corr_block.corr_pyramid] == ["cpu"]
    assert structure_of(loaded) == structure_of(model)


def test_name_that_is_given_is_tried_at_once(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    save(model, tmp_path / "model", name="timm:test_resnet.r160_in1k")
    assert_same(load(tmp_path / "model"), model.eval(), torch.zeros(1, 3, 32, 32))
    for name, reason in {
        "timm:test_efficientnet": "the model is a timm.models.efficientnet.EfficientNet",
        "timm:nothing_like_it": "timm .* has no model 'nothing_like_it'",
        "test_resnet": "unexpected builder 'test_resnet'",
        "timm:../test_resnet": r"unexpected builder 'timm:\.\./test_resnet'",
        "hf-hub:timm/resnet18": "unexpected builder",
    }.items():
        with pytest.raises(FileError, match=f"(?s)does not build the original.*{reason}.*Leave"):
            save(model, tmp_path / "other", name=name)
    assert not (tmp_path / "other").exists()


def test_model_that_no_builder_makes_asks_for_a_fresh_one(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    model.maxpool = nn.MaxPool2d(2)
    save(model, tmp_path / "model")
    assert describe(tmp_path / "model").builder is None
    with pytest.raises(FileError, match=r"does not say how a 'ResNet' is built; .*load\(path, mod"):
        load(tmp_path / "model")
    fresh = timm.create_model("test_resnet")
    fresh.maxpool = nn.MaxPool2d(2)
    assert_same(load(tmp_path / "model", fresh), model, torch.zeros(1, 3, 32, 32))


# --------------------------------------------------------------------------------------------------
# Models of one's own class


@pytest.mark.parametrize("net", NETS)
def test_model_of_ones_own_comes_back_into_a_fresh_one(tmp_path: Path, net: str) -> None:
    small = small_of(net)
    save(small, tmp_path / "small", notes={"accuracy": 0.9}, plan=Plan({}, "net"))
    assert describe(tmp_path / "small").notes == {"accuracy": 0.9}
    assert describe(tmp_path / "small").plan == Plan({}, "net")
    fresh = NETS[net]().train()
    before = fingerprint(fresh)
    assert_same(load(tmp_path / "small", fresh), small, images())
    assert fingerprint(fresh) == before


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,)
    )


def standardised() -> nn.Module:
    return ResNetV2(layers=(1, 1), channels=(128, 256), stem_chs=32)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "swin": swin,
    "resnetv2": standardised,
    "densenet": lambda: DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_network_of_unusual_sizes_comes_back_into_a_fresh_one(tmp_path: Path, family: str) -> None:
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small = torchcap.compress(FAMILIES[family]().eval(), ratio=0.5, example_inputs=image)
    save(small, tmp_path / "small")
    assert describe(tmp_path / "small").builder is None
    assert_same(load(tmp_path / "small", FAMILIES[family]()), small, image)


@pytest.mark.parametrize("net", ["residual", "pre-activation", "dense"])
def test_graph_module_comes_back_with_its_folded_nodes_erased(tmp_path: Path, net: str) -> None:
    traced = fx.symbolic_trace(built(NETS[net]))
    small = torchcap.compress(traced, ratio=0.5, example_inputs=images())
    save(small, tmp_path / "small")
    fresh = fx.symbolic_trace(NETS[net]())
    code = fresh.code
    loaded = load(tmp_path / "small", fresh)
    assert_same(loaded, small, images())
    assert loaded.code == small.code
    assert fresh.code == code
    with pytest.raises(FileError, match="holds another model"):
        load(tmp_path / "small", fx.symbolic_trace(NETS["plain"]()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_that_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    small = small_of("residual").to(dtype)
    save(small, tmp_path / "small")
    assert_same(load(tmp_path / "small", Residual().double()), small, images(dtype=dtype))


def test_fresh_model_may_be_on_the_meta_device(tmp_path: Path) -> None:
    small = small_of("residual")
    save(small, tmp_path / "small")
    with torch.device("meta"):
        fresh = Residual()
    assert_same(load(tmp_path / "small", fresh), small, images())
    assert all(tensor.is_meta for tensor in fresh.state_dict().values())


@pytest.mark.parametrize(
    "options",
    [
        {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]},
        {"rpn_post_nms_top_n_test": 5},
        {"bbox_reg_weights": (1.0, 1.0, 1.0, 1.0)},
    ],
)
def test_detector_of_other_options_asks_for_a_fresh_one(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = build(weights=None, weights_backbone=None, **options).eval()
    path = tmp_path / "detector.safetensors"
    save(model, path)
    with pytest.raises(FileError, match="does not say how"):
        load(path)
    with pytest.raises(FileError, match="holds another model"):
        load(path, build(weights=None, weights_backbone=None))
    assert type(load(path, model)) is type(model)


def test_file_of_the_same_model_is_the_same(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for file in files:
        save(small_of(next(iter(NETS))), file, notes={"accuracy": 0.5})
    assert len({file.read_bytes() for file in files}) == 1


def test_memory_format_is_kept(tmp_path: Path) -> None:
    small = small_of("residual").to(memory_format=torch.channels_last)
    save(small, tmp_path / "small")
    x = images().to(memory_format=torch.channels_last)
    loaded = load(tmp_path / "small", Residual())
    assert not loaded.block1.conv2.weight.is_contiguous()
    assert_same(loaded, small, x)


def test_parameters_train_where_those_of_the_fresh_model_do(tmp_path: Path) -> None:
    save(small_of("residual"), tmp_path / "small")
    fresh = Residual()
    fresh.block1.requires_grad_(requires_grad=False)
    loaded = load(tmp_path / "small", fresh)
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == [
        name for name, _ in loaded.named_parameters() if name.startswith("block1.")
    ]


class Odd(nn.Module):
    """Tied weights, a buffer that the state leaves out, a tensor that is a mere attribute."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 6, bias=False)
        self.decode = nn.Linear(6, 6, bias=False)
        self.decode.weight = self.encode.weight
        self.register_buffer("shift", torch.full((6,), offset), persistent=False)
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.scale = torch.tensor(1.0 + offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.relu(self.encode(x) + self.shift)) * self.scale


def test_tied_and_unregistered_tensors_come_back(tmp_path: Path) -> None:
    model = Odd(offset=0.5)
    save(model, tmp_path / "odd")
    loaded = load(tmp_path / "odd", Odd())
    assert loaded.decode.weight is loaded.encode.weight
    assert_same(loaded, model, torch.randn(2, 6))
    with safe_open(tmp_path / "odd", "pt") as file:
        assert set(file.keys()) == {"encode.weight", "shift", "nothing", "scale"}


def test_weights_that_are_views_of_one_memory_are_stored_apart(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    memory = torch.randn(2, 4, 4)
    for layer, part in zip(model, memory, strict=True):
        layer.weight.data = part.t()
    save(model, tmp_path / "views")
    loaded = load(tmp_path / "views", nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in "ab")))
    assert_same(loaded, model, torch.randn(2, 4))


@pytest.mark.parametrize("seed", range(3))
def test_original_that_was_never_compressed_comes_back_too(tmp_path: Path, seed: int) -> None:
    model = built(Residual, seed=seed)
    save(model, tmp_path / "model")
    assert_same(load(tmp_path / "model", Residual()), model, images())


# --------------------------------------------------------------------------------------------------
# Models that don't fit


class Strided(Residual):
    """The same, but for the steps of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.stride = (2, 2)


def changed(change: Callable[[Any], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Residual()
        change(model)
        return model

    return make


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "class": (NETS["plain"], r"the model is a small_nets\.Plain, in the file a small_nets\.Resi"),
    "subclass": (Strided, r"the model is a .*Strided, in the file"),
    "stride": (
        changed(lambda m: setattr(m.conv, "stride", (2, 2))),
        r"'conv\.stride' is \(2, 2\) in the model, \(1, 1\) in the file",
    ),
    "narrower": (
        lambda: Residual(width=2),
        r"'block1\.conv1\.out_channels' is 2 in the model, 3 in the file",
    ),
    "layer more": (
        changed(lambda m: m.add_module("more", nn.Linear(2, 2))),
        r"'more' is in the model alone",
    ),
    "layer less": (
        changed(lambda m: delattr(m, "fc")),
        r"'fc' is in the file alone",
    ),
    "another layer": (
        changed(lambda m: setattr(m, "fc", nn.Bilinear(8, 8, 5))),
        r"'fc' is a torch.nn.*Bilinear in the model, a torch.*Linear in the file",
    ),
    "tensor more": (
        changed(lambda m: m.fc.register_buffer("more", torch.zeros(2))),
        r"tensor 'fc\.more' is in the model alone",
    ),
    "attribute": (
        changed(lambda m: setattr(m, "slope", 0.5)),
        r"'slope' is 0\.5 in the model, None in the file",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_model_that_does_not_fit_is_refused_by_what_differs(tmp_path: Path, case: str) -> None:
    make, reason = UNFIT[case]
    save(small_of("residual"), tmp_path / "small")
    fresh = make()
    before = fingerprint(fresh)
    with pytest.raises(
        FileError, match=rf"(?s)holds another model.*{reason}.*written with torchca"
    ):
        load(tmp_path / "small", fresh)
    assert fingerprint(fresh) == before


def test_norm_without_weights_gets_none(tmp_path: Path) -> None:
    save(nn.Sequential(nn.BatchNorm2d(3)), tmp_path / "norm")
    with pytest.raises(FileError, match=r"'0\.affine' is False in the model, True in the file"):
        load(tmp_path / "norm", nn.Sequential(nn.BatchNorm2d(3, affine=False)))


def test_what_is_no_module_is_refused(tmp_path: Path) -> None:
    save(small_of("residual"), tmp_path / "small")
    with pytest.raises(FileError, match=r"takes a freshly built torch\.nn\.Module; got a str"):
        load(tmp_path / "small", "timm:resnet18")
    with pytest.raises(FileError, match=r"takes a torch\.nn\.Module; got a dict"):
        save({"weight": torch.zeros(1)}, tmp_path / "other")


class Stateful(Odd):
    def get_extra_state(self) -> Any:
        return object()


def quantized(model: Any) -> None:
    model.shift = torch.quantize_per_tensor(torch.zeros(6), 0.1, 0, torch.qint8)


UNSAVABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (lambda: Odd().to("meta"), "has no values yet"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "'0.weight' has no values yet"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))),
        "'0' is parametrized; call .*remove_parametrizations",
    ),
    "extra state": (Stateful, "'' has an extra state"),
    "sparse": (
        lambda: changed_odd(lambda m: setattr(m, "shift", torch.zeros(6).to_sparse())),
        "'shift' is sparse or quantized",
    ),
    "quantized": (lambda: changed_odd(quantized), "'shift' is sparse or quantized"),
}


def changed_odd(change: Callable[[Any], object]) -> nn.Module:
    model = Odd()
    change(model)
    return model


@pytest.mark.filterwarnings("ignore:.*quantize", "ignore:Lazy modules")
@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_could_not_be_restored_is_not_saved(tmp_path: Path, case: str) -> None:
    make, reason = UNSAVABLE[case]
    with pytest.raises(FileError, match=f"cannot be saved: .*{reason}"):
        save(make(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("notes", [{"x": torch.zeros(1)}, {"x": float("nan")}, [1, 2]])
def test_notes_that_json_cannot_hold_are_refused(tmp_path: Path, notes: Any) -> None:
    with pytest.raises(FileError, match="notes must be a mapping"):
        save(Odd(), tmp_path / "model", notes=notes)


# --------------------------------------------------------------------------------------------------
# Students, in the middle of their training


def train(student: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    losses = []
    student.train()
    for seed in seeds:
        student(images(seed=seed))
        loss = torchcap.reconstruction_loss(student)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(student: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(torchcap.projection_parameters(student), 1e-2)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("net", ["residual", "dense", "separable", "pre-activation"])
def test_student_goes_on_as_the_saved_one_would(tmp_path: Path, net: str, streams: bool) -> None:  # noqa: FBT001
    teacher = built(NETS[net])
    student = torchcap.prepare(
        teacher, data=[images()], example_inputs=images(), streams=streams, ratio=0.7
    )
    proxies = torchcap.projection_parameters(student)
    optimizer = adam(student) if proxies else None
    if optimizer:
        train(student, optimizer, range(3))
    save(student, tmp_path / "student")
    loaded = load(tmp_path / "student", teacher, example_inputs=images())
    assert describe(tmp_path / "student").plan.ranks
    assert_same(loaded, student, images())
    small, again = torchcap.materialize(student.eval()), torchcap.materialize(loaded)
    assert_same(again, small, images())
    if optimizer:
        further = adam(loaded)
        further.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert train(loaded, further, range(3, 6)) == train(student, optimizer, range(3, 6))
        assert_same(loaded.eval(), student.eval(), images())


def test_student_in_half_precision_comes_back(tmp_path: Path) -> None:
    teacher = built(Residual)
    student = torchcap.prepare(teacher, example_inputs=images()).bfloat16().train()
    student(images(dtype=torch.bfloat16))  # the teacher follows
    save(student, tmp_path / "student")
    loaded = load(tmp_path / "student", teacher, example_inputs=images())
    assert_same(loaded, student, images(dtype=torch.bfloat16))
    assert teacher.fc.weight.dtype == torch.float64


def test_student_needs_its_own_teacher(tmp_path: Path) -> None:
    teacher = built(Residual)
    student = torchcap.prepare(teacher, example_inputs=images())
    path = tmp_path / "student"
    save(student, path)
    with pytest.raises(
        FileError, match=r"holds a student, which needs its teacher: load\(path, mo"
    ):
        load(path)
    with pytest.raises(FileError, match="the student of another teacher: the weights"):
        load(path, built(Residual, seed=1))
    with pytest.raises(FileError, match=r"read in another way; give the leaves= and rules="):
        load(path, teacher, example_inputs=images(), leaves=[type(teacher.block1)])
    with pytest.raises(FileError, match=r"leave name= and plan= out"):
        save(student, path, name="timm:resnet18")
    with torch.no_grad():
        teacher.fc.bias[0] += 1
    with pytest.raises(FileError, match="another teacher"):
        load(path, teacher, example_inputs=images())


# --------------------------------------------------------------------------------------------------
# Files that are damaged, foreign or made to do harm


@cache
def bytes_of_a_file(folder: Path) -> bytes:
    save(Odd(offset=0.5), folder / "odd.safetensors")
    return (folder / "odd.safetensors").read_bytes()


@pytest.fixture
def saved(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(bytes_of_a_file(tmp_path_factory.getbasetemp()))
    return path


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), header=st.booleans())
def test_changed_byte_is_noticed_or_changes_nothing(
    saved: Path,
    where: float,
    mask: int,
    header: bool,  # noqa: FBT001
) -> None:
    whole = saved.read_bytes()
    damaged = bytearray(whole)
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    damaged[int(where * (length if header else len(whole)))] ^= mask
    path = saved.with_name("damaged")
    path.write_bytes(damaged)
    try:
        loaded = load(path, Odd())
    except FileError:
        return
    assert_same(loaded, load(saved, Odd()), torch.ones(2, 6))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(left=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_refused(saved: Path, left: float) -> None:
    path = saved.with_name("truncated")
    whole = saved.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(FileError, match=r"'.*truncated' cannot be read as a safetensors file"):
        load(path, Odd())


def test_changed_weight_is_named_damage(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    whole[-1] ^= 1
    saved.write_bytes(whole)
    with pytest.raises(FileError, match=r"is damaged.*SHA-256 differs"):
        load(saved, Odd())


class Intruder:
    """What, unpickled, leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_file_does_not_run(tmp_path: Path, write: Callable[..., Any]) -> None:
    path, trace = tmp_path / "model.safetensors", tmp_path / "trace"
    write({"format": "torchcap-model", "weights": Intruder(trace)}, path)
    with pytest.raises(FileError, match="cannot be read as a safetensors file"):
        load(path, Odd())
    assert not trace.exists()
    pickle.loads(pickle.dumps(Intruder(trace)))  # it does work where it is let in
    assert trace.exists()


def test_missing_foreign_and_newer_files_are_told_apart(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(FileError, match=r"there is no file '.*nowhere'"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileError, match="there is no file"):
        load(tmp_path)
    foreign = tmp_path / "foreign"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"weight": torch.zeros(2)}, foreign, metadata)
        with pytest.raises(FileError, match=r"no model saved by torchcap\.save"):
            load(foreign)
    rewrite(saved, lambda metadata: metadata.update(version="2", torchcap="9.1"))
    with pytest.raises(FileError, match=r"version '2', written by torchcap 9\.1; .* version 1"):
        load(saved, Odd())


def rewrite(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Change the metadata of a file as somebody would who knows how it is signed."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    del metadata["sha256"]
    change(metadata)
    metadata["sha256"] = digest(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


def at(*keys: str, value: Any) -> Callable[[Any], None]:
    """Return what sets one entry of a description."""

    def change(contents: Any) -> None:
        for key in keys[:-1]:
            contents = contents[int(key) if isinstance(contents, list) else key]
        contents[int(keys[-1]) if isinstance(contents, list) else keys[-1]] = value

    return change


FORGED: dict[str, tuple[Callable[[Any], None], str]] = {
    "larger": (at("structure", "encode", "1", "in_features", value=9), "'encode.in_features' is 6"),
    "negative": (at("structure", "encode", "1", "in_features", value=-6), "in_features' is 6"),
    "huge": (at("structure", "encode", "1", "in_features", value=10**12), "attribute in_feat"),
    "smaller": (
        at("structure", "encode", "1", "in_features", value=5),
        r"tensor 'encode\.weight' has shape \(6, 5\) in the model, \(6, 6\) in the file",
    ),
    "no attribute": (at("structure", "encode", "1", "in_features", value=None), "attribute in_f"),
    "class": (at("structure", "encode", "0", value="os.system"), "a os.system in the file"),
    "orphan": (at("structure", "a.b", value=["A", {}]), "'a.b' is in the file alone"),
    "module": (at("structure", "more", value=["os.system", {}]), "'more' is in the file alone"),
    "no root": (at("structure", value={}), "structure without a root"),
    "no structure": (at("structure", value=None), "'structure'"),
    "no mapping": (at("structure", value=[1]), "in place of a mapping"),
    "unknown entry": (at("code", value="import os"), "unexpected keyword argument 'code'"),
    "alias of nothing": (at("aliases", value={"decode.weight": "x"}), "'decode.weight' is in"),
    "alias of an alias": (
        at("aliases", value={"decode.weight": "decode.weight"}),
        "'decode.weight' is in the model alone",
    ),
    "alias of another shape": (
        at("aliases", "decode.weight", value="shift"),
        r"\(6,\) in the file",
    ),
    "no word": (at("aliases", "decode.weight", value=3), "'decode.weight'"),
    "strides of too much": (at("strides", value={"shift": [10**9]}), "cannot have strides"),
    "strides that overlap": (at("strides", value={"encode.weight": [5, 1]}), "cannot have strid"),
    "negative strides": (at("strides", value={"shift": [-1]}), "cannot have strides"),
    "strides of nothing": (at("strides", value={"shift": "abc"}), "strides of 'shift'"),
    "plan": (at("plan", value={"format": "x"}), "not a plan"),
    "student": (
        at("teacher", value={"digest": "a", "dtype": "b", "reading": "c"}),
        "student without a plan",
    ),
    "teacher": (at("teacher", value=[]), "argument after"),
    "images": (at("images", value=3), "in place of a mapping"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_description_is_refused(saved: Path, case: str) -> None:
    change, reason = FORGED[case]

    def forge(metadata: dict[str, str]) -> None:
        contents = json.loads(metadata["contents"])
        change(contents)
        metadata["contents"] = json.dumps(contents)

    rewrite(saved, forge)
    with pytest.raises(FileError, match=f"(?s)'.*odd.safetensors' .*{reason}"):
        load(saved, Odd())


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "1" * 5000, '"x"'])
def test_description_of_another_form_is_refused(saved: Path, text: str) -> None:
    rewrite(saved, lambda metadata: metadata.update(contents=text))
    with pytest.raises(FileError, match="no description that torchcap knows"):
        load(saved, Odd())


BUILDERS: dict[str, tuple[Any, str]] = {
    "unknown": ({"name": "timm:no_such", "arguments": {}}, "has no model 'no_such'"),
    "not public": ({"name": "torchvision:list_models", "arguments": {}}, "has no model"),
    "library": ({"name": "os:system", "arguments": {}}, "unexpected builder 'os:system'"),
    "path": ({"name": "timm:../x/y", "arguments": {}}, "unexpected builder"),
    "dots": ({"name": "timm:..", "arguments": {}}, r"has no model '\.\.'"),
    "download": ({"name": "timm:hf-hub:x/y", "arguments": {}}, "unexpected builder"),
    "argument": (
        {"name": "timm:test_resnet", "arguments": {"checkpoint_path": "/etc/passwd"}},
        "unexpected builder's argument checkpoint_path",
    ),
    "weights": (
        {"name": "torchvision:resnet18", "arguments": {"weights": "DEFAULT"}},
        "unexpected builder's argument weights",
    ),
    "value": (
        {"name": "timm:test_resnet", "arguments": {"num_classes": {}}},
        "unexpected builder's argument num_classes",
    ),
    "huge": ({"name": "timm:test_resnet", "arguments": {"num_classes": 2**40}}, "num_classes"),
    "large": ({"name": "timm:test_resnet", "arguments": {"num_classes": 2**20}}, "another model"),
    "not taken": ({"name": "timm:test_resnet", "arguments": {"img_size": 8}}, "cannot be built"),
    "another": ({"name": "timm:test_resnet", "arguments": {}}, "the model is a timm"),
    "no name": ({"arguments": {}}, "'name'"),
    "list": ([1], "argument after"),
}


@pytest.mark.parametrize("case", BUILDERS)
def test_builder_that_is_none_is_refused(saved: Path, case: str) -> None:
    builder, reason = BUILDERS[case]

    def forge(metadata: dict[str, str]) -> None:
        metadata["contents"] = json.dumps({**json.loads(metadata["contents"]), "builder": builder})

    rewrite(saved, forge)
    with pytest.raises(FileError, match=f"(?s){reason}"):
        load(saved)


# --------------------------------------------------------------------------------------------------
# Writing


def test_file_is_replaced_at_once(saved: Path) -> None:
    before = saved.stat().st_ino
    save(Odd(offset=2.0), saved)
    assert saved.stat().st_ino != before  # a reader that had it open still sees the whole old one
    assert load(saved, Odd()).scale == 3.0
    assert list(saved.parent.iterdir()) == [saved]


def test_full_disk_leaves_the_file_before(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(_: Path, __: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FileError, match=r"No space left.*the file before it is kept"):
        save(Odd(offset=2.0), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"there is no folder '.*missing'"):
        save(Odd(), tmp_path / "missing" / "model")


def test_saving_changes_nothing_of_the_model(tmp_path: Path) -> None:
    small = small_of("residual").train()
    before = fingerprint(small)
    save(small, tmp_path / "small")
    assert fingerprint(small) == before


# --------------------------------------------------------------------------------------------------
# Trained weights


DATA = Path(os.environ.get("TORCHCAP_DATA", "/nowhere"))
WEIGHTS = DATA / "weights" / "resnet20_cifar10.safetensors"


@pytest.mark.skipif(not WEIGHTS.exists(), reason="TORCHCAP_DATA has no weights")
def test_trained_network_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    from cifar_models import CifarResNet, load_cifar_resnet  # noqa: PLC0415 - needs more packages

    x = torch.randn(4, 3, 32, 32)
    small = torchcap.compress(load_cifar_resnet(20, WEIGHTS).eval(), example_inputs=x)
    save(small, tmp_path / "small")
    assert_same(load(tmp_path / "small", CifarResNet(20)), small, x)
