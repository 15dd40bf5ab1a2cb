"""Recipes: steps as data, their optimizers, and what is done to images on the way."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchcap import (
    SGD,
    Adam,
    ClosedForm,
    FlipAndShift,
    LargestNorm,
    Mix,
    Projections,
    RandomOrthonormal,
    Recipe,
    RecipeError,
    Relaxation,
    compress,
    layer_by_layer,
    odd_then_even,
)
from torchcap.training.recipe import Training

EXACT = {"rtol": 0, "atol": 0}
TRAININGS = pytest.mark.parametrize("kind", [Training, Projections, Relaxation])

# --------------------------------------------------------------------------------------------------
# Values out of range

NO_WEIGHT = {"reconstruction": 0, "distillation": 0.0, "labels": 0}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no epochs": ({"epochs": 0}, r"epochs.*got 0\b.*None"),
    "negative epochs": ({"epochs": -1}, r"epochs.*got -1\b"),
    "half an epoch": ({"epochs": 2.5}, r"epochs.*integer.*got 2\.5"),
    "epochs True": ({"epochs": True}, r"epochs.*got True"),
    "epochs of text": ({"epochs": "3"}, r"epochs.*got '3'"),
    "negative reconstruction": ({"reconstruction": -1.0}, r"negative.*reconstruction=-1\.0"),
    "negative distillation": ({"distillation": -0.5}, r"negative.*distillation=-0\.5"),
    "negative labels": ({"labels": -2}, r"negative.*labels=-2"),
    "NaN reconstruction": ({"reconstruction": math.nan}, r"reconstruction=nan"),
    "NaN distillation": ({"distillation": math.nan}, r"distillation=nan"),
    "NaN labels": ({"labels": math.nan}, r"labels=nan"),
    "no loss": (NO_WEIGHT, r"one of them must be positive.*reconstruction=0.*labels=0"),
    "temperature 0": ({"temperature": 0}, r"temperature.*positive.*got 0\b"),
    "negative temperature": ({"temperature": -4.0}, r"temperature.*got -4\.0"),
    "NaN temperature": ({"temperature": math.nan}, r"temperature.*got nan"),
    "clip 0": ({"clip": 0}, r"clip.*positive or None.*got 0\b"),
    "negative clip": ({"clip": -1.0}, r"clip.*got -1\.0"),
    "warmup above 1": ({"warmup": 1.5}, r"warmup.*0 to 1.*got 1\.5"),
    "negative warmup": ({"warmup": -0.1}, r"warmup.*got -0\.1"),
    "healing 0": ({"healing": 0}, r"healing.*at least 1.*got 0\b"),
    "labels of mixed images": ({"labels": 0.5, "augment": (Mix(),)}, r"labels=0\.5.*Mix\(\)"),
}
REFUSED_CLOSED: dict[str, tuple[dict[str, Any], str]] = {
    "ridge 0": ({"ridge": 0.0}, r"ridge.*positive or None.*got 0\.0"),
    "negative ridge": ({"ridge": -1e-3}, r"ridge.*got -0\.001"),
    "NaN ridge": ({"ridge": math.nan}, r"ridge.*got nan"),
    "little memory": ({"memory": 1024}, r"memory.*bytes.*got 1024"),
    "NaN memory": ({"memory": math.nan}, r"memory.*got nan"),
    "no batches": ({"batches": 0}, r"batches.*at least 1.*got 0\b"),
    "negative batches": ({"batches": -3}, r"batches.*got -3\b"),
    "half a batch": ({"batches": 1.5}, r"batches.*got 1\.5"),
}


@TRAININGS
@pytest.mark.parametrize("case", REFUSED)
def test_training_out_of_range_is_refused_by_name_and_value(
    kind: type[Training], case: str
) -> None:
    values, says = REFUSED[case]
    with pytest.raises(RecipeError, match=says):
        kind(**values)
    with pytest.raises(RecipeError, match=says):
        kind().but(**values)


@pytest.mark.parametrize("case", REFUSED_CLOSED)
def test_closed_form_out_of_range_is_refused_by_name_and_value(case: str) -> None:
    values, says = REFUSED_CLOSED[case]
    with pytest.raises(RecipeError, match=says):
        ClosedForm(**values)
    with pytest.raises(RecipeError, match=says):
        ClosedForm().but(**values)


@TRAININGS
@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 1},
        {"reconstruction": 0.0},
        {"reconstruction": 0.0, "distillation": 0.0, "labels": 1.0},
        {"labels": 1.0, "augment": (FlipAndShift(),)},
        {"clip": 1e-6},
        {"warmup": 0},
        {"warmup": 1},
    ],
)
def test_values_at_the_ends_of_their_ranges_are_taken(
    kind: type[Training], values: dict[str, Any]
) -> None:
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


# --------------------------------------------------------------------------------------------------
# Recipes as data


@pytest.mark.parametrize("make", [Training, Projections, Relaxation, ClosedForm, Recipe])
def test_equal_values_make_equal_steps(make: type) -> None:
    assert make() == make()
    assert make().but() == make()


def test_but_changes_the_values_that_it_names_alone() -> None:
    plain = Projections(temperature=3.0)
    changed = plain.but(epochs=7, rounds=layer_by_layer)
    assert changed != plain
    assert (changed.epochs, changed.rounds, changed.temperature) == (7, layer_by_layer, 3.0)
    assert changed.but(epochs=plain.epochs, rounds=odd_then_even) == plain
    assert ClosedForm(batches=2).but(ridge=0.5) == ClosedForm(batches=2, ridge=0.5)


def test_steps_and_recipes_do_not_change_in_place() -> None:
    for made in (Projections(), Relaxation(), ClosedForm(), Recipe()):
        name = dataclasses.fields(made)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, name, None)


def test_recipe_that_was_changed_is_a_recipe_of_its_own() -> None:
    recipe = Recipe.full(2)
    changed = recipe.but(projections=None, fine_tuning=Relaxation(epochs=9))
    assert changed.projections is None
    assert changed.fine_tuning == Relaxation(epochs=9)
    assert (changed.start, changed.solve, changed.relaxation) == (
        recipe.start,
        recipe.solve,
        recipe.relaxation,
    )
    assert (recipe.name, changed.name, recipe.but(name="mine").name) == ("full", "custom", "mine")


def test_text_of_a_recipe_names_every_step_and_value() -> None:
    recipe = Recipe.full(10, labels=0.25).but(
        projections=Projections(rounds=layer_by_layer), solve=None
    )
    first, *lines = str(recipe).splitlines()
    steps = dict(line.split(maxsplit=1) for line in lines)
    assert "custom" in first
    assert list(steps) == ["start", "projections", "solve", "relaxation", "fine_tuning"]
    assert steps["start"].startswith("ClosedForm(")
    assert "rounds=layer_by_layer" in steps["projections"]
    assert steps["solve"] == "-"
    assert "epochs=10" in steps["relaxation"]
    assert "Mix(" in steps["relaxation"]
    assert "labels=0.25" in steps["fine_tuning"]


def test_text_tells_recipes_of_other_values_apart() -> None:
    texts = [
        str(Recipe(relaxation=Relaxation(optimizer=optimizer, epochs=epochs), start=start))
        for optimizer in (Adam(1e-2), Adam(1e-3), Adam(1e-3, relative=False), SGD(1e-2))
        for epochs in (1, 2)
        for start in (ClosedForm(), ClosedForm(batches=2), LargestNorm())
    ]
    assert len(set(texts)) == len(texts)


def test_text_is_that_of_an_equal_recipe_made_elsewhere() -> None:
    def made(seed: int) -> str:
        start = RandomOrthonormal(torch.Generator().manual_seed(seed))
        changes = (partial(torch.flip, dims=(3,)), lambda x: x, Own(), Mix())
        return str(Recipe(start=start, relaxation=Relaxation(augment=changes)))

    assert made(0) == made(0)
    assert made(0) != made(1)
    assert "0x" not in made(0)  # no place in memory


class Own:
    """A change of the user's own, without a text of its own."""

    def __call__(self, images: Tensor) -> Tensor:
        return images


