"""``save()``: a small model, or a student in the middle of its training, into one file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torchcap.checkpoint.builders import find_builder, images_of
from torchcap.checkpoint.contents import Contents, Teacher
from torchcap.checkpoint.file import write
from torchcap.checkpoint.structure import strides_of, structure_of, tensors_of
from torchcap.digest import digest
from torchcap.errors import FileError
from torchcap.graph.spaces import SpaceGraph
from torchcap.plan.plan import Plan
from torchcap.training.taps import TeacherPass
from torchcap.transform.student import Student, find_attachment, unwrapped

PACKAGES = ("torchcap", "torch", "torchvision", "timm")


def save(
    model: nn.Module,
    path: Path | str,
    *,
    name: str | None = None,
    plan: Plan | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Save a small model, or a student, as one safetensors file. Nothing is changed but the file.

    The file holds every parameter and buffer, those too that a ``state_dict`` leaves out, and a
    description of each module's class and sizes, so that :func:`load` can bring a freshly built
    model to them. No code and no pickle is in it. The file is replaced when the new one is whole.
    Hooks, gradients and an optimizer's state are not saved: give ``optimizer.state_dict()`` to
    ``torch.save``.

    Args:
        model: what :func:`compress` or :func:`materialize` returned, any other module without
            parametrizations, or what :func:`prepare` returned, at any time of its training.
        path: of the file, in a folder that exists.
        name: what builds the original, ``"timm:resnet18"`` or ``"torchvision:resnet50"``; by
            default it is found where the model is of timm or torchvision.
        plan: the plan that made the small model, kept for the reader; a student has its own.
        notes: anything that JSON can hold, such as ``{"accuracy": 0.92}``.

    Raises:
        FileError: if the file cannot be written, the model cannot be restored exactly from one, or
            ``name`` builds another model.

    Examples:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> path = Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> save(net, path, notes={"accuracy": 0.92})
    """
    if not isinstance(model, nn.Module):
        raise FileError(f"save(model, path) takes a torch.nn.Module; got a {type(model).__name__}")
    model = unwrapped(model)
    found = tensors_of(model)
    state = find_attachment(model, Student)
    for reason in _obstacles(model, found, state):
        raise FileError(f"this {type(model).__name__!r} cannot be saved: {reason}")
    aliases = _aliases(found)
    stored = {label: tensor.detach() for label, tensor in found.items() if label not in aliases}
    contents = Contents(
        structure=structure_of(model),
        plan=plan if state is None else state.plan,
        notes=_plain_notes(notes or {}),
        images=images_of(model),
        aliases=aliases,
        strides={n: order for n, t in stored.items() if (order := strides_of(t)) is not None},
        packages={package: version(package) for package in PACKAGES},
        teacher=None if state is None else _teacher_of(model, state),
    )
    if state is None:
        builder = find_builder(model, contents, stored, name)
        contents = dataclasses.replace(contents, builder=builder)
    elif name is not None or plan not in (None, state.plan):
        raise FileError(
            "a student is loaded into its teacher, with its own plan; leave name= and plan= out"
        )
    alone = {n: t.cpu().clone(memory_format=torch.contiguous_format) for n, t in stored.items()}
    write(Path(path), contents, alone)


def reading_of(graph: SpaceGraph) -> str:
    """Return a digest of what a student takes from the reading of its teacher."""
    taps = [dataclasses.replace(tap, name="") for tap in graph.taps]
    return digest({}, [repr(part) for part in (graph.spaces, taps, graph.sizes, graph.scaled)])


def _teacher_of(model: nn.Module, state: Student) -> Teacher:
    teacher = find_attachment(model, TeacherPass)
    if teacher is None:
        raise FileError("this student has no teacher; save what torchcap.prepare() returned")
    dtype = next(teacher.teacher.parameters()).dtype
    return Teacher(digest(tensors_of(teacher.teacher)), str(dtype), reading_of(state.graph))


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the further names of tied tensors: name -> first name."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return {name: original for name, original in names.items() if name != original}


def _plain_notes(notes: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(notes), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise FileError(f"notes must be a mapping that JSON can hold ({error})") from error


def _obstacles(
    model: nn.Module, tensors: Mapping[str, Tensor], state: Student | None
) -> Iterator[str]:
    """Iterate over what a file could not restore."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            yield f"{path!r} is scripted; save what it was made from"
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{path!r} has an extra state, which may be anything"
        if state is None and parametrize.is_parametrized(module):
            yield (
                f"{path!r} is parametrized; call torch.nn.utils.parametrize."
                "remove_parametrizations() on it first"
            )
    for name, tensor in tensors.items():
        if tensor.is_meta or is_lazy(tensor):
            yield f"tensor {name!r} has no values yet (meta device, lazy module)"
        elif tensor.layout != torch.strided or tensor.is_quantized:
            yield f"tensor {name!r} is sparse or quantized; only plain tensors are stored"
        elif type(tensor) not in {Tensor, nn.Parameter, nn.Buffer}:
            yield f"tensor {name!r} is a {type(tensor).__name__}; only plain tensors are stored"
