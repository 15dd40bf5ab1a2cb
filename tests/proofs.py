"""Proofs that a reading and a rewriting are right, for any model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchcap.graph.spaces import ChannelSpace, Port


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors_of(value)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [t for value in output for t in tensors_of(value)]
    return []


def relative_difference(left: Any, right: Any) -> float:
    """Return the largest norm of a difference, relative to the tensor's norm."""
    pairs = zip(tensors_of(left), tensors_of(right), strict=True)
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        for a, b in pairs
    )


def permute_space_(model: nn.Module, space: ChannelSpace, generator: torch.Generator) -> None:
    """Permute the channels of a space, within its blocks, in every port of ``model``."""
    size = space.channels // space.blocks
    order = torch.cat(
        [b * size + torch.randperm(size, generator=generator) for b in range(space.blocks)]
    )
    for port in space.ports:
        _permute_port_(model, port, order)


def _permute_port_(model: nn.Module, port: Port, order: Tensor) -> None:
    tensor = getattr(model.get_submodule(port.module), port.parameter).data
    inside = order[port.start : port.start + port.channels] - port.start
    if port.groups == 1:
        source = (inside[:, None] * port.repeat + torch.arange(port.repeat)).flatten() + port.offset
        index = torch.arange(tensor.shape[port.axis])
        index[port.offset : port.offset + len(source)] = source
        tensor.copy_(tensor.index_select(port.axis, index).clone())
        return
    # Input g * width + j of a grouped layer is stored at position j of the rows of group g.
    width = tensor.shape[port.axis]
    index = torch.arange(width * port.groups)
    source = (inside[:, None] * port.repeat + torch.arange(port.repeat)).flatten() + port.offset
    index[port.offset : port.offset + len(source)] = source
    rows = tensor.shape[0] // port.groups
    for group in range(port.groups):
        local = index[group * width : (group + 1) * width] - group * width
        block = tensor[group * rows : (group + 1) * rows]
        block.copy_(block.index_select(port.axis, local).clone())


def randomize_(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and statistic a value of its own, so that no symmetry hides a fault."""
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name == "running_var":
                tensor.data.copy_(0.5 + noise.abs())
            elif tensor.numel() == max(tensor.shape, default=1):
                tensor.data.add_(0.2 * noise.to(tensor.dtype))


@torch.no_grad()
def permutation_error(model: nn.Module, spaces: Sequence[ChannelSpace], inputs: Any) -> float:
    """Return how much the output changes when each space in turn gets its channels permuted."""
    generator = torch.Generator().manual_seed(0)
    changed = copy.deepcopy(model)
    for space in spaces:
        permute_space_(changed, space, generator)
    return relative_difference(changed(*inputs), model(*inputs))
