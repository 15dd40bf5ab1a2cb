"""``compress()``: one call from a trained model to a smaller one, or an error and no change."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from proofs import relative_difference
from small_nets import (
    CLASSES,
    EXACT,
    NETS,
    BottleneckBlock,
    Plain,
    Residual,
    built,
    fingerprint,
    images,
    labels,
    reachable,
    values,
)
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import torchcap
from torchcap import (
    Adam,
    ClosedForm,
    DataError,
    GreedySelection,
    LargestNorm,
    ModelError,
    NothingToCompressError,
    Plan,
    PlanError,
    PrincipalComponents,
    Progress,
    Projections,
    RandomOrthonormal,
    Recipe,
    RecipeError,
    Relaxation,
    TorchcapError,
    layer_by_layer,
    odd_then_even,
)

ALL: dict[str, Callable[[], nn.Module]] = {**NETS, "bottleneck": lambda: Residual(BottleneckBlock)}
RECIPES = {"seconds": Recipe.seconds(), "minutes": Recipe.minutes(1), "full": Recipe.full(1)}
PHASES = {
    "seconds": ["selection"],
    "minutes": ["selection", "relaxation"],
    "full": ["selection", "projections", "closed form", "relaxation", "fine-tuning"],
}


def made(net: str = "residual") -> nn.Module:
    return built(ALL[net])


def data(count: int = 2) -> list[Tensor]:
    return [images(6, seed=seed) for seed in range(count)]


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=0, msg=name)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _is_ours(thing: Any) -> bool:
    names = [getattr(kind, "__module__", "") for kind in (thing, *type(thing).__mro__)]
    return any(str(name).partition(".")[0] == "torchcap" for name in names)


# --------------------------------------------------------------------------------------------------
# What comes out, for every net and every ready recipe


@dataclass
class Done:
    """A run, and what was there before and after it."""

    model: nn.Module
    small: nn.Module
    before: tuple[Any, Any, Any]
    after: tuple[Any, Any, Any]
    progress: list[Progress]


@cache
def done(net: str, recipe: str) -> Done:
    model = made(net)
    progress: list[Progress] = []

    def state() -> tuple[Any, Any, Any]:
        numbers = {name: value.tolist() for name, value in values(model).items()}
        draws = torch.get_rng_state().tolist(), random.getstate()
        return fingerprint(model), numbers, draws

    before = state()
    small = torchcap.compress(model, data(), recipe=RECIPES[recipe], on_progress=progress.append)
    return Done(model, small, before, state(), progress)


@pytest.fixture(
    scope="module", params=[(net, recipe) for net in ALL for recipe in RECIPES], ids="-".join
)
def run(request: pytest.FixtureRequest) -> Done:
    return done(*request.param)


def test_model_and_random_state_are_unchanged(run: Done) -> None:
    assert run.before == run.after


def test_small_model_has_the_class_the_mode_and_the_widths_of_the_plan(run: Done) -> None:
    model, small = run.model, run.small
    expected = torchcap.materialize(torchcap.prepare(model, ratio=0.5, example_inputs=images()))
    assert type(small) is type(model)
    assert not any(module.training for module in small.modules())
    assert shapes(small) == shapes(expected)
    assert {type(m) for m in small.modules()} == {type(m) for m in expected.modules()}
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in small.parameters())


def test_small_model_runs_alone_and_learns(run: Done) -> None:
    small = copy.deepcopy(run.small)
    loss = F.cross_entropy(small(images()), labels())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in small.parameters())


def test_nothing_of_torchcap_is_left_in_the_small_model(run: Done) -> None:
    assert [thing for thing in reachable(run.small) if _is_ours(thing)] == []
    assert not any(parametrize.is_parametrized(module) for module in run.small.modules())
    assert not any(module._forward_hooks for module in run.small.modules())


@torch.no_grad()
def test_small_model_pickles(run: Done) -> None:
    again = pickle.loads(pickle.dumps(run.small))
    torch.testing.assert_close(again(images()), run.small(images()), rtol=0, atol=0)


def test_progress_of_every_training_rises_to_its_end(run: Done) -> None:
    for _, group in groupby(run.progress, key=lambda p: (p.name, p.steps)):
        told = list(group)
        total = told[0].steps
        steps = [progress.step for progress in told]
        assert steps == list(range(1, total + 1)) * (len(told) // total)
    assert all(math.isfinite(progress.loss) for progress in run.progress)


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_of_the_recipe_are_taken_in_its_order(recipe: str) -> None:
    names = [name for name, _ in groupby(p.name for p in done("residual", recipe).progress)]
    assert names == PHASES[recipe]


@pytest.mark.parametrize("net", ALL)
def test_closed_form_beats_the_same_plan_without_it(net: str) -> None:
    model, x = done(net, "seconds").model, torch.cat(data())
    plain = torchcap.compress(model, data(), recipe=Recipe(start=GreedySelection()))
    with torch.no_grad():
        errors = [relative_difference(m(x), model(x)) for m in (plain, done(net, "seconds").small)]
    assert errors[1] < errors[0]


# --------------------------------------------------------------------------------------------------
# Without data


@pytest.mark.parametrize("net", ALL)
def test_without_data_the_largest_weights_are_kept_and_nothing_is_learnt(net: str) -> None:
    model = made(net)
    small = torchcap.compress(model, example_inputs=images())
    expected = torchcap.materialize(torchcap.prepare(model, example_inputs=images()))
    with torch.no_grad():
        torch.testing.assert_close(small(images()), expected(images()), **EXACT)


def test_without_data_example_inputs_of_torchvision_models_may_be_left_out() -> None:
    model = torchvision.models.squeezenet1_1(num_classes=3).eval()
    assert torchcap.compress(model).features[0].out_channels == 32


def test_full_width_without_learning_is_the_model_itself() -> None:
    model = made()
    small = torchcap.compress(model, ratio=1.0, example_inputs=images())
    with torch.no_grad():
        torch.testing.assert_close(small(images()), model(images()), **EXACT)


# --------------------------------------------------------------------------------------------------
# What the result depends on


@pytest.mark.parametrize("net", ["plain", "bottleneck"])
@pytest.mark.parametrize("recipe", ["minutes", "full"])
def test_seed_alone_decides_what_is_drawn(net: str, recipe: str) -> None:
    torch.rand(3)  # the caller's own draws make no difference
    expected = values(done(net, recipe).small)
    again = torchcap.compress(made(net), data(), recipe=RECIPES[recipe])
    other = torchcap.compress(made(net), data(), recipe=RECIPES[recipe], seed=1)
    assert_same(values(again), expected)
    assert any(not torch.equal(value, expected[name]) for name, value in values(other).items())


@pytest.mark.parametrize("net", ["pre-activation", "dense"])
def test_mode_of_the_model_makes_no_difference_and_is_that_of_the_result(net: str) -> None:
    model = made(net).train()
    small = torchcap.compress(model, data(), recipe=RECIPES["full"])
    assert_same(values(small), values(done(net, "full").small))
    assert all(module.training for module in small.modules())


@pytest.mark.parametrize("traced", [False, True])
def test_modules_have_the_modes_of_the_models(*, traced: bool) -> None:
    model = fx.symbolic_trace(made()) if traced else made()
    model.block2.train()
    model.fc.train()
    small = torchcap.compress(model, data(), recipe=RECIPES["minutes"])
    modes = {path: module.training for path, module in model.named_modules()}
    assert {path: module.training for path, module in small.named_modules()} == {
        path: modes[path] for path, _ in small.named_modules()
    }


def test_frozen_parameters_stay_frozen_and_are_not_trained() -> None:
    model = made()
    model.fc.requires_grad_(requires_grad=False)
    recipe = Recipe(start=LargestNorm(), relaxation=Relaxation(epochs=1, batch_norm=True))
    small = torchcap.compress(model, data(), recipe=recipe)
    assert {name for name, p in small.named_parameters() if not p.requires_grad} == {
        "fc.weight",
        "fc.bias",
    }
    torch.testing.assert_close(small.fc.weight, model.fc.weight, rtol=0, atol=0)
    untrained = torchcap.compress(model, example_inputs=images())
    assert not torch.equal(small.conv.weight, untrained.conv.weight)


def test_plan_is_kept_to() -> None:
    model = made("plain")
    plan = Plan.of(torchcap.analyze(model, images()), {"features.3": 5, "classifier.0": 2})
    small = torchcap.compress(model, data(), plan=plan, recipe=RECIPES["full"])
    assert small.features[0].out_channels == 6
    assert small.features[3].out_channels == 5
    assert small.classifier[0].weight.shape == (2, 5 * 4)


@pytest.mark.parametrize("form", ["pairs", "by name", "loader"])
def test_form_of_the_data_makes_no_difference(form: str) -> None:
    batches: dict[str, Any] = {
        "pairs": [(x, labels(len(x))) for x in data()],
        "by name": [{"x": x, "labels": labels(len(x))} for x in data()],
        "loader": torch.utils.data.DataLoader(torch.cat(data()), 6),
    }
    small = torchcap.compress(made(), batches[form], recipe=RECIPES["minutes"])
    assert_same(values(small), values(done("residual", "minutes").small))


def test_labels_with_a_weight_are_learnt() -> None:
    wanted = 3
    batches = [(x, torch.full((len(x),), wanted)) for x in data()]
    alone = {"reconstruction": 0.0, "distillation": 0.0, "labels": 1.0}
    task = Relaxation(epochs=30, optimizer=Adam(1e-2), healing=1, **alone)
    small = torchcap.compress(made(), batches, recipe=Recipe(fine_tuning=task))
    with torch.no_grad():
        assert (small(torch.cat(data())).argmax(1) == wanted).double().mean() > 0.9


# --------------------------------------------------------------------------------------------------
# Starts and rounds

STARTS: dict[str, Callable[[], Any]] = {
    "largest": LargestNorm,
    "greedy": GreedySelection,
    "components": PrincipalComponents,
    "random": lambda: RandomOrthonormal(torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("net", ["plain", "separable"])
def test_every_start_leads_to_a_small_model_that_a_closed_form_improves(
    net: str, start: str
) -> None:
    model, x = made(net), torch.cat(data())
    start_alone, solved = (
        torchcap.compress(model, data(), recipe=Recipe(start=STARTS[start](), solve=solve))
        for solve in (None, ClosedForm(ridge=1e-4))
    )
    assert shapes(start_alone) == shapes(solved) == shapes(done(net, "seconds").small)
    with torch.no_grad():
        errors = [relative_difference(m(x), model(x)) for m in (start_alone, solved)]
    assert errors[1] < errors[0]


def rounds_of(net: str, rounds: Any) -> list[list[Progress]]:
    progress: list[Progress] = []
    recipe = Recipe(projections=Projections(epochs=1, rounds=rounds))
    small = torchcap.compress(made(net), data(), recipe=recipe, on_progress=progress.append)
    assert shapes(small) == shapes(done(net, "seconds").small)
    told = [p for p in progress if p.name == "projections"]
    return [told[i : i + told[0].steps] for i in range(0, len(told), told[0].steps)]


@pytest.mark.parametrize(
    ("net", "rounds", "count"),
    [
        ("plain", layer_by_layer, 3),
        ("plain", odd_then_even, 2),
        ("bottleneck", odd_then_even, 2),
        ("residual", odd_then_even, 1),
    ],
)
def test_rounds_follow_each_other(net: str, rounds: Any, count: int) -> None:
    turns = rounds_of(net, rounds)
    assert [[p.step for p in turn] for turn in turns] == [[1, 2]] * count
    assert all(p.steps == 2 for turn in turns for p in turn)


def test_projections_in_rounds_come_nearer_to_the_teacher() -> None:
    losses: list[list[float]] = []
    for epochs in (1, 10):
        told: list[Progress] = []
        steps = Projections(epochs=epochs, optimizer=Adam(1e-2, relative=False))
        recipe = Recipe(start=LargestNorm(), projections=steps)
        torchcap.compress(made("bottleneck"), data(), recipe=recipe, on_progress=told.append)
        losses.append([p.loss for p in told])
    assert sum(losses[1][-2:]) < sum(losses[0][:2])


# --------------------------------------------------------------------------------------------------
# Networks of timm and torchvision


def small_vgg() -> nn.Module:
    with torch.device("meta"):  # its own classifier has a hundred million weights
        model = torchvision.models.VGG(nn.Identity(), num_classes=10, init_weights=False)
    model.features = torchvision.models.vgg.make_layers([8, "M", 12, "M", 16], batch_norm=True)
    model.classifier = nn.Sequential(
        nn.Linear(16 * 49, 24), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(24, 10)
    )
    return model


LIBRARY: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: timm.models.ResNet(
        timm.models.resnet.BasicBlock, [2] * 4, channels=(16, 24, 32, 48), num_classes=10
    ),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "convnext": lambda: timm.create_model(
        "convnext_atto", num_classes=10, depths=(1, 1, 2, 1), ls_init_value=0.5
    ),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 3, 2), 16, num_classes=10),
    "vgg": small_vgg,
}


@pytest.mark.parametrize("name", LIBRARY)
def test_closed_form_beats_the_same_plan_without_it_on_library_networks(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LIBRARY[name]().eval()
        batches = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    errors = []
    # Little memory: kernels of many inputs are mixed instead of solved, which takes less time.
    for start in (GreedySelection(), ClosedForm(memory=2**24)):
        small = torchcap.compress(model, batches, recipe=Recipe(start=start))
        with torch.no_grad():
            errors.append(relative_difference(small(batches[0]), model(batches[0])))
        assert type(small) is type(model)
        assert sum(p.numel() for p in small.parameters()) < sum(
            p.numel() for p in model.parameters()
        )
    assert errors[1] < errors[0]


# --------------------------------------------------------------------------------------------------
# Bad input


@dataclass
class Bad:
    """A call that must be refused: its arguments, and what the error must say."""

    error: type[TorchcapError]
    says: str
    data: Callable[[], Any] = data
    how: Callable[[nn.Module], dict[str, Any]] = lambda _: {}
    make: Callable[[], nn.Module] = made
    change: Callable[[nn.Module], Any] = lambda model: model


def labelled(*given: int) -> Callable[[], list[Any]]:
    return lambda: [(images(4), torch.tensor(given))]


def spoilt() -> list[Tensor]:
    first, second = data()
    second[1, 2, 3, 4] = math.nan
    return [first, second]


def with_(**how: Any) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda _: how


def plan_of_another(_: nn.Module) -> dict[str, Any]:
    return {"plan": Plan.uniform(torchcap.analyze(built(Plain), images()))}


def full(**how: Any) -> Callable[[nn.Module], dict[str, Any]]:
    return with_(recipe=Recipe.full(1, **how))


WITH_LABELS = full(labels=1.0)
BAD: dict[str, Bad] = {
    # data
    "empty list": Bad(DataError, r"data is empty.*at least one batch", list),
    "a tensor": Bad(DataError, r"iterable of batches, got Tensor.*data=\[images\]", images),
    "a generator": Bad(DataError, r"only\s+once.*DataLoader", lambda: (x for x in data())),
    "NaN images": Bad(DataError, r"batch 0 .*NaN", lambda: [images() * math.nan]),
    "NaN in the second batch": Bad(DataError, r"batch 1 .*NaN", spoilt),
    "NaN in a later batch, full": Bad(DataError, r"batch 1 .*NaN", spoilt, full()),
    "uint8 images": Bad(
        DataError, r"batch 0 .*\(4, 3, 8, 8\) torch\.uint8", lambda: [images().to(torch.uint8)]
    ),
    "float32 images of a float64 model": Bad(
        DataError, r"batch 0 .*torch\.float32", lambda: [images().float()]
    ),
    "other channels": Bad(DataError, r"batch 0 .*\(4, 2, 8, 8\)", lambda: [images()[:, :2]]),
    "other channels later on": Bad(
        DataError, r"batch 2 .*\(4, 2, 8, 8\)", lambda: [*data(), images()[:, :2]]
    ),
    "strings": Bad(DataError, r"got str", lambda: ["cat.png"]),
    "label above": Bad(
        DataError, rf"label 5\b.*{CLASSES} classes.*0\.\.4", labelled(0, 1, 5, 2), WITH_LABELS
    ),
    "label below": Bad(DataError, r"label -1\b.*classes", labelled(0, -1, 4, 2), WITH_LABELS),
    "missing labels": Bad(DataError, r"labels.*batch 0 .*none", data, WITH_LABELS),
    # ratios and plans
    "ratio 0": Bad(PlanError, r"0 < ratio <= 1.*got 0\b", how=with_(ratio=0)),
    "ratio 2": Bad(PlanError, r"0 < ratio <= 1.*got 2\b", how=with_(ratio=2)),
    "ratio nan": Bad(PlanError, r"0 < ratio <= 1.*got nan", how=with_(ratio=math.nan)),
    "unknown space": Bad(
        PlanError,
        r"'Residual'.*'block1\.conf1'.*'block1\.conv1'",
        how=with_(ratio={"block1.conf1": 0.5}),
    ),
    "plan of another model": Bad(
        PlanError, r"'Residual'.*'features\.0'.*analyze\(model\)", how=plan_of_another
    ),
    "plan that is none": Bad(PlanError, r"Plan.*got dict", how=with_(plan={"block1.conv1": 3})),
    # recipes
    "closed form without data": Bad(
        RecipeError, r"'seconds'.*data=.*LargestNorm", lambda: None, with_(recipe=Recipe.seconds())
    ),
    "training without data": Bad(
        RecipeError,
        r"learns from images.*data=",
        lambda: None,
        with_(recipe=Recipe(start=LargestNorm(), relaxation=Relaxation())),
    ),
    "selection without data": Bad(
        DataError,
        r"block1\.conv1.*data",
        lambda: None,
        with_(recipe=Recipe(start=GreedySelection()), example_inputs=images()),
    ),
    "state saved every 0 steps": Bad(
        RecipeError, r"save_every.*at least 1.*got 0\b", how=with_(save_every=0)
    ),
    # models
    "frozen": Bad(
        ModelError,
        r"17 parameters of 'Residual' are frozen",
        how=with_(recipe=Recipe(relaxation=Relaxation())),
        change=lambda model: model.requires_grad_(requires_grad=False),
    ),
    "scripted": Bad(ModelError, r"ScriptModule'.*torch\.nn\.Module", change=torch.jit.script),
    "prepared": Bad(
        ModelError,
        r"already prepared",
        change=lambda model: torchcap.prepare(model, example_inputs=images()),
    ),
    "nothing to compress": Bad(
        NothingToCompressError,
        r"'Sequential'.*\n.*1: output of the model",
        make=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES)).double(),
    ),
}


@pytest.mark.parametrize("recipe", [Recipe.seconds(), None])
def test_frozen_model_is_compressed_without_training(recipe: Recipe | None) -> None:
    model = made().requires_grad_(requires_grad=False)
    data = None if recipe is None else [images()]
    small = torchcap.compress(model, data, example_inputs=images(), recipe=recipe)
    assert not any(parameter.requires_grad for parameter in small.parameters())
    model.requires_grad_(requires_grad=True)
    expected = torchcap.compress(model, data, example_inputs=images(), recipe=recipe)
    assert_same(values(small), values(expected))


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case: str) -> None:
    bad = BAD[case]
    model = bad.change(bad.make())
    given, how = bad.data(), bad.how(model)
    before, numbers, state = fingerprint(model), values(model), torch.get_rng_state()
    kept = [t.clone() for t in given if isinstance(t, Tensor)] if isinstance(given, list) else []
    with pytest.raises(bad.error, match=f"(?s){bad.says}"):
        torchcap.compress(model, given, **how)
    assert fingerprint(model) == before
    assert_same(values(model), numbers)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(kept, given if kept else [], strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("labels_given", [(), (0, 1, 5, 2)])
def test_labels_are_checked_before_any_work(labels_given: tuple[int, ...]) -> None:
    given = labelled(*labels_given)() if labels_given else data()
    seen: list[Progress] = []
    with pytest.raises(DataError, match=r"label"):
        torchcap.compress(made(), given, **WITH_LABELS(made()), on_progress=seen.append)
    assert seen == []


class Spent:
    """Batches that can be passed over only once, and don't say so."""

    def __init__(self) -> None:
        self.left = iter(data())

    def __iter__(self) -> Iterator[Tensor]:
        return self.left


