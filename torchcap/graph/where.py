"""Where in the user's code something happened: file, line and expression."""

from __future__ import annotations

import linecache
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = str(Path(__file__).parents[1]) + os.sep
_FALLBACK = os.path.join(_TORCH, "nn", "modules") + os.sep
_MACHINERY = ("module.py", "container.py")
_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Where:
    """A place in source code.

    Attributes:
        code: the code that ran.
        instruction: offset of the instruction that was running.
        line: its line number.
    """

    code: CodeType
    instruction: int
    line: int

    @property
    def file(self) -> str:
        """Name of the file, without its folders."""
        return self.code.co_filename.rpartition(os.sep)[2]

    @property
    def expression(self) -> str:
        """The expression that was running, as it is written, shortened; empty if not known."""
        return _expression(self)

    def __str__(self) -> str:
        text = self.expression
        return f"{self.file}:{self.line}" + (f" ({text})" if text else "")


@cache
def _expression(where: Where) -> str:
    file = where.code.co_filename
    line, last, start, end = list(where.code.co_positions())[where.instruction // 2]
    if line is None or last is None or start is None or end is None:
        return linecache.getline(file, where.line).strip()[:_LONGEST]
    lines = [linecache.getline(file, number).encode() for number in range(line, last + 1)]
    if not lines[0]:
        return ""
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    text = " ".join(b" ".join(lines).decode(errors="replace").split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def here() -> Where | None:
    """Return the innermost place in the user's code: outside of torch, einops and torchcap."""
    frame: FrameType | None = sys._getframe(1)
    inner: FrameType | None = None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_TORCH):
            file = name.rpartition(os.sep)[2]
            if inner is None and name.startswith(_FALLBACK) and file not in _MACHINERY:
                inner = frame
        elif name.startswith(_OURS):
            if frame.f_code.co_name == "run_forward":  # what stands further out is not the model's
                break
        elif not frame.f_globals.get("__name__", "").startswith("einops."):
            return _where(frame)
        frame = frame.f_back
    return None if inner is None else _where(inner)


def _where(frame: FrameType) -> Where:
    return Where(frame.f_code, frame.f_lasti, frame.f_lineno)
