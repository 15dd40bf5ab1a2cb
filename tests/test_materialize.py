"""``materialize()``: plain, smaller layers that compute what the student computes."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from proofs import relative_difference
from small_nets import (
    CLASSES,
    EVERY_NET,
    EXACT,
    NETS,
    Block,
    built,
    fingerprint,
    images,
    labels,
    reachable,
    values,
)
from timm.layers import Conv2dSame
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import torchcap
from torchcap import RandomOrthonormal


def made(net: str = "residual") -> nn.Module:
    return built(NETS[net])


def student_of(model: nn.Module, **kwargs: Any) -> Any:
    kwargs.setdefault("example_inputs", images())
    kwargs.setdefault("init", RandomOrthonormal(torch.Generator().manual_seed(0)))
    return torchcap.prepare(model, **kwargs)


def train_(student: nn.Module, steps: int = 3) -> nn.Module:
    """Train a student for a few steps, as a user would, and return it in evaluation mode."""
    optimizer = torch.optim.SGD(student.parameters(), 0.05)
    student.train()
    for _ in range(steps):
        loss = torchcap.mixture_loss(student, student(images()), labels())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval()


def output(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """What a model computes in evaluation mode; its own mode is kept."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        result = model.eval()(images() if x is None else x)
    for module, training in modes:
        module.training = training
    return result


# --------------------------------------------------------------------------------------------------
# The same function


@EVERY_NET
@pytest.mark.parametrize("ratio", [0.3, 0.75, 1.0])
def test_materialized_equals_student(net: str, ratio: float) -> None:
    student = student_of(made(net), ratio=ratio)
    small = torchcap.materialize(student)
    torch.testing.assert_close(output(small), output(student), **EXACT)


@pytest.mark.parametrize("net", ["residual", "plain", "separable", "pre-activation"])
def test_materialized_equals_the_trained_student(net: str) -> None:
    student = student_of(made(net))
    before = output(student)
    train_(student)
    small = torchcap.materialize(student)
    assert (output(student) - before).norm() > 1e-3
    torch.testing.assert_close(output(small), output(student), **EXACT)


def test_materialized_is_smaller_and_dense() -> None:
    small = torchcap.materialize(student_of(made("plain"), ratio=0.5))
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert shapes == {
        "features.0.weight": (3, 3, 3, 3),
        "features.0.bias": (3,),
        "features.3.weight": (4, 3, 3, 3),
        "features.3.bias": (4,),
        "classifier.0.weight": (5, 4 * 4),
        "classifier.0.bias": (5,),
        "classifier.2.weight": (5, 5),
        "classifier.2.bias": (5,),
    }


def test_materialized_layer_says_its_size() -> None:
    small = torchcap.materialize(student_of(made("separable"), ratio=0.5))
    assert str(small.depthwise) == (
        "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=4)"
    )
    assert str(small.fc) == "Linear(in_features=3, out_features=5, bias=True)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_student(dtype: torch.dtype) -> None:
    student = student_of(made("plain")).to(dtype)
    small, x = torchcap.materialize(student), images(dtype=dtype)
    assert {p.dtype for p in small.parameters()} == {dtype}
    torch.testing.assert_close(output(small, x), output(student, x))


@pytest.mark.parametrize("net", ["residual", "plain", "separable"])
def test_channels_last_weights_stay_so(net: str) -> None:
    student = student_of(made(net)).to(memory_format=torch.channels_last)
    small = torchcap.materialize(student)
    for name, weight in small.named_parameters():
        if weight.dim() == 4:
            assert weight.is_contiguous(memory_format=torch.channels_last), name
    x = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(output(small, x), output(student, x), **EXACT)


@EVERY_NET
def test_materializing_twice_gives_the_same_numbers_in_other_memory(net: str) -> None:
    student = student_of(made(net))
    first, second = torchcap.materialize(student), torchcap.materialize(student)
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)
        assert value.data_ptr() != theirs[name].data_ptr(), name


