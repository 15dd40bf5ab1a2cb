"""Polar factor of a tall matrix: the orthonormal matrix nearest to it, with its exact gradient.

Two ways lead to it, and the matrix itself decides. One that is orthonormal but for scale and a
small deviation, as at the start of training, takes a power series of matrix products alone; any
other takes singular values, from the Gram matrix where that is accurate and else from an SVD.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# A deviation that takes more powers than this is dearer than singular values (measured on a CPU).
_MOST_POWERS = 12


def polar(matrix: Tensor) -> Tensor:
    """Return the orthonormal matrix nearest to a tall matrix, in the Frobenius norm.

    With the thin SVD ``X = U diag(s) Vᵀ`` this is ``P = U Vᵀ``. The gradient is in closed form, so
    it stays exact where singular values coincide (at ``P`` itself); that of an SVD does not. It is
    accurate to 1e-10 in float64 and 1e-6 in float32; float16 and bfloat16 are computed in float32
    or better, whatever autocast says. There is no second derivative.

    Args:
        matrix: shape ``(..., channels, rank)``, ``rank <= channels``, of full column rank. All
            matrices of a batch are computed in one way: the one that its worst matrix needs.

    Returns:
        ``P``, with the shape, dtype and device of ``matrix``, and ``PᵀP = I``.

    Raises:
        ValueError: if the matrix is wider than tall, not of a real floating-point type, not
            finite, or of deficient rank.

    Examples:
        >>> polar(torch.tensor([[2.0], [0.0]]))
        tensor([[1.],
                [0.]])

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.6 (the proxy of PMaP).
    """
    _check(matrix)
    return cast("Tensor", _polar(matrix)) if matrix.numel() else matrix.clone()


def polar_many(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return the polar factor of each matrix, computing those of equal shape in one batch.

    Args:
        matrices: shapes ``(..., channels, rank)`` as for `polar`; they may differ in everything.

    Returns:
        The factors in the given order, each with the shape, dtype and device of its matrix.

    Raises:
        ValueError: as `polar` does, for any of the matrices.
    """
    factors = list(matrices)
    groups = defaultdict(list)
    for index, matrix in enumerate(matrices):
        _check(matrix)
        groups[matrix.shape[-2:], matrix.dtype, matrix.device].append(index)
    for group in groups.values():
        stacks = [matrices[index][None].flatten(0, -3) for index in group]
        batch = torch.split(polar(torch.cat(stacks)), [len(stack) for stack in stacks])
        for index, factor in zip(group, batch, strict=True):
            factors[index] = factor.reshape(matrices[index].shape)
    return factors


def _check(matrix: Tensor) -> None:
    shape = tuple(matrix.shape)
    if len(shape) < 2 or shape[-1] > shape[-2]:
        expected = "expected (..., channels, rank) with rank <= channels"
        raise ValueError(f"matrix of shape {shape} is not tall; {expected}")
    if not matrix.is_floating_point():
        raise ValueError(f"matrix is {matrix.dtype}; expected a real floating-point type")


# Note [closed-form polar gradient]
# Let X = P H with PᵀP = I and H = V diag(s) Vᵀ positive definite, G = ∂L/∂P and K = PᵀG.
# Ω = PᵀdP is antisymmetric, so dX = dP H + P dH splits into
#     H Ω + Ω H = PᵀdX − dXᵀP        and        (I − PPᵀ) dP H = (I − PPᵀ) dX.
# Solve both for dP = P Ω + (I − PPᵀ) dP, put it into <G, dP>, and collect what multiplies dX:
#     ∂L/∂X = P Y + (I − PPᵀ) G H⁻¹,        H Y + Y H = K − Kᵀ.
# In the eigenbasis of H the equation for Y is a division by sᵢ + sⱼ. Nothing divides by sᵢ − sⱼ, as
# the gradient of an SVD does. Eq. 13 of the paper as printed is not this gradient: it keeps only
# the part of it that comes from ∂L/∂V.
#
# Where H ≈ hI no eigenbasis is needed. With J = PᵀGH⁻¹ and Y = J − S the same gradient is
#     ∂L/∂X = G H⁻¹ − P S,        H S + S H = H (J + Jᵀ).
# The symmetric part of S is N = (J + Jᵀ)/2, which leaves H A + A H = H N − N H for A = S − N.
# Multiply by H⁻¹ = (I + D)/h from both sides:
#     A H⁻¹ + H⁻¹ A = N H⁻¹ − H⁻¹ N,        that is        S = N + ((D S)ᵀ − D S)/2,
# which contracts by ‖D‖ from any start, at one product of small matrices a step.


