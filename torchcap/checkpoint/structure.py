"""Structure: what every module of a model is, and how a fresh model comes to that of a small one.

Compressing changes a model in few ways: a norm becomes an identity or the activation that it holds,
a weight-standardised convolution a plain one, a layer gets a bias, sizes become smaller. A fresh
model is taken through these, and must then be what the file describes, in every attribute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchcap.checkpoint.contents import Attribute, Contents, Layer, is_plain
from torchcap.errors import FileError, ModelError
from torchcap.graph.copies import copied
from torchcap.graph.rewritten import is_rewritten, original_class
from torchcap.graph.rules import BATCH_NORMS, STANDARDIZED
from torchcap.graph.weights import output_axis
from torchcap.nests import tensors_in
from torchcap.transform.fold import plain_convolution, remainder, replace_
from torchcap.transform.materialize import erase_identities_
from torchcap.transform.split import SplitAttention

# The sizes of torch's own layers that count channels.
_WIDTHS = {
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_channels",
    "num_parameters",
    "normalized_shape",
}
# Sizes of any module that count no channels.
_GEOMETRY = {"kernel_size", "stride", "padding", "dilation", "output_padding", "num_heads"}
# timm's choice by what the machine has. The scale of the small model's scores depends on it.
_CHOICES = {"fused_attn"}


_SPLIT = f"{SplitAttention.__module__}.{SplitAttention.__qualname__}"

# What every module has, and what only says where a model is from.
_OWN_OF_MODULES = {*vars(nn.Module()), "training"}
_CONFIGURATIONS = {"pretrained_cfg", "default_cfg", "_model_args"}


def structure_of(model: nn.Module) -> dict[str, Layer]:
    """Return what every module of a model is, by qualified name."""
    return {
        path: Layer(_kind(module), _attributes(module))
        for path, module in model.named_modules(remove_duplicate=False)
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a model by name: parameters, buffers and tensors that are attributes.

    Tied tensors appear under every name that they have.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers, vars(module)):
            tensors = {name: t for name, t in held.items() if isinstance(t, Tensor)}
            found.update({_join(path, name): tensor for name, tensor in tensors.items()})
    return found


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its tensors on the meta device.

    Raises:
        FileError: if the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model).values():
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    try:
        return copied(model, memo)
    except ModelError as error:
        raise FileError(str(error)) from error


def fit_(fresh: nn.Module, contents: Contents, tensors: Mapping[str, Tensor]) -> None:
    """Take a fresh model, on the meta device, through what compressing may have changed."""
    wanted = contents.structure
    if not _is_same_kind(_kind(fresh), wanted[""].kind):
        return
    _split_attention_(fresh, wanted)
    _replace_folded_(fresh, wanted)
    for path, module in fresh.named_modules():
        if _join(path, "bias") in tensors:
            _add_bias_(module)
        if path in wanted:
            _set_sizes_(module, wanted[path].attributes)
    _make_room_(fresh, tensors)


def fits(model: nn.Module, contents: Contents, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a fresh model is as large as the original: before anything is changed."""
    kinds = structure_of(model)[""].kind, contents.structure[""].kind
    found = tensors_of(model)
    shared = {name: found[name].shape for name in tensors if name in found}
    return _is_same_kind(*kinds) and all(
        _is_smaller(tuple(tensors[name].shape), tuple(shape)) for name, shape in shared.items()
    )