# --------------------------------------------------------------------------------------------------
# The student


@EVERY_NET
def test_student_is_unchanged(net: str) -> None:
    student = student_of(made(net)).train()
    student(images())
    before, numbers = fingerprint(student), values(student)
    small = torchcap.materialize(student)
    with torch.no_grad():
        for tensor in [*small.parameters(), *small.buffers()]:
            tensor.zero_()

    assert fingerprint(student) == before
    for name, value in values(student).items():
        torch.testing.assert_close(value, numbers[name], rtol=0, atol=0)


def test_student_trains_on_as_if_nothing_had_been() -> None:
    left, right = student_of(made()), student_of(made())
    train_(left, 2)
    train_(right, 2)
    torchcap.materialize(left)
    train_(left, 2)
    train_(right, 2)
    torch.testing.assert_close(output(left), output(right), rtol=0, atol=0)


@EVERY_NET
def test_training_a_copy_leaves_the_student_alone(net: str) -> None:
    student = student_of(made(net))
    expected = output(student)
    twin = copy.deepcopy(student)
    torch.testing.assert_close(output(twin), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)

    assert (output(twin) - expected).norm() > 1e-6
    torch.testing.assert_close(output(student), expected, rtol=0, atol=0)


def test_materializing_a_copy_leaves_the_student_parametrized() -> None:
    student = student_of(made())
    expected = output(student)
    torchcap.materialize(copy.deepcopy(student))
    assert parametrize.is_parametrized(student.block1.conv1, "weight")
    torch.testing.assert_close(output(student), expected, rtol=0, atol=0)
    torch.testing.assert_close(output(torchcap.materialize(student)), expected, **EXACT)


