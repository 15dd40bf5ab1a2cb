"""``load()``: a model, or a student, from the file that ``save()`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from torchcap.checkpoint.builders import build, set_images_
from torchcap.checkpoint.contents import Contents
from torchcap.checkpoint.file import read
from torchcap.checkpoint.forwards import fitted
from torchcap.checkpoint.save import PACKAGES, reading_of
from torchcap.checkpoint.structure import misfit, put_, skeleton, tensors_of
from torchcap.digest import digest
from torchcap.errors import FileError
from torchcap.graph.analyze import Reader, analyze
from torchcap.graph.copies import hand_over_, shadow
from torchcap.graph.inputs import ExampleInputs
from torchcap.graph.rules import Rules
from torchcap.modes import outside_inference_mode
from torchcap.pipeline import prepare
from torchcap.transform.student import unwrapped


@outside_inference_mode
def load(
    path: Path | str,
    model: nn.Module | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Rules | None = None,
) -> nn.Module:
    """Return the model, or the student, that a file holds; see :func:`save`.

    A model of timm or torchvision is built anew. For others, give a freshly built original of the
    same class, with any weights, on the meta device too; it is not changed. No class or function
    is taken from the file: it only says what is to become smaller, and where the result would not
    be exactly what was saved it is refused. What a class computes and keeps outside of parameters,
    buffers, attributes that are tensors, and plain attributes comes from the fresh model.

    A student is prepared again from its teacher, and goes on as the saved one would.

    Args:
        path: of the file.
        model: the fresh model; for a student its teacher.
        example_inputs: for reading a teacher, or a model whose forwards were rewritten, as in
            :func:`prepare`.
        leaves: those that the model was compressed, or the student prepared, with.
        rules: as ``leaves``.

    Returns:
        a new model in evaluation mode, with the dtypes of the file, on the device of ``model``
        (the CPU if there is none, or on the meta device). Its parameters require gradients where
        those of the fresh model do.

    Raises:
        FileError: if the file cannot be read, is damaged, of a newer version or of another model,
            or ``model`` is needed and missing.
        TraceError, ExampleInputsError: if the teacher cannot be read.

    Examples:
        >>> import tempfile
        >>> from torchcap.checkpoint.save import save
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> path = Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> save(net, path)
        >>> wider = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
        >>> load(path, wider)[0]
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    if not isinstance(model, nn.Module | None):
        raise FileError(
            f"load(path, model) takes a freshly built torch.nn.Module; got a {type(model).__name__}"
        )
    path = Path(path)
    contents, tensors = read(path)
    model = None if model is None else unwrapped(model)
    if contents.teacher is not None:
        fresh = _prepared(path, contents, model, example_inputs, leaves, rules)
    else:
        make = partial(_rebuilt, path, contents) if model is None else partial(skeleton, model)
        fresh = fitted(make, contents, tensors, example_inputs, Reader(leaves, rules))
    if reason := misfit(fresh, contents, tensors):
        raise FileError(f"{str(path)!r} holds another model:\n{reason}\n{_versions(contents)}")
    put_(fresh, contents, tensors, _device(model))
    if model is not None and contents.teacher is None:
        hand_over_(fresh, model)
    if model is None:
        set_images_(fresh, contents.images)
    return fresh.eval()


def describe(path: Path | str) -> Contents:
    """Return what a file says of its model, its plan and its notes; the whole file is checked.

    Raises:
        FileError: if the file cannot be read, is damaged, or of a newer version.
    """
    return read(Path(path))[0]


def _rebuilt(path: Path, contents: Contents) -> nn.Module:
    if contents.builder is None:
        raise FileError(
            f"{str(path)!r} does not say how a {contents.model!r} is built; give a freshly built "
            f"one: load(path, model={contents.model}(…))"
        )
    return build(contents.builder)


def _prepared(
    path: Path,
    contents: Contents,
    teacher: nn.Module | None,
    example_inputs: ExampleInputs | None,
    leaves: Sequence[type[nn.Module]],
    rules: Rules | None,
) -> nn.Module:
    """Prepare a teacher as it was prepared for the student in the file."""
    saved = contents.teacher
    if teacher is None:
        raise FileError(
            f"{str(path)!r} holds a student, which needs its teacher: load(path, model=teacher), "
            "with the weights that it was prepared from"
        )
    assert saved is not None  # noqa: S101 - this is a student's file
    if saved.digest not in _digests(teacher, saved.dtype):
        raise FileError(
            f"{str(path)!r} holds the student of another teacher: the weights of the "
            f"{type(teacher).__name__!r} given are not those that the student was prepared from"
        )
    for streams in (False, True):
        graph = analyze(teacher, example_inputs, leaves=leaves, rules=rules, streams=streams)
        if reading_of(graph.after_folding()) == saved.reading:
            return prepare(
                teacher,
                plan=contents.plan,
                example_inputs=example_inputs,
                leaves=leaves,
                rules=rules,
                streams=streams,
            )
    raise FileError(
        f"{str(path)!r} holds a student whose channel spaces were read in another way; give the "
        f"leaves= and rules= that it was prepared with. {_versions(contents)}"
    )


def _digests(teacher: nn.Module, dtype: str) -> set[str]:
    """Return the digests of a teacher: as it is, and in the dtype that it followed a student to."""
    found = {digest(tensors_of(teacher))}
    followed: torch.dtype | None = getattr(torch, dtype.removeprefix("torch."), None)
    if isinstance(followed, torch.dtype):
        found.add(digest(tensors_of(shadow(teacher).to(dtype=followed))))
    return found


def _device(model: nn.Module | None) -> torch.device:
    """Return where a model lives, and the CPU if it does nowhere."""
    tensors = [] if model is None else tensors_of(model).values()
    found: Tensor | None = next((tensor for tensor in tensors if not tensor.is_meta), None)
    return torch.device("cpu") if found is None else found.device


def _versions(contents: Contents) -> str:
    written = [f"{p} {contents.packages.get(p)} (here {version(p)})" for p in PACKAGES]
    return f"It was written with {', '.join(written)}"
