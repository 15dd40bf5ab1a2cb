"""Which modules a forward asks what they are: those have to stay what they are.

A norm that folds becomes an ``nn.Identity``, and its layer may get a bias; a layer that is
projected is parametrized; a module with a rewritten forward has a class made of its own one. Then
``isinstance(self.norm, nn.BatchNorm2d)``, ``hasattr``, ``self.conv.bias is None`` and
``named_parameters()`` answer differently, and no recording sees the question. So the proof of a
reading runs a model that is changed like this, and computes what it did before; where it does not,
the changes are tried one by one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchcap.graph.proof import Change, Changes, other_inputs, output_of, probe, same
from torchcap.graph.spaces import SpaceGraph
from torchcap.graph.trace import Tracer, on_meta

Kind = type[nn.Module]


@dataclass(frozen=True, slots=True)
class Asked:
    """The modules of which a forward asks what they are.

    Attributes:
        norms: that must not fold.
        layers: that stay as they are, and whose forward is not rewritten, with the reason.
    """

    norms: frozenset[str] = frozenset()
    layers: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Asked) -> Asked:
        return Asked(self.norms | other.norms, {**self.layers, **other.layers})


NOTHING_ASKED = Asked()


def changes_of(graph: SpaceGraph, rewritten: Iterable[str]) -> Changes:
    """Return how modules will be changed, by their names: into what does the same as before.

    Args:
        graph: the spaces of a model; what is free will be projected, and what folds will be folded.
        rewritten: the modules whose forward may be rewritten.
    """
    tensors: dict[str, set[str]] = {}
    for space in graph.spaces:
        for port in (*space.producers, *space.carriers, *space.consumers) if space.free else ():
            tensors.setdefault(port.module, set()).add(port.parameter)
    biased = {fold.layer: fold.axis for fold in graph.folds if fold.norm is not None}
    changes: dict[str, Change] = dict.fromkeys(rewritten, _derive_)
    for path in sorted(tensors.keys() | biased):
        names = sorted(tensors.get(path, ()))
        changes[path] = partial(_project_, names=names, biased=biased.get(path))
    for fold in graph.folds:
        if fold.norm is None:
            changes[fold.layer] = _become_plain_
        else:
            changes[fold.norm] = _empty_
    return changes


def asked_of(tracer: Tracer, changes: Changes, graph: SpaceGraph) -> Asked:
    """Return the modules of which the forward asks what they are.

    Nothing if the model does not run on random inputs.

    Args:
        tracer: has recorded the model, which is not changed.
        changes: how modules will be changed.
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
        found = output_of(tracer, probe(tracer, {path: changes[path] for path in paths}), inputs)
        return found is None or not same(found, expected)

    def guilty(paths: Sequence[str]) -> Sequence[str]:
        """Return those that make a difference, each alone or, if none does, all together."""
        if not paths or not differs(paths):
            return []
        half = len(paths) // 2
        return [*guilty(paths[:half]), *guilty(paths[half:])] or paths if half else paths

    asked = guilty(list(changes))
    norms = frozenset(fold.norm for fold in graph.folds if fold.norm) & set(asked)
    layers = {path: f"the forward asks what {path!r} is, or holds" for path in asked}
    return Asked(norms, {path: why for path, why in layers.items() if path not in norms})


class _Same(nn.Module):
    """A projection that changes nothing, with a parameter as projections have it."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.P = nn.Parameter(like.new_zeros(1), requires_grad=False)

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)


def _project_(module: nn.Module, names: Sequence[str], biased: int | None) -> None:
    """Parametrize tensors of a module, whose class becomes one made of its own.

    Args:
        module: of a copy of a model.
        names: of the tensors.
        biased: the axis of its weight along which it gets a bias, if it has none.
    """
    held: Any = module
    if biased is not None and held.bias is None:
        width = held.weight.shape[biased]
        module.bias = nn.Parameter(held.weight.new_ones(width), requires_grad=False)
        _derive_(module, _without_bias(type(module)))
    for name in names:
        same = _Same(getattr(module, name))
        parametrize.register_parametrization(module, name, same, unsafe=True)


def _without_bias(kind: Kind) -> Callable[..., Any]:
    """Return a forward that computes what a layer without its bias does."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bias, self._parameters["bias"] = self._parameters["bias"], None
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            self._parameters["bias"] = bias

    return forward


def _derive_(module: nn.Module, forward: Callable[..., Any] | None = None) -> None:
    """Let a module have a class made of its own one, and perhaps another forward."""
    kind = type(module)
    own = {} if forward is None else {"forward": forward}
    module.__class__ = types.new_class(kind.__name__, (kind,), {}, lambda names: names.update(own))


def _empty_(norm: nn.Module) -> None:
    """Turn a norm into an identity that holds nothing, and does what the norm does."""
    _become_(norm, nn.Identity, vars(nn.Identity()))


def _become_plain_(layer: nn.Module) -> None:
    """Turn a layer that standardises its weight into a plain one, in place."""
    _become_(layer, nn.Conv2d, vars(layer))


def _become_(module: nn.Module, base: Kind, held: Mapping[str, Any]) -> None:
    kind = type(module)
    twin = object.__new__(kind)
    vars(twin).update(vars(module))
    hooks = {name: value for name, value in vars(module).items() if "hook" in name}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        twin.training = self.training
        return kind.forward(twin, *args, **kwargs)

    new = types.new_class(base.__name__, (base,), {}, lambda names: names.update(forward=forward))
    module.__class__ = new
    held = {**held, **hooks, "training": module.training}
    vars(module).clear()
    vars(module).update(held)
