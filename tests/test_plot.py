"""Pictures: what is drawn, and that it can be read.

Figures are made directly and drawn by Agg, so none is left behind in pyplot's global list.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcap import (
    Choice,
    Curve,
    FileError,
    MissingPackageError,
    Plan,
    PlanError,
    Sensitivity,
    plot,
)
from torchcap.plot import plot_plan, plot_sensitivity, plot_tradeoff

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

PROPERTY = settings(deadline=None, print_blob=True, max_examples=20)


def curve(space: str, channels: int, ranks: tuple[int, ...], *, slope: float = 1.0) -> Curve:
    """Return a curve whose values fall straight from rank 0 to all channels."""
    gone = [1 - rank / channels for rank in ranks]
    errors = tuple(slope * share for share in gone)
    halves = tuple(error / 2 for error in errors)
    return Curve(space, channels, ranks, errors, halves, tuple(0.9 - share / 4 for share in gone))


def sensitivity(*curves: Curve) -> Sensitivity:
    return Sensitivity("TinyNet", curves, "accuracy", 0.925, 1234)


def many(count: int, name: str = "layer{}.conv1") -> Sensitivity:
    return sensitivity(*(curve(name.format(i), 16, (2, 4, 8, 12, 15)) for i in range(count)))


# The first is measured at 1/4, 1/2 and 3/4; the second at 1/2 and 1; the third at 1/2 alone.
TINY = sensitivity(curve("a", 8, (2, 4, 6)), curve("b", 4, (2, 4)), curve("c", 2, (1,)))
PLAN = Plan({"conv1": Choice(8, 2), "conv2": Choice(6, 6), "fc": Choice(30, 10)}, "TinyNet")


def values(axes: Axes) -> np.ndarray:
    """Return the matrix of a heat map, NaN where it is blank."""
    return np.ma.filled(axes.collections[0].get_array().astype(float), np.nan)


def names(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def scale(axes: Axes) -> Axes:
    """Return the axes of the colour bar."""
    (other,) = (each for each in axes.figure.axes if each is not axes)
    return other


def drawn(axes: Axes) -> FigureCanvasAgg:
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    return canvas


def assert_nothing_is_cut_off(axes: Axes) -> None:
    canvas = drawn(axes)
    box = axes.figure.get_tightbbox(canvas.get_renderer())
    width, height = axes.figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height


def assert_names_stand_apart(axes: Axes) -> None:
    drawn(axes)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    boxes.sort(key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))


# --------------------------------------------------------------------------------------------------
# Heat map


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("score", [[0.7125, 0.775, 0.8375], [np.nan, 0.775, 0.8375], [np.nan, 0.775, np.nan]]),
        ("error", [[0.75, 0.5, 0.25], [np.nan, 0.5, 0.25], [np.nan, 0.5, np.nan]]),
        ("output_error", [[0.375, 0.25, 0.125], [np.nan, 0.25, 0.125], [np.nan, 0.25, np.nan]]),
    ],
)
def test_heat_map_shows_every_measured_share_and_is_blank_outside(value, expected) -> None:
    drawn_values = values(plot_sensitivity(TINY, value=value))
    # The fourth share is 1, which the second space alone was measured at.
    np.testing.assert_allclose(drawn_values[:, :3], expected)
    assert np.isnan(drawn_values[:, 3]).tolist() == [True, False, True]


def test_heat_map_is_linear_between_measured_shares() -> None:
    bent = Curve("a", 8, (2, 4, 8), (0.8, 0.2, 0.0), (0.4, 0.1, 0.0), (0.5, 0.7, 0.9))
    shares = [0.2, 0.25, 0.375, 0.5, 0.75, 1.0]
    axes = plot_sensitivity(sensitivity(bent), value="error", shares=shares)
    np.testing.assert_allclose(values(axes), [[np.nan, 0.8, 0.5, 0.2, 0.1, 0.0]])


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    channels = draw(st.integers(1, 40))
    ranks = draw(st.sets(st.integers(1, channels), min_size=1, max_size=5))
    points = [draw(st.floats(1e-9, 1)) for _ in ranks]
    return Curve("a", channels, tuple(sorted(ranks)), tuple(points), tuple(points), tuple(points))


@PROPERTY
@given(st.lists(curves(), min_size=1, max_size=4), st.sampled_from(["score", "output_error"]))
def test_every_measurement_stands_in_the_heat_map(drawn_curves, value) -> None:
    drawn_curves = [replace(curve, space=str(n)) for n, curve in enumerate(drawn_curves)]
    rows = values(plot_sensitivity(sensitivity(*drawn_curves), value=value))
    shares = sorted({rank / c.channels for c in drawn_curves for rank in c.ranks})
    for row, each in zip(rows, drawn_curves, strict=True):
        measured = dict(zip(each.ranks, each.scores, strict=True))
        shown = dict(zip(shares, row, strict=True))
        assert {rank: shown[rank / each.channels] for rank in each.ranks} == measured
        first, last = each.ranks[0] / each.channels, each.ranks[-1] / each.channels
        inside = [first <= share <= last for share in shares]
        assert (~np.isnan(row)).tolist() == inside


def test_cells_lie_around_their_shares_and_within_all_channels() -> None:
    mesh = plot_sensitivity(TINY).collections[0]
    borders = mesh.get_coordinates()[0, :, 0]
    np.testing.assert_allclose(borders, [0.125, 0.375, 0.625, 0.875, 1.0])


def test_heat_map_of_one_measurement() -> None:
    axes = plot_sensitivity(sensitivity(curve("a", 2, (2,))), value="error")
    np.testing.assert_array_equal(values(axes), [[0.0]])
    assert_nothing_is_cut_off(axes)


def test_blanks_are_explained_where_there_are_any() -> None:
    assert "not measured" in plot_sensitivity(TINY).get_xlabel()
    assert "not measured" not in plot_sensitivity(many(3)).get_xlabel()


def test_spaces_are_named_in_order_from_the_top() -> None:
    axes = plot_sensitivity(many(27))
    assert names(axes) == [f"layer{i}.conv1" for i in range(27)]
    bottom, top = axes.get_ylim()
    assert bottom > top


@pytest.mark.parametrize("kind", ["heat map", "surface"])
@pytest.mark.parametrize("value", ["score", "error", "output_error"])
def test_title_and_scale_say_what_was_measured(value, kind) -> None:
    axes = plot_sensitivity(TINY, value=value, kind=kind)
    for fact in ("TinyNet", "accuracy 92.5%", "1,234 images"):
        assert fact in axes.get_title()
    unit = {"score": "accuracy", "error": "features' mean", "output_error": "outputs' mean"}
    assert unit[value] in scale(axes).get_ylabel()


def test_agreement_is_called_so() -> None:
    agreement = Sensitivity("TinyNet", TINY.curves, "agreement", 1.0, 8)
    axes = plot_sensitivity(agreement)
    assert "agreement 100.0%" in axes.get_title()
    assert "agreement" in scale(axes).get_ylabel()


def test_scores_are_coloured_up_to_the_full_model_and_darken_with_loss() -> None:
    mesh = plot_sensitivity(TINY).collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (pytest.approx(0.7125), 0.925)
    dark, bright = (sum(mesh.to_rgba(score)[:3]) for score in (0.72, 0.92))
    assert dark < bright


def test_errors_are_coloured_by_their_logarithm_and_darken_with_loss() -> None:
    mesh = plot_sensitivity(TINY, value="error").collections[0]
    assert isinstance(mesh.norm, LogNorm)
    dark, bright = (sum(mesh.to_rgba(error)[:3]) for error in (0.7, 0.01))
    assert dark < bright


@pytest.mark.parametrize("rounding", [0.0, 1e-14])
def test_rounding_errors_take_no_part_of_the_scale_and_are_still_drawn(rounding) -> None:
    row = Curve("a", 4, (1, 2, 4), (0.5, 1e-3, rounding), (0.0, 0.0, 0.0), (0.1, 0.2, 0.3))
    axes = plot_sensitivity(sensitivity(row), value="error")
    mesh = axes.collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1e-3, 0.5)
    assert mesh.to_rgba(rounding) == mesh.to_rgba(1e-3)


def test_errors_that_are_all_zero_are_drawn() -> None:
    zero = Curve("a", 4, (2, 4), (0.0, 0.0), (0.0, 0.0), (0.5, 0.5))
    assert_nothing_is_cut_off(plot_sensitivity(sensitivity(zero), value="error"))


# --------------------------------------------------------------------------------------------------
# Surface


def surface(monkeypatch, measured: Sensitivity, value: str) -> tuple[Axes, np.ndarray]:
    """Return axes with a surface, and its corners (share, row, height)."""
    axes = Figure().add_subplot(projection="3d")
    given = []
    draw = axes.plot_surface
    monkeypatch.setattr(
        axes, "plot_surface", lambda *xyz, **o: given.extend(xyz) or draw(*xyz, **o)
    )
    plot_sensitivity(measured, value=value, kind="surface", axes=axes)
    return axes, np.stack(given, axis=-1)


def test_surface_has_a_step_for_every_space_at_its_scores(monkeypatch) -> None:
    _, corners = surface(monkeypatch, TINY, "score")
    rows = [-0.5, 0.5, 0.5, 1.5, 1.5, 2.5]  # each step has two sides
    shares = [0.25, 0.5, 0.75, 1.0]
    scores = values(plot_sensitivity(TINY)).repeat(2, axis=0)
    for row, side, step in zip(rows, corners, scores, strict=True):
        expected = [(share, row, score) for share, score in zip(shares, step, strict=True)]
        np.testing.assert_array_equal(side, expected)


def test_low_end_of_a_surface_stands_in_front(monkeypatch) -> None:
    assert surface(monkeypatch, TINY, "score")[0].xaxis_inverted()
    assert not surface(monkeypatch, TINY, "error")[0].xaxis_inverted()


def test_surface_of_errors_rises_with_their_logarithm(monkeypatch) -> None:
    one = Curve("a", 4, (1, 2, 4), (1.0, 0.01, 0.0), (0.0, 0.0, 0.0), (0.5, 0.6, 0.7))
    axes, corners = surface(monkeypatch, sensitivity(one), "error")
    # The error of all channels, zero, lies at the lower end of the scale.
    np.testing.assert_allclose(corners[:, :, 2], [[0, -2, -2], [0, -2, -2]], atol=1e-12)
    labels = [label.get_text() for label in axes.get_zticklabels()]
    assert labels == ["$10^{-2}$", "$10^{-1}$", "$10^{0}$"]
    np.testing.assert_array_equal(axes.get_zticks(), [-2, -1, 0])


def test_surface_names_spaces_in_order_and_thins_them_out() -> None:
    assert names(plot_sensitivity(TINY, kind="surface")) == ["a", "b", "c"]
    axes = plot_sensitivity(many(60), kind="surface")
    assert names(axes) == [f"layer{i}.conv1" for i in range(0, 60, 5)]
    assert axes.get_yticks().tolist() == list(range(0, 60, 5))


def test_surface_over_one_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two shares.*0\.5.*heat map"):
        plot_sensitivity(TINY, kind="surface", shares=[0.5])


# --------------------------------------------------------------------------------------------------
# Plans


def bars(axes: Axes) -> list[list[tuple[float, float]]]:
    """Return (left end, width) of every bar, by group."""
    return [[(bar.get_x(), bar.get_width()) for bar in group] for group in axes.containers]


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_bars_are_as_long_as_ranks_and_what_is_removed() -> None:
    kept, removed = bars(plot_plan(PLAN))
    assert kept == [(0, 2), (0, 6), (0, 10)]
    assert removed == [(2, 6), (6, 0), (10, 20)]


def test_plan_names_its_spaces_its_model_and_its_shares() -> None:
    axes = plot_plan(PLAN)
    assert names(axes) == ["conv1", "conv2", "fc"]
    assert "TinyNet" in axes.get_title()
    assert [text.get_text() for text in axes.texts] == ["25%", "100%", "33.3%"]
    assert legend(axes) == ["18 of 44 channels kept (40.9%)"]


def test_plans_stand_side_by_side_in_the_same_rows() -> None:
    other = Plan({"fc": Choice(30, 30), "extra": Choice(4, 1)}, "TinyNet")
    axes = plot_plan({"first": PLAN, "second": other})
    assert names(axes) == ["conv1", "conv2", "fc", "extra"]
    # What a plan doesn't name stays whole.
    first, _, second, _ = ([width for _, width in group] for group in bars(axes))
    assert first == [2, 6, 10, 4]
    assert second == [8, 6, 30, 1]
    assert legend(axes) == [
        "first: 22 of 48 channels kept (45.8%)",
        "second: 45 of 48 channels kept (93.8%)",
    ]
    centres = [[bar.get_y() + bar.get_height() / 2 for bar in g] for g in axes.containers[::2]]
    np.testing.assert_allclose(centres[0], np.arange(4) - 0.2)
    np.testing.assert_allclose(centres[1], np.arange(4) + 0.2)


def test_shares_are_left_out_where_bars_are_thinner_than_text() -> None:
    wide = Plan({f"layer{i}": Choice(8, 4) for i in range(150)})
    axes = plot_plan(wide)
    assert len(axes.texts) == 0
    assert len(axes.containers[0]) == 150


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan({}), "no plan names a space"),
        ({}, "no plan names a space"),
        ([PLAN], "torchcap.Plan.*list"),
        ({"mine": {"conv1": 3}}, "torchcap.Plan.*dict.*mine"),
        ({"a": PLAN, "b": Plan({"fc": Choice(31, 3)})}, "'fc' has 31.*'b'.*30"),
    ],
)
def test_what_is_no_plan_or_fits_no_other_is_refused(plan, message) -> None:
    with pytest.raises(PlanError, match=message):
        plot_plan(plan)


# --------------------------------------------------------------------------------------------------
# Accuracy and MACs


def test_tradeoff_draws_every_run_by_rising_macs() -> None:
    axes = plot_tradeoff({"ours": [(0.5, 0.9), (0.25, 0.8)], "theirs": [(0.3, 0.7)]})
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert points == {"ours": [[0.25, 0.8], [0.5, 0.9]], "theirs": [[0.3, 0.7]]}
    assert legend(axes) == ["ours", "theirs"]


def test_tradeoff_tells_runs_apart_without_colours() -> None:
    axes = plot_tradeoff({str(i): [(0.1, 0.1 * i), (0.9, 0.1 * i)] for i in range(9)})
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 9


def test_baseline_is_a_level_line() -> None:
    axes = plot_tradeoff({"ours": [(0.5, 0.9)]}, baseline=0.927)
    assert set(axes.lines[-1].get_ydata()) == {0.927}
    assert legend(axes) == ["ours", "original: 92.7%"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "no run"),
        ({"ours": []}, "'ours' has no point"),
        ({"ours": [(50.2, 0.9)]}, r"'ours'.*50\.2.*0\.\.1"),
        ({"ours": [(0.5, float("nan"))]}, "'ours'.*nan"),
        ({"ours": [(0.5, 0.9, 0.1)]}, r"'ours'.*0\.9, 0\.1.*MACs kept, accuracy"),
    ],
)
def test_points_that_are_no_shares_are_refused(runs, message) -> None:
    with pytest.raises(ValueError, match=message):
        plot_tradeoff(runs)


def test_baseline_that_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"baseline.*92\.7"):
        plot_tradeoff({"ours": [(0.5, 0.9)]}, baseline=92.7)


# --------------------------------------------------------------------------------------------------
# All of them: axes, files, errors, legibility

PICTURES = {
    "heat map": lambda **options: plot_sensitivity(TINY, **options),
    "surface": lambda **options: plot_sensitivity(TINY, kind="surface", **options),
    "plan": lambda **options: plot_plan(PLAN, **options),
    "tradeoff": lambda **options: plot_tradeoff({"ours": [(0.5, 0.9)]}, **options),
}
EVERY_PICTURE = pytest.mark.parametrize("picture", PICTURES)


@EVERY_PICTURE
def test_axes_that_are_given_are_drawn_on(picture) -> None:
    figure = Figure(layout="constrained")
    left, right = (figure.add_subplot(1, 2, i, projection=projection(picture)) for i in (1, 2))
    assert PICTURES[picture](axes=left) is left
    assert left.has_data()
    assert not right.has_data()


def projection(picture: str) -> str | None:
    return "3d" if picture == "surface" else None


@EVERY_PICTURE
def test_axes_of_another_kind_are_refused(picture) -> None:
    wrong = Figure().add_subplot(projection="3d" if picture != "surface" else None)
    with pytest.raises(ValueError, match=r"this picture needs axes"):
        PICTURES[picture](axes=wrong)
    assert not wrong.has_data()


@EVERY_PICTURE
def test_new_figure_is_unknown_to_pyplot(picture) -> None:
    assert PICTURES[picture]().figure.canvas.manager is None


@EVERY_PICTURE
@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_file_has_the_format_of_its_ending(picture, ending, start, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{ending}"
    PICTURES[picture](path=path)
    assert path.read_bytes().startswith(start)


@EVERY_PICTURE
@pytest.mark.parametrize("name", ["picture.xyz", "picture", "picture."])
def test_ending_of_no_picture_is_refused_and_nothing_written(picture, name, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"'.*{name}' has not the ending of a picture.*\.png"):
        PICTURES[picture](path=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@EVERY_PICTURE
def test_svg_is_written(picture, tmp_path: Path) -> None:
    PICTURES[picture](path=str(tmp_path / "picture.svg"))
    assert "<svg" in (tmp_path / "picture.svg").read_text("utf-8")


def test_file_holds_the_whole_figure_where_axes_are_in_a_part(tmp_path: Path) -> None:
    figure = Figure((4, 2), dpi=50)
    part, _ = figure.subfigures(1, 2)
    path = tmp_path / "whole.png"
    PICTURES["tradeoff"](axes=part.add_subplot(), path=path)
    width, height = np.frombuffer(path.read_bytes()[16:24], ">u4")  # as the header of PNG has them
    assert (width, height) == (200, 100)


@EVERY_PICTURE
def test_missing_matplotlib_is_named_with_its_remedy(picture, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"matplotlib.*pip install 'torchcap\[plots\]'"):
        PICTURES[picture]()


def test_module_is_imported_without_matplotlib(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spec = importlib.util.spec_from_file_location("plot_again", plot.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "accuracy"}, "value.*'score', 'error', 'output_error'.*'accuracy'"),
        ({"kind": "contour"}, "kind.*'heat map', 'surface'.*'contour'"),
        ({"shares": []}, "shares must rise"),
        ({"shares": [0.5, 0.25]}, "shares must rise"),
        ({"shares": [50.0, 100.0]}, "0 < share <= 1.*100"),
        ({"shares": [0.01]}, r"no space was measured.*0\.01"),
    ],
)
def test_unknown_options_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        plot_sensitivity(TINY, **options)


def test_what_is_no_sensitivity_is_refused() -> None:
    with pytest.raises(PlanError, match=r"torchcap\.Sensitivity.*dict"):
        plot_sensitivity(TINY.to_dict())
    with pytest.raises(PlanError, match="'TinyNet' has no curve"):
        plot_sensitivity(sensitivity())


LONG = "features.denseblock{0}.denselayer{0}.conv1"


@pytest.mark.parametrize("kind", ["heat map", "surface"])
@pytest.mark.parametrize(("count", "name"), [(1, "conv"), (27, "layer{}.conv1"), (60, LONG)])
@pytest.mark.parametrize("value", ["score", "error"])
def test_sensitivity_is_legible(value, kind, count, name) -> None:
    axes = plot_sensitivity(many(count, name), value=value, kind=kind)
    assert_nothing_is_cut_off(axes)
    assert_names_stand_apart(axes)
    bar = scale(axes).get_window_extent()
    assert axes.yaxis.get_tightbbox(drawn(axes).get_renderer()).x1 < bar.x0
    if kind == "heat map":
        assert len(names(axes)) == count


@pytest.mark.parametrize(("count", "name"), [(1, "conv"), (27, "layer{}.conv1"), (120, LONG)])
def test_plans_are_legible(count, name) -> None:
    plan = Plan({name.format(i): Choice(512, 1 + i) for i in range(count)}, "TinyNet")
    axes = plot_plan({"one": plan, "other": plan})
    assert_nothing_is_cut_off(axes)
    assert_names_stand_apart(axes)
    above = axes.get_legend().get_window_extent()
    assert axes.get_window_extent().y1 <= above.y0
    assert above.y1 <= axes.title.get_window_extent().y0


def test_names_are_thinned_out_on_small_axes() -> None:
    axes = plot_sensitivity(many(60), axes=Figure((5, 3)).add_subplot())
    shown = axes.get_yticks().astype(int)
    assert 5 < len(shown) < 60
    assert names(axes) == [f"layer{row}.conv1" for row in shown]
    assert_names_stand_apart(axes)
