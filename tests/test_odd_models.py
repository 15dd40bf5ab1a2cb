"""Models that are built in unusual ways: proven right, or left alone with the reason.

What the tiny networks of ``nets.py`` show already is not repeated here.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import einops
import pytest
import torch
import torch.nn.functional as F
from nets import conv
from proofs import (
    RandomReflection,
    identity_error,
    materialize_error,
    permutation_error,
    permute_space_,
    random_plan,
    random_student,
    randomize_,
    relative_difference,
    selection_error,
)
from small_nets import images
from torch import Tensor, nn
from torch.nn.utils import prune

from torchcap import (
    LargestNorm,
    ModelError,
    NothingToCompressError,
    Plan,
    Recipe,
    analyze,
    compress,
    materialize,
    prepare,
)

IMAGE = (2, 3, 8, 8)
TOKENS = (2, 5, 6)


@dataclass(frozen=True)
class Odd:
    """A model, and what is expected of it.

    Attributes:
        build: makes it.
        free: spaces that have to be free, separated by blanks.
        held: space -> a pattern of the reason why it is not; a rule may come that frees it.
        shape: of its input.
    """

    build: Callable[[], nn.Module]
    free: str = ""
    held: Mapping[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = IMAGE

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().double().eval()
        randomize_(model, torch.Generator().manual_seed(1))
        return model

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(2)
        return (torch.randn(self.shape, generator=generator, dtype=torch.float64),)


ODD: dict[str, Odd] = {}


def odd(
    name: str, free: str = "", shape: tuple[int, ...] = IMAGE, **held: str
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Add the model below. In the names of spaces that are held, ``_`` stands for a dot."""

    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        reasons = {space.replace("_", "."): reason for space, reason in held.items()}
        ODD[name] = Odd(build, free, reasons, shape)
        return build

    return add


class Around(nn.Module):
    """Two layers with something between them, and two more behind, whose space is free."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.last = conv(3, 8), conv(width, 6), conv(6, 2)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(self.between(self.first(x)))))


class Function(Around):
    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__(width)
        self.function = function

    def between(self, x: Tensor) -> Tensor:
        return self.function(x)


# --------------------------------------------------------------------------------------------------
# One and three dimensions


@odd("signal with norms of groups", "a b fc1", (2, 3, 20))
class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.depthwise, self.b = nn.Conv1d(8, 8, 5, padding=2, groups=8), nn.Conv1d(8, 6, 1)
        self.fc1, self.fc2 = nn.Linear(6 * 12, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(F.pad(self.a(x), (1, 1))))
        x = F.max_pool1d(F.relu(self.depthwise(x)), 2)
        x = F.interpolate(F.relu(self.b(x)), size=12, mode="linear")
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@odd("causal signal of gated blocks", "inner", (2, 3, 16), stem="residual stream")
class Causal(nn.Module):
    """WaveNet's block: half of the channels gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 12, 2, dilation=2)
        self.outer, self.head = nn.Conv1d(6, 8, 1), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        value, gate = self.inner(F.pad(x, (2, 0))).chunk(2, dim=1)
        return self.head(x + self.outer(torch.tanh(value) * torch.sigmoid(gate)))


@odd("volume with grouped convolutions", "a time b", (2, 3, 4, 6, 6))
class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.time = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), groups=2)
        self.b, self.up = nn.Conv3d(8, 6, 1), nn.Upsample(scale_factor=2, mode="trilinear")
        self.c = nn.Conv3d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool3d(F.relu(self.norm(self.a(x))), 2)
        return self.c(F.relu(self.up(F.relu(self.b(F.relu(self.time(x)))))))


@odd("frames moved into the batch", "image clip", (2, 3, 4, 6, 6))
class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.clip, self.image, self.last = nn.Conv3d(3, 8, 3, padding=1), conv(8, 6), conv(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.clip(x))
        batch, channels, frames, height, width = x.shape
        x = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        return self.last(F.relu(self.image(x)))


# --------------------------------------------------------------------------------------------------
# Transposed convolutions


@odd("transposed convolution with a norm", "a up c")
class Transposed(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.a, self.c, self.d = conv(3, 6), conv(4, 5), conv(5, 2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=groups)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(F.relu(self.norm(self.up(F.relu(self.a(x))))))))


odd("grouped transposed convolution", "c", a="'up'.*transposed.*groups")(
    lambda: Transposed(groups=2)
)
odd("transposed convolution of a signal", "0 1 3", (2, 3, 10))(
    lambda: nn.Sequential(
        nn.Conv1d(3, 8, 3),
        nn.ConvTranspose1d(8, 6, 2),
        nn.ReLU(),
        nn.Conv1d(6, 5, 1),
        nn.ReLU(),
        nn.Conv1d(5, 2, 1),
    )
)


