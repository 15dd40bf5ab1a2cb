"""Forwards: a fresh model's are rewritten where those of the saved one are.

A number in the code of a forward that has to follow channels becomes an attribute of its module,
whose forward is rewritten for that (see :mod:`torchcap.graph.rewriting`). No code comes from a
file: the fresh model is read as the original was, and rewritten in the same way.
"""

from __future__ import annotations

from torch import fx, nn

from torchcap.checkpoint.contents import Contents
from torchcap.errors import FileError, TorchcapError
from torchcap.graph.analyze import Reader
from torchcap.graph.inputs import ExampleInputs
from torchcap.transform.rewrite import rewrite_forwards_

_REWRITTEN = f"{fx.GraphModule.__module__}.{fx.GraphModule.__qualname__}."


def rewritten_forwards(model: nn.Module, contents: Contents) -> set[str]:
    """Return the modules whose forwards are rewritten in a file, and not in a model."""
    kinds = dict(model.named_modules())
    return {
        path
        for path, layer in contents.structure.items()
        if layer.kind.startswith(_REWRITTEN)
        and path in kinds
        and not isinstance(kinds[path], fx.GraphModule)
    }


def rewrite_like_(
    fresh: nn.Module,
    contents: Contents,
    example_inputs: ExampleInputs | None,
    reader: Reader,
) -> None:
    """Rewrite the forwards of a fresh model as those of the saved one are, in place.

    Args:
        fresh: on the meta device.
        contents: of the file.
        example_inputs: for reading the model; for timm and torchvision they are known.
        reader: how the model was read.

    Raises:
        FileError: if the model cannot be read.
    """
    paths = rewritten_forwards(fresh, contents)
    if not paths:
        return
    try:
        graph = reader(fresh, example_inputs)
    except TorchcapError as error:
        raise FileError(
            f"the forward of {min(paths)!r} was rewritten when this model became smaller, and "
            f"{type(fresh).__name__!r} has to be read to do that again: {error}. Give load() the "
            "example_inputs=, leaves= and rules= that it was compressed with"
        ) from error
    rewrite_forwards_(fresh, graph, paths)
