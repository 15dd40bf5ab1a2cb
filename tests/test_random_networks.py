"""Networks drawn at random: what is read is true, and what is rewritten computes the same.

Two hundred in all, and two and a half thousand with ``--hypothesis-profile=nightly``.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proofs import (
    RandomReflection,
    counted_cost,
    identity_error,
    materialize_error,
    permutation_error,
    random_plan,
    random_student,
    randomize_,
    selection_error,
)
from strategies import Network, networks
from torch import nn

from torchcap import Plan, analyze, cost, materialize, prepare


def examples(count: int) -> settings:
    """Return the settings of a test: so many examples by default, more in other profiles."""
    return settings(
        deadline=None,
        max_examples=count * settings.default.max_examples // 100,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def built(network: Network) -> nn.Module:
    model = network.build()
    randomize_(model, torch.Generator().manual_seed(network.seed))
    return model


@examples(50)
@given(network=networks(), streams=st.booleans())
def test_permuting_every_free_space_leaves_the_output_unchanged(
    network: Network, *, streams: bool
) -> None:
    model, inputs = built(network), network.inputs()
    graph = analyze(model, inputs, streams=streams)
    assert graph.free  # fc1 of the head at least, so that there is something to permute
    assert permutation_error(model, graph.free, inputs) <= 1e-10


@examples(40)
@given(network=networks(), seed=st.integers(0, 2**16))
def test_materialized_model_equals_prepared_model_at_any_plan(network: Network, seed: int) -> None:
    model, inputs = built(network), network.inputs()
    plan = random_plan(analyze(model, inputs), seed)
    student = random_student(model, plan, inputs, seed)
    assert materialize_error(student, inputs) <= 1e-12


@examples(30)
@given(network=networks(), streams=st.booleans(), seed=st.integers(0, 2**16))
def test_selection_is_the_original_without_the_channels_that_are_dropped(
    network: Network, *, streams: bool, seed: int
) -> None:
    model, inputs = built(network), network.inputs()
    plan = random_plan(analyze(model, inputs, streams=streams), seed)
    error = selection_error(model, plan, inputs, seed, streams=streams)
    assert error is None or error <= 1e-10


@examples(30)
@given(network=networks(), streams=st.booleans(), seed=st.integers(0, 2**16))
def test_one_channel_a_block_is_enough(network: Network, *, streams: bool, seed: int) -> None:
    model, inputs = built(network), network.inputs()
    graph = analyze(model, inputs, streams=streams)
    plan = Plan.of(graph, {space.name: space.blocks for space in graph.free})
    start = RandomReflection(seed)
    student = prepare(model, plan=plan, example_inputs=inputs, init=start, streams=streams)
    assert materialize_error(student, inputs) <= 1e-12


@examples(20)  # the counter traces the model anew, which takes its time
@given(network=networks(), seed=st.integers(0, 2**16))
def test_predicted_cost_is_what_is_counted_at_any_plan(network: Network, seed: int) -> None:
    model, inputs = built(network), network.inputs()
    graph = analyze(model, inputs)
    plan = random_plan(graph, seed)
    small = materialize(random_student(model, plan, inputs, seed))
    predicted = cost(graph, plan)
    assert (predicted.macs, predicted.parameters) == counted_cost(small, inputs)


@examples(30)
@given(network=networks())
def test_full_width_from_the_identity_is_the_original_network(network: Network) -> None:
    assert identity_error(built(network), network.inputs()) <= 1e-12
