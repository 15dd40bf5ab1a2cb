"""Tiny networks, each with the channel spaces that a person finds in it by hand.

A network takes a batch of two 8x8 images unless its truth says otherwise. The truth names every
space by its first producer, as ``analyze()`` does, with the layers that write, read and carry it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import RmsNorm2d, SimpleNorm2d
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

IMAGE = (2, 3, 8, 8)
OUTPUT = "output of the model"


@dataclass(frozen=True)
class Space:
    """What is true of a channel space.

    Attributes:
        channels: its number of channels.
        freedom: the kinds of projection that it allows.
        written, read, carried: the layers (``""``: the network itself), separated by blanks.
        reason: words that the reason must contain; empty if there is none.
        blocks: number of blocks that keep equally many channels.
    """

    channels: int
    freedom: str
    written: str
    read: str = ""
    carried: str = ""
    reason: str = ""
    blocks: int = 1

    @property
    def free(self) -> bool:
        return self.freedom != "fixed"


@dataclass(frozen=True)
class Truth:
    build: Callable[[], nn.Module]
    spaces: Mapping[str, Space]
    shapes: tuple[tuple[int, ...], ...]
    folds: Mapping[str, str | None]
    notes: tuple[str, ...]

    def model(self, seed: int = 0) -> nn.Module:
        """Return the network in float64 and eval mode, its weights drawn from a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build().double().eval()

    def inputs(self, seed: int = 1) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes
        )


NETS: dict[str, Truth] = {}


