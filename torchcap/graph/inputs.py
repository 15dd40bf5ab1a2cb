"""Example inputs: how a forward is called, and what is known of it where nobody says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.inception import Inception3
from torchvision.models.optical_flow import RAFT
from torchvision.models.video import MViT, SwinTransformer3d, VideoResNet

from torchcap.errors import ExampleInputsError

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Example inputs of a forward, by position and by name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def as_inputs(example_inputs: ExampleInputs) -> Inputs:
    """Sort example inputs into positional and keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, tuple | list):
        return Inputs(tuple(example_inputs), {})
    return Inputs((example_inputs,), {})


def default_inputs(model: nn.Module) -> Inputs:
    """Return one zero image of the size that a timm or torchvision model was made for.

    Raises:
        ExampleInputsError: if the model carries no sign of its input size.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size: Sequence[int] | None = config.get("input_size") if isinstance(config, Mapping) else None
    if size is None and type(model).__module__.startswith("torchvision.models"):
        size = _torchvision_input_size(model)
    if size is None:
        raise ExampleInputsError(
            f"the input shape of {type(model).__name__!r} is not known: it has no timm "
            "pretrained_cfg and is no torchvision model; pass example_inputs=torch.zeros(...)"
        )
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    image = torch.zeros(1, *size, dtype=parameter.dtype, device=parameter.device)
    return Inputs((image, image) if isinstance(model, RAFT) else (image,), {})


def _torchvision_input_size(model: nn.Module) -> tuple[int, ...]:
    if isinstance(model, VideoResNet):
        return (3, 16, 112, 112)
    if isinstance(model, MViT | SwinTransformer3d):
        return (3, 16, 224, 224)
    if isinstance(model, RAFT):
        return (3, 128, 128)
    if isinstance(model, Inception3):
        return (3, 299, 299)
    if isinstance(model, VisionTransformer):
        return (3, model.image_size, model.image_size)
    return (3, 224, 224)


def frozen_arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Freeze the arguments that are no tensors, defaults too, so that branches on them trace."""
    bound = _bind(model, inputs)
    bound.apply_defaults()
    variadic = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return {
        name: bound.arguments[name]
        for name, parameter in bound.signature.parameters.items()
        if parameter.kind not in variadic and not _holds_tensor(bound.arguments[name])
    }


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _bind(model: nn.Module, inputs: Inputs) -> inspect.BoundArguments:
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error


def placeholder_values(model: nn.Module, inputs: Inputs) -> list[Any]:
    """Return a value for every placeholder: the graph has them in the order of the signature."""
    bound = _bind(model, inputs)
    bound.apply_defaults()
    values: list[Any] = []
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            values.extend(bound.arguments[name])
        else:
            values.append(bound.arguments[name])
    return values
