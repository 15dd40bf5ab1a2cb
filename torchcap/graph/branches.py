"""Ways through a forward that the example does not take.

A forward that asks how large its images are may take another way with others
(``if x.shape[-1] > 64: x = self.down(x)``). So where a comparison of such sizes has come out one
way, the forward is recorded once more with the other outcome, and both ways are read together: a
channel may be cut only if every reader on either way can follow. One recording turns as many
comparisons as it can: first those that the code shows, then those inside of functions, as einops
checks what it is given. Where that fails, the halves of them are turned apart.

A forward may also ask whether gradients are on, or for what an earlier forward has left in its
module. Then it is recorded so, too.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchcap.errors import ExampleInputsError
from torchcap.graph.trace import Traced, Tracer, Tracing, different

_MOST = 12
"""Recordings that are made to read other sides."""


def other_sides(
    tracer: Tracer, tracing: Tracing, places: Sequence[str]
) -> tuple[list[Traced], list[str]]:
    """Read what a forward would do if comparisons of sizes came out otherwise.

    Args:
        tracer: records the forward.
        tracing: what has been read of it.
        places: of the comparisons.

    Returns:
        the graphs that are new; and the places whose other side has not been read, and may run.
    """
    graphs: list[Traced] = []
    unread: list[str] = []
    longest = 4 * max(len(graph.graph.nodes) for graph in tracing.graphs)
    own = [place for place in places if _COMPARISON.search(place)]
    inner = [place for place in places if place not in own]  # of what a function checks, as einops
    waiting = deque(some for some in (own, inner) if some)
    for _ in range(_MOST):
        if not waiting:
            break
        some = waiting.popleft()
        try:
            found = tracer.record(turned=set(some), longest=longest)
        except Exception as error:  # the other side refuses, as an assertion does, or does not fit
            halves = some[: len(some) // 2], some[len(some) // 2 :]
            waiting.extend(half for half in halves if len(some) > 1)
            if len(some) == 1 and not _is_refusal(error):
                unread += some
            continue
        missed = [place for place in some if place not in found.record.branches]
        if 0 < len(missed) < len(some):  # another one led past them
            waiting.append(missed)
        graphs += _turned(found.graphs, [*tracing.graphs, *graphs])
    return graphs, [*unread, *(place for some in waiting for place in some)]


_COMPARISON = re.compile(r"[=!<>]=|(?<!-)[<>]| (in|if|not|and|or) ")


def _is_refusal(error: BaseException) -> bool:
    """Whether a forward has raised an error of its own, or wants endless recordings."""
    cause = error.__cause__ if isinstance(error, ExampleInputsError) else error
    if cause is None or isinstance(cause, AssertionError | RecursionError):
        return True
    frame = cause.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = "" if frame is None else frame.tb_frame.f_globals.get("__name__", "")
    return where.partition(".")[0] not in {"torch", "torchcap"}


def other_calls(tracer: Tracer, tracing: Tracing) -> list[Traced]:
    """Read what forwards do with gradients, or when they are called again, if they ask for that.

    Args:
        tracer: records the forward; else gradients are off, and every copy is fresh.
        tracing: what has been read of it.
    """
    graphs: list[Traced] = []
    circumstances: list[dict[str, Any]] = [{"gradients": True}] * tracing.graded
    circumstances += [{"earlier": 1}, {"earlier": 2}] * tracing.changing
    for mode in sorted({graph.mode for graph in tracing.graphs}):
        for other in circumstances:
            fresh: list[Traced] = []
            with contextlib.suppress(Exception):  # it may want parameters that have gradients
                found = tracer.record(training=mode == "train", **other)
                fresh = _turned(found.graphs, [*tracing.graphs, *graphs])
            graphs += fresh
            if "earlier" in other and not fresh:
                break
    return graphs


def _turned(graphs: Sequence[Traced], known: Sequence[Traced]) -> list[Traced]:
    return [replace(graph, turned=True) for graph in different(graphs, known)]
