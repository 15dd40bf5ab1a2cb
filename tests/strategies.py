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
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNorm2d
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
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
class Transposed:
    """A transposed convolution; one with groups keeps its channels."""

    width: int
    stride: int
    groups: int = 1
    norm: bool = False
    act: str = "relu"

    def build(self, channels: int) -> tuple[nn.Module, int]:
        groups = gcd(channels, self.width, self.groups)
        up = nn.ConvTranspose2d(
            channels, self.width, 3, self.stride, padding=self.stride, groups=groups, bias=self.norm
        )
        norms = [nn.BatchNorm2d(self.width)] if self.norm else []
        return nn.Sequential(up, *norms, ACTIVATIONS[self.act]()), self.width


@dataclass(frozen=True)
class Standardised:
    width: int
    scaled: bool

    def build(self, channels: int) -> tuple[nn.Module, int]:
        kind = ScaledStdConv2d if self.scaled else StdConv2d
        layers = [kind(channels, self.width, 3, padding=1, bias=True), nn.BatchNorm2d(self.width)]
        return nn.Sequential(*layers[: 1 if self.scaled else 2], nn.SiLU()), self.width


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(gcd(channels, 2), channels),
    "layer": LayerNorm2d,
    "instance": lambda channels: nn.Sequential(  # which refuses images of one pixel
        nn.Upsample(size=(4, 4)), nn.InstanceNorm2d(channels, affine=True)
    ),
    "response": lambda channels: GlobalResponseNorm(channels, channels_last=False),
}


@dataclass(frozen=True)
class Norm:
    """A norm that stands by itself."""

    kind: str

    def build(self, channels: int) -> tuple[nn.Module, int]:
        return NORMS[self.kind](channels), channels


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
        if self.join == "glu":
            return F.glu(torch.cat([left, right], 1), dim=1)
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
        if self.join in {"gate", "glu"}:
            return Halves(nn.Identity(), nn.Identity(), self.join), half
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


class FlatGate(nn.Module):
    """The same with linear layers."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, width)
        self.excite = nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        gate = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1).view(batch, channels)))
        return x * torch.sigmoid(self.excite(gate)).view(batch, channels, 1, 1).expand_as(x)


@dataclass(frozen=True)
class SqueezeExcite:
    width: int
    flat: bool = False

    def build(self, channels: int) -> tuple[nn.Module, int]:
        return (FlatGate if self.flat else Gate)(channels, self.width), channels


class Paths(nn.Module):
    """Sums branches, each with a gate of its own for every channel (SKNet, ResNeSt)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.both = nn.ModuleList([conv_norm(channels, width), conv_norm(channels, width)])
        self.squeeze = conv(width, 3, 1)
        self.gates = nn.ModuleList([conv(3, width, 1), conv(3, width, 1)])

    def forward(self, x: Tensor) -> Tensor:
        paths = torch.stack([path(x) for path in self.both], dim=1)
        seen = F.relu(self.squeeze(paths.sum(1).mean((2, 3), keepdim=True)))
        gates = torch.stack([gate(seen) for gate in self.gates], dim=1)
        return (paths * torch.softmax(gates, dim=1)).sum(dim=1)


@dataclass(frozen=True)
class Select:
    width: int

    def build(self, channels: int) -> tuple[nn.Module, int]:
        return Paths(channels, self.width), self.width


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
# Stages without layers: each a function of the image


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def cut(x: Tensor) -> Tensor:
    """Keep the channels and put them at the pixels of a smaller image."""
    batch, channels, height, width = x.shape
    return x.flatten(2).view(batch, channels, height, width)


