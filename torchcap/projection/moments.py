"""Streaming second moments of features, and the rows of features that a layer reads.

A layer that mixes channels multiplies its weight with *rows*: input vectors of a linear layer,
input patches of a convolution. All that a quadratic measure of its output's error needs to know
about the data is the second moment of these rows, ``H = E[x xᵀ]``, which has a fixed size.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Final, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame
from torch import Tensor, nn

from torchcap import processes
from torchcap.errors import DataError

_ELEMENTS_AT_ONCE: Final = 2**22  # of rows converted to float64: 32 MiB
_COLUMNS_AT_ONCE: Final = 256

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class SecondMoments:
    """Uncentred second moments of rows that arrive in batches, in memory that does not grow.

    The sums are in float64, and so are the products: autocast and TF32, which leave three digits,
    do not touch float64. Only one triangle of the symmetric matrix is computed, so that the cost
    on a CPU is about that of a full product in float32.

    Args:
        features: length of a row.
        device: where the sums live; rows are moved there. It has to know float64.

    Raises:
        ValueError: if ``features`` is not positive.

    Examples:
        >>> moments = SecondMoments(2)
        >>> moments.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> moments.second_moment
        tensor([[5., 1.],
                [1., 2.]], dtype=torch.float64)
    """

    def __init__(self, features: int, *, device: torch.device | str | None = None) -> None:
        if features < 1:
            raise ValueError(f"rows must have at least 1 feature; got features={features}")
        self.features = features
        self._count = 0
        self._total = torch.zeros(features, dtype=torch.float64, device=device)
        # Holds the upper triangle; what lies below it is not kept up.
        self._products = torch.zeros(features, features, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Add a batch of rows; on an error nothing is added.

        Args:
            rows: shape ``(n, features)``, of any dtype and device.

        Raises:
            ValueError: if the rows have another width.
            DataError: if they hold NaN or infinity.
        """
        if rows.ndim != 2 or rows.shape[1] != self.features:
            raise ValueError(
                f"expected rows of shape (n, {self.features}); got {tuple(rows.shape)}. "
                "Flatten leading dimensions, or use one SecondMoments for each width"
            )
        chunks = torch.split(rows, max(1, _ELEMENTS_AT_ONCE // self.features))
        total = torch.zeros_like(self._total)
        for chunk in chunks:
            total += chunk.to(self._total).sum(0)
        if not bool(total.isfinite().all()):
            raise DataError(_describe_non_finite(rows))
        for chunk in chunks:
            _add_upper_products_(self._products, chunk.to(self._products))
        self._total += total
        self._count += len(rows)

    def merge(self, other: SecondMoments) -> None:
        """Add the rows that another accumulator has seen; the other stays as it is.

        Raises:
            ValueError: if the other's rows have another width.
        """
        if other.features != self.features:
            raise ValueError(
                f"cannot merge moments of rows of {other.features} features "
                f"into moments of rows of {self.features} features"
            )
        self._count += other._count
        self._total += other._total.to(self._total)
        self._products += other._products.to(self._products)

    def reduce(self) -> None:
        """Sum over all processes of ``torch.distributed``, in place; call it once, at the end.

        Afterwards every process holds the moments of everybody's rows, so that a second call would
        count them again. Without an initialised process group nothing happens.
        """
        count = self._total.new_tensor([self._count])
        for tensor in (count, self._total, self._products):
            processes.sum_(tensor)
        self._count = round(count.item())

    @property
    def count(self) -> int:
        """Number of rows seen."""
        return self._count

    @property
    def mean(self) -> Tensor:
        """``E[x]``, shape ``(features,)``, float64."""
        return self._total / self._seen()

    @property
    def second_moment(self) -> Tensor:
        """``E[x xᵀ]``, shape ``(features, features)``, float64, exactly symmetric."""
        upper = self._products.triu()
        return (upper + upper.triu(1).mT) / self._seen()

    @property
    def covariance(self) -> Tensor:
        """``E[x xᵀ] − E[x] E[x]ᵀ``, shape ``(features, features)``, float64."""
        return self.second_moment - self.mean.outer(self.mean)

    def _seen(self) -> int:
        if self._count == 0:
            raise DataError(
                f"no rows of {self.features} features were seen, so they have no moments. "
                "Call update() first; is the data empty?"
            )
        return self._count


class JointMoments:
    """Second moments of rows together with what is to be predicted from them, group by group.

    All that a linear regression of the targets on the rows needs to know about the data, in memory
    that does not grow with it; in float64, like :class:`SecondMoments`.

    Args:
        groups: number of independent regressions.
        inputs: length of a row.
        outputs: number of targets of a group.
        device: where the sums live; rows are moved there.
    """

    def __init__(
        self, groups: int, inputs: int, outputs: int, *, device: torch.device | str | None = None
    ) -> None:
        self.groups, self.inputs, self.outputs = groups, inputs, outputs
        self._count = 0
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._total = zeros(groups, inputs + outputs)
        self._products = zeros(groups, inputs, inputs)  # the upper triangle alone
        self._cross = zeros(groups, inputs, outputs)
        self._squares = zeros(groups, outputs)
        self._moment: Tensor | None = None

    @staticmethod
    def size(groups: int, inputs: int, outputs: int) -> int:
        """Return the bytes that the sums take."""
        return 8 * groups * ((inputs + 1) * (inputs + outputs) + outputs)

    @torch.no_grad()
    def update(self, rows: Tensor, targets: Tensor) -> None:
        """Add rows ``(groups, n, inputs)`` and their targets ``(groups, n, outputs)``.

        Raises:
            DataError: if they hold NaN or infinity; nothing is added then.
        """
        joint = torch.cat([rows, targets.to(rows)], -1)
        step = max(1, _ELEMENTS_AT_ONCE // (self.groups * joint.shape[-1]))
        chunks = [chunk.to(self._products) for chunk in torch.split(joint, step, dim=1)]
        total = torch.stack([chunk.sum(1) for chunk in chunks]).sum(0)
        if not bool(total.isfinite().all()):
            raise DataError(_describe_non_finite(joint.flatten(0, 1)))
        for chunk in chunks:
            for start in range(0, self.inputs, _COLUMNS_AT_ONCE):
                stop = min(start + _COLUMNS_AT_ONCE, self.inputs)
                block = chunk[..., start:stop].mT
                own = chunk[..., start : self.inputs]
                self._products[:, start:stop, start:].baddbmm_(block, own)
                self._cross[:, start:stop].baddbmm_(block, chunk[..., self.inputs :])
            self._squares += chunk[..., self.inputs :].square().sum(1)
        self._total += total
        self._count += joint.shape[1]

    def thinned(self, outputs: int) -> JointMoments:
        """Return the moments of at most so many targets of each group, spread over all of them."""
        step = -(-self.outputs // outputs)
        thin = JointMoments(self.groups, self.inputs, 0, device=self._total.device)
        thin._moment = self.input_moment
        thin._cross = self._cross[..., ::step]
        thin._squares = self._squares[:, ::step]
        mine, targets = torch.split(self._total, [self.inputs, self.outputs], dim=-1)
        thin._total = torch.cat([mine, targets[:, ::step]], -1)
        thin._count, thin.outputs = self._count, thin._cross.shape[-1]
        return thin

    def merge(self, other: JointMoments) -> None:
        """Add the rows that another accumulator of the same sizes has seen."""
        self._count += other._count
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine.add_(theirs.to(mine))

    def reduce(self) -> None:
        """Sum over all processes of ``torch.distributed``; see :meth:`SecondMoments.reduce`."""
        count = self._total.new_tensor([self._count])
        for tensor in (count, *self._sums()):
            processes.sum_(tensor)
        self._count = round(count.item())

    def _sums(self) -> tuple[Tensor, ...]:
        return self._total, self._products, self._cross, self._squares

    @property
    def count(self) -> int:
        """Number of rows seen, of each group."""
        return self._count

    @property
    def input_mean(self) -> Tensor:
        """``E[x]``, shape ``(groups, inputs)``."""
        return self._total[:, : self.inputs] / self._count

    @property
    def output_mean(self) -> Tensor:
        """``E[t]``, shape ``(groups, outputs)``."""
        return self._total[:, self.inputs :] / self._count

    @property
    def input_moment(self) -> Tensor:
        """``E[x xᵀ]``, shape ``(groups, inputs, inputs)``."""
        if self._moment is not None:
            return self._moment
        moment = self._products / self._count
        for start in range(0, self.inputs, _COLUMNS_AT_ONCE):  # in place: these are large
            stop = start + _COLUMNS_AT_ONCE
            corner = moment[:, start:stop, start:stop].triu()
            moment[:, start:stop, start:stop] = corner + corner.triu(1).mT
            moment[:, stop:, start:stop] = moment[:, start:stop, stop:].mT
        return moment

    @property
    def cross_moment(self) -> Tensor:
        """``E[x tᵀ]``, shape ``(groups, inputs, outputs)``."""
        return self._cross / self._count

    @property
    def output_square(self) -> Tensor:
        """``E[t²]``, shape ``(groups, outputs)``."""
        return self._squares / self._count


@torch.no_grad()
def input_patches(
    layer: nn.Module,
    x: Tensor,
    *,
    max_rows: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the rows of the input that a layer multiplies with its weight.

    Features are channel-major: the channel changes slowest, the tap of the kernel fastest. So
    ``rows @ layer.weight.reshape(groups, out // groups, -1).mT``, plus the bias, is what the
    layer puts out. Rows are ordered by image, then by output position, like
    ``layer(x).movedim(1, -1).reshape(-1, out)`` for a convolution.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv1d``, ``2d``, ``3d``, with any stride, dilation, groups,
            padding and padding mode; timm's convolutions with TensorFlow's 'same' padding too.
        x: input of the layer, with or without batch dimension.
        max_rows: if there are more output positions, this many of them are drawn without
            replacement, and only their patches are ever made. They keep their order.
        generator: source of the draw. Generators in the same state draw the same positions from
            inputs with as many positions.

    Returns:
        Shape ``(groups, rows, in_channels // groups * taps)``, dtype and device of ``x``, detached.

    Raises:
        ValueError: if ``x`` does not fit the layer, or ``max_rows`` is not positive.
        TypeError: if the layer is of another kind.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1; got {max_rows}")
    if isinstance(layer, nn.Linear):
        if x.ndim == 0 or x.shape[-1] != layer.in_features:
            raise ValueError(
                f"{_describe(layer)} reads {layer.in_features} features in its last dimension; "
                f"got an input of shape {tuple(x.shape)}"
            )
        windows, groups, leading = x, 1, x.ndim - 1
    elif _is_conv(layer):
        windows, groups, leading = _windows(layer, x), layer.groups, len(layer.kernel_size) + 1
    else:
        raise TypeError(
            f"{_describe(layer)} has no input patches here; expected nn.Linear, nn.Conv1d, "
            "nn.Conv2d, nn.Conv3d or a subclass of them"
        )
    positions, fan_in = windows.shape[:leading], windows.shape[leading:]
    count = math.prod(positions)
    if max_rows is not None and max_rows < count:
        drawn = _draw(count, max_rows, generator).to(x.device)
        windows = windows[torch.unravel_index(drawn, positions)]
        count = max_rows
    return windows.reshape(count, groups, math.prod(fan_in) // groups).transpose(0, 1)


@torch.no_grad()
def output_rows(
    layer: nn.Module,
    y: Tensor,
    *,
    max_rows: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the rows of a layer's output that belong to the rows of its :func:`input_patches`.

    Args:
        layer: the layer.
        y: its output, or something of the same shape (in all but the channels).
        max_rows: as for the patches.
        generator: in the state that it had for the patches.

    Returns:
        Shape ``(rows, channels)``.
    """
    kernel: tuple[int, ...] = getattr(layer, "kernel_size", ())
    channels = y.ndim - 1 - len(kernel)  # there may be no batch dimension
    rows = y.movedim(channels, -1).reshape(-1, y.shape[channels])
    if max_rows is not None and max_rows < len(rows):
        rows = rows[_draw(len(rows), max_rows, generator).to(rows.device)]
    return rows


def _windows(layer: _Conv, x: Tensor) -> Tensor:
    """Return a view of the padded input, ``(images, *positions, in_channels, *kernel_size)``."""
    axes = len(layer.kernel_size)
    if x.ndim == axes + 1:
        x = x.unsqueeze(0)
    if x.ndim != axes + 2 or x.shape[1] != layer.in_channels:
        raise ValueError(
            f"{_describe(layer)} reads {layer.in_channels} channels, in an input of {axes + 1} "
            f"or {axes + 2} dimensions; got an input of shape {tuple(x.shape)}"
        )
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # F.pad wants the last axis first.
    amounts = [amount for pair in reversed(_padding(layer, x.shape[2:])) for amount in pair]
    if any(amounts):
        x = F.pad(x, amounts, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x.movedim(1, axes + 1)


def _padding(layer: _Conv, sizes: torch.Size) -> list[tuple[int, int]]:
    """Return the padding before and after, for each spatial axis."""
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if _pads_dynamically(layer):
        # TensorFlow's rule: as many positions as there are strides in the input, rounded up.
        missing = [
            max((math.ceil(size / stride) - 1) * stride + r + 1 - size, 0)
            for size, stride, r in zip(sizes, layer.stride, reach, strict=True)
        ]
    elif layer.padding == "same":
        missing = reach
    elif layer.padding == "valid":
        missing = [0] * len(reach)
    else:
        return [(int(amount), int(amount)) for amount in layer.padding]
    return [(amount // 2, amount - amount // 2) for amount in missing]


def _pads_dynamically(layer: _Conv) -> bool:
    if isinstance(layer, StdConv2dSame | ScaledStdConv2dSame):
        return bool(layer.same_pad)
    return isinstance(layer, Conv2dSame | Conv2dSameExport)


def _is_conv(layer: nn.Module) -> TypeGuard[_Conv]:
    return isinstance(layer, _Conv)


def _draw(count: int, size: int, generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.randperm(count, generator=generator, device=device)[:size].sort().values


def _add_upper_products_(products: Tensor, rows: Tensor) -> None:
    for start in range(0, rows.shape[1], _COLUMNS_AT_ONCE):
        stop = start + _COLUMNS_AT_ONCE
        products[start:stop, start:].addmm_(rows[:, start:stop].mT, rows[:, start:])


def _describe_non_finite(rows: Tensor) -> str:
    bad = (~rows.isfinite()).any(dim=1).nonzero()
    if len(bad) == 0:
        return f"the sum of {len(rows)} rows is beyond float64; rescale the features"
    return (
        f"{len(bad)} of {len(rows)} rows hold NaN or infinity, the first of them row "
        f"{int(bad[0])}; expected finite features. Check the data and the layers before"
    )


def _describe(layer: nn.Module) -> str:
    return type(layer).__name__