def test_ready_recipes_take_the_steps_that_their_names_promise() -> None:
    steps = {
        recipe.name: [
            part.name
            for part in dataclasses.fields(recipe)[1:-1]
            if getattr(recipe, part.name) is not None
        ]
        for recipe in (Recipe.seconds(), Recipe.minutes(), Recipe.full())
    }
    assert steps == {
        "seconds": [],
        "minutes": ["relaxation"],
        "full": ["projections", "solve", "relaxation", "fine_tuning"],
    }
    for recipe in (Recipe.seconds(), Recipe.minutes(), Recipe.full()):
        assert recipe.start == ClosedForm()
        assert recipe.needs_data


@pytest.mark.parametrize("epochs", [1, 4, 100])
def test_ready_recipes_train_for_the_epochs_that_are_asked_for(epochs: int) -> None:
    minutes, full = Recipe.minutes(epochs), Recipe.full(epochs)
    assert minutes.relaxation.epochs == epochs
    assert full.relaxation.epochs == full.fine_tuning.epochs == epochs
    assert full.projections.epochs >= 1


def test_labels_of_the_full_recipe_are_for_its_fine_tuning_alone() -> None:
    weighted = Recipe.full(2, labels=0.5)
    assert weighted.fine_tuning.labels == 0.5
    assert not any(isinstance(change, Mix) for change in weighted.fine_tuning.augment)
    for step in (weighted.projections, weighted.relaxation, Recipe.full(2).fine_tuning):
        assert step.labels == 0
    with pytest.raises(RecipeError, match=r"epochs.*got 0"):
        Recipe.minutes(0)


