"""The teacher beside the student: features are compared where the graph has found taps.

In training mode a forward of the student first runs the teacher on the same input, without
gradients and with frozen statistics, and keeps its features at the taps. While the student's own
forward reaches the taps, each pair is compared and the teacher's half is let go. In evaluation mode
nothing of this runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchcap import processes
from torchcap.errors import StudentError
from torchcap.graph.copies import running
from torchcap.graph.spaces import Tap
from torchcap.projection.maps import Projection
from torchcap.projection.parametrizations import Segment, lift_segments
from torchcap.transform.student import Attachment, Student

Lift = Callable[[Tensor], Tensor]


class TeacherPass(Attachment):
    """Runs the teacher in the student's forward and sums the reconstruction loss.

    Args:
        teacher: the model that the student came from. It is not changed: a copy is run, whose
            tensors share the teacher's memory.
        taps: where to look in the student.
        lifts: how the student's channels at each tap lift to the teacher's; None where they are
            the teacher's.
        twins: where to look in the teacher, if not at the same places.
        own: parameters that the teacher's forward writes into.

    Attributes:
        loss: of the last forward that was compared; None before it.
        output: what the teacher put out in it.
        terms: the terms of the loss, by the name of their tap.
        always: compare in evaluation mode too.
    """

    def __init__(
        self,
        teacher: nn.Module,
        taps: Sequence[Tap],
        lifts: Sequence[Lift | None] | None = None,
        *,
        twins: Sequence[Tap] | None = None,
        own: Collection[str] = (),
        always: bool = False,
    ) -> None:
        self.taps = tuple(taps)
        self.teacher = running(teacher, own)
        self.lifts = tuple(lifts) if lifts is not None else (None,) * len(self.taps)
        self.always = always
        self.loss: Tensor | None = None
        self.output: Any = None
        self.terms: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._features: dict[int, Tensor] = {}
        self._energies: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        self._copied: set[int] = set()
        self._probes: list[Probe] = []
        self._delayed: list[tuple[int, Tensor]] = []
        self._graded = False
        for index, tap in enumerate(self.taps if twins is None else twins):
            probe = Probe(partial(self._keep_feature, index), tap)
            probe.attach(self.teacher)
            self._probes.append(probe)

    def attach(self, model: nn.Module) -> None:
        """Hang the teacher and the taps on the root of a student."""
        self._handles += [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, always_call=True),
        ]
        for index, tap in enumerate(self.taps):
            probe = Probe(partial(self._compare, index), tap)
            self._handles.append(probe.attach(model))
            self._probes.append(probe)

    def detach(self) -> None:
        """Take the teacher and the taps off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Run the teacher, if the student is in training mode."""
        self._clear()
        if not (model.training or self.always):
            return
        self.loss = None
        self._graded = torch.is_grad_enabled()
        self._follow(model)
        self._run_teacher(args, kwargs)
        if written := self._written():
            # An operator behind these taps wrote into what they saw: from now on they keep copies.
            self._copied |= written
            self._clear()
            self._run_teacher(args, kwargs)
        self._energies = _reduced({i: _squared_norm(x) for i, x in self._features.items()})

    def after_forward(self, model: nn.Module, _: Any, output: Any) -> None:
        """Sum up the terms; after an error, or in evaluation mode, there are none."""
        if (model.training or self.always) and output is not None and self._energies:
            for index, feature in self._delayed:
                self._add_term(index, feature)
            if not self.terms:
                raise StudentError(
                    f"the forward of {type(model).__name__!r} reached none of its "
                    f"{len(self.taps)} taps, the first at {self.taps[0].module!r}; it takes "
                    "another path in training mode than in the evaluation mode that was read"
                )
            self.loss = torch.stack(list(self.terms.values())).sum()
        self._release()

    def _run_teacher(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for probe in self._probes:
            probe.start()
        with torch.no_grad():
            self.output = self.teacher(*args, **kwargs)

    def _written(self) -> set[int]:
        """Return the taps whose features have been written to since they were seen."""
        return {
            index
            for index, feature in self._features.items()
            if index not in self._copied and feature._version != self._versions[index]
        }

    def _clear(self) -> None:
        self.terms = {}
        self._release()

    def _release(self) -> None:
        self._features, self._energies, self._versions, self._delayed = {}, {}, {}, []
        for probe in self._probes:
            probe.stop()

    def _follow(self, model: nn.Module) -> None:
        """Bring the teacher to the student's device and dtype, should the student have moved."""
        mine = next(self.teacher.parameters())
        theirs = next(p for n, p in model.named_parameters() if not n.endswith(".proxy"))
        if (mine.device, mine.dtype) != (theirs.device, theirs.dtype):
            self.teacher.to(device=theirs.device, dtype=theirs.dtype)

    def _keep_feature(self, index: int, feature: Tensor) -> None:
        if feature.is_inference():  # these keep no count of what is written to them
            self._copied.add(index)
        if index in self._copied:
            self._features[index] = feature.clone()
        else:
            self._features[index], self._versions[index] = feature, feature._version

    def _compare(self, index: int, feature: Tensor) -> None:
        """Add the normalised error of the student's feature at one tap."""
        if index not in self._features:
            return
        if self._graded and not torch.is_grad_enabled():
            raise StudentError(
                f"the features at {self.taps[index].name!r} have no gradient: they are computed in "
                "a reentrant checkpoint, or under no_grad; checkpoint with use_reentrant=False"
            )
        if _in_checkpoint():  # which runs again in the backward, and must do the same then
            self._delayed.append((index, feature))
        else:
            self._add_term(index, feature)

    def _add_term(self, index: int, feature: Tensor) -> None:
        expected = self._features.pop(index)
        tap, lift = self.taps[index], self.lifts[index]
        if lift is not None:
            if index in self._copied:
                feature = feature.clone()
            # The student's channels are fewer here: compare in the teacher's coordinates.
            with torch.autocast(feature.device.type, enabled=False):
                feature = lift(feature.movedim(tap.dim, 0).unsqueeze(-1).flatten(1))
            expected = expected.movedim(tap.dim, 0).unsqueeze(-1).flatten(1)
        error = _squared_norm(_at_least_float(feature) - _at_least_float(expected))
        self.terms[tap.name] = error / self._energies[index]

    def __getstate__(self) -> dict[str, Any]:
        # What a forward leaves behind does not survive a copy: non-leaf tensors cannot.
        passing: dict[str, Any] = {"_features": {}, "_energies": {}, "terms": {}, "_versions": {}}
        passing["_delayed"] = []
        return {**self.__dict__, **passing, "loss": None, "output": None, "_handles": []}


