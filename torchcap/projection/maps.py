"""The kinds of ``P``: what stands between the channels of a space and the fewer that are kept.

Every kind is block-diagonal, ``(blocks, channels / blocks, rank / blocks)``: one block for an
ordinary space, one a group where a grouped convolution or a chunk must find its channels again. A
direct sum (the reader of a concatenation) is a row of such maps, one for each stretch of the axis;
see :mod:`torchcap.projection.parametrizations`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torchcap.projection.polar import polar, polar_many


class Projection(nn.Module):
    """A map from ``channels`` to ``rank``, with orthonormal columns.

    Attributes:
        blocks: number of equal diagonal blocks.
        channels, rank: the widths before and after, over all blocks.
    """

    def __init__(self, blocks: int, channels: int, rank: int) -> None:
        super().__init__()
        self.blocks, self.channels, self.rank = blocks, channels, rank

    def contract(self, rows: Tensor, first: int, count: int) -> Tensor:
        """Apply ``Pᵀ`` along the first axis.

        Args:
            rows: shape ``(blocks' * channels / blocks, columns)``, of ``count`` blocks.
            first: the first of these blocks.
            count: how many blocks.

        Returns:
            shape ``(count * rank / blocks, columns)``.
        """
        raise NotImplementedError

    def expand(self, x: Tensor, first: int, count: int) -> Tensor:
        """Apply ``P`` along the first axis; on the kept channels it undoes :meth:`contract`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"channels={self.channels}, rank={self.rank}, blocks={self.blocks}"


class Stiefel(Projection):
    """Orthonormal columns, trained through a proxy matrix.

    ``P`` is the polar factor of ``proxy`` (PMaP, sec. 3.6 of the paper), so every step of any
    optimizer on the proxy keeps ``PᵀP = I``.

    Args:
        basis: where training starts, shape ``(blocks, channels / blocks, rank / blocks)``, with
            orthonormal columns.
    """

    def __init__(self, basis: Tensor) -> None:
        blocks, channels, rank = basis.shape
        super().__init__(blocks, blocks * channels, blocks * rank)
        self.proxy = nn.Parameter(basis.detach().clone())
        self._shared: Tensor | None = None

    def forward(self) -> Tensor:
        """Return ``P``, shape ``(blocks, channels / blocks, rank / blocks)``."""
        if self._shared is not None:
            return self._shared
        # In a backward, gradient checkpointing runs a part of the forward again, and must find the
        # tensors that it found the first time.
        if self in _LAST and torch._C._current_graph_task_id() != -1:
            return _LAST[self]
        return polar(self.proxy)

    def __getstate__(self) -> dict[str, Any]:
        # What a forward leaves behind does not survive a copy: non-leaf tensors cannot.
        return {**self.__dict__, "_shared": None}

    def contract(self, rows: Tensor, first: int, count: int) -> Tensor:
        """Apply ``Pᵀ``; see :meth:`Projection.contract`."""
        P = _raised(self()[first : first + count])
        x = rows.to(P.dtype).reshape(count, P.shape[1], -1)
        return (P.mT @ x).reshape(count * P.shape[2], -1).to(rows.dtype)

    def expand(self, x: Tensor, first: int, count: int) -> Tensor:
        """Apply ``P``; see :meth:`Projection.expand`."""
        P = _raised(self()[first : first + count])
        rows = x.to(P.dtype).reshape(count, P.shape[2], -1)
        return (P @ rows).reshape(count * P.shape[1], -1).to(x.dtype)


class Selection(Projection):
    """Columns of the identity: channels are kept or dropped, and not trained.

    Args:
        basis: zeros and ones, shape ``(blocks, channels / blocks, rank / blocks)``, one ``1`` in
            every column.
    """

    kept: Tensor

    def __init__(self, basis: Tensor) -> None:
        blocks, channels, rank = basis.shape
        super().__init__(blocks, blocks * channels, blocks * rank)
        self.register_buffer("kept", basis.argmax(dim=1))

    def forward(self) -> Tensor:
        """Return ``P``, shape ``(blocks, channels / blocks, rank / blocks)``."""
        width = self.channels // self.blocks
        return torch.nn.functional.one_hot(self.kept, width).mT.to(torch.get_default_dtype())

    def contract(self, rows: Tensor, first: int, count: int) -> Tensor:
        """Apply ``Pᵀ``; see :meth:`Projection.contract`."""
        return rows[self._positions(first, count)]

    def expand(self, x: Tensor, first: int, count: int) -> Tensor:
        """Apply ``P``; see :meth:`Projection.expand`."""
        width = self.channels // self.blocks
        return x.new_zeros(count * width, x.shape[1]).index_copy(
            0, self._positions(first, count), x
        )

    def _positions(self, first: int, count: int) -> Tensor:
        width = self.channels // self.blocks
        starts = torch.arange(count, device=self.kept.device)[:, None] * width
        return (self.kept[first : first + count] + starts).flatten()


def _raised(P: Tensor) -> Tensor:
    """Half-precision bases are applied in float32, so that a small weight is rounded once."""
    return P.float() if P.dtype in {torch.float16, torch.bfloat16} else P


@contextmanager
def shared_bases(projections: Sequence[Projection]) -> Iterator[None]:
    """Compute every ``P`` once, batched by shape, for all uses within the block."""
    share_bases(projections)
    try:
        yield
    finally:
        release_bases(projections)


_LAST: WeakKeyDictionary[Projection, Tensor] = WeakKeyDictionary()
"""What every ``P`` was in the last forward; no part of a model's state."""


def share_bases(projections: Sequence[Projection]) -> None:
    """Compute every trained ``P`` now, batched by shape, and keep them until released."""
    trained = [projection for projection in projections if isinstance(projection, Stiefel)]
    for projection, basis in zip(trained, polar_many([p.proxy for p in trained]), strict=True):
        projection._shared = _LAST[projection] = basis


def release_bases(projections: Sequence[Projection]) -> None:
    """Forget the shared bases: later uses compute their own."""
    for projection in projections:
        if isinstance(projection, Stiefel):
            projection._shared = None
