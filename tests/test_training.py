"""Losses between student and teacher, in a training loop of the user's own."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from small_nets import (
    CLASSES,
    BareSumBlock,
    Block,
    Dense,
    Inline,
    ModuleEndBlock,
    Plain,
    PreActivationBlock,
    Residual,
    Separable,
    SharedActivationBlock,
    built,
    images,
    labels,
    values,
)
from torch import Tensor, nn

import torchcap
from torchcap import RandomOrthonormal, StudentError
from torchcap.projection import maps
from torchcap.projection.initialize import Initializer
from torchcap.projection.maps import Stiefel
from torchcap.training.taps import TeacherPass
from torchcap.transform.student import find_attachment
from torchcap.transform.student import student_of as state_of

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class OneActivation(nn.Module):
    """One in-place ReLU module for the whole net, registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.block1, self.block2 = SharedActivationBlock(8, 6), SharedActivationBlock(8, 6)
        self.block2.relu = self.block1.relu
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1.relu(self.conv(x))
        return self.fc(self.block2(self.block1(x)).mean((2, 3)))


class FlattenFirst(nn.Module):
    """The value to compare is seen through a view, and the view is written over."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 8)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.conv1(x)))
        return self.fc(self.relu(torch.flatten(x, 1)))


class ScaledSum(nn.Module):
    """The sum at the end of a block is scaled in place behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.block = PreActivationBlock(8, 6)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.conv(x))
        x.mul_(0.5)
        return self.fc(x.mean((2, 3)))


class PaddedShortcut(nn.Module):
    """The shortcut of a block is subsampled, and padded with zero channels (option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.block1 = Block(8, 6)
        self.conv1 = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(6, 12, 3, padding=1)
        self.end = nn.ReLU()
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(F.relu(self.conv(x)))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = self.end(self.conv2(F.relu(self.conv1(x))) + shortcut)
        return self.fc(x.mean((2, 3)))


class ScaledLayer(nn.Module):
    """A compressed value is scaled in place right behind the layer that writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.conv1(x)))
        x *= 0.5
        return self.fc(F.relu(x).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "module ends": lambda: Residual(ModuleEndBlock),
    "shared activation": lambda: Residual(SharedActivationBlock),
    "one activation": OneActivation,
    "bare sums": lambda: Residual(BareSumBlock),
    "pre-activation": lambda: Residual(PreActivationBlock),
    "inline": Inline,
    "plain": Plain,
    "dense": Dense,
    "separable": Separable,
    "flatten first": FlattenFirst,
    "scaled sum": ScaledSum,
    "scaled layer": ScaledLayer,
    "padded shortcut": PaddedShortcut,
}
EVERY_NET = pytest.mark.parametrize("net", NETS)


def made(net: str = "residual") -> nn.Module:
    return built(NETS[net])


def random_start(seed: int = 0) -> Initializer:
    return RandomOrthonormal(torch.Generator().manual_seed(seed))


def student_of(model: nn.Module, **kwargs: Any) -> Any:
    """A student in training mode, from a random start: no symmetry hides a fault."""
    kwargs.setdefault("init", random_start())
    dtype = next(model.parameters()).dtype
    return torchcap.prepare(model, example_inputs=images(dtype=dtype), **kwargs).train()


def loss_of(student: nn.Module, x: Tensor) -> Tensor:
    student(x)
    return torchcap.reconstruction_loss(student)


def gradients(loss: Tensor, student: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, torchcap.projection_parameters(student)))


# --------------------------------------------------------------------------------------------------
# The loss, by hand

