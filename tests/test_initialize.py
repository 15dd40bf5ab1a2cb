"""Initializers against brute force: least squares on every candidate, spans of known features."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from torchcap.errors import DataError, PlanError
from torchcap.projection import initialize
from torchcap.projection.initialize import (
    Elimination,
    GreedySelection,
    Initializer,
    LargestNorm,
    PrincipalComponents,
    RandomOrthonormal,
    Readout,
    SpaceContext,
    selection_matrix,
)

SEEDS = st.integers(0, 2**32 - 1)
RIDGE = 1e-4


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def random_moment(features: int, seed: int = 0) -> Tensor:
    rows = random(3 * features, features, seed=seed)
    return rows.mT @ rows / len(rows)


def kept(basis: Tensor) -> list[list[int]]:
    """Indices of the kept channels of every block, in the order of the columns."""
    is_selection = (basis == 0) | (basis == 1)
    assert bool(is_selection.all()), "not made of columns of the identity"
    return basis.argmax(-2).tolist()


def best_weight(weight: Tensor, moment: Tensor, channels: list[int]) -> Tensor:
    """Least squares: the weight on these channels alone whose output is nearest, the others 0."""
    out, _, taps = weight.shape
    columns = torch.tensor([c * taps + t for c in channels for t in range(taps)])
    cross = weight.reshape(out, -1) @ moment[:, columns]
    best = torch.zeros_like(weight).reshape(out, -1)
    best[:, columns] = cross @ torch.linalg.inv(moment[columns][:, columns])
    return best.reshape(weight.shape)


def error(weight: Tensor, other: Tensor, moment: Tensor) -> float:
    difference = (weight - other).flatten(1)
    return float((difference @ moment @ difference.mT).trace())


def least_error(weight: Tensor, moment: Tensor, channels: list[int]) -> float:
    return error(weight, best_weight(weight, moment, channels), moment)


def with_ridge(moment: Tensor, ridge: float = RIDGE) -> Tensor:
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def brute_force(space: SpaceContext) -> list[list[int]]:
    """Drop channels one by one; try each candidate by solving least squares from scratch."""
    pairs = [(r.weight.double(), with_ridge(r.moment.double())) for r in space.readouts]
    present = list(range(space.channels))
    lost = [0] * space.blocks
    for _ in range(space.channels - space.rank):
        costs = {
            c: sum(least_error(w, h, [p for p in present if p != c]) for w, h in pairs)
            for c in present
            if lost[c // space.block_channels] < space.block_channels - space.block_rank
        }
        worst = min(costs, key=costs.__getitem__)
        present.remove(worst)
        lost[worst // space.block_channels] += 1
    size = space.block_channels
    return [[c % size for c in present if c // size == b] for b in range(space.blocks)]


# --- every initializer ---------------------------------------------------------------------------

INITIALIZERS = [
    RandomOrthonormal(seeded(0)),
    PrincipalComponents(),
    LargestNorm(),
    GreedySelection(),
]


def full_context(
    seed: int, size: int, rank: int, blocks: int, *, selection: bool = False, taps: int = 1
) -> SpaceContext:
    channels = size * blocks
    return SpaceContext(
        "space",
        channels,
        rank * blocks,
        blocks=blocks,
        selection=selection,
        producers=(random(channels, 3, seed=seed),),
        readouts=(Readout(random(2, channels, taps, seed=seed), random_moment(channels * taps)),),
        moment=random_moment(channels, seed=seed),
    )


@pytest.mark.parametrize("initializer", INITIALIZERS, ids=lambda i: type(i).__name__)
@settings(deadline=None, max_examples=25, print_blob=True)
@given(seed=SEEDS, size=st.integers(1, 6), blocks=st.integers(1, 3), data=st.data())
def test_every_basis_is_orthonormal_in_each_block(
    initializer: Initializer, seed, size, blocks, data
):
    rank = data.draw(st.integers(1, size))
    selection = data.draw(st.booleans())
    basis = initializer(full_context(seed, size, rank, blocks, selection=selection))
    assert basis.shape == (blocks, size, rank)
    assert basis.dtype == torch.float64
    assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64).expand(blocks, -1, -1))
    if selection:
        assert all(block == sorted(set(block)) for block in kept(basis))


# --- random --------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [False, True])
def test_random_basis_follows_its_generator(selection):
    space = SpaceContext("space", 12, 6, selection=selection)
    first, again = (RandomOrthonormal(seeded(1))(space) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, RandomOrthonormal(seeded(2))(space))


def test_random_basis_has_no_preferred_sign():
    basis = RandomOrthonormal(seeded(0))(SpaceContext("space", 400, 400, blocks=200))
    # LAPACK's QR alone gives every first entry of every block the same sign.
    share_positive = (basis[:, 0, 0] > 0).double().mean()
    assert 0.35 < share_positive < 0.65  # 4 standard deviations


def test_random_selection_reaches_every_channel():
    generator = seeded(0)
    space = SpaceContext("space", 6, 2, blocks=2, selection=True)
    seen = {tuple(map(tuple, kept(RandomOrthonormal(generator)(space)))) for _ in range(200)}
    assert seen == {((a,), (b,)) for a in range(3) for b in range(3)}


# --- principal components ------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, print_blob=True)
@given(seed=SEEDS, size=st.integers(2, 7), blocks=st.integers(1, 3), data=st.data())
def test_principal_components_span_the_features_of_low_rank(seed, size, blocks, data):
    rank = data.draw(st.integers(1, size - 1))
    spans = [random(size, rank, seed=seed + b) for b in range(blocks)]
    rows = torch.cat([random(40, rank, seed=seed + 9) @ span.mT for span in spans], dim=1)
    space = SpaceContext("space", size * blocks, rank * blocks, blocks, moment=rows.mT @ rows)
    basis = PrincipalComponents()(space)
    for P, span in zip(basis, spans, strict=True):
        assert_close(P @ P.mT @ span, span)


@settings(deadline=None, max_examples=30, print_blob=True)
@given(seed=SEEDS)
def test_no_other_basis_loses_less_of_the_features_than_principal_components(seed):
    moment = random_moment(6, seed=seed)
    space = SpaceContext("space", 6, 3, moment=moment)

    def loss(basis: Tensor) -> float:
        return float(moment.trace() - (basis.mT @ moment @ basis).diagonal(0, -2, -1).sum())

    least = loss(PrincipalComponents()(space))
    assert_close(least, float(torch.linalg.eigvalsh(moment)[:3].sum()))
    assert least <= loss(RandomOrthonormal(seeded(seed))(space))


def test_principal_components_come_by_eigenvalue_with_their_largest_entry_positive():
    vectors = torch.linalg.qr(random(5, 5)).Q
    vectors *= vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    moment = (vectors * torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0])) @ vectors.mT
    basis = PrincipalComponents()(SpaceContext("space", 5, 3, moment=moment))
    assert_close(basis[0], vectors[:, [1, 3, 4]])


def test_principal_selection_keeps_the_channels_of_largest_energy():
    moment = torch.full((6, 6), 0.1).fill_diagonal_(0) + torch.diag(
        torch.tensor([1.0, 3.0, 2.0, 9.0, 7.0, 8.0])
    )
    space = SpaceContext("space", 6, 4, blocks=2, selection=True, moment=moment)
    assert kept(PrincipalComponents()(space)) == [[1, 2], [0, 2]]


def test_principal_components_need_a_moment():
    with pytest.raises(DataError, match=r"'layer1\.conv1'.*moment.*Give data"):
        PrincipalComponents()(SpaceContext("layer1.conv1", 4, 2))


# --- largest norm --------------------------------------------------------------------------------


def test_largest_norm_adds_up_l1_norms_over_producers():
    # L1 norms 4, 3, 5, 1 and 0, 2.5, 0, 0; the L2 norms would keep channel 0 instead of 1.
    first = torch.tensor([[4.0, 0.0, 0.0], [1.0, -1.0, 1.0], [2.0, -2.0, 1.0], [1.0, 0.0, 0.0]])
    second = torch.tensor([[0.0], [-2.5], [0.0], [0.0]])
    space = SpaceContext("space", 4, 2, producers=(first, second))
    assert kept(LargestNorm()(space)) == [[1, 2]]


def test_largest_norm_keeps_equally_many_channels_of_every_block():
    producer = torch.tensor([[1.0], [2.0], [3.0], [40.0], [60.0], [50.0]])
    space = SpaceContext("space", 6, 2, blocks=2, producers=(producer,))
    assert kept(LargestNorm()(space)) == [[2], [1]]


def test_largest_norm_needs_producers():
    with pytest.raises(ValueError, match=r"'fc'.*producers"):
        LargestNorm()(SpaceContext("fc", 4, 2))


# --- elimination: the formulas -------------------------------------------------------------------

SIZES = {
    "seed": SEEDS,
    "channels": st.integers(2, 6),
    "taps": st.integers(1, 3),
    "out": st.integers(1, 4),
}


@settings(deadline=None, max_examples=50, print_blob=True)
@given(**SIZES)
def test_cost_of_a_first_drop_is_the_exact_rise_of_the_least_squares_error(
    seed, channels, taps, out
):
    weight, moment = random(out, channels, taps, seed=seed), random_moment(channels * taps, seed)
    costs = Elimination(weight, torch.linalg.inv(moment), drops=1).costs()
    others = [[c for c in range(channels) if c != dropped] for dropped in range(channels)]
    expected = [least_error(weight, moment, channels) for channels in others]
    assert_close(costs, torch.tensor(expected, dtype=torch.float64))


@settings(deadline=None, max_examples=50, print_blob=True)
@given(**SIZES, data=st.data())
def test_weight_after_any_drops_is_the_least_squares_weight_of_the_rest(
    seed, channels, taps, out, data
):
    weight, moment = random(out, channels, taps, seed=seed), random_moment(channels * taps, seed)
    order = data.draw(st.permutations(range(channels)))[: data.draw(st.integers(1, channels - 1))]
    elimination = Elimination(weight, torch.linalg.inv(moment), drops=len(order))
    total = 0.0
    for channel in order:
        total += float(elimination.costs()[channel])
        elimination.drop(channel)
    rest = [c for c in range(channels) if c not in order]
    assert_close(elimination.weight, best_weight(weight, moment, rest))
    assert_close(total, least_error(weight, moment, rest))
    assert not elimination.weight[:, order].any()
    assert not elimination.costs()[order].any()


def test_elimination_leaves_its_arguments_alone():
    weight, inverse = random(2, 4, 1), torch.linalg.inv(random_moment(4))
    copies = weight.clone(), inverse.clone()
    Elimination(weight, inverse, drops=1).drop(2)
    assert torch.equal(weight, copies[0])
    assert torch.equal(inverse, copies[1])


# --- greedy selection ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, print_blob=True)
@given(
    seed=SEEDS,
    size=st.integers(2, 5),
    blocks=st.integers(1, 2),
    readouts=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 2)), min_size=1, max_size=2),
    data=st.data(),
)
def test_greedy_selection_is_that_of_brute_force(seed, size, blocks, readouts, data):
    channels, rank = size * blocks, data.draw(st.integers(1, size))
    space = SpaceContext(
        "space",
        channels,
        rank * blocks,
        blocks=blocks,
        readouts=tuple(
            Readout(random(out, channels, taps, seed=seed), random_moment(channels * taps, seed))
            for out, taps in readouts
        ),
    )
    assert kept(GreedySelection(ridge=RIDGE)(space)) == brute_force(space)


@settings(deadline=None, max_examples=30, print_blob=True)
@given(seed=SEEDS, out=st.integers(1, 3))
def test_taps_of_a_moment_without_taps_are_further_outputs(seed, out):
    weight, moment = random(out, 6, 4, seed=seed), random_moment(6, seed)
    apart = Readout(weight.transpose(1, 2).reshape(out * 4, 6, 1), moment)
    bases = [
        GreedySelection()(SpaceContext("space", 6, 2, readouts=(readout,)))
        for readout in (Readout(weight, moment), apart)
    ]
    assert torch.equal(*bases)
    assert kept(bases[0]) == brute_force(SpaceContext("space", 6, 2, readouts=(apart,)))


@pytest.mark.parametrize("moment_taps", [1, 3])
def test_many_outputs_are_condensed_in_parts_without_changing_the_choice(monkeypatch, moment_taps):
    weight, moment = random(40, 6, 3), random_moment(6 * moment_taps)
    readout = Readout(weight, moment)
    apart = Readout(weight.mT.reshape(120, 6, 1), moment) if moment_taps == 1 else readout
    monkeypatch.setattr(initialize, "_ELEMENTS_AT_ONCE", 7 * 6 * 3)  # parts of 7 outputs
    basis = GreedySelection()(SpaceContext("space", 6, 3, readouts=(readout,)))
    assert kept(basis) == brute_force(SpaceContext("space", 6, 3, readouts=(apart,)))


def test_greedy_selection_keeps_what_others_cannot_make_up_for():
    # Channels 0 and 1 are nearly one, and loud; 2 is quiet, but nothing can stand in for it.
    rows = random(500, 3)
    rows[:, 1] = rows[:, 0] + 0.01 * rows[:, 1]
    rows[:, 2] *= 0.3
    readout = Readout(torch.ones(1, 3, 1), rows.mT @ rows / 500)
    basis = GreedySelection()(SpaceContext("space", 3, 2, readouts=(readout,)))
    assert 2 in kept(basis)[0]


def test_dead_channels_go_first_however_large_their_weights():
    moment = random_moment(8)
    dead = [1, 4, 6]
    moment[dead] = 0
    moment[:, dead] = 0
    weight = random(5, 8, 1)
    weight[:, dead] *= 10
    basis = GreedySelection()(SpaceContext("space", 8, 5, readouts=(Readout(weight, moment),)))
    assert kept(basis) == [[0, 2, 3, 5, 7]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ridge", [1e-10, 1e-4])
def test_a_selection_that_loses_nothing_is_found_in_a_singular_moment(dtype, ridge):
    # Eight channels in exact pairs: one of each pair is enough.
    rows = random(200, 4).repeat_interleave(2, dim=1).to(dtype)
    readout = Readout(random(6, 8, 1).to(dtype), rows.mT @ rows)
    basis = GreedySelection(ridge)(SpaceContext("space", 8, 4, readouts=(readout,)))
    assert [channel // 2 for channel in kept(basis)[0]] == [0, 1, 2, 3]


def test_ridge_grows_tenfold_until_a_slightly_indefinite_moment_is_definite():
    moment = random_moment(10)
    values, vectors = torch.linalg.eigh(moment)
    values[0] = -5e-5 * values[1:].mean()
    moment = (vectors * values) @ vectors.mT
    readout = Readout(random(4, 10, 1), moment)
    space = SpaceContext("space", 10, 4, readouts=(readout,))
    choice = GreedySelection(ridge=1e-9)(space)
    assert torch.equal(choice, GreedySelection(ridge=1e-4)(space))
    assert not torch.equal(choice, GreedySelection(ridge=1.0)(space))


def test_a_readout_of_dead_inputs_has_no_say():
    useful = Readout(random(4, 6, 1), random_moment(6))
    dead = Readout(100 * random(4, 6, 1, seed=1), torch.zeros(6, 6))
    alone, beside, only_dead = (
        GreedySelection()(SpaceContext("space", 6, 3, readouts=readouts))
        for readouts in [(useful,), (useful, dead), (dead,)]
    )
    assert torch.equal(alone, beside)
    assert len(set(kept(only_dead)[0])) == 3


def test_no_block_loses_more_than_its_share():
    # All of the first block costs less than any of the second.
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0, 60.0, 70.0, 80.0]).reshape(1, 8, 1)
    readout = Readout(weight, torch.eye(8))
    basis = GreedySelection()(SpaceContext("space", 8, 4, blocks=2, readouts=(readout,)))
    assert kept(basis) == [[2, 3], [2, 3]]


def test_greedy_selection_of_parameters_carries_no_graph():
    weight = torch.randn(3, 4, 1, requires_grad=True)
    readout = Readout(weight, torch.eye(4))
    assert not GreedySelection()(SpaceContext("s", 4, 2, readouts=(readout,))).requires_grad


def test_greedy_selection_needs_readouts():
    with pytest.raises(ValueError, match=r"'layer1\.conv1'.*readouts.*LargestNorm"):
        GreedySelection()(SpaceContext("layer1.conv1", 4, 2, moment=torch.eye(4)))


def test_greedy_selection_needs_the_moment_of_every_readout():
    readouts = Readout(torch.ones(2, 4, 1), torch.eye(4)), Readout(torch.ones(2, 4, 1))
    with pytest.raises(DataError, match=r"'conv1'.*1 of 2 readouts.*Give data"):
        GreedySelection()(SpaceContext("conv1", 4, 2, readouts=readouts))


@pytest.mark.parametrize("diagonal", [[1.0, 1.0, 1.0, -2.5], [-1.0] * 4, [1.0, -1.0, 1.0, -1.0]])
def test_a_matrix_that_is_no_moment_is_refused(diagonal):
    readout = Readout(torch.ones(2, 4, 1), torch.diag(torch.tensor(diagonal)))
    with pytest.raises(DataError, match=r"'conv1'.*4 features.*positive semidefinite"):
        GreedySelection()(SpaceContext("conv1", 4, 2, readouts=(readout,)))


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.nan])
def test_ridge_must_be_positive(ridge):
    with pytest.raises(ValueError, match=str(ridge)):
        GreedySelection(ridge)


# --- data ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20, print_blob=True)
@given(seed=SEEDS, channels=st.integers(1, 8), data=st.data())
def test_selection_matrix_picks_channels(seed, channels, data):
    indices = torch.tensor(data.draw(st.permutations(range(channels))))
    x = random(3, channels, seed=seed)
    assert torch.equal(x @ selection_matrix(indices, channels), x[:, indices])


@pytest.mark.parametrize(
    ("channels", "rank", "blocks", "facts"),
    [
        (128, 160, 1, r"'layer2'.*128.*1\.\.128.*160"),
        (128, 0, 1, r"'layer2'.*128.*1\.\.128.*got 0"),
        (128, 30, 4, r"'layer2'.*128.*4\.\.128.*multiple of 4.*30"),
        (130, 64, 4, r"'layer2'.*130.*4 equal blocks"),
        (128, 64, 0, r"'layer2'.*128.*0 equal blocks"),
    ],
)
def test_sizes_of_a_space_must_fit(channels, rank, blocks, facts):
    with pytest.raises(PlanError, match=facts):
        SpaceContext("layer2", channels, rank, blocks)


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        ({"producers": (torch.ones(4, 2), torch.ones(3, 2))}, r"producer 1.*'s'.*\(4,.*\(3, 2\)"),
        ({"producers": (torch.ones(4, 2, 1),)}, r"producer 0.*\(4, 2, 1\)"),
        ({"producers": (torch.full((4, 2), math.nan),)}, r"producer 0.*'s'.*NaN"),
        ({"readouts": (Readout(torch.ones(2, 3, 1)),)}, r"readout 0.*'s'.*4 channels.*\(2, 3, 1\)"),
        ({"moment": torch.ones(3, 3)}, r"moment.*'s'.*\(4, 4\).*\(3, 3\)"),
        ({"moment": torch.full((4, 4), math.inf)}, r"moment.*'s'.*infinity"),
    ],
)
def test_tensors_of_a_space_must_fit(tensors, facts):
    with pytest.raises(ValueError, match=facts):
        SpaceContext("s", 4, 2, **tensors)


@pytest.mark.parametrize(
    ("weight", "moment", "facts"),
    [
        (torch.ones(2, 3), None, r"\(out, channels, taps\).*\(2, 3\)"),
        (
            torch.ones(2, 3, 4),
            torch.ones(4, 4),
            r"3 channels.*4 taps.*\(3, 3\).*\(12, 12\).*\(4, 4",
        ),
        (torch.full((2, 3, 1), math.nan), None, r"weight.*NaN"),
        (torch.ones(2, 3, 1), torch.full((3, 3), math.nan), r"moment.*NaN"),
    ],
)
def test_tensors_of_a_readout_must_fit(weight, moment, facts):
    with pytest.raises(ValueError, match=facts):
        Readout(weight, moment)
