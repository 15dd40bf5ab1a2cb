"""Putting rewritten forwards into a model, where the numbers in them must follow channels."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from torchcap.graph.rewritten import is_rewritten
from torchcap.graph.spaces import SpaceGraph
from torchcap.graph.trace import holds


def rewrite_(model: nn.Module, graph: SpaceGraph, spaces: Collection[str]) -> None:
    """Rewrite the forwards in which a number counts channels of one of the spaces, in place.

    The number may stand there for a size that follows other spaces, of which a layer inside of the
    module holds channels; so these count as well.

    Args:
        model: the one that was read, or its folded copy.
        graph: its spaces.
        spaces: names of those that get a smaller rank.
    """
    counting = {
        size.place.module
        for size in graph.sizes
        if size.place.new is not None and any(name in spaces for name, _ in size.counted.parts)
    }
    changed = {
        port.module
        for name in spaces
        for port in (*graph[name].producers, *graph[name].carriers, *graph[name].consumers)
    }
    around = {
        r.module
        for r in graph.rewritings
        if r.module in changed or any(holds(r.module, path) for path in changed)
    }
    rewrite_forwards_(model, graph, counting | around)


def rewrite_alike_(model: nn.Module, graph: SpaceGraph, other: nn.Module) -> None:
    """Rewrite the forwards that are rewritten in another model, in place."""
    kinds = dict(other.named_modules())
    paths = {
        r.module for r in graph.rewritings if r.module in kinds and is_rewritten(kinds[r.module])
    }
    rewrite_forwards_(model, graph, paths)


def rewrite_forwards_(model: nn.Module, graph: SpaceGraph, paths: Collection[str]) -> None:
    """Rewrite the forwards of some modules, in place.

    Args:
        model: the one that was read, or a copy.
        graph: its spaces.
        paths: qualified names of the modules; one without a rewriting is left as it is.
    """
    for rewriting in graph.rewritings:
        if rewriting.module in paths:
            module = model.get_submodule(rewriting.module)
            if not is_rewritten(module):
                rewriting.apply_(module)
