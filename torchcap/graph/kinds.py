"""Which modules a forward asks for their class: they have to keep it.

A norm that folds becomes an ``nn.Identity``; a module whose weights are projected, or whose forward
is rewritten, gets a class made of its own one. ``isinstance(self.norm, nn.BatchNorm2d)`` and
``type(self.conv) is nn.Conv2d`` then answer differently, and no recording sees the question. So the
proof of a reading runs a model with such classes; where it fails, they are tried one by one.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchcap.graph.proof import Kind, Kinds, other_inputs, output_of, probe, same
from torchcap.graph.spaces import SpaceGraph
from torchcap.graph.trace import Tracer, on_meta


@dataclass(frozen=True, slots=True)
class Asked:
    """The modules whose class a forward asks for.

    Attributes:
        norms: that must not fold.
        layers: that stay as they are, and whose forward is not rewritten, with the reason.
    """

    norms: frozenset[str] = frozenset()
    layers: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Asked) -> Asked:
        return Asked(self.norms | other.norms, {**self.layers, **other.layers})


NOTHING_ASKED = Asked()


def later_kinds(model: nn.Module, graph: SpaceGraph, rewritten: Iterable[str]) -> Kinds:
    """Return the modules that will have another class, with one that does what theirs does.

    Args:
        model: any module.
        graph: its spaces; what is free will be projected, and what folds will be folded.
        rewritten: the modules whose forward may be rewritten.
    """
    changed = set(rewritten)
    for space in graph.spaces:
        ports = (*space.producers, *space.carriers, *space.consumers)
        changed |= {port.module for port in ports if space.free}
    kinds = {path: _made_of(type(model.get_submodule(path))) for path in sorted(changed)}
    for fold in graph.folds:
        path = fold.layer if fold.norm is None else fold.norm
        base = nn.Conv2d if fold.norm is None else nn.Identity
        kinds[path] = _no_longer(type(model.get_submodule(path)), base)
    return kinds


def asked_kinds(tracer: Tracer, kinds: Kinds, graph: SpaceGraph) -> Asked:
    """Return the modules whose class the forward asks for.

    Nothing if the model does not run on random inputs.

    Args:
        tracer: has recorded the model, which is not changed.
        kinds: the classes that modules will have.
        graph: the spaces of the model.
    """
    if on_meta(tracer.model):
        return NOTHING_ASKED
    for inputs in other_inputs(tracer):
        expected = output_of(tracer, probe(tracer), inputs)
        if expected is not None:
            break
    else:
        return NOTHING_ASKED

    def differs(paths: Sequence[str]) -> bool:
        found = output_of(tracer, probe(tracer, {path: kinds[path] for path in paths}), inputs)
        return found is None or not same(found, expected)

    def guilty(paths: Sequence[str]) -> Sequence[str]:
        """Return those that make a difference, each alone or, if none does, all together."""
        if not paths or not differs(paths):
            return []
        half = len(paths) // 2
        return [*guilty(paths[:half]), *guilty(paths[half:])] or paths if half else paths

    asked = guilty(list(kinds))
    norms = frozenset(fold.norm for fold in graph.folds if fold.norm) & set(asked)
    layers = {path: f"the forward asks for the class of {path!r}" for path in asked}
    return Asked(norms, {path: why for path, why in layers.items() if path not in norms})


def _made_of(kind: Kind) -> Kind:
    """Return a class as ``parametrize`` makes it."""
    return types.new_class(f"Parametrized{kind.__name__}", (kind,))


def _no_longer(kind: Kind, base: Kind) -> Kind:
    """Return a class that does what another one does, and is none of its kind."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        twin = object.__new__(kind)
        vars(twin).update(vars(self))
        return kind.forward(twin, *args, **kwargs)

    return types.new_class(base.__name__, (base,), {}, lambda names: names.update(forward=forward))