def truth(
    *spaces: Space,
    shapes: tuple[tuple[int, ...], ...] = (IMAGE,),
    folds: Mapping[str, str | None] | None = None,
    notes: tuple[str, ...] = (),
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Say what is true of the network below."""
    named: dict[str, Space] = {}
    for space in spaces:
        first = space.written.split(" ")[0]
        taken = sum(name.partition(":")[0] == first for name in named)
        named[f"{first}:{taken + 1}" if taken else first] = space

    def register(build: type[nn.Module]) -> type[nn.Module]:
        NETS[build.__name__] = Truth(build, named, shapes, folds or {}, notes)
        return build

    return register


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Return a convolution that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


# --------------------------------------------------------------------------------------------------
# Chains


@truth(
    Space(8, "stiefel", "conv1", "conv2"),
    Space(6, "linear", "conv2", "conv3"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
)
class ConvChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(8, 6)
        self.conv3 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(F.relu(self.conv1(x))))


@truth(
    Space(8, "stiefel", "conv1", "conv2", "bn1"),
    Space(6, "stiefel", "conv2", "fc", "bn2"),
    Space(5, "fixed", "fc", reason=OUTPUT),
    folds={"conv1": "bn1", "conv2": "bn2"},
)
class ConvNormChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = conv(8, 6)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 2)
        x = F.silu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@truth(
    Space(8, "selection", "conv1", "conv2", "bn", reason="per-channel affine of 'bn'"),
    Space(4, "fixed", "conv2", reason=OUTPUT),
)
class NormBehindActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(F.relu(self.conv1(x))))


@truth(
    Space(9, "stiefel", "layers.0", "layers.2"),
    Space(7, "stiefel", "layers.2", "layers.5", "layers.3"),
    Space(4, "fixed", "layers.5", reason=OUTPUT),
    shapes=((3, 6),),
    folds={"layers.2": "layers.3"},
)
class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 9),
            nn.GELU(),
            nn.Linear(9, 7),
            nn.BatchNorm1d(7),
            nn.Tanh(),
            nn.Linear(7, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@truth(
    Space(6, "stiefel", "conv1", "conv2", "bn1"),
    Space(4, "linear", "conv2", "fc"),
    Space(3, "fixed", "fc", reason=OUTPUT),
    shapes=((2, 3, 12),),
    folds={"conv1": "bn1"},
)
class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 6, 3)
        self.bn1 = nn.BatchNorm1d(6)
        self.conv2 = nn.Conv1d(6, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.bn1(self.conv1(x))), 2)
        return self.fc(F.adaptive_avg_pool1d(self.conv2(x), 1).flatten(1))


@truth(
    Space(6, "stiefel", "conv1", "conv2", "bn1"),
    Space(4, "stiefel", "conv2", "fc"),
    Space(3, "fixed", "fc", reason=OUTPUT),
    shapes=((2, 3, 4, 6, 6),),
    folds={"conv1": "bn1"},
)
class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(6)
        self.conv2 = nn.Conv3d(6, 4, 3)
        self.fc = nn.Linear(4 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), (1, 2, 2))
        return self.fc(torch.flatten(F.relu(self.conv2(x)), 1))


@truth(
    Space(4, "stiefel", "conv", "fc1"),
    Space(7, "stiefel", "fc1", "fc2"),
    Space(5, "fixed", "fc2", reason=OUTPUT),
)
class FlattenIntoLinear(nn.Module):
    """Channel ``c`` stands at ``c * 16 .. c * 16 + 15`` of what ``fc1`` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.fc1 = nn.Linear(4 * 16, 7)
        self.fc2 = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


@truth(
    Space(4, "stiefel", "conv1", "conv2"),
    Space(6, "linear", "conv2", "fc"),
    Space(5, "fixed", "fc", reason=OUTPUT),
)
class ReshapesThatFollow(nn.Module):
    """Sizes are read from the tensors, so the program fits any number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 4)
        self.conv2 = conv(4, 6)
        self.fc = nn.Linear(6 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, -1).transpose(1, 2).permute(0, 2, 1)
        x = self.conv2(x.reshape(x.size(0), x.size(1), height, width))
        return self.fc(x.view(x.size(0), -1))


@truth(
    Space(4, "fixed", "conv", reason="reshaped to a fixed number of channels"),
    Space(7, "stiefel", "fc1", "fc2"),
    Space(5, "fixed", "fc2", reason=OUTPUT),
)
class ReshapeToNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.fc1 = nn.Linear(4 * 64, 7)
        self.fc2 = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).view(-1, 4 * 64)
        return self.fc2(F.relu(self.fc1(x)))


# --------------------------------------------------------------------------------------------------
# Residual networks

STREAM = "residual stream: joined, at"


class IdentityBlock(nn.Module):
    def __init__(self, channels: int, interior: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, interior, bias=False)
        self.bn1 = nn.BatchNorm2d(interior)
        self.conv2 = conv(interior, channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


@truth(
    Space(8, "fixed", "stem block.conv2", "block.conv1 fc", "block.bn2", STREAM),
    Space(6, "stiefel", "block.conv1", "block.conv2", "block.bn1"),
    Space(5, "fixed", "fc", reason=OUTPUT),
    folds={"block.conv1": "block.bn1", "block.conv2": "block.bn2"},
)
class ResidualIdentity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.block = IdentityBlock(8, 6)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


@truth(
    Space(6, "fixed", "stem", "conv1", reason="padded along the channels"),
    Space(5, "stiefel", "conv1", "conv2", "bn1"),
    Space(10, "fixed", "conv2", reason="added to a tensor whose channels are not followed"),
    Space(4, "fixed", "fc", reason=OUTPUT),
    folds={"conv1": "bn1"},
)
class ResidualOptionA(nn.Module):
    """The shortcut drops every second pixel and pads with zeros, which no rule follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.conv1 = conv(6, 5, stride=2)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = conv(5, 10)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        y = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.fc(y.mean((2, 3)))


@truth(
    Space(6, "stiefel", "stem", "conv1 shortcut.0"),
    Space(4, "stiefel", "conv1", "conv2", "bn1"),
    Space(5, "stiefel", "conv2", "conv3", "bn2"),
    Space(8, "stiefel", "conv3 shortcut.0", "fc", "bn3 shortcut.1"),
    Space(4, "fixed", "fc", reason=OUTPUT),
    folds={"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "shortcut.0": "shortcut.1"},
)
class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.conv1 = conv(6, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = conv(4, 5, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.conv3 = conv(5, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(conv(6, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return self.fc(self.relu(y).mean((2, 3)))


# --------------------------------------------------------------------------------------------------
# Concatenation and pieces


@truth(
    Space(4, "stiefel", "squeeze", "left right"),
    Space(6, "stiefel", "left", "last"),
    Space(5, "stiefel", "right", "last"),
    Space(4, "fixed", "last", reason=OUTPUT),
)
class Fire(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze = conv(3, 4, 1)
        self.left = conv(4, 6, 1)
        self.right = conv(4, 5)
        self.last = conv(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return self.last(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1))


@truth(
    Space(8, "stiefel", "stem", "reduce pooled plain"),
    Space(4, "stiefel", "reduce", "wide tall"),
    Space(5, "stiefel", "wide", "last"),
    Space(2, "stiefel", "tall", "last"),
    Space(6, "linear", "pooled", "last"),
    Space(3, "linear", "plain", "last"),
    Space(4, "fixed", "last", reason=OUTPUT),
)
class Inception(nn.Module):
    """Branches within branches; the image itself is concatenated too, and never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.plain = conv(8, 3, 1)
        self.reduce = conv(8, 4, 1)
        self.wide = nn.Conv2d(4, 5, (1, 3), padding=(0, 1))
        self.tall = nn.Conv2d(4, 2, (3, 1), padding=(1, 0))
        self.pooled = conv(8, 6, 1)
        self.last = conv(3 + 5 + 2 + 3 + 6, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        reduced = F.relu(self.reduce(x))
        pair = torch.cat((F.relu(self.wide(reduced)), F.relu(self.tall(reduced))), dim=1)
        pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1))
        return self.last(torch.cat([self.plain(x), pair, image, pooled], dim=1))


@truth(
    Space(6, "selection", "stem", "conv1 conv2 fc", "norm1 norm2 norm3", "affine of 'norm1'"),
    Space(4, "selection", "conv1", "conv2 fc", "norm2 norm3", "affine of 'norm2'"),
    Space(3, "selection", "conv2", "fc", "norm3", "affine of 'norm3'"),
    Space(5, "fixed", "fc", reason=OUTPUT),
)
class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv1 = conv(6, 4)
        self.norm2 = nn.BatchNorm2d(10)
        self.conv2 = conv(10, 3)
        self.norm3 = nn.BatchNorm2d(13)
        self.fc = nn.Linear(13, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        return self.fc(F.relu(self.norm3(x)).mean((2, 3)))


@truth(
    Space(8, "stiefel", "conv1", "left right", blocks=2),
    Space(6, "linear", "left right", "last"),
    Space(4, "fixed", "last", reason=OUTPUT),
)
class ChunkHalves(nn.Module):
    """Each half may be mixed within itself, and both must stay equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.left = conv(4, 6)
        self.right = conv(4, 6)
        self.last = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.conv1(x)).chunk(2, dim=1)
        return self.last(self.left(left) + self.right(right))


@truth(
    Space(6, "selection", "conv1", "conv2", reason="multiplied channel by channel"),
    Space(4, "fixed", "conv2", reason=OUTPUT),
)
class GatedHalves(nn.Module):
    """Six channels of 12 rows: row ``i`` and row ``6 + i`` stay together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 12)
        self.conv2 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = torch.chunk(self.conv1(x), 2, 1)
        return self.conv2(value * torch.sigmoid(gate))


@truth(
    Space(10, "stiefel", "wide narrow", "left right", blocks=2),
    Space(6, "fixed", "left right", reason=OUTPUT),
)
class ChunkOfConcatenation(nn.Module):
    """The pieces are those that were put together: two layers share one space of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = conv(3, 5)
        self.narrow = conv(3, 5, 1)
        self.left = conv(5, 6)
        self.right = conv(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.wide(x)), F.relu(self.narrow(x))], 1)
        left, right = both.chunk(2, 1)
        return self.left(left) + self.right(right)


@truth(
    Space(4, "fixed", "small", "left", reason="does not fall evenly into the pieces of 'chunk'"),
    Space(1, "fixed", "large", "left", reason="does not fall evenly into the pieces of 'chunk'"),
    Space(5, "fixed", "large", "right", reason="does not fall evenly into the pieces of 'chunk'"),
    Space(6, "fixed", "left right", reason=OUTPUT),
)
class ChunkAcrossConcatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = conv(3, 4)
        self.large = conv(3, 6)
        self.left = conv(5, 6)
        self.right = conv(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.cat([self.small(x), self.large(x)], 1).chunk(2, 1)
        return self.left(left) + self.right(right)


@truth(
    Space(6, "stiefel", "conv1", "conv2"),
    Space(4, "fixed", "conv2", reason=OUTPUT),
)
class ConcatenationWithItself(nn.Module):
    """One space stands twice on the axis that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 6)
        self.conv2 = conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return self.conv2(torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1))


# --------------------------------------------------------------------------------------------------
# Channels that are told apart


@truth(
    Space(8, "selection", "expand", "project", "bn depthwise", "depthwise convolution 'depthwise'"),
    Space(6, "linear", "project", "last"),
    Space(4, "fixed", "last", reason=OUTPUT),
    folds={"depthwise": "bn"},
)
class DepthwiseSeparable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = conv(3, 8, 1)
        self.depthwise = conv(8, 8, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.project = conv(8, 6, 1)
        self.last = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.expand(x))
        return self.last(self.project(F.relu6(self.bn(self.depthwise(x)))))


@truth(
    Space(4, "selection", "expand", "project", "depthwise", "depthwise convolution 'depthwise'"),
    Space(5, "fixed", "project", reason=OUTPUT),
)
class DepthwiseMultiplier(nn.Module):
    """Every channel has two outputs, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = conv(3, 4, 1)
        self.depthwise = conv(4, 8, groups=4)
        self.project = conv(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))


@truth(
    Space(8, "stiefel", "conv1", "grouped", blocks=4),
    Space(12, "stiefel", "grouped", "conv2", blocks=4),
    Space(5, "fixed", "conv2", reason=OUTPUT),
)
class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.grouped = conv(8, 12, groups=4)
        self.conv2 = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.grouped(F.relu(self.conv1(x)))))


@truth(
    Space(16, "stiefel", "left right", "grouped", blocks=4),
    Space(12, "stiefel", "grouped", "last", blocks=4),
    Space(5, "fixed", "last", reason=OUTPUT),
)
class GroupedAfterConcatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = conv(3, 8)
        self.right = conv(3, 8)
        self.grouped = conv(16, 12, groups=4)
        self.last = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.last(F.relu(self.grouped(x)))


@truth(
    Space(12, "stiefel", "a c", "grouped", blocks=2),
    Space(10, "stiefel", "b d", "grouped", blocks=2),
    Space(8, "stiefel", "grouped", "last", blocks=2),
    Space(4, "fixed", "last", reason=OUTPUT),
)
class GroupsOfTwoSpaces(nn.Module):
    """One group reads ``a`` and ``b``, the other ``c`` and ``d``: so ``a`` and ``c`` are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 6)
        self.b = conv(3, 5)
        self.c = conv(3, 6)
        self.d = conv(3, 5)
        self.grouped = conv(22, 8, groups=2)
        self.last = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(layer(x)) for layer in (self.a, self.b, self.c, self.d)], 1)
        return self.last(F.relu(self.grouped(x)))


@truth(
    Space(8, "stiefel", "conv1", "grouped", blocks=2),
    Space(8, "stiefel", "grouped", "conv2", blocks=2),
    Space(4, "fixed", "conv2", reason=OUTPUT),
)
class SwappedHalves(nn.Module):
    """The first group reads the second block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.grouped = conv(8, 8, groups=2)
        self.conv2 = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.conv1(x)).chunk(2, 1)
        return self.conv2(F.relu(self.grouped(torch.cat([right, left], 1))))


@truth(
    Space(4, "fixed", "conv1", "twos threes", reason="does not fall evenly into the 2 groups"),
    Space(2, "fixed", "conv1", "twos threes", reason="does not fall evenly into the 2 groups"),
    Space(2, "fixed", "conv1", "twos threes", reason="does not fall evenly into the 2 groups"),
    Space(4, "fixed", "conv1", "twos threes", reason="does not fall evenly into the 2 groups"),
    Space(6, "linear", "twos", "last", blocks=2),
    Space(6, "linear", "threes", "last", blocks=3),
    Space(5, "fixed", "last", reason=OUTPUT),
)
class GroupsThatCross(nn.Module):
    """Two groups and three groups of one tensor cut it at 6, and at 4 and 8: into 4 + 2 + 2 + 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 12)
        self.twos = conv(12, 6, groups=2)
        self.threes = conv(12, 6, groups=3)
        self.last = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return self.last(torch.cat([self.twos(x), self.threes(x)], 1))


@truth(
    Space(12, "stiefel", "conv1", "conv2", blocks=3),
    Space(5, "fixed", "conv2", reason=OUTPUT),
)
class GroupPerImageChannel(nn.Module):
    """A group for every channel of the image, which stays: the layer is not depthwise to us."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 12, groups=3)
        self.conv2 = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


@truth(
    Space(8, "selection", "conv1 excite", "squeeze conv2", reason="multiplied channel by channel"),
    Space(3, "stiefel", "squeeze", "excite"),
    Space(4, "fixed", "conv2", reason=OUTPUT),
)
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.squeeze = conv(8, 3, 1)
        self.excite = conv(3, 8, 1)
        self.conv2 = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        gate = self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.conv2(x * torch.sigmoid(gate))


@truth(
    Space(6, "selection", "conv1", "conv2", "slopes", "per-channel slope of 'slopes'"),
    Space(5, "stiefel", "conv2", "conv3"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
)
class Slopes(nn.Module):
    """A PReLU with a slope for each channel, and one with a slope for all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 6)
        self.slopes = nn.PReLU(6)
        self.conv2 = conv(6, 5)
        self.slope = nn.PReLU()
        self.conv3 = conv(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.slope(self.conv2(self.slopes(self.conv1(x)))))


@truth(
    Space(8, "selection", "conv1", "conv2", "norm", "group norm 'norm'", blocks=2),
    Space(4, "fixed", "conv2", reason=OUTPUT),
)
class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.conv2 = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm(self.conv1(x))))


@truth(
    Space(8, "selection", "embed", "mix", "norm", "norm over channels 'norm'"),
    Space(9, "stiefel", "mix", "last"),
    Space(4, "fixed", "last", reason=OUTPUT),
)
class LayerNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 9)
        self.last = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).permute(0, 2, 3, 1))
        return self.last(F.gelu(self.mix(x))).permute(0, 3, 1, 2)


@truth(
    Space(8, "selection", "conv1", "conv2", "norm1", "norm over channels 'norm1'"),
    Space(6, "selection", "conv2", "mix", "norm2", "norm over channels 'norm2'"),
    Space(5, "selection", "mix", "more", "norm3", "norm over channels 'norm3'"),
    Space(7, "fixed", "more", reason="'bare' (LayerNorm) counts its channels"),
    Space(4, "fixed", "last", reason=OUTPUT),
)
class NormsOfManyKinds(nn.Module):
    """Norms over the channels: with weights they are carried, and without they count channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(3, 8), SimpleNorm2d(8)
        self.conv2, self.norm2 = conv(8, 6), RmsNorm2d(6)
        self.mix, self.norm3 = nn.Linear(6, 5), nn.RMSNorm(5)
        self.more, self.bare = nn.Linear(5, 7), nn.LayerNorm(7, elementwise_affine=False)
        self.last = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)))).permute(0, 2, 3, 1)
        return self.last(self.bare(self.more(self.norm3(self.mix(x)))))


