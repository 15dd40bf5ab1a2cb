"""Sizes that escape: what C makes of a size leaves nothing in a graph.

``range(n)``, ``int(n)``, ``[0] * n``, ``numpy.zeros(n)`` take the integer and are gone. So a
forward is recorded once more, with sizes that lie to C and to nobody else. If the graph is the
same, nothing escapes. If not, or where the forward fails, it is found out whether numbers of
channels do, which then stay, or the sizes of batches and images, for which the forward is recorded
at others too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from torchcap.graph.channels import Ids
from torchcap.graph.inputs import Inputs
from torchcap.graph.sizes import Place
from torchcap.graph.trace import Traced, Tracer, Tracing
from torchcap.nests import mapped


@dataclass(frozen=True, slots=True, eq=False)
class Silent:
    """A size that follows channels.

    Attributes:
        key: what the recorder calls it.
        name: of the attribute, or the place in the code where it is read.
        group: what it has in common with those that code treats alike.
        ids: the channels that it counts.
        place: of the attribute; None for a size that is read from a tensor.
    """

    key: tuple[Any, ...]
    name: str
    group: str
    ids: Ids
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Escaped:
    """What has escaped.

    Attributes:
        channels: the sizes that follow channels.
        graphs: of batches and images of other sizes, as far as they are other programs.
    """

    channels: tuple[Silent, ...] = ()
    graphs: tuple[Traced, ...] = ()


def escaped_sizes(tracer: Tracer, tracing: Tracing, sizes: Sequence[Silent]) -> Escaped:
    """Find the sizes that forwards use in ways which graphs don't show."""
    measured = {dimension.key for dimension in tracing.dimensions}
    counts = {size.key for size in sizes}
    if not measured | counts or _is_same(tracer, tracing, measured | counts):
        return Escaped()
    graphs = tuple(_of_other_sizes(tracer, tracing)) if measured - counts else ()
    if not counts or _is_same(tracer, tracing, counts):
        return Escaped(graphs=graphs)
    groups: dict[str, list[Silent]] = {}
    for size in sizes:
        groups.setdefault(size.group, []).append(size)
    found = _those_that_escape(tracer, tracing, list(groups.values()))
    return Escaped(tuple(size for group in found for size in group), graphs)


_MOST = 40
"""Recordings that are made to find out which sizes escape; of the rest it is taken for granted."""


def _those_that_escape(
    tracer: Tracer, tracing: Tracing, groups: list[list[Silent]]
) -> list[list[Silent]]:
    """Return the groups that escape, of some of which one does: halves, again and again."""
    found: list[list[Silent]] = []
    waiting = [groups]
    for _ in range(_MOST):
        if not waiting:
            return found
        some = waiting.pop()
        if len(some) == 1:
            found += some
            continue
        halves = some[: len(some) // 2], some[len(some) // 2 :]
        for half in halves:
            same = _is_same(tracer, tracing, {size.key for group in half for size in group})
            waiting += [] if same else [half]
    return [*found, *(group for some in waiting for group in some)]


def _is_same(tracer: Tracer, tracing: Tracing, lies: Collection[tuple[Any, ...]]) -> bool:
    """Whether the forwards are the same programs with sizes that lie."""
    for mode in ("eval", "train"):
        known = [graph.signature for graph in tracing.graphs if graph.mode == mode]
        if not known or (mode == "train" and tracing.alone):
            continue
        try:
            found = tracer.record(training=mode == "train", lies=lies)
        except Exception:  # whatever a wrong number leads to
            return False
        again = [graph.signature for graph in found.graphs]
        if not all(signature in again for signature in known):
            return False
    return True


def _of_other_sizes(tracer: Tracer, tracing: Tracing) -> Iterator[Traced]:
    """Yield the graphs of other batches and images that are not those of the example."""
    known = [graph.outline for graph in tracing.graphs]
    for batch, image in _SIZES:
        try:
            found = tracer.record(inputs=_resized(tracer.inputs, batch, image))
        except Exception:  # the model is made for other sizes
            continue
        for graph in found.graphs:
            if graph.outline not in known:
                known.append(graph.outline)
                yield replace(graph, turned=True)


_SIZES = ((1, 1.0), (3, 1.0), (2, 0.5), (2, 2.0))
"""Numbers of images, and how large they are, that a forward is recorded for."""


def _resized(inputs: Inputs, batch: int, image: float) -> Inputs:
    """Return inputs of another batch size and other image sizes; their values don't matter."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        shape = list(value.shape)
        shape[0] = batch
        if value.dim() >= 4:
            shape[-2:] = [max(1, int(size * image)) for size in shape[-2:]]
        return value.new_zeros(shape)

    args, kwargs = mapped((inputs.args, dict(inputs.kwargs)), other)
    return Inputs(args, kwargs)
