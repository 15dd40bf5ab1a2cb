"""Putting rewritten forwards into a model, where the numbers in them must follow channels."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from torchcap.graph.spaces import SpaceGraph
from torchcap.transform.fold import replace_


def rewrite_(model: nn.Module, graph: SpaceGraph, spaces: Collection[str]) -> None:
    """Rewrite the forwards in which a number counts channels of one of the spaces, in place.

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
    _rewrite_(model, graph, counting)


def rewrite_alike_(model: nn.Module, graph: SpaceGraph, other: nn.Module) -> None:
    """Rewrite the forwards that are rewritten in another model, in place."""
    kinds = dict(other.named_modules())
    paths = {r.module for r in graph.rewritings}
    _rewrite_(model, graph, {path for path in paths if isinstance(kinds.get(path), fx.GraphModule)})


def _rewrite_(model: nn.Module, graph: SpaceGraph, paths: Collection[str]) -> None:
    for rewriting in graph.rewritings:
        if rewriting.module in paths:
            module = model.get_submodule(rewriting.module)
            replace_(model, rewriting.module, rewriting.module_from(module))
