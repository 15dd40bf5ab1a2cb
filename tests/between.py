"""Two layers with an operator between them, and the proof that channels go through it."""

from __future__ import annotations

from collections.abc import Callable

import torch
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


def made(between: Between) -> nn.Module:
    model = Through(between).double().eval()
    randomize_(model, torch.Generator().manual_seed(1))
    return model


def check_first_space(model: nn.Module, freedom: str, tolerance: float = 1e-12) -> None:
    """Prove that the first space, and no other, is free, and right in all its ports."""
    graph = analyze(model, IMAGE)
    assert [(space.name, space.freedom) for space in graph.free] == [("first", freedom)]
    assert permutation_error(model, graph.free, (IMAGE,)) < tolerance
    student = random_student(model, random_plan(graph, 0), (IMAGE,))
    assert materialize_error(student, (IMAGE,)) < tolerance