@truth(
    Space(8, "selection", "embed", "mix", "first", "norm over channels 'first'"),
    Space(9, "selection", "mix", "last", "second", "norm over channels 'second'"),
    Space(4, "fixed", "last", reason=OUTPUT),
)
class ResponseNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.first = GlobalResponseNorm(8, channels_last=False)
        self.mix = nn.Linear(8, 9)
        self.second = GlobalResponseNorm(9)
        self.last = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.embed(x)).permute(0, 2, 3, 1)
        return self.last(self.second(F.gelu(self.mix(x)))).permute(0, 3, 1, 2)


@truth(
    Space(6, "stiefel", "conv1", "conv2"),
    Space(5, "stiefel", "conv2", "conv3", "bn"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
    folds={"conv1": None, "conv2": "bn"},
)
class Standardised(nn.Module):
    """Weight standardisation acts on each row, so it does not tell where a row goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ScaledStdConv2d(3, 6, 3, padding=1)
        self.conv2 = StdConv2d(6, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(5)
        self.conv3 = conv(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.bn(self.conv2(F.relu(self.conv1(x))))))


class ScaledBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.conv2 = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)) * self.scale.view(-1, 1, 1))


@truth(
    Space(8, "selection", "block.conv1", "block.conv2", "block", "multiplied channel by channel"),
    Space(4, "stiefel", "block.conv2", "fc"),
    Space(5, "fixed", "fc", reason=OUTPUT),
)
class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = ScaledBlock()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.block(x)).mean((2, 3)))


@truth(
    Space(8, "selection", "conv1", "conv2", "", "multiplied channel by channel"),
    Space(4, "fixed", "conv2", reason=OUTPUT),
)
class LayerScaleOfTheRoot(ScaledBlock):
    """The scale is a parameter of the network itself."""


class Scales(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.flat = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.wide).permute(0, 2, 3, 1) * self.flat).permute(0, 3, 1, 2)


@truth(
    Space(8, "selection", "conv1", "conv2", "gate", "multiplied channel by channel"),
    Space(6, "stiefel", "conv2", "conv3"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
)
class ScaledTwice(nn.Module):
    """Both parameters of one small module carry the space, one behind a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.gate = Scales(8)
        self.conv2 = conv(8, 6)
        self.conv3 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.conv2(self.gate(F.relu(self.conv1(x))))))


