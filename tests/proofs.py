"""Proofs that a reading and a rewriting are right, for any model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis, parameter_count
from torch import Tensor, nn

from torchcap import Plan, RandomOrthonormal, SpaceGraph, analyze, materialize, prepare
from torchcap.graph.copies import copied
from torchcap.graph.spaces import ChannelSpace, Port
from torchcap.projection.initialize import SpaceContext
from torchcap.transform.fold import fold_

# --------------------------------------------------------------------------------------------------
# Outputs


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors_of(value)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [t for value in output for t in tensors_of(value)]
    return []


@torch.no_grad()
def relative_difference(left: Any, right: Any) -> float:
    """Return the largest norm of a difference, relative to the tensor's norm.

    Infinite where nothing could be told from the outputs: no tensor in them, all zero or NaN.
    """
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(tensors_of(left), tensors_of(right), strict=True)
    ]
    return max(errors) if errors and all(map(isfinite, errors)) else inf


# --------------------------------------------------------------------------------------------------
# Weights that hide nothing


@torch.no_grad()
def randomize_(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and statistic a value of its own, so that no symmetry hides a fault."""
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name == "running_var":
                tensor.copy_(0.5 + noise.abs())
            elif tensor.numel() == max(tensor.shape, default=1):
                tensor.add_(0.2 * noise.to(tensor.dtype))


# --------------------------------------------------------------------------------------------------
# The reading: a permuted space is the same network


@torch.no_grad()
def permutation_error(model: nn.Module, spaces: Sequence[ChannelSpace], inputs: Any) -> float:
    """Return how much the output changes when the channels of every given space are permuted."""
    generator = torch.Generator().manual_seed(0)
    changed = copied(model)
    for space in spaces:
        permute_space_(changed, space, generator)
    return relative_difference(changed(*inputs), copied(model)(*inputs))


def permute_space_(model: nn.Module, space: ChannelSpace, generator: torch.Generator) -> None:
    """Move every channel of a space to another place of its block, in every port of ``model``."""
    size = space.channels // space.blocks
    order = torch.cat([b * size + _cycle(size, generator) for b in range(space.blocks)])
    for port in space.ports:
        _permute_port_(model, port, order)


