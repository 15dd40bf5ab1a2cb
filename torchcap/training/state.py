"""The state of a run in a file, from which it goes on after an interruption."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch

from torchcap import processes
from torchcap.errors import RecipeError, StateError

_FORMAT, _VERSION = "torchcap-state", 1
_KEYS = {"identity", "phase", "parts", "inner"}
_NAMED = 5  # differences, in a message


class StateFile:
    """A file that always holds one whole state: a new one takes the old one's place at once.

    Only tensors and plain data go into it, and loading runs no code that it brings. Under
    ``torch.distributed`` the first process writes, and all read.

    Args:
        path: of the file; None keeps nothing.
        identity: what the run is, as plain data; a state of another run is refused.
        every: a training is saved after this many steps.

    Raises:
        RecipeError: if ``every`` is not positive.
    """

    def __init__(self, path: Path | str | None, identity: Mapping[str, Any], every: int) -> None:
        if every < 1:
            raise RecipeError(f"save_every is a number of steps, at least 1; got {every!r}")
        self.path = None if path is None else Path(path)
        self.identity, self.every = dict(identity), every
        self.phase = 0
        self.parts: dict[str, Any] = {}
        self.inner: Mapping[str, Any] | None = None

    def load(self) -> bool:
        """Read the file, if there is one.

        Raises:
            StateError: if it cannot be read, is no state, or is that of another run; or if there is
                no folder to write it to.
        """
        if self.path is None:
            return False
        check_folder(self.path)
        if not self.path.exists():
            return False
        try:
            content = torch.load(self.path, weights_only=True, map_location="cpu")
        except Exception as error:  # what a broken file makes torch.load raise has no base
            raise StateError(
                f"{str(self.path)!r} cannot be read as a saved state ({type(error).__name__}); "
                "remove it to begin anew"
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise StateError(f"{str(self.path)!r} is no saved state of torchcap; give another path")
        if content.get("version") != _VERSION or not content.keys() >= _KEYS:
            raise StateError(
                f"{str(self.path)!r} is a state of version {content.get('version')!r}; this "
                f"torchcap reads version {_VERSION}. Remove it to begin anew"
            )
        for key, value in self.identity.items():
            if content["identity"].get(key) != value:
                raise StateError(
                    f"{str(self.path)!r} is the state of another run: its {key} is"
                    f"{_told(content['identity'].get(key), value)}\n"
                    "Give another path, or remove it to begin anew"
                )
        self.phase, self.parts, self.inner = content["phase"], content["parts"], content["inner"]
        return True

    def finish_phase(self, **parts: Any) -> None:
        """Save that a phase is done, with what it has left to the next ones."""
        self.phase += 1
        self.inner = None
        if self.path is not None:
            self.parts.update(copy.deepcopy(parts))  # the next phase trains the tensors themselves
            self._write()

    def resume(self) -> Mapping[str, Any] | None:
        """Return the state of the training that was under way; see ``Keeper``."""
        return self.inner

    def keep(self, step: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Save the state of a training, every so many steps; see ``Keeper``."""
        if self.path is not None and step % self.every == 0:
            self.inner = state()
            self._write()

    def remove(self) -> None:
        """Remove the file: the run is done."""
        if self.path is not None and processes.rank() == 0:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self.path is None or processes.rank() > 0:
            return
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "identity": self.identity,
            "phase": self.phase,
            "parts": self.parts,
            "inner": self.inner,
        }
        beside = self.path.with_name(self.path.name + ".new")
        try:
            with beside.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            kept = "the state before it is kept" if self.path.exists() else "no state is kept"
            raise StateError(
                f"the state cannot be written to {str(self.path)!r} ({error}); {kept}. Free some "
                "space and call again with the same arguments to go on from there"
            ) from error


def _told(there: Any, here: Any) -> str:
    """Say how plain data differs; of mappings a few of the entries that do."""
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return f"\n  {there!r}, here it is\n  {here!r}"
    found = list(_differences(there, here))
    more = [f"  … and {len(found) - _NAMED} more"] if found[_NAMED:] else []
    return "\n".join([" another one:", *found[:_NAMED], *more])


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*there, *here]):
        one, other = there.get(key), here.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{at}{key}: ")
        elif one != other:
            sides = ("missing" if side is None else shortened(side) for side in (one, other))
            yield "  {}{}: {}, here {}".format(at, key, *sides)


def check_folder(path: Path) -> None:
    """Raise a StateError if there is no folder for a file."""
    if not path.parent.is_dir():
        raise StateError(f"there is no folder {str(path.parent)!r} for the state; make it")


def write_text(path: Path, text: str) -> None:
    """Write a file; what stood at its place stays until the new one is whole.

    Raises:
        StateError: if it cannot be written.
    """
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(text, "utf-8")
        beside.replace(path)
    except OSError as error:
        raise StateError(f"{str(path)!r} cannot be written: {error}") from error