def test_data_that_is_used_up_is_refused() -> None:
    with pytest.raises(DataError, match=r"data is empty"):
        torchcap.compress(made(), Spent())


@pytest.mark.parametrize(
    "recipe", [Recipe.seconds(), Recipe(start=torchcap.GreedySelection())], ids=["own", "greedy"]
)
def test_dead_channels_go_first_however_alike_the_others_are(recipe: Recipe) -> None:
    """Two inputs make 16 channels that replace each other almost perfectly, beside 16 of zeros."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.GELU(), nn.Linear(32, 4)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
        model[0].weight[16:], model[0].bias[16:] = 0, 0
    x = torch.randn(2048, 2, generator=generator, dtype=torch.float64)
    small = torchcap.compress(model, [x], ratio=0.5, recipe=recipe)
    assert bool(small[0].weight.any(1).all())
    assert relative_difference(small(x), model(x)) <= 1e-10


class Unspeakable(nn.Sequential):
    """A model that cannot say what it is."""

    def __repr__(self) -> str:
        raise RuntimeError("not yet")


def test_a_model_need_not_be_printable() -> None:
    model = Unspeakable(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    small = torchcap.compress(model, [torch.randn(2, 3, 8, 8)], recipe=Recipe.seconds())
    assert small[0].out_channels == 4


class KeepsItsGrid(nn.Module):
    """Makes a grid for the size that it sees, which takes a look at a value, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.stride, self.size, self.grid = torch.ones(1), None, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.first(x).relu())
        if self.size != y.shape[-2:]:
            self.size = y.shape[-2:]
            self.grid = y.new_full(self.size, float(self.stride[0]))
        return y * self.grid


def test_a_model_that_has_run_and_keeps_what_it_made_for_that_size() -> None:
    model, image = KeepsItsGrid().eval(), torch.randn(2, 3, 32, 32)
    model(image)
    student = torchcap.prepare(model, ratio=0.5, example_inputs=image)
    small = torchcap.materialize(student)
    assert small.first.out_channels == 4
    for x in (image, image[:, :, :16]):
        torch.testing.assert_close(small(x), student(x))
