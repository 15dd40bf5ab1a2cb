"""What all experiments share: the parts of the data, the training of the peers, and the table.

``DIR`` of the option ``--data`` holds ``train/`` and ``test/`` with a folder of images for every
class. Everything is chosen on a part of ``train/`` that is set aside; ``test/`` only fills the last
table. The peers are ordinary networks that keep their BatchNorm, and `distil` trains them with
PyTorch's usual loop.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import torchcap

sys.path.append(str(Path(__file__).parents[1]))  # the examples are scripts, not a package
from benchmarks.measure import keep_freed_memory, outputs
from benchmarks.table import format_table
from cifar_models import MEAN, STD, load_images

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Row = dict[str, object]

LARGEST_GRADIENT = 5.0  # its norm, beyond which it is scaled down
WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True, slots=True)
class Images:
    """Normalised images `(n, 3, h, w)` and their labels `(n,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.images[index], self.labels[index])

    def __add__(self, other: Images) -> Images:
        images = torch.cat([self.images, other.images])
        return Images(images, torch.cat([self.labels, other.labels]))


@dataclass(frozen=True, slots=True)
class Splits:
    """The parts to train on, to choose on, and to report."""

    train: Images
    validation: Images
    test: Images

    def of(self, split: str) -> tuple[Images, Images]:
        """Return the images to train on and those that fill the table."""
        if split == "validation":
            return self.train, self.validation
        return self.train + self.validation, self.test


def load_splits(data: Path, *, validation: int = 1000, seed: int = 0) -> Splits:
    """Read the folders; the last ``validation`` images of the shuffled ``train/`` are set aside."""
    train = Images(*load_images(data / "train"))
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))]
    cut = len(train) - validation
    return Splits(train[:cut], train[cut:], Images(*load_images(data / "test")))


def loader(part: Images, *, batch: int, with_labels: bool = True) -> DataLoader:
    """Return shuffled batches of equal size, ``[images, labels]`` or ``[images]``."""
    tensors = (part.images, part.labels) if with_labels else (part.images,)
    return DataLoader(TensorDataset(*tensors), batch, shuffle=True, drop_last=True)


def flip_and_shift(images: Tensor, pixels: int = 4) -> Tensor:
    """Flip every second image on average, and shift each by up to ``pixels`` over black."""
    count, channels, height, width = images.shape
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    padded = black[:, None, None].repeat(count, 1, height + 2 * pixels, width + 2 * pixels)
    padded[:, :, pixels : pixels + height, pixels : pixels + width] = images
    rows = torch.randint(2 * pixels + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * pixels + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    image, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True, slots=True)
class Scores:
    """Per cent of the images that a network classifies as the labels say, and as its teacher."""

    accuracy: float
    agreement: float


def evaluate(model: nn.Module, part: Images, teacher_logits: Tensor) -> Scores:
    """Return the scores of ``model`` in eval mode; its mode is put back."""
    predicted = outputs(model, part.images).argmax(1)
    targets = (part.labels, teacher_logits.argmax(1))
    return Scores(*(100 * (predicted == target).double().mean().item() for target in targets))


@dataclass(frozen=True, slots=True)
class ClassLoss:
    """``distillation · T² KL(teacher ‖ student) + labels · cross entropy``, with both softened."""

    distillation: float = 1.0
    labels: float = 0.0
    temperature: float = 4.0

    def __call__(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        soft, target = (
            F.log_softmax(values / self.temperature, dim=1) for values in (logits, teacher_logits)
        )
        divergence = F.kl_div(soft, target, reduction="batchmean", log_target=True)
        loss = self.distillation * self.temperature**2 * divergence
        return loss + self.labels * F.cross_entropy(logits, labels) if self.labels else loss


def sgd(lr: float, *, momentum: float = 0.9, weight_decay: float = 5e-4) -> MakeOptimizer:
    """Return what makes SGD with Nesterov momentum for some parameters."""
    return partial(SGD, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True)


def adam(lr: float) -> MakeOptimizer:
    """Return what makes Adam for some parameters."""
    return partial(Adam, lr=lr)


def distil(
    model: nn.Module,
    teacher: nn.Module,
    batches: DataLoader,
    *,
    epochs: int,
    make_optimizer: MakeOptimizer,
    loss: ClassLoss,
    augment: Callable[[Tensor], Tensor] = flip_and_shift,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Train ``model`` in place, BatchNorm included, and leave it in eval mode.

    The learning rate rises linearly over the first steps and then falls along a cosine. The
    gradient is clipped, for ``T²`` makes it large while the pruned network is still far off.
    """
    steps = epochs * len(batches)
    optimizer = make_optimizer(model.parameters())
    schedule = LambdaLR(optimizer, partial(_warm_up_and_cosine, steps=steps))
    model.train()
    with tqdm(total=steps, desc="train the pruned network") as bar:
        for _ in range(epochs):
            for images, *labels in batches:
                images = augment(images)  # noqa: PLW2901 - the teacher sees the same images
                with torch.no_grad():
                    targets = teacher(images)
                value = loss(model(images), targets, *labels or (None,))
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
                bar.update()
                if on_step is not None:
                    on_step(bar.n)
    model.eval()


@torch.no_grad()
def reestimate_statistics(model: nn.Module, images: Tensor, *, batch: int = 500) -> None:
    """Replace BatchNorm's running statistics by the average over batches, in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for the plain average
    model.train()
    for chunk in images.split(batch):
        model(chunk)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


class Bars:
    """Shows the progress of `torchcap.compress` and of its steps: one bar for each of them."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __call__(self, progress: torchcap.Progress) -> None:
        if self.bar is None or self.bar.desc != progress.name:
            self.bar = tqdm(total=progress.steps, desc=progress.name)
        self.bar.update(progress.step - self.bar.n)
        self.bar.set_postfix(loss=f"{progress.loss:.3f}", refresh=False)
        if progress.step == progress.steps:
            self.bar.close()
            self.bar = None


class Table:
    """Rows that are kept in a file as they come, with the settings, and printed at the end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rows: list[Row] = []
        self.file: Path | None = options.out
        values = vars(options).items()  # a folder's place says nothing to others, its name may
        self.settings = {
            "torch": torch.__version__,
            "torchcap": torchcap.__version__,
            **{name: value.name if isinstance(value, Path) else value for name, value in values},
        }

    def add(self, row: Row) -> None:
        """Add a row and rewrite the file, so that an interrupted run keeps what it has."""
        self.rows.append(row)
        if self.file is not None:
            text = json.dumps({"settings": self.settings, "rows": self.rows}, indent=2)
            new = self.file.with_name(self.file.name + ".new")
            new.write_text(text + "\n")
            new.replace(self.file)

    def __str__(self) -> str:
        rows = [[_cell(value) for value in row.values()] for row in self.rows]
        return format_table(list(self.rows[0]), rows) if rows else "no rows"


def parser(description: str | None, *, cifar: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options that all experiments have, and those of the CIFAR ones."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--data", type=Path, required=True, metavar="DIR")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--out", type=Path, metavar="FILE", help="JSON of the settings and rows")
    if cifar:
        result.add_argument("--weights", type=Path, required=True, metavar="FILE")
        result.add_argument("--depth", type=int, default=20, choices=(20, 56))
        result.add_argument(
            "--split",
            choices=("validation", "test"),
            default="validation",
            help="what fills the table: images of train/ set aside, or test/ after all of train/",
        )
    return result


def start(options: argparse.Namespace) -> None:
    """Set threads and seed, and keep freed memory, which makes the timings steady."""
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def _warm_up_and_cosine(step: int, *, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
