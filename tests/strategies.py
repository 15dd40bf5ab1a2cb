"""Hypothesis strategies that draw networks, as a list of stages that prints and shrinks well.

A stage turns a feature map of some channels into one of other channels. A drawn network is a
:class:`Network`: its stages, its head, and the seed of its weights; ``build()`` makes the module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "slope": nn.PReLU,
}


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


def conv_norm(inputs: int, outputs: int, act: str = "relu", kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, kernel), nn.BatchNorm2d(outputs), ACTIVATIONS[act]())


class Stage(Protocol):
    def build(self, channels: int) -> tuple[nn.Module, int]:
        """Return the module for an input of ``channels``, and the channels of its output."""


# --------------------------------------------------------------------------------------------------
# Stages of one layer


@dataclass(frozen=True)
class Conv:
    width: int
    kernel: int = 3
    norm: bool = False
    act: str = "relu"

    def build(self, channels: int) -> tuple[nn.Module, int]:
        layers: list[nn.Module] = [conv(channels, self.width, self.kernel)]
        layers += [nn.BatchNorm2d(self.width)] if self.norm else []
        return nn.Sequential(*layers, ACTIVATIONS[self.act]()), self.width


@dataclass(frozen=True)
class Depthwise:
    multiplier: int = 1
    norm: bool = False
    act: str = "relu"

    def build(self, channels: int) -> tuple[nn.Module, int]:
        width = channels * self.multiplier
        layers: list[nn.Module] = [conv(channels, width, groups=channels)]
        layers += [nn.BatchNorm2d(width)] if self.norm else []
        return nn.Sequential(*layers, ACTIVATIONS[self.act]()), width


@dataclass(frozen=True)
class Grouped:
    groups: int
    width: int

    def build(self, channels: int) -> tuple[nn.Module, int]:
        groups = gcd(channels, self.groups)
        width = groups * self.width
        return nn.Sequential(conv(channels, width, groups=groups), nn.ReLU()), width


@dataclass(frozen=True)
class Norm:
    """A norm that stands by itself."""

    kind: str

    def build(self, channels: int) -> tuple[nn.Module, int]:
        if self.kind == "batch":
            return nn.BatchNorm2d(channels), channels
        groups = gcd(channels, 2)
        return nn.GroupNorm(groups, channels), channels


@dataclass(frozen=True)
class Pointwise:
    act: str
    each: bool = False

    def build(self, channels: int) -> tuple[nn.Module, int]:
        each = self.each and self.act == "slope"
        return (nn.PReLU(channels) if each else ACTIVATIONS[self.act]()), channels


@dataclass(frozen=True)
class Pool:
    kind: str

    def build(self, channels: int) -> tuple[nn.Module, int]:
        return (nn.MaxPool2d if self.kind == "max" else nn.AvgPool2d)(3, 2, 1), channels


# --------------------------------------------------------------------------------------------------
# Stages that branch


class Skip(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


@dataclass(frozen=True)
class Residual:
    interior: int
    width: int | None = None  # None: an identity shortcut; a number: a convolution to that width

    def build(self, channels: int) -> tuple[nn.Module, int]:
        width = self.width or channels
        body = nn.Sequential(
            conv_norm(channels, self.interior), conv_norm(self.interior, width, "none")
        )
        shortcut = nn.Identity() if self.width is None else conv(channels, width, 1)
        return Skip(body, shortcut), width


class Branches(nn.Module):
    def __init__(self, branches: list[nn.Module], *, dense: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self.branches]
        return torch.cat([x, *outputs] if self.dense else outputs, 1)


@dataclass(frozen=True)
class Concat:
    widths: tuple[int, ...]
    dense: bool = False

    def build(self, channels: int) -> tuple[nn.Module, int]:
        branches = [conv_norm(channels, w, kernel=1 + 2 * (w % 2)) for w in self.widths]
        kept = channels if self.dense else 0
        return Branches(list(branches), dense=self.dense), kept + sum(self.widths)


class Halves(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module, join: str) -> None:
        super().__init__()
        self.left, self.right, self.join = left, right, join

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        left, right = self.left(left), self.right(right)
        if self.join == "gate":
            return left * torch.sigmoid(right)
        return left + right if self.join == "add" else torch.cat([right, left], 1)


@dataclass(frozen=True)
class Chunk:
    """Two halves: gated as they are, or each through a layer, then added or swapped."""

    join: str
    width: int = 4

    def build(self, channels: int) -> tuple[nn.Module, int]:
        if channels % 2:
            return nn.Identity(), channels
        half = channels // 2
        if self.join == "gate":
            return Halves(nn.Identity(), nn.Identity(), "gate"), half
        left, right = conv(half, self.width), conv(half, self.width, 1)
        width = self.width if self.join == "add" else 2 * self.width
        return Halves(left, right, self.join), width


class Gate(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.squeeze = conv(channels, width, 1)
        self.excite = conv(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.excite(gate))


@dataclass(frozen=True)
class SqueezeExcite:
    width: int

    def build(self, channels: int) -> tuple[nn.Module, int]:
        return Gate(channels, self.width), channels


class Twice(nn.Module):
    def __init__(self, first: nn.Module, shared: nn.Module) -> None:
        super().__init__()
        self.first, self.shared = first, shared

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        return F.silu(self.shared(F.silu(self.shared(x))))


class Siamese(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.shared(F.silu(self.first(x))), self.shared(F.silu(x))], 1)


@dataclass(frozen=True)
class Shared:
    """One layer, called twice: behind itself, or on two tensors side by side."""

    behind: bool
    width: int

    def build(self, channels: int) -> tuple[nn.Module, int]:
        if self.behind:
            return Twice(conv(channels, self.width), conv(self.width, self.width)), self.width
        first, shared = conv(channels, channels, 1), conv(channels, self.width)
        return Siamese(first, shared), 2 * self.width


# --------------------------------------------------------------------------------------------------
# Networks


class Head(nn.Module):
    """Two linear layers, on the mean of the image or on all of its positions."""

    def __init__(self, channels: int, *, flat: bool) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2 if flat else 1)
        self.fc1 = nn.Linear(channels * (4 if flat else 1), 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(torch.flatten(self.pool(x), 1))))


@dataclass(frozen=True)
class Network:
    stages: tuple[Stage, ...]
    flat: bool
    seed: int

    def build(self) -> nn.Module:
        """Return the network in float64 and eval mode."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            channels = 3
            modules: list[nn.Module] = []
            for stage in self.stages:
                module, channels = stage.build(channels)
                modules.append(module)
            return nn.Sequential(*modules, Head(channels, flat=self.flat)).double().eval()

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64),)


