"""Folders of images: what to compress with, and what to measure on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from torchcap import processes
from torchcap.errors import DataError

if TYPE_CHECKING:
    from argparse import Namespace

    from torchcap.cli.models import Network

SET_ASIDE: Final = 0.1
"""Share of the images that are measured on, where no folder is for that."""

_MEASURED = ("val", "validation", "test")


@dataclass(frozen=True, slots=True)
class Images:
    """Files of images.

    Attributes:
        files: the images.
        labels: index of the class of each; None if that is not known.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, places: slice | Sequence[int]) -> Images:
        chosen = range(len(self))[places] if isinstance(places, slice) else places
        labels = None if self.labels is None else tuple(self.labels[i] for i in chosen)
        return Images(tuple(self.files[i] for i in chosen), labels)

    def shuffled(self, seed: int) -> Images:
        """Return the images in an order that follows from a seed."""
        generator = torch.Generator().manual_seed(seed)
        return self[torch.randperm(len(self), generator=generator).tolist()]


@dataclass(frozen=True, slots=True)
class Split:
    """The images to compress with, and others to measure on.

    Attributes:
        train, held_out: the images.
        folders: that stand beside each other, one for each class it may be.
    """

    train: Images
    held_out: Images
    folders: int


def read_folders(directory: Path, classes: int, seed: int = 0) -> Split:
    """Find the images below a directory.

    With ``train/`` in it, that is compressed with, and ``val/``, ``validation/`` or ``test/``
    measured on; otherwise, or where none of these is there, a tenth is drawn and set aside.
    Images may stand in folders, one for each class, whose names in their order are the classes of
    the model if there are as many of them.

    Args:
        directory: where to look.
        classes: of the model.
        seed: of the order, and of what is set aside.

    Raises:
        DataError: if there is no such directory, or fewer than two images in it.
    """
    if not directory.is_dir():
        raise DataError(f"there is no folder {str(directory)!r} of images; see --data")
    inner = directory / "train"
    train = inner if inner.is_dir() else directory
    names = sorted(path.name for path in train.iterdir() if path.is_dir())
    known = names if len(names) == classes else []
    images = _images(train, known).shuffled(seed)
    others = [directory / name for name in _MEASURED if (directory / name).is_dir()]
    if train is inner and others:
        return Split(images, _images(others[0], known).shuffled(seed), len(names))
    if len(images) < 2:
        raise DataError(f"there is one image in {str(train)!r}, and another one to measure on none")
    aside = max(1, round(SET_ASIDE * len(images)))
    return Split(images[aside:], images[:aside], len(names))


def open_data(options: Namespace, network: Network) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return batches of this process's images: to compress with, and to measure on.

    Args:
        options: ``data``, ``images``, ``batch``, ``workers``, ``device`` and ``seed``.
        network: whose images they are to be.

    Raises:
        DataError: if there are too few images, or labels are wanted that they have not.
    """
    classes = classes_of(network)
    split = read_folders(options.data, classes, options.seed)
    if getattr(options, "labels", None) and split.train.labels is None:
        beside = ", and images beside them" if split.folders == classes else ""
        raise DataError(
            f"--labels needs the class of every image, by a folder for each class: "
            f"{str(options.data)!r} has {split.folders:,} class folders{beside}, the model "
            f"{classes:,} classes"
        )
    rank, count = processes.rank(), processes.count()
    train = split.train[: options.images]
    if len(train) < count:
        raise DataError(f"{len(train)} images cannot be shared out to {count} processes")
    mine = train[rank::count][: len(train) // count]  # as many batches in every process
    held_out = split.held_out[rank::count]
    return _loader(mine, options, network, shuffle=True), _loader(held_out, options, network)


@torch.no_grad()
def classes_of(network: Network) -> int:
    """Return the number of classes of a model.

    Raises:
        DataError: if it is no classifier.
    """
    scores = network.model(network.example)
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise DataError(
            f"{type(network.model).__name__!r} puts out no class scores of shape (N, classes); "
            "call torchcap.compress() for other models"
        )
    return scores.shape[1]


def _images(folder: Path, classes: Sequence[str]) -> Images:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise DataError(
            f"there are no images in {str(folder)!r}; expected files {', '.join(IMG_EXTENSIONS)}, "
            "there or in folders below it"
        )
    owners = [file.relative_to(folder).parts[0] for file in files]
    if not set(owners) <= set(classes):
        return Images(tuple(files))
    return Images(tuple(files), tuple(map(classes.index, owners)))


class _Pictures(Dataset[Any]):
    """Decodes images; an item is the image, or it and its label."""

    def __init__(self, images: Images, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        file = self.images.files[index]
        try:
            with Image.open(file) as picture:
                tensor = self.transform(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # of PIL, for files that are broken
            raise DataError(f"{str(file)!r} cannot be read as an image ({error})") from error
        return tensor if self.images.labels is None else (tensor, self.images.labels[index])


def _loader(
    images: Images, options: Namespace, network: Network, *, shuffle: bool = False
) -> DataLoader[Any]:
    return DataLoader(
        _Pictures(images, network.transform()),
        options.batch,
        shuffle=shuffle,
        num_workers=options.workers,
        pin_memory=options.device.type == "cuda",
    )
