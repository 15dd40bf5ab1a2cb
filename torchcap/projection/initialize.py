"""Where training of a basis starts: random, principal components, or a choice of channels.

An initializer turns the tensors around one channel space into a basis. It sees no graph and no
plan: a `SpaceContext` holds all that it may look at.

A *selection*, columns of the identity, commutes with a pointwise nonlinearity and a rotation does
not. So a start that keeps the best channels is far ahead of one that keeps the best directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcap.errors import DataError, PlanError

_ELEMENTS_AT_ONCE: Final = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """How one consumer reads a space: by a linear map of patches, with their second moment.

    Features of a patch are channel-major: the channel changes slowest, the tap fastest.

    A grouped convolution is a readout of dense weight, with zeros where a group does not look;
    its moment has to be zero between groups as well, lest one group be compensated by another.

    Attributes:
        weight: shape ``(out, channels, taps)``.
        moment: ``E[x xᵀ]`` of the inputs, ``(channels * taps, channels * taps)``; or that of the
            features at one position, ``(channels, channels)``, and taps then are independent
            further outputs. None if it is not known.
        mean: ``E[x]`` of the same inputs; None if it is not known.

    Raises:
        ValueError: if the shapes do not fit or a value is not finite.
    """

    weight: Tensor
    moment: Tensor | None = None
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 3:
            raise ValueError(
                "the weight of a readout has shape (out, channels, taps); "
                f"got {tuple(self.weight.shape)}"
            )
        _check_finite("the weight of a readout", self.weight)
        if self.moment is None:
            return
        _, channels, taps = self.weight.shape
        fitting = {(channels * taps, channels * taps), (channels, channels)}
        if tuple(self.moment.shape) not in fitting:
            raise ValueError(
                f"a readout of {channels} channels by {taps} taps has a moment of shape "
                f"{' or '.join(map(str, sorted(fitting)))}; got {tuple(self.moment.shape)}"
            )
        _check_finite("the moment of a readout", self.moment)


@dataclass(frozen=True, slots=True, eq=False)
class SpaceContext:
    """All that an initializer may know about one channel space.

    Attributes:
        name: of the space, for messages.
        channels: width of the space.
        rank: width that is kept.
        blocks: the basis is block-diagonal with this many blocks of one size; ``channels`` and
            ``rank`` are multiples of it.
        selection: only columns of the identity are allowed.
        producers: weights that write the space, each ``(channels, fan_in)``, with the BatchNorm
            that follows folded in.
        readouts: how each consumer reads the space.
        moment: ``E[x xᵀ]`` of the features of the space itself, ``(channels, channels)``.

    Raises:
        PlanError: if the rank or the blocks do not fit the channels.
        ValueError: if a shape does not fit or a value is not finite.
    """

    name: str
    channels: int
    rank: int
    blocks: int = 1
    selection: bool = False
    producers: tuple[Tensor, ...] = ()
    readouts: tuple[Readout, ...] = ()
    moment: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        for index, producer in enumerate(self.producers):
            label = f"producer {index} of space {self.name!r}"
            if producer.ndim != 2 or len(producer) != self.channels:
                raise ValueError(
                    f"{label} must have shape ({self.channels}, fan_in); "
                    f"got {tuple(producer.shape)}"
                )
            _check_finite(label, producer)
        for index, readout in enumerate(self.readouts):
            if readout.weight.shape[1] != self.channels:
                raise ValueError(
                    f"readout {index} of space {self.name!r} must read {self.channels} channels; "
                    f"got a weight of shape {tuple(readout.weight.shape)}"
                )
        if self.moment is not None:
            label = f"the moment of space {self.name!r}"
            if self.moment.shape != (self.channels, self.channels):
                raise ValueError(
                    f"{label} must have shape ({self.channels}, {self.channels}); "
                    f"got {tuple(self.moment.shape)}"
                )
            _check_finite(label, self.moment)

    def _check_sizes(self) -> None:
        if self.blocks < 1 or self.channels < 1 or self.channels % self.blocks:
            raise PlanError(
                f"space {self.name!r} has {self.channels} channels, which cannot be cut into "
                f"{self.blocks} equal blocks"
            )
        if not self.blocks <= self.rank <= self.channels or self.rank % self.blocks:
            raise PlanError(
                f"space {self.name!r} has {self.channels} channels, so its rank must be within "
                f"{self.blocks}..{self.channels} and a multiple of {self.blocks}; got {self.rank}"
            )

    @property
    def block_channels(self) -> int:
        """Channels of one block."""
        return self.channels // self.blocks

    @property
    def block_rank(self) -> int:
        """Rank of one block."""
        return self.rank // self.blocks


class Initializer(Protocol):
    """Chooses the basis in which training of a space starts."""

    def __call__(self, space: SpaceContext) -> Tensor:
        """Return a basis of shape ``(blocks, channels / blocks, rank / blocks)``.

        It is float64, with orthonormal columns in each block, on the device of the tensors that
        it was derived from.
        """


@dataclass(frozen=True, slots=True)
class RandomOrthonormal:
    """A basis drawn uniformly from all orthonormal ones; for a selection, random channels.

    Attributes:
        generator: source of the draw; it moves on with each call.
    """

    generator: torch.Generator

    def __call__(self, space: SpaceContext) -> Tensor:
        """Return the basis; see `Initializer`."""
        device = self.generator.device
        if space.selection:
            scores = torch.rand(space.channels, generator=self.generator, device=device)
            return _select_highest(scores, space)
        shape = (space.blocks, space.block_channels, space.block_rank)
        gaussian = torch.randn(shape, generator=self.generator, device=device, dtype=torch.float64)
        Q, R = torch.linalg.qr(gaussian)
        # The signs of R's diagonal are LAPACK's habit; without it Q has the uniform distribution.
        return Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


@dataclass(frozen=True, slots=True)
class PrincipalComponents:
    """Leading eigenvectors of the second moment of the space's features, block by block.

    The moment is not centred: biases are projected with the weights, so that what a basis loses of
    the features is ``E‖x − P Pᵀ x‖²``, mean included, and these eigenvectors lose least. Where only
    a selection is allowed, the channels of largest energy ``E[x²]`` lose least, and are chosen.

    Eigenvectors come in falling order of eigenvalue, each with its largest entry positive.
    """

    @torch.no_grad()
    def __call__(self, space: SpaceContext) -> Tensor:
        """Return the basis; see `Initializer`.

        Raises:
            DataError: if the space has no moment.
        """
        if space.moment is None:
            raise DataError(
                f"principal components of space {space.name!r} need the second moment of its "
                "features, and it has none. Give data, or start from the weights: LargestNorm()"
            )
        moment = space.moment.double()
        if space.selection:
            return _select_highest(moment.diagonal(), space)
        size = space.block_channels
        corners = torch.arange(space.blocks, device=moment.device)
        diagonal = moment.reshape(space.blocks, size, space.blocks, size)[corners, :, corners]
        vectors = torch.linalg.eigh((diagonal + diagonal.mT) / 2).eigenvectors
        leading = vectors.flip(-1)[..., : space.block_rank]
        largest = leading.gather(-2, leading.abs().argmax(-2, keepdim=True))
        return leading * largest.sign()


@dataclass(frozen=True, slots=True)
class LargestNorm:
    """The channels whose producers' weights have the largest L1 norm, block by block.

    This is the rule of magnitude pruning; it needs no data. The norms of several producers add up.

    References:
        Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, sec. 3.1.
    """

    def __call__(self, space: SpaceContext) -> Tensor:
        """Return the selection; see `Initializer`.

        Raises:
            ValueError: if the space has no producers.
        """
        if not space.producers:
            raise ValueError(
                f"the largest norms of space {space.name!r} need its producers' weights, and it "
                "has none. Choose by the data instead: GreedySelection()"
            )
        device = space.producers[0].device
        norms = [producer.double().abs().sum(1).to(device) for producer in space.producers]
        return _select_highest(torch.stack(norms).sum(0), space)


@dataclass(frozen=True, slots=True)
class GreedySelection:
    """The channels that consumers miss most, found by dropping the least missed one by one.

    A consumer misses a channel by as much as the mean square of its output must change when the
    channel is gone and the weights of all that remain make up for it as well as they can; see
    Note [backward elimination]. Costs of several readouts add up, in units of their outputs.
    Each block loses its share of channels, and no more.

    Readouts with the same inputs are best stacked along ``out``, into one readout: the time goes
    into their moments.

    Attributes:
        ridge: what is added to the diagonal of each moment, as a share of its mean. It tells apart
            what the data does not: among equal channels, those of smaller weight go first.

    Raises:
        ValueError: if ``ridge`` is not positive.

    References:
        Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
        NIPS 1992, for one weight at a time.
    """

    ridge: float = 1e-4

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"ridge must be positive; got {self.ridge}")

    @torch.no_grad()
    def __call__(self, space: SpaceContext) -> Tensor:
        """Return the selection, with channels in rising order; see `Initializer`.

        Raises:
            ValueError: if there are no readouts.
            DataError: if a readout has no moment, or one that is far from positive semidefinite.
        """
        share = space.block_channels - space.block_rank
        if share == 0:  # nothing to choose, and moments are costly to invert
            return torch.eye(space.block_channels, dtype=torch.float64).repeat(space.blocks, 1, 1)
        eliminations = eliminations_of(space, self.ridge)
        block = torch.arange(space.blocks).repeat_interleave(space.block_channels)
        stays = drop_cheapest(eliminations, block, [share] * space.blocks)
        offsets = stays.reshape(space.blocks, -1).nonzero()[:, 1]
        offsets = offsets.reshape(space.blocks, space.block_rank)
        return selection_matrix(offsets, space.block_channels).to(eliminations[0].weight.device)


def drop_cheapest(
    eliminations: Sequence[Elimination],
    owner: Tensor,
    drops: Sequence[int],
    stays: Tensor | None = None,
) -> Tensor:
    """Drop the cheapest channel again and again, until every owner has lost its share.

    Args:
        eliminations: readouts of the same channels; their costs add up.
        owner: shape ``(channels,)``: which owner (a block, a space) each channel belongs to; those
            of owner -1 stay.
        drops: how many channels each owner loses.
        stays: what is still there, if the eliminations have lost channels before.

    Returns:
        Shape ``(channels,)``, on the CPU: True for the channels that stay.
    """
    left = torch.tensor([*drops, 0])  # the last entry is that of owner -1
    stays = torch.ones(len(owner), dtype=torch.bool) if stays is None else stays.clone()
    for _ in range(sum(drops)):
        costs = torch.stack([elimination.costs().cpu() for elimination in eliminations]).sum(0)
        channel = int(costs.masked_fill(~stays | (left[owner] == 0), torch.inf).argmin())
        for elimination in eliminations:
            elimination.drop(channel)
        stays[channel] = False
        left[owner[channel]] -= 1
    return stays


# Note [backward elimination]
#
# A linear map W reads features with H = E[x xᵀ]. Its output changes by E‖(W − W')x‖², which is
# tr((W − W') H (W − W')ᵀ). Let A = H⁻¹, and let g be the columns that belong to one channel (one
# for each tap). Among all W' that are zero at g the best is
#
#     W' = W − W_g A_gg⁻¹ A_g:        at a cost of        tr(W_g A_gg⁻¹ W_gᵀ)
#
# and the inverse of H without g is A' = A − A_:g A_gg⁻¹ A_g:. Both may be repeated: as W' is the
# best for what is left, costs of one drop after another add up to the cost of all at once.
#
# With L Lᵀ = A_gg and U = A_:g L⁻ᵀ these read A' = A − U Uᵀ and W' = W − (L⁻¹ W_gᵀ)ᵀ Uᵀ: a
# Cholesky factorisation of A, whose pivots are chosen by cost. As in its left-looking form, A stays
# untouched, and a column of A' is made from the stored U when its channel is dropped; only the
# diagonal blocks, which all costs need, are kept up. So a drop reads (features × dropped) numbers
# and does not rewrite (features × features).


class Elimination:
    """A readout that loses channels one by one, while the others make up for each.

    See Note [backward elimination].

    Args:
        weight: shape ``(out, channels, taps)``.
        inverse: of the moment of its inputs, ``(channels * taps, channels * taps)``, float64,
            positive definite, channel-major; it is read, not changed.
        drops: how many channels are going to be dropped, at most.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, *, drops: int) -> None:
        _, channels, taps = weight.shape
        self._inverse = inverse
        each = torch.arange(channels, device=inverse.device)
        blocks = inverse.reshape(channels, taps, channels, taps)
        self._diagonal = blocks[each, :, each]  # A_gg of every channel g
        self._weight = (
            weight.to(inverse).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        )
        self._factor = inverse.new_empty(channels * taps, drops * taps)  # all U so far
        self._width = 0
        self._gone = torch.zeros(channels, dtype=torch.bool, device=inverse.device)

    @property
    def weight(self) -> Tensor:
        """The best weight for the channels that are left, ``(out, channels, taps)``, float64."""
        return self._weight.permute(2, 0, 1)

    def costs(self) -> Tensor:
        """Return what dropping each channel next would cost, ``(channels,)``; 0 for those gone."""
        squares = self._weight @ self._weight.mT
        solved = torch.linalg.solve(self._diagonal, squares)
        return solved.diagonal(dim1=-2, dim2=-1).sum(-1)

    def drop(self, channel: int) -> None:
        """Drop one channel and let the others make up for it; in place."""
        channels, taps, _ = self._weight.shape
        own = slice(channel * taps, (channel + 1) * taps)
        past = self._factor[:, : self._width]
        column = self._inverse[:, own] - past @ past[own].mT
        L = torch.linalg.cholesky(column[own])
        U = torch.linalg.solve_triangular(L, column.mT, upper=False).mT.contiguous()
        U.view(channels, taps, taps)[self._gone] = 0  # zero but for rounding
        removed = torch.linalg.solve_triangular(L, self._weight[channel], upper=False)
        self._weight.flatten(0, 1).addmm_(U, removed, alpha=-1)
        self._factor[:, self._width : self._width + taps] = U
        self._width += taps
        U = U.view(channels, taps, taps)
        self._diagonal -= U @ U.mT
        self._gone[channel] = True
        self._weight[channel] = 0
        self._diagonal[channel] = torch.eye(taps).to(self._diagonal)  # keeps costs() regular


