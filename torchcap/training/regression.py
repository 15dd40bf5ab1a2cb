"""Ridge regression of a layer's weight, from the moments of its inputs and targets.

With centred moments ``H = Cov(x)`` and ``B = Cov(x, t)`` the weight that predicts ``t`` best is
``W = W₀ + (H + λI)⁻¹ (B − H W₀)``: the ridge ``λ`` draws it to the weight that is there, not to
zero, so directions that the data does not show stay as they are. The intercept follows from the
means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from torchcap.projection.moments import JointMoments

RIDGES: Final = (1e-6, 1e-4, 1e-2, 1.0)
"""Ridges that are tried, as shares of the mean of ``H``'s diagonal."""

OUTPUTS_TRIED: Final = 64
"""Targets of a group that ridges are tried for; all of a wide layer's would take long."""

ROUNDING: Final = 1e-12
"""What rounding may leave of a constant input when it is centred, as a share of its square."""


@dataclass(frozen=True, slots=True)
class Affine:
    """An affine map of rows, group by group.

    Attributes:
        weight: shape ``(groups, inputs, outputs)``.
        bias: shape ``(groups, outputs)``; zero where the layer has none.
    """

    weight: Tensor
    bias: Tensor

    def thinned(self, outputs: int) -> Affine:
        """Return the map to at most so many outputs; see :meth:`JointMoments.thinned`."""
        step = -(-self.weight.shape[2] // outputs)
        return Affine(self.weight[..., ::step], self.bias[:, ::step])

    def error(self, moments: JointMoments) -> float:
        """Return the mean square of what is left of the targets, as a share of theirs."""
        W, b = self.weight, self.bias
        left = (
            moments.output_square.sum()
            - 2 * (W * moments.cross_moment).sum()
            + (W * (moments.input_moment @ W)).sum()
            + b.square().sum()
            - 2 * (b * (moments.output_mean - (moments.input_mean.unsqueeze(1) @ W)[:, 0])).sum()
        )
        total = moments.output_square.sum()
        return float(left.clamp_min(0) / total) if total > 0 else 0.0


@torch.no_grad()
def regress(
    moments: JointMoments,
    start: Affine,
    *,
    ridge: float,
    intercept: bool = True,
    present: Tensor | None = None,
) -> Affine:
    """Return the affine map that predicts the targets best, near to one that is given.

    Args:
        moments: of inputs and targets.
        start: the map that the ridge draws to.
        ridge: ``λ`` as a share of the mean of ``H``'s diagonal.
        intercept: whether the map may have a bias; without one, moments are not centred.
        present: shape ``(groups, inputs)``: inputs that may be used; others get zero weight.
    """
    H, regular = spread(moments, ridge=ridge, intercept=intercept, present=present)
    B, W = moments.cross_moment, start.weight.to(H)
    x, t = moments.input_mean, moments.output_mean
    if intercept:
        B = B - x.unsqueeze(2) * t.unsqueeze(1)
    if present is not None:
        B, W = B * present.to(B).unsqueeze(2), W * present.to(W).unsqueeze(2)
    W = W + torch.cholesky_solve(B - H @ W, torch.linalg.cholesky(regular))
    if not intercept:
        return Affine(W, start.bias.to(W))
    return Affine(W, t - (x.unsqueeze(1) @ W)[:, 0])


def spread(
    moments: JointMoments,
    *,
    ridge: float,
    intercept: bool = True,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``H``, and ``H + λI``, which is positive definite; both ``(groups, inputs, inputs)``.

    Inputs that are not present are zero in the one, and stand apart from the others in both.
    """
    square, x = moments.input_moment, moments.input_mean
    H = torch.baddbmm(square, x.unsqueeze(2), x.unsqueeze(1), alpha=-1) if intercept else square
    used = torch.ones_like(x) if present is None else present.to(x)
    if present is not None:
        H = (H * used.unsqueeze(1)).mul_(used.unsqueeze(2))
    mean = H.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp_min(1)
    rounding = ROUNDING * square.diagonal(dim1=1, dim2=2)
    added = torch.maximum(ridge * mean, rounding).clamp_min(torch.finfo(torch.float32).tiny)
    regular = H.clone()
    regular.diagonal(dim1=1, dim2=2).add_(added * used + (1 - used))
    return H, regular


def choose_ridge(
    parts: Sequence[JointMoments], start: Affine, solution: Callable[..., Affine]
) -> float | None:
    """Return the ridge whose solution on one half of the data predicts the other half best.

    Args:
        parts: moments of two halves.
        start: the map that is there.
        solution: ``solution(moments, start, ridge=…)``, see :func:`regress`.

    Returns:
        One of ``RIDGES``; None where the map that is there predicts better than all of them.
    """
    if any(part.count == 0 for part in parts):
        return RIDGES[1]
    parts = [part.thinned(OUTPUTS_TRIED) for part in parts]
    start = start.thinned(OUTPUTS_TRIED)
    errors: dict[float | None, float] = {None: sum(start.error(part) for part in parts)}
    for ridge in RIDGES:
        errors[ridge] = sum(
            solution(fitted, start, ridge=ridge).error(other)
            for fitted, other in (parts, parts[::-1])
        )
    return min(errors, key=errors.__getitem__)
