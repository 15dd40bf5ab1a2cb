"""The file: tensors and a description in safetensors, with a digest over both."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from torchcap.checkpoint.contents import Contents
from torchcap.digest import digest
from torchcap.errors import FileError

_FORMAT, _VERSION = "torchcap-model", 1


def write(path: Path, contents: Contents, tensors: Mapping[str, Tensor]) -> None:
    """Write a file; what stood at its place stays until the new one is whole.

    Args:
        path: of the file.
        contents: the description.
        tensors: on the CPU, contiguous, none of them twice.

    Raises:
        FileError: if the file cannot be written.
    """
    if not path.parent.is_dir():
        raise FileError(f"there is no folder {str(path.parent)!r} for the model; make it")
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "torchcap": version("torchcap"),
        "contents": json.dumps(contents.to_dict(), allow_nan=False),
    }
    metadata["sha256"] = digest(tensors, metadata)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        data = _ordered(safetensors.torch.save(dict(tensors), metadata))
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except Exception as error:  # safetensors has no base for what it cannot store
        with contextlib.suppress(OSError):
            beside.unlink()
        kept = "; the file before it is kept" if path.is_file() else ""
        raise FileError(
            f"the model cannot be written to {str(path)!r} ({type(error).__name__}: {error}){kept}"
        ) from error


def read(path: Path) -> tuple[Contents, dict[str, Tensor]]:
    """Read a file, and check that it is whole and as it was written.

    Returns:
        the description and the tensors, on the CPU.

    Raises:
        FileError: if there is no such file, or it cannot be read as a saved model.
    """
    if not path.is_file():
        raise FileError(f"there is no file {str(path)!r}; give the path that save() wrote to")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileError:
        raise
    except Exception as error:  # what a broken file makes safetensors raise has no base
        raise FileError(
            f"{str(path)!r} cannot be read as a safetensors file ({type(error).__name__}: "
            f"{error}); it is damaged, cut short, or of another format"
        ) from error
    described = {key: value for key, value in metadata.items() if key != "sha256"}
    if digest(tensors, described) != metadata.get("sha256"):
        raise FileError(
            f"{str(path)!r} is damaged: its tensors or their description are not what was written "
            "(SHA-256 differs); get the file again"
        )
    try:
        return Contents.from_dict(json.loads(metadata["contents"])), tensors
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileError(
            f"{str(path)!r} holds no description that torchcap knows ({error}); save the model anew"
        ) from error


def _ordered(data: bytes) -> bytes:
    """Return a file with its metadata sorted: safetensors draws their order anew each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + data[end:]


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise FileError(
            f"{str(path)!r} holds tensors, and no model saved by torchcap.save(); load its weights "
            "into a model of the right sizes by safetensors.torch.load_model()"
        )
    if metadata.get("version") != str(_VERSION):
        raise FileError(
            f"{str(path)!r} is of version {metadata.get('version')!r}, written by torchcap "
            f"{metadata.get('torchcap')}; this one reads version {_VERSION}: upgrade torchcap"
        )
