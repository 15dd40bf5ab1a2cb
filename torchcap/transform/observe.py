"""Observers: what layers read and write is looked at while data runs through a model, once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchcap.batches import Batches, as_batch, check_iterable
from torchcap.errors import DataError
from torchcap.graph.weights import layer_input

See = Callable[[nn.Module, tuple[Any, ...]], None]
SeeOutput = Callable[[nn.Module, tuple[Any, ...], Tensor], None]


class Observer(Protocol):
    """Looks at some layers of a model."""

    @property
    def inputs(self) -> Mapping[str, See]:
        """What is shown the arguments of a layer, by its name."""

    @property
    def outputs(self) -> Mapping[str, SeeOutput]:
        """What is shown the output of a layer, by its name."""


@torch.no_grad()
def observe(model: nn.Module, data: Batches, *observers: Observer) -> None:
    """Run data through a model in evaluation mode, once, with observers at its layers.

    Raises:
        DataError: if the data is empty, or the model does not accept it.
    """
    check_iterable(data)
    seen = 0
    with contextlib.ExitStack() as stack:
        for observer in observers:
            stack.enter_context(watched(model, observer.inputs, observer.outputs))
        for batch in data:
            as_batch(batch, seen).run(model)
            seen += 1
    if not seen:
        raise DataError("the data is empty: expected at least one batch of images")


@contextlib.contextmanager
def watched(
    model: nn.Module,
    inputs: Mapping[str, See],
    outputs: Mapping[str, SeeOutput],
) -> Iterator[None]:
    """Hook layers for a while, with the model in evaluation mode.

    Args:
        model: the model.
        inputs: qualified name of a layer -> what is shown its arguments.
        outputs: qualified name of a layer -> what is shown its output.
    """
    modes = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        for path, see in inputs.items():
            hook = partial(_given, see)
            layer = model.get_submodule(path)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for path, see_output in outputs.items():
            handles.append(model.get_submodule(path).register_forward_hook(see_output))
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def _given(
    see: Callable[[nn.Module, tuple[Any, ...]], None],
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Show a layer's arguments; its input may be given by name."""
    see(layer, (layer_input(args, kwargs),))
