"""Odd code is read as it runs: no wrong small model, no crash, no changed model."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from proofs import (
    identity_error,
    permutation_error,
    random_plan,
    random_student,
    randomize_,
    relative_difference,
    selection_error,
)
from quirks import GLOBAL, QUIRKS, WORLD, Net
from small_nets import fingerprint
from torch import Tensor, nn

from torchcap import NothingToCompressError, TraceError, analyze, compress, materialize, prepare
from torchcap.graph.copies import copied


def image(count: int = 2, size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


INPUTS = ((image(),), (image(3),), (image(1, 8),))


def built(*kinds: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(*kinds).double().eval()
    randomize_(model, torch.Generator().manual_seed(1))
    return model


def surroundings() -> tuple[Any, ...]:
    """Return what a call must leave as it was, outside of the model."""
    numbers = np.random.get_state()  # noqa: NPY002 - what users seed
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        (numbers[0], numbers[1].tolist(), *numbers[2:]),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        WORLD.state(),
    )


def check(model: nn.Module) -> set[str]:
    """Check everything that holds of any model, and return the names of its free spaces."""
    before, kept, around = fingerprint(model), list(GLOBAL), surroundings()
    graph = analyze(model, image())
    assert surroundings() == around
    assert fingerprint(model) == before
    assert [id(t) for t in kept] == [id(t) for t in GLOBAL]
    if not graph.free:
        with pytest.raises(NothingToCompressError):
            compress(model, example_inputs=image())
        return set()
    for inputs in INPUTS:
        assert permutation_error(model, graph.free, inputs) <= 1e-9
    assert identity_error(model, (image(),)) <= 1e-12
    plan = random_plan(graph, 0)
    around = surroundings()
    student = random_student(model, plan, (image(),))
    assert surroundings() == around
    assert fingerprint(model) == before
    small = materialize(student)
    for inputs in INPUTS:
        with torch.no_grad():
            found = copied(small)(*inputs), copied(student)(*inputs)
        assert relative_difference(*found) <= 1e-11
    error = selection_error(model, plan, (image(),), graph=graph)
    assert error is None or error <= 1e-9
    assert fingerprint(model) == before
    return {space.name for space in graph.free}


@pytest.mark.parametrize("kind", QUIRKS)
def test_odd_code_is_compressed_or_left_alone(kind: str) -> None:
    free = check(built(kind))
    expected = QUIRKS[kind].free
    if expected is not None:
        assert ("quirks.0.a" in free) == expected


@settings(
    deadline=None,
    print_blob=True,
    max_examples=15 if settings.default.max_examples <= 100 else 500,  # in the nightly profile
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(st.sampled_from(sorted(QUIRKS)), min_size=2, max_size=3))
@example(["branch_on_the_image_to_another_layer", "kind_of_integer"])
def test_odd_code_in_a_row(kinds: list[str]) -> None:
    """Whatever stands beside it, nothing is wrong, and nothing crashes."""
    check(built(*kinds))


@pytest.mark.parametrize(
    "function",
    [
        torch.func.vmap(torch.tanh),
        torch.func.grad(lambda t: (t**2).sum()),
        torch.func.functionalize(lambda y: 2 * y),
    ],
)
def test_what_changes_functions_is_declined(function: Callable[[Tensor], Tensor]) -> None:
    class Mapped(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](function(self[0](x)))

    model = Mapped(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)).double().eval()
    with pytest.raises(TraceError, match=r"test_quirks\.py:"):
        analyze(model, image())


def test_features_kept_before_a_norm_are_what_they_were() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    model = nn.Sequential(*layers, nn.Conv2d(8, 2, 3)).double().eval()
    randomize_(model, torch.Generator().manual_seed(0))
    kept: dict[str, Tensor] = {}
    model[1].register_forward_hook(lambda _module, _input, output: kept.update(output=output))
    model(image())
    expected = kept["output"]
    student = prepare(model, ratio=1.0, example_inputs=image()).eval()
    student(image())
    assert kept["output"] is not expected
    assert relative_difference(kept["output"], expected) <= 1e-12
