"""The training loop, under relaxation, fine-tuning and the training of projections."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import (
    CLASSES,
    NETS,
    PreActivationBlock,
    Residual,
    built,
    fingerprint,
    images,
    labels,
    values,
)
from timm.layers import DropPath
from torch import Tensor, nn

import torchcap
from torchcap import (
    SGD,
    Adam,
    DataError,
    FlipAndShift,
    Mix,
    ModelError,
    Progress,
    RandomOrthonormal,
    RecipeError,
    Relaxation,
    Round,
    StudentError,
    TrainingError,
    layer_by_layer,
)
from torchcap.batches import Source
from torchcap.graph.analyze import Reader
from torchcap.training.projections import recentre_
from torchcap.training.relax import LeastSquares, _lifts, _pairs
from torchcap.transform.student import student_of

BITWISE = {"rtol": 0, "atol": 0}
STEPS = Adam(1e-2)


def data(*seeds: int, labelled: bool = True) -> list[Any]:
    batches = [images(seed=seed) for seed in seeds or (1, 2)]
    return [(x, labels(len(x))) for x in batches] if labelled else batches


def prepared(model: nn.Module, **kwargs: Any) -> nn.Module:
    kwargs.setdefault("init", RandomOrthonormal(torch.Generator().manual_seed(0)))
    return torchcap.prepare(model, example_inputs=images(), **kwargs)


def compressed(model: nn.Module, **kwargs: Any) -> nn.Module:
    return torchcap.materialize(prepared(model, **kwargs))


@dataclass(frozen=True)
class Way:
    """A public call that trains: what it changes, and how it is called on that."""

    name: str
    make: Callable[[nn.Module], nn.Module]
    call: Callable[..., None]

    def __str__(self) -> str:
        return self.name

    @property
    def told(self) -> str:
        """The name that progress and errors have for it."""
        return self.name if not self.name.startswith("with") else "relaxation"

    def __call__(
        self, subject: nn.Module, model: nn.Module, batches: Any = None, **how: Any
    ) -> None:
        how = {"epochs": 2, "optimizer": STEPS, "healing": 1, **how}
        teacher = () if self.name == "projections" else (model,)
        self.call(subject, *teacher, data() if batches is None else batches, **how)

    def made(self, net: str = "residual") -> tuple[nn.Module, nn.Module]:
        """Return a model, and what this call trains of it."""
        return copy.deepcopy(_originals(self.name, net))


@cache
def _originals(way: str, net: str) -> tuple[nn.Module, nn.Module]:
    model = built(NETS[net])
    return model, WAYS[way].make(model)


ON_BATCHES = {"batch_norm": True, "batch_statistics": True}
WAYS = {
    way.name: way
    for way in (
        Way("relaxation", compressed, partial(torchcap.relax, batch_norm=False)),
        Way("with norms", compressed, partial(torchcap.relax, batch_norm=True)),
        Way("with batches' norms", compressed, partial(torchcap.relax, **ON_BATCHES)),
        Way("fine-tuning", compressed, partial(torchcap.fine_tune, batch_norm=False)),
        Way("projections", prepared, torchcap.train_projections),
    )
}
RELAX = WAYS["relaxation"]
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
# Fine-tuning is relaxation with other weights: where these make no difference, it is left out.
LOOPS = [way for name, way in WAYS.items() if name not in {"fine-tuning", "with norms"}]
EVERY_LOOP = pytest.mark.parametrize("way", LOOPS, ids=str)
KERNELS = pytest.mark.parametrize("way", list(WAYS.values())[:-1], ids=list(WAYS)[:-1])


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], **BITWISE, msg=name)


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in values(model).items() if not torch.equal(value, before[name])}


# --------------------------------------------------------------------------------------------------
# What training does


@EVERY_WAY
@pytest.mark.parametrize("net", ["residual", "pre-activation", "plain", "inline", "separable"])
def test_loss_falls(way: Way, net: str) -> None:
    model, subject = way.made(net)
    losses: list[float] = []
    way(subject, model, epochs=12, on_progress=lambda p: losses.append(p.loss))
    assert sum(losses[-2:]) < sum(losses[:2])


@torch.no_grad()
def test_output_comes_nearer_to_the_teachers() -> None:
    model, small = RELAX.made()
    x = torch.cat([images(seed=1), images(seed=2)])
    before = F.mse_loss(small(x), model(x))
    RELAX(small, model, epochs=20)
    assert F.mse_loss(small(x), model(x)) < 0.5 * before


@KERNELS
@pytest.mark.parametrize("net", ["residual", "pre-activation"])
def test_kernels_change_and_statistics_stay(way: Way, net: str) -> None:
    model, small = way.made(net)
    before = values(small)
    way(small, model)
    assert moved(before, small) == {name for name, _ in small.named_parameters()}


@pytest.mark.parametrize("net", ["residual", "pre-activation", "plain", "separable"])
def test_only_proxies_change_when_projections_train(net: str) -> None:
    model, student = WAYS["projections"].made(net)
    before = values(student)
    WAYS["projections"](student, model)
    proxies = {name for name in before if name.endswith(".proxy")}
    assert proxies
    assert moved(before, student) == proxies


def test_projections_stay_orthonormal() -> None:
    model, student = WAYS["projections"].made("plain")
    WAYS["projections"](student, model, epochs=5, optimizer=Adam(0.1, relative=False))
    for projection in student_of(student).projections.values():
        P = projection()
        identity = torch.eye(P.shape[2], dtype=P.dtype).expand(len(P), -1, -1)
        torch.testing.assert_close(P.mT @ P, identity, rtol=0, atol=1e-10)


def test_projections_of_other_rounds_stay() -> None:
    model, student = WAYS["projections"].made("plain")

    def first_alone(graph: Any, plan: Any) -> tuple[Round, ...]:
        names = tuple(plan.choices)
        return (Round(names[:1], names),)

    before = values(student)
    WAYS["projections"](student, model, rounds=first_alone)
    assert moved(before, student) == {"features.0.parametrizations.weight.0.projections.0.proxy"}


@EVERY_WAY
def test_teacher_is_unchanged(way: Way) -> None:
    model = built(NETS["pre-activation"]).train()
    next(model.parameters()).requires_grad_(requires_grad=False)
    model.block1.register_forward_hook(lambda *_: None)
    subject = way.make(model)
    before, numbers = fingerprint(model), values(model)
    way(subject, model)
    assert fingerprint(model) == before
    assert_same(values(model), numbers)


@EVERY_LOOP
@pytest.mark.parametrize("net", ["pre-activation", "dense"])
def test_modes_of_teacher_and_student_make_no_difference(way: Way, net: str) -> None:
    results = []
    for of_teacher, of_subject in ((False, False), (True, False), (False, True)):
        model, subject = way.made(net)
        model.train(of_teacher), subject.train(of_subject)
        way(subject, model)
        results.append(values(subject))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def shell(model: nn.Module) -> dict[str, Any]:
    """What of a model is not its numbers: modes, hooks, flags, gradients, identities."""
    found = fingerprint(model)
    modes = {path: module.training for path, module in model.named_modules()}
    for part in found.values():
        part["tensors"] = {n: t[:2] + t[3:] for n, t in part["tensors"].items()}  # but the version
    return {"modules": found, "modes": modes, "keys": list(model.state_dict())}


class Interruption(BaseException):
    """What a callback of the user may raise."""


@EVERY_LOOP
@pytest.mark.parametrize("stop", [None, 1, 3])
def test_modes_hooks_and_flags_are_as_before_also_after_an_error(
    way: Way, stop: int | None
) -> None:
    model, subject = way.made("pre-activation")
    subject.train()
    subject.block1.eval()
    subject.register_forward_hook(lambda *_: None)
    next(p for p in subject.parameters() if p.requires_grad).requires_grad_(requires_grad=False)
    before = shell(subject)

    def watch(progress: Progress) -> None:
        if progress.step == stop:
            raise Interruption

    if stop is None:
        way(subject, model, on_progress=watch)
    else:
        with pytest.raises(Interruption):
            way(subject, model, on_progress=watch)
    assert shell(subject) == before


@KERNELS
def test_frozen_parameters_stay(way: Way) -> None:
    model, small = way.made()
    small.block1.requires_grad_(requires_grad=False)
    small.block2.conv1.bias.requires_grad_(requires_grad=False)
    before = values(small)
    way(small, model)
    trainable = {name for name, p in small.named_parameters() if p.requires_grad}
    assert moved(before, small) == trainable


def test_frozen_projections_stay() -> None:
    model, student = WAYS["projections"].made()
    frozen, trained = torchcap.projection_parameters(student)
    frozen.requires_grad_(requires_grad=False)
    before = frozen.detach().clone(), trained.detach().clone()
    WAYS["projections"](student, model)
    assert torch.equal(frozen, before[0])
    assert not torch.equal(trained, before[1])


# --------------------------------------------------------------------------------------------------
# Steps


@EVERY_WAY
def test_progress_counts_every_step(way: Way) -> None:
    model, subject = way.made()
    seen: list[Progress] = []
    way(subject, model, data(1, 2, 3), on_progress=seen.append)
    name = way.told
    assert [(p.name, p.step, p.steps) for p in seen] == [(name, i, 6) for i in range(1, 7)]
    assert all(0 < p.reconstruction < p.loss for p in seen)


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    model, small = RELAX.made()
    first: dict[str, Progress] = {}

    def told(name: str) -> Callable[[Progress], None]:
        return lambda progress: first.setdefault(name, progress)

    none = {"reconstruction": 0.0, "distillation": 0.0, "labels": 0.0}
    for name in none:
        weights = {**none, name: 1.0}
        RELAX(copy.deepcopy(small), model, data(1), epochs=1, on_progress=told(name), **weights)
    weights = {"reconstruction": 0.5, "distillation": 3.0, "labels": 0.25}
    RELAX(copy.deepcopy(small), model, data(1), epochs=1, on_progress=told("all"), **weights)
    expected = sum(weight * first[name].loss for name, weight in weights.items())
    assert first["all"].loss == pytest.approx(expected, rel=1e-6)
    assert first["all"].reconstruction == first["reconstruction"].loss
    assert first["labels"].reconstruction == first["distillation"].reconstruction == 0
    truth = F.cross_entropy(small(images(seed=1)), labels()).item()
    assert first["labels"].loss == pytest.approx(truth, rel=1e-12)


@EVERY_LOOP
def test_result_follows_from_the_seed_alone(way: Way) -> None:
    results = []
    for seed in (3, 3, 4):
        model, subject = way.made()
        state = torch.get_rng_state()
        way(subject, model, augment=(FlipAndShift(),), seed=seed)
        results.append(values(subject))
        assert torch.equal(torch.get_rng_state(), state)
    assert_same(results[0], results[1])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_every_step_draws_anew() -> None:
    drawn: list[list[float]] = []

    def noting(x: Tensor) -> Tensor:
        drawn[-1].append(float(torch.rand(())))
        return x

    for seed in (0, 0, 1):
        drawn.append([])
        RELAX(*reversed(RELAX.made()), epochs=3, augment=(noting,), seed=seed)
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 12


@EVERY_LOOP
def test_gradients_are_taken_wherever_the_call_stands(way: Way) -> None:
    results = []
    for enabled in (True, False):
        model, subject = way.made()
        with torch.set_grad_enabled(enabled):
            way(subject, model)
            assert torch.is_grad_enabled() == enabled
        results.append(values(subject))
    assert_same(*results)


@pytest.mark.parametrize("name", ["relaxation", "projections"])
def test_clip_bounds_the_step(name: str) -> None:
    way, lengths = WAYS[name], []
    for clip in (None, 1e-3):
        model, subject = way.made()
        before = torch.cat([p.detach().flatten() for p in subject.parameters()])
        way(subject, model, data(1), epochs=1, optimizer=SGD(1.0, 0.0), clip=clip)
        after = torch.cat([p.detach().flatten() for p in subject.parameters()])
        lengths.append(float((after - before).norm()))
    assert lengths[0] > 0.01
    assert lengths[1] == pytest.approx(1e-3, rel=1e-3)


class Noting(torch.optim.SGD):
    """Plain gradient descent that notes its step sizes."""

    def __init__(self, parameters: Any, lr: float, rates: list[float]) -> None:
        super().__init__(parameters, lr)
        self.rates = rates

    def step(self, closure: Any = None) -> None:
        self.rates.append(self.param_groups[0]["lr"])
        super().step(closure)


def step_sizes(**how: Any) -> list[float]:
    rates: list[float] = []
    RELAX(*reversed(RELAX.made()), optimizer=lambda p: Noting(p, 1e-3, rates), **how)
    return rates


def test_step_size_rises_and_then_falls_to_zero() -> None:
    rates = step_sizes(epochs=10, warmup=0.25)
    top = rates.index(max(rates))
    assert len(rates) == 20
    assert top == 4
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[0] < 0.3e-3
    assert rates[-1] < 0.02e-3


@pytest.mark.parametrize(("healing", "share"), [(1, 1.0), (4, 1.0), (40, 0.1)])
def test_short_trainings_take_smaller_steps_in_proportion(healing: int, share: float) -> None:
    rates, expected = step_sizes(healing=healing), step_sizes(healing=1)
    assert rates == pytest.approx([share * rate for rate in expected])


@pytest.mark.parametrize("recentre", [False, True])
def test_recentred_proxies_are_orthonormal(*, recentre: bool) -> None:
    model, student = WAYS["projections"].made("plain")
    how = {"epochs": 4, "optimizer": Adam(0.05, relative=False), "recentre": recentre}
    WAYS["projections"](student, model, **how)
    gaps = [
        (X.mT @ X - torch.eye(X.shape[2], dtype=X.dtype)).abs().max()
        for X in torchcap.projection_parameters(student)
    ]
    assert len(gaps) == 3
    assert (max(gaps) < 1e-10) == recentre


def test_recentring_by_itself_changes_no_projection() -> None:
    student = prepared(built(NETS["plain"]))
    ours = list(student_of(student).projections.values())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for projection in ours:
            noise = torch.randn(projection.proxy.shape, generator=generator, dtype=torch.float64)
            projection.proxy.add_(noise, alpha=0.3)
    before = [projection().detach() for projection in ours]
    recentre_(ours)
    for projection, P in zip(ours, before, strict=True):
        torch.testing.assert_close(projection().detach(), P, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(projection.proxy.detach(), P, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------
# Labels


@EVERY_WAY
def test_missing_labels_are_refused(way: Way) -> None:
    model, subject = way.made()
    mixed = [*data(1), *data(2, labelled=False)]
    with pytest.raises(DataError, match=r"labels a weight.*batch 1 .*has none.*labels=0"):
        way(subject, model, mixed, labels=1.0)


@EVERY_LOOP
@pytest.mark.parametrize("wrong", [CLASSES, -1, 1000])
def test_labels_out_of_range_are_refused_by_name(way: Way, wrong: int) -> None:
    model, subject = way.made()
    bad = [*data(1), (images(seed=2), torch.tensor([0, 1, wrong, 2]))]
    says = rf"batch 1 .*label {wrong}\b.*{CLASSES} classes.*0\.\.{CLASSES - 1}"
    with pytest.raises(DataError, match=says):
        way(subject, model, bad, labels=1.0)


@pytest.mark.parametrize(
    "wrong", [labels()[:, None], labels()[:3], torch.rand(4), F.one_hot(labels(), CLASSES)]
)
def test_labels_of_another_shape_are_refused(wrong: Tensor) -> None:
    model, small = RELAX.made()
    with pytest.raises(
        DataError, match=rf"labels of batch 0.*{re.escape(str(tuple(wrong.shape)))}"
    ):
        RELAX(small, model, [(images(), wrong)], labels=1.0)


LABELS_ALONE = {"reconstruction": 0.0, "distillation": 0.0, "labels": 1.0}


def test_images_with_the_label_that_is_ignored_do_not_count() -> None:
    x, last = images(), labels()[3:]
    results = []
    for batch in ((x, torch.tensor([-100, -100, -100, int(last)])), (x[3:], last)):
        model, small = RELAX.made()
        RELAX(small, model, [batch], **LABELS_ALONE)
        results.append(values(small))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_every_integer_type_count_the_same(dtype: torch.dtype) -> None:
    results = []
    for kind in (torch.int64, dtype):
        model, small = RELAX.made()
        RELAX(small, model, [(images(), labels().to(kind))], **LABELS_ALONE)
        results.append(values(small))
    assert_same(*results)


@EVERY_LOOP
def test_labels_without_a_weight_are_not_looked_at(way: Way) -> None:
    results = []
    for with_them in (False, True):
        model, subject = way.made()
        batches = data(1, 2, labelled=False)
        if with_them:
            batches = [(x, torch.full((len(x),), 999)) for x in batches]
        way(subject, model, batches, labels=0.0)
        results.append(values(subject))
    assert_same(*results)


def test_mixed_images_train_without_labels() -> None:
    model, small = RELAX.made()
    losses: list[float] = []
    RELAX(
        small,
        model,
        epochs=8,
        augment=(FlipAndShift(), Mix()),
        on_progress=lambda p: losses.append(p.loss),
    )
    assert sum(losses[-4:]) < sum(losses[:4])


# --------------------------------------------------------------------------------------------------
# Losses that are not finite


def taps_of(model: nn.Module) -> list[str]:
    return [tap.name for tap in torchcap.analyze(model, images()).taps]


@EVERY_LOOP
def test_too_large_steps_are_named_and_taken_back(way: Way) -> None:
    model, subject = way.made()
    before = values(subject)
    name = way.told
    lr, says = 1e200, rf"loss of step 2 of 4 of the {name}.*features of {taps_of(model)[0]!r}"
    if way.name == "projections":  # an orthonormal P keeps its size, however large the step
        lr, says = math.inf, r"weight after step 1 of 4 of the projections"
    with pytest.raises(TrainingError, match=rf"{says}.*SGD\(lr={re.escape(str(lr))}.*clip="):
        way(subject, model, optimizer=SGD(lr, 0.0), warmup=0.0)
    # One batch has moved the statistics of fresh norms by a tenth of what it differs from all.
    exact = {"rtol": 0, "atol": 0.1} if way.name == "with batches' norms" else BITWISE
    for key, value in values(subject).items():
        torch.testing.assert_close(value, before[key], **exact)


@KERNELS
@pytest.mark.parametrize("block", [0, 1])
def test_place_where_a_feature_is_not_finite_is_named(way: Way, block: int) -> None:
    model, small = way.made()
    before = values(small)
    [model.block1, model.block2][block].bn2.running_var.fill_(-1)
    with pytest.raises(
        TrainingError, match=rf"step 1 of 4 .*features of {taps_of(model)[block]!r}"
    ):
        way(small, model)
    for key, value in values(small).items():
        torch.testing.assert_close(value, before[key], rtol=1e-10, atol=1e-10)


def test_step_of_the_batch_that_overflows_is_named_and_earlier_steps_are_kept() -> None:
    model, small = RELAX.made()
    before = values(small)
    batches = [*data(*range(60)), (images() * 1e200, labels())]
    with pytest.raises(TrainingError, match=r"step 61 of 61 .*earlier step"):
        RELAX(small, model, batches, epochs=1)
    assert all(value.isfinite().all() for value in values(small).values())
    assert moved(before, small)


def test_output_that_is_not_finite_is_named_where_all_features_are() -> None:
    model, small = RELAX.made()
    with torch.no_grad():
        model.fc.bias[0] = torch.inf
    with pytest.raises(TrainingError, match=r"step 1 .*at the output of the model"):
        RELAX(small, model)


@EVERY_LOOP
def test_weights_are_finite_if_the_last_step_breaks_them(way: Way) -> None:
    model, subject = way.made()
    with pytest.raises(TrainingError, match=r"weight after step 1 of 1 "):
        way(subject, model, data(1), epochs=1, optimizer=SGD(math.inf, 0.0), warmup=0.0)
    assert all(value.isfinite().all() for value in values(subject).values())


# --------------------------------------------------------------------------------------------------
# Data


class Shrinking:
    """Gives all of its batches for some passes, and fewer in later ones."""

    def __init__(self, passes: int, left: int) -> None:
        self.passes, self.left = passes, left

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        self.passes -= 1
        return iter(data(1, 2, 3)[: 3 if self.passes >= 0 else self.left])


@EVERY_LOOP
@pytest.mark.parametrize(("left", "says"), [(2, r"had 2 batches.*earlier one\W+3"), (0, "empty")])
def test_data_that_gives_fewer_batches_in_a_later_pass_is_refused(
    way: Way, left: int, says: str
) -> None:
    model, subject = way.made()
    with pytest.raises(DataError, match=says):
        way(subject, model, Shrinking(4, left), epochs=6)


class Unsized:
    """Batches that can be passed over again, of a number that is not known before."""

    def __iter__(self) -> Iterator[Any]:
        yield from data()


@EVERY_LOOP
def test_data_of_unknown_length_trains_as_a_list_does(way: Way) -> None:
    results = []
    for batches in (data(), Unsized()):
        model, subject = way.made()
        way(subject, model, batches)
        results.append(values(subject))
    assert_same(*results)


BAD_DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (list, r"data is empty"),
    "a tensor": (images, r"iterable of batches, got Tensor.*data=\[images\]"),
    "a generator": (lambda: (b for b in data()), r"only\s+once"),
    "strings": (lambda: ["cat.png"], r"got str"),
    "NaN": (lambda: [(images() * torch.nan, labels())], r"batch 0 .*NaN"),
    "bytes": (lambda: [(images().to(torch.uint8), labels())], r"batch 0 .*torch\.uint8"),
    "other channels": (lambda: [(images()[:, :2], labels())], r"batch 0 .*\(4, 2"),
    "NaN later on": (lambda: [*data(1), (images() * torch.nan, labels())], r"batch 1 .*NaN"),
    "other channels later on": (
        lambda: [*data(1), (images()[:, :2], labels())],
        r"batch 1 .*\(4, 2",
    ),
}


@EVERY_LOOP
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_by_name(way: Way, case: str) -> None:
    model, subject = way.made()
    before = shell(subject)
    make, says = BAD_DATA[case]
    with pytest.raises(DataError, match=f"(?s){says}"):
        way(subject, model, make())
    assert shell(subject) == before


# --------------------------------------------------------------------------------------------------
# Features with fewer channels than the teacher's


def lifts_of(small: nn.Module, model: nn.Module) -> dict[str, LeastSquares | None]:
    reader = Reader()
    pairs = _pairs(reader(small, images()), reader(model, images()))
    found = _lifts(small, model, pairs, Source(data(*range(8))))
    return {ours.name: lift for (ours, _), lift in zip(pairs, found, strict=True)}


@pytest.mark.parametrize(
    ("net", "lifted"),
    [
        ("residual", {"relu_2": False, "relu_4": False}),
        ("plain", {"features_5": True, "classifier_1": True, "classifier_2": False}),
        ("dense", {"conv1": True, "conv2": True, "fc": False}),
    ],
)
def test_features_that_are_cut_are_lifted(net: str, lifted: dict[str, bool]) -> None:
    model, small = RELAX.made(net)
    found = lifts_of(small, model)
    assert {name: lift is not None for name, lift in found.items()} == lifted


@torch.no_grad()
def test_lift_predicts_the_teachers_feature_better_than_the_projection() -> None:
    model, student = built(NETS["plain"]), prepared(built(NETS["plain"]))
    small = torchcap.materialize(student)
    lift = next(iter(lifts_of(small, model).values()))
    assert lift is not None
    x = torch.cat([images(seed=seed) for seed in range(8)])
    ours, theirs = (m.features[:6](x).movedim(1, 0).flatten(1) for m in (small, model))
    P = student_of(student).projections["features.3"]()[0]
    errors = [(f - theirs).square().sum() for f in (lift(ours), P @ ours, 0 * theirs)]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("net", NETS)
def test_loss_of_a_full_copy_of_the_teacher_is_zero(net: str) -> None:
    model = built(NETS[net])
    seen: list[Progress] = []
    RELAX(copy.deepcopy(model).train(), model, data(1), epochs=1, on_progress=seen.append)
    assert seen[0].reconstruction < 1e-20
    assert seen[0].loss < 1e-6  # distillation is computed in float32


def test_loss_is_next_to_nothing_where_only_dead_channels_were_cut() -> None:
    model = built(NETS["plain"])
    with torch.no_grad():
        for layer in (model.features[1], model.features[4]):  # norms that put out zeros
            half = len(layer.weight) // 2
            layer.weight[half:], layer.bias[half:] = 0.0, 0.0
    ranks = {"features.0": 3, "features.3": 4}
    plan = torchcap.Plan.of(torchcap.analyze(model, images()), ranks)
    small = torchcap.materialize(torchcap.prepare(model, plan=plan, example_inputs=images()))
    seen: list[Progress] = []
    RELAX(small, model, data(1), epochs=1, on_progress=seen.append)
    assert seen[0].reconstruction < 1e-6  # the lift's ridge is 1e-4


# --------------------------------------------------------------------------------------------------
# Layers that behave in another way while they train


class Noisy(nn.Module):
    """A residual block with everything that is random, or counts, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = PreActivationBlock(8, 6)
        self.dropout, self.drop_path = nn.Dropout(0.5), DropPath(0.5)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.drop_path(self.block(x))
        return self.fc(self.dropout(F.relu(x)).mean((2, 3)))