@odd("transposed convolution as a function", "c", a="conv_transpose2d")
class TransposedFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.d = conv(3, 8), conv(6, 5), conv(5, 2)
        self.kernel = nn.Parameter(torch.randn(8, 6, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv_transpose2d(F.relu(self.a(x)), self.kernel, stride=2)
        return self.d(F.relu(self.c(x)))


# --------------------------------------------------------------------------------------------------
# Attention, recurrence, positions


@odd("transformer of torch", "t.encoder.layers.0.linear1 t.decoder.layers.0.linear1", TOKENS)
class Transforming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Transformer(6, 2, 1, 1, dim_feedforward=8, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.t(x, x[:, :3]))


@odd("transformer of torch, with padding", "t.layers.0.linear1 t.layers.1.linear1", TOKENS)
class Padded(nn.Module):
    def __init__(self, *, nested: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.t = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = x[..., 0] > 1
        return self.last(self.t(x, src_key_padding_mask=padding).sum(1))


@odd("attention of torch", "fc1", TOKENS, embed=r"'attend' \(MultiheadAttention\)")
class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        return self.head(x + self.fc2(F.gelu(self.fc1(x))))


odd("transformer layer of torch", "1.linear1 2", TOKENS, **{"0": "MultiheadAttention"})(
    lambda: nn.Sequential(
        nn.Linear(6, 8),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.Linear(8, 7),
        nn.ReLU(),
        nn.Linear(7, 2),
    )
)


@odd("recurrent layer", "b", TOKENS, a=r"no rule for 'remember' \(GRU\)")
class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(5, 7), nn.Linear(7, 2)
        self.remember = nn.GRU(8, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.remember(self.a(x))[0])))


class Positions(nn.Module):
    """A parameter is added to the image, or to its tokens."""

    def __init__(self, *shape: int, tokens: bool = False) -> None:
        super().__init__()
        self.embed, self.places = conv(3, 8), nn.Parameter(torch.randn(shape))
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 5)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x if self.tokens else x + self.places
        x = x.flatten(2).transpose(1, 2)
        x = x + self.places if self.tokens else x
        return self.fc2(F.relu(self.fc1(self.norm(x)))).mean(1)


NOT_FOLLOWED = "added to a tensor whose channels are not followed"
odd("positions of every channel", "fc1 embed")(lambda: Positions(1, 8, 8, 8))
odd("positions alike for all channels", "embed fc1")(lambda: Positions(1, 1, 8, 8))
odd("positions of tokens", "fc1 embed")(lambda: Positions(1, 64, 8, tokens=True))
odd("a number for each token", "fc1", embed="added to a tensor")(
    lambda: Positions(64, 1, tokens=True)
)
odd("a term for each channel", "fc1 embed")(lambda: Positions(8, 1, 1))
odd("a term for each column", "fc1", embed="added to a tensor of other channels")(
    lambda: Positions(8)
)
odd("a term for each image", "fc1", embed="added to a tensor of other channels")(
    lambda: Positions(2, 1, 1, 1)
)


# --------------------------------------------------------------------------------------------------
# Weights and modules with several uses


@odd("embedding tied to the classifier", "a", (2, 3), b="head.weight is shared with another layer")
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 8)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        words = (x.abs() * 4).long() % 11
        return self.head(self.b(F.relu(self.a(self.embed(words)))))


@odd("weight used once more, transposed", "inner", TOKENS, a="linear|read outside")
class TiedTransposed(nn.Module):
    """The decoder of an autoencoder reads the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(F.relu(self.a(x)), self.a.weight.t())
        return self.b(F.relu(self.inner(x)))


@odd("one convolution with two norms", "a")
class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.head = conv(3, 8), conv(8, 8), conv(8, 2)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.shared(self.a(x))))
        return self.head(F.relu(self.norm2(self.shared(x))))


@odd("two convolutions with one norm", "a")
class OneNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), conv(8, 2)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        return self.head(F.relu(self.norm(self.b(x))))


@odd("block called in a loop", "block.0", a="residual stream")
class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 8), conv(8, 2)
        self.block = nn.Sequential(conv(8, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


@odd("one scale for two spaces", "a")
class ScaleTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), conv(8, 2)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x) * self.scale)
        return self.head(self.b(x) * self.scale)


# --------------------------------------------------------------------------------------------------
# Containers


@odd("layers in a dictionary and a list", "named.a named.b listed.0 listed.1")
class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.named = nn.ModuleDict({"a": conv(3, 8), "b": conv(8, 6)})
        self.listed = nn.ModuleList([conv(6, 5), conv(5, 5)])
        self.head = conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.named.values():
            x = F.relu(layer(x))
        for layer in self.listed:
            x = F.silu(layer(x))
        return self.head(x)


class Activated(nn.Sequential):
    """A sequence with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self[:-1]:
            x = F.relu(layer(x))
        return self[-1](x)