class _Polar(torch.autograd.Function):
    """The polar factor; see Note [closed-form polar gradient]."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        accuracy = torch.finfo(torch.promote_types(matrix.dtype, torch.float32)).eps
        ctx.tolerance = 16 * accuracy
        with torch.autocast(matrix.device.type, enabled=False):
            X = matrix.to(_working_dtype(matrix))
            if series := _by_series(X, ctx.tolerance):
                P, inverse, h, ctx.contraction = series
                ctx.save_for_backward(P, inverse, h)
            else:
                U, s, V = _by_gram(X, accuracy) or _by_svd(X, accuracy)
                P, ctx.contraction = U @ V.mT, None
                ctx.save_for_backward(U, s, V)
        return P.to(matrix.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        saved = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            G = gradient.to(saved[0].dtype)
            if ctx.contraction is None:
                return _pull_back(G, *saved).to(gradient.dtype)
            steps = _powers(ctx.contraction, ctx.tolerance) - 1
            return _pull_back_by_series(G, *saved, steps=steps).to(gradient.dtype)


# What it does depends on the values: traced, each number of powers would be compiled anew.
_polar = torch.compiler.disable(_Polar.apply)  # type: ignore[no-untyped-call]  # torch has no types


def _by_series(X: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Return ``P``, ``H⁻¹ = (I + D)/h``, ``h`` and a bound on ``‖D‖``, or None if that is large.

    Where ``D`` vanishes, ``H⁻¹`` is the number ``1/h``, of shape ``(..., 1, 1)``.

    With ``XᵀX = h²(I + E)`` this is ``I + D = (I + E)^(-1/2)``, a binomial series.
    """
    gram = X.mT @ X
    # Where squares underflow h is set too large, which makes E ≈ -I: no small deviation.
    tiny = torch.finfo(X.dtype).tiny / tolerance
    h = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(tiny)
    E = _add_to_diagonal_(gram.div_(h), -1)
    h = h.sqrt()
    bound = _largest_norm(E)
    if bound <= 2 * tolerance * math.sqrt(E.shape[-1]) and _is_rounding(E, 2 * tolerance):
        return X / h, h.reciprocal(), h, 0.0
    if bound**2 <= tolerance:
        D = E.div_(-2)
    else:
        square = E @ E
        bound = math.sqrt(_largest_norm(square))  # closer to the spectral norm than that of E
        if not bound < 1 or (powers := _powers(bound, tolerance)) > _MOST_POWERS:
            return None

        def pair(k: int) -> Tensor:
            c, d = (math.comb(2 * n, n) * (-0.25) ** n for n in (k, k + 1))
            return (c * E).add_(square, alpha=d)

        highest = 2 * (powers // 2) - 1
        D = pair(highest)
        for k in range(highest - 2, 0, -2):  # Horner's rule in E²
            D = pair(k).add_(square @ D)
    inverse = _add_to_diagonal_(D, 1).div_(h)
    return X @ inverse, inverse, h, 1 / math.sqrt(1 - bound) - 1


def _is_rounding(E: Tensor, tolerance: float) -> bool:
    """Whether ``E`` is what rounding leaves of an orthonormal matrix, as where training starts.

    Rounding spreads over all directions, so that its Frobenius norm says little of its spectral
    norm; the square says more.
    """
    return math.sqrt(_largest_norm(E @ E)) <= tolerance


def _pull_back_by_series(G: Tensor, P: Tensor, inverse: Tensor, h: Tensor, *, steps: int) -> Tensor:
    exact = inverse.shape == h.shape and steps == 0
    GH = G * inverse if exact else G @ inverse
    J = P.mT @ GH
    # Copied before it is added: adding a transposed view takes several times as long.
    N = S = J.mT.contiguous().add_(J).div_(2)
    D = inverse if exact else _add_to_diagonal_(inverse * h, -1)
    for _ in range(steps):
        DS = D @ S
        S = DS.mT.contiguous().sub_(DS).div_(2).add_(N)
    return GH.sub_(P @ S)


def _by_gram(X: Tensor, accuracy: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return ``U``, ``s`` and ``V``, or None where squaring the matrix costs too many digits."""
    Z = X.double()
    try:
        squares, V = torch.linalg.eigh(Z.mT @ Z)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it
        return None
    kind = torch.finfo(Z.dtype)
    least = squares[..., -1:] * (kind.eps / max(accuracy, 1e-12))
    if not (squares > least.clamp_min(kind.tiny / kind.eps)).all():  # true of NaN too
        return None
    s = squares.sqrt()
    U = (Z @ V).div_(s[..., None, :])
    return U.to(X.dtype), s.to(X.dtype), V.to(X.dtype)


def _by_svd(X: Tensor, accuracy: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U``, ``s`` and ``V`` of any matrix that has a polar factor."""
    shape = tuple(X.shape[-2:])
    if not X.isfinite().all():
        raise ValueError(f"matrix of shape {shape} has values that are not finite")
    U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    ratio = float((s[..., -1] / s[..., 0]).nan_to_num().min())
    floor = max(accuracy, torch.finfo(s.dtype).eps * shape[0])
    if ratio <= floor:
        found = f"its smallest singular value is {ratio:.1e} of the largest"
        expected = f"expected more than {floor:.1e}"
        raise ValueError(f"matrix of shape {shape} is rank deficient: {found}; {expected}")
    return U.to(X.dtype), s.to(X.dtype), Vh.mT.to(X.dtype)


def _pull_back(G: Tensor, U: Tensor, s: Tensor, V: Tensor) -> Tensor:
    GV = G @ V
    A = U.mT @ GV
    B = (A - A.mT) / (s[..., :, None] + s[..., None, :])
    if U.shape[-2] == U.shape[-1]:  # I - PPᵀ is zero; computed, it leaves rounding errors over s
        return U @ B @ V.mT
    s = s[..., None, :]
    return GV.div_(s).add_(U @ (B - A / s)) @ V.mT


def _working_dtype(matrix: Tensor) -> torch.dtype:
    """Return float32 for single precision whose products are exact, and float64 for the rest."""
    backend = torch.backends.cuda if matrix.is_cuda else torch.backends.mkldnn
    exact = backend.matmul.fp32_precision not in {"tf32", "bf16"}
    return torch.float32 if exact and matrix.dtype != torch.float64 else torch.float64


def _add_to_diagonal_(matrices: Tensor, value: float) -> Tensor:
    matrices.diagonal(dim1=-2, dim2=-1).add_(value)
    return matrices


def _largest_norm(matrices: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrices, dim=(-2, -1)).max())


def _powers(base: float, tolerance: float) -> int:
    """Return the smallest positive power of ``base`` that is within the tolerance."""
    return math.ceil(math.log(tolerance) / math.log(max(base, tolerance)))
