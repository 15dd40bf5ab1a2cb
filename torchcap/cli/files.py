"""The files that commands read and write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torchcap.errors import FileError, PlanError
from torchcap.plot import check_picture

if TYPE_CHECKING:
    from argparse import Namespace

T = TypeVar("T")

_OUTPUTS = ("out", "state", "plot", "onnx", "pt2")


def check_outputs(options: Namespace) -> None:
    """Check the places of the files to write, before any work is done.

    Raises:
        FileError: if a file cannot be written, or not as what its ending says.
        MissingPackageError: if a picture is wanted, and matplotlib is not installed.
    """
    for name in _OUTPUTS:
        path: Path | None = getattr(options, name, None)
        if path is not None and not path.parent.is_dir():
            raise FileError(f"there is no folder {str(path.parent)!r} for --{name}; make it")
        if path is not None and path.is_dir():
            raise FileError(f"--{name} is a file to write, and {str(path)!r} is a folder")
    check_picture(getattr(options, "plot", None))


def read_document(path: Path, parse: Callable[[str], T]) -> T:
    """Return what a text file holds.

    Args:
        path: of the file.
        parse: reads the text: ``Plan.from_json``.

    Raises:
        FileError: if there is no such file.
        PlanError: if it holds something else; the message starts with its path.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{str(path)!r} cannot be read ({error})") from error
    try:
        return parse(text)
    except PlanError as error:
        raise PlanError(f"{str(path)!r}: {error}") from error


def leftovers(state: Path) -> list[Path]:
    """Return the files that an interrupted run has left."""
    kept = [state, *(Path(f"{state}.{kind}") for kind in ("curves", "latency"))]
    return [path for path in kept if path.exists()]
