"""Builders: which function of timm or torchvision makes a model, and with what arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from torchcap.checkpoint.contents import ARGUMENTS, Attribute, Builder, Contents, is_plain
from torchcap.checkpoint.forwards import fitted
from torchcap.checkpoint.structure import misfit, skeleton
from torchcap.errors import FileError
from torchcap.graph.analyze import Reader

# What timm's configuration says of images and labels; where weights are to be had is left out.
_IMAGES = (
    "architecture",
    "tag",
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "label_names",
    "license",
)


def find_builder(
    model: nn.Module, contents: Contents, tensors: Mapping[str, Tensor], name: str | None
) -> Builder | None:
    """Find what builds the original of a model, by trying on the meta device.

    Args:
        model: the model that is saved.
        contents: its description.
        tensors: its tensors.
        name: of the builder, if the user has given one.

    Returns:
        the builder; None if there is none, and no name was given.

    Raises:
        FileError: if a name was given, and what it builds is another model.
    """
    reason = ""
    for label in _names(model) if name is None else [name]:
        try:
            builder = _told(label, model)
            fresh = fitted(partial(build, builder), contents, tensors, None, Reader())
        except (FileError, ValueError) as error:
            reason = f"  {error}"
            continue
        reason = misfit(fresh, contents, tensors)
        if not reason:
            return builder
    if name is not None:
        raise FileError(
            f"{name!r} does not build the original of this {type(model).__name__!r}:\n{reason}\n"
            "Leave name= out"
        )
    return None


def build(builder: Builder) -> nn.Module:
    """Build a model on the meta device, without weights.

    Raises:
        FileError: if timm or torchvision has no such builder, or it fails.
    """
    function = partial(_function(builder.name), **builder.arguments)
    try:
        with torch.device("meta"):
            fresh = function()
        if _hides_tensors(fresh):
            with torch.random.fork_rng(devices=()):
                fresh = skeleton(function())
    except Exception as error:  # whatever a builder raises for arguments that it does not take
        raise FileError(
            f"{builder.name!r} cannot be built with {dict(builder.arguments)} "
            f"({type(error).__name__}: {error}); build the model yourself: load(path, model=…)"
        ) from error
    return fresh


def images_of(model: nn.Module) -> dict[str, Any]:
    """Return what timm's configuration of a model says of its images and labels."""
    configuration = getattr(model, "pretrained_cfg", None)
    if not isinstance(configuration, Mapping):
        return {}
    return {
        name: value
        for name in _IMAGES
        if (value := configuration.get(name)) is not None
        and all(map(is_plain, value if isinstance(value, tuple | list) else [value]))
    }


def set_images_(model: nn.Module, images: Mapping[str, Any]) -> None:
    """Give a timm model the configuration that the saved one had, in place."""
    known = getattr(model, "pretrained_cfg", None)
    if isinstance(known, Mapping):
        given = {n: tuple(v) if isinstance(v, list) else v for n, v in images.items()}
        model.pretrained_cfg = model.default_cfg = {**known, **given}  # type: ignore[assignment]


def _names(model: nn.Module) -> list[str]:
    """Return the builders that may have made a model, by its class."""
    module = type(model).__module__
    if module.startswith("timm."):
        name = images_of(model).get("architecture")
        return [f"timm:{name}"] if isinstance(name, str) else []
    names = torchvision.models.list_models() if module.startswith("torchvision.") else []
    builders = {name: torchvision.models.get_model_builder(name) for name in names}
    return [f"torchvision:{n}" for n, make in builders.items() if make.__module__ == module]


def _function(name: str) -> Callable[..., nn.Module]:
    library, _, own = name.partition(":")
    if library == "timm" and timm.is_model(own):
        return partial(timm.create_model, own, pretrained=False)
    if library == "torchvision" and own in torchvision.models.list_models():
        maker = torchvision.models.get_model_builder(own)
        weights = {"weights", "weights_backbone"} & inspect.signature(maker).parameters.keys()
        return partial(maker, **dict.fromkeys(weights))
    found = {"timm": timm.__version__, "torchvision": torchvision.__version__}
    raise FileError(
        f"{library} {found.get(library, '')} has no model {own!r}; upgrade it, or build the model "
        "yourself: load(path, model=…)"
    )


def _told(name: str, model: nn.Module) -> Builder:
    """Return a builder with the arguments that make a model like this one."""
    usual: dict[str, Attribute] = {}
    if "init_weights" in inspect.signature(type(model)).parameters:
        usual = {"init_weights": False}  # they are thrown away, and GoogLeNet's take long
    builder = Builder(name, usual)
    options, default = _options(model), _options(build(builder))
    changed = {n: value for n, value in options.items() if default.get(n) != value}
    return Builder(name, {**usual, **changed})


def _options(model: nn.Module) -> dict[str, Attribute]:
    """Return what a model shows of the arguments that it was built with."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    shown: dict[str, Any] = {
        "img_size": getattr(getattr(model, "patch_embed", None), "img_size", None),
        "global_pool": getattr(getattr(model, "global_pool", None), "pool_type", None),
    }
    if layers:
        shown["in_chans"] = getattr(layers[0], "in_channels", None)
        shown["num_classes"] = layers[-1].weight.shape[0]
    own = {name: getattr(model, name, None) for name in ARGUMENTS}
    found = {**shown, **{name: value for name, value in own.items() if is_plain(value)}}
    return {name: value for name, value in found.items() if is_plain(value)}


def _hides_tensors(model: nn.Module) -> bool:
    """Whether a model holds tensors where no file puts any: in a list, as torchvision's anchors."""
    held = [value for module in model.modules() for value in vars(module).values()]
    lists = [value for value in held if isinstance(value, list | tuple)]
    return any(isinstance(item, Tensor) for items in lists for item in items)
