"""Rounds: every projection trains once, and apart from those that would move its target."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torchvision
from small_nets import NETS, built, images
from torch import Tensor

import torchcap
from torchcap import Plan, Round, SpaceGraph, all_at_once, layer_by_layer, odd_then_even
from torchcap.training.rounds import Rounds

WAYS = pytest.mark.parametrize("way", [all_at_once, odd_then_even, layer_by_layer])


@cache
def of_torchvision(name: str) -> tuple[SpaceGraph, Plan]:
    with torch.device("meta"):  # to read a network, its weights are not needed
        model = getattr(torchvision.models, name)(num_classes=5).eval()
        return halved(torchcap.analyze(model, torch.zeros(1, 3, 32, 32)))


def halved(graph: SpaceGraph) -> tuple[SpaceGraph, Plan]:
    return graph, Plan.uniform(graph, 0.5)


def of_net(name: str) -> tuple[SpaceGraph, Plan]:
    return halved(torchcap.analyze(built(NETS[name]), images()))


@pytest.fixture(scope="module", params=["resnet18", "resnet50", "vgg11_bn"])
def network(request: pytest.FixtureRequest) -> tuple[SpaceGraph, Plan]:
    return of_torchvision(request.param)


def linked(graph: SpaceGraph, first: str, second: str) -> bool:
    """Whether a layer reads the one space and writes the other."""
    readers = {port.module for port in graph[first].consumers}
    return bool(readers & {port.module for port in graph[second].producers})


@WAYS
def test_every_planned_space_trains_in_one_round(
    way: Rounds, network: tuple[SpaceGraph, Plan]
) -> None:
    trained = [name for turn in way(*network) for name in turn.train]
    assert len(trained) == len(set(trained))
    assert set(trained) == set(network[1].choices)


@WAYS
@pytest.mark.parametrize("net", NETS)
def test_every_planned_space_of_a_small_net_trains_in_one_round(way: Rounds, net: str) -> None:
    graph, plan = of_net(net)
    trained = [name for turn in way(graph, plan) for name in turn.train]
    assert sorted(trained) == sorted(plan.choices)
    assert all(set(turn.train) <= set(turn.present) for turn in way(graph, plan))


@WAYS
def test_spaces_that_are_not_planned_are_in_no_round(way: Rounds) -> None:
    graph, _ = of_net("plain")
    part = Plan.of(graph, {"features.3": 4})
    assert way(graph, part) == (Round(("features.3",), ("features.3",)),)


def test_all_at_once_is_one_round(network: tuple[SpaceGraph, Plan]) -> None:
    (turn,) = all_at_once(*network)
    assert turn.train == turn.present


def test_layers_that_follow_each_other_train_in_different_rounds(
    network: tuple[SpaceGraph, Plan],
) -> None:
    graph, plan = network
    turns = odd_then_even(graph, plan)
    for turn in turns:
        pairs = [(a, b) for a in turn.train for b in turn.train if linked(graph, a, b)]
        assert pairs == []
        assert set(turn.present) == set(plan.choices)


def test_basic_blocks_train_in_one_round() -> None:
    (turn,) = odd_then_even(*of_torchvision("resnet18"))
    assert turn.train == tuple(f"layer{s}.{b}.conv1" for s in (1, 2, 3, 4) for b in (0, 1))


def test_bottlenecks_train_their_first_convolutions_and_then_their_second() -> None:
    graph, plan = of_torchvision("resnet50")
    # The stem is free too, and the first block follows it: that chain is odd, even, odd.
    blocks = {
        f"layer{s}.{b}" for s, n in zip((1, 2, 3, 4), (3, 4, 6, 3), strict=True) for b in range(n)
    }
    others = blocks - {"layer1.0"}
    odd, even = odd_then_even(graph, plan)
    assert set(odd.train) == {"conv1", "layer1.0.conv2"} | {f"{b}.conv1" for b in others}
    assert set(even.train) == {"layer1.0.conv1"} | {f"{b}.conv2" for b in others}


def test_plain_chain_alternates() -> None:
    convolutions = [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)]
    chain = [*convolutions, "classifier.0", "classifier.3"]
    odd, even = odd_then_even(*of_torchvision("vgg11_bn"))
    assert list(odd.train) == chain[0::2]
    assert list(even.train) == chain[1::2]


def test_layer_by_layer_follows_the_forward_and_leaves_what_is_behind_at_full_width(
    network: tuple[SpaceGraph, Plan],
) -> None:
    graph, plan = network
    turns = layer_by_layer(graph, plan)
    names = [name for turn in turns for name in turn.train]
    assert len(turns) == len(plan.choices)
    assert [turn.present for turn in turns] == [tuple(names[: i + 1]) for i in range(len(names))]
    backwards = [(a, b) for i, a in enumerate(names) for b in names[:i] if linked(graph, a, b)]
    assert backwards == []


def test_rounds_of_the_user_are_called_with_the_graph_and_the_plan() -> None:
    seen = []

    def mine(graph: SpaceGraph, plan: Plan) -> tuple[Round, ...]:
        seen.append((graph.model, plan.ranks))
        return all_at_once(graph, plan)[:1]

    model = built(NETS["residual"]).float()
    student = torchcap.prepare(model, example_inputs=batch())
    torchcap.train_projections(student, [batch()], epochs=1, rounds=mine)
    assert seen == [("Residual", {"block1.conv1": 3, "block2.conv1": 4})]


def batch() -> Tensor:
    return images(dtype=torch.float32)
