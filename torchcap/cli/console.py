"""What commands show: their results, and bars while they work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

from torchcap import processes
from torchcap.training.progress import Progress


@dataclass(frozen=True, slots=True)
class Result:
    """What a command has to say.

    Attributes:
        text: for people.
        data: for ``--json``.
    """

    text: str
    data: Mapping[str, Any]


class Bars:
    """A bar on stderr for each step of the work; none where stderr is no terminal.

    Args:
        quiet: draw nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._name = ""
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        """Draw where learning stands; see :data:`torchcap.training.progress.OnProgress`."""
        if self._bar is None or self._name != progress.name:
            self.close()
            self._bar = self._new(progress.name, progress.steps)
        self._bar.set_postfix(loss=f"{progress.loss:.3g}", refresh=False)
        self._bar.update(progress.step - self._bar.n)
        if progress.step == progress.steps:
            self.close()

    def over(self, items: Iterable[Any], name: str) -> Iterable[Any]:
        """Iterate over some items, with a bar."""
        self.close()
        self._bar = self._new(name, None, items)
        yield from self._bar
        self.close()

    def close(self) -> None:
        """Finish the bar that is drawn."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _new(self, name: str, total: int | None, items: Iterable[Any] | None = None) -> Any:
        self._name = name
        off = True if self._quiet or processes.rank() > 0 else None  # None: but on a terminal
        return tqdm(items, desc=name, total=total, disable=off, dynamic_ncols=True)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        for first, *others in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