@KERNELS
def test_what_is_random_in_training_mode_is_off(way: Way) -> None:
    results = []
    for training in (False, True):
        model = built(Noisy)
        small = way.make(model).train(training)
        way(small, model.train(training))
        results.append(values(small))
    assert_same(*results)


@KERNELS
def test_norms_that_stayed_keep_their_statistics(way: Way) -> None:
    model, small = way.made("pre-activation")
    before = {name: b.clone() for name, b in small.named_buffers()}
    way(small.train(), model)
    assert before
    assert_same(dict(small.named_buffers()), before)


# --------------------------------------------------------------------------------------------------
# Models that cannot train


def test_model_without_trainable_parameters_is_refused() -> None:
    model, small = RELAX.made()
    small.requires_grad_(requires_grad=False)
    with pytest.raises(ModelError, match=r"'Residual'.*requires_grad_\(True\)"):
        RELAX(small, model)


def test_model_without_a_place_to_compare_learns_from_the_logits_alone() -> None:
    model = built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES)))
    small = built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES)), seed=1)
    losses: list[Progress] = []
    RELAX(small, model, epochs=6, on_progress=losses.append)
    assert losses[-1].loss < losses[0].loss
    assert losses[0].reconstruction == 0
    with pytest.raises(ModelError, match=r"no place.*distillation"):
        RELAX(small, model, distillation=0.0)


def test_rounds_that_leave_spaces_at_full_width_are_refused() -> None:
    model, student = WAYS["projections"].made("plain")
    with pytest.raises(RecipeError, match=r"round 0 of layer_by_layer leaves 2 spaces.*compress"):
        WAYS["projections"](student, model, rounds=layer_by_layer)


def test_model_that_is_not_prepared_has_no_projections_to_train() -> None:
    with pytest.raises(StudentError, match=r"'Residual'.*torchcap\.prepare"):
        torchcap.train_projections(built(Residual), data())


def test_values_of_the_schedule_may_be_changed_in_the_call() -> None:
    results = []
    for schedule, how in ((Relaxation(epochs=3, optimizer=STEPS), {}), (None, {"epochs": 3})):
        model, small = RELAX.made()
        torchcap.relax(small, model, data(), schedule, **{"optimizer": STEPS, **how})
        results.append(values(small))
    assert_same(*results)
    with pytest.raises(RecipeError, match=r"epochs.*got 0"):
        torchcap.relax(*reversed(RELAX.made()), data(), epochs=0)