def saved(model: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@EVERY_NET
def test_state_dict_of_a_student_makes_the_same_student_again(net: str) -> None:
    model = made(net)
    student = student_of(model)
    with torch.no_grad():
        for parameter in torchcap.projection_parameters(student):
            parameter.add_(0.1)
    other = student_of(model, init=RandomOrthonormal(torch.Generator().manual_seed(1)))
    assert (output(other) - output(student)).norm() > 1e-6
    other.load_state_dict(saved(student))
    torch.testing.assert_close(output(other), output(student), rtol=0, atol=0)


@EVERY_NET
def test_state_dict_of_a_small_model_makes_the_same_model_again(net: str) -> None:
    model = made(net)
    small = torchcap.materialize(student_of(model))
    other = torchcap.materialize(
        student_of(model, init=RandomOrthonormal(torch.Generator().manual_seed(1)))
    )
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(saved(small))
    torch.testing.assert_close(output(other), output(small), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# What the small model is


@EVERY_NET
def test_classes_are_those_of_the_model(net: str) -> None:
    model = made(net)
    small = torchcap.materialize(student_of(model))
    ours = dict(small.named_modules())
    assert ours.keys() == dict(model.named_modules()).keys()
    for path, module in model.named_modules():
        kinds = {type(module), nn.Identity} if "bn" in path or "." in path else {type(module)}
        assert type(ours[path]) in kinds, path


class Same(nn.Module):
    """Layers of timm, and tensors of all kinds beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Conv2dSame(3, 6, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = Conv2dSame(6, CLASSES, 3, stride=2, bias=False)
        self.register_buffer("mean", torch.arange(3.0).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.full((), 2.0), persistent=False)
        self.register_buffer("steps", torch.tensor(7))
        self.names = ["a", "b", "c", "d", "e"]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.scale)))
        return self.conv2(x).mean((2, 3))


def test_subclasses_of_layers_stay_themselves() -> None:
    student = student_of(built(Same))
    small = torchcap.materialize(student)
    assert type(small.conv1) is type(small.conv2) is Conv2dSame
    torch.testing.assert_close(output(small), output(student), **EXACT)


def test_buffers_and_attributes_are_kept() -> None:
    model = built(Same)
    model.steps.fill_(12)
    small = torchcap.materialize(student_of(model))
    assert dict(small.named_buffers()).keys() == {"mean", "scale", "steps"}
    for name, buffer in small.named_buffers():
        torch.testing.assert_close(buffer, getattr(model, name), rtol=0, atol=0)
        assert buffer.data_ptr() != getattr(model, name).data_ptr()
    assert "scale" not in small.state_dict()
    assert small.names == model.names
    assert small.names is not model.names


@EVERY_NET
def test_parameters_are_trainable_where_they_were(net: str) -> None:
    model = made(net)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(requires_grad=number % 3 != 0)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    small = torchcap.materialize(student_of(model))
    flags = {name: p.requires_grad for name, p in small.named_parameters()}

    assert set(flags.values()) == {True, False}
    for name, flag in flags.items():
        # A layer that had no bias has one from its norm: it is trainable as the weight is.
        assert flag == before.get(name, before.get(name.replace(".bias", ".weight"))), name
    assert all(p.grad is None and p.is_leaf for p in small.parameters())


@EVERY_NET
@pytest.mark.parametrize("training", [True, False])
def test_modes_are_those_of_the_student(net: str, *, training: bool) -> None:
    student = student_of(made(net)).train(training)
    next(student.children()).train(not training)
    modes = {path: module.training for path, module in student.named_modules()}
    small = torchcap.materialize(student)
    assert {path: modes[path] for path, _ in small.named_modules()} == {
        path: module.training for path, module in small.named_modules()
    }


def test_small_model_trains_and_updates_the_statistics_of_its_norms() -> None:
    small = torchcap.materialize(student_of(made("dense")).train())
    before = small.norm2.running_mean.clone()
    F.cross_entropy(small(images()), labels()).backward()
    assert all(p.grad is not None for p in small.parameters())
    assert (small.norm2.running_mean - before).norm() > 0


# --------------------------------------------------------------------------------------------------
# Hooks


def test_hooks_of_the_user_are_kept_and_those_of_torchcap_are_gone() -> None:
    model = made("pre-activation")
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("root"))
    model.register_forward_pre_hook(lambda *_: seen.append("first"))
    model.block1.conv1.register_forward_hook(
        lambda *_, **__: seen.append("projected"), with_kwargs=True
    )
    model.block2.register_forward_pre_hook(lambda *_: seen.append("block"))
    model.fc.register_forward_hook(lambda *_: seen.append("kept"), always_call=True)
    small = torchcap.materialize(student_of(model).train())
    seen.clear()
    small(images())

    assert seen == ["first", "projected", "block", "kept", "root"]
    count = sum(
        len(hooks)
        for module in small.modules()
        for name, hooks in vars(module).items()
        if name in {"_forward_hooks", "_forward_pre_hooks"}
    )
    assert count == 5


LEADS_TO_THE_ROOT: dict[str, Callable[[nn.Module], object]] = {
    "bound method": lambda net: net.fc.register_forward_hook(net.looks),
    "partial": lambda net: net.block1.conv1.register_forward_hook(partial(_looks, net)),
    "pre-hook": lambda net: net.block2.conv1.register_forward_pre_hook(net.looks),
    "backward hook": lambda net: net.fc.register_full_backward_hook(net.looks),
    "list": lambda net: vars(net.fc).update(parents=[net]),
    "object": lambda net: vars(net.block1.conv1).update(parent=net),
}


def _looks(*_: Any) -> None:
    """Do what a hook that only looks does."""


@pytest.mark.parametrize("way", LEADS_TO_THE_ROOT)
def test_layers_that_lead_to_their_root_are_materialized(way: str) -> None:
    model = made("pre-activation")
    type(model).looks = _looks
    try:
        LEADS_TO_THE_ROOT[way](model)
        student = student_of(model).eval()
        small = torchcap.materialize(student)
    finally:
        del type(model).looks
    assert not any(parametrize.is_parametrized(module) for module in small.modules())
    assert count_parameters(small) < count_parameters(model)
    assert relative_difference(small(images()), student(images())) <= 1e-6
    held = {id(module) for module in small.modules()}
    parents = [*vars(small.fc).get("parents", []), vars(small.block1.conv1).get("parent", small)]
    assert {id(module) for module in parents} <= held


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_hooks_on_a_folded_norm_are_kept() -> None:
    model = made()
    shapes: list[tuple[int, ...]] = []
    model.block1.bn1.register_forward_hook(lambda _, args, y: shapes.append(tuple(y.shape)))
    small = torchcap.materialize(student_of(model, ratio=0.5))
    shapes.clear()
    small(images())
    assert shapes == [(4, 3, 8, 8)]


def test_hooks_for_gradients_and_state_dicts_are_kept() -> None:
    model = made()
    seen: list[str] = []
    model.block1.conv1.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.block1.conv2.register_state_dict_post_hook(lambda *_: seen.append("state"))
    small = torchcap.materialize(student_of(model))
    seen.clear()
    small(images()).sum().backward()
    small.state_dict()
    assert seen == ["backward", "state"]


# --------------------------------------------------------------------------------------------------
# Nothing of torchcap


@pytest.mark.parametrize("net", [*NETS, "traced"])
def test_nothing_of_torchcap_can_be_reached(net: str) -> None:
    model = fx.symbolic_trace(made()) if net == "traced" else made(net)
    student = student_of(model).train()
    student(images())
    foreign = {type(thing).__name__ for thing in reachable(student) if _is_ours(thing)}
    assert {"Student", "TeacherPass"} <= foreign  # the search does find what is there
    small = torchcap.materialize(student)
    assert [thing for thing in reachable(small) if _is_ours(thing)] == []
    assert not any(parametrize.is_parametrized(module) for module in small.modules())


def _is_ours(thing: Any) -> bool:
    names = [getattr(kind, "__module__", "") for kind in (thing, *type(thing).__mro__)]
    return any(str(name).partition(".")[0] == "torchcap" for name in names)


LOAD = """
import sys
sys.modules["torchcap"] = None
sys.path.insert(0, {tests!r})
import warnings
import pickle
import torch
torch.set_num_threads(1)
try:
    import torchcap
except ImportError:
    pass
else:
    raise SystemExit("torchcap is there after all")
with open({path!r}, "rb") as file:
    cases = pickle.load(file)
for name, (model, x, expected) in cases.items():
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0, msg=name)
print(len(cases), "models")
"""


def test_small_models_unpickle_where_torchcap_is_missing(tmp_path: Path) -> None:
    models = {name: made(name) for name in NETS}
    models["same"] = built(
        lambda: nn.Sequential(Conv2dSame(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1))
    )
    models["timm"] = built(TIMM["resnet"])
    models["traced"] = fx.symbolic_trace(made())
    cases = {}
    for name, model in models.items():
        x = images() if name != "timm" else IMAGE
        student = student_of(model, example_inputs=x).train()
        student(x)
        small = torchcap.materialize(student).eval()
        cases[name] = (small, x, output(small, x))
    path = tmp_path / "models.pickle"
    path.write_bytes(pickle.dumps(cases))
    script = LOAD.format(tests=str(Path(__file__).parent), path=str(path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{len(models)} models\n"


# --------------------------------------------------------------------------------------------------
# Graph modules


@EVERY_NET
def test_graph_module_gives_a_graph_module_without_the_folded_norms(net: str) -> None:
    model = made(net)
    graph_module = fx.symbolic_trace(model)
    folds = [fold.norm for fold in torchcap.analyze(graph_module, images()).folds]
    student = student_of(graph_module)
    small = torchcap.materialize(student)

    assert isinstance(small, fx.GraphModule)
    torch.testing.assert_close(output(small), output(student), **EXACT)
    small.graph.lint()
    assert len(small.graph.nodes) == len(graph_module.graph.nodes) - len(folds)
    assert not {node.target for node in small.graph.nodes} & set(folds)
    assert not set(dict(small.named_modules())) & set(folds)
    norms = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(expected) - len(folds)
    assert len(graph_module.graph.nodes) == len(fx.symbolic_trace(model).graph.nodes)


def test_graph_module_student_trains() -> None:
    whole = student_of(fx.symbolic_trace(made()), ratio=1.0, init=None).train()
    whole(images())
    assert torchcap.reconstruction_loss(whole) < 1e-20
    student = student_of(fx.symbolic_trace(made()))
    before = output(student)
    train_(student)
    assert (output(student) - before).norm() > 1e-3
    torch.testing.assert_close(output(torchcap.materialize(student)), output(student), **EXACT)


# --------------------------------------------------------------------------------------------------
# Models of timm

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIMM: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: timm.models.ResNet(
        timm.models.resnet.BasicBlock, [1] * 4, channels=(8, 12, 12, 16), num_classes=7
    ),
    "vgg": lambda: timm.models.VGG(
        [8, "M", 12, "M"], num_classes=7, mlp_ratio=0.004, norm_layer=nn.BatchNorm2d
    ),
    "efficientnet": lambda: timm.create_model("tinynet_e", num_classes=7),
    "mobilenetv3": lambda: timm.create_model("lcnet_035", num_classes=7),
    "densenet": lambda: timm.models.DenseNet(growth_rate=4, block_config=(2, 2), num_classes=7),
}


@pytest.fixture(scope="module", params=TIMM)
def trio(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model, its student and the small model; tests change copies of the small one alone."""
    model = built(TIMM[request.param])
    student = student_of(model, example_inputs=IMAGE)
    return model, student, torchcap.materialize(student)


@torch.no_grad()
def test_timm_models_keep_class_and_features(trio: tuple[Any, Any, Any]) -> None:
    model, student, small = trio
    assert type(small) is type(model)
    assert relative_difference(small(IMAGE), student(IMAGE)) < 1e-12
    features = student.forward_features(IMAGE)
    assert relative_difference(small.forward_features(IMAGE), features) < 1e-12
    assert relative_difference(small.forward_head(features), student(IMAGE)) < 1e-12


def test_timm_models_say_the_width_that_they_have(trio: tuple[Any, Any, Any]) -> None:
    _, _, small = trio
    width = small.forward_features(IMAGE).shape[1]
    assert small.num_features == width
    assert small.get_classifier().in_features == small.get_classifier().weight.shape[1]
    assert small.forward_head(small.forward_features(IMAGE), pre_logits=True).shape[1] == (
        small.head_hidden_size
    )


@pytest.mark.parametrize("classes", [3, 0])
def test_timm_models_get_a_new_classifier(trio: tuple[Any, Any, Any], classes: int) -> None:
    small = copy.deepcopy(trio[2])
    width = small.get_classifier().in_features
    features = small.forward_features(IMAGE)
    small.reset_classifier(classes)
    small.double()
    assert small(IMAGE).shape == (2, classes or width)
    torch.testing.assert_close(small.forward_features(IMAGE), features, **EXACT)
    if classes:
        assert small.get_classifier().weight.shape == (classes, width)
        F.cross_entropy(small(IMAGE), torch.tensor([0, 1])).backward()


@pytest.mark.parametrize("name", ["efficientnet", "mobilenetv3", "vgg", "densenet"])
def test_last_features_of_timm_models_are_compressed(name: str) -> None:
    # What makes the tests above worth their while: the classifier reads fewer channels.
    model = built(TIMM[name])
    small = torchcap.materialize(student_of(model, example_inputs=IMAGE))
    assert small.get_classifier().in_features < model.get_classifier().in_features


def test_block_of_a_net_may_be_reset_by_hand() -> None:
    small = torchcap.materialize(student_of(made()))
    small.block2 = Block(8, 3).double()
    assert small(images()).shape == (4, CLASSES)
