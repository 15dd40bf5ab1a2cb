"""The CIFAR ResNets of He et al. (2016) with parameter-free shortcuts, and images from folders.

The layers are ``conv1 bn1 layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2} linear``. Where a stage halves the
image and doubles the channels, its shortcut subsamples the image and pads the new channels with
zeros ("option A" of the paper).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

if TYPE_CHECKING:
    from pathlib import Path

DEPTHS = (20, 32, 44, 56, 110)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, in_channels: int, interior: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, interior, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(interior)
        self.conv2 = nn.Conv2d(interior, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        padding = (0, 0, 0, 0, before, self.new_channels - before)
        return F.pad(x[:, :, :: self.stride, :: self.stride], padding)


class CifarResNet(nn.Module):
    """A ResNet of ``6 n + 2`` layers in three stages of 16, 32 and 64 channels.

    ``interior`` is the share of channels between the two convolutions of a block: 1 in the paper,
    1/2 for the network that a compression at ratio 0.5 arrives at.
    """

    def __init__(
        self, depth: int, *, in_channels: int = 3, classes: int = 10, interior: float = 1.0
    ) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth must be 6 n + 2, as in {DEPTHS}; got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks, interior)
        self.layer2 = _stage(16, 32, 2, blocks, interior)
        self.layer3 = _stage(32, 64, 2, blocks, interior)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def load_cifar_resnet(depth: int, weights: Path) -> CifarResNet:
    """Return the network in eval mode, with the weights of a safetensors file."""
    model = CifarResNet(depth)
    state = load_file(weights)
    # Some files hold BatchNorm's step counters and some do not; nothing reads them in eval mode.
    state = {name: value for name, value in state.items() if "num_batches" not in name}
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if "num_batches" not in name]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{weights} does not hold a CIFAR ResNet-{depth}: "
            f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}"
        )
    return model.eval()


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Read ``folder/class/image.png`` into normalised images `(n, 3, h, w)` and labels `(n,)`."""
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    samples = ImageFolder(folder, transform=normalise)
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def _stage(
    in_channels: int, channels: int, stride: int, blocks: int, interior: float
) -> nn.Sequential:
    inner = max(1, round(channels * interior))
    first = BasicBlock(in_channels, inner, channels, stride)
    others = [BasicBlock(channels, inner, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)
