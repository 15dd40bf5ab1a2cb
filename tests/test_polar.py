"""The polar factor: its defining properties, its gradient against an independent derivative."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcap.projection.polar import polar, polar_many

properties = settings(deadline=None, max_examples=40, print_blob=True)

SPECTRA = {
    "orthonormal": torch.ones,
    "scaled": lambda rank: torch.full((rank,), 7.0),
    "nearly orthonormal": lambda rank: 3 + torch.linspace(-1e-4, 1e-4, rank),
    "close to orthonormal": lambda rank: 3 + torch.linspace(-0.03, 0.03, rank),
    "repeated": lambda rank: torch.arange(rank).div(2, rounding_mode="floor") + 1.0,
    "moderate": lambda rank: torch.linspace(1, 6, rank),
    "wide": lambda rank: torch.logspace(0, -2.5, rank),
    "very wide": lambda rank: torch.logspace(0, -5, rank),
}
# Smallest singular values that neither a finite difference nor Newton's iteration trips over.
TAME = [name for name in SPECTRA if name != "very wide"]
SHAPES = [(7, 4), (5, 5), (6, 1), (1, 1)]


def orthonormal(channels, rank, generator):
    return torch.linalg.qr(torch.randn(channels, rank, dtype=torch.float64, generator=generator))[0]


def factored(shape, spectrum, seed=0):
    """Return ``U``, ``s``, ``V`` of a random matrix with this spectrum."""
    generator = torch.Generator().manual_seed(seed)
    U, V = orthonormal(*shape, generator), orthonormal(shape[1], shape[1], generator)
    return U, SPECTRA[spectrum](shape[1]).double(), V


def matrix_with(shape, spectrum, seed=0):
    U, s, V = factored(shape, spectrum, seed)
    return (U * s) @ V.mT


def normal_like(tensor, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, dtype=torch.float64, generator=generator).to(tensor.dtype)


def pulled_back(matrix, gradient, function=polar):
    matrix = matrix.detach().requires_grad_()
    return torch.autograd.grad(function(matrix), matrix, gradient)[0]


def largest_gradient(X, G):
    """Return the norm that a gradient can reach, a unit for errors of one that may be zero."""
    return float(G.norm() / torch.linalg.svdvals(X).min())


def relative_error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@st.composite
def shapes(draw):
    rank = draw(st.integers(1, 6))
    return draw(st.integers(rank, 10)), rank


seeds = st.integers(0, 2**31)
spectra = st.sampled_from(sorted(SPECTRA))


# --- the factor


@properties
@given(shapes(), spectra, seeds)
def test_factor_is_orthonormal(shape, spectrum, seed):
    P = polar(matrix_with(shape, spectrum, seed))
    assert (P.mT @ P - torch.eye(shape[1])).abs().max() < 1e-12


@properties
@given(shapes(), spectra, seeds)
def test_factor_is_the_product_of_the_singular_vectors(shape, spectrum, seed):
    U, s, V = factored(shape, spectrum, seed)
    X = (U * s) @ V.mT
    P = polar(X).numpy()
    # Rounding of X alone moves its factor by about eps times the condition number.
    slack = 1e-14 * float(s.max() / s.min())
    np.testing.assert_allclose(P, (U @ V.mT).numpy(), atol=1e-12 + slack)
    left, _, right = np.linalg.svd(X.numpy(), full_matrices=False)
    np.testing.assert_allclose(P, left @ right, atol=1e-12 + slack)


@properties
@given(shapes(), spectra, seeds)
def test_no_orthonormal_matrix_is_nearer(shape, spectrum, seed):
    X = matrix_with(shape, spectrum, seed)
    P = polar(X)
    other = polar(P + 0.1 * normal_like(P, seed))
    assert (X - P).norm() <= (X - other).norm() + 1e-12


@properties
@given(shapes(), seeds)
def test_orthonormal_matrix_is_its_own_factor(shape, seed):
    Q = matrix_with(shape, "orthonormal", seed)
    torch.testing.assert_close(polar(Q), Q, rtol=0, atol=1e-14)


@properties
@given(shapes(), spectra, seeds)
def test_rotation_from_either_side_passes_through(shape, spectrum, seed):
    X = matrix_with(shape, spectrum, seed)
    generator = torch.Generator().manual_seed(seed)
    L, R = (orthonormal(n, n, generator) for n in shape)
    torch.testing.assert_close(polar(L @ X @ R), L @ polar(X) @ R, rtol=0, atol=1e-8)


@properties
@given(shapes(), spectra, seeds, st.floats(1e-6, 1e6))
def test_scale_of_the_matrix_does_not_matter(shape, spectrum, seed, scale):
    X = matrix_with(shape, spectrum, seed)
    G = normal_like(X, seed)
    torch.testing.assert_close(polar(scale * X), polar(X), rtol=0, atol=1e-8)
    scaled, plain = pulled_back(scale * X, G), pulled_back(X, G)
    unit = largest_gradient(X, G)
    torch.testing.assert_close(scaled * scale, plain, rtol=0, atol=1e-8 * unit)
    assert abs((plain * X).sum()) < 1e-12 * unit * float(X.norm())


@pytest.mark.parametrize("condition", [1, 1.01, 1.1, 2, 20, 60, 70, 1e3, 1e6, 1e10])
def test_factor_and_gradient_keep_their_digits_at_any_condition(condition):
    shape = (96, 64)
    U, _, V = factored(shape, "orthonormal")
    s = torch.linspace(0, -1, shape[1], dtype=torch.float64).mul(np.log(condition)).exp()
    X = (U * s) @ V.mT
    P = polar(X)
    assert (P.mT @ P - torch.eye(shape[1])).abs().max() < 1e-12
    # Taken from the SVD of X, not from s: rounding of X moves both by eps times the condition.
    G = normal_like(X)
    assert relative_error(pulled_back(X, G), gradient_by_svd(X, G)) < 1e-10


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e-25, 1e25, 1e160, 1e200])
@pytest.mark.parametrize("spectrum", ["orthonormal", "moderate", "very wide"])
def test_factor_survives_squares_that_leave_the_range(scale, spectrum):
    X = matrix_with((7, 4), spectrum)
    torch.testing.assert_close(polar(X * scale), polar(X), rtol=0, atol=1e-8)
    if 1e-30 < scale < 1e30:
        single = polar((X * scale).float())
        torch.testing.assert_close(single, polar(X).float(), rtol=0, atol=0.3)
        assert (single.mT @ single - torch.eye(4)).abs().max() < 1e-6


# --- the gradient


def gradient_by_svd(X, G):
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    A = U.mT @ G @ Vh.mT
    tangent = U @ ((A - A.mT) / (s[:, None] + s)) @ Vh
    return tangent + ((G - U @ (U.mT @ G)) @ Vh.mT / s) @ Vh


def gradient_by_complex_steps(X, G):
    """Return the gradient by ``Im f(X + iδE)/δ`` for each entry, which has no cancellation.

    ``f`` is Newton's iteration ``X ← X (I + (XᵀX)⁻¹)/2``: no singular values anywhere.
    """
    X, G = X.numpy(), G.numpy()
    steps = np.eye(X.size).reshape(X.size, *X.shape)
    Z = X + 1e-30j * steps
    for _ in range(40):
        Z = Z @ (np.eye(X.shape[1]) + np.linalg.inv(Z.transpose(0, 2, 1) @ Z)) / 2
    return torch.from_numpy((Z.imag / 1e-30 * G).sum((1, 2)).reshape(X.shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", TAME)
def test_gradient_equals_complex_steps(shape, spectrum):
    X = matrix_with(shape, spectrum)
    G = normal_like(X)
    truth = gradient_by_complex_steps(X, G)
    atol = 1e-12 * largest_gradient(X, G)
    torch.testing.assert_close(pulled_back(X, G), truth, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", TAME)
def test_gradient_passes_gradcheck(shape, spectrum):
    X = matrix_with(shape, spectrum).requires_grad_()
    assert torch.autograd.gradcheck(polar, X, fast_mode=False, eps=1e-7, atol=1e-5, rtol=1e-3)


def test_gradient_of_a_batch_passes_gradcheck():
    X = torch.stack([matrix_with((5, 3), name) for name in ("orthonormal", "moderate", "wide")])
    assert torch.autograd.gradcheck(polar, X[None].requires_grad_(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_gradient_is_finite_for_an_expanded_gradient(spectrum):
    X = matrix_with((7, 4), spectrum).requires_grad_()
    polar(X).sum().backward()
    expected = pulled_back(X, torch.ones(7, 4, dtype=torch.float64))
    assert X.grad.isfinite().all()
    torch.testing.assert_close(X.grad, expected)


def test_gradient_through_svd_is_wrong_where_ours_is_right():
    def by_autograd(X):
        U, _, Vh = torch.linalg.svd(X, full_matrices=False)
        return U @ Vh

    Q = torch.eye(6, 3, dtype=torch.float64)
    G = normal_like(Q)
    truth = gradient_by_complex_steps(Q, G)
    naive = pulled_back(Q, G, by_autograd)
    assert not torch.allclose(naive, truth, rtol=1e-2)
    torch.testing.assert_close(pulled_back(Q, G), truth, rtol=1e-12, atol=1e-13)


def test_gradient_at_an_orthonormal_matrix_is_tangent():
    Q = matrix_with((9, 4), "orthonormal")
    dX = pulled_back(Q, normal_like(Q))
    symmetric = Q.mT @ dX + dX.mT @ Q
    torch.testing.assert_close(symmetric, torch.zeros_like(symmetric), rtol=0, atol=1e-13)


def test_second_derivative_is_refused():
    X = matrix_with((5, 3), "moderate").requires_grad_()
    (first,) = torch.autograd.grad(polar(X).pow(3).sum(), X, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_gradient_descent_finds_the_factor_of_a_target():
    target = matrix_with((8, 3), "moderate")
    X = matrix_with((8, 3), "orthonormal", seed=5).requires_grad_()
    optimizer = torch.optim.SGD([X], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-(polar(X) * target).sum()).backward()
        optimizer.step()
    torch.testing.assert_close(polar(X).detach(), polar(target), rtol=0, atol=1e-4)


# --- batches


@properties
@given(shapes(), st.lists(spectra, min_size=1, max_size=4), seeds)
def test_batch_equals_one_by_one(shape, names, seed):
    X = torch.stack([matrix_with(shape, name, seed + i) for i, name in enumerate(names)])
    G = normal_like(X, seed)
    together = polar(X[:, None])[:, 0]
    torch.testing.assert_close(together, torch.stack([polar(x) for x in X]), rtol=0, atol=1e-8)
    gradients = torch.stack([pulled_back(x, g) for x, g in zip(X, G, strict=True)])
    for found, expected, x, g in zip(pulled_back(X, G), gradients, X, G, strict=True):
        atol = 1e-8 * largest_gradient(x, g)
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@properties
@given(st.lists(st.tuples(shapes(), spectra, st.booleans(), st.booleans()), max_size=8), seeds)
def test_polar_many_equals_polar(drawn, seed):
    matrices = []
    for index, (shape, name, single, batched) in enumerate(drawn):
        X = matrix_with(shape, name, seed + index)
        X = torch.stack([X, 2 * X + 0.1 * normal_like(X, seed)]) if batched else X
        matrices.append(X.float() if single else X)
    factors = polar_many(matrices)
    assert len(factors) == len(matrices)
    for X, P in zip(matrices, factors, strict=True):
        # A batch goes the way of its worst matrix, so the rounding may differ.
        atol = 1e-8 if X.dtype == torch.float64 else 5e-6
        assert P.dtype == X.dtype
        torch.testing.assert_close(P, polar(X), rtol=0, atol=atol)


def test_polar_many_passes_each_gradient_to_its_matrix():
    kinds = [((6, 3), "orthonormal"), ((5, 2), "moderate"), ((6, 3), "wide"), ((6, 3), "repeated")]
    matrices = [matrix_with(*kind, seed).requires_grad_() for seed, kind in enumerate(kinds)]
    weights = [normal_like(X, seed) for seed, X in enumerate(matrices)]
    factors = polar_many(matrices)
    sum((P * W).sum() for P, W in zip(factors, weights, strict=True)).backward()
    for X, W in zip(matrices, weights, strict=True):
        torch.testing.assert_close(X.grad, pulled_back(X, W), rtol=1e-9, atol=1e-9)


def test_polar_many_computes_one_batch_for_each_shape(monkeypatch):
    calls = []

    def counted(matrix):
        calls.append(tuple(matrix.shape))
        return polar(matrix)

    monkeypatch.setattr("torchcap.projection.polar.polar", counted)
    polar_many([torch.eye(5, 3), torch.eye(4, 2), torch.eye(5, 3), torch.eye(5, 3).expand(2, 5, 3)])
    assert sorted(calls) == [(1, 4, 2), (4, 5, 3)]


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0)])
def test_factor_of_nothing_is_nothing(shape):
    assert polar(torch.empty(shape)).shape == shape


# --- types and settings


@pytest.mark.parametrize("condition", [1, 1.01, 1.1, 3, 100, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("shape", [(96, 48), (64, 64)])
def test_float32_keeps_six_digits(shape, condition):
    U, _, V = factored(shape, "orthonormal")
    s = torch.linspace(0, -1, shape[1], dtype=torch.float64).mul(np.log(condition)).exp()
    X = ((U * s) @ V.mT).float()
    G = normal_like(X)
    P = polar(X)
    assert P.dtype == torch.float32
    assert relative_error(P, polar(X.double())) < 1e-6
    assert (P.double().mT @ P.double() - torch.eye(shape[1])).abs().max() < 1e-6
    assert relative_error(pulled_back(X, G), pulled_back(X.double(), G.double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spectrum", ["orthonormal", "moderate"])
def test_half_precision_is_computed_in_float32_and_cast_back(dtype, spectrum):
    X = matrix_with((24, 8), spectrum).to(dtype)
    G = normal_like(X)
    P, dX = polar(X), pulled_back(X, G)
    assert P.dtype == dX.dtype == dtype
    torch.testing.assert_close(P, polar(X.float()).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(dX, pulled_back(X.float(), G.float()).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("spectrum", ["orthonormal", "close to orthonormal", "moderate"])
def test_autocast_changes_nothing(spectrum):
    X = matrix_with((64, 32), spectrum).float().requires_grad_()
    G = normal_like(X)
    expected = polar(X), pulled_back(X, G)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = polar(X), pulled_back(X, G)  # backward, too, runs under autocast here
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_products_of_reduced_precision_are_not_used():
    X = torch.eye(6, 3, requires_grad=True)
    settings_of_matmul = torch.backends.mkldnn.matmul
    before = settings_of_matmul.fp32_precision
    try:
        settings_of_matmul.fp32_precision = "ieee"
        exact = polar(X)
        settings_of_matmul.fp32_precision = "bf16"
        reduced = polar(X)
    finally:
        settings_of_matmul.fp32_precision = before
    assert exact.grad_fn.saved_tensors[0].dtype == torch.float32
    assert reduced.grad_fn.saved_tensors[0].dtype == torch.float64
    assert reduced.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own, where a graph breaks
@pytest.mark.parametrize("spectrum", ["orthonormal", "close to orthonormal", "moderate"])
def test_compiled_code_calls_it_as_it_is(spectrum):
    X = matrix_with((7, 4), spectrum)
    G = normal_like(X)
    compiled = torch.compile(lambda matrix: 2 * polar(matrix), backend="eager")
    torch.testing.assert_close(compiled(X), 2 * polar(X), rtol=0, atol=0)
    torch.testing.assert_close(pulled_back(X, G, compiled), pulled_back(X, 2 * G))


def test_memory_layout_does_not_matter():
    X = matrix_with((7, 4), "moderate")
    transposed = X.mT.contiguous().mT
    G = normal_like(X)
    torch.testing.assert_close(polar(transposed), polar(X), rtol=0, atol=1e-14)
    strided = torch.stack([G, G], -1)[..., 0]
    torch.testing.assert_close(pulled_back(transposed, strided), pulled_back(X, G))


def test_matrix_and_gradient_are_left_as_they_were():
    for spectrum in ("orthonormal", "moderate"):
        X = matrix_with((7, 4), spectrum)
        G = normal_like(X)
        copies = X.clone(), G.clone()
        pulled_back(X, G)
        torch.testing.assert_close((X, G), copies, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_equals_cpu(spectrum, dtype):
    X = matrix_with((48, 24), spectrum).to(dtype)
    G = normal_like(X)
    atol = 1e-8 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(polar(X.cuda()).cpu(), polar(X), rtol=0, atol=atol)
    dX = pulled_back(X, G)
    found = pulled_back(X.cuda(), G.cuda()).cpu()
    torch.testing.assert_close(found, dX, rtol=0, atol=atol * float(dX.norm()))


# --- errors


@pytest.mark.parametrize(
    ("matrix", "facts"),
    [
        (torch.zeros(3, 5), r"\(3, 5\).*not tall.*rank <= channels"),
        (torch.zeros(4), r"\(4,\).*not tall"),
        (torch.eye(4, 2, dtype=torch.int64), r"int64.*floating"),
        (torch.eye(4, 2, dtype=torch.complex64), r"complex64.*floating"),
        (torch.full((4, 2), torch.nan), r"\(4, 2\).*not finite"),
        (torch.eye(4, 2).fill_diagonal_(torch.inf), r"\(4, 2\).*not finite"),
        (torch.zeros(4, 2), r"\(4, 2\).*rank deficient.*0\.0e\+00.*more than"),
        (torch.eye(4, 1).expand(4, 2), r"\(4, 2\).*rank deficient"),
        (torch.eye(9, 3).double() @ torch.ones(3, 3).double(), r"\(9, 3\).*rank deficient"),
        (torch.stack([torch.eye(4, 2), torch.ones(4, 2)]), r"\(4, 2\).*rank deficient"),
    ],
)
def test_error_names_shape_and_fact(matrix, facts):
    with pytest.raises(ValueError, match=facts):
        polar(matrix)
    with pytest.raises(ValueError, match=facts):
        polar_many([torch.eye(9, 3), matrix])


def test_rank_deficient_product_in_float32_is_found():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((64, 8), (8, 9)))
    with pytest.raises(ValueError, match=r"\(64, 9\).*rank deficient.*e-0[89] of the largest"):
        polar(left @ right)