class Skipped(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


odd("sequence with its own forward", "0 1")(
    lambda: Activated(conv(3, 8), conv(8, 6), conv(6, 2)),
)
odd("sequence with a skip around it", "1.0", **{"0": "residual stream"})(
    lambda: nn.Sequential(conv(3, 8), Skipped(conv(8, 6), nn.ReLU(), conv(6, 8)), conv(8, 2))
)


@odd("layers called by keyword", "a b")
class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = conv(3, 8), nn.BatchNorm2d(8), conv(8, 6), conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(input=self.norm(input=self.a(input=x)))
        return self.c(input=F.relu(input=self.b(input=x)))


@odd("ensemble", "nets.0.0 nets.1.0 nets.2.0")
class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            [nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)) for _ in range(3)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).mean(0)


# --------------------------------------------------------------------------------------------------
# Functional layers, and tensors that no layer owns


@odd("functional convolution and linear layer", "c", d="no rule for 'linear'|read outside")
class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
        self.c, self.d = conv(8, 6), conv(6, 4)
        self.readout = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.weight, self.bias, padding=1))
        return F.linear(self.d(F.relu(self.c(x))).mean((2, 3)), self.readout)


@odd("functional norms", "e", c="'batch_norm'", d="'prelu'")
class FunctionalNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d, self.e, self.f = conv(3, 8), conv(8, 6), conv(6, 5), conv(5, 2)
        self.gain, self.shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(8))
        self.slopes = nn.Parameter(torch.rand(6))
        self.register_buffer("mean", torch.rand(8))
        self.register_buffer("variance", torch.rand(8) + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.c(x), self.mean, self.variance, self.gain, self.shift)
        return self.f(F.relu(self.e(F.prelu(self.d(x), self.slopes))))


@odd("matrix product with a parameter", "b", TOKENS, a="multiplied along the channels, at")
class MatrixProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(7, 5), nn.Linear(5, 2)
        self.weight = nn.Parameter(torch.randn(8, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.a(x) @ self.weight)))


@odd("affine map by indexing", "first second")
class Affine(Around):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))

    def between(self, x: Tensor) -> Tensor:
        return x * self.gain[None, :, None, None] + self.shift[None, :, None, None]


@odd("buffers that gate", "first second")
class Buffers(Around):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(8.0).view(1, 8, 1, 1))
        self.register_buffer("lost", torch.arange(8.0).view(8, 1, 1), persistent=False)

    def between(self, x: Tensor) -> Tensor:
        return x * self.kept * self.lost


@odd("tensor that is no buffer", "second", first="multiplied with a tensor whose channels are not")
class PlainTensor(Around):
    def __init__(self) -> None:
        super().__init__()
        self.constant = torch.arange(8.0, dtype=torch.float64).view(8, 1, 1)

    def between(self, x: Tensor) -> Tensor:
        return x * self.constant


@odd("scaled in place", "first second")
class InPlace(Around):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def between(self, x: Tensor) -> Tensor:
        return x.mul_(self.scale)


@odd("scaled in place, by another name", "first second")
class Renamed(InPlace):
    def between(self, x: Tensor) -> Tensor:
        view = x
        view.mul_(self.scale).relu_()
        x += 1
        return x


# --------------------------------------------------------------------------------------------------
# Some channels only

