"""Fresh norms: they come in without a change, train along, and leave plain layers behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from small_nets import NETS, PreActivationBlock, Residual, built, fingerprint, images
from torch import Tensor, nn

import torchcap
from torchcap import DataError
from torchcap.batches import Source
from torchcap.graph.spaces import Fold
from torchcap.training.norms import (
    fold_fresh_norms_,
    fresh_norm,
    insert_fresh_norms_,
    refresh_statistics_,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
FOLDED = pytest.mark.parametrize("net", ["residual", "shared activation", "plain"])


def compressed(net: str) -> tuple[nn.Module, tuple[Fold, ...]]:
    """A small model, and the norms that its original had."""
    model = built(NETS[net])
    folds = torchcap.analyze(model, images()).folds
    assert folds
    return torchcap.materialize(torchcap.prepare(model, example_inputs=images())), folds


def source(*seeds: int) -> Source:
    return Source([images(seed=seed) for seed in seeds or (1, 2)])


@torch.no_grad()
def output(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """What a model computes in evaluation mode."""
    return copy.deepcopy(model).eval()(images(8, seed=5) if x is None else x)


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def train_(model: nn.Module, layers: Sequence[nn.Module] = (), steps: int = 3) -> None:
    """Train every parameter for a few steps, the norms of some layers on batch statistics."""
    for layer in layers:
        fresh_norm(layer).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for seed in range(steps):
        optimizer.zero_grad()
        model(images(seed=seed)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


@FOLDED
def test_inserting_does_not_change_what_is_computed(net: str) -> None:
    small, folds = compressed(net)
    before = output(small)
    layers = insert_fresh_norms_(small, folds, source())
    assert len(layers) == len(folds) == len(norms(small))
    torch.testing.assert_close(output(small), before, **CLOSE)


@FOLDED
def test_norms_measure_the_data_and_are_ready_to_train(net: str) -> None:
    small, folds = compressed(net)
    seen: dict[nn.Module, list[Tensor]] = {}
    layers = [small.get_submodule(fold.layer) for fold in folds]
    twin = copy.deepcopy(small)
    for layer, of_twin in zip(layers, (twin.get_submodule(f.layer) for f in folds), strict=True):
        of_twin.register_forward_hook(
            lambda _, args, y, key=layer: seen.setdefault(key, []).append(y.detach().clone())
        )
    for seed in (1, 2, 3):
        twin(images(seed=seed))
    insert_fresh_norms_(small, folds, source(1, 2, 3))
    for layer in layers:
        (norm,) = norms(layer)
        rows = torch.cat(seen[layer]).movedim(1, 0).flatten(1)
        torch.testing.assert_close(norm.running_mean, rows.mean(1), **CLOSE)
        torch.testing.assert_close(norm.running_var, rows.var(1, correction=0), **CLOSE)
        assert not norm.training
        assert all(p.requires_grad for p in norm.parameters())


@FOLDED
@pytest.mark.parametrize("on_batches", [False, True])
def test_folding_gives_plain_layers_that_compute_what_the_trained_norms_computed(
    net: str, *, on_batches: bool
) -> None:
    small, folds = compressed(net)
    before = output(small)
    layers = insert_fresh_norms_(small, folds, source())
    train_(small, layers if on_batches else ())
    expected = output(small)
    fold_fresh_norms_(layers)
    assert (expected - before).norm() > 1e-2  # statistics, affine maps and kernels have moved
    torch.testing.assert_close(output(small), expected, **CLOSE)


@FOLDED
def test_nothing_is_left_behind(net: str) -> None:
    small, folds = compressed(net)
    small.register_forward_hook(lambda *_: None)
    small.get_submodule(folds[0].layer).register_forward_hook(lambda *_: None)
    before, keys = fingerprint(small), list(small.state_dict())
    fold_fresh_norms_(insert_fresh_norms_(small, folds, source()))
    after = fingerprint(small)
    for path, found in after.items():
        for key, value in found.pop("tensors").items():
            was = before[path]["tensors"][key]
            assert value[:2] + value[3:] == was[:2] + was[3:], (path, key)  # all but the version
        before[path].pop("tensors")
    assert after == before
    assert list(small.state_dict()) == keys


@FOLDED
def test_folding_at_once_gives_the_layers_back(net: str) -> None:
    small, folds = compressed(net)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    fold_fresh_norms_(insert_fresh_norms_(small, folds, source()))
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], **CLOSE)


def test_layers_without_a_norm_in_the_original_get_none() -> None:
    small, folds = compressed("plain")
    insert_fresh_norms_(small, folds, source())
    assert norms(small.classifier) == []
    assert len(norms(small.features)) == 2


def test_norms_that_stayed_are_not_doubled() -> None:
    model = built(lambda: Residual(PreActivationBlock))
    folds = torchcap.analyze(model, images()).folds
    small = torchcap.materialize(torchcap.prepare(model, example_inputs=images()))
    kept = norms(small)
    layers = insert_fresh_norms_(small, folds, source())
    assert len(kept) == 2
    assert len(norms(small)) == len(kept) + len(layers)
    before = output(small)
    fold_fresh_norms_(layers)
    assert norms(small) == kept
    torch.testing.assert_close(output(small), before, **CLOSE)


class Deep(nn.Module):
    """A layer of a volume, and one behind a flatten: norms of every dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv3d(3, 4, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(4)
        self.conv1 = nn.Conv1d(4, 4, 3)
        self.bn1 = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4 * 62, 6)
        self.bn0 = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn3(self.conv3(x.unsqueeze(2)))).flatten(2)
        x = torch.tanh(self.bn1(self.conv1(x))).flatten(1)
        return self.last(torch.tanh(self.bn0(self.fc(x))))


