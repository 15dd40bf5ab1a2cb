"""From a budget to a plan: what is missing is measured, and kept so that a run can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchcap import processes
from torchcap.batches import Batches, Source, as_source
from torchcap.digest import digest
from torchcap.errors import DataError, StateError
from torchcap.graph.analyze import Reader
from torchcap.graph.inputs import ExampleInputs, as_inputs
from torchcap.graph.rules import Rules
from torchcap.graph.spaces import SpaceGraph
from torchcap.modes import outside_inference_mode
from torchcap.plan.allocate import allocate, check_reachable
from torchcap.plan.latency import LatencyTable
from torchcap.plan.limits import Limits
from torchcap.plan.plan import Plan
from torchcap.plan.sensitivity import Sensitivity
from torchcap.training.clock import measure_latency
from torchcap.training.measure import SHARES, sensitivity
from torchcap.training.progress import OnProgress
from torchcap.training.state import check_folder, write_text


@outside_inference_mode
def plan_for(  # noqa: PLR0913 - an argument for each thing that may be said
    model: nn.Module,
    data: Batches | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    activations: float | None = None,
    latency_ms: float | None = None,
    curves: Sensitivity | None = None,
    latency: LatencyTable | None = None,
    multiple_of: int = 1,
    minimum: float | Mapping[str, float] = 0.05,
    fixed: Sequence[str] = (),
    example_inputs: ExampleInputs | None = None,
    seed: int = 0,
    state: Path | str | None = None,
    on_progress: OnProgress | None = None,
    leaves: Sequence[type[nn.Module]] = (),
    rules: Rules | None = None,
    streams: bool = False,
) -> Plan:
    """Return the plan that loses least within a budget; what it needs to know is measured.

    This is what :func:`torchcap.compress` does first where it is given a budget: the curves of
    :func:`torchcap.sensitivity` on the data, for a latency the times of
    :func:`torchcap.measure_latency`, and then :func:`torchcap.allocate`.

    Args:
        model: a trained model; it is not changed.
        data: batches as for :func:`torchcap.compress`; not needed where ``curves`` are given.
        macs: budget of multiply-adds: as a share of the model's, within 0 and 1, or a number
            above 1. Exactly one budget is given.
        params: budget of parameters, likewise.
        activations: budget of the values that layers write, likewise.
        latency_ms: budget in milliseconds of one forward on ``example_inputs``, on the device of
            the model.
        curves: what :func:`torchcap.sensitivity` has measured.
        latency: what :func:`torchcap.measure_latency` has measured.
        multiple_of: ranks are multiples of this, as in :func:`torchcap.allocate`.
        minimum: least share of the channels that a space keeps; or a mapping by name.
        fixed: names of spaces that keep all channels.
        example_inputs: for reading the model; by default the first batch.
        seed: of everything that is drawn.
        state: name of a run: measurements go to ``STATE.curves`` and ``STATE.latency``, and are
            read from there if they are there.
        on_progress: called after each measurement.
        leaves: as for :func:`torchcap.analyze`.
        rules: as for :func:`torchcap.analyze`.
        streams: as for :func:`torchcap.analyze`.

    Raises:
        PlanError: if no or several budgets are given, one that cannot be reached, or one that the
            model keeps to as it is; this is found before curves are measured.
        DataError: if curves have to be measured and there is no data, or it cannot be used.
        StateError: if measurements cannot be written or read, or belong to another model.
        TraceError, ExampleInputsError, NothingToCompressError: as for :func:`torchcap.analyze`.
    """
    source = None if data is None else as_source(data, model, seed)
    if source is not None and example_inputs is None:
        example_inputs = source.first().inputs
    reader = Reader(leaves, rules, streams)
    graph = reader.proven(model, example_inputs)
    kept = Measurements(model, source, example_inputs, seed, state, on_progress, reader)
    return kept.plan(
        graph,
        curves,
        latency,
        macs=macs,
        params=params,
        activations=activations,
        latency_ms=latency_ms,
        multiple_of=multiple_of,
        minimum=minimum,
        fixed=fixed,
    )


@dataclass(slots=True)
class Measurements:
    """What a budget is shared out by; kept beside the state of a run, so that it can go on.

    Attributes:
        model: the model.
        source: images; None if there are none.
        example_inputs: that the model is read and timed on.
        seed: of everything that is drawn.
        state: the file of the run; None to keep nothing.
        on_progress: called after each measurement.
        reader: how the model is read.
        files: those that were made.
    """

    model: nn.Module
    source: Source | None
    example_inputs: ExampleInputs | None
    seed: int
    state: Path | str | None
    on_progress: OnProgress | None
    reader: Reader
    files: list[Path] = field(default_factory=list)

    def plan(
        self,
        graph: SpaceGraph,
        curves: Sensitivity | None,
        latency: LatencyTable | None,
        *,
        latency_ms: float | None,
        **wishes: Any,
    ) -> Plan:
        """Measure what is not given, and allocate; other arguments are those of ``allocate``."""
        if self.state is not None:
            check_folder(Path(self.state))  # before any work is done
        limits = Limits(latency_ms=latency_ms, latency=latency, **wishes)
        if curves is None:
            self._images()  # that are going to be needed
        if latency_ms is not None and latency is None:
            latency = self.latency()
            limits = replace(limits, latency=latency)
        if curves is None:
            check_reachable(graph, limits, Plan.uniform(graph, min(SHARES)).ranks)
            curves = self.curves()
        return allocate(graph, curves, latency_ms=latency_ms, latency=latency, **wishes)

    def curves(self) -> Sensitivity:
        """Measure what the spaces lose."""
        return sensitivity(
            self.model,
            self._images(),
            example_inputs=self.example_inputs,
            seed=self.seed,
            cache=self._path("curves"),
            on_progress=self.on_progress,
            leaves=self.reader.leaves,
            rules=self.reader.rules,
            streams=self.reader.streams,
        )

    def latency(self) -> LatencyTable:
        """Measure what the layers take; another time it would be something else."""
        path, text = self._path("latency"), ""
        if processes.rank() == 0 and path is not None and path.exists():
            text = self._read(path)
        elif processes.rank() == 0:
            text = measure_latency(
                self.model,
                self.example_inputs,
                on_progress=self.on_progress,
                leaves=self.reader.leaves,
                rules=self.reader.rules,
                streams=self.reader.streams,
            ).to_json()
            if path is not None:
                write_text(path, json.dumps({"of": self._clocked(), "table": text}))
        return LatencyTable.from_json(processes.shared_text(text))

    def remove(self) -> None:
        """Remove what was kept: the run is done."""
        for path in self.files if processes.rank() == 0 else ():
            path.unlink(missing_ok=True)

    def _images(self) -> Source:
        if self.source is None:
            raise DataError(
                "a budget is shared out by what every space loses, which is measured on images: "
                "give data=, or curves= from torchcap.sensitivity()"
            )
        return self.source

    def _path(self, kind: str) -> Path | None:
        if self.state is None:
            return None
        self.files.append(Path(f"{self.state}.{kind}"))
        return self.files[-1]

    def _read(self, path: Path) -> str:
        try:
            content = json.loads(path.read_text("utf-8"))
            of, table = content["of"], str(content["table"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"{str(path)!r} cannot be read as measured times ({error}); remove it to begin anew"
            ) from error
        if of != self._clocked():
            raise StateError(
                f"{str(path)!r} holds times of another model, or of other inputs; give another "
                "state, or remove it to begin anew"
            )
        return table

    def _clocked(self) -> list[str]:
        """Return what was timed, in words."""
        inputs = as_inputs(self.example_inputs) if self.example_inputs is not None else None
        values = [] if inputs is None else [*inputs.args, *inputs.kwargs.values()]
        shapes = [f"{tuple(v.shape)} {v.dtype}" for v in values if isinstance(v, Tensor)]
        return [digest(self.model.state_dict(), repr(self.model)), *shapes]
