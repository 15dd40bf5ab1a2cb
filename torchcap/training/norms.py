"""Fresh batch norms: a folded network gets norms of its small widths while it trains.

A folded network has no norm that would hold its activations in place, which limits its step size.
A fresh norm starts as the identity: its statistics are measured on the data, and its affine map
undoes them. After training it folds into its layer again, and leaves nothing behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchcap import processes
from torchcap.batches import Source
from torchcap.graph.spaces import Fold
from torchcap.transform.fold import absorb

_NAME = "fresh_norm"
_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def fresh_norm(layer: nn.Module) -> nn.Module:
    """Return the fresh norm of a layer."""
    return layer.get_submodule(_NAME)


class _FreshNorm:
    """The hook that sends a layer's output through its fresh norm."""

    def __call__(self, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        norm = fresh_norm(layer)
        values = output.numel() // output.shape[1]
        if values > 1 or not norm.training:
            return norm(output)
        norm.eval()  # one value has no variance
        try:
            return norm(output)
        finally:
            norm.train()


@torch.no_grad()
def insert_fresh_norms_(
    model: nn.Module, folds: Sequence[Fold], source: Source
) -> tuple[nn.Module, ...]:
    """Put a fresh batch norm behind every layer that a norm was folded into, in place.

    The model computes the same as before. The norms are in evaluation mode: they hold on to the
    statistics of the data, and train a scale and a shift of every channel. Layers
    whose weight or bias is frozen get none: folding it would change them.

    Args:
        model: a folded model.
        folds: the norms that its original had.
        source: batches, for the statistics.

    Returns:
        the layers that got one.
    """
    layers = [model.get_submodule(fold.layer) for fold in folds if fold.norm is not None]
    layers = [layer for layer in layers if _trains(layer)]
    statistics = _statistics(model, layers, source)
    done = []
    for layer in layers:
        if layer not in statistics:
            continue
        mean, variance, dim = statistics[layer]
        norm: Any = _NORMS[dim](len(mean), device=mean.device, dtype=mean.dtype)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(mean)
        layer.add_module(_NAME, norm)
        layer.register_forward_hook(_FreshNorm())
        norm.eval()
        done.append(layer)
    return tuple(done)


@torch.no_grad()
def refresh_statistics_(model: nn.Module, layers: Sequence[nn.Module], source: Source) -> None:
    """Measure the statistics of fresh norms anew, in place, on images as they are.

    While a model trains, its norms see changed and mixed images, and a network that is changing.
    """
    norms: list[Any] = [getattr(layer, _NAME) for layer in layers]
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for the plain average over batches
    with source.passing(0) as batches:
        for number, batch in enumerate(batches):
            batch.run(model)
            if number + 1 >= len(source):
                break
    for norm, state in zip(norms, before, strict=True):
        if not norm.num_batches_tracked:  # one value a batch, which has no variance
            norm.load_state_dict(state)


@torch.no_grad()
def fold_fresh_norms_(layers: Sequence[nn.Module]) -> None:
    """Fold the fresh norms of some layers into them, in place, and take them off."""
    for layer in layers:
        norm: Any = getattr(layer, _NAME)
        processes.mean_(norm.running_mean)
        processes.mean_(norm.running_var)
        weight, bias = absorb(layer, norm)
        layer.weight.copy_(weight)  # type: ignore[operator]
        layer.bias.copy_(bias)  # type: ignore[operator]
        delattr(layer, _NAME)
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, _FreshNorm):
                del layer._forward_hooks[key]


def _statistics(
    model: nn.Module, layers: Sequence[nn.Module], source: Source
) -> dict[nn.Module, tuple[Tensor, Tensor, int]]:
    """Measure the mean and variance of each layer's output channels, over a pass of the data."""
    sums: dict[nn.Module, list[Tensor]] = {}
    dims: dict[nn.Module, int] = {}

    def see(layer: nn.Module, _: Any, output: Tensor) -> None:
        rows = output.detach().movedim(1, 0).flatten(1).double()
        count = rows.new_tensor(float(rows.shape[1]))
        found = [count, rows.sum(1), rows.square().sum(1)]
        before = sums.get(layer)
        sums[layer] = (
            found if before is None else [a + b for a, b in zip(before, found, strict=True)]
        )
        dims[layer] = output.dim()

    with _hooked(layers, see), source.passing(0) as batches:
        for number, batch in enumerate(batches):
            batch.run(model)
            if number + 1 >= len(source):
                break
    statistics = {}
    for layer, (count, total, square) in sums.items():
        for tensor in (count, total, square):
            processes.sum_(tensor)
        mean = total / count
        variance = (square / count - mean.square()).clamp_min(0)
        like = layer.weight
        statistics[layer] = (mean.to(like), variance.to(like), dims[layer])  # type: ignore[arg-type]
    return statistics


@contextmanager
def _hooked(layers: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trains(layer: nn.Module) -> bool:
    tensors = (getattr(layer, name, None) for name in ("weight", "bias"))
    return all(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)