def _differences(
    model: nn.Module, contents: Contents, tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """Iterate, in words, over what keeps the tensors of a file from being put into a model."""
    found, wanted = structure_of(model), contents.structure
    if not _is_same_kind(found[""].kind, wanted[""].kind):
        yield f"the model is a {found[''].kind}, in the file a {wanted[''].kind}"
        return
    for path in dict.fromkeys([*wanted, *found]):
        parent = path.rpartition(".")[0]
        if path not in found and (parent in found or parent not in wanted):
            yield f"{path!r} is in the file alone"
        elif path not in wanted and parent in wanted:
            yield f"{path!r} is in the model alone"
        elif path in found and path in wanted:
            yield from _layer_differences(path, found[path], wanted[path])
    yield from _tensor_differences(model, contents, tensors)


def misfit(model: nn.Module, contents: Contents, tensors: Mapping[str, Tensor]) -> str:
    """Return the first few differences, one a line; nothing if there are none."""
    lines = [f"  {line}" for line in islice(_differences(model, contents, tensors), 6)]
    return "\n".join(lines if len(lines) < 6 else [*lines[:5], "  …"])


def put_(
    model: nn.Module,
    contents: Contents,
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Give a model the tensors of a file, in place; nothing may be different but their values."""
    made: dict[str, Any] = {}
    for name, old in tensors_of(model).items():
        source = contents.aliases.get(name, name)
        if source not in made:
            new = _laid_out(tensors[source], contents.strides.get(source), device)
            parameter = isinstance(old, nn.Parameter)
            made[source] = nn.Parameter(new, old.requires_grad) if parameter else new
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        for held in (module._parameters, module._buffers, vars(module)):
            if own in held:
                held[own] = made[source]


def strides_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the strides that a copy has to repeat: those of a dense tensor in another order."""
    strides = tensor.stride()
    usual = torch.empty(tensor.shape, device="meta").stride()
    return strides if strides != usual and _is_dense(tensor.shape, strides) else None


def _join(path: str, name: str) -> str:
    """Return the qualified name of what a module holds."""
    return f"{path}.{name}" if path else name


def _is_same_kind(one: str, other: str) -> bool:
    """Whether two class names mean one class; that of a script's own is ``__main__.…`` there."""
    if "__main__" in {one.partition(".")[0], other.partition(".")[0]}:
        return one.rpartition(".")[2] == other.rpartition(".")[2]
    return one == other


REWRITTEN = " (rewritten)"


def _kind(module: nn.Module) -> str:
    kind = original_class(type(module))
    return f"{kind.__module__}.{kind.__qualname__}" + REWRITTEN * is_rewritten(module)


def _attributes(module: nn.Module) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {}
    for name, held in vars(module).items():
        if name in _OWN_OF_MODULES or name in _CONFIGURATIONS:
            continue
        value = tuple(held) if isinstance(held, torch.Size) else held
        if is_plain(value):
            found[name] = value
        elif _is_kept(value):
            continue
        elif not isinstance(value, Tensor | nn.Module | fx.Graph | None):
            found[name] = _in_words(value)
    return found


def _is_kept(value: Any) -> bool:
    """Whether a value is a container that forwards or hooks fill with tensors, or may."""
    container = isinstance(value, dict | list | set)
    return container and (not value or next(tensors_in(value), None) is not None)


def _in_words(value: Any, depth: int = 4) -> str:
    """Describe what a class keeps besides tensors and sizes, so that it can be compared."""
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    kind = type(value).__qualname__
    if isinstance(value, Mapping) and depth:
        items = sorted(f"{key!r}: {_in_words(item, depth - 1)}" for key, item in value.items())
        return f"{kind}({', '.join(items)})"
    if isinstance(value, list | tuple) and depth:
        return f"{kind}({', '.join(_in_words(item, depth - 1) for item in value)})"
    own = getattr(value, "__dict__", None)
    library = type(value).__module__.partition(".")[0]
    if library in {"torch", "builtins", "functools"} or not isinstance(own, dict) or not depth:
        return kind
    return f"{kind}({_in_words(own, depth - 1)})"


def _replace_folded_(fresh: nn.Module, wanted: Mapping[str, Layer]) -> None:
    """Replace norms and standardised convolutions that the file has folded, in place."""
    erased = []
    modules = dict(fresh.named_modules())
    for path, module in modules.items():
        there = wanted.get(path)
        if there is not None and _is_same_kind(_kind(module), there.kind):
            continue
        if isinstance(module, BATCH_NORMS):
            replace_(fresh, path, remainder(module))
            erased += [path] if there is None else []
        elif isinstance(module, STANDARDIZED):
            replace_(fresh, path, plain_convolution(module))
    if not modules.keys() <= wanted.keys():
        erase_identities_(fresh, erased)


def _split_attention_(fresh: nn.Module, wanted: Mapping[str, Layer]) -> None:
    for path, module in list(fresh.named_modules()):
        split = path in wanted and wanted[path].kind == _SPLIT
        if split and type(module) is nn.MultiheadAttention:
            replace_(fresh, path, SplitAttention(module))


def _add_bias_(layer: nn.Module) -> None:
    """Give a layer the bias that a folded norm leaves, if it can have one and has none."""
    weight = layer._parameters.get("weight")
    if weight is not None and layer._parameters.get("bias", weight) is None:
        width = weight.shape[output_axis(layer)]  # norms fold into layers without groups there
        layer.bias = nn.Parameter(weight.new_empty(width), weight.requires_grad)


def _make_room_(fresh: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let modules keep the tensors that a forward, or a user, has put into attributes without."""
    modules = dict(fresh.named_modules())
    for label, tensor in tensors.items():
        path, _, name = label.rpartition(".")
        if path in modules and _is_empty(modules[path], name):
            modules[path].__dict__[name] = torch.empty_like(tensor, device="meta")


def _is_empty(module: nn.Module, name: str) -> bool:
    """Whether an attribute, or its default in the class, is None or an empty tensor."""
    if name in {*module._parameters, *module._buffers, *module._modules}:
        return False
    missing = object()
    value = vars(module).get(name, getattr(type(module), name, missing))
    return value is None or (isinstance(value, Tensor) and value.numel() == 0)


def _set_sizes_(module: nn.Module, wanted: Mapping[str, Attribute]) -> None:
    for name, value in wanted.items():
        old = vars(module).get(name)
        if old == value:
            continue
        if old is None and _is_empty(module, name):
            module.__dict__[name] = value
            continue
        counts = name in _WIDTHS if _kind(module).startswith("torch.nn.") else name not in _GEOMETRY
        if (counts and _is_smaller(value, old)) or (name in _CHOICES and type(old) is type(value)):
            setattr(module, name, list(value) if isinstance(old, list) else value)  # type: ignore[arg-type]


def _layer_differences(path: str, found: Layer, wanted: Layer) -> Iterator[str]:
    if not _is_same_kind(found.kind, wanted.kind):
        yield f"{path!r} is a {found.kind} in the model, a {wanted.kind} in the file"
        return
    for name in dict.fromkeys([*wanted.attributes, *found.attributes]):
        here, there = found.attributes.get(name), wanted.attributes.get(name)
        if here != there:
            yield f"{_join(path, name)!r} is {here!r:.80} in the model, {there!r:.80} in the file"


def _tensor_differences(
    model: nn.Module, contents: Contents, tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    found = tensors_of(model)
    wanted = {**{name: name for name in tensors}, **contents.aliases}
    for name in dict.fromkeys([*wanted, *found]):
        if name not in found or wanted.get(name) not in tensors:
            yield f"tensor {name!r} is in the {'model' if name in found else 'file'} alone"
            continue
        here, there = found[name], tensors[wanted[name]]
        strides = contents.strides.get(wanted[name])
        path, _, own = name.rpartition(".")
        old, new = tuple(here.shape), tuple(there.shape)
        exact = _own_shape(model.get_submodule(path), own)
        if new != exact if exact is not None else not _is_smaller(new, old):
            yield f"tensor {name!r} has shape {exact or old} in the model, {new} in the file"
        elif here.is_floating_point() != there.is_floating_point():
            yield f"tensor {name!r} is {here.dtype} in the model, {there.dtype} in the file"
        elif strides is not None and not _is_dense(there.shape, strides):
            yield f"tensor {name!r} of shape {new} cannot have strides {strides}"


def _own_shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Return the shape that a layer's tensor must have by the layer's sizes, if it is of torch."""
    if not _kind(module).startswith("torch.nn."):
        return None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        shape = (module.in_channels, module.out_channels // module.groups, *module.kernel_size)
        return {"weight": shape, "bias": (module.out_channels,)}.get(name)
    elif isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
    else:
        return None
    return {"weight": shape, "bias": shape[:1]}.get(name)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of these strides fills its memory, each place once."""
    step = 1
    for stride, size in sorted(zip(strides, shape, strict=False)):
        if size > 1:
            if stride != step:
                return False
            step *= size
    return len(strides) == len(shape) and min(strides, default=1) > 0


def _laid_out(tensor: Tensor, strides: Sequence[int] | None, device: torch.device) -> Tensor:
    """Return a copy of a tensor with the strides given."""
    if strides is None:
        return tensor.to(device, copy=True)
    empty = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device)
    return empty.copy_(tensor)


def _is_smaller(new: Any, old: Any) -> bool:
    if isinstance(new, tuple) and isinstance(old, list | tuple) and len(new) == len(old):
        return all(map(_is_smaller, new, old))
    return type(new) is int and type(old) is int and (new == old or 0 < new < old)
