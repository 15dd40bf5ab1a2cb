"""Pictures of sensitivities, plans and results. They need matplotlib: ``torchcap[plots]``.

Every function draws on the axes that it is given, or else on those of a new figure, and returns
them. A new figure (``axes.figure``) is made without pyplot: no global list keeps it, and no window
opens. Flat axes of one's own are best in a figure with ``layout="constrained"``, which makes room
for names. Colours are those of viridis, which stay apart in grey and for the colour-blind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import cycle
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from torchcap.errors import FileError, MissingPackageError, PlanError
from torchcap.plan.plan import Choice, Plan
from torchcap.plan.sensitivity import Curve, Sensitivity

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

Value = Literal["score", "error", "output_error"]
Kind = Literal["heat map", "surface"]

_SMALL = 7.0  # points: names of spaces and shares kept, of which there may be many
_ROW, _BAR = 0.17, 0.13  # inches of a new figure for a row of such text, and for each of its bars
_TALLEST = 16.0  # inches of a new figure; names that don't fit in it are thinned out
_NAMES_IN_DEPTH = 12  # as many names as stand beside a surface
_DECADES = 6  # of the scale of errors; below it is the rounding of spaces that are whole
_MARKERS, _DASHES = "osD^vPX", ("-", "--", "-.", ":")


def plot_sensitivity(
    sensitivity: Sensitivity,
    *,
    value: Value = "score",
    kind: Kind = "heat map",
    shares: Sequence[float] | None = None,
    axes: Axes | None = None,
    path: str | PathLike[str] | None = None,
) -> Axes:
    """Draw what each space loses, over the share of its channels that is kept.

    Between the shares that a space was measured at, values are interpolated linearly; outside of
    them nothing is drawn. The darker, the more is lost: scores range up to that of the full model,
    errors over six decades at most, on a logarithmic scale.

    Args:
        sensitivity: the curves, drawn in their order.
        value: ``"score"``, ``"error"`` of the features behind the space, or ``"output_error"``.
        kind: ``"heat map"``, with the first space on top; or ``"surface"``, in three dimensions,
            where every space is a step.
        shares: where to draw, rising, within ``0 < share <= 1``; None for every share that some
            space was measured at.
        axes: where to draw; for a surface, axes with ``projection="3d"``. None for a new figure.
        path: file to write the whole figure to, in the format that its ending names.

    Returns:
        The axes. Names are thinned out where there are too many of them.

    Raises:
        MissingPackageError: if matplotlib is not installed.
        FileError: if no picture can be written by the ending of ``path``.
        PlanError: if there is no curve.
        ValueError: for an unknown value or kind, shares where nothing was measured, a surface over
            one share, or axes of another kind.

    References:
        Minnehan & Savakis, "Cascaded Projection", CVPR 2019, sec. 4.1, figures 4 and 5.
    """
    check_picture(path)
    _check_sensitivity(sensitivity)
    _check_choice("value", value, get_args(Value))
    _check_choice("kind", kind, get_args(Kind))
    grid = _measured_shares(sensitivity.curves) if shares is None else _check_shares(shares)
    values = _interpolate(sensitivity.curves, value, grid)
    draw = _draw_heat_map if kind == "heat map" else _draw_surface
    axes = draw(axes, sensitivity, value, grid, values)
    axes.set_title(
        f"{sensitivity.model}: {_what(sensitivity, value)}\n"
        f"full model: {sensitivity.metric} {sensitivity.baseline:.1%} "
        f"of {sensitivity.images:,} images",
        fontsize="medium",
    )
    _write(axes, path)
    return axes


def plot_plan(
    plan: Plan | Mapping[str, Plan],
    *,
    axes: Axes | None = None,
    path: str | PathLike[str] | None = None,
) -> Axes:
    """Draw the channels that each space keeps and loses, as bars with the share kept beside them.

    Args:
        plan: a plan, whose spaces are drawn in its order, the first on top; or several by name,
            whose bars stand side by side. A space that only some name stays whole in the others.
        axes: where to draw; None for a new figure.
        path: file to write the whole figure to, in the format that its ending names.

    Returns:
        The axes. Names are thinned out where there are too many of them, and shares are left out
        where bars are thinner than text.

    Raises:
        MissingPackageError: if matplotlib is not installed.
        FileError: if no picture can be written by the ending of ``path``.
        PlanError: if no space is named, or plans are for different models.
        ValueError: for axes of another kind.
    """
    check_picture(path)
    plans = plan if isinstance(plan, Mapping) else {"": plan}
    table = _table(plans)
    names = list(next(iter(table.values())))
    axes = _axes(axes, _size(names, bars=len(table)))
    _name_rows(axes, names)
    thickness = 0.8 / len(table)
    for place, (colour, label) in enumerate(zip(_colours(len(table)), table, strict=True)):
        rows = np.arange(len(names)) + (place + 0.5) * thickness - 0.4
        _draw_bars(axes, rows, table[label], thickness, colour=colour, label=label)
    widest = max(choice.channels for choices in table.values() for choice in choices.values())
    axes.set_xlim(0, 1.12 * widest)  # beside the longest bar stands its share
    axes.set_xlabel("channels (pale: removed)")
    models = dict.fromkeys(each.model for each in plans.values() if each.model)
    _head(axes, f"plan for {' and '.join(models) or 'a model'}", entries=len(table))
    _write(axes, path)
    return axes


def plot_tradeoff(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    baseline: float | None = None,
    axes: Axes | None = None,
    path: str | PathLike[str] | None = None,
) -> Axes:
    """Draw the accuracy of small models over the share of MACs that they keep.

    Args:
        curves: points ``(share of MACs kept, accuracy)`` by name of the run, in any order; both
            are shares within 0..1.
        baseline: accuracy of the original, drawn as a horizontal line.
        axes: where to draw; None for a new figure.
        path: file to write the whole figure to, in the format that its ending names.

    Returns:
        The axes.

    Raises:
        MissingPackageError: if matplotlib is not installed.
        FileError: if no picture can be written by the ending of ``path``.
        ValueError: if there is no run, a run has no point, a figure is no share, or for axes of
            another kind.
    """
    check_picture(path)
    lines = _check_curves(curves)
    if baseline is not None and not _is_share(baseline):
        raise ValueError(f"baseline is an accuracy, a share within 0..1; got {baseline!r}")
    axes = _axes(axes, (6.4, 4.4))
    styles = zip(_colours(len(lines)), cycle(_MARKERS), cycle(_DASHES), strict=False)
    for (name, points), (colour, marker, dashes) in zip(lines.items(), styles, strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ls=dashes, label=name)
    if baseline is not None:
        axes.axhline(baseline, color="0.4", linewidth=1, label=f"original: {baseline:.1%}")
    axes.xaxis.set_major_formatter(_percent())
    axes.yaxis.set_major_formatter(_percent())
    axes.set(xlabel="MACs kept", ylabel="accuracy", axisbelow=True)
    axes.grid(color="0.9")
    axes.legend()
    _write(axes, path)
    return axes


def check_picture(path: str | PathLike[str] | None) -> None:
    """Check that a picture can be written to a file, as far as its name tells.

    Raises:
        FileError: if its ending is not that of a format that matplotlib writes.
        MissingPackageError: if matplotlib is not installed.
    """
    if path is None:
        return
    known = _matplotlib("backend_bases").FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in known:
        raise FileError(
            f"{str(path)!r} has not the ending of a picture: expected .{', .'.join(sorted(known))}"
        )


# --------------------------------------------------------------------------------------------------
# Sensitivity: a matrix of spaces by shares, and its two pictures


def _check_sensitivity(sensitivity: Sensitivity) -> None:
    if not isinstance(sensitivity, Sensitivity):
        raise PlanError(
            f"sensitivity must be a torchcap.Sensitivity, got {type(sensitivity).__name__}; read "
            "one by Sensitivity.from_json(text)"
        )
    if not sensitivity.curves:
        raise PlanError(f"the sensitivity of {sensitivity.model!r} has no curve, nothing to draw")


def _check_choice(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {given!r}")


def _check_shares(shares: Sequence[float]) -> Array:
    grid = np.array(shares, dtype=np.float64)
    within = grid.ndim == 1 and grid.size > 0 and bool(((grid > 0) & (grid <= 1)).all())
    if not within or not (np.diff(grid) > 0).all():
        raise ValueError(f"shares must rise within 0 < share <= 1; got {shares!r}")
    return grid


def _measured_shares(curves: Sequence[Curve]) -> Array:
    """Return every share that some space was measured at, rising."""
    return np.array(sorted({rank / curve.channels for curve in curves for rank in curve.ranks}))


def _interpolate(curves: Sequence[Curve], value: Value, shares: Array) -> Array:
    """Return values of shape ``(spaces, shares)``, NaN outside of what a space was measured at."""
    rows = []
    for curve in curves:
        at = np.array(curve.ranks) / curve.channels
        rows.append(np.interp(shares, at, _measured(curve, value), left=np.nan, right=np.nan))
    if np.isnan(rows).all():
        raise ValueError(f"no space was measured around the shares {shares.tolist()}")
    return np.array(rows)


def _measured(curve: Curve, value: Value) -> tuple[float, ...]:
    if value == "score":
        return curve.scores
    return curve.errors if value == "error" else curve.output_errors


def _draw_heat_map(
    axes: Axes | None, sensitivity: Sensitivity, value: Value, shares: Array, values: Array
) -> Axes:
    names = [curve.space for curve in sensitivity.curves]
    axes = _axes(axes, _size(names))
    _name_rows(axes, names)
    norm, colours = _scale(values, sensitivity, value)
    rows = np.arange(len(names) + 1) - 0.5
    cells = np.ma.masked_invalid(values)
    mesh = axes.pcolormesh(_borders(shares), rows, cells, norm=norm, cmap=colours)
    _add_scale(axes, mesh, sensitivity, value, extend=_extend(values, norm))
    axes.patch.set(facecolor="white", edgecolor="0.7", hatch="////", linewidth=0)
    axes.xaxis.set_major_formatter(_percent())
    blank = " (hatched: not measured)" if np.isnan(values).any() else ""
    axes.set_xlabel(f"channels kept, in one space at a time{blank}")
    return axes


def _borders(shares: Array) -> Array:
    """Return the borders of cells around the shares, halfway between them and within 0..1."""
    if len(shares) == 1:
        return np.clip([shares[0] - 0.05, shares[0] + 0.05], 0, 1)
    middle = (shares[1:] + shares[:-1]) / 2
    return np.clip([2 * shares[0] - middle[0], *middle, 2 * shares[-1] - middle[-1]], 0, 1)


def _draw_surface(
    axes: Axes | None, sensitivity: Sensitivity, value: Value, shares: Array, values: Array
) -> Axes:
    if len(shares) == 1:
        raise ValueError(f"a surface needs two shares at least, got {shares[0]:g}; draw a heat map")
    names = [curve.space for curve in sensitivity.curves]
    size = (7.6 + 0.06 * max(map(len, names)), 6.5)
    solid: Any = _axes(axes, size, solid=True)  # what draws in three dimensions has no types
    norm, colours = _scale(values, sensitivity, value)
    heights, limits = values, np.array([norm.vmin, norm.vmax])
    if value == "score":
        solid.zaxis.set_major_formatter(_percent())
        solid.set_xlim(shares[-1], shares[0])  # what is high stands behind what is low
    else:  # there are no logarithmic axes in three dimensions
        heights, limits = np.log10(np.clip(values, norm.vmin, None)), np.log10(limits)
        decades = range(ceil(limits[0]), floor(limits[1]) + 1)
        solid.set_zticks(decades, [f"$10^{{{decade}}}$" for decade in decades])
    borders = np.arange(len(values) + 1) - 0.5
    x, y = np.meshgrid(shares, np.repeat(borders, 2)[1:-1])  # both sides of every step
    low, high = limits
    shading: dict[str, Any] = {"cmap": colours, "vmin": low, "vmax": high, "linewidth": 0.2}
    steps = np.repeat(heights, 2, axis=0)
    solid.plot_surface(x, y, steps, rstride=1, cstride=1, edgecolor="0.3", **shading)
    solid.set_zlim(low, high)
    mappable = _matplotlib("cm").ScalarMappable(norm, colours)
    extend = _extend(values, norm)
    beside = {"shrink": 0.6, "pad": 0.12, "panchor": (0, 0.5)}  # beyond the names
    _add_scale(solid, mappable, sensitivity, value, extend=extend, **beside)
    _label_floor(solid, names)
    return solid


def _label_floor(solid: Any, names: Sequence[str]) -> None:
    shown = range(0, len(names), ceil(len(names) / _NAMES_IN_DEPTH))
    solid.set_yticks(shown, [names[row] for row in shown], fontsize=_SMALL, ha="left")
    solid.tick_params(axis="y", pad=-3)
    solid.tick_params(axis="z", pad=8)
    solid.locator_params(axis="x", nbins=6)
    solid.xaxis.set_major_formatter(_percent())
    solid.set_xlabel("channels kept,\nin one space at a time", labelpad=12, fontsize="small")


def _scale(values: Array, sensitivity: Sensitivity, value: Value) -> tuple[Any, str]:
    """Return the range of the colours, and their name: the darker, the more is lost."""
    colors = _matplotlib("colors")
    most = float(np.nanmax(values))
    if value == "score":
        most = max(most, sensitivity.baseline)
        return colors.Normalize(min(np.nanmin(values), most - 0.01), most), "viridis"
    most = most or 1.0
    least = min(values[values >= most * 10.0**-_DECADES], default=most)
    return colors.LogNorm(min(least, most / 10), most, clip=True), "viridis_r"


def _extend(values: Array, norm: Any) -> str:
    """Say whether there are values below the scale of colours."""
    return "min" if np.nanmin(values) < norm.vmin else "neither"


def _add_scale(
    axes: Axes, mappable: Any, sensitivity: Sensitivity, value: Value, **options: Any
) -> None:
    label = {
        "score": f"{sensitivity.metric} (share of the images)",
        "error": "mean square error\n(share of the features' mean square)",
        "output_error": "mean square error\n(share of the outputs' mean square)",
    }[value]
    formatter = _percent() if value == "score" else None
    axes.figure.colorbar(mappable, ax=axes, label=label, format=formatter, **options)


def _what(sensitivity: Sensitivity, value: Value) -> str:
    if value == "score":
        return sensitivity.metric
    return "error of the features behind the space" if value == "error" else "error of the outputs"


# --------------------------------------------------------------------------------------------------
# Plans: a table of choices, and its bars


def _table(plans: Mapping[str, Plan]) -> dict[str, dict[str, Choice]]:
    """Return the choices by plan and space, for every plan the same spaces in the same order."""
    channels: dict[str, int] = {}
    for label, plan in plans.items():
        if not isinstance(plan, Plan):
            raise PlanError(
                f"plan must be a torchcap.Plan, or several by name; got {type(plan).__name__}"
                f"{f' for {label!r}' if label else ''}"
            )
        for name, choice in plan.choices.items():
            if channels.setdefault(name, choice.channels) != choice.channels:
                raise PlanError(
                    f"the plans are for different models: space {name!r} has {choice.channels} "
                    f"channels in plan {label!r}, {channels[name]} in one before; draw them apart"
                )
    if not channels:
        raise PlanError("no plan names a space, nothing to draw")
    whole = {name: Choice(width, width) for name, width in channels.items()}
    return {label: whole | dict(plan.choices) for label, plan in plans.items()}


def _draw_bars(
    axes: Axes,
    rows: Array,
    choices: Mapping[str, Choice],
    thickness: float,
    *,
    colour: Any,
    label: str,
) -> None:
    """Draw what is kept and, in the same bars, what is removed."""
    ranks = np.array([choice.rank for choice in choices.values()])
    channels = np.array([choice.channels for choice in choices.values()])
    kept, total = ranks.sum(), channels.sum()
    totals = f"{kept:,} of {total:,} channels kept ({kept / total:.1%})"
    axes.barh(rows, ranks, thickness, color=colour, label=f"{label}: {totals}" if label else totals)
    pale: dict[str, Any] = {"color": "0.93", "edgecolor": "0.6", "linewidth": 0.5}
    removed = axes.barh(rows, channels - ranks, thickness, ranks, **pale)
    if thickness * _row_height(axes) >= _SMALL:
        shares = [f"{share:.3g}%" for share in 100 * ranks / channels]
        axes.bar_label(removed, shares, padding=2, fontsize=_SMALL)


def _head(axes: Axes, title: str, *, entries: int) -> None:
    """Write the legend above the axes, where no bar is, and the title above that."""
    small = {"fontsize": "small", "frameon": False, "borderpad": 0, "borderaxespad": 0.4}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), **small)
    axes.set_title(title, fontsize="medium", pad=5 + 12.5 * entries)  # points


# --------------------------------------------------------------------------------------------------
# Accuracy and MACs


def _check_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
) -> dict[str, list[tuple[float, float]]]:
    """Return the points of every run, by rising share of MACs."""
    if not curves:
        raise ValueError("there is no run to draw; give at least one, as name -> points")
    lines = {name: sorted(points) for name, points in curves.items()}
    for name, points in lines.items():
        if not points:
            raise ValueError(f"run {name!r} has no point; give it pairs (MACs kept, accuracy)")
        for point in points:
            if len(point) != 2 or not all(map(_is_share, point)):
                raise ValueError(
                    f"run {name!r} has the point {point}; expected (MACs kept, accuracy), both "
                    "shares within 0..1"
                )
    return lines


def _is_share(figure: float) -> bool:
    return 0 <= figure <= 1


# --------------------------------------------------------------------------------------------------
# Matplotlib: axes, rows with names, colours


def _matplotlib(module: str) -> Any:
    """Import a module of matplotlib, which need not be installed."""
    try:
        return import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise MissingPackageError(
            f"pictures need matplotlib, which cannot be imported ({error}); "
            "pip install 'torchcap[plots]'"
        ) from error


def _axes(axes: Axes | None, size: tuple[float, float], *, solid: bool = False) -> Axes:
    """Return the axes given, or those of a new figure of a size in inches."""
    figures = _matplotlib("figure")
    if axes is None and solid:  # layouts misjudge labels in three dimensions
        return figures.Figure(size, dpi=150).add_axes((0.02, 0.04, 0.96, 0.88), projection="3d")
    if axes is None:
        return figures.Figure(size, dpi=150, layout="constrained").add_subplot()
    if (axes.name == "3d") != solid:
        expected = 'axes with projection="3d"' if solid else "axes in two dimensions"
        raise ValueError(f"this picture needs {expected}; got {axes.name!r} axes")
    return axes


def _size(names: Sequence[str], bars: int = 1) -> tuple[float, float]:
    """Return width and height in inches of a new figure with a row of so many bars a name."""
    height = 1.6 + len(names) * max(_ROW, bars * _BAR)
    return 6.0 + 0.06 * max(map(len, names)), min(max(height, 3.4), _TALLEST)


def _row_height(axes: Axes) -> float:
    """Return the height of a row in points; rows are one unit apart."""
    low, high = axes.get_ylim()
    return axes.get_window_extent().height * 72 / axes.figure.dpi / abs(high - low)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Make a row for every name, the first on top, and write as many names as there is room for."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    shown = range(0, len(names), ceil(1.1 * _SMALL / _row_height(axes)))
    axes.set_yticks(shown, [names[row] for row in shown], fontsize=_SMALL)


def _colours(count: int) -> list[Any]:
    """Return so many colours, from dark to light."""
    return list(_matplotlib("cm").viridis(np.linspace(0.15, 0.75, count)))


def _percent() -> Any:
    return _matplotlib("ticker").PercentFormatter(1.0)


def _write(axes: Axes, path: str | PathLike[str] | None) -> None:
    if path is not None:
        axes.figure.figure.savefig(path)  # the whole, where axes are in a part of a figure
