"""Sizes that escape: uses of a module's integers that leave nothing in a traced graph.

A :class:`~torchcap.graph.sizes.Size` notes what Python does with it, but not what C does:
``torch.tensor(self.head_dim)``, ``math.log(self.head_dim)``. So a forward whose sizes are to change
is traced once more, with a proxy in the place of each of them. The graph has to be the same but for
these; where it is not, or cannot be traced any longer, the sizes are used in other ways too.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from torchcap.graph.inputs import frozen_arguments
from torchcap.graph.sizes import Place
from torchcap.graph.trace import GraphReader, LeafRule, Traced, holds, joined, set_mode, shadow


def escaped_sizes(
    model: nn.Module, graphs: Sequence[Traced], places: Collection[Place], is_leaf: LeafRule
) -> set[Place]:
    """Return those of some places whose sizes the forwards use in ways that graphs don't show."""
    escaped: set[Place] = set()
    for graph in graphs:
        if graph.inputs is None or _is_seen(model, graph, places, is_leaf):
            continue
        by_name: dict[str, set[Place]] = {}
        for place in places:
            by_name.setdefault(place.name, set()).add(place)
        for group in by_name.values():
            if not _is_seen(model, graph, group, is_leaf):
                escaped |= group
    unseen = [graph.piece for graph in graphs if graph.alone]
    return escaped | {
        place
        for place in places
        if any(piece == place.module or holds(piece, place.module) for piece in unseen)
    }


@dataclass(frozen=True, slots=True)
class _Hidden:
    """Stands for an attribute until it is read: then it is proxies."""

    value: Any
    places: tuple[Place, ...]


class _ProxyReader(GraphReader):
    """A tracer that gives proxies for some sizes."""

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return what a module's attribute is to the traced forward."""
        if not isinstance(attr_val, _Hidden):
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        value = attr_val.value
        proxies = {
            place.index: self.create_proxy("get_attr", str(place), (), {})
            for place in attr_val.places
        }
        if None in proxies:
            return proxies[None]
        return type(value)(proxies.get(index, size) for index, size in enumerate(value))


def _is_seen(model: nn.Module, graph: Traced, places: Collection[Place], is_leaf: LeafRule) -> bool:
    """Whether a forward with proxies for sizes is the same program."""
    assert graph.inputs is not None  # noqa: S101 - the caller has looked
    copied = shadow(model)
    set_mode(copied, training=graph.mode == "train")
    _hide_(copied, places)  # all other sizes are plain integers now
    prefix = f"{graph.piece}."
    reader = _ProxyReader(is_leaf, {path.removeprefix(prefix) for path in graph.unread})
    concrete = frozen_arguments(model.get_submodule(graph.piece), graph.inputs)
    try:
        with warnings.catch_warnings(action="ignore"):
            traced = reader.trace(copied.get_submodule(graph.piece), concrete_args=concrete)
    except Exception:  # whatever cannot be done with a proxy
        return False
    sizes = {str(place): place.get(model) for place in places}
    ours = list(_program(traced, sizes, graph.piece))
    return ours == list(_program(graph.module.graph, {}, ""))


def _hide_(model: nn.Module, places: Collection[Place]) -> None:
    """Take sizes out of their modules, so that every read of them goes through the tracer."""
    attributes: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        attributes.setdefault((place.module, place.name), []).append(place)
    for (path, name), held in attributes.items():
        module: Any = model.get_submodule(path)
        # What a module's dictionary lacks is looked for among its tensors, by a method that the
        # tracer replaces.
        module._buffers[name] = _Hidden(vars(module).pop(name), tuple(held))


def _program(graph: fx.Graph, sizes: Mapping[str, int], piece: str) -> Iterator[tuple[Any, ...]]:
    """Yield what a graph does, with numbers in the place of sizes and of their products."""
    known: dict[fx.Node, Any] = {}
    numbers = itertools.count()

    def told(value: Any) -> Any:
        return known[value] if isinstance(value, fx.Node) else value

    for node in graph.nodes:
        if node.op == "get_attr" and node.target in sizes:
            known[node] = sizes[node.target]
            continue
        factors = [told(value) for value in node.args]
        if node.target is operator.mul and factors and all(isinstance(f, int) for f in factors):
            known[node] = operator.mul(*map(int, factors))
            continue
        known[node] = f"node {next(numbers)}"
        target = str(node.target)
        target = joined(piece, target) if node.op in {"call_module", "get_attr"} else target
        yield node.op, target, str(fx.node.map_arg((node.args, dict(node.kwargs)), told))