# --------------------------------------------------------------------------------------------------
# Layers and parameters with several uses


@truth(
    Space(6, "stiefel", "stem shared", "shared last"),
    Space(4, "fixed", "last", reason=OUTPUT),
)
class SharedLayer(nn.Module):
    """One layer, called twice, reads what it has written: both its axes are one space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.shared = conv(6, 6)
        self.last = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.shared(x))
        return self.last(F.relu(self.shared(x)))


@truth(
    Space(6, "selection", "left right", "shared", "norm", "per-channel affine of 'norm'"),
    Space(7, "stiefel", "shared", "last"),
    Space(4, "fixed", "last", reason=OUTPUT),
)
class SharedTower(nn.Module):
    """Two branches through one norm and one layer: the norm cannot fold into two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv(3, 6)
        self.right = conv(3, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.shared = conv(6, 7)
        self.last = conv(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.shared(self.norm(self.left(x))))
        right = F.relu(self.shared(self.norm(self.right(x))))
        return self.last(torch.cat([left, right], 1))


@truth(
    Space(3, "fixed", "stem", "shared", reason="reads a tensor whose channels are not followed"),
    Space(6, "stiefel", "shared", "last"),
    Space(4, "fixed", "last", reason=OUTPUT),
)
class SharedWithTheImage(nn.Module):
    """One use reads the image, which stays; so the other use reads what stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 3)
        self.shared = conv(3, 6)
        self.last = conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = [self.shared(F.relu(self.stem(x))), self.shared(x)]
        return self.last(F.relu(torch.cat(both, 1)))


@truth(
    Space(1, "fixed", "three four", "shared", reason="every block holds one channel"),
    Space(5, "fixed", "shared", reason=OUTPUT),
)
class SharedInConflict(nn.Module):
    """Three channels at four positions, four at three: together no channel can go by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.three = conv(3, 3)
        self.four = conv(3, 4)
        self.shared = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        three = F.adaptive_avg_pool2d(F.relu(self.three(x)), 2).flatten(1)
        four = F.adaptive_avg_pool2d(F.relu(self.four(x)), (1, 3)).flatten(1)
        return self.shared(three) * self.shared(four)


@truth(
    Space(8, "fixed", "conv1", "conv2", "bn", "conv1.weight is read outside of its layer"),
    Space(6, "stiefel", "conv2", "conv3"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
)
class WeightReadOutside(nn.Module):
    """Folding the norm would change what else is computed from the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = conv(8, 6)
        self.conv3 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))))
        return self.conv3(x) * self.conv1.weight.abs().mean()


@truth(
    Space(8, "fixed", "conv1", "conv2", "bn", "reduced over all dimensions"),
    Space(6, "stiefel", "conv2", "conv3"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
)
class NormReadOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = conv(8, 6)
        self.conv3 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))))
        return self.conv3(x) * self.bn.weight.abs().mean()


@truth(
    Space(8, "fixed", "stem", "first", reason="first.weight is shared with another layer"),
    Space(8, "fixed", "first", "second", reason="weight is shared with another layer"),
    Space(8, "fixed", "second", "conv1", reason="second.weight is shared with another layer"),
    Space(6, "stiefel", "conv1", "conv2"),
    Space(4, "fixed", "conv2", reason=OUTPUT),
)
class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.first = conv(8, 8)
        self.second = conv(8, 8)
        self.second.weight = self.first.weight
        self.conv1 = conv(8, 6)
        self.conv2 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.first, self.second, self.conv1):
            x = F.relu(layer(x))
        return self.conv2(x)


@truth(
    Space(8, "fixed", "stem", "first", reason="first.weight is shared with another layer"),
    Space(8, "fixed", "first", "second", "bn1", "weight is shared with another layer"),
    Space(8, "fixed", "second", "conv1", "bn2", "second.weight is shared with another layer"),
    Space(6, "stiefel", "conv1", "conv2"),
    Space(4, "fixed", "conv2", reason=OUTPUT),
)
class TiedWeightsWithNorms(nn.Module):
    """One weight under two norms: folding either would part them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.first = conv(8, 8)
        self.bn1 = nn.BatchNorm2d(8)
        self.second = conv(8, 8)
        self.bn2 = nn.BatchNorm2d(8)
        self.second.weight = self.first.weight
        self.conv1 = conv(8, 6)
        self.conv2 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.first(F.relu(self.stem(x)))))
        x = F.relu(self.bn2(self.second(x)))
        return self.conv2(F.relu(self.conv1(x)))


