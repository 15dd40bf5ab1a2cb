"""Recipes: what ``compress`` does, step by step, as data.

A recipe is a row of steps that may be left out (``None``) or changed: start, projections, solve,
relaxation, fine-tuning. It holds no tensors, so it can be printed, compared and overridden.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcap.errors import RecipeError
from torchcap.projection.initialize import Initializer
from torchcap.training.rounds import Rounds, odd_then_even

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Optimize = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Augment = Callable[[Tensor], Tensor]
D = TypeVar("D", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Adam:
    """Makes ``torch.optim.Adam``.

    A folded network has weights of very different sizes, and nothing that would make up for it. So
    by default the step of each tensor is a share of the size of its entries.

    Attributes:
        lr: the step size; with ``relative``, as a share of the root mean square of the entries
            that a tensor starts with.
        betas: as of ``torch.optim.Adam``.
        relative: whether steps are relative.
    """

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    relative: bool = True

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters."""
        groups = [{"params": [p], "lr": self.lr * self._scale(p)} for p in parameters]
        return torch.optim.Adam(groups, self.lr, self.betas)

    def _scale(self, parameter: nn.Parameter) -> float:
        size = float(parameter.detach().double().square().mean().sqrt()) if self.relative else 1.0
        return size or 1.0


@dataclass(frozen=True, slots=True)
class SGD:
    """Makes ``torch.optim.SGD`` with Nesterov's momentum.

    Attributes:
        lr: the step size.
        momentum, weight_decay: as of ``torch.optim.SGD``.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters."""
        nesterov = self.momentum > 0
        return torch.optim.SGD(
            parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=nesterov
        )


@dataclass(frozen=True, slots=True)
class FlipAndShift:
    """Flips each image from left to right by chance, and shifts it by a few pixels.

    What moves in at the border is the mirrored image, which needs no knowledge of how images are
    normalised. Draws come from torch's global generator, which the training loop has seeded.

    Attributes:
        flip: chance of a flip.
        shift: largest shift, as a share of the side.
    """

    flip: float = 0.5
    shift: float = 0.125

    def __call__(self, images: Tensor) -> Tensor:
        """Return changed images ``(N, channels, h, w)``; of another dimension they stay."""
        if images.ndim != 4:
            return images
        count, _, height, width = images.shape
        flipped = (torch.rand(count) < self.flip).to(images.device)
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        down, right = (min(int(self.shift * n), n - 1) for n in (height, width))
        padded = F.pad(images, (right, right, down, down), mode="reflect")
        top = torch.randint(0, 2 * down + 1, (count,))
        left = torch.randint(0, 2 * right + 1, (count,))
        rows = (top[:, None] + torch.arange(height)).to(images.device)
        columns = (left[:, None] + torch.arange(width)).to(images.device)
        index = torch.arange(count, device=images.device)[:, None, None]
        moved = padded.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]]
        return moved.movedim(-1, 1)


@dataclass(frozen=True, slots=True)
class Mix:
    """Mixes each image with another one of its batch, in a share drawn for each image.

    The teacher says what a mixed image is, so this needs no labels, and takes none.

    Attributes:
        share: of the images that are mixed.

    References:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Beyer et al.,
        "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022.
    """

    share: float = 1.0

    def __call__(self, images: Tensor) -> Tensor:
        """Return mixed images."""
        own = torch.where(
            torch.rand(len(images)) < self.share, torch.rand(len(images)), torch.ones(len(images))
        )
        own = own.to(images).reshape(-1, *(1 for _ in images.shape[1:]))
        return own * images + (1 - own) * images.flip(0)


