"""Projected tensors against the dense matrices of the formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchcap.projection import maps
from torchcap.projection.maps import Projection, Selection, Stiefel, shared_bases
from torchcap.projection.parametrizations import (
    ProjectInput,
    ProjectOutput,
    Segment,
    apply_segments,
    lift_segments,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def stiefel(channels: int, rank: int, *, blocks: int = 1, seed: int = 0) -> Stiefel:
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, channels // blocks, rank // blocks)
    basis = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
    return Stiefel(basis)


def selection(channels: int, rank: int, *, blocks: int = 1, seed: int = 0) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    width, kept = channels // blocks, rank // blocks
    rows = [torch.randperm(width, generator=generator)[:kept] for _ in range(blocks)]
    return Selection(torch.stack([torch.eye(width, dtype=torch.float64)[:, row] for row in rows]))


def dense(projection: Projection) -> Tensor:
    """The whole ``P``, ``(channels, rank)``, from its definition."""
    if isinstance(projection, Stiefel):
        U, _, Vh = torch.linalg.svd(projection.proxy.detach(), full_matrices=False)
        return torch.block_diag(*(U @ Vh))
    assert isinstance(projection, Selection)
    width = projection.channels // projection.blocks
    return torch.block_diag(*[torch.eye(width, dtype=torch.float64)[:, k] for k in projection.kept])


def dense_axis(segments: list[Segment]) -> Tensor:
    """The matrix of a whole axis, ``(before, after)``: a direct sum of what its segments do."""
    blocks = []
    for segment in segments:
        if segment.projection is None:
            blocks.append(torch.eye(segment.length, dtype=torch.float64))
            continue
        P, part = segment.projection, dense(segment.projection)
        rows, columns = P.channels // P.blocks, P.rank // P.blocks
        last = segment.first + segment.blocks
        part = part[segment.first * rows : last * rows, segment.first * columns : last * columns]
        blocks.append(torch.kron(part, torch.eye(segment.repeat, dtype=torch.float64)))
    return torch.block_diag(*blocks)


def random_(module: nn.Module, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    module.double()
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def registered(module: nn.Module, name: str, parametrization: nn.Module) -> Tensor:
    """Register, and return the tensor as it was before."""
    before = getattr(module, name).detach().clone()
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    return before


# --------------------------------------------------------------------------------------------------
# Layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 9)),
    "Conv2d": (lambda: nn.Conv2d(6, 10, (3, 2), stride=2), (2, 6, 7, 8)),
    "Conv3d": (lambda: nn.Conv3d(6, 10, 2), (2, 6, 4, 5, 3)),
    "Conv2dSame": (lambda: Conv2dSame(6, 10, 3, stride=2), (2, 6, 7, 8)),
    "Linear": (lambda: nn.Linear(6, 10), (2, 6)),
    "Linear of a sequence": (lambda: nn.Linear(6, 10), (2, 4, 6)),
}
KINDS = pytest.mark.parametrize("kind", [stiefel, selection])
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS)


def layer_and_input(name: str) -> tuple[nn.Module, Tensor, int]:
    make, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    module = random_(make())
    return module, x, 1 if "Conv" in name else len(shape) - 1


@EVERY_LAYER
@KINDS
def test_projected_producer_writes_the_projected_features(layer: str, kind: Callable) -> None:
    module, x, channel_dim = layer_and_input(layer)
    expected = module(x).movedim(channel_dim, -1)
    P = kind(10, 4)
    for name in ("weight", "bias"):
        registered(module, name, ProjectOutput([Segment(10, P)]))

    torch.testing.assert_close(module(x).movedim(channel_dim, -1), expected @ dense(P), **EXACT)


@EVERY_LAYER
@KINDS
def test_projected_consumer_reads_kept_channels_as_their_lift(layer: str, kind: Callable) -> None:
    module, x, channel_dim = layer_and_input(layer)
    P = kind(6, 4)
    kept = x.movedim(channel_dim, -1) @ dense(P)
    expected = module((kept @ dense(P).mT).movedim(-1, channel_dim))
    registered(module, "weight", ProjectInput([Segment(6, P)]))

    torch.testing.assert_close(module(kept.movedim(-1, channel_dim)), expected, **EXACT)


@EVERY_LAYER
def test_projected_weight_is_the_contraction_over_both_axes(layer: str) -> None:
    module, _, _ = layer_and_input(layer)
    P, Q = stiefel(10, 3), stiefel(6, 4, seed=1)
    weight = registered(module, "weight", ProjectInput([Segment(6, Q)]))
    bias = registered(module, "bias", ProjectOutput([Segment(10, P)]))
    registered(module, "weight", ProjectOutput([Segment(10, P)]))

    expected = torch.einsum("oi...,ok,ij->kj...", weight, dense(P), dense(Q))
    torch.testing.assert_close(module.weight, expected, **EXACT)
    torch.testing.assert_close(module.bias, torch.einsum("o,ok->k", bias, dense(P)), **EXACT)


def test_projecting_does_not_change_the_stored_tensor() -> None:
    module, _, _ = layer_and_input("Conv2d")
    weight = registered(module, "weight", ProjectOutput([Segment(10, stiefel(10, 4))]))
    assert module.weight.shape[0] == 4
    torch.testing.assert_close(module.parametrizations.weight.original, weight, rtol=0, atol=0)


@KINDS
def test_grouped_convolution_is_projected_within_its_groups(kind: Callable) -> None:
    groups, width, out = 3, 4, 6
    module = random_(nn.Conv2d(groups * width, out, 3, groups=groups, bias=False))
    P, Q = kind(groups * width, 6, blocks=groups), kind(out, 3, blocks=groups, seed=1)
    weight = registered(module, "weight", ProjectInput([Segment(12, P, 0, groups)], groups=groups))
    registered(module, "weight", ProjectOutput([Segment(out, Q, 0, groups)]))

    by_group = [
        torch.einsum("oi...,ok,ij->kj...", block, dense(Q)[2 * g : 2 * g + 2, g : g + 1], Pg)
        for g, (block, Pg) in enumerate(
            zip(
                weight.chunk(groups),
                [dense(P)[4 * g : 4 * g + 4, 2 * g : 2 * g + 2] for g in range(groups)],
                strict=True,
            )
        )
    ]
    torch.testing.assert_close(module.weight, torch.cat(by_group), **EXACT)


def test_groups_of_a_convolution_may_read_parts_of_several_spaces() -> None:
    # Groups (a₀ a₁), (b₀ b₁): each half of the first axis under a block of one of two projections.
    module = random_(nn.Conv1d(8, 4, 2, groups=2, bias=False))
    P, Q = stiefel(8, 4, blocks=2), stiefel(4, 2)
    segments = [Segment(4, P, first=1, blocks=1), Segment(4, Q)]
    weight = registered(module, "weight", ProjectInput(segments, groups=2))

    first = torch.einsum("oi...,ij->oj...", weight[:2], dense(P)[4:, 2:])
    second = torch.einsum("oi...,ij->oj...", weight[2:], dense(Q))
    torch.testing.assert_close(module.weight, torch.cat([first, second]), **EXACT)


@KINDS
def test_flattened_image_is_projected_at_each_position(kind: Callable) -> None:
    channels, positions, P = 6, 9, kind(6, 4)
    module = random_(nn.Linear(channels * positions, 5))
    image = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = module(torch.einsum("nkhw,ck->nchw", image, dense(P)).flatten(1))
    registered(module, "weight", ProjectInput([Segment(54, P, repeat=positions)]))

    torch.testing.assert_close(module(image.flatten(1)), expected, **EXACT)


def test_concatenation_reads_a_direct_sum_with_kept_stretches() -> None:
    P, Q = stiefel(6, 2), selection(5, 3)
    segments = [Segment(2), Segment(6, P), Segment(3), Segment(5, Q), Segment(1)]
    module = random_(nn.Conv2d(17, 4, 3))
    parts = [
        torch.randn(2, n, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for n in (2, 2, 3, 3, 1)
    ]
    lifted = [
        parts[0],
        torch.einsum("nkhw,ck->nchw", parts[1], dense(P)),
        parts[2],
        torch.einsum("nkhw,ck->nchw", parts[3], dense(Q)),
        parts[4],
    ]
    expected = module(torch.cat(lifted, 1))
    registered(module, "weight", ProjectInput(segments))

    torch.testing.assert_close(module(torch.cat(parts, 1)), expected, **EXACT)


@st.composite
def axes(draw: st.DrawFn) -> list[Segment]:
    """Draw what stands along an axis: kept stretches, whole projections and blocks of them."""
    segments = []
    for number in range(draw(st.integers(1, 4))):
        blocks, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        if draw(st.booleans()):
            segments.append(Segment(width))
            continue
        rank = draw(st.integers(1, width))
        kind = draw(st.sampled_from([stiefel, selection]))
        projection = kind(blocks * width, blocks * rank, blocks=blocks, seed=number)
        first = draw(st.integers(0, blocks - 1))
        count = draw(st.integers(1, blocks - first))
        repeat = draw(st.integers(1, 3))
        segments.append(Segment(count * width * repeat, projection, first, count, repeat))
    return segments


@settings(deadline=None, max_examples=60, print_blob=True)
@given(segments=axes(), columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_axis_agrees_with_its_dense_matrix(
    segments: list[Segment], columns: int, seed: int
) -> None:
    M = dense_axis(segments)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(M), columns, generator=generator, dtype=torch.float64)
    kept = torch.randn(M.shape[1], columns, generator=generator, dtype=torch.float64)

    assert sum(segment.kept for segment in segments) == M.shape[1]
    torch.testing.assert_close(apply_segments(rows, segments), M.mT @ rows, **EXACT)
    torch.testing.assert_close(lift_segments(kept, segments), M @ kept, **EXACT)


# --------------------------------------------------------------------------------------------------
# Projections


@KINDS
def test_forward_contract_and_expand_agree_with_the_dense_matrix(kind: Callable) -> None:
    P = kind(12, 6, blocks=3)
    M = dense(P)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    kept = torch.randn(6, 5, generator=generator, dtype=torch.float64)

    torch.testing.assert_close(torch.block_diag(*P().double()), M, **EXACT)
    torch.testing.assert_close(P.contract(rows, 0, 3), M.mT @ rows, **EXACT)
    torch.testing.assert_close(P.expand(kept, 0, 3), M @ kept, **EXACT)
    torch.testing.assert_close(P.contract(rows[4:], 1, 2), M[4:, 2:].mT @ rows[4:], **EXACT)
    torch.testing.assert_close(P.expand(kept[2:4], 1, 1), M[4:8, 2:4] @ kept[2:4], **EXACT)


def test_projection_stays_orthonormal_wherever_the_proxy_goes() -> None:
    P = stiefel(8, 3)
    with torch.no_grad():
        P.proxy.mul_(7).add_(0.3)
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(P()[0].mT @ P()[0], identity, **EXACT)
    torch.testing.assert_close(P()[0], dense(P), **EXACT)


def test_gradient_reaches_the_proxy_from_every_tensor() -> None:
    module, x, _ = layer_and_input("Conv2d")
    P, Q = stiefel(10, 3), stiefel(6, 4, seed=1)
    for name in ("weight", "bias"):
        registered(module, name, ProjectOutput([Segment(10, P)]))
    registered(module, "weight", ProjectInput([Segment(6, Q)]))
    stored = [module.parametrizations[name].original.detach() for name in ("weight", "bias")]

    def output(X: Tensor, Y: Tensor) -> Tensor:
        with torch.no_grad():
            P.proxy.copy_(X)
            Q.proxy.copy_(Y)
        return module(x[:, :4]).square().sum()

    def truth(X: Tensor, Y: Tensor) -> Tensor:
        # Φ(X) = X (XᵀX)^(-1/2), by an eigendecomposition of distinct eigenvalues
        bases = []
        for proxy in (X[0], Y[0]):
            values, vectors = torch.linalg.eigh(proxy.mT @ proxy)
            bases.append(proxy @ (vectors * values.rsqrt()) @ vectors.mT)
        weight = torch.einsum("oi...,ok,ij->kj...", stored[0], *bases)
        out = F.conv2d(x[:, :4], weight, stored[1] @ bases[0], stride=2)
        return out.square().sum()

    generator = torch.Generator().manual_seed(5)
    start = [
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((1, 10, 3), (1, 6, 4))
    ]
    loss = output(*start)
    loss.backward()
    variables = [tensor.requires_grad_() for tensor in start]
    expected = truth(*variables)
    gradients = torch.autograd.grad(expected, variables)

    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(P.proxy.grad, gradients[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(Q.proxy.grad, gradients[1], rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# Shared bases


def chain() -> tuple[nn.Sequential, list[Projection]]:
    """Three convolutions with two projected spaces of one shape, and a selection, between them."""
    net = nn.Sequential(*[random_(nn.Conv1d(6, 6, 3), seed) for seed in range(4)])
    spaces = [stiefel(6, 4), stiefel(6, 4, seed=1), selection(6, 4)]
    for number, P in enumerate(spaces):
        registered(net[number + 1], "weight", ProjectInput([Segment(6, P)]))
        for name in ("weight", "bias"):
            registered(net[number], name, ProjectOutput([Segment(6, P)]))
    return net, spaces


def test_shared_bases_give_the_same_output_and_gradients() -> None:
    net, spaces = chain()
    x = torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    proxies = [p for P in spaces for p in P.parameters()]
    alone = net(x).square().sum()
    expected = torch.autograd.grad(alone, proxies)
    with shared_bases(spaces):
        shared = net(x).square().sum()
    gradients = torch.autograd.grad(shared, proxies)

    torch.testing.assert_close(shared, alone, **EXACT)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_shared_bases_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, spaces = chain()
    batches: list[int] = []
    many = maps.polar_many

    def counted(matrices: list[Tensor]) -> list[Tensor]:
        batches.append(len(matrices))
        return many(matrices)

    def unexpected(matrix: Tensor) -> Tensor:
        raise AssertionError("a shared basis was computed again")

    monkeypatch.setattr(maps, "polar_many", counted)
    monkeypatch.setattr(maps, "polar", unexpected)
    with shared_bases(spaces):
        net(torch.zeros(1, 6, 12, dtype=torch.float64))
    assert batches == [2]


def test_bases_are_computed_anew_after_the_block_and_after_an_error() -> None:
    P = stiefel(6, 4)
    with pytest.raises(KeyError), shared_bases([P]):
        raise KeyError
    before = P().detach()
    with torch.no_grad():
        P.proxy.add_(1.0)
    assert (P() - before).norm() > 0.1
    torch.testing.assert_close(P()[0], dense(P), **EXACT)


# --------------------------------------------------------------------------------------------------
# Assignment, and precision


@pytest.mark.parametrize("parametrization", [ProjectOutput, ProjectInput])
def test_assignment_to_a_projected_tensor_is_refused(parametrization: type) -> None:
    module = random_(nn.Linear(6, 6))
    registered(module, "weight", parametrization([Segment(6, stiefel(6, 4))]))
    before = module.weight.detach().clone()

    with pytest.raises(NotImplementedError, match=r"shape.*cannot be assigned.*materialize"):
        module.weight = torch.zeros_like(before)
    torch.testing.assert_close(module.weight, before, rtol=0, atol=0)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_weights_are_rounded_once(kind: Callable, dtype: torch.dtype) -> None:
    module = random_(nn.Conv2d(32, 64, 3)).to(dtype)
    P = kind(64, 20).float()
    weight = registered(module, "weight", ProjectOutput([Segment(64, P)]))
    truth = torch.einsum("oihw,ok->kihw", weight.double(), dense(P.double()))

    assert module.weight.dtype == dtype
    # Half a unit in the last place, and the error of a float32 sum of 64 terms.
    torch.testing.assert_close(
        module.weight.double(), truth, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_projections_that_were_rounded_themselves_are_applied_in_float32(
    dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    module = random_(nn.Linear(64, 8)).to(weight_dtype)
    P = stiefel(64, 20).to(dtype)
    weight = registered(module, "weight", ProjectInput([Segment(64, P)]))
    truth = weight.double() @ P()[0].detach().double()

    assert P().dtype == dtype
    assert module.weight.dtype == weight_dtype
    torch.testing.assert_close(
        module.weight.double(), truth, rtol=0.51 * torch.finfo(weight_dtype).eps, atol=1e-5
    )


def test_autocast_does_not_lower_the_precision_of_bases_and_weights() -> None:
    module = random_(nn.Linear(48, 32)).float()
    P = stiefel(48, 20).float()
    registered(module, "weight", ProjectInput([Segment(48, P)]))
    expected = module.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        basis, weight, output = P(), module.weight, module(torch.zeros(2, 20))
        with shared_bases([P]):
            shared = module.weight

    assert output.dtype == torch.bfloat16  # autocast was on
    identity = torch.eye(20)
    torch.testing.assert_close(basis[0].mT @ basis[0], identity, rtol=0, atol=1e-6)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    torch.testing.assert_close(shared, expected, rtol=1e-6, atol=1e-6)
