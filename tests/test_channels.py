"""The channel table: what is joined, what travels together, and what must keep equal widths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcap.graph.channels import UNKNOWN, ChannelTable, Ids, Resolved, Run

PROPERTY = settings(deadline=None, print_blob=True)
DRAWN = st.integers(0, 2**32 - 1)


def written(table: ChannelTable, layer: str, channels: int) -> Ids:
    return table.axis(layer, [("weight", 0), ("bias", 0)], "producer", channels)


def reading(table: ChannelTable, layer: str, channels: int, groups: int = 1) -> Ids:
    return table.axis(layer, [("weight", 1)], "consumer", channels, groups)


def runs_of(table: ChannelTable, resolved: Resolved, layer: str, dim: int) -> tuple[Run, ...]:
    return resolved.runs[list(table.axes).index((layer, "weight", dim))]


# --------------------------------------------------------------------------------------------------
# Identities


def test_identities_are_new_each_time() -> None:
    table = ChannelTable()
    first, second = table.new(3), table.new(2)
    assert sorted({*first, *second}) == [0, 1, 2, 3, 4]


def test_axis_of_a_layer_has_the_same_identities_at_every_use() -> None:
    table = ChannelTable()
    first = written(table, "conv", 4)
    assert written(table, "conv", 4) is first
    assert not set(reading(table, "conv", 4)) & set(first)
    assert not set(written(table, "other", 4)) & set(first)


def naive_classes(size: int, joins: list[tuple[Ids, Ids]]) -> list[int]:
    """Union-find, one pair after the other: the least member of the class of every identity."""
    parent = list(range(size))

    def root(x: int) -> int:
        while parent[x] != x:
            x = parent[x]
        return x

    for left, right in joins:
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            low, high = sorted((root(a), root(b)))
            parent[high] = low
    return [root(x) for x in range(size)]


@PROPERTY
@given(seed=DRAWN, size=st.integers(1, 60), count=st.integers(0, 12))
def test_classes_are_those_of_naive_union_find(seed: int, size: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    table = ChannelTable()
    table.new(size)
    joins = []
    for _ in range(count):
        width = int(rng.integers(1, 8))
        left, right = rng.integers(0, size, (2, width))
        table.join(left, right)
        joins.append((left, right))
    assert table.labels().tolist() == naive_classes(size, joins)


@PROPERTY
@given(seed=DRAWN, length=st.integers(2, 200))
def test_long_chains_of_joins_in_any_order_are_one_class(seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    table = ChannelTable()
    axes = [table.new(2) for _ in range(length)]
    for link in rng.permutation(length - 1):
        table.join(axes[link + 1], axes[link])
    labels = table.labels().reshape(length, 2)
    assert (labels == labels[0]).all()
    assert labels[0, 0] != labels[0, 1]


# --------------------------------------------------------------------------------------------------
# Cells: what travels together


def test_writer_and_reader_share_one_space() -> None:
    table = ChannelTable()
    table.join(reading(table, "b", 4), written(table, "a", 4))
    resolved = table.resolve()
    assert resolved.channels == (4,)
    assert resolved.cells == (1,)
    assert runs_of(table, resolved, "a", 0) == (Run(0, 0, 0, 4, 1),)
    assert runs_of(table, resolved, "b", 1) == (Run(0, 0, 0, 4, 1),)


def test_reader_of_a_concatenation_has_a_run_for_each_part() -> None:
    table = ChannelTable()
    parts = [written(table, "a", 4), written(table, "b", 2)]
    table.join(reading(table, "c", 6), np.concatenate(parts))
    resolved = table.resolve()
    a = runs_of(table, resolved, "a", 0)[0].space
    b = runs_of(table, resolved, "b", 0)[0].space
    assert a != b
    assert runs_of(table, resolved, "c", 1) == (Run(0, a, 0, 4, 1), Run(4, b, 0, 2, 1))


def test_layer_that_is_read_in_parts_falls_into_as_many_spaces() -> None:
    table = ChannelTable()
    a = written(table, "a", 5)
    table.join(reading(table, "left", 2), a[:2])
    table.join(reading(table, "right", 3), a[2:])
    resolved = table.resolve()
    assert resolved.channels == (2, 3)
    assert runs_of(table, resolved, "a", 0) == (Run(0, 0, 0, 2, 1), Run(2, 1, 0, 3, 1))


def test_flattened_channels_repeat() -> None:
    table = ChannelTable()
    table.join(reading(table, "fc", 12), np.repeat(written(table, "a", 3), 4))
    assert runs_of(table, table.resolve(), "fc", 1) == (Run(0, 0, 0, 3, 4),)


def test_single_channel_that_stands_side_by_side_with_itself_repeats() -> None:
    table = ChannelTable()
    a = written(table, "a", 1)
    table.join(reading(table, "fc", 3), np.concatenate([a, a, a]))
    assert runs_of(table, table.resolve(), "fc", 1) == (Run(0, 0, 0, 1, 3),)


def test_space_that_is_concatenated_with_itself_has_two_runs() -> None:
    table = ChannelTable()
    a = written(table, "a", 3)
    table.join(reading(table, "b", 6), np.concatenate([a, a]))
    assert runs_of(table, table.resolve(), "b", 1) == (Run(0, 0, 0, 3, 1), Run(3, 0, 0, 3, 1))


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [2, 3, 1, 0]])
def test_channels_that_arrive_in_another_order_are_fixed(order: list[int]) -> None:
    table = ChannelTable()
    a = written(table, "a", 4)
    table.join(reading(table, "whole", 4), a)
    table.join(reading(table, "mixed", 4), a[order])
    resolved = table.resolve()
    spaces = {run.space for run in runs_of(table, resolved, "a", 0)}
    assert all("another order" in str(resolved.reasons[space]) for space in spaces)
    assert all("'mixed'" in str(resolved.reasons[space]) for space in spaces)
    assert runs_of(table, resolved, "mixed", 1) == ()


def test_only_the_channels_that_arrive_in_another_order_are_fixed() -> None:
    table = ChannelTable()
    a, b = written(table, "a", 4), written(table, "b", 3)
    table.join(reading(table, "reverse", 4), a[::-1])
    table.join(reading(table, "straight", 3), b)
    resolved = table.resolve()
    (of_a,), (of_b,) = runs_of(table, resolved, "a", 0), runs_of(table, resolved, "b", 0)
    assert resolved.reasons[of_a.space] is not None
    assert resolved.reasons[of_b.space] is None


# --------------------------------------------------------------------------------------------------
# Restrictions


def test_fixing_one_channel_fixes_what_travels_with_it_and_nothing_else() -> None:
    table = ChannelTable()
    a, b = written(table, "a", 4), written(table, "b", 4)
    table.join(reading(table, "c", 8), np.concatenate([a, b]))
    table.fix(a[2:3], "because")
    resolved = table.resolve()
    assert resolved.reasons == ("because", None)


def test_first_reason_is_kept() -> None:
    table = ChannelTable()
    a = written(table, "a", 4)
    table.fix(a, "first")
    table.fix(a, "second")
    assert table.resolve().reasons == ("first",)


def test_restrictions_reach_channels_through_later_joins() -> None:
    table = ChannelTable()
    a, b = written(table, "a", 4), written(table, "b", 4)
    table.select(b, "told apart")
    table.bend(b)
    table.fix(b, "stays")
    table.join(a, b)
    resolved = table.resolve()
    assert resolved.selection == ("told apart",)
    assert resolved.nonlinear == (True,)
    assert resolved.reasons == ("stays",)


def test_space_without_restrictions_is_linear_and_free() -> None:
    table = ChannelTable()
    written(table, "a", 4)
    resolved = table.resolve()
    assert resolved.reasons == (None,)
    assert resolved.selection == (None,)
    assert resolved.nonlinear == (False,)


# --------------------------------------------------------------------------------------------------
# Pieces of equal width


def test_balanced_pieces_are_blocks_of_one_space() -> None:
    table = ChannelTable()
    a = written(table, "a", 6)
    table.balance(a.reshape(3, 2), "uneven")
    resolved = table.resolve()
    assert (resolved.channels, resolved.cells, resolved.reasons) == ((6,), (3,), (None,))
    assert runs_of(table, resolved, "a", 0) == (Run(0, 0, 0, 6, 1),)


def test_balance_ties_layers_that_are_not_joined() -> None:
    table = ChannelTable()
    a, b = written(table, "a", 3), written(table, "b", 3)
    table.balance(np.stack([a, b]), "uneven")
    resolved = table.resolve()
    assert (resolved.channels, resolved.cells) == ((6,), (2,))
    assert runs_of(table, resolved, "b", 0) == (Run(0, 0, 3, 3, 1),)


def test_pieces_of_several_spaces_tie_part_by_part() -> None:
    table = ChannelTable()
    parts = [written(table, layer, n) for layer, n in (("a", 3), ("b", 2), ("c", 3), ("d", 2))]
    table.balance(np.concatenate(parts).reshape(2, 5), "uneven")
    resolved = table.resolve()
    assert (resolved.channels, resolved.cells) == ((6, 4), (2, 2))


@pytest.mark.parametrize("widths", [(2, 4), (4, 2), (1, 5)])
def test_pieces_that_cut_through_layers_are_fixed(widths: tuple[int, int]) -> None:
    table = ChannelTable()
    parts = [written(table, "a", widths[0]), written(table, "b", widths[1])]
    table.balance(np.concatenate(parts).reshape(2, 3), "uneven")
    assert set(table.resolve().reasons) == {"uneven"}


def test_pieces_with_channels_of_no_layer_are_fixed() -> None:
    table = ChannelTable()
    both = np.concatenate([written(table, "a", 2), table.new(2)])
    table.balance(both.reshape(2, 2), "uneven")
    assert table.resolve().reasons == ("uneven",)


def test_reason_of_one_block_fixes_the_whole_space() -> None:
    table = ChannelTable()
    a = written(table, "a", 6)
    table.balance(a.reshape(2, 3), "uneven")
    table.fix(a[4:5], "because")
    resolved = table.resolve()
    assert (resolved.cells, resolved.reasons) == ((2,), ("because",))


def test_nested_pieces_are_the_finer_blocks() -> None:
    table = ChannelTable()
    a = written(table, "a", 8)
    table.balance(a.reshape(2, 4), "halves")
    table.balance(a.reshape(4, 2), "quarters")
    resolved = table.resolve()
    assert (resolved.cells, resolved.reasons) == ((4,), (None,))


# --------------------------------------------------------------------------------------------------
# What is observed beside the layers


def test_layout_of_an_observed_tensor_names_spaces_and_unknown_stretches() -> None:
    table = ChannelTable()
    a = written(table, "a", 3)
    free = table.new(2)
    resolved = table.resolve([np.concatenate([free, a])])
    assert resolved.layouts == ((Run(0, UNKNOWN, 0, 2, 1), Run(2, 0, 0, 3, 1)),)


def test_observing_does_not_fix_anything() -> None:
    table = ChannelTable()
    a = written(table, "a", 3)
    resolved = table.resolve([a[::-1]])
    assert resolved.reasons == (None,)
    assert resolved.layouts == ((),)


# --------------------------------------------------------------------------------------------------
# Properties of whole tables


@PROPERTY
@given(seed=DRAWN)
def test_runs_spell_out_every_axis(seed: int) -> None:
    """Each free axis is its runs, one after the other: same class, same channel of the space."""
    rng = np.random.default_rng(seed)
    table = ChannelTable()
    layers = [written(table, f"w{i}", int(rng.integers(1, 6))) for i in range(4)]
    for i in range(4):
        parts = [layers[j] for j in rng.integers(0, 4, int(rng.integers(1, 4)))]
        x = np.repeat(np.concatenate(parts), int(rng.integers(1, 3)))
        table.join(reading(table, f"r{i}", len(x)), x)
    resolved = table.resolve()
    labels = table.labels()
    channel: dict[tuple[int, int], int] = {}
    for axis, runs in zip(table.axes.values(), resolved.runs, strict=True):
        spelled = [
            (run.space, run.start + entry // run.repeat)
            for run in runs
            for entry in range(run.channels * run.repeat)
        ]
        if not runs:
            continue
        assert len(spelled) == len(axis.ids)
        for place, label in zip(spelled, labels[axis.ids].tolist(), strict=True):
            assert channel.setdefault(place, label) == label
    assert len(set(channel.values())) == len(channel)
