"""The other side of branches on sizes.

A forward that asks how large its images are may take another way with others
(``if x.shape[-1] > 64: x = self.down(x)``). So where a comparison of such sizes has come out one
way, the forward is recorded once more with the other outcome, and both ways are read together: a
channel may be cut only if every reader on either way can follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torchcap.graph.trace import Traced, Tracer, Tracing

_MOST = 12
"""Comparisons of which the other side is read: each costs a recording."""


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
    unread = list(places)[_MOST:]
    known = [(graph.piece, graph.signature) for graph in tracing.graphs]
    longest = 4 * max(len(graph.graph.nodes) for graph in tracing.graphs)
    for place in list(places)[:_MOST]:
        try:
            found = tracer.record(turned={place}, longest=longest)
        except Exception:  # the other side refuses, as an assertion does, or does not fit
            continue
        for graph in found.graphs:
            told = graph.piece, graph.signature
            if told not in known:
                known.append(told)
                graphs.append(replace(graph, turned=True))
    return graphs, unread