def there(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(F.interpolate(x, size=(6, 6)), 2)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    middle = x.shape[1] // 2
    return x[:, :middle], x[:, middle:]


def shuffled(x: Tensor, *, in_groups: bool) -> Tensor:
    """Deal the channels out anew, as ShuffleNet does, or back."""
    batch, channels, height, width = x.shape
    groups = (2, channels // 2) if in_groups else (channels // 2, 2)
    x = x.view(batch, *groups, height, width).transpose(1, 2)
    return x.reshape(batch, channels, height, width)


WIDEST = 64  # channels, so that no drawn network takes long

# The last ones act along the channels. The number says how many channels come out for each.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "last and back": (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 1),
    "transposed": (lambda x: x.transpose(2, 3).neg(), 1),
    "batch in front": (lambda x: x.permute(1, 0, 2, 3).transpose(0, 1), 1),
    "nearest": (lambda x: F.interpolate(x, size=(9, 7)), 1),
    "bilinear": (lambda x: F.interpolate(x, size=(5, 6), mode="bilinear", align_corners=False), 1),
    "means of rows": (lambda x: x - x.mean(2, keepdim=True), 1),
    "context": (lambda x: x * 2 + x.mean((2, 3))[:, :, None, None], 1),
    "share": (lambda x: x / (x.abs().sum((2, 3), keepdim=True) + 1), 1),
    "rolled": (lambda x: x.roll((1, 2), (2, 3)).flip(-1), 1),
    "padded": (lambda x: F.pad(x, (1, 0, 0, 1), value=0.5)[..., 1:, :-1], 1),
    "stacked": (lambda x: torch.stack([x, F.relu(x)], 1).mean(1), 1),
    "unbound": (lambda x: torch.stack(x.unbind(3)[::-1], 3), 1),
    "neighbours": (lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2), 2),
    "windows": (lambda x: F.pixel_unshuffle(F.interpolate(x, size=(8, 8)), 2), 4),
    "windows and back": (lambda x: F.pixel_shuffle(there(x), 2), 1),
    "in place": (lambda x: x.clone().mul_(2).add_(1).relu_(), 1),
    "positions": (cut, 1),
    "twice": (lambda x: torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1), 2),
    "largest": (lambda x: torch.maximum(x, -x), 1),
    "cumulated": (lambda x: x.cumsum(1), 1),
    "softmax": (lambda x: x.softmax(1), 1),
    "normalised": (lambda x: F.normalize(x, dim=1), 1),
    "next channel": (lambda x: x.roll(1, 1), 1),
    "turned": (lambda x: x.flip(1), 1),
    "rotated": (lambda x: torch.cat([x[:, 1:], x[:, :1]], 1), 1),
    "centred": (lambda x: x - x.mean(1, keepdim=True), 1),
    "counted": (lambda x: x / x.shape[1], 1),
}  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """An operator without parameters."""

    name: str

    def build(self, channels: int) -> tuple[nn.Module, int]:
        function, factor = FUNCTIONS[self.name]
        if factor * channels > WIDEST:
            return nn.Identity(), channels
        return Function(function), factor * channels


# These need an even number of channels.
PAIRED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "shuffled": (lambda x: shuffled(x, in_groups=True), 2),
    "shuffled back": (lambda x: shuffled(x, in_groups=False), 2),
    "swapped": (lambda x: torch.cat(halves(x)[::-1], 1), 2),
    "first half": (lambda x: halves(x)[0], 1),
    "joined halves": (lambda x: halves(x)[0] * halves(x)[1], 1),
    "groups": (lambda x: x.unflatten(1, (2, -1)).sum(1), 1),
}