def test_data_is_needed_by_every_step_but_a_start_from_the_weights() -> None:
    weights = Recipe(start=LargestNorm())
    assert not weights.needs_data
    for step in (
        {"projections": Projections()},
        {"solve": ClosedForm()},
        {"relaxation": Relaxation()},
        {"fine_tuning": Relaxation()},
        {"start": ClosedForm()},
    ):
        assert weights.but(**step).needs_data


# --------------------------------------------------------------------------------------------------
# Images


def pictures(count: int = 6, height: int = 8, width: int = 12, **kwargs: Any) -> Tensor:
    """Every pixel has a number of its own."""
    return torch.arange(count * 2 * height * width, **kwargs).reshape(count, 2, height, width)


def drawn(change: Any, x: Tensor, seed: int = 0) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return change(x)


sides = st.integers(1, 13)


@settings(deadline=None, max_examples=40, print_blob=True)
@given(sides, sides, st.floats(0, 1), st.floats(0, 2), st.integers(0, 99))
def test_flip_and_shift_keeps_shape_dtype_and_the_pixels_values(
    height: int, width: int, flip: float, shift: float, seed: int
) -> None:
    x = pictures(3, height, width, dtype=torch.float64)
    y = drawn(FlipAndShift(flip, shift), x, seed)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    for ours, theirs in zip(y.flatten(0, 1), x.flatten(0, 1), strict=True):
        assert set(ours.flatten().tolist()) <= set(theirs.flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_images_of_every_precision_keep_it(dtype: torch.dtype) -> None:
    x = torch.rand(4, 3, 8, 8, dtype=dtype)
    assert drawn(FlipAndShift(), x).dtype == drawn(Mix(), x).dtype == dtype


def test_certain_flip_without_a_shift_is_the_mirrored_image() -> None:
    x = pictures(dtype=torch.float32)
    torch.testing.assert_close(drawn(FlipAndShift(1.0, 0.0), x), x.flip(3), **EXACT)
    torch.testing.assert_close(drawn(FlipAndShift(0.0, 0.0), x), x, **EXACT)


def test_flip_is_drawn_for_each_image_by_its_chance() -> None:
    x = pictures(400, 1, 2, dtype=torch.float32)
    flipped = (drawn(FlipAndShift(0.3, 0.0), x) != x).flatten(1)
    assert bool((flipped.all(1) == flipped.any(1)).all())
    assert 0.2 < float(flipped.any(1).double().mean()) < 0.4  # three standard errors are 0.07


def test_shift_moves_whole_images_by_a_share_of_each_side_at_most() -> None:
    down, right = 1, 3  # an eighth of 8 rows, and of 24 columns
    x = pictures(200, 8, 24, dtype=torch.float32)
    moved = drawn(FlipAndShift(0.0, 1 / 8), x)
    inside = (slice(None), slice(down, -down), slice(right, -right))
    # Each pixel's number says where it stood: in the middle all of them moved by one vector.
    steps = (moved - x).flatten(1, 1)[:, *inside].flatten(1)
    assert bool((steps == steps[:, :1]).all())
    found = {int(step) for step in steps[:, 0]}
    allowed = {24 * i + j for i in range(-down, down + 1) for j in range(-right, right + 1)}
    assert found == allowed


def test_border_of_a_shifted_image_is_mirrored() -> None:
    x = pictures(100, 1, 8, dtype=torch.float32)
    row = x[0, 0, 0]
    expected = {
        tuple(row[[abs(i) if i < 8 else 14 - i for i in range(s, s + 8)]].tolist())
        for s in (-1, 0, 1)
    }
    found = (drawn(FlipAndShift(0.0, 1 / 8), x) - x[:, :, :, :1])[:, 0, 0]
    assert {tuple(r) for r in found.tolist()} == expected


@pytest.mark.parametrize("change", [FlipAndShift(), Mix()])
def test_changes_follow_from_the_seed(change: Any) -> None:
    x = pictures(dtype=torch.float32)
    torch.testing.assert_close(drawn(change, x, 1), drawn(change, x, 1), **EXACT)
    assert not torch.equal(drawn(change, x, 1), drawn(change, x, 2))


def test_what_is_no_batch_of_images_is_neither_flipped_nor_shifted() -> None:
    x = pictures(dtype=torch.float32)[0]
    assert drawn(FlipAndShift(1.0, 0.5), x) is x


def test_images_given_stay_as_they_are() -> None:
    x = pictures(dtype=torch.float32)
    before = x.clone()
    for change in (FlipAndShift(1.0, 0.25), Mix()):
        drawn(change, x)
    torch.testing.assert_close(x, before, **EXACT)


@settings(deadline=None, max_examples=30, print_blob=True)
@given(st.integers(1, 7), st.floats(0, 1), st.integers(0, 99))
def test_mixed_image_lies_between_two_of_its_batch(count: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 3, 4, generator=generator, dtype=torch.float64)
    y, other = drawn(Mix(share), x, seed), x.flip(0)
    own = ((y - other) / (x - other)).flatten(1)
    own = own[x.flatten(1).ne(other.flatten(1)).all(1)]  # the middle one of an odd number is alone
    torch.testing.assert_close(own, own[:, :1].expand_as(own), rtol=0, atol=1e-6)
    assert bool(((own > -1e-6) & (own < 1 + 1e-6)).all())
    assert y.shape == x.shape


def test_mixing_no_share_of_the_images_changes_nothing() -> None:
    x = pictures(dtype=torch.float64)
    torch.testing.assert_close(drawn(Mix(0.0), x), x, **EXACT)


def test_share_of_the_images_is_mixed() -> None:
    x = pictures(400, 1, 2, dtype=torch.float64)
    mixed = (drawn(Mix(0.25), x) != x).flatten(1).all(1)
    assert 0.18 < float(mixed.double().mean()) < 0.32


# --------------------------------------------------------------------------------------------------
# Optimizers


def parameters(*scales: float) -> list[nn.Parameter]:
    return [nn.Parameter(scale * torch.tensor([1.0, -1.0, 1.0, -1.0])) for scale in scales]


def step(optimizer: torch.optim.Optimizer, gradient: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


def test_relative_steps_are_shares_of_each_tensors_size() -> None:
    scales = 0.01, 1.0, 300.0, 0.0
    tensors = parameters(*scales)
    before = [t.detach().clone() for t in tensors]
    step(Adam(0.1)(tensors), gradient=5.0)
    # Adam's first step has the step size as its length; a tensor of zeros has no size of its own.
    for scale, tensor, old in zip(scales, tensors, before, strict=True):
        expected = torch.full((4,), -0.1 * (scale or 1.0))
        torch.testing.assert_close(tensor.detach() - old, expected, rtol=1e-4, atol=0)


def test_absolute_steps_are_the_same_for_all() -> None:
    tensors = parameters(0.01, 300.0)
    optimizer = Adam(0.1, (0.5, 0.9), relative=False)(tensors)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.9)}


