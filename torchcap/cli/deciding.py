"""The commands that measure and decide: ``sensitivity``, ``latency``, ``plan``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcap import processes
from torchcap.budget import Measurements, plan_for
from torchcap.cli.console import Bars, Result, table
from torchcap.cli.files import read_document
from torchcap.cli.folders import open_data
from torchcap.cli.models import Network, open_network
from torchcap.errors import PlanError
from torchcap.graph.analyze import Reader, analyze
from torchcap.graph.spaces import SpaceGraph
from torchcap.plan.cost import cost
from torchcap.plan.latency import LatencyTable, predict_latency
from torchcap.plan.plan import Plan
from torchcap.plan.sensitivity import Sensitivity
from torchcap.plot import plot_plan, plot_sensitivity
from torchcap.training.clock import measure_latency
from torchcap.training.measure import SHARES, sensitivity
from torchcap.training.state import write_text

if TYPE_CHECKING:
    from argparse import Namespace

    from torchcap.batches import Batches


_ROWS = {"parameters": "parameters, norms folded"}


def sensitivity_command(options: Namespace, bars: Bars) -> Result:
    """Measure the curves of a model's spaces."""
    network = open_network(options)
    data, _ = open_data(options, network)
    found = sensitivity(
        network.model,
        data,
        shares=options.shares or SHARES,
        images=512 if options.images is None else options.images,
        example_inputs=network.example,
        seed=options.seed,
        cache=options.out,
        on_progress=bars,
        streams=options.streams,
    )
    if options.plot is not None and processes.rank() == 0:
        plot_sensitivity(found, path=options.plot)
    return Result(f"{found}\n\nwritten to {options.out}", found.to_dict())


def latency_command(options: Namespace, bars: Bars) -> Result:
    """Measure what a model's layers take on this machine."""
    network = open_network(options, trained=False)
    found = measure_latency(
        network.model, network.batch(options.batch), on_progress=bars, streams=options.streams
    )
    write_text(options.out, found.to_json())
    layers = {name: times.milliseconds[-1][-1] for name, times in found.layers.items()}
    slowest = sorted(layers.items(), key=lambda item: -item[1])
    text = [
        f"{found.model}, batch of {options.batch} on {found.device}: {found.whole:.2f} ms",
        table(
            [
                ("layer", "ms"),
                *((name, f"{milliseconds:.3f}") for name, milliseconds in slowest),
                ("all else", f"{found.rest:.3f}"),
            ]
        ),
        f"written to {options.out}",
    ]
    data = {
        "model": found.model,
        "device": found.device,
        "batch": options.batch,
        "milliseconds": found.whole,
        "layers": layers,
        "rest": found.rest,
        "file": str(options.out),
    }
    return Result("\n\n".join(text), data)


def plan_command(options: Namespace, bars: Bars) -> Result:
    """Make a plan, or say how two differ."""
    if options.diff is not None:
        return _difference(*options.diff)
    measured = _has_budget(options) and options.curves is None and options.data is not None
    network = open_network(options, trained=measured)
    times = _latency_table(options, network, bars)
    data = open_data(options, network)[0] if measured else None
    plan = decide(options, network, data, times, bars)
    if processes.rank() == 0:
        if options.out is not None:
            write_text(options.out, plan.to_json())
        if options.plot is not None:
            plot_plan(plan, path=options.plot)
    graph = analyze(network.model, network.batch(options.latency_batch), streams=options.streams)
    costs = _predicted(graph, plan, times)
    rows = [
        ("predicted", "full width", "planned", "kept"),
        *((_ROWS.get(n, n), _number(a), _number(b), f"{b / a:.1%}") for n, (a, b) in costs.items()),
    ]
    written = "" if options.out is None else f"\n\nwritten to {options.out}"
    text = f"{plan}\n\n{table(rows)}{written}"
    predicted = {name: {"full_width": a, "planned": b} for name, (a, b) in costs.items()}
    return Result(text, {"plan": plan.to_dict(), "predicted": predicted})


def decide(
    options: Namespace,
    network: Network,
    data: Batches | None,
    times: LatencyTable | None,
    bars: Bars,
    state: Path | None = None,
) -> Plan:
    """Return the plan that the arguments ask for.

    Args:
        options: ``ratio``, ``curves``, and the budgets.
        network: the model.
        data: what curves are measured on, if there are none.
        times: of its layers, for ``latency_ms``; None to measure them, or where none are needed.
        bars: show the progress.
        state: of a run, beside which measurements are kept.

    Raises:
        PlanError: if a budget is given, and neither curves nor images; or it cannot be reached.
    """
    if not _has_budget(options):
        graph = analyze(network.model, network.example, streams=options.streams)
        return Plan.uniform(
            graph, 0.5 if options.ratio is None else options.ratio, multiple_of=options.multiple_of
        )
    if options.curves is None and data is None:
        raise PlanError(
            "a budget is shared out by what every space loses: give --curves FILE, from "
            "`torchcap sensitivity`, or --data DIR to measure it now"
        )
    curves = None
    if options.curves is not None:
        curves = read_document(options.curves, Sensitivity.from_json)
    return plan_for(
        network.model,
        data,
        macs=options.macs,
        params=options.params,
        activations=options.activations,
        latency_ms=options.latency_ms,
        curves=curves,
        latency=times,
        multiple_of=options.multiple_of,
        minimum=options.minimum,
        example_inputs=network.batch(options.latency_batch),
        seed=options.seed,
        state=state,
        on_progress=bars,
        streams=options.streams,
    )


def _has_budget(options: Namespace) -> bool:
    budgets = (options.macs, options.params, options.activations, options.latency_ms)
    return any(budget is not None for budget in budgets)


def given_times(options: Namespace) -> LatencyTable | None:
    """Return the times that ``--latency`` names, if any."""
    if options.latency is None:
        return None
    return read_document(options.latency, LatencyTable.from_json)


def _latency_table(options: Namespace, network: Network, bars: Bars) -> LatencyTable | None:
    if options.latency is not None or options.latency_ms is None:
        return given_times(options)
    batch = network.batch(options.latency_batch)
    reader = Reader(streams=options.streams)
    return Measurements(network.model, None, batch, options.seed, None, bars, reader).latency()


def _predicted(
    graph: SpaceGraph, plan: Plan, times: LatencyTable | None
) -> dict[str, tuple[float, float]]:
    """Return what the folded model costs at full width, and with the plan."""
    full, planned = cost(graph), cost(graph, plan)
    costs: dict[str, tuple[float, float]] = {
        name: (getattr(full, name), getattr(planned, name))
        for name in ("macs", "parameters", "activations")
    }
    if times is not None:
        milliseconds = (predict_latency(graph, p, times) for p in (None, plan))
        before, after = milliseconds
        costs["milliseconds"] = (before, after)
    return costs


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _difference(first: Path, second: Path) -> Result:
    one, other = (read_document(path, Plan.from_json) for path in (first, second))
    found = one.differences(other)
    rows: list[Sequence[str]] = [("space", "channels", str(first), str(second))]
    data: dict[str, Any] = {}
    for name, pair in found.items():
        channels = next(choice.channels for choice in pair if choice is not None)
        ranks = [None if choice is None else choice.rank for choice in pair]
        rows.append((name, str(channels), *("-" if r is None else str(r) for r in ranks)))
        data[name] = {"channels": channels, "ranks": ranks}
    return Result(table(rows) if found else "the plans do not differ", {"differences": data})