@dataclass(frozen=True)
class Paired:
    """An operator on two halves or on pairs of channels."""

    name: str

    def build(self, channels: int) -> tuple[nn.Module, int]:
        function, share = PAIRED[self.name]
        return (
            (nn.Identity(), channels)
            if channels % 2
            else (Function(function), channels // 2 * share)
        )


class Scaled(nn.Module):
    def __init__(self, shape: tuple[int, ...], how: str) -> None:
        super().__init__()
        self.term = nn.Parameter(torch.rand(shape) + 1.5)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "divide":
            return x / self.term
        return x * self.term if self.how == "multiply" else x + self.term


@dataclass(frozen=True)
class Parameter:
    """A parameter that is no layer's: one number, or one for each channel or row."""

    how: str
    each: str

    def build(self, channels: int) -> tuple[nn.Module, int]:
        shapes = {
            "one": (1,),
            "channel": (channels, 1, 1),
            "channel and batch": (1, channels, 1, 1),
        }
        return Scaled(shapes[self.each], self.how), channels


# --------------------------------------------------------------------------------------------------
# Stages over tokens, which come back as an image


class Tokens(nn.Module):
    """Reads an image as tokens, whose channels stand last."""

    def __init__(self, inside: nn.Module, *, flat: bool) -> None:
        super().__init__()
        self.inside, self.flat = inside, flat

    def forward(self, x: Tensor) -> Tensor:
        if not self.flat:
            return self.inside(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        batch, _, height, width = x.shape
        x = self.inside(x.flatten(2).transpose(1, 2))
        return x.transpose(1, 2).reshape(batch, -1, height, width)


class Mlp(nn.Module):
    def __init__(self, channels: int, interior: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, interior * (2 if gated else 1))
        self.fc2 = nn.Linear(interior, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.gated, self.residual = gated, width == channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self.norm(x))
        if self.gated:
            value, gate = y.chunk(2, dim=-1)
            y = value * F.gelu(gate)
        else:
            y = F.gelu(y)
        y = self.fc2(y) * self.scale
        return x + y if self.residual else y


@dataclass(frozen=True)
class Feedforward:
    interior: int
    width: int | None  # None: a residual MLP; a number: to that width
    gated: bool
    flat: bool

    def build(self, channels: int) -> tuple[nn.Module, int]:
        width = self.width or channels
        inside = Mlp(channels, self.interior, width, gated=self.gated)
        return Tokens(inside, flat=self.flat), width


SCALINGS = ("none", "fused", "held", "width", "shape")


class Attention(nn.Module):
    """Attention in the ways that people write it: how queries and keys are scaled, and put."""

    def __init__(self, channels: int, heads: int, width: int, scaling: str, *, joint: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * heads * width)
        self.project = nn.Linear(heads * width, channels)
        self.heads, self.width, self.scale = heads, width, width**-0.5
        self.scaling, self.joint = scaling, joint

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        if self.joint:
            parts = self.qkv(x).reshape(batch, count, 3, self.heads, self.width)
            query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            query, key, value = self.qkv(x).chunk(3, dim=-1)
            query = query.view(batch, count, self.heads, -1).transpose(1, 2)
            key = key.view(batch, count, self.heads, -1).transpose(1, 2)
            value = value.view(batch, count, self.heads, -1).transpose(1, 2)
        y = self.attend(query, key, value).transpose(1, 2)
        return x + self.project(y.flatten(2) if self.joint else y.reshape(batch, count, -1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.scaling == "fused":
            return F.scaled_dot_product_attention(query, key, value)
        if self.scaling == "held":
            query = query * self.scale
        scores = query @ key.transpose(-2, -1)
        if self.scaling == "width":
            scores = scores / self.width**0.5
        if self.scaling == "shape":
            scores = scores * query.shape[-1] ** -0.5
        return scores.softmax(dim=-1) @ value


@dataclass(frozen=True)
class Attend:
    heads: int
    width: int
    scaling: str
    joint: bool

    def build(self, channels: int) -> tuple[nn.Module, int]:
        inside = Attention(channels, self.heads, self.width, self.scaling, joint=self.joint)
        return Tokens(inside, flat=True), channels


class Places(nn.Module):
    """Mixes positions, not channels (MLP-Mixer)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 2).flatten(2)
        y = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return (x + F.gelu(self.mix(y))).unflatten(2, (2, 2))


@dataclass(frozen=True)
class Mix:
    def build(self, channels: int) -> tuple[nn.Module, int]:
        return Places(channels), channels


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

layers = st.one_of(
    convs,
    st.builds(Depthwise, st.integers(1, 2), st.booleans(), acts),
    st.builds(Grouped, st.sampled_from([2, 3, 4]), st.integers(1, 3)),
    st.builds(Standardised, widths, st.booleans()),
    st.builds(Transposed, widths, st.just(1), st.integers(1, 2), st.booleans(), acts),
    st.builds(Norm, st.sampled_from(sorted(NORMS))),
    st.builds(Pointwise, acts, st.booleans()),
    st.builds(Pool, st.sampled_from(["max", "average"])),
)
branches = st.one_of(
    st.builds(Residual, widths, st.none() | widths),
    st.builds(Concat, st.lists(widths, min_size=1, max_size=3).map(tuple), st.booleans()),
    st.builds(Chunk, st.sampled_from(["gate", "glu", "add", "swap"]), widths),
    st.builds(SqueezeExcite, st.integers(1, 4), st.booleans()),
    st.builds(Select, widths),
    st.builds(Shared, st.booleans(), widths),
)
functions = st.one_of(
    st.builds(Moved, st.sampled_from(list(FUNCTIONS))),
    st.builds(
        Parameter,
        st.sampled_from(["multiply", "divide", "add"]),
        st.sampled_from(["one", "channel", "channel and batch"]),
    ),
    st.builds(Paired, st.sampled_from(list(PAIRED))),
)
tokens = st.one_of(
    st.builds(Feedforward, widths, st.none() | widths, st.booleans(), st.booleans()),
    st.builds(
        Attend, st.integers(1, 3), st.integers(1, 6), st.sampled_from(SCALINGS), st.booleans()
    ),
    st.just(Mix()),
)
stages = layers | branches | functions | tokens


def networks(length: int = 6) -> st.SearchStrategy[Network]:
    """Draw networks of a convolution, one to ``length`` further stages, and a head."""
    body = st.lists(stages, min_size=1, max_size=length)
    drawn = st.tuples(convs, body).map(lambda parts: (parts[0], *parts[1]))
    return st.builds(Network, drawn, st.booleans(), st.integers(0, 2**16))