HALF = "indexed along the channels"
CUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "every second channel": (lambda x: x[:, ::2], HALF),
    "the first half": (lambda x: x[:, :4], HALF),
    "the last half": (lambda x: x[:, -4:], HALF),
    "half, by the shape": (lambda x: x[:, : x.shape[1] // 2], ""),
    "half, by narrow": (lambda x: x.narrow(1, 0, 4), "narrow"),
    "half, by split": (lambda x: x.split(4, 1)[1], "split into fixed numbers"),
    "half, by split into unequal parts": (lambda x: x.split([1, 4, 3], 1)[1], "split into fixed"),
    "half, by a list": (lambda x: x[:, [0, 2, 4, 6]], HALF),
    "half, by index_select": (lambda x: x.index_select(1, torch.arange(0, 8, 2)), "index_select"),
    "halves joined again": (lambda x: x[:, :4] - x[:, 4:], HALF),
    "half, by chunks of unequal use": (lambda x: x.chunk(2, 1)[0], ""),
}
for cut, (function, why) in CUTS.items():
    free, held = ("second", {"first": why}) if why else ("first second", {})
    odd(cut, free, **held)(lambda function=function: Function(function, width=4))
odd("all, by a slice", "second", first=HALF)(lambda: Function(lambda x: x[:, 0:8]))
odd("half set to zero in a view", "second", first=HALF)(lambda: Function(_blank))
odd("pixels by slices", "first second")(lambda: Function(lambda x: x[..., 1:][:, :, ::2]))


def _blank(x: Tensor) -> Tensor:
    x[:, :4].zero_()
    return x


# --------------------------------------------------------------------------------------------------
# Already changed by other tools


REWRITERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrized by weight norm": nn.utils.parametrizations.weight_norm,
    "parametrized by spectral norm": nn.utils.parametrizations.spectral_norm,
    "parametrized to be orthogonal": nn.utils.parametrizations.orthogonal,
}


class Rewritten(nn.Module):
    """Its first convolution has been changed by another tool; a norm follows."""

    def __init__(self, rewrite: Callable[[nn.Module], nn.Module], *, norm: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = rewrite(conv(3, 8)), conv(8, 6), conv(6, 2)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.norm(self.a(x))))))


class RewrittenReader(nn.Module):
    """The second convolution has been changed: what it reads has to stay."""

    def __init__(self, rewrite: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), rewrite(conv(8, 6)), conv(6, 5), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


for tool, rewrite in REWRITERS.items():
    odd(f"layer {tool}", "b")(lambda rewrite=rewrite: Rewritten(rewrite))
    odd(f"reader {tool}", "c", a="no rule|parametrized")(
        lambda rewrite=rewrite: RewrittenReader(rewrite)
    )

# --------------------------------------------------------------------------------------------------
# Forwards that keep state, differ between modes, or put out several things


@odd("forward that keeps a tensor", "c", a="kept after the forward, as kept")
class Keeping(nn.Module):
    """What it keeps is there for whoever looks at it, so it stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = conv(3, 8), conv(8, 6), conv(6, 4)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = F.relu(self.a(x))
        return self.b(F.relu(self.c(self.kept)))


class Modes(nn.Module):
    """Training and evaluation run different programs; one of them flips the channels."""

    def __init__(self, *, flips_in_training: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 2)
        self.flips_in_training = flips_in_training

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training == self.flips_in_training:
            x = x.flip(1)
        return self.c(F.relu(self.b(x)))


odd("channels flipped in training", "b", a="'flip'")(lambda: Modes(flips_in_training=True))
odd("channels flipped in evaluation", "b", a="'flip'")(lambda: Modes(flips_in_training=False))


class AsksForClasses(nn.Module):
    """The forward does something else for layers of some class."""

    def __init__(self, asks: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.a, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.b, self.c = conv(8, 6), conv(6, 2)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        if self.asks(self):
            x = 2 * x
        return self.c(F.relu(self.b(x)))


odd("the kind of a norm is asked for", "a b")(
    lambda: AsksForClasses(lambda model: isinstance(model.norm, nn.BatchNorm2d))
)
odd("the class of a norm is asked for", "b", a="asks what 'norm' is")(
    lambda: AsksForClasses(lambda model: type(model.norm) is nn.BatchNorm2d)
)
odd("the class of a layer is asked for", "b", a="asks what 'a' is")(
    lambda: AsksForClasses(lambda model: type(model.a) is nn.Conv2d)
)
odd("the name of a class is asked for", "a", b="asks what 'c' is")(
    lambda: AsksForClasses(lambda model: type(model.c).__name__ == "Conv2d")
)


@odd("sizes told apart in both ways", "last", first_a="'flip'", second_a="'flip'")
class BothWays(nn.Module):
    """One block turns its channels, since its image is large; the other would for a larger one."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = einops.rearrange(F.relu(self.a(x)), "b c h w -> b c (h w)")
            y = y.flip(1) if y.shape[-1] > 30 else y
            return self.b(y.unflatten(2, x.shape[2:]))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BothWays.Block(), BothWays.Block()
        self.last, self.head = conv(3, 8), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.avg_pool2d(self.first(x), 2))
        return self.head(F.relu(self.last(x)))