@truth(
    Space(8, "stiefel", "conv1", "conv2", "bn"),
    Space(6, "stiefel", "conv2", "conv3"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
    folds={"conv1": "bn"},
)
class TwoNames(nn.Module):
    """The norm is called by its second name, while reading finds it under the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.bn = nn.BatchNorm2d(8)
        self.layers = nn.ModuleList([self.bn])
        self.conv2 = conv(8, 6)
        self.conv3 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](self.conv1(x)))
        return self.conv3(F.relu(self.conv2(x)))


@truth(
    Space(8, "fixed", "conv1", reason="already parametrized"),
    Space(6, "stiefel", "conv2", "conv3"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
)
class Parametrized(nn.Module):
    """A layer with a parametrization of its own is an operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.utils.parametrizations.weight_norm(conv(3, 8))
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = conv(8, 6)
        self.conv3 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))))
        return self.conv3(x)


# --------------------------------------------------------------------------------------------------
# Operators without a rule


@truth(
    Space(8, "fixed", "conv1", reason="no rule for 'cumsum'"),
    Space(6, "stiefel", "conv2", "conv3"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
    notes=("no rule for 'cumsum' (1 use)",),
)
class CumulativeSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(8, 6)
        self.conv3 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumsum(self.conv1(x), dim=1)
        return self.conv3(F.relu(self.conv2(x)))


@truth(
    Space(8, "fixed", "conv1", reason="'softmax' acts along the channels"),
    Space(6, "fixed", "conv2", reason="no rule for 'norm' (LocalResponseNorm)"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
    notes=("no rule for 'norm' (LocalResponseNorm) (1 use)",),
)
class SoftmaxOverChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(8, 6)
        self.norm = nn.LocalResponseNorm(3)
        self.conv3 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softmax(self.conv1(x), dim=1)
        return self.conv3(self.norm(self.conv2(x)))


@truth(
    Space(8, "fixed", "conv1", reason="in another order", blocks=2),
    Space(6, "stiefel", "conv2", "conv3"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
    notes=(),
)
class ChannelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(8, 6)
        self.conv3 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        x = x.reshape(batch, -1, height, width)
        return self.conv3(F.relu(self.conv2(x)))


@truth(
    Space(8, "fixed", "conv1", reason="reshaped to a fixed number of channels"),
    Space(6, "fixed", "conv2", reason="indexed along the channels"),
    Space(4, "fixed", "conv3", reason=OUTPUT),
)
class ShuffleByNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(8, 6)
        self.conv3 = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x)).view(2, 2, 4, 8, 8).transpose(1, 2).reshape(2, 8, 8, 8)
        return self.conv3(F.relu(self.conv2(x))[:, ::2])


# --------------------------------------------------------------------------------------------------
# Inputs, outputs and modes


@truth(
    Space(8, "fixed", "conv1", "conv2", reason=OUTPUT),
    Space(6, "stiefel", "conv2", "mask"),
    Space(1, "fixed", "mask", reason=OUTPUT),
)
class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(8, 6)
        self.mask = conv(6, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = F.relu(self.conv1(x))
        mask = self.mask(F.relu(self.conv2(features)))
        return {"mask": torch.sigmoid(mask), "features": [features]}


@truth(
    Space(6, "stiefel", "conv", "last"),
    Space(5, "stiefel", "embed", "last"),
    Space(4, "fixed", "last", reason=OUTPUT),
    shapes=(IMAGE, (2, 7)),
)
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 6)
        self.embed = nn.Linear(7, 5)
        self.last = nn.Linear(11, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        seen = F.relu(self.conv(image)).mean((2, 3))
        return self.last(torch.cat([seen, F.relu(self.embed(vector))], 1))


@truth(
    Space(8, "stiefel", "conv1", "conv2 aux.0", "bn1"),
    Space(6, "stiefel", "conv2", "fc"),
    Space(5, "fixed", "fc", reason=OUTPUT),
    Space(7, "fixed", "aux.0", "aux.2", reason="'aux.0' runs in training mode only"),
    Space(5, "fixed", "aux.2", reason=OUTPUT),
    folds={"conv1": "bn1"},
)
class AuxiliaryHead(nn.Module):
    """What the head reads must be cut for it too, though evaluation never runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.bn1 = nn.BatchNorm2d(8)
        self.aux = nn.Sequential(conv(8, 7), nn.ReLU(), conv(7, 5))
        self.conv2 = conv(8, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn1(self.conv1(x)))
        out = self.fc(F.relu(self.conv2(x)).mean((2, 3)))
        if self.training:
            return out, self.aux(x)
        return out


@truth(
    Space(6, "stiefel", "down", "deep skip"),
    Space(5, "stiefel", "deep", "last"),
    Space(4, "linear", "skip", "last"),
    Space(3, "fixed", "last", reason=OUTPUT),
)
class Decoder(nn.Module):
    """Padding of the image, and resizing to the size of another feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3)
        self.deep = conv(6, 5, stride=2)
        self.skip = conv(6, 4, 1)
        self.last = conv(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(F.pad(x, (1, 1, 1, 1))))
        x = F.pad(x, (0, 0, 1, 1))
        deep = F.relu(self.deep(x))
        deep = F.interpolate(deep, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.last(torch.cat([deep, self.skip(x)], 1))


@truth(
    Space(4, "stiefel", "left", "last"),
    Space(4, "stiefel", "right", "last"),
    Space(3, "fixed", "last", reason=OUTPUT),
)
class ConcatenationByAxis(nn.Module):
    """``axis=`` is another name for ``dim=``, and both halves are equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv(3, 4)
        self.right = conv(3, 4)
        self.last = conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], axis=1))


@truth(
    Space(8, "stiefel", "conv1", "left right", blocks=2),
    Space(3, "fixed", "left right", reason=OUTPUT),
)
class ChunkByAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.left = conv(4, 3)
        self.right = conv(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.chunk(F.relu(self.conv1(x)), 2, axis=1)
        return self.left(left) + self.right(right)


# --------------------------------------------------------------------------------------------------
# The networks of CIFAR


class CifarBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.added = outputs - inputs
        self.conv1 = conv(inputs, outputs, stride=self.stride, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            half = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-``6 n + 2`` of He et al. (2016), sec. 4.2, with shortcuts of option A."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = conv(3, 16, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(*(CifarBlock(a, b) for a, b in itertools.pairwise(widths)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))
