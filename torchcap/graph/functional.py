"""Rules of functions that are called with a layer's own weights: they are that layer.

``F.linear(x, self.proj.weight, self.proj.bias)`` does what ``self.proj(x)`` does. Where weight and
settings are those of the layer, its rule is asked; a bias of another owner is a term that is added.
With any other weight the channels stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

from torchcap.graph.heads import follows
from torchcap.graph.operators import addition
from torchcap.graph.values import Call, Channels, Heads, Held, Value, Weight

FUNCTIONAL_CONVOLUTIONS: Mapping[Any, type[_ConvNd]] = {
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d,
    torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d,
}  # fmt: skip


def linear_function(call: Call) -> Value:
    """``F.linear``."""
    return _as_layer(call, ("input", "weight", "bias"), lambda layer: isinstance(layer, nn.Linear))


def convolution_function(call: Call) -> Value:
    """``F.conv2d`` and the like."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    kind = FUNCTIONAL_CONVOLUTIONS[call.node.target]

    def is_meant(layer: nn.Module) -> bool:
        if not isinstance(layer, kind) or layer.padding_mode != "zeros":
            return False
        dims = layer.weight.dim() - 2
        settings = [
            (
                _repeated(getattr(layer, name), dims),
                _repeated(call.argument(3 + index, name, default), dims),
            )
            for index, (name, default) in enumerate(
                (("stride", 1), ("padding", 0), ("dilation", 1))
            )
        ]
        same = all(own == given for own, given in settings)
        return same and call.argument(6, "groups", 1) == layer.groups

    return _as_layer(call, names, is_meant)


def layer_norm_function(call: Call) -> Value:
    """``F.layer_norm`` and ``F.rms_norm``."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")

    def is_meant(layer: nn.Module) -> bool:
        shape, given = getattr(layer, "normalized_shape", ()), call.argument(1, "normalized_shape")
        x = call.argument(0, "input")
        if len(shape) != 1 or len(given) != 1 or not isinstance(x, Channels):
            return False
        return follows(call, given[0], x.ids[None])  # a plain number could not

    return _as_layer(call, names, is_meant)


def batch_norm_function(call: Call) -> Value:
    """``F.batch_norm``, with statistics that are stored."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum")
    training = call.argument(5, "training", default=False)
    return _as_layer(call, names, lambda layer: not training and hasattr(layer, "running_mean"))


def group_norm_function(call: Call) -> Value:
    """``F.group_norm``."""
    names = ("input", "num_groups", "weight", "bias")
    groups = call.argument(1, "num_groups")
    return _as_layer(call, names, lambda layer: getattr(layer, "num_groups", None) == groups)


def _repeated(value: Any, dims: int) -> Any:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _as_layer(call: Call, names: tuple[str, ...], is_meant: Callable[[nn.Module], bool]) -> Value:
    """Ask the rule of the layer whose weights a function is given."""
    given = {name: call.argument(index, name) for index, name in enumerate(names)}
    held = {name: value for name, value in given.items() if isinstance(value, Weight)}
    owners = {value.module for value in held.values()}
    fits = len(owners) == 1 and all(value.name == name for name, value in held.items())
    if not fits or "weight" not in held:
        other = given.get("weight")
        whose = (
            f" (it is held by {other.module or 'the model'!r})" if isinstance(other, Held) else ""
        )
        return call.give_up(f"no rule for {call.label} with a weight that is no layer's own{whose}")
    (path,) = owners
    layer = call.layer_at(path)
    operator = call.operator_of(layer, patched=True)
    term = None if "bias" in held else given.get("bias")
    lacking = {n for n in _TENSORS if getattr(layer, n, None) is not None} - held.keys()
    added = term is not None and operator is not None and operator.kind == "linear"
    if operator is None or lacking or not is_meant(layer) or (term is not None and not added):
        return call.give_up(f"{call.label} with the weight of {path!r}, in another way than it")
    inner = replace(call, module=layer, path=path, args=(given["input"],), kwargs={})
    heads = isinstance(given["input"], Heads)
    rule = operator.heads if heads else operator.channels
    value = call.give_up(f"no rule for heads in {call.label}") if rule is None else rule(inner)
    return value if term is None else addition(replace(call, args=(value, term), kwargs={}))


_TENSORS = ("weight", "bias", "gain", "running_mean", "running_var")