def test_every_tensor_has_a_step_size_that_a_schedule_can_change() -> None:
    optimizer = Adam(0.1)(parameters(1.0, 2.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.1])


def test_sgd_takes_steps_against_the_gradient_with_nesterovs_momentum() -> None:
    (tensor,) = parameters(1.0)
    before = tensor.detach().clone()
    step(SGD(0.1, momentum=0.9)([tensor]), gradient=2.0)
    torch.testing.assert_close(tensor.detach(), before - 0.1 * (2.0 + 0.9 * 2.0))
    (plain,) = parameters(1.0)
    step(SGD(0.1, momentum=0.0, weight_decay=0.5)([plain]), gradient=2.0)
    torch.testing.assert_close(plain.detach(), before - 0.1 * (2.0 + 0.5 * before))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda: Recipe.minutes().but(relax=Relaxation()), "Recipe has no 'relax'.*'relaxation'"),
        (lambda: Relaxation().but(epoch=1), "Relaxation has no 'epoch'.*'epochs'"),
        (lambda: ClosedForm().but(zzz=1), "ClosedForm has no 'zzz'; it has ridge, memory, batches"),
        (lambda: Recipe(relaxation=5), "relaxation of a recipe is a Relaxation"),
        (lambda: Recipe(solve=Relaxation()), "solve of a recipe is a ClosedForm"),
        (lambda: Recipe(start=None), "start of a recipe is a ClosedForm or an initializer"),
    ],
)
def test_values_that_there_are_not_are_refused(change, problem):
    with pytest.raises(RecipeError, match=problem):
        change()


def test_recipe_is_no_word():
    with pytest.raises(RecipeError, match=r"torchcap\.Recipe, got 'seconds'; take Recipe\.seconds"):
        compress(nn.Conv2d(3, 4, 1), [torch.zeros(1, 3, 4, 4)], recipe="seconds")
