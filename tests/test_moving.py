"""Operators that move, cut, repeat and reduce dimensions: followed beside the channels only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from proofs import materialize_error, permutation_error, random_plan, random_student, randomize_
from torch import Tensor, nn

from torchcap import analyze

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Between = Callable[[Tensor], Tensor]


class Through(nn.Module):
    """Two layers with an operator between them, channels in dimension 1 before and behind it."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


FOLLOWED: dict[str, Between] = {
    "squeeze": lambda x: x.mean(3, keepdim=True).squeeze(3).unsqueeze(2),
    "squeeze of a larger dimension": lambda x: x.squeeze(2),
    "squeeze before the channels": lambda x: x[None].squeeze(0),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4),
    "expand by sizes": lambda x: x.mean(2, keepdim=True).expand(x.shape[0], x.shape[1], 4, 6),
    "expand with a new dimension": lambda x: x.mean(0).expand(2, -1, -1, -1),
    "expand_as": lambda x: x.mean((2, 3), keepdim=True).expand_as(x) + 0 * x,
    "repeat": lambda x: x.repeat(1, 1, 2, 1),
    "repeat with a new dimension": lambda x: x.repeat(2, 1, 1, 1, 1)[0],
    "tile": lambda x: x.tile(2, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=2),
    "roll": lambda x: torch.roll(x, shifts=(1, -2), dims=(2, 3)),
    "flip": lambda x: x.flip(2, 3),
    "flip of a list": lambda x: torch.flip(x, [-1]),
    "unbind": lambda x: x.unbind(2)[1].unsqueeze(-1),
    "unbind of the batch": lambda x: torch.unbind(x)[0].unsqueeze(0),
    "split": lambda x: x.split(3, dim=2)[1],
    "split of sizes": lambda x: torch.split(x, [1, 5], dim=3)[1],
    "stack": lambda x: torch.stack([x, x.relu()], dim=2).mean(2),
    "stack in front": lambda x: torch.stack((x, x * 2))[1],
    "sum": lambda x: x.sum((2, 3), keepdim=True),
    "sum of one dimension": lambda x: torch.sum(x, 2).unsqueeze(2),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "softmax": lambda x: F.softmax(x, dim=2),
    "softmax as a method": lambda x: x.softmax(-1),
    "softmax as a module": nn.Softmax(dim=3),
}
REFUSED: dict[str, tuple[Between, str]] = {
    "squeeze without a dimension": (lambda x: x.squeeze(), "squeezed without"),
    "expand to a number": (
        lambda x: x.mean((2, 3), keepdim=True).expand(2, 6, 4, 4),
        "fixed number of channels",
    ),
    "repeat of the channels": (lambda x: x.repeat(1, 2, 1, 1)[:, :6], "channels are repeated"),
    "interleaving of the channels": (
        lambda x: x.repeat_interleave(1, dim=1),
        "acts along the channels",
    ),
    "interleaving of everything": (
        lambda x: x.repeat_interleave(1).reshape(2, 6, 6, 6),
        "arguments that its rule does not know",
    ),
    "roll of the channels": (lambda x: x.roll(1, 1), "acts along the channels"),
    "flip of the channels": (lambda x: x.flip(1), "acts along the channels"),
    "unbind of the channels": (
        lambda x: torch.stack(x.unbind(1), 1),
        "channels are taken one by one",
    ),
    "split of the channels": (
        lambda x: torch.cat(x.split(3, dim=1), 1),
        "split into fixed numbers",
    ),
    "sum of the channels": (
        lambda x: x + x.sum(1, keepdim=True),
        "reduced over the channels",
    ),
    "maximum with its place": (lambda x: x.max(2)[0].unsqueeze(2), "several results"),
    "softmax over the channels": (lambda x: x.softmax(1), "acts along the channels"),
}


def made(between: Between) -> nn.Module:
    model = Through(between).double().eval()
    randomize_(model, torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("case", FOLLOWED)
def test_channels_are_followed_beside_the_operator(case: str) -> None:
    model = made(FOLLOWED[case])
    graph = analyze(model, IMAGE)
    assert [space.name for space in graph.free] == ["first"]
    assert permutation_error(model, graph.free, (IMAGE,)) < 1e-12
    student = random_student(model, random_plan(graph, 0), (IMAGE,))
    assert materialize_error(student, (IMAGE,)) < 1e-12


@pytest.mark.parametrize("case", REFUSED)
def test_channels_that_an_operator_acts_along_stay(case: str) -> None:
    between, reason = REFUSED[case]
    graph = analyze(made(between), IMAGE)
    assert not graph.free
    assert reason in graph["first"].reason


def test_bends_of_maximum_and_softmax_are_noted() -> None:
    for between in (FOLLOWED["amax"], FOLLOWED["softmax"]):
        assert analyze(made(between), IMAGE)["first"].freedom == "stiefel"
    assert analyze(made(FOLLOWED["sum"]), IMAGE)["first"].freedom == "linear"
