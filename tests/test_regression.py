"""Ridge regression from moments against least squares on the rows themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from torchcap.projection.moments import JointMoments
from torchcap.training.regression import RIDGES, Affine, choose_ridge, regress, spread

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4))
PROPERTY = settings(deadline=None, max_examples=50, print_blob=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_affine(groups: int, inputs: int, outputs: int, seed: int = 0) -> Affine:
    return Affine(random(groups, inputs, outputs, seed=seed), random(groups, outputs, seed=seed))


def moments_of(rows: Tensor, targets: Tensor) -> JointMoments:
    moments = JointMoments(len(rows), rows.shape[2], targets.shape[2])
    moments.update(rows, targets)
    return moments


def applied(affine: Affine, rows: Tensor) -> Tensor:
    return rows @ affine.weight + affine.bias.unsqueeze(1)


def least_squares(rows: Tensor, targets: Tensor, ridge: Tensor, start: Affine) -> Affine:
    """The affine map by definition: rows of the ridge below those of the data, all centred."""
    n, inputs = rows.shape[1:]
    centred, t = (v - v.mean(1, keepdim=True) for v in (rows, targets))
    pull = (n * ridge).sqrt()[:, None, None] * torch.eye(inputs, dtype=rows.dtype)
    stacked = torch.cat([centred, pull], 1), torch.cat([t, pull @ start.weight], 1)
    weight = torch.linalg.lstsq(*stacked).solution
    return Affine(weight, targets.mean(1) - (rows.mean(1, keepdim=True) @ weight)[:, 0])


def assert_same(ours: Affine, theirs: Affine) -> None:
    assert_close(ours.weight, theirs.weight, rtol=1e-7, atol=1e-8)
    assert_close(ours.bias, theirs.bias, rtol=1e-7, atol=1e-8)


# --------------------------------------------------------------------------------------------------
# The solution


@PROPERTY
@given(seed=SEEDS, sizes=SIZES, ridge=st.sampled_from([1e-6, 1e-2, 1.0, 30.0]))
def test_solution_is_that_of_least_squares_on_the_rows(seed, sizes, ridge):
    groups, inputs, outputs = sizes
    rows, targets = random(groups, 40, inputs, seed=seed) + 1, random(groups, 40, outputs, seed=7)
    start = random_affine(*sizes, seed=seed)
    scale = rows.var(1, correction=0).mean(1)
    found = regress(moments_of(rows, targets), start, ridge=ridge)
    assert_same(found, least_squares(rows, targets, ridge * scale, start))


@PROPERTY
@given(seed=SEEDS, sizes=SIZES)
def test_an_affine_map_is_recovered_from_any_start(seed, sizes):
    groups, inputs, _ = sizes
    truth, start = random_affine(*sizes, seed=seed), random_affine(*sizes, seed=seed + 1)
    rows = random(groups, 60, inputs, seed=seed) + 3
    found = regress(moments_of(rows, applied(truth, rows)), start, ridge=1e-12)
    assert_same(found, truth)


@PROPERTY
@given(seed=SEEDS, sizes=SIZES)
def test_without_an_intercept_a_linear_map_is_recovered_and_the_bias_stays(seed, sizes):
    groups, inputs, _ = sizes
    truth, start = random_affine(*sizes, seed=seed), random_affine(*sizes, seed=seed + 1)
    rows = random(groups, 60, inputs, seed=seed) + 3
    moments = moments_of(rows, rows @ truth.weight)
    found = regress(moments, start, ridge=1e-12, intercept=False)
    assert_same(found, Affine(truth.weight, start.bias))


@pytest.mark.parametrize("intercept", [True, False])
def test_an_infinite_ridge_keeps_the_weight_of_the_start(intercept):
    rows, targets, start = random(2, 40, 5), random(2, 40, 3, seed=1), random_affine(2, 5, 3)
    found = regress(moments_of(rows, targets), start, ridge=1e12, intercept=intercept)
    assert_close(found.weight, start.weight, rtol=1e-9, atol=1e-9)
    if intercept:  # which no ridge holds back: the mean of what is left is zero
        assert_close(applied(found, rows).mean(1), targets.mean(1))


def test_directions_that_the_data_does_not_show_stay_as_they_are():
    shown, hidden = torch.eye(5, dtype=torch.float64).split([3, 2])
    rows, start, truth = random(1, 40, 3) @ shown, random_affine(1, 5, 2), random_affine(1, 5, 2, 1)
    found = regress(moments_of(rows, applied(truth, rows)), start, ridge=1e-9)
    assert_close(hidden @ found.weight[0], hidden @ start.weight[0])
    assert_close(shown @ found.weight[0], shown @ truth.weight[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e3])
def test_inputs_that_are_constant_keep_their_weight(value, ridge):
    start = random_affine(1, 6, 3)
    rows = torch.full((1, 50, 6), value, dtype=torch.float64) / 3  # which rounds when centred
    targets = random(1, 50, 3, seed=1)
    found = regress(moments_of(rows, targets), start, ridge=ridge)
    assert_close(found.weight, start.weight, rtol=1e-2, atol=1e-2)
    assert_close(applied(found, rows)[:, 0], targets.mean(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, 1e3, 1e6])
def test_a_large_constant_input_does_not_hide_small_ones(value):
    truth, rows = random_affine(1, 6, 3), 1e-3 * random(1, 50, 6)
    rows[..., 2] = value
    start = Affine(truth.weight.clone(), truth.bias)
    start.weight[:, 3:] = 0.0
    found = regress(moments_of(rows, applied(truth, rows)), start, ridge=1e-9)
    assert_close(found.weight, truth.weight, rtol=1e-3, atol=1e-3)


@PROPERTY
@given(seed=SEEDS, sizes=SIZES, ridge=st.sampled_from(RIDGES))
def test_scaled_inputs_get_weights_scaled_the_other_way(seed, sizes, ridge):
    groups, inputs, outputs = sizes
    rows, targets = random(groups, 30, inputs, seed=seed), random(groups, 30, outputs, seed=seed)
    start = random_affine(*sizes, seed=seed)
    found = regress(moments_of(rows, targets), start, ridge=ridge)
    smaller = Affine(start.weight * 1e3, start.bias)
    scaled = regress(moments_of(rows / 1e3, targets), smaller, ridge=ridge)
    assert_same(Affine(scaled.weight / 1e3, scaled.bias), found)


# --------------------------------------------------------------------------------------------------
# With some inputs only


@st.composite
def masks(draw) -> tuple[Tensor, tuple[int, int, int], int]:
    groups, inputs, outputs = draw(SIZES)
    kept = draw(st.integers(0, inputs))
    seed = draw(SEEDS)
    order = random(groups, inputs, seed=seed).argsort(1)
    return order < kept, (groups, inputs, outputs), seed  # as many in every group


@PROPERTY
@given(case=masks(), ridge=st.sampled_from([1e-6, 1e-2, 1.0]), intercept=st.booleans())
def test_absent_inputs_are_as_if_there_were_no_such_inputs(case, ridge, intercept):
    present, (groups, inputs, outputs), seed = case
    rows = 0.05 * random(groups, 40, inputs, seed=seed) + 0.02  # far from the size of a one
    targets, start = random(groups, 40, outputs, seed=seed), random_affine(groups, inputs, outputs)
    moments = moments_of(rows, targets)
    found = regress(moments, start, ridge=ridge, intercept=intercept, present=present)
    assert torch.equal(found.weight[~present], torch.zeros_like(found.weight[~present]))
    if not present.any():
        return
    width = int(present[0].sum())
    part = rows.mT[present].reshape(groups, width, 40).mT
    restricted = Affine(start.weight[present].reshape(groups, width, outputs), start.bias)
    alone = regress(moments_of(part, targets), restricted, ridge=ridge, intercept=intercept)
    assert_same(Affine(found.weight[present].reshape(alone.weight.shape), found.bias), alone)


@PROPERTY
@given(case=masks())
def test_without_a_ridge_the_present_inputs_get_the_optimum(case):
    present, (groups, inputs, outputs), seed = case
    rows, targets = random(groups, 60, inputs, seed=seed) + 1, random(groups, 60, outputs, seed=9)
    start = random_affine(groups, inputs, outputs, seed=seed)
    found = regress(moments_of(rows, targets), start, ridge=1e-12, present=present)
    for group, mask in enumerate(present):
        ones = torch.ones(60, 1, dtype=torch.float64)
        design = torch.cat([rows[group][:, mask], ones], 1)
        solution = torch.linalg.lstsq(design, targets[group]).solution
        assert_close(found.weight[group][mask], solution[:-1])
        assert_close(found.bias[group], solution[-1])


def test_spread_is_the_covariance_with_the_ridge_on_its_diagonal():
    rows = random(2, 30, 4) + 2
    H, regular = spread(moments_of(rows, rows), ridge=0.1)
    for group in range(2):
        exact = rows[group].mT.cov(correction=0)
        assert_close(H[group], exact)
        ridge = 0.1 * exact.diagonal().mean() * torch.eye(4, dtype=torch.float64)
        assert_close(regular[group], exact + ridge)


# --------------------------------------------------------------------------------------------------
# Errors, and the ridge that they choose


@PROPERTY
@given(seed=SEEDS, sizes=SIZES, n=st.integers(1, 20))
def test_error_is_the_mean_square_that_is_left(seed, sizes, n):
    groups, inputs, outputs = sizes
    rows, targets = random(groups, n, inputs, seed=seed) + 1, random(groups, n, outputs, seed=1)
    affine = random_affine(*sizes, seed=seed)
    left = (targets - applied(affine, rows)).square().sum() / targets.square().sum()
    assert affine.error(moments_of(rows, targets)) == pytest.approx(float(left), rel=1e-9)


def test_error_of_what_is_exact_is_zero_and_never_negative():
    rows, affine = random(2, 50, 4), random_affine(2, 4, 3)
    assert 0 <= affine.error(moments_of(rows, applied(affine, rows))) < 1e-14


def test_error_on_targets_of_zero_is_none():
    rows = random(1, 50, 4)
    assert random_affine(1, 4, 3).error(moments_of(rows, torch.zeros(1, 50, 3))) == 0


@PROPERTY
@given(seed=SEEDS, sizes=SIZES, ridge=st.sampled_from(RIDGES), intercept=st.booleans())
def test_a_solution_is_never_worse_than_its_start_on_its_own_data(seed, sizes, ridge, intercept):
    groups, inputs, outputs = sizes
    moments = moments_of(random(groups, 8, inputs, seed=seed), random(groups, 8, outputs, seed=1))
    start = random_affine(*sizes, seed=seed)
    start = start if intercept else Affine(start.weight, torch.zeros_like(start.bias))
    found = regress(moments, start, ridge=ridge, intercept=intercept)
    assert found.error(moments) <= start.error(moments) + 1e-12


def halves(rows: Tensor, targets: Tensor) -> list[JointMoments]:
    middle = rows.shape[1] // 2
    return [moments_of(rows[:, p], targets[:, p]) for p in (slice(middle), slice(middle, None))]


@pytest.mark.parametrize("seed", range(5))
def test_scarce_noise_around_a_true_start_is_left_alone(seed):
    truth, rows = random_affine(1, 10, 30, seed), random(1, 16, 10, seed=seed + 50)
    noise = random(1, 16, 30, seed=seed + 99)
    assert choose_ridge(halves(rows, applied(truth, rows) + noise), truth, regress) is None


@pytest.mark.parametrize("seed", range(5))
def test_plenty_of_data_far_from_the_start_gets_a_small_ridge(seed):
    truth, start = random_affine(1, 10, 3, seed), random_affine(1, 10, 3, seed + 50)
    rows = random(1, 2000, 10, seed=seed)
    noise = 0.01 * random(1, 2000, 3, seed=seed + 99)
    ridge = choose_ridge(halves(rows, applied(truth, rows) + noise), start, regress)
    assert ridge in RIDGES[:2]


def test_a_good_start_and_little_data_get_a_ridge_between():
    truth, rows = random_affine(1, 10, 3), random(1, 24, 10)
    start = Affine(truth.weight + 0.5 * random(1, 10, 3, seed=8), truth.bias)
    noise = 0.7 * random(1, 24, 3, seed=9)
    assert choose_ridge(halves(rows, applied(truth, rows) + noise), start, regress) == RIDGES[-1]


@PROPERTY
@given(seed=SEEDS)
def test_the_chosen_ridge_predicts_the_other_half_best(seed):
    rows, targets = random(1, 30, 8, seed=seed), random(1, 30, 2, seed=1)
    start = Affine(0.3 * random(1, 8, 2, seed=2), random(1, 2, seed=3))
    first, second = parts = halves(rows, targets + rows[..., :2])
    errors = {None: start.error(first) + start.error(second)}
    for ridge in RIDGES:
        fits = [regress(part, start, ridge=ridge) for part in parts]
        errors[ridge] = fits[0].error(second) + fits[1].error(first)
    assert choose_ridge(parts, start, regress) == min(errors, key=errors.get)


def test_one_half_without_rows_leaves_nothing_to_compare():
    moments, empty = moments_of(random(1, 9, 3), random(1, 9, 2)), JointMoments(1, 3, 2)
    assert choose_ridge([moments, empty], random_affine(1, 3, 2), regress) in RIDGES