class Standardised(nn.Conv2d):
    """A convolution that normalises its weight with a function that is for features."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


odd("weights standardised by hand", "2", **{"0": "its weight is computed with, at .*reshape"})(
    lambda: nn.Sequential(Standardised(3, 8, 3, bias=False), nn.ReLU(), conv(8, 6), conv(6, 2))
)


class Pair(NamedTuple):
    features: Tensor
    logits: Tensor


@odd("named tuple as output", "a", b="output of the model")
class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 2)

    def forward(self, x: Tensor) -> Pair:
        features = self.b(F.relu(self.a(x)))
        return Pair(features, self.c(features))


@odd("nested mappings as output", "a b", d="output of the model")
class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), conv(8, 6), conv(6, 2), conv(6, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = F.relu(self.b(F.relu(self.a(x))))
        return {"out": (self.c(x), {"scaled": [self.d(x) * 2, None]}), "size": x.shape[2]}


# --------------------------------------------------------------------------------------------------
# What is true of all of them

EVERY = pytest.mark.parametrize("name", ODD)


@EVERY
def test_free_spaces_are_found_and_the_others_say_why(name: str) -> None:
    graph = analyze(ODD[name].model(), ODD[name].inputs())
    assert set(ODD[name].free.split()) <= {space.name for space in graph.free}
    for space, reason in ODD[name].held.items():
        assert not graph[space].free
        assert re.search(reason, graph[space].reason)
    assert all(space.reason for space in graph.spaces if not space.free)


@EVERY
def test_permuting_every_free_space_leaves_the_output_unchanged(name: str) -> None:
    model, inputs = ODD[name].model(), ODD[name].inputs()
    assert permutation_error(model, analyze(model, inputs).free, inputs) <= 1e-10


@EVERY
def test_full_width_from_the_identity_is_the_original(name: str) -> None:
    assert identity_error(ODD[name].model(), ODD[name].inputs()) <= 1e-12


@EVERY
def test_materialized_model_equals_prepared_model(name: str) -> None:
    model, inputs = ODD[name].model(), ODD[name].inputs()
    graph = analyze(model, inputs)
    least = Plan.of(graph, {space.name: space.blocks for space in graph.free})
    for plan in (random_plan(graph, 0), least):
        assert materialize_error(random_student(model, plan, inputs), inputs) <= 1e-12


@EVERY
def test_small_model_has_fewer_weights_and_the_same_outputs_in_shape(name: str) -> None:
    model, inputs = ODD[name].model(), ODD[name].inputs()
    small = compress(model, example_inputs=inputs)
    count = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert count[0] < count[1]
    shapes = [torch.utils._pytree.tree_map(_shape, m(*inputs)) for m in (small, model)]
    assert shapes[0] == shapes[1]


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


# --------------------------------------------------------------------------------------------------
# Arguments by name


class ByName(nn.Module):
    """Takes keyword arguments alone, one of them optional, and gives a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), conv(8, 6), conv(6, 5), conv(5, 2)
        self.gate = nn.Linear(7, 6)

    def forward(
        self, *, image: Tensor, vector: Tensor | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        x = F.relu(self.b(F.relu(self.a(image))))
        if vector is not None:
            x = x * torch.sigmoid(self.gate(vector))[:, :, None, None]
        x = F.relu(self.c(x))
        return {"out": self.d(x) * scale, "mean": x.mean(1)}


def by_name(*names: str) -> tuple[nn.Module, dict[str, Any]]:
    model = Odd(ByName).model()
    vector = torch.randn(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given = {"image": Odd(ByName).inputs()[0], "vector": vector, "scale": 2.0}
    return model, {name: given[name] for name in names}


GIVEN = pytest.mark.parametrize(
    "names", [("image",), ("vector", "image"), ("scale", "vector", "image")], ids="-".join
)


@GIVEN
def test_model_of_keyword_arguments_is_read_right(names: tuple[str, ...]) -> None:
    model, inputs = by_name(*names)
    graph = analyze(model, inputs)
    expected = "selection" if "vector" in names else "stiefel"
    assert {s.name: s.freedom for s in graph.free} == {"a": "stiefel", "b": expected}
    changed = copy.deepcopy(model)
    for space in graph.free:
        permute_space_(changed, space, torch.Generator().manual_seed(0))
    assert relative_difference(changed(**inputs), model(**inputs)) <= 1e-12


@GIVEN
def test_small_model_of_keyword_arguments_equals_the_prepared_one(names: tuple[str, ...]) -> None:
    model, inputs = by_name(*names)
    student = prepare(model, example_inputs=inputs, init=RandomReflection(0))
    small = materialize(student)
    assert small.a.out_channels == 4
    assert relative_difference(small(**inputs), student(**inputs)) <= 1e-12


@GIVEN
def test_batches_by_name_compress_a_model_of_keyword_arguments(names: tuple[str, ...]) -> None:
    model, inputs = by_name(*names)
    small = compress(model, [inputs], recipe=Recipe.seconds())
    assert [small.a.out_channels, small.b.out_channels] == [4, 3]
    assert small(**inputs)["out"].shape == (2, 2, 8, 8)


# --------------------------------------------------------------------------------------------------
# Precisions and devices


class Precise(nn.Module):
    """Layers of all kinds: a norm that folds, depthwise, grouped, squeeze-excite, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = conv(3, 16), nn.BatchNorm2d(16)
        self.depthwise, self.grouped = conv(16, 16, groups=16), conv(16, 12, groups=2)
        self.b, self.alone = conv(12, 8), nn.GroupNorm(2, 8)
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.norm(self.a(x)))))
        x = F.relu(self.alone(self.b(F.relu(self.grouped(x)))))
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def precise(dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    case = Odd(Precise)
    return case.model().to(dtype), tuple(x.to(dtype) for x in case.inputs())


@HALVES
def test_half_precision_materialized_equals_prepared(dtype: torch.dtype) -> None:
    model, inputs = precise(dtype)
    student = random_student(model, random_plan(analyze(model, inputs), 0), inputs)
    small = materialize(student)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(*inputs).dtype == dtype
    assert relative_difference(small(*inputs), student(*inputs)) <= 4 * torch.finfo(dtype).eps


@HALVES
def test_half_precision_at_full_width_is_the_original(dtype: torch.dtype) -> None:
    model, inputs = precise(dtype)
    # Folding rounds every kernel once more, and errors add up over six layers.
    assert identity_error(model, inputs) <= 8 * torch.finfo(dtype).eps


@HALVES
def test_half_precision_small_model_is_the_rounded_one_of_double(dtype: torch.dtype) -> None:
    model, inputs = precise(dtype)
    small = compress(model, example_inputs=inputs)
    exact = compress(model.double(), example_inputs=tuple(x.double() for x in inputs))
    widths = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in (small, exact)]
    assert widths[0] == widths[1]
    assert {p.dtype for p in small.parameters()} == {dtype}
    error = relative_difference(small(*inputs), exact(*(x.double() for x in inputs)))
    assert error <= 16 * torch.finfo(dtype).eps


def test_layers_of_several_precisions_keep_them() -> None:
    class Mixed(Around):
        def __init__(self) -> None:
            super().__init__()
            self.second.to(torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(F.relu(self.first(x)).to(torch.bfloat16))
            return self.last(F.relu(x).float())

    model, inputs = Mixed().eval(), (torch.zeros(IMAGE),)
    small = materialize(random_student(model, random_plan(analyze(model, inputs), 0), inputs))
    layers = (small.first, small.second, small.last)
    assert [p.weight.dtype for p in layers] == [torch.float32, torch.bfloat16, torch.float32]
    assert small(*inputs).dtype == torch.float32


# Moving a model to the meta device unties its weights, and indices that stay behind don't fit. What
# asks for classes is found by running it.
NOT_ON_META = {
    "embedding tied to the classifier",
    "half, by index_select",
    *(name for name in ODD if name.endswith("is asked for")),
}


@pytest.mark.parametrize("name", [name for name in ODD if name not in NOT_ON_META])
def test_reading_on_the_meta_device_finds_the_same(name: str) -> None:
    model = ODD[name].model().to("meta")
    for module in model.modules():  # what ``to`` does not find
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, key, value.to("meta"))
    expected = analyze(ODD[name].model(), ODD[name].inputs())
    assert analyze(model, tuple(x.to("meta") for x in ODD[name].inputs())).spaces == expected.spaces


@pytest.mark.parametrize("call", [prepare, compress])
def test_model_on_the_meta_device_is_not_compressed(call: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        model = Precise()
        inputs = torch.zeros(IMAGE)
    with pytest.raises(ModelError, match=r"'a\.weight' is on the meta device"):
        call(model, example_inputs=inputs)


# --------------------------------------------------------------------------------------------------
# Quantized modules

QUANTIZING = pytest.mark.filterwarnings(
    "ignore:.*quantiz:DeprecationWarning", "ignore:.*quant:UserWarning"
)


def perceptron() -> nn.Sequential:
    layers = [nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3), nn.Linear(3, 5)]
    parts = [part for layer in layers for part in (layer, nn.ReLU())]
    return nn.Sequential(*parts[:-1])


@QUANTIZING
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_quantized_layer_is_a_boundary(dtype: torch.dtype) -> None:
    inputs = (torch.randn(2, 6, generator=torch.Generator().manual_seed(0)),)
    model = torch.ao.quantization.quantize_dynamic(perceptron(), {"2"}, dtype=dtype).eval()
    graph = analyze(model, inputs)
    assert [space.name for space in graph.free] == ["4"]
    assert re.search(r"'2' \(\w*Linear\)", graph["0"].reason)
    assert permutation_error(model, graph.free, inputs) <= 1e-5
    student = random_student(model, random_plan(graph, 0), inputs)
    assert materialize_error(student, inputs) <= 1e-5


@QUANTIZING
@pytest.mark.parametrize("call", [prepare, compress])
def test_model_of_quantized_layers_alone_is_refused(call: Callable[..., nn.Module]) -> None:
    model = torch.ao.quantization.quantize_dynamic(perceptron(), {nn.Linear}).eval()
    with pytest.raises(NothingToCompressError, match="'Sequential' has no parameters"):
        call(model, example_inputs=torch.zeros(2, 6))


@QUANTIZING
def test_layers_in_training_for_quantization_are_boundaries() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 2)).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model[4].qconfig = None
    model = torch.ao.quantization.prepare_qat(model)
    model(images(dtype=torch.float32))  # observers start at infinity
    graph = analyze(model.eval(), images(dtype=torch.float32))
    reasons = {space.name: space.reason for space in graph.spaces}
    assert reasons["4"] == "output of the model"
    assert all(reasons[name].startswith(f"no rule for '{name}'") for name in ("0", "2"))


# --------------------------------------------------------------------------------------------------
# Nothing to compress


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = torch.rand(8, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :4]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 3), conv(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


NOTHING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "one layer": (lambda: nn.Sequential(conv(3, 4)), r"0: output of the model"),
    "a constant of every channel": (
        lambda: nn.Sequential(conv(3, 8), Constant(), conv(8, 4)),
        r"0: added to a tensor whose channels are not followed.*2: output of the model",
    ),
    "transposed convolutions": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 4, 2, groups=2)),
        r"0: .*'1'.*transposed.*groups",
    ),
    "a stream alone": (
        lambda: nn.Sequential(conv(3, 8), Skipped(conv(8, 8)), conv(8, 4)),
        r"0: residual stream: joined, at.*2: output of the model.*streams=True",
    ),
    "half of the channels": (
        lambda: nn.Sequential(conv(3, 8), Half(), conv(4, 4)),
        r"0: indexed along the channels.*2: output of the model",
    ),
    "tied weights": (Tied, r"a: a\.weight is shared with another layer"),
    "parametrized": (
        lambda: nn.Sequential(*map(REWRITERS["parametrized by weight norm"], (conv(3, 4),))),
        r"'Sequential' has no channel space",
    ),
}


@pytest.mark.parametrize("call", [prepare, compress])
@pytest.mark.parametrize("case", NOTHING)
def test_model_that_cannot_shrink_is_refused_with_the_reasons(
    case: str, call: Callable[..., nn.Module]
) -> None:
    build, reasons = NOTHING[case]
    with pytest.raises(NothingToCompressError, match=f"(?s){reasons}"):
        call(build(), example_inputs=torch.zeros(IMAGE))


def test_model_that_cannot_shrink_is_refused_with_data_and_a_recipe_too() -> None:
    with pytest.raises(NothingToCompressError, match="shared with another layer"):
        compress(Tied(), [torch.zeros(IMAGE)], recipe=Recipe(start=LargestNorm()))


# --------------------------------------------------------------------------------------------------
# Sizes that a module holds


class Scored(nn.Module):
    """Attention whose scores are changed by a number that comes from the width of a head."""

    def __init__(self, number: Callable[[int], float | Tensor]) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(6, 8), nn.Linear(8, 36), nn.Linear(12, 3)
        self.heads, self.width, self.number = 2, 6, number

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        parts = self.qkv(F.relu(self.embed(x))).reshape(batch, count, 3, self.heads, self.width)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (query @ key.transpose(-2, -1) * self.number(self.width)).softmax(dim=-1)
        return self.head((scores @ value).transpose(1, 2).reshape(batch, count, -1))


def check_scored(number: Callable[[int], float | Tensor]) -> None:
    case = Odd(lambda: Scored(number), shape=TOKENS)
    model, inputs = case.model(), case.inputs()
    error = selection_error(model, random_plan(analyze(model, inputs), 0), inputs)
    assert error is not None
    assert error <= 1e-12


FOLLOWED: dict[str, Callable[[int], float | Tensor]] = {
    "constant": lambda width: 0.3,
    "power": lambda width: width**-0.5,
    "root": lambda width: 1 / math.sqrt(width),
    "quotient": lambda width: 4 / width,
    "float": lambda width: 1 / float(width),
    "least": lambda width: 1 / min(width, 100),
    "looked up": lambda width: {6: 0.3}.get(width, 0.5),
}
ESCAPED: dict[str, Callable[[int], float | Tensor]] = {
    "tensor": lambda width: 1 / torch.tensor(width),
    "full": lambda width: 1 / torch.full((1,), width),
    "ones": lambda width: 1 / torch.ones(width).sum(),
    "logarithm": lambda width: 1 / math.log(width),
    "rounded": lambda width: 1 / round(width),
    "rounded up": lambda width: 1 / math.ceil(width),
    "in words": lambda width: 1 / float(f"{width}"),
    "counted": lambda width: 1 / len(range(width)),
    "taken from another": lambda width: 0.1 * (width - width // 2),
    "times a share": lambda width: 0.05 * width,
    "in a set": lambda width: 0.3 if width in {2, 3, 4} else 0.5,
    "by its type": lambda width: 0.3 if type(width) is int and width == 6 else 0.5,
}


@pytest.mark.parametrize("number", FOLLOWED)
def test_numbers_that_come_from_a_width_stay(number: str) -> None:
    check_scored(FOLLOWED[number])


# --------------------------------------------------------------------------------------------------
# What once went wrong


@pytest.mark.parametrize("number", ESCAPED)
def test_numbers_that_come_from_a_width_by_other_ways_stay(number: str) -> None:
    check_scored(ESCAPED[number])


@pytest.mark.parametrize("place", ["behind the first", "before the second"])
def test_hooks_that_change_a_tensor_are_seen(place: str) -> None:
    case = Odd(lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)))
    model, inputs = case.model(), case.inputs()
    if place == "behind the first":
        model[0].register_forward_hook(lambda module, args, output: output.flip(1))
    else:
        model[2].register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
    free = analyze(model, inputs).free
    assert not free or permutation_error(model, free, inputs) <= 1e-12


@pytest.mark.parametrize("tool", ["spectral norm", "weight norm", "pruning"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_hook_computes_stay(tool: str) -> None:
    tools = {
        "spectral norm": nn.utils.spectral_norm,
        "weight norm": nn.utils.weight_norm,
        "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    }
    case = Odd(lambda: Rewritten(tools[tool]))
    inputs = case.inputs()
    model = Rewritten(tools[tool]).double().eval()
    model(*inputs)  # now the weight has a history
    graph = analyze(model, inputs)
    assert [space.name for space in graph.free] == ["b"]
    student = random_student(model, random_plan(graph, 0), inputs)
    assert materialize_error(student, inputs) <= 1e-12
    assert identity_error(model, inputs) <= 1e-12


def test_lazy_model_is_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(ModelError, match=r"0\.weight.*"):
        analyze(model, torch.zeros(IMAGE))


def test_squeeze_of_the_channels_stays_true_at_one_channel() -> None:
    case = Odd(lambda: Function(lambda x: x.squeeze(1)))
    model, inputs = case.model(), case.inputs()
    graph = analyze(model, inputs)
    least = Plan.of(graph, {space.name: space.blocks for space in graph.free})
    assert materialize_error(random_student(model, least, inputs), inputs) <= 1e-12


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_layer_inside_is_refused() -> None:
    model = Around()
    model.first = torch.jit.script(model.first)
    inputs = torch.zeros(IMAGE)
    with pytest.raises(ModelError, match="scripted"):
        compress(model, example_inputs=inputs)


def test_model_that_indexes_by_a_mask_is_read() -> None:
    case = Odd(lambda: Function(lambda x: x[:, torch.arange(8) < 4], width=4))
    graph = analyze(case.model(), case.inputs())
    assert [space.name for space in graph.free] == ["second"]


def test_forward_of_any_keyword_arguments_is_read() -> None:
    class Open(Around):
        def forward(self, x: Tensor, **more: Any) -> Tensor:
            return super().forward(x) * more.get("scale", 1.0)

    graph = analyze(Open(), torch.zeros(IMAGE))
    assert [space.name for space in graph.free] == ["first", "second"]


def test_transformer_is_read_where_torch_would_nest_its_tensors() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    graph = analyze(Padded(nested=True).eval(), torch.randn(TOKENS))
    assert {space.name for space in graph.free} == {"t.layers.0.linear1", "t.layers.1.linear1"}
    assert torch.backends.mha.get_fastpath_enabled() == before
