"""Documents: JSON texts that say what they are, and of which version: plans and measurements.

People edit them, so what is wrong in one is told with the place where it stands.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from operator import index
from reprlib import repr as shortened
from typing import Any, Final

from torchcap.errors import PlanError

_LARGEST: Final = 2**63  # whole number; none that stands for channels or images comes near it


@dataclass(frozen=True, slots=True)
class Entry:
    """An object of a document. Its values are asked for by what they have to be.

    Every method raises a PlanError, which names the place, if they are something else.

    Attributes:
        values: the object.
        what: the document should be, for messages: ``"plan"``.
        where: the object stands in it: ``"space 'conv1'"``; empty for the document itself.
    """

    values: Mapping[str, Any]
    what: str
    where: str = ""

    def at(self, where: str) -> Entry:
        """Return the same object under another name of its place."""
        return replace(self, where=where)

    def check_keys(self, *needed: str, optional: Sequence[str] = ()) -> None:
        """Check that all keys are there that are needed, and none that nobody reads."""
        known = (*needed, *optional)
        for key in self.values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise self._error(f"{self.where or 'it'} has an unknown key {key!r}; {hint}")
        for key in needed:
            if key not in self.values:
                raise self._error(f"{self.where or 'it'} has no {key!r}")

    def text(self, key: str) -> str:
        """Return a text."""
        value = self.values[key]
        if not isinstance(value, str):
            raise self._unfit(key, "a text", value)
        return value

    def whole(self, key: str) -> int:
        """Return a whole number."""
        return self._whole(key, self.values[key])

    def wholes(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers."""
        return tuple(self._whole(key, value) for value in self.sequence(key))

    def number(self, key: str) -> float:
        """Return a finite number."""
        return self._number(key, self.values[key])

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite numbers."""
        return tuple(self._number(key, value) for value in self.sequence(key))

    def rows(self, key: str) -> tuple[tuple[float, ...], ...]:
        """Return a list of lists of finite numbers."""
        return tuple(
            tuple(self._number(key, value) for value in self._sequence(key, row))
            for row in self.sequence(key)
        )

    def sequence(self, key: str) -> Sequence[Any]:
        """Return a list."""
        return self._sequence(key, self.values[key])

    def entries(self, key: str, kind: str) -> Iterator[tuple[str, Entry]]:
        """Iterate over the objects of an object, with their names.

        Args:
            key: of the object.
            kind: of what it holds, for messages: ``"space"``.
        """
        values = self.values[key]
        if not isinstance(values, Mapping):
            raise self._unfit(key, f"an object, which maps each {kind} to an object", values)
        for name, value in values.items():
            yield str(name), self.entry(value, f"{kind} {name!r}")

    def entry(self, value: Any, where: str) -> Entry:
        """Return a value of this document, which has to be an object, with its place."""
        if not isinstance(value, Mapping):
            raise self._error(f"{where} must be an object {{…}}; got {shortened(value)}")
        return Entry(value, self.what, where)

    def _sequence(self, key: str, value: Any) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            raise self._unfit(key, "a list", value)
        return value

    def _whole(self, key: str, value: Any) -> int:
        try:
            number = _LARGEST if isinstance(value, bool) else index(value)
        except TypeError:
            number = _LARGEST
        if abs(number) >= _LARGEST:
            raise self._unfit(key, "a whole number", value)
        return number

    def _number(self, key: str, value: Any) -> float:
        try:
            number = float(value) if isinstance(value, int | float) else nan
        except OverflowError:
            number = nan
        if isinstance(value, bool) or not isfinite(number):
            raise self._unfit(key, "a finite number", value)
        return number

    def _unfit(self, key: str, expected: str, value: Any) -> PlanError:
        place = f"{key!r} of {self.where}" if self.where else repr(key)
        return self._error(f"{place} must be {expected}; got {shortened(value)}")

    def _error(self, problem: str) -> PlanError:
        return PlanError(f"not a {self.what}: {problem}")


def parsed(text: str, what: str) -> Any:
    """Return what a JSON text says.

    Args:
        text: to read.
        what: it should be, for messages: ``"plan"``.

    Raises:
        PlanError: if the text is not JSON, or an object in it has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise PlanError(f"not a {what}: the key {twice!r} stands twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except PlanError:
        raise
    except (ValueError, RecursionError) as error:  # of numbers too long, objects too deep as well
        raise PlanError(f"not a {what}: the text is not JSON ({error})") from error


def document(data: Any, what: str, kind: str, version: int) -> Entry:
    """Return a document, if it is of a kind and version that is known.

    Args:
        data: what was parsed.
        what: it should be, for messages: ``"plan"``.
        kind: its ``"format"``.
        version: its ``"version"``.

    Raises:
        PlanError: if it is something else.
    """
    if not isinstance(data, Mapping):
        raise PlanError(f"not a {what}: expected a JSON object, got {type(data).__name__}")
    if data.get("format") != kind or data.get("version") != version:
        raise PlanError(
            f"not a {what}: format {shortened(data.get('format'))} version "
            f"{shortened(data.get('version'))}, expected {kind!r} version {version}"
        )
    return Entry(data, what)
