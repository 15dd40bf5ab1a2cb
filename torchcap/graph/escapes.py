"""Sizes that escape: what C makes of a number of channels leaves nothing in a graph.

``range(n)``, ``int(n)``, ``[0] * n``, ``numpy.zeros(n)`` take the integer and are gone. So a forward
whose numbers of channels are to change is recorded once more, with sizes that lie to C and to
nobody else. The graph has to be the same; where it is not, or where the forward fails, the sizes
are used in ways that could not follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchcap.graph.channels import Ids
from torchcap.graph.trace import Signature, Tracer, Tracing


@dataclass(frozen=True, slots=True, eq=False)
class Silent:
    """A size that follows channels.

    Attributes:
        key: what the recorder calls it.
        name: of the attribute, or the place in the code where it is read.
        ids: the channels that it counts.
    """

    key: tuple[Any, ...]
    name: str
    ids: Ids


def escaped_sizes(tracer: Tracer, tracing: Tracing, sizes: Sequence[Silent]) -> list[Silent]:
    """Return those of some sizes that forwards use in ways which graphs don't show."""
    if not sizes or _is_same(tracer, tracing, sizes):
        return []
    groups: dict[str, list[Silent]] = {}
    for size in sizes:
        groups.setdefault(size.name.rpartition(".")[2], []).append(size)
    return [
        size for group in groups.values() if not _is_same(tracer, tracing, group) for size in group
    ]


def _is_same(tracer: Tracer, tracing: Tracing, sizes: Sequence[Silent]) -> bool:
    """Whether the forwards are the same programs with sizes that lie."""
    lies = {size.key for size in sizes}
    for mode in ("eval", "train"):
        known = [graph.signature for graph in tracing.graphs if graph.mode == mode]
        if not known or (mode == "train" and tracing.alone):
            continue
        try:
            found = tracer.record(training=mode == "train", lies=lies)
        except Exception:  # whatever a wrong number leads to
            return False
        if not all(told in found_ for told in known for found_ in [_signatures(found.graphs)]):
            return False
    return True


def _signatures(graphs: Sequence[Any]) -> list[Signature]:
    return [graph.signature for graph in graphs]