class Probe(Attachment):
    """Looks at one value during a forward: the n-th output, or input, of a module.

    Args:
        look: is shown the value.
        tap: where it is.
    """

    def __init__(self, look: Callable[[Tensor], None], tap: Tap) -> None:
        self.look, self.tap = look, tap
        self.calls: int | None = None

    def attach(self, model: nn.Module) -> RemovableHandle:
        """Hang this on the module of a model at which the value is seen."""
        module = model.get_submodule(self.tap.module)
        if self.tap.side == "output":
            return module.register_forward_hook(self.see_output)
        return module.register_forward_pre_hook(self.see_input)

    def start(self) -> None:
        """Begin to count the calls of a forward."""
        self.calls = 0

    def stop(self) -> None:
        """Look away until the next start."""
        self.calls = None

    def see_output(self, _: nn.Module, __: Any, output: Any) -> None:
        """Look at what the module put out."""
        self._count(output)

    def see_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Look at what the module is given."""
        self._count(args[0] if args else None)

    def _count(self, value: Any) -> None:
        if self.calls is None:
            return
        if self.calls == self.tap.call and isinstance(value, Tensor):
            self.look(value)
        self.calls += 1


@dataclass(frozen=True, slots=True)
class Expansion:
    """Lifts the channels of a student by its projections, ``P Î``."""

    segments: tuple[Segment, ...]

    def __call__(self, rows: Tensor) -> Tensor:
        """Lift ``(kept, columns)`` to ``(channels, columns)``."""
        return lift_segments(rows, self.segments)


def expansion(tap: Tap, student: Student) -> Expansion | None:
    """Return how a student's channels at a tap lift to the teacher's; None where none are cut."""
    segments = []
    for stretch in tap.layout:
        length = stretch.channels * stretch.repeat
        projection: Projection | None = student.projections.get(stretch.space or "")
        if projection is None:
            segments.append(Segment(length))
            continue
        width = projection.channels // projection.blocks
        first, blocks = stretch.start // width, stretch.channels // width
        segments.append(Segment(length, projection, first, blocks, stretch.repeat))
    cut = any(segment.projection is not None for segment in segments)
    return Expansion(tuple(segments)) if cut else None


def _in_checkpoint() -> bool:
    """Whether a part of the forward is running that the backward will run again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # noqa: FBT003


def _reduced(energies: dict[int, Tensor]) -> dict[int, Tensor]:
    """Sum ``‖I‖²`` of every tap over all processes, and divide by their number.

    So the mean of the processes' losses, which is what DistributedDataParallel trains on, is the
    loss of the whole batch.
    """
    if not energies:
        return {}
    total = torch.stack(list(energies.values()))
    total = processes.mean_(total).clamp_min(torch.finfo(torch.float32).tiny)
    return dict(zip(energies, total.unbind(), strict=True))


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _squared_norm(x: Tensor) -> Tensor:
    flat = _at_least_float(x).flatten()
    return torch.dot(flat, flat)