Place = tuple[str, int, str]
RESIDUAL: dict[Place, str | None] = {
    ("block1", 0, "output"): None,
    ("block2", 0, "output"): None,
}
# Where features are compared, as DESIGN says: behind every residual block; where there is none,
# behind the layer that reads a compressed space. And the space that the feature itself is
# compressed in, if it is.
PLACES: dict[str, dict[Place, str | None]] = {
    "residual": RESIDUAL,
    "module ends": RESIDUAL,
    "shared activation": RESIDUAL,
    "one activation": RESIDUAL,
    "bare sums": RESIDUAL,
    "pre-activation": RESIDUAL,
    "inline": {("conv3", 0, "input"): None, ("fc", 0, "input"): None},
    "plain": {
        ("features.5", 0, "output"): "features.3",
        ("classifier.1", 0, "output"): "classifier.0",
        ("classifier.2", 0, "output"): None,
    },
    "dense": {
        ("conv1", 0, "output"): "conv1",
        ("conv2", 0, "output"): "conv2",
        ("fc", 0, "output"): None,
    },
    "separable": {
        ("excite", 0, "input"): "squeeze",
        ("project", 0, "input"): "expand",
        ("fc", 0, "input"): "project",
        ("fc", 0, "output"): None,
    },
    "flatten first": {("conv2", 0, "output"): "conv2", ("fc", 0, "output"): None},
    "scaled sum": {("block", 0, "output"): None},
    "padded shortcut": {("block1", 0, "output"): None, ("end", 0, "output"): None},
    "scaled layer": {("conv2", 0, "output"): "conv2", ("fc", 0, "output"): None},
}


def features(model: nn.Module, x: Tensor, places: dict[Place, str | None]) -> dict[Place, Tensor]:
    """What a model computes at each place, in evaluation mode."""
    seen: dict[Place, Tensor] = {}

    def keep(path: str, side: str) -> Callable[..., None]:
        calls = iter(range(99))

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any = None) -> None:
            value = output if side == "output" else args[0]
            seen[path, next(calls), side] = value.detach().clone()

        return hook

    model = copy.deepcopy(model).eval()
    for path, _, side in places:
        module = model.get_submodule(path)
        if side == "output":
            module.register_forward_hook(keep(path, side))
        else:
            module.register_forward_pre_hook(keep(path, side))
    with torch.no_grad():
        model(x)
    return {place: seen[place] for place in places}


def bases_by_space(student: nn.Module) -> dict[str, Tensor]:
    """Each space's ``P`` from what is stored, ``(channels, rank)``."""
    found = {}
    for space, projection in state_of(student).projections.items():
        if isinstance(projection, Stiefel):
            U, _, Vh = torch.linalg.svd(projection.proxy.detach()[0], full_matrices=False)
            found[space] = U @ Vh
        else:
            found[space] = torch.eye(projection.channels, dtype=torch.float64)[
                :, projection.kept[0]
            ]
    return found


@pytest.mark.parametrize("net", PLACES)
def test_loss_is_the_normalised_error_at_every_place(net: str) -> None:
    model, x, places = made(net), images(), PLACES[net]
    student = student_of(model)
    bases = bases_by_space(student)
    theirs = features(model, x, places)
    # The materialized student runs on its own features, and has no hooks that could be at fault.
    ours = features(torchcap.materialize(student), x, places)
    expected = torch.zeros((), dtype=torch.float64)
    for place, space in places.items():
        feature = ours[place]
        if space is not None:
            feature = torch.einsum("ck,nk...->nc...", bases[space], feature)
        expected += (theirs[place] - feature).square().sum() / theirs[place].square().sum()

    loss = loss_of(student, x)
    assert loss > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


@EVERY_NET
def test_loss_of_a_student_at_full_width_is_zero(net: str) -> None:
    student = student_of(made(net), ratio=1.0, init=None)
    assert loss_of(student, images()) < 1e-20


