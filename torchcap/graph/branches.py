"""The other side of branches on sizes, and on whether gradients are on.

A forward that asks how large its images are may take another way with others
(``if x.shape[-1] > 64: x = self.down(x)``). So where a comparison of such sizes has come out one
way, the forward is recorded once more with the other outcome, and both ways are read together: a
channel may be cut only if every reader on either way can follow. One recording turns as many
comparisons as it can; where that fails, the halves of them are turned apart.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from torchcap.graph.trace import Traced, Tracer, Tracing

_MOST = 12
"""Recordings that are made to read other sides."""


def other_sides(
    tracer: Tracer, tracing: Tracing, places: Mapping[str, bool]
) -> tuple[list[Traced], list[str]]:
    """Read what a forward would do if comparisons of sizes came out otherwise.

    Args:
        tracer: records the forward.
        tracing: what has been read of it.
        places: of the comparisons, with their outcome.

    Returns:
        the graphs that are new; and the places whose other side has not been read.
    """
    graphs: list[Traced] = []
    known = [(graph.piece, graph.signature) for graph in tracing.graphs]
    longest = 4 * max(len(graph.graph.nodes) for graph in tracing.graphs)
    waiting = deque([list(places)] if places else [])
    for _ in range(_MOST):
        if not waiting:
            break
        some = waiting.popleft()
        try:
            found = tracer.record(turned=set(some), longest=longest)
        except Exception:  # the other side refuses, as an assertion does, or does not fit
            halves = some[: len(some) // 2], some[len(some) // 2 :]
            waiting.extend(half for half in halves if len(some) > 1)
            continue
        met = {str(branch.where) for branch in found.record.branches}
        missed = [place for place in some if place not in met]  # another one led past them
        if 0 < len(missed) < len(some):
            waiting.append(missed)
        for graph in found.graphs:
            told = graph.piece, graph.signature
            if told not in known:
                known.append(told)
                graphs.append(replace(graph, turned=True))
    return graphs, [place for some in waiting for place in some]


def sides_with_gradients(tracer: Tracer, tracing: Tracing) -> list[Traced]:
    """Read what forwards do when gradients are on, if they ask for that.

    Args:
        tracer: records the forward; else gradients are off.
        tracing: what has been read of it.
    """
    graphs: list[Traced] = []
    known = [(graph.piece, graph.signature) for graph in tracing.graphs]
    for mode in sorted({graph.mode for graph in tracing.graphs}) if tracing.graded else ():
        with contextlib.suppress(Exception):  # it may want parameters that have gradients
            for graph in tracer.record(training=mode == "train", gradients=True).graphs:
                told = graph.piece, graph.signature
                if told not in known:
                    known.append(told)
                    graphs.append(replace(graph, turned=True))
    return graphs
