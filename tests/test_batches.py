"""Batches of every kind, and passes over data that give the same batches whenever they start."""

from __future__ import annotations

import random
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import Residual, built, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from torchcap.batches import Batch, Source, as_batch, as_source, mixed_seed, seeded
from torchcap.errors import DataError, TraceError

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# One batch

Pair = namedtuple("Pair", "images labels")


@pytest.mark.parametrize("kind", [tuple, list, lambda parts: Pair(*parts)])
def test_a_pair_is_images_and_labels(kind: Callable[..., Any]) -> None:
    x, y = images(), torch.arange(4)
    batch = as_batch(kind([x, y]), 7)
    assert batch.args == (x,)
    assert batch.labels is y
    assert batch.number == 7
    assert not batch.kwargs


@pytest.mark.parametrize("rest", [(), ("names",), (None, torch.arange(4))])
def test_what_stands_in_the_place_of_labels_and_is_no_tensor_is_left_out(
    rest: tuple[Any, ...],
) -> None:
    x = images()
    batch = as_batch((x, *rest))
    assert batch.args == (x,)
    assert batch.labels is None


def test_a_tensor_is_images_alone() -> None:
    x = images()
    assert as_batch(x) == Batch((x,), {}, None, 0)


@pytest.mark.parametrize("name", ["labels", "label", "targets", "target"])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_holds_arguments_and_its_labels_by_any_name(
    name: str, kind: Callable[..., Any]
) -> None:
    x, y = images(), torch.arange(4)
    batch = as_batch(kind({"x": x, "scale": 2.0, name: y}))
    assert batch.args == ()
    assert batch.kwargs == {"x": x, "scale": 2.0}
    assert batch.labels is y


def test_a_batch_stays_what_it_is() -> None:
    batch = Batch((images(),), {}, None, 3)
    assert as_batch(batch, 9) is batch


@pytest.mark.parametrize("kind", [3.0, "images", None, (), [], (1, torch.ones(2)), {1, 2}])
def test_other_kinds_of_batches_are_refused_by_name(kind: Any) -> None:
    with pytest.raises(DataError, match=rf"a batch must be.*got {type(kind).__name__}"):
        as_batch(kind)


def test_inputs_are_the_arguments_as_example_inputs_have_them() -> None:
    x = images()
    assert as_batch((x, torch.arange(4))).inputs == (x,)
    assert as_batch({"x": x, "labels": torch.arange(4)}).inputs == {"x": x}