def selection_matrix(indices: Tensor, channels: int) -> Tensor:
    """Return the columns of the identity that keep the given channels.

    Args:
        indices: shape ``(..., rank)``, integers within ``0..channels - 1``.
        channels: width that is selected from.

    Returns:
        Shape ``(..., channels, rank)``, float64, on the device of ``indices``.

    Examples:
        >>> selection_matrix(torch.tensor([0, 2]), 3)
        tensor([[1., 0.],
                [0., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    return F.one_hot(indices, channels).mT.double()


def _select_highest(scores: Tensor, space: SpaceContext) -> Tensor:
    by_block = scores.reshape(space.blocks, space.block_channels)
    order = by_block.argsort(dim=-1, descending=True, stable=True)
    return selection_matrix(order[:, : space.block_rank].sort(-1).values, space.block_channels)


def eliminations_of(space: SpaceContext, ridge: float) -> list[Elimination]:
    """Return the readouts of a space, ready to lose as many channels as its rank says."""
    if not space.readouts:
        raise ValueError(
            f"greedy selection in space {space.name!r} needs the readouts of its consumers, and it "
            "has none. Choose by the weights instead: LargestNorm()"
        )
    pairs = [(r.weight, r.moment) for r in space.readouts if r.moment is not None]
    missing = len(space.readouts) - len(pairs)
    if missing:
        raise DataError(
            f"greedy selection in space {space.name!r} needs the second moment of every "
            f"consumer's inputs; {missing} of {len(space.readouts)} readouts have none. "
            "Give data, or choose by the weights: LargestNorm()"
        )
    drops = space.channels - space.rank
    return [
        Elimination(
            without_still(_condense(weight, len(moment)), moment.diagonal()),
            _regular_inverse(moment, ridge, space),
            drops=drops,
        )
        for weight, moment in pairs
    ]


def without_still(weight: Tensor, spread: Tensor) -> Tensor:
    """Return a weight that is zero where features are always zero, so that these cost nothing.

    The ridge alone would give them a cost, which may be more than that of a channel which others
    replace almost perfectly.

    Args:
        weight: shape ``(out, channels, taps)``.
        spread: the mean square of the features, or their variance, ``(channels * taps,)``.
    """
    return weight * (spread > 0).reshape(weight.shape[1:]).to(weight)


def _condense(weight: Tensor, features: int) -> Tensor:
    """Return a weight with the same costs: taps as the moment has them, no needless outputs."""
    out, channels, taps = weight.shape
    apart = taps != features // channels
    if apart:
        out, taps = out * taps, 1
    if out <= features:
        return weight.mT.reshape(out, channels, taps) if apart else weight
    # Costs depend on WᵀW alone, so its square root will do. A classifier behind a flatten has
    # many more outputs and positions than channels: convert and add them up in parts.
    gram = torch.zeros(features, features, dtype=torch.float64, device=weight.device)
    for part in torch.split(weight, max(1, _ELEMENTS_AT_ONCE // weight[0].numel())):
        rows = (part.mT if apart else part).reshape(-1, features).double()
        gram.addmm_(rows.mT, rows)
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt()).mT.reshape(features, channels, taps)


def _regular_inverse(moment: Tensor, ridge: float, space: SpaceContext) -> Tensor:
    moment = moment.double()
    moment = (moment + moment.mT) / 2
    diagonal = moment.diagonal()
    scale = diagonal.mean().item()
    if scale == 0:  # all inputs are dead: the costs are to be next to nothing, yet finite
        scale = torch.finfo(torch.float32).tiny
    # Moments summed in float32 can be indefinite by more than a small ridge: raise it tenfold
    # until it holds.
    added = 0.0
    while added < max(ridge, 1.0):
        wanted = 10 * added if added else ridge
        diagonal.add_((wanted - added) * scale)
        added = wanted
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            return torch.cholesky_inverse(factor)
    raise DataError(
        f"a readout of space {space.name!r} has a moment of {len(moment)} features that is far "
        "from positive semidefinite; expected E[x xᵀ] of its inputs, from SecondMoments"
    )


def _check_finite(label: str, tensor: Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{label} holds NaN or infinity; expected finite values")
