"""The student: what a prepared model carries besides its parametrized layers.

The model stays an instance of the user's class. Its state is a :class:`Student`, held by a hook on
the root module: before a forward it computes every ``P`` once, batched by shape, and after it lets
them go. Norms that could not be folded run on frozen statistics, whatever the mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchcap.errors import StudentError
from torchcap.graph.spaces import Fold, SpaceGraph
from torchcap.plan.plan import Plan
from torchcap.projection.maps import Projection, release_bases, share_bases


class Attachment:
    """Base of whatever torchcap hangs on a model as a hook, so that it can be found and removed."""


A = TypeVar("A", bound=Attachment)


class Student(Attachment):
    """The state of a prepared model.

    Attributes:
        graph: its channel spaces, after folding.
        folds: the norms that were folded.
        plan: the rank of every planned space.
        projections: space name -> its ``P``.
        trainable: qualified tensor name -> whether it was trained before it was frozen.
    """

    def __init__(
        self,
        *,
        graph: SpaceGraph,
        plan: Plan,
        projections: Mapping[str, Projection],
        trainable: Mapping[str, bool],
        folds: tuple[Fold, ...],
    ) -> None:
        self.graph, self.plan = graph, plan
        self.projections = dict(projections)
        self.trainable = dict(trainable)
        self.folds = folds

    def attach(self, model: nn.Module) -> None:
        """Hang this state on the root of a model."""
        model.register_forward_pre_hook(self.before_forward)
        model.register_forward_hook(self.after_forward, always_call=True)

    def before_forward(self, *_: Any) -> None:
        """Compute every ``P``, for all its uses in one forward."""
        share_bases(list(self.projections.values()))

    def after_forward(self, *_: Any) -> None:
        """Let the shared ``P`` go; called after an error too."""
        release_bases(list(self.projections.values()))


class FrozenStatistics(Attachment):
    """Makes a norm use its running statistics in training mode too, and leave them as they are."""

    def __init__(self) -> None:
        self._was_training = False

    def attach(self, norm: nn.Module) -> None:
        """Hang this on a norm."""
        norm.register_forward_pre_hook(self.freeze)
        norm.register_forward_hook(self.thaw, always_call=True)

    def freeze(self, norm: nn.Module, _: Any) -> None:
        """Put the norm into evaluation mode for one call."""
        self._was_training, norm.training = norm.training, False

    def thaw(self, norm: nn.Module, *_: Any) -> None:
        """Put the norm back into the mode that it had."""
        norm.training = self._was_training


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of a ``DistributedDataParallel``, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def attachments(module: nn.Module) -> Iterator[Attachment]:
    """Iterate over what torchcap has hung on one module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Attachment):
                yield owner


def find_attachment(model: object, kind: type[A]) -> A | None:
    """Return the attachment of a kind on the root of a model, if there is one."""
    if not isinstance(model, nn.Module):
        return None
    return next((a for a in attachments(unwrapped(model)) if isinstance(a, kind)), None)


def student_of(model: nn.Module) -> Student:
    """Return the state of a prepared model.

    Raises:
        StudentError: if the model is not a prepared one.
    """
    student = find_attachment(model, Student)
    if student is None:
        raise StudentError(
            f"{type(model).__name__!r} is not a prepared model: expected what "
            "torchcap.prepare(model) returned"
        )
    return student


def projection_parameters(student: nn.Module) -> list[nn.Parameter]:
    """Return what an optimizer should get: the proxies of all trained projections.

    Args:
        student: a prepared model.

    Returns:
        one parameter for each planned space whose ``P`` is trained, each of shape
        ``(blocks, channels / blocks, rank / blocks)``; empty where all spaces are selections.

    Raises:
        StudentError: if the model is not a prepared one.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 3.6 (the proxy of PMaP).
    """
    projections = student_of(student).projections.values()
    return [parameter for projection in projections for parameter in projection.parameters()]
