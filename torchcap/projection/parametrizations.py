"""Projections as parametrizations: a layer's tensor, seen through the ``P`` on one of its axes.

An axis is a row of *segments*: stretches of channels under one projection, or under none. That is
how the reader of a concatenation sees a direct sum of spaces, and how the flattened image in front
of a classifier sees every channel at each of its positions. Registered with
``torch.nn.utils.parametrize.register_parametrization(..., unsafe=True)``, since shapes change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchcap.projection.maps import Projection


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of an axis.

    Attributes:
        length: number of entries of the axis, before the projection.
        projection: what acts on the stretch; None keeps it.
        first: the first block of the projection that stands here.
        blocks: how many of its blocks stand here.
        repeat: how many neighbouring entries hold one channel.
    """

    length: int
    projection: Projection | None = None
    first: int = 0
    blocks: int = 1
    repeat: int = 1

    @property
    def kept(self) -> int:
        """Number of entries after the projection."""
        if self.projection is None:
            return self.length
        return self.projection.rank // self.projection.blocks * self.blocks * self.repeat

    def contract(self, rows: Tensor) -> Tensor:
        """Apply ``Pᵀ`` along the first axis: ``(length, columns)`` to ``(kept, columns)``."""
        if self.projection is None:
            return rows
        columns = rows.shape[1]
        wide = rows.reshape(self.length // self.repeat, self.repeat * columns)
        return self.projection.contract(wide, self.first, self.blocks).reshape(self.kept, columns)

    def expand(self, rows: Tensor) -> Tensor:
        """Apply ``P`` along the first axis: ``(kept, columns)`` to ``(length, columns)``."""
        if self.projection is None:
            return rows
        columns = rows.shape[1]
        wide = rows.reshape(self.kept // self.repeat, self.repeat * columns)
        return self.projection.expand(wide, self.first, self.blocks).reshape(self.length, columns)


class ProjectAxis(nn.Module):
    """Parametrization that applies ``Pᵀ`` along one axis of a tensor.

    Args:
        axis: the axis that is projected.
        segments: what stands along the axis, in order; lengths add up to its size (times
            ``groups``).
        groups: for the input axis of a grouped convolution, its number of groups; segments are
            then counted over all groups, one after the other.

    The projections are not submodules: one :class:`ProjectOutput` owns each of them, so that it
    appears once in the ``state_dict``.
    """

    def __init__(self, axis: int, segments: Sequence[Segment], *, groups: int = 1) -> None:
        super().__init__()
        self.axis, self.groups = axis, groups
        self.segments = tuple(segments)

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the projected tensor, with the dtype of ``tensor``."""
        with torch.autocast(tensor.device.type, enabled=False):
            front = self._to_front(tensor)
            return self._from_front(apply_segments(front, self.segments), tensor)

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """Refuse assignment: a projected tensor does not say what it was projected from."""
        raise NotImplementedError(
            f"a projected tensor of shape {tuple(tensor.shape)} cannot be assigned to; train the "
            "projections, or materialize() the model first and change the small one"
        )

    def _to_front(self, tensor: Tensor) -> Tensor:
        """``(…, axis, …)`` to ``(axis, everything else)``, groups one after the other."""
        if self.groups == 1:
            return tensor.movedim(self.axis, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]
        rows, width = tensor.shape[:2]
        grouped = tensor.reshape(self.groups, rows // self.groups, width, -1)
        return grouped.transpose(1, 2).reshape(self.groups * width, -1)

    def _from_front(self, front: Tensor, like: Tensor) -> Tensor:
        if self.groups == 1:
            rest = [n for d, n in enumerate(like.shape) if d != self.axis]
            return front.reshape(-1, *rest).movedim(0, self.axis).contiguous()
        rows, _, *kernel = like.shape
        grouped = front.reshape(self.groups, front.shape[0] // self.groups, rows // self.groups, -1)
        return grouped.transpose(1, 2).reshape(rows, -1, *kernel)

    def extra_repr(self) -> str:
        """Return what is projected, for printing."""
        return f"axis={self.axis}, groups={self.groups}, segments={len(self.segments)}"


class ProjectOutput(ProjectAxis):
    """``Pᵀ`` on the output axis: ``W_out[k] = Σ_o P[o, k] W[o]``, ``b_out = Pᵀ b``.

    Args:
        segments: what stands along the axis.
        owned: the projections that live here, as submodules.
        axis: the channel axis: 0 for the weight of a convolution or linear layer.
    """

    def __init__(
        self, segments: Sequence[Segment], *, owned: Sequence[Projection] = (), axis: int = 0
    ) -> None:
        super().__init__(axis, segments)
        self.projections = nn.ModuleList(owned)


class ProjectInput(ProjectAxis):
    """``P`` on the input axis: ``W_in[:, k] = Σ_i W[:, i] P[i, k]``; the bias stays.

    Args:
        segments: what stands along the axis, over all groups.
        groups: number of groups of the layer.
        axis: the channel axis: 1 for the weight of a convolution or linear layer.
    """

    def __init__(self, segments: Sequence[Segment], *, groups: int = 1, axis: int = 1) -> None:
        super().__init__(axis, segments, groups=groups)


def apply_segments(rows: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Apply a direct sum of ``Pᵀ`` along the first axis of ``(length, columns)``."""
    if len(segments) == 1:
        return segments[0].contract(rows)
    pieces = torch.split(rows, [segment.length for segment in segments])
    return torch.cat([s.contract(piece) for s, piece in zip(segments, pieces, strict=True)])


def lift_segments(rows: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Apply a direct sum of ``P`` along the first axis of ``(kept, columns)``."""
    if len(segments) == 1:
        return segments[0].expand(rows)
    pieces = torch.split(rows, [segment.kept for segment in segments])
    return torch.cat([s.expand(piece) for s, piece in zip(segments, pieces, strict=True)])
