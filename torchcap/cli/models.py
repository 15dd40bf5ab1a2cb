"""MODEL: a name of timm or torchvision, or a saved file; its weights, and what images it takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import timm
import torch
import torchvision
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from torchcap.batches import seeded
from torchcap.checkpoint.builders import set_images_
from torchcap.checkpoint.load import describe, load
from torchcap.errors import FileError, ModelError
from torchcap.graph.inputs import default_inputs
from torchcap.transform.split import split_attention

if TYPE_CHECKING:
    from argparse import Namespace

_PREFIXES = {"timm": "timm", "torchvision": "torchvision", "tv": "torchvision"}
_NAMED = 5  # tensors, in a message


@dataclass(frozen=True, slots=True)
class Network:
    """A model, and what images it takes.

    Attributes:
        model: in evaluation mode.
        builder: ``"timm:resnet18"`` or ``"torchvision:resnet18"``.
        example: one zero image ``(1, channels, h, w)``, on the device of the model.
    """

    model: nn.Module
    builder: str
    example: Tensor

    def batch(self, size: int) -> Tensor:
        """Return zero images ``(size, channels, h, w)``."""
        return self.example.repeat(size, *(1 for _ in self.example.shape[1:]))

    def transform(self) -> Callable[[Any], Tensor]:
        """Return what makes an image of PIL ready for the model, as it was when it was tested."""
        library, _, name = self.builder.partition(":")
        size = tuple(self.example.shape[1:])
        if library == "timm":
            known = resolve_model_data_config(self.model)
            return create_transform(**{**known, "input_size": size})
        preset = _preset(name)
        if preset is None:
            return create_transform(size)
        if {*size[1:]} == {*preset.crop_size}:
            return preset
        return create_transform(
            size,
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            crop_pct=preset.crop_size[0] / preset.resize_size[0],
        )


def open_network(options: Namespace, *, trained: bool = True) -> Network:
    """Build the model that the arguments name.

    Args:
        options: ``model``, ``weights``, ``num_classes``, ``random_weights``, ``image_size``,
            ``device``, ``seed`` and ``split_attention``.
        trained: whether the command needs trained weights.

    Raises:
        ModelError: if there is no such model, or its weights are not to be had.
        FileError: if a file cannot be read, or holds weights of another model.
        ExampleInputsError: if nobody knows what images the model takes.
    """
    builder = _builder(options.model)
    if builder is None:
        return _saved(options)
    chosen = options.random_weights or options.weights is not None
    pretrained = trained and not chosen
    if pretrained and options.num_classes is not None:
        raise ModelError(
            f"the pretrained weights of {options.model!r} have no classifier of "
            f"{options.num_classes} classes; give --weights FILE that has, or leave --num-classes"
        )
    with seeded(options.seed):
        model = _built(builder, options, pretrained=pretrained)
    if options.weights is not None:
        load_weights_(model, options.weights)
    if getattr(options, "split_attention", False):  # some commands read no spaces
        model = split_attention(model)
    size = None if options.image_size is None else (3, options.image_size, options.image_size)
    return _network(model, builder, options, size)


def load_weights_(model: nn.Module, path: Path) -> None:
    """Give a model the weights of a file, in place.

    Args:
        model: the model.
        path: of a safetensors file, or of a state dict that ``torch.load`` reads without running
            code; a state dict under ``"state_dict"`` or ``"model"`` is found.

    Raises:
        FileError: if the file cannot be read, or its tensors are not those of the model.
    """
    state = _state(path)
    own = model.state_dict()
    differences = [
        *(f"{name!r} is missing" for name in own if name not in state),
        *(f"{name!r} is in the file alone" for name in state if name not in own),
        *(
            f"{name!r} has shape {tuple(own[name].shape)} in the model, "
            f"{tuple(state[name].shape)} in the file"
            for name in own
            if name in state and own[name].shape != state[name].shape
        ),
    ]
    if differences:
        some = "\n".join(f"  {line}" for line in differences[:_NAMED])
        more = f"\n  … and {len(differences) - _NAMED} more" if differences[_NAMED:] else ""
        raise FileError(
            f"{str(path)!r} does not hold the weights of this {type(model).__name__!r}:\n"
            f"{some}{more}\nIs it another model, or another --num-classes?"
        )
    model.load_state_dict(state)


def _builder(name: str) -> str | None:
    """Return the library and the name of a model; None for a file."""
    prefix, _, own = name.partition(":")
    if prefix in _PREFIXES and own:
        library = _PREFIXES[prefix]
        known = timm.is_model(own) if library == "timm" else own in torchvision.models.list_models()
        if known:
            return f"{library}:{own}"
    elif Path(name).is_file() or name.endswith(".safetensors"):
        return None
    elif timm.is_model(name):
        return f"timm:{name}"
    names = [*timm.list_models(), *(f"torchvision:{n}" for n in torchvision.models.list_models())]
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {', '.join(map(repr, close))}?" if close else "see timm.list_models()"
    raise ModelError(
        f"there is no model {name!r}: give a name of timm ('resnet18'), of torchvision "
        f"('torchvision:resnet18'), or a file that torchcap has saved; {hint}"
    )


def _saved(options: Namespace) -> Network:
    if options.weights is not None or options.random_weights or options.num_classes is not None:
        raise ModelError(
            f"{options.model!r} holds a model with its weights; leave out --weights, "
            "--random-weights and --num-classes"
        )
    path = Path(options.model)
    contents, model = describe(path), load(path)
    size = contents.notes.get("input_size")
    if options.image_size is not None:
        size = (3, options.image_size, options.image_size)
    builder = "" if contents.builder is None else contents.builder.name
    return _network(model, builder, options, size)


def _network(
    model: nn.Module, builder: str, options: Namespace, size: tuple[int, ...] | None
) -> Network:
    model = model.eval().to(options.device)
    if size is None:
        return Network(model, builder, default_inputs(model).args[0])
    set_images_(model, {"input_size": size})  # what timm knows is saved with the model
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return Network(model, builder, torch.zeros(1, *size, dtype=dtype, device=options.device))


def _built(builder: str, options: Namespace, *, pretrained: bool) -> nn.Module:
    library, _, name = builder.partition(":")
    make = _timm_maker(name, options) if library == "timm" else _torchvision_maker(name, options)
    try:
        return make(pretrained)
    except Exception as error:  # whatever a builder, or a download, raises
        reason = f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        if not pretrained:
            raise ModelError(f"{builder!r} cannot be built {reason}") from error
        raise ModelError(
            f"the pretrained weights of {builder!r} are not to be had {reason}; give --weights "
            "FILE, or --random-weights to try out"
        ) from error


def _timm_maker(name: str, options: Namespace) -> Callable[[bool], nn.Module]:
    arguments: dict[str, Any] = {}
    if options.num_classes is not None:
        arguments["num_classes"] = options.num_classes
    config = timm.get_pretrained_cfg(name)
    if options.image_size is not None and config is not None and config.fixed_input_size:
        arguments["img_size"] = options.image_size
    return lambda pretrained: timm.create_model(name, pretrained=pretrained, **arguments)


def _torchvision_maker(name: str, options: Namespace) -> Callable[[bool], nn.Module]:
    builder = torchvision.models.get_model_builder(name)
    arguments: dict[str, Any] = {}
    if options.num_classes is not None:
        arguments["num_classes"] = options.num_classes
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments["weights_backbone"] = None
    make = partial(builder, **arguments)
    return lambda pretrained: make(weights="DEFAULT" if pretrained else None)


def _preset(name: str) -> Any:
    """Return the transform of torchvision's weights, if it is that of a classifier."""
    try:
        weights = torchvision.models.get_model_weights(name)
        preset = weights.DEFAULT.transforms()
    except (ValueError, AttributeError):  # of no weights
        return None
    return preset if hasattr(preset, "crop_size") else None


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileError(f"there is no file {str(path)!r} for --weights")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
        state = {str(n).removeprefix("module."): tensor for n, tensor in content.items()}
    except Exception as error:  # what a broken file makes torch.load raise has no base
        raise FileError(
            f"{str(path)!r} cannot be read as weights ({type(error).__name__}); a safetensors "
            "file was expected, or a state dict saved by torch.save"
        ) from error
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise FileError(f"{str(path)!r} holds more than tensors; save model.state_dict() alone")
    return state
