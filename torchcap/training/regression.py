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


@dataclass(frozen=True, slots=True)
class Affine:
    """An affine map of rows, group by group.

    Attributes:
        weight: shape ``(groups, inputs, outputs)``.
        bias: shape ``(groups, outputs)``; zero where the layer has none.
    """

    weight: Tensor
    bias: Tensor

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
    H, B, W = moments.input_moment, moments.cross_moment, start.weight.to(moments.input_moment)
    x, t = moments.input_mean, moments.output_mean
    if intercept:
        H = H - x.unsqueeze(2) * x.unsqueeze(1)
        B = B - x.unsqueeze(2) * t.unsqueeze(1)
    if present is not None:
        keep = present.to(H)
        H = H * keep.unsqueeze(1) * keep.unsqueeze(2) + torch.diag_embed(1 - keep)
        B, W = B * keep.unsqueeze(2), W * keep.unsqueeze(2)
    scale = H.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    regular = H + torch.diag_embed((ridge * scale).unsqueeze(1).expand(-1, H.shape[1]))
    W = W + torch.linalg.solve(regular, B - H @ W)
    if not intercept:
        return Affine(W, start.bias.to(W))
    return Affine(W, t - (x.unsqueeze(1) @ W)[:, 0])


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
    errors: dict[float | None, float] = {None: sum(start.error(part) for part in parts)}
    for ridge in RIDGES:
        errors[ridge] = sum(
            solution(fitted, start, ridge=ridge).error(other)
            for fitted, other in (parts, tuple(reversed(parts)))
        )
    return min(errors, key=errors.__getitem__)
