"""Networks drawn at random: what is read is true, and what is rewritten computes the same."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proofs import (
    counted_cost,
    identity_error,
    materialize_error,
    permutation_error,
    random_plan,
    random_student,
    randomize_,
)
from strategies import Network, networks
from torch import nn

from torchcap import analyze, cost, materialize

PROPERTY = settings(
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def built(network: Network) -> nn.Module:
    model = network.build()
    randomize_(model, torch.Generator().manual_seed(network.seed))
    return model


@PROPERTY
@given(network=networks())
def test_permuting_every_free_space_leaves_the_output_unchanged(network: Network) -> None:
    model, inputs = built(network), network.inputs()
    graph = analyze(model, inputs)
    assert graph.free  # fc1 of the head at least, so that there is something to permute
    assert permutation_error(model, graph.free, inputs) <= 1e-10


@PROPERTY
@given(network=networks(), seed=st.integers(0, 2**16))
def test_materialized_model_equals_prepared_model_at_any_plan(network: Network, seed: int) -> None:
    model, inputs = built(network), network.inputs()
    plan = random_plan(analyze(model, inputs), seed)
    student = random_student(model, plan, inputs, seed)
    assert materialize_error(student, inputs) <= 1e-12


@settings(PROPERTY, max_examples=20)  # the counter traces the model anew, which takes its time
@given(network=networks(), seed=st.integers(0, 2**16))
def test_predicted_cost_is_what_is_counted_at_any_plan(network: Network, seed: int) -> None:
    model, inputs = built(network), network.inputs()
    graph = analyze(model, inputs)
    plan = random_plan(graph, seed)
    small = materialize(random_student(model, plan, inputs, seed))
    predicted = cost(graph, plan)
    assert (predicted.macs, predicted.parameters) == counted_cost(small, inputs)


@PROPERTY
@given(network=networks())
def test_full_width_from_the_identity_is_the_original_network(network: Network) -> None:
    assert identity_error(built(network), network.inputs()) <= 1e-12