widths = st.integers(2, 8)
acts = st.sampled_from(sorted(ACTIVATIONS))
convs = st.builds(Conv, widths, st.sampled_from([1, 3]), st.booleans(), acts)

stages = st.one_of(
    convs,
    st.builds(Depthwise, st.integers(1, 2), st.booleans(), acts),
    st.builds(Grouped, st.sampled_from([2, 3, 4]), st.integers(1, 3)),
    st.builds(Norm, st.sampled_from(["batch", "group"])),
    st.builds(Pointwise, acts, st.booleans()),
    st.builds(Pool, st.sampled_from(["max", "average"])),
    st.builds(Residual, widths, st.none() | widths),
    st.builds(Concat, st.lists(widths, min_size=1, max_size=3).map(tuple), st.booleans()),
    st.builds(Chunk, st.sampled_from(["gate", "add", "swap"]), widths),
    st.builds(SqueezeExcite, st.integers(1, 4)),
    st.builds(Shared, st.booleans(), widths),
)


def networks(length: int = 5) -> st.SearchStrategy[Network]:
    """Draw networks of a convolution, up to ``length`` further stages, and a head."""
    body = st.lists(stages, max_size=length)
    drawn = st.tuples(convs, body).map(lambda parts: (parts[0], *parts[1]))
    return st.builds(Network, drawn, st.booleans(), st.integers(0, 2**16))