def test_norms_have_the_dimension_of_their_layers_output() -> None:
    model = built(Deep)
    folds = torchcap.analyze(model, images()).folds
    small = torchcap.materialize(torchcap.prepare(model, example_inputs=images()))
    before = output(small)
    layers = insert_fresh_norms_(small, folds, source())
    kinds = {type(m) for m in small.modules() if hasattr(m, "running_var")}
    assert kinds == {nn.BatchNorm1d, nn.BatchNorm3d}
    assert len(layers) == 3
    torch.testing.assert_close(output(small), before, **CLOSE)
    train_(small, layers)
    expected = output(small)
    fold_fresh_norms_(layers)
    torch.testing.assert_close(output(small), expected, **CLOSE)


@FOLDED
def test_dead_channels_stay_finite_and_dead(net: str) -> None:
    small, folds = compressed(net)
    first = small.get_submodule(folds[0].layer)
    with torch.no_grad():
        first.weight[0], first.bias[0] = 0.0, 0.25
    before = output(small)
    layers = insert_fresh_norms_(small, folds, source())
    assert float(norms(first)[0].running_var[0]) == 0
    torch.testing.assert_close(output(small), before, **CLOSE)
    train_(small, layers)
    expected = output(small)
    fold_fresh_norms_(layers)
    assert all(p.isfinite().all() for p in small.parameters())
    torch.testing.assert_close(output(small), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_have_the_dtype_of_their_layer(dtype: torch.dtype) -> None:
    small, folds = compressed("plain")
    small.to(dtype)
    data = Source([images(dtype=dtype)])
    layers = insert_fresh_norms_(small, folds, data)
    assert {t.dtype for n in norms(small) for t in (n.weight, n.bias, n.running_var)} == {dtype}
    fold_fresh_norms_(layers)
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_layers_that_are_frozen_get_no_norm() -> None:
    small, folds = compressed("residual")
    frozen = small.block1.conv1.requires_grad_(requires_grad=False)
    before = frozen.weight.detach().clone()
    layers = insert_fresh_norms_(small, folds, source())
    assert len(layers) == len(folds) - 1
    train_(small)
    fold_fresh_norms_(layers)
    torch.testing.assert_close(frozen.weight.detach(), before, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# Statistics of batches


@FOLDED
def test_refreshed_statistics_are_those_of_the_data_and_the_trained_network(net: str) -> None:
    small, folds = compressed(net)
    layers = insert_fresh_norms_(small, folds, source())
    train_(small, layers)
    first = fresh_norm(layers[0])
    drifted = first.running_mean.clone()
    seen: list[tuple[Tensor, Tensor]] = []
    refresh_statistics_(small, layers, source(1, 2))
    conv = copy.deepcopy(layers[0])
    conv._forward_hooks.clear()
    for seed in (1, 2):  # the first layer reads the images themselves
        rows = conv(images(seed=seed)).detach().movedim(1, 0).flatten(1)
        seen.append((rows.mean(1), rows.var(1)))
    means, variances = (torch.stack(found).mean(0) for found in zip(*seen, strict=True))
    torch.testing.assert_close(first.running_mean, means, **CLOSE)
    torch.testing.assert_close(first.running_var, variances, **CLOSE)
    assert (first.running_mean - drifted).norm() > 1e-3
    expected = output(small)
    fold_fresh_norms_(layers)
    torch.testing.assert_close(output(small), expected, **CLOSE)


def test_batches_of_one_value_leave_the_statistics_as_they_were() -> None:
    model = built(Deep)
    folds = torchcap.analyze(model, images()).folds
    small = torchcap.materialize(torchcap.prepare(model, example_inputs=images()))
    layers = insert_fresh_norms_(small, folds, source())
    last = fresh_norm(small.fc)
    before = {name: tensor.clone() for name, tensor in last.state_dict().items()}
    single = Source([images(1, seed=seed) for seed in range(3)])
    for layer in layers:
        fresh_norm(layer).train()
    small(images(1))
    refresh_statistics_(small, layers, single)
    for name, tensor in last.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=name)
    assert last.training
    assert int(fresh_norm(small.conv1).num_batches_tracked) == 3


# --------------------------------------------------------------------------------------------------
# Bad data


def spoilt(*, number: int) -> list[Tensor]:
    batches = [images(seed=seed) for seed in range(3)]
    batches[number] = batches[number] * torch.nan
    return batches


FAULTS: dict[str, Callable[[], list[Tensor]]] = {
    "NaN in the first batch": lambda: spoilt(number=0),
    "NaN in the last batch": lambda: spoilt(number=2),
    "other channels": lambda: [images(), images()[:, :2]],
    "no batch": list,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_data_is_refused_before_anything_changes(fault: str) -> None:
    small, folds = compressed("residual")
    before = fingerprint(small)
    with pytest.raises(DataError):
        insert_fresh_norms_(small, folds, Source(FAULTS[fault]()))
    assert fingerprint(small) == before