@pytest.mark.parametrize("net", [net for net in NETS if net != "dense"])  # all are selections
@pytest.mark.parametrize("count", [1, 3])
def test_gradient_is_the_slope_of_the_loss(net: str, count: int) -> None:
    student, x = student_of(made(net)), images(count)
    proxies = torchcap.projection_parameters(student)
    slopes = gradients(loss_of(student, x), student)
    generator = torch.Generator().manual_seed(4)
    steps = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in proxies]

    def moved(size: float) -> Tensor:
        with torch.no_grad():
            for proxy, step in zip(proxies, steps, strict=True):
                proxy.add_(step, alpha=size)
        loss = loss_of(student, x).detach()
        with torch.no_grad():
            for proxy, step in zip(proxies, steps, strict=True):
                proxy.sub_(step, alpha=size)
        return loss

    size = 1e-6  # small enough to cross no kink of a ReLU
    expected = (moved(size) - moved(-size)) / (2 * size)
    slope = sum((g * s).sum() for g, s in zip(slopes, steps, strict=True))
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("net", ["residual", "plain", "pre-activation", "separable", "inline"])
def test_a_few_steps_lower_the_loss_and_keep_the_constraint(net: str) -> None:
    student, x = student_of(made(net).float()), images(8, dtype=torch.float32)
    proxies = torchcap.projection_parameters(student)
    optimizer = torch.optim.Adam(proxies, 0.02)
    losses = []
    for _ in range(12):
        loss = loss_of(student, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    assert losses[-1] < 0.9 * losses[0]
    projections = [m for m in student.modules() if hasattr(m, "proxy")]
    assert len(projections) == len(proxies)
    for projection in projections:
        P = projection()
        identity = torch.eye(P.shape[2]).expand(len(P), -1, -1)
        torch.testing.assert_close(P.mT @ P, identity, rtol=0, atol=1e-5)


def test_only_proxies_get_gradients() -> None:
    model = made()
    student = student_of(model)
    (loss_of(student, images()) + student(images()).sum()).backward()
    with_gradient = {name for name, p in student.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(name.endswith(".proxy") for name in with_gradient)
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# When the teacher runs


class CountingBlock(Block):
    calls: ClassVar[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.training)
        return super().forward(x)


def test_teacher_runs_in_training_mode_only_and_in_evaluation_mode_itself() -> None:
    student = student_of(built(lambda: Residual(CountingBlock)).train())
    CountingBlock.calls.clear()
    student(images())
    assert sorted(CountingBlock.calls) == [False, False, True, True]
    CountingBlock.calls.clear()
    student.eval()(images())
    assert CountingBlock.calls == [False, False]


def teacher_of(student: nn.Module) -> nn.Module:
    passed = find_attachment(student, TeacherPass)
    assert passed is not None
    return passed.teacher


def test_teacher_costs_no_memory_of_its_own() -> None:
    model = made("pre-activation")
    teacher = dict(teacher_of(student_of(model)).named_parameters())
    for name, tensor in model.named_parameters():
        assert teacher[name].data_ptr() == tensor.data_ptr(), name
        assert not teacher[name].requires_grad, name


@pytest.mark.parametrize("net", ["residual", "plain"])
def test_features_of_the_teacher_are_let_go(net: str) -> None:
    student = student_of(made(net))
    alive: list[weakref.ref[Tensor]] = []
    *inner, _ = [m for m in teacher_of(student).modules() if not list(m.children())]
    for module in inner:
        module.register_forward_hook(lambda _, args, y: alive.append(weakref.ref(y)))
    loss = loss_of(student, images())
    assert len(alive) >= len(inner)
    assert [ref for ref in alive if ref() is not None] == []
    loss.backward()


def test_loss_is_that_of_the_last_training_forward() -> None:
    student = student_of(made())
    first = loss_of(student, images(seed=1)).item()
    second = loss_of(student, images(seed=2))
    assert second.item() != first
    student.eval()(images(seed=1))
    assert torchcap.reconstruction_loss(student) is second
    second.backward()


def test_training_forward_computes_what_evaluation_computes() -> None:
    student, x = student_of(made("pre-activation")), images()
    trained = student(x)
    torch.testing.assert_close(student.eval()(x), trained, **EXACT)


@pytest.mark.parametrize("training", [True, False])
def test_each_basis_is_computed_once_in_a_forward(
    monkeypatch: pytest.MonkeyPatch, *, training: bool
) -> None:
    student = student_of(made("plain")).train(training)
    computed: list[int] = []
    many = maps.polar_many

    def counted(matrices: list[Tensor]) -> list[Tensor]:
        computed.append(len(matrices))
        return many(matrices)

    def unexpected(matrix: Tensor) -> Tensor:
        raise AssertionError("a basis was computed by itself")

    monkeypatch.setattr(maps, "polar_many", counted)
    monkeypatch.setattr(maps, "polar", unexpected)
    student(images())
    assert computed == [3]
    student(images())
    assert computed == [3, 3]  # and anew in the next one


def test_forward_after_an_error_is_as_before() -> None:
    student, x = student_of(made()), images()
    expected = loss_of(student, x).detach()
    with pytest.raises(RuntimeError, match="channels"):
        student(x[:, :2])
    torch.testing.assert_close(loss_of(student, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("net", ["residual", "pre-activation"])
@pytest.mark.parametrize("training", [True, False])
def test_methods_of_the_model_compute_by_themselves(net: str, *, training: bool) -> None:
    student, x = student_of(made(net)), images()
    expected = student.eval()(x).detach()
    before = values(student)
    student.train(training)
    output = student.forward_head(student.forward_features(x))

    torch.testing.assert_close(output, expected, **EXACT)
    for name, value in values(student).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    with pytest.raises(StudentError, match="no reconstruction loss yet"):
        torchcap.reconstruction_loss(student)
    gradients(output.sum(), student)


def test_calling_a_method_does_not_disturb_the_loss() -> None:
    student, x = student_of(made()), images()
    expected = gradients(loss_of(student, x), student)
    loss = loss_of(student, x)
    student.forward_features(images(seed=9))
    for ours, theirs in zip(gradients(loss, student), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_dropout_acts_in_the_student_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 8, 3), nn.Flatten()
    )
    student = student_of(built(lambda: model), ratio=1.0, init=None)
    student(images())
    assert torchcap.reconstruction_loss(student) > 0.01
    student[2].eval()
    assert loss_of(student, images()) < 1e-20


# --------------------------------------------------------------------------------------------------
# Losses with and without labels


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_divergence_of_softened_outputs(temperature: float) -> None:
    model, x = made(), images()
    student = student_of(model)
    output = student(x)
    loss = torchcap.distillation_loss(student, output, temperature=temperature)
    with torch.no_grad():
        ours = F.log_softmax(output / temperature, 1)
        theirs = F.softmax(model(x) / temperature, 1)
    expected = temperature**2 * F.kl_div(ours, theirs, reduction="batchmean")

    assert loss > 1e-3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)  # float32 inside


class Segmentation(nn.Module):
    """Two maps of logits, in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.out, self.aux = nn.Conv2d(6, CLASSES, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.body(x))
        return {"out": self.out(x), "aux": self.aux(x)}


def test_distillation_sums_outputs_and_averages_positions() -> None:
    model, x = built(Segmentation), images()
    student = student_of(model)
    output = student(x)
    loss = torchcap.distillation_loss(student, output, temperature=2.0)
    expected = torch.zeros((), dtype=torch.float64)
    for key, theirs in model(x).items():
        pixels = [t.movedim(1, -1).flatten(0, 2) / 2.0 for t in (output[key], theirs)]
        expected += 4.0 * F.kl_div(
            pixels[0].log_softmax(1), pixels[1].softmax(1), reduction="batchmean"
        )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_distillation_of_a_student_at_full_width_is_zero_and_its_gradient_is_not_elsewhere() -> (
    None
):
    whole = student_of(made(), ratio=1.0, init=None)
    assert torchcap.distillation_loss(whole, whole(images())) < 1e-6
    half = student_of(made())
    loss = torchcap.distillation_loss(half, half(images()))
    assert all(g.norm() > 0 for g in gradients(loss, half))


def test_distillation_refuses_another_output() -> None:
    student = student_of(made())
    output = student(images())
    with pytest.raises(StudentError, match=r"\(4, 3\).*\(4, 5\)"):
        torchcap.distillation_loss(student, output[:, :3])
    with pytest.raises(StudentError, match=r"\(4, 5\)"):
        torchcap.distillation_loss(student, (output, output))


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_mixture_is_reconstruction_and_cross_entropy(gamma: float) -> None:
    student = student_of(made())
    output = student(images())
    loss = torchcap.mixture_loss(student, output, labels(), gamma=gamma)
    expected = torchcap.reconstruction_loss(student) + gamma * F.cross_entropy(output, labels())
    torch.testing.assert_close(loss, expected, **EXACT)


def test_mixture_without_labels_distills() -> None:
    student = student_of(made())
    output = student(images())
    loss = torchcap.mixture_loss(student, output, gamma=0.3, temperature=2.0)
    distilled = torchcap.distillation_loss(student, output, temperature=2.0)
    expected = torchcap.reconstruction_loss(student) + 0.3 * distilled
    torch.testing.assert_close(loss, expected, **EXACT)


# --------------------------------------------------------------------------------------------------
# The user's own loop


def test_two_backward_passes_add_up_to_the_gradient_of_the_sum() -> None:
    student = student_of(made())
    proxies = torchcap.projection_parameters(student)
    for seed in (1, 2):
        output = student(images(seed=seed))
        torchcap.mixture_loss(student, output, labels()).backward()
    accumulated = [p.grad for p in proxies]
    losses = []
    for seed in (1, 2):
        output = student(images(seed=seed))
        losses.append(torchcap.mixture_loss(student, output, labels()))

    for ours, theirs in zip(accumulated, gradients(sum(losses), student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@EVERY_NET
def test_copy_after_a_training_forward_trains_alone(net: str) -> None:
    student, x = student_of(made(net)), images()
    expected = loss_of(student, x).detach()
    twin = copy.deepcopy(student)
    with pytest.raises(StudentError, match="no reconstruction loss yet"):
        torchcap.reconstruction_loss(twin)
    torch.testing.assert_close(loss_of(twin, x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)

    assert abs(loss_of(twin, x) - expected) > 1e-6
    torch.testing.assert_close(loss_of(student, x), expected, rtol=0, atol=0)


def test_student_in_double_precision_has_a_double_loss() -> None:
    student = student_of(made().float()).double()
    loss = loss_of(student, images())
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, loss_of(student_of(made()), images()), rtol=1e-4, atol=0)
    assert all(g.dtype == torch.float64 for g in gradients(loss, student))


@pytest.mark.parametrize("net", ["residual", "plain", "dense", "pre-activation"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_student_in_half_precision_has_a_float32_loss(net: str, dtype: torch.dtype) -> None:
    model = made(net)
    expected = loss_of(student_of(model), images())
    student = student_of(model).to(dtype)
    loss = loss_of(student, images(dtype=dtype))

    assert loss.dtype == torch.float32
    # The truth is of order one; the features have two to three digits.
    torch.testing.assert_close(loss.double(), expected, rtol=0.1, atol=0)
    if torchcap.projection_parameters(student):
        assert all(g.dtype == dtype and g.isfinite().all() for g in gradients(loss, student))


@pytest.mark.parametrize("net", ["residual", "plain", "pre-activation"])
def test_autocast_gives_a_float32_loss_and_gradient(net: str) -> None:
    student, x = student_of(made(net).float()), images(dtype=torch.float32)
    expected = loss_of(student, x)
    with torch.autocast("cpu", torch.bfloat16):
        output = student(x)
        loss = torchcap.mixture_loss(student, output, labels(), gamma=1e-4)
    assert output.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(loss, student))


@pytest.mark.parametrize("net", ["residual", "plain", "dense"])
def test_memory_format_does_not_change_the_loss(net: str) -> None:
    student, x = student_of(made(net)), images()
    expected = loss_of(student, x)
    student = student.to(memory_format=torch.channels_last)
    loss = loss_of(student, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_student_may_be_a_part_of_a_larger_model() -> None:
    student, x = student_of(made()), images()
    expected = loss_of(student, x).detach()
    whole = nn.Sequential(nn.Identity(), student).train()
    whole(x)
    torch.testing.assert_close(torchcap.reconstruction_loss(student), expected, **EXACT)