def test_a_batch_runs_by_position_and_by_name() -> None:
    model, x = built(Residual), images()
    torch.testing.assert_close(as_batch({"x": x}).run(model), model(x), rtol=0, atol=0)
    torch.testing.assert_close(as_batch((x, None)).run(model), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_refused_with_their_number(bad: float) -> None:
    x = images()
    x[2, 1, 3, 4] = bad
    with pytest.raises(DataError, match=r"batch 5 .*NaN or infinite"):
        as_batch({"x": x}, 5).run(built(Residual))


@pytest.mark.parametrize(
    ("x", "facts"),
    [
        (images()[:, :2], r"batch 5 .*\(4, 2, 8, 8\) torch.float64.*'Residual'"),
        (images(dtype=torch.float32), r"batch 5 .*\(4, 3, 8, 8\) torch.float32.*'Residual'"),
        (torch.ones(4, 3, 8, 8, dtype=torch.uint8), r"batch 5 .*torch.uint8"),
    ],
)
def test_images_that_do_not_run_are_refused_with_number_and_shape(x: Tensor, facts: str) -> None:
    with pytest.raises(DataError, match=facts):
        as_batch(x, 5).run(built(Residual))


def test_an_argument_that_forward_does_not_have_is_refused() -> None:
    with pytest.raises(DataError, match=r"batch 0 .*'image'"):
        as_batch({"image": images()}).run(built(Residual))


class Failing(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [TraceError("own"), KeyError("bug"), ZeroDivisionError()])
def test_errors_that_no_batch_causes_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        as_batch(images()).run(Failing(error))
    assert caught.value is error


@pytest.mark.parametrize("by_name", [False, True])
def test_augmenting_changes_the_images_and_nothing_else(*, by_name: bool) -> None:
    x, y, other = images(), torch.arange(4), torch.ones(4, 7)
    given = {"other": other, "x": x, "labels": y} if by_name else (x, y)
    batch = as_batch(given, 3)
    changed = batch.augmented([lambda t: t + 1, lambda t: 2 * t])
    seen = changed.kwargs["x"] if by_name else changed.args[0]
    torch.testing.assert_close(seen, 2 * (x + 1), rtol=0, atol=0)
    assert changed.labels is y
    assert changed.number == 3
    assert changed.kwargs.get("other") is batch.kwargs.get("other")
    torch.testing.assert_close(x, images(), rtol=0, atol=0)


def test_a_batch_without_images_is_not_augmented() -> None:
    batch = as_batch(torch.ones(4, 7))
    assert batch.augmented([lambda t: t + 1]) is batch


def test_moving_a_batch_moves_tensors_and_labels_alone() -> None:
    batch = as_batch({"x": images(), "scale": 2.0, "labels": torch.arange(4)}, 3)
    moved = batch.to(torch.device("meta"))
    assert moved.kwargs["x"].device.type == "meta"
    assert moved.labels is not None
    assert moved.labels.device.type == "meta"
    assert (moved.kwargs["scale"], moved.number) == (2.0, 3)


# --------------------------------------------------------------------------------------------------
# Passes


class Stream(IterableDataset):
    """Numbers without a length; each comes with a draw of each global generator."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.count):
            yield torch.tensor([number, random.random(), float(torch.rand(()))])


class Drawn:
    """Batches that are drawn anew in every pass."""

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(6):
            yield torch.randn(2) * random.random()


def own(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DATA = TensorDataset(torch.arange(12.0), torch.arange(12))
SHUFFLED: dict[str, Callable[[], Any]] = {
    "shuffling loader": lambda: DataLoader(DATA, batch_size=2, shuffle=True),
    "loader with its own generator": lambda: DataLoader(
        DATA, batch_size=2, shuffle=True, generator=own()
    ),
    "sampler": lambda: DataLoader(DATA, batch_size=2, sampler=RandomSampler(DATA)),
    "loader of a stream": lambda: DataLoader(Stream(12), batch_size=2),
    "object that draws": Drawn,
}
EVERY_KIND = pytest.mark.parametrize("kind", SHUFFLED)


def seen(source: Source, number: int, **options: Any) -> list[Tensor]:
    with source.passing(number, **options) as batches:
        return [batch.args[0] for batch in batches]


def interrupted(batches: Iterable[Any]) -> None:
    next(iter(batches))
    raise KeyboardInterrupt


@EVERY_KIND
def test_the_same_pass_gives_the_same_batches_whatever_happened_before(kind: str) -> None:
    first = seen(Source(SHUFFLED[kind](), seed=3), 4)
    source = Source(SHUFFLED[kind](), seed=3)
    torch.rand(7), random.random(), len(source), source.first(), seen(source, 1)
    torch.testing.assert_close(seen(source, 4), first, rtol=0, atol=0)


@EVERY_KIND
def test_another_pass_and_another_seed_give_other_batches(kind: str) -> None:
    data = SHUFFLED[kind]()
    passes = [torch.stack(seen(Source(data, seed=s), n)) for s, n in [(0, 0), (0, 1), (1, 0)]]
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0], passes[2])


@EVERY_KIND
def test_random_states_are_put_back_even_from_a_pass_that_fails(kind: str) -> None:
    data = SHUFFLED[kind]()
    source, generator = Source(data), getattr(data, "generator", None)
    states = [torch.get_rng_state(), random.getstate(), generator and generator.get_state()]
    len(source), source.first(), seen(source, 2)
    with pytest.raises(KeyboardInterrupt), source.passing(1) as batches:
        interrupted(batches)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    if generator is not None:
        assert torch.equal(generator.get_state(), states[2])


@EVERY_KIND
@settings(deadline=None, max_examples=10, print_blob=True)
@given(skip=st.integers(0, 7), limit=st.none() | st.integers(1, 7))
def test_skip_and_limit_cut_a_pass_and_change_no_batch(
    kind: str, skip: int, limit: int | None
) -> None:
    source = Source(SHUFFLED[kind](), seed=1)
    whole = seen(source, 3)
    cut = seen(source.limited(limit), 3, skip=skip)
    assert len(cut) == len(whole[skip:limit])
    torch.testing.assert_close(cut, whole[skip:limit], rtol=0, atol=0)
    assert len(source.limited(limit)) == len(whole[:limit])


def test_batches_carry_their_number_in_the_pass() -> None:
    source = Source([torch.ones(1)] * 5)
    with source.passing(0, skip=2) as batches:
        assert [batch.number for batch in batches] == [2, 3, 4]


def test_first_is_the_first_batch_of_pass_zero() -> None:
    source = Source(SHUFFLED["shuffling loader"]())
    assert torch.equal(source.first().args[0], seen(source, 0)[0])


@EVERY_KIND
def test_the_length_is_counted_where_the_data_does_not_know_it(kind: str) -> None:
    assert len(Source(SHUFFLED[kind]())) == 6


def test_data_is_counted_once() -> None:
    class Counted(Drawn):
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            return super().__iter__()

    data = Counted()
    source = Source(data)
    assert [len(source), len(source)] == [6, 6]
    assert data.passes == 1


def test_a_sampler_of_many_processes_hears_of_the_pass() -> None:
    class Sampler(list):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler = Sampler(range(12))
    seen(Source(DataLoader(DATA, sampler=sampler)), 6)
    assert sampler.epoch == 6


def test_batches_are_on_the_device_of_the_model() -> None:
    model = nn.Linear(2, 2, device="meta")
    with as_source([(torch.ones(1, 2), torch.ones(1))], model, 0).passing(0) as batches:
        batch = next(batches)
    assert batch.args[0].device.type == "meta"
    assert batch.labels is not None
    assert batch.labels.device.type == "meta"


def test_a_source_stays_what_it_is() -> None:
    source = Source([images()], seed=3)
    assert as_source(source, nn.Linear(2, 2), 5) is source


# --------------------------------------------------------------------------------------------------
# Data that cannot be used


@pytest.mark.parametrize("data", [images(), "images", b"images", 3, None, nn.Linear(2, 2)])
def test_data_that_is_no_iterable_of_batches_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match=rf"iterable of batches, got {type(data).__name__}"):
        Source(data)


@pytest.mark.parametrize("make", [iter, lambda data: (b for b in data), lambda d: map(id, d)])
def test_an_iterator_is_refused_with_what_to_give_instead(make: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"only once.*__iter__ starts again"):
        Source(make([images()]))


class UsedUp:
    def __init__(self) -> None:
        self.batches = iter([images()] * 2)

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches


def test_data_that_is_used_up_raises_in_the_next_pass() -> None:
    source = Source(UsedUp())
    assert len(seen(source, 0)) == 2
    with pytest.raises(DataError, match=r"empty.*used up"):
        seen(source, 1)


@pytest.mark.parametrize("data", [[], DataLoader(TensorDataset(torch.empty(0, 3))), Stream(0)])
def test_empty_data_is_refused_wherever_it_shows(data: Any) -> None:
    source = Source(data)
    for look in (len, Source.first, lambda s: seen(s, 0), lambda s: seen(s, 0, skip=1)):
        with pytest.raises(DataError, match="empty"):
            look(source)


def test_a_batch_of_a_wrong_kind_is_refused_when_it_comes() -> None:
    with pytest.raises(DataError, match="got str"):
        seen(Source([images(), "images"]), 0)


# --------------------------------------------------------------------------------------------------
# Seeds


@given(parts=st.lists(st.integers(0, 2**31), min_size=1, max_size=4), place=st.integers(0, 3))
def test_seeds_of_rows_that_differ_in_one_number_differ(parts: list[int], place: int) -> None:
    other = list(parts)
    other[place % len(parts)] += 1
    assert mixed_seed(*parts) != mixed_seed(*other)
    assert 0 <= mixed_seed(*parts) < 2**63


def test_seeds_know_the_order_of_their_parts() -> None:
    rows = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (1, 2, 3), (3, 2, 1)]
    assert len({mixed_seed(*row) for row in rows}) == len(rows)


def test_seeded_draws_follow_from_the_parts_and_leave_no_trace() -> None:
    def draw(*parts: int) -> tuple[float, float]:
        with seeded(*parts):
            return float(torch.rand(())), random.random()

    before = torch.get_rng_state(), random.getstate()
    first = draw(1, 2)
    torch.rand(3), random.random()
    assert draw(1, 2) == first
    assert draw(2, 1)[0] != first[0]
    assert draw(2, 1)[1] != first[1]
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    with pytest.raises(KeyboardInterrupt), seeded(4):
        interrupted(Drawn())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
