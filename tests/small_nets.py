"""Small networks of several kinds, and what a test asks of a model before and after a call.

Nothing here needs torchcap: pickled models of these classes are loaded where it is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5
SHAPE = (3, 8, 8)


def images(count: int = 4, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a batch of random images of the size that the networks take."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def labels(count: int = 4) -> Tensor:
    return torch.arange(count) % CLASSES


def built(make: Callable[[], nn.Module], *, seed: int = 0) -> nn.Module:
    """Return a network in float64 and eval mode, as if trained: every norm has its own numbers."""
    generator = torch.Generator().manual_seed(seed)
    model = make().double()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            scale = name.endswith("running_var") or (name.endswith("weight") and noise.dim() == 1)
            fan_in = max(1, noise[:1].numel())
            tensor.copy_(0.5 + noise.abs() if scale else noise * (1.5 / fan_in) ** 0.5)
    return model.eval()


class Block(nn.Module):
    """Two convolutions and a skip, with a functional ReLU behind the sum."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class ModuleEndBlock(Block):
    """The same, with a module of its own at the end, which writes over its input."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width)
        self.act = nn.ReLU()
        self.end = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return self.end(self.bn2(self.conv2(y)) + x)


class SharedActivationBlock(Block):
    """The same, with one in-place ReLU module for both places (torchvision's way)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class BareSumBlock(Block):
    """No activation behind the sum; the next block starts with an in-place one."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width)
        self.first = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        skip = x.clone()
        y = self.first(x)
        y = F.relu(self.bn1(self.conv1(y)))
        return self.bn2(self.conv2(y)) + skip


class PreActivationBlock(nn.Module):
    """Norms stand before the convolutions: the first of a block cannot fold."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + x


class BottleneckBlock(nn.Module):
    """Three convolutions and a skip: the second one reads a free space, and writes the next."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + x)


class Residual(nn.Module):
    """A stem, two residual blocks, a classifier; with the methods that timm's models have."""

    def __init__(self, block: type[nn.Module] = Block, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block1 = block(8, width)
        self.block2 = block(8, width + 2)
        self.fc = nn.Linear(8, CLASSES)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.block2(self.block1(F.relu(self.bn(self.conv(x)))))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Inline(nn.Module):
    """Two residual blocks in one forward: no module ends where they end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 6, 3, padding=1)
        self.conv4 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + x)
        x = F.relu(self.conv4(F.relu(self.conv3(x))) + x)
        return self.fc(x.mean((2, 3)))


class Plain(nn.Module):
    """VGG's shape: no skips, in-place activations, a flattened image in front of the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(4),
        )
        self.classifier = nn.Sequential(
            nn.Linear(8 * 4, 10), nn.ReLU(inplace=True), nn.Linear(10, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Dense(nn.Module):
    """DenseNet's shape: features are concatenated, and norms stand before the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 4, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(14)
        self.fc = nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        return self.fc(F.relu(self.norm3(x)).mean((2, 3)))


class Separable(nn.Module):
    """A depthwise convolution and a squeeze-excite gate: channels may be dropped, not mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.expand(x))))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = self.project(x * torch.sigmoid(gate))
        return self.fc(F.relu(x).mean((2, 3)))


# --------------------------------------------------------------------------------------------------
# What a model is, down to the identity of its tensors


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what must be the same after a call that does not change ``model``.

    Tensors stand in it by identity, storage and version: a write of the same numbers shows too.
    """
    return {path: _of_module(module) for path, module in model.named_modules()}


def _of_module(module: nn.Module) -> dict[str, Any]:
    tensors = {
        name: (id(t), t.data_ptr(), t._version, t.requires_grad, t.dtype, t.stride(), id(t.grad))
        for name, t in [*module._parameters.items(), *module._buffers.items()]
        if t is not None
    }
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | tuple | type(None))
    }
    hooks = {name: list(value) for name, value in vars(module).items() if "_hooks" in name}
    return {"class": type(module), "tensors": tensors, "plain": plain, "hooks": hooks}


def values(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def reachable(root: Any) -> Iterator[Any]:
    """Iterate over the objects that ``root`` holds on to by attributes, containers and closures."""
    seen: set[int] = set()
    alive: list[Any] = []  # so that an id stays that of one object
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) not in seen:
            seen.add(id(item))
            alive.append(item)
            yield item
            waiting.extend(_held_by(item))


def _held_by(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    if isinstance(item, list | tuple | set | frozenset):
        return list(item)
    held = list(vars(item).values()) if hasattr(item, "__dict__") else []
    if isinstance(item, type):
        return []
    for name in ("__self__", "__func__", "__closure__", "__defaults__", "cell_contents"):
        try:
            held.append(getattr(item, name, None))
        except ValueError:  # an empty cell
            continue
    return held


EXACT = {"rtol": 1e-12, "atol": 1e-12}
NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "module ends": lambda: Residual(ModuleEndBlock),
    "shared activation": lambda: Residual(SharedActivationBlock),
    "pre-activation": lambda: Residual(PreActivationBlock),
    "inline": Inline,
    "plain": Plain,
    "dense": Dense,
    "separable": Separable,
}
EVERY_NET = pytest.mark.parametrize("net", NETS)
