"""Forwards: a fresh model's are rewritten where those of the saved one are.

A number in the code of a forward that has to follow channels becomes an attribute of its module,
whose forward is rewritten for that (see :mod:`torchcap.graph.rewriting`). No code comes from a
file: the fresh model is read as the original was, and rewritten in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from torchcap.checkpoint.contents import Contents
from torchcap.checkpoint.structure import REWRITTEN, fit_, fits, misfit
from torchcap.errors import FileError, TorchcapError
from torchcap.graph.analyze import Reader
from torchcap.graph.inputs import ExampleInputs
from torchcap.graph.rewritten import is_rewritten
from torchcap.transform.rewrite import rewrite_forwards_


def _rewritten_forwards(model: nn.Module, contents: Contents) -> set[str]:
    """Return the modules whose forwards are rewritten in a file, and not in a model."""
    kinds = dict(model.named_modules())
    return {
        path
        for path, layer in contents.structure.items()
        if layer.kind.endswith(REWRITTEN) and path in kinds and not is_rewritten(kinds[path])
    }


def fitted(
    make: Callable[[], nn.Module],
    contents: Contents,
    tensors: Mapping[str, Tensor],
    example_inputs: ExampleInputs | None,
    reader: Reader,
) -> nn.Module:
    """Return a fresh model that was taken through what compressing did to the saved one.

    Whether residual streams were spaces is not known; it decides which numbers were rewritten, so
    both are tried. Where neither leads to the model in the file, the last try is returned.

    Args:
        make: makes the fresh model, on the meta device.
        contents: of the file.
        tensors: of the file.
        example_inputs: for reading the model; for timm and torchvision they are known.
        reader: how the model was read.

    Raises:
        FileError: if a forward was rewritten and the model cannot be read.
    """
    fresh = make()
    paths = _rewritten_forwards(fresh, contents)
    if not paths or not fits(fresh, contents, tensors):  # then there is no need to read it
        fit_(fresh, contents, tensors)
        return fresh
    for streams in (False, True):
        fresh = make()
        _rewrite_(fresh, paths, example_inputs, replace(reader, streams=streams))
        fit_(fresh, contents, tensors)
        if not misfit(fresh, contents, tensors):
            break
    return fresh


def _rewrite_(
    fresh: nn.Module, paths: set[str], example_inputs: ExampleInputs | None, reader: Reader
) -> None:
    """Rewrite the forwards of some modules, in place."""
    try:
        graph = reader(fresh, example_inputs)
    except TorchcapError as error:
        raise FileError(
            f"the forward of {min(paths)!r} was rewritten when this model became smaller, and "
            f"{type(fresh).__name__!r} has to be read to do that again: {error}. Give load() the "
            "example_inputs=, leaves= and rules= that it was compressed with"
        ) from error
    rewrite_forwards_(fresh, graph, paths)
