"""Example inputs: how a forward is called, and what is known of it where nobody says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.inception import Inception3
from torchvision.models.optical_flow import RAFT
from torchvision.models.video import MViT, SwinTransformer3d, VideoResNet

from torchcap.errors import ExampleInputsError
from torchcap.nests import tensors_in

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Example inputs of a forward, by position and by name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def as_inputs(example_inputs: ExampleInputs) -> Inputs:
    """Sort example inputs into positional and keyword arguments.

    Raises:
        ExampleInputsError: if they are an array, words, or sizes in place of a tensor.
    """
    given: Any = example_inputs
    if isinstance(given, tuple | list) and {type(size) for size in given} == {int}:
        raise ExampleInputsError(
            f"example inputs are tensors, not their sizes: pass torch.zeros{tuple(given)}"
        )
    if isinstance(given, np.ndarray | str):
        raise ExampleInputsError(
            "example inputs are a tensor, a tuple of arguments, or a mapping of arguments by name; "
            f"got a {type(given).__name__}"
        )
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


def _bind(model: nn.Module, inputs: Inputs) -> inspect.BoundArguments:
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error


def flattened(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the tensors among the arguments of a forward, in the order of its signature.

    So the same arguments give the same list, whether they come by position or by name.

    Raises:
        ExampleInputsError: if the arguments don't fit the forward.
    """
    return list(tensors_in(arranged(model, inputs)))


def arranged(model: nn.Module, inputs: Inputs) -> list[Any]:
    """Return the arguments of a forward in the order of its signature."""
    bound = _bind(model, inputs)
    values: list[Any] = []
    for name, parameter in bound.signature.parameters.items():
        if name not in bound.arguments:
            continue
        value = bound.arguments[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            value = [value[key] for key in sorted(value)]
        values.append(value)
    return values