def _changed(values: D, changes: Mapping[str, Any]) -> D:
    known = [field.name for field in dataclasses.fields(values)]
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
            raise RecipeError(f"{type(values).__name__} has no {name!r}; {hint}")
    return dataclasses.replace(values, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How some parameters are trained.

    The loss is ``reconstruction · Σ_i ‖I_i − Î_i‖² / ‖I_i‖² + distillation · T² KL + labels · L``:
    block features against the teacher's, logits against the teacher's, and cross entropy. The step
    size warms up over the first steps and falls to zero like a cosine.

    Attributes:
        epochs: passes over the data (of each round).
        optimizer: makes the optimizer from the parameters.
        reconstruction, distillation, labels: the weights of the three losses.
        temperature: ``T`` of the distillation.
        augment: what is done to the images of each batch, one after the other. Images that are
            mixed (:class:`Mix`) need ``labels=0``.
        clip: largest norm of the gradient; None for no limit.
        warmup: share of the steps over which the step size rises.
        healing: a training of fewer steps than this has its step size reduced in proportion.

    Raises:
        RecipeError: if a value is out of its range.
    """

    epochs: int = 10
    optimizer: Optimize = Adam()
    reconstruction: float = 1.0
    distillation: float = 1.0
    labels: float = 0.0
    temperature: float = 1.0
    augment: tuple[Augment, ...] = ()
    clip: float | None = None
    warmup: float = 0.05
    healing: int = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise RecipeError(
                f"epochs of {name} must be an integer of at least 1; got {self.epochs!r}. To leave "
                "a step out, put None in its place"
            )
        weights = (self.reconstruction, self.distillation, self.labels)
        if not all(isfinite(w) and w >= 0 for w in weights) or max(weights) <= 0:
            raise RecipeError(
                f"the weights of the losses of {name} must not be negative, and one of them must "
                f"be positive; got reconstruction={weights[0]}, distillation={weights[1]}, "
                f"labels={weights[2]}"
            )
        if not self.temperature > 0:
            raise RecipeError(f"temperature must be positive; got {self.temperature!r}")
        if self.clip is not None and not self.clip > 0:
            raise RecipeError(f"clip must be positive or None; got {self.clip!r}")
        if self.labels > 0 and any(isinstance(a, Mix) for a in self.augment):
            raise RecipeError(
                f"labels={self.labels} and Mix() do not go together: a mixed image has no one "
                "label. Leave Mix() out of augment, or set labels=0"
            )
        if self.healing < 1:
            raise RecipeError(f"healing is a number of steps, at least 1; got {self.healing!r}")
        if not 0 <= self.warmup <= 1:
            raise RecipeError(f"warmup is a share of the steps, 0 to 1; got {self.warmup!r}")

    def but(self, **changes: Any) -> Self:
        """Return a copy with some values changed.

        Raises:
            RecipeError: for a value that there is not, or that is out of its range.
        """
        return _changed(self, changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections(Training):
    """How the projections are trained (paper, sec. 3.5.1 and 3.6).

    Attributes besides those of :class:`Training`:
        rounds: which spaces train together, one round after the other.
        recentre: write ``P`` back into its proxy after every step, so that the proxy stays
            orthonormal and the step size keeps its meaning.
    """

    optimizer: Optimize = Adam(3e-3, relative=False)
    rounds: Rounds = odd_then_even
    recentre: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation(Training):
    """How the small kernels are trained (paper, sec. 3.5.2 and 3.5.3).

    Attributes besides those of :class:`Training`:
        batch_norm: give every folded layer a fresh norm of its small width while it trains, with
            statistics of the data, and fold it at the end. Weights then stand behind a scale of
            their own, and larger steps do no harm.
        batch_statistics: let these norms use the statistics of each batch while they train, as in
            ordinary training, and measure them anew at the end.
        healing: a training of fewer steps than this has its step size reduced in proportion. Large
            steps first disturb what the closed form has put in place, and take long to heal.
    """

    batch_norm: bool = True
    batch_statistics: bool = False
    healing: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedForm:
    """How closed forms are solved; see :func:`torchcap.solve`.

    Attributes:
        ridge: as a share of the moments' mean diagonal; None to choose it for every layer.
        memory: bytes that moments and waiting batches may take.
        batches: how many batches are looked at; None for all. A thousand images are enough.
    """

    ridge: float | None = None
    memory: int = 2**30
    batches: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.memory, int) or self.memory < 2**20:
            raise RecipeError(f"memory is in bytes, at least 1 MiB; got {self.memory}")
        if self.batches is not None and not (isinstance(self.batches, int) and self.batches >= 1):
            raise RecipeError(f"batches must be at least 1, or None for all; got {self.batches}")
        if self.ridge is not None and not self.ridge > 0:
            raise RecipeError(f"ridge must be positive or None; got {self.ridge!r}")

    def but(self, **changes: Any) -> Self:
        """Return a copy with some values changed.

        Raises:
            RecipeError: for a value that there is not, or that is out of its range.
        """
        return _changed(self, changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The steps of :func:`torchcap.compress`.

    Attributes:
        start: where projections start: an initializer; or a :class:`ClosedForm`, for the greedy
            selection on the student's own features, readers solved on the way.
        projections: training of the projections; None leaves them at the start.
        solve: closed-form relaxation of the small kernels; None leaves it out. Behind a start that
            solves its readers, without projections, nothing is left to do here.
        relaxation: training of the small kernels; None leaves it out.
        fine_tuning: the same again, by the mixture loss; None leaves it out.
        name: for printing.
    """

    start: Initializer | ClosedForm = field(default_factory=ClosedForm)
    projections: Projections | None = None
    solve: ClosedForm | None = None
    relaxation: Relaxation | None = None
    fine_tuning: Relaxation | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        steps = {
            "projections": Projections,
            "solve": ClosedForm,
            "relaxation": Relaxation,
            "fine_tuning": Relaxation,
        }
        for name, kind in steps.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise RecipeError(
                    f"{name} of a recipe is a {kind.__name__}, or None to leave it out; got "
                    f"{value!r}"
                )
        if not isinstance(self.start, ClosedForm) and not callable(self.start):
            raise RecipeError(
                f"start of a recipe is a ClosedForm or an initializer; got {self.start!r}"
            )

    @classmethod
    def seconds(cls) -> Recipe:
        """Return the closed form alone: no labels, no gradient steps."""
        return cls(start=ClosedForm(), name="seconds")

    @classmethod
    def minutes(cls, epochs: int = 30) -> Recipe:
        """Return the closed form, then relaxation of the kernels; no labels."""
        relaxation = Relaxation(epochs=epochs, augment=(FlipAndShift(), Mix()))
        return cls(start=ClosedForm(), relaxation=relaxation, name="minutes")

    @classmethod
    def full(cls, epochs: int = 60, *, labels: float = 0.0) -> Recipe:
        """Return all steps: selection, projections, closed form, relaxation and fine-tuning.

        Args:
            epochs: of relaxation and fine-tuning each; projections get a fifth of it.
            labels: weight of the cross entropy in the fine-tuning.
        """
        mixed = (FlipAndShift(), Mix())
        return cls(
            start=ClosedForm(),
            projections=Projections(epochs=max(1, epochs // 5), augment=mixed),
            solve=ClosedForm(),
            relaxation=Relaxation(epochs=epochs, augment=mixed),
            fine_tuning=Relaxation(
                epochs=epochs,
                augment=(FlipAndShift(),) if labels > 0 else mixed,
                reconstruction=0.1,
                labels=labels,
            ),
            name="full",
        )

    @property
    def trains(self) -> bool:
        """Whether a step of it takes gradients."""
        return any(s is not None for s in (self.projections, self.relaxation, self.fine_tuning))

    @property
    def needs_data(self) -> bool:
        """Whether a step learns from images. Of initializers, only the norm of weights does not."""
        steps = (self.projections, self.solve, self.relaxation, self.fine_tuning)
        closed = isinstance(self.start, ClosedForm)
        return closed or any(step is not None for step in steps)

    def but(self, **changes: Any) -> Recipe:
        """Return a copy with some steps changed.

        Examples:
            >>> Recipe.minutes().but(relaxation=Relaxation(epochs=5)).relaxation.epochs
            5
        """
        return _changed(self, {"name": "custom", **changes})

    def __str__(self) -> str:
        lines = [f"recipe {self.name!r}"]
        for part in dataclasses.fields(self):
            if part.name != "name":
                value = getattr(self, part.name)
                lines.append(f"  {part.name:12s} {'-' if value is None else _described(value)}")
        return "\n".join(lines)


def _described(value: Any) -> str:
    """Return a text that is the same for equal values, in another process too."""
    if isinstance(value, torch.Generator):
        return f"Generator(seed={value.initial_seed()})"
    if isinstance(value, partial):
        named = [f"{name}={_described(item)}" for name, item in value.keywords.items()]
        return f"partial({', '.join([*map(_described, (value.func, *value.args)), *named])})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        if callable(value):
            return getattr(value, "__qualname__", type(value).__qualname__)
        return repr(value)
    parts = (
        f"{part.name}={_described(getattr(value, part.name))}" for part in dataclasses.fields(value)
    )
    return f"{type(value).__name__}({', '.join(parts)})"
