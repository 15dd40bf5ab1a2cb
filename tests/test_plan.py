"""The plan: made from ratios or ranks, checked against a model, printed, saved, read again."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS

from torchcap import Choice, NothingToCompressError, Plan, PlanError, SpaceGraph, analyze

PROPERTY = settings(deadline=None, print_blob=True)


def read(net: str) -> SpaceGraph:
    return analyze(NETS[net].model(), NETS[net].inputs())


CHAIN = read("ConvChain")  # conv1: 8, conv2: 6, conv3: 4 fixed
GROUPED = read("Grouped")  # conv1: 8 in 4 blocks, grouped: 12 in 4 blocks

names = st.text(min_size=1, max_size=8)
choices = st.integers(1, 4096).flatmap(
    lambda channels: st.builds(Choice, st.just(channels), st.integers(1, channels))
)
plans = st.builds(Plan, st.dictionaries(names, choices, min_size=1, max_size=5), names)


# --------------------------------------------------------------------------------------------------
# From ratios and ranks


@pytest.mark.parametrize(
    ("ratio", "ranks"),
    [(1.0, (8, 6)), (0.5, (4, 3)), (0.25, (2, 2)), (0.01, (1, 1)), (1, (8, 6))],
)
def test_ratio_is_the_share_of_channels_kept(ratio: float, ranks: tuple[int, int]) -> None:
    assert Plan.uniform(CHAIN, ratio).ranks == {"conv1": ranks[0], "conv2": ranks[1]}


def test_default_keeps_half() -> None:
    assert Plan.uniform(CHAIN) == Plan.uniform(CHAIN, 0.5)


def test_ratios_by_name_leave_other_spaces_alone() -> None:
    assert Plan.uniform(CHAIN, {"conv2": 0.5}).choices == {"conv2": Choice(6, 3)}


@pytest.mark.parametrize(
    ("multiple", "ranks"), [(2, (4, 4)), (4, (4, 4)), (5, (5, 5)), (8, (8, 6))]
)
def test_ranks_round_up_to_a_multiple_within_the_width(
    multiple: int, ranks: tuple[int, int]
) -> None:
    plan = Plan.uniform(CHAIN, 0.5, multiple_of=multiple)
    assert tuple(plan.ranks.values()) == ranks


@PROPERTY
@given(ratio=st.floats(0, 1, exclude_min=True), net=st.sampled_from(["Grouped", "ChunkHalves"]))
def test_every_block_keeps_equally_many_channels_and_at_least_one(ratio: float, net: str) -> None:
    graph = GROUPED if net == "Grouped" else read(net)
    for name, choice in Plan.uniform(graph, ratio).choices.items():
        width = choice.channels // graph[name].blocks
        kept, rest = divmod(choice.rank, graph[name].blocks)
        assert rest == 0
        assert kept == max(1, round(ratio * width))


def test_plan_of_ranks_is_that_of_the_ratio() -> None:
    assert Plan.of(CHAIN, {"conv1": 4, "conv2": 3}) == Plan.uniform(CHAIN, 0.5)


def test_ranks_are_told_from_each_other() -> None:
    assert Plan.of(CHAIN, {"conv1": 4}) != Plan.of(CHAIN, {"conv1": 5})
    assert Plan.of(CHAIN, {"conv1": 4}) != Plan.of(CHAIN, {"conv2": 4})


# --------------------------------------------------------------------------------------------------
# A plan is data


@PROPERTY
@given(plan=plans)
def test_dictionary_and_json_give_the_plan_back(plan: Plan) -> None:
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json()) == plan.to_dict()


@PROPERTY
@given(plan=plans)
def test_copies_and_pickles_are_equal(plan: Plan) -> None:
    assert copy.deepcopy(plan) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_plan_cannot_be_changed() -> None:
    plan = Plan.uniform(CHAIN)
    with pytest.raises(AttributeError):
        plan.model = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.choices["conv1"] = Choice(8, 1)  # type: ignore[index]
    with pytest.raises(AttributeError):
        plan.choices["conv1"].rank = 1  # type: ignore[misc]


def test_plan_does_not_follow_the_mapping_it_was_made_from() -> None:
    choices = {"conv1": Choice(8, 4)}
    plan = Plan(choices)
    choices["conv1"] = Choice(8, 1)
    assert plan.ranks == {"conv1": 4}


def test_plan_edited_by_hand_is_the_plan_of_the_new_ranks() -> None:
    data = Plan.uniform(CHAIN, 0.5).to_dict()
    data["spaces"]["conv1"]["rank"] = 7
    assert Plan.from_dict(data) == Plan.of(CHAIN, {"conv1": 7, "conv2": 3})


def test_printed_plan_names_every_space_with_its_widths() -> None:
    lines = str(Plan.of(CHAIN, {"conv1": 6, "conv2": 2})).splitlines()
    assert "ConvChain" in lines[0]
    assert "8 of 14 channels kept" in lines[0]
    assert [line.split() for line in lines[2:]] == [
        ["conv1", "8", "6", "75%"],
        ["conv2", "6", "2", "33%"],
    ]


def test_empty_plan_prints() -> None:
    assert "0 of 0 channels kept" in str(Plan({}))


# --------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.5, 2, float("nan"), float("inf"), True, "half"])
def test_ratio_outside_of_its_range_is_refused(ratio: Any) -> None:
    with pytest.raises(PlanError, match=rf"0 < ratio <= 1; got {ratio!r} for space 'conv1'"):
        Plan.uniform(CHAIN, ratio)
    with pytest.raises(PlanError, match=r"'conv2'"):
        Plan.uniform(CHAIN, {"conv1": 0.5, "conv2": ratio})


@pytest.mark.parametrize("rank", [0, -1, 9, 3.5, 4.0, "4", None])
def test_rank_outside_of_the_space_is_refused(rank: Any) -> None:
    with pytest.raises(PlanError, match=rf"'conv1' has 8 channels.*1\.\.8; got {rank!r}"):
        Plan.of(CHAIN, {"conv1": rank})


@pytest.mark.parametrize("make", [Plan.of, Plan.uniform], ids=["of", "uniform"])
def test_unknown_space_is_refused_with_the_nearest_name(make: Any) -> None:
    with pytest.raises(PlanError, match=r"'ConvChain' has no channel space 'conv'.*'conv1'"):
        make(CHAIN, {"conv": 1})


@pytest.mark.parametrize("make", [Plan.of, Plan.uniform], ids=["of", "uniform"])
def test_fixed_space_is_refused_with_its_reason(make: Any) -> None:
    with pytest.raises(PlanError, match=r"'conv3' of 'ConvChain' is fixed.*output of the model"):
        make(CHAIN, {"conv3": 1})


def test_rank_that_does_not_divide_into_blocks_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'grouped' has 4 blocks.*multiple of 4; got 6"):
        Plan.of(GROUPED, {"grouped": 6})


def test_plan_of_another_model_is_refused() -> None:
    plan = Plan.uniform(CHAIN, 0.5)
    with pytest.raises(PlanError, match=r"(?s)'ConvChain'.*'Signal'.*'conv1' has 6 channels, 8 in"):
        plan.check(read("Signal"))
    plan.check(CHAIN)


def test_wrong_name_of_a_space_is_told_and_no_other_model_is_blamed() -> None:
    plan = Plan({"conv11": Choice(8, 4)}, "ConvChain")
    with pytest.raises(PlanError, match=r"(?s)no channel space 'conv11'.*'conv1'") as caught:
        plan.check(CHAIN)
    assert str(caught.value).count("'ConvChain'") == 1
    assert "another model" not in str(caught.value)


def test_empty_plan_is_refused() -> None:
    with pytest.raises(PlanError, match="names no space"):
        Plan({}).check(CHAIN)


def test_model_without_a_free_space_is_refused_with_its_reasons() -> None:
    with pytest.raises(
        NothingToCompressError, match=r"(?s)'SharedInConflict'.*three:.*shared: out"
    ):
        Plan.uniform(read("SharedInConflict"), 0.5)


BAD_DATA: Mapping[str, Any] = {
    "nothing": {},
    "another format": {"format": "other", "version": 1, "spaces": {}},
    "a later version": {"format": "torchcap-plan", "version": 2, "spaces": {}},
    "no spaces": {"format": "torchcap-plan", "version": 1},
    "spaces in a list": {"format": "torchcap-plan", "version": 1, "spaces": ["conv1"]},
    "no rank": {"format": "torchcap-plan", "version": 1, "spaces": {"a": {"channels": 8}}},
    "a number for a space": {"format": "torchcap-plan", "version": 1, "spaces": {"a": 4}},
    "a word for a rank": {
        "format": "torchcap-plan",
        "version": 1,
        "spaces": {"a": {"channels": 8, "rank": "four"}},
    },
    "a word for the channels": {
        "format": "torchcap-plan",
        "version": 1,
        "spaces": {"a": {"channels": "eight", "rank": 4}},
    },
    "no channels at all": {
        "format": "torchcap-plan",
        "version": 1,
        "spaces": {"a": {"channels": None, "rank": 4}},
    },
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_is_no_plan_is_refused(case: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_dict(BAD_DATA[case])
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(BAD_DATA[case]))


EDITED: dict[str, tuple[Any, str]] = {
    "unknown key": (lambda d: d.update(spacs={}), "unknown key 'spacs'; did you mean 'spaces'"),
    "no spaces": (lambda d: d.pop("spaces"), "it has no 'spaces'"),
    "a list of spaces": (lambda d: d.update(spaces=["a"]), r"'spaces' must be an object.*\['a'\]"),
    "beside the rank": (
        lambda d: d["spaces"]["conv1"].update(rnk=3),
        "space 'conv1' has an unknown key 'rnk'; did you mean 'rank'",
    ),
    "no rank": (lambda d: d["spaces"]["conv2"].pop("rank"), "space 'conv2' has no 'rank'"),
    "no space": (lambda d: d["spaces"].update(conv1=4), "space 'conv1' must be an object.*got 4"),
    "a word": (
        lambda d: d["spaces"]["conv1"].update(rank="four"),
        "'rank' of space 'conv1' must be a whole number; got 'four'",
    ),
    "a truth value": (lambda d: d["spaces"]["conv1"].update(rank=True), "whole number; got True"),
    "no number": (
        lambda d: d["spaces"]["conv1"].update(rank=float("nan")),
        "whole number; got nan",
    ),
    "huge": (
        lambda d: d["spaces"]["conv1"].update(channels=10**400),
        "'channels' of space 'conv1'",
    ),
    "negative": (lambda d: d["spaces"]["conv1"].update(rank=-1), r"within 1\.\.8; got -1"),
    "a number for a reason": (lambda d: d["spaces"]["conv1"].update(reason=1), "must be a text"),
}


@pytest.mark.parametrize("case", EDITED)
def test_slip_in_a_plan_edited_by_hand_is_named_with_its_place(case: str) -> None:
    edit, message = EDITED[case]
    data = Plan.uniform(CHAIN, 0.5).to_dict()
    edit(data)
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(json.dumps(data))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"spaces": {"a": 1, "a": 2}}', "key 'a' stands twice"),
        ("9" * 5000, "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_odd_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=rf"not a plan: .*{message}"):
        Plan.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "[]", "4", '"plan"', "null"])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(text)