def _cycle(size: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation that leaves nothing in its place."""
    walk = torch.randperm(size, generator=generator)
    return torch.empty_like(walk).index_copy_(0, walk, walk.roll(1))


def _permute_port_(model: nn.Module, port: Port, order: Tensor) -> None:
    tensor = getattr(model.get_submodule(port.module), port.parameter).data
    inside = order[port.start : port.start + port.channels] - port.start
    source = (inside[:, None] * port.repeat + torch.arange(port.repeat)).flatten() + port.offset
    # Entry g * width + j of a grouped layer's input is stored at position j of the rows of group g.
    width = tensor.shape[port.axis]
    index = torch.arange(width * port.groups)
    index[port.offset : port.offset + len(source)] = source
    rows = tensor.shape[0] // port.groups
    for group in range(port.groups):
        block = tensor[group * rows : (group + 1) * rows]
        local = index[group * width : (group + 1) * width] - group * width
        block.copy_(block.index_select(port.axis, local).clone())


# --------------------------------------------------------------------------------------------------
# The rewriting: materialized is prepared, and at full width it is the original


def random_plan(graph: SpaceGraph, seed: int) -> Plan:
    """Return a plan that cuts every free space, to a random rank from a third of its width up."""
    generator = torch.Generator().manual_seed(seed)
    ranks = {}
    for space in graph.free:
        width = space.channels // space.blocks
        least = -(-width // 3)
        rank = int(torch.randint(least, max(width, least + 1), (), generator=generator))
        ranks[space.name] = rank * space.blocks
    return Plan.of(graph, ranks)


class RandomReflection:
    """Random columns of a random reflection: orthonormal and dense, without a factorisation."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, space: SpaceContext) -> Tensor:
        if space.selection:
            return RandomOrthonormal(self.generator)(space)
        size = (space.blocks, space.block_channels, 1)
        normal = torch.randn(size, generator=self.generator, dtype=torch.float64)
        normal = normal / normal.norm(dim=1, keepdim=True)
        mirrored = torch.eye(space.block_channels, dtype=torch.float64) - 2 * normal @ normal.mT
        columns = torch.randperm(space.block_channels, generator=self.generator)
        return mirrored[..., columns[: space.block_rank]]


def random_student(model: nn.Module, plan: Plan, inputs: Any, seed: int = 0) -> nn.Module:
    """Prepare a model with random orthonormal projections."""
    return prepare(model, plan=plan, example_inputs=inputs, init=RandomReflection(seed))


@torch.no_grad()
def identity_error(model: nn.Module, inputs: Any) -> float:
    """Return how far the model that is prepared at full width is from the original."""
    student = prepare(model, ratio=1.0, example_inputs=inputs)
    return relative_difference(student(*inputs), copied(model)(*inputs))


@torch.no_grad()
def materialize_error(student: nn.Module, inputs: Any) -> float:
    """Return how far the materialized model is from the prepared one."""
    return relative_difference(materialize(student)(*inputs), student(*inputs))


# --------------------------------------------------------------------------------------------------
# The meaning: a selection is the original without the channels that are dropped


class RandomSelection:
    """Columns of the identity, drawn at random; remembers the channels that each space keeps."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: dict[str, Tensor] = {}

    def __call__(self, space: SpaceContext) -> Tensor:
        basis = torch.zeros(space.blocks, space.block_channels, space.block_rank)
        for block in basis:
            chosen = torch.randperm(space.block_channels, generator=self.generator)
            block[chosen[: space.block_rank], torch.arange(space.block_rank)] = 1.0
        self.kept[space.name] = basis.sum(-1).flatten().bool()
        return basis.double()


def selection_error(
    model: nn.Module,
    plan: Plan,
    inputs: Any,
    seed: int = 0,
    *,
    streams: bool = False,
    graph: SpaceGraph | None = None,
) -> float | None:
    """Return how far a small model is from the original where the dropped channels are zeros.

    Norms count the channels that they run over, so their spaces keep the full width. None where no
    space is left.
    """
    graph = graph or analyze(model, inputs, streams=streams)
    ranks = {n: rank for n, rank in plan.ranks.items() if not _is_normed(model, graph[n])}
    if not ranks:
        return None
    start = RandomSelection(seed)
    plan = Plan.of(graph, ranks)
    student = prepare(model, plan=plan, example_inputs=inputs, init=start, streams=streams)
    small = materialize(student)
    masked = copied(model)
    fold_(masked, graph.folds)
    for space in graph.after_folding().spaces:
        for port in space.producers + space.consumers if space.name in ranks else ():
            _clear_port_(masked, port, ~start.kept[space.name])
    with torch.no_grad():
        return relative_difference(small(*inputs), masked(*inputs))


def _is_normed(model: nn.Module, space: ChannelSpace) -> bool:
    kinds = {type(model.get_submodule(port.module)).__name__ for port in space.carriers}
    return any(re.search("(Layer|Group|Rms|RMS|Response)Norm", kind) for kind in kinds)


@torch.no_grad()
def _clear_port_(model: nn.Module, port: Port, dropped: Tensor) -> None:
    tensor = getattr(model.get_submodule(port.module), port.parameter).data
    inside = dropped[port.start : port.start + port.channels].repeat_interleave(port.repeat)
    entries = port.offset + inside.nonzero().flatten()
    # The input axis of a grouped layer is cut into groups, as in _permute_port_.
    width, rows = tensor.shape[port.axis], tensor.shape[0] // port.groups
    for group in range(port.groups):
        part = tensor[group * rows : (group + 1) * rows] if port.groups > 1 else tensor
        part.index_fill_(port.axis, entries[entries // width == group] - group * width, 0.0)


# --------------------------------------------------------------------------------------------------
# The cost: what another library counts on the rewritten model


def counted_cost(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """Return the multiply-adds and parameters of a plain model, as fvcore counts them."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    counter = FlopCountAnalysis(model, inputs)
    counter.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False)
    operators = counter.by_operator()
    return int(operators["conv"] + operators["linear"]), parameter_count(model)[""]
