"""The figures: that nothing overlaps or falls outside, and that bytes depend on content only."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cropkt.cancers import Cancer
from cropkt.report.canvas import png, svg
from cropkt.report.figures import FIGURES
from cropkt.report.forest import GAINED, LOST, OPEN, Line
from cropkt.report.gain_plot import draw_gain, spread
from cropkt.report.groups import grouped
from cropkt.report.heat_map import draw_transfer
from cropkt.report.schema import Results

Draw = Callable[[Results], Figure]


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
    figure.draw_without_rendering()
    found: list[Text] = figure.findobj(Text)
    return [
        (t.get_text(), t.get_window_extent())
        for t in found
        if t.get_visible() and t.get_text().strip()
    ]


def cut(results: Results, cancers: list[str]) -> Results:
    results["targets"] = {c: results["targets"][c] for c in cancers}
    results["transfer"] = {c: {s: results["transfer"][c][s] for s in cancers} for c in cancers}
    return results


@pytest.mark.parametrize("cancers", [list(Cancer), ["UVM"], ["UVM", "SKCM", "CHOL"]])
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_no_text_overlaps_or_leaves_the_page(draw: Draw, cancers: list[str], full: Results) -> None:
    figure = draw(cut(full, cancers))
    boxes = texts(figure)
    for text, box in boxes:
        page = Bbox.union([figure.bbox, box])
        assert np.array_equal(page.extents, figure.bbox.extents), text
    # Line spacing counts as part of a box; a pixel of it may be shared.
    x0, y0, x1, y1 = np.array([box.padded(-1).extents for _, box in boxes]).T[:, :, None]
    meet = (x0 < x1.T) & (x1 > x0.T) & (y0 < y1.T) & (y1 > y0.T)
    assert [(boxes[i][0], boxes[j][0]) for i, j in np.argwhere(np.triu(meet, 1))] == []


def test_the_heat_map_shows_every_score(results: Results) -> None:
    figure = draw_transfer(results)
    shown = [text.get_text() for text in figure.axes[0].texts if text.get_text().startswith(".")]
    assert len(shown) == 25 * 26  # all but the column of TGCT
    hatched = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    assert len(hatched) == 26
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {
        "not estimable",
        "planted relatives",
    }


def test_the_middle_of_the_colours_is_half(results: Results) -> None:
    for c_index, want in ((0.5, None), (0.7, "blue"), (0.3, "red")):
        results["transfer"] = {"UVM": {"UVM": {"c_index": c_index}}}
        figure = draw_transfer(results)
        red, _, blue = to_rgb(figure.axes[0].patches[0].get_facecolor())
        assert (want == "blue") == (blue > red + 0.2)
        assert (want == "red") == (red > blue + 0.2)


def test_scores_not_measured_are_told_from_scores_not_estimable(results: Results) -> None:
    results["transfer"] = {"UVM": {"UVM": {"c_index": 0.6}, "SKCM": {"c_index": None}}}
    figure = draw_transfer(results)
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["not estimable", "not measured", "planted relatives"]


def test_the_gain_plot_draws_whiskers_only_where_given(results: Results) -> None:
    def whiskers() -> int:
        figure = draw_gain(results)
        lines = [np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines]
        guides = 25 + 1  # one for each cancer, and the zero line
        return sum(len(line) == 2 for line in lines) - guides

    assert whiskers() == 50
    for target in results["targets"].values():
        for arm in target["arms"].values():
            arm.pop("gain_low", None)
    assert whiskers() == 0


def test_the_gain_plot_shows_the_headline_arm(full: Results) -> None:
    labels = [text.get_text() for text in draw_gain(full).legends[0].get_texts()]
    assert labels[:2] == ["zero-shot", "auto"]


def test_drawing_leaves_no_pyplot_state_and_no_version_or_date(full: Results) -> None:
    import matplotlib.pyplot as plt

    for draw in FIGURES.values():
        figure = draw(cut(full, ["UVM", "SKCM"]))
        assert b"Software" not in png(figure)
        assert b"date" not in svg(figure)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_equal_results_give_equal_pictures(draw: Draw, full: Results) -> None:
    full = cut(full, ["UVM", "SKCM"])
    assert svg(draw(full)) == svg(draw(full))
    assert png(draw(full)) == png(draw(full))


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_without_its_part_says_so(draw: Draw) -> None:
    figure = draw({"targets": {"UVM": {"events": 21}}})
    said = " ".join(text for text, _ in texts(figure))
    assert "not" in said.lower() or "no " in said.lower()


@pytest.mark.parametrize(
    ("low", "high", "told", "colour"),
    [
        (0.01, 0.1, True, GAINED),
        (-0.1, -0.01, True, LOST),
        (-0.1, 0.1, True, OPEN),
        (0.01, 0.1, False, OPEN),
        (None, None, True, OPEN),
    ],
)
def test_only_an_interval_beside_0_is_coloured(
    low: float | None, high: float | None, told: bool, colour: str
) -> None:
    assert Line("UVM", 0.0, low, high, told).colour == colour


def test_risk_groups_are_drawn_as_steps(full: Results) -> None:
    figure = FIGURES["survival"](cut(full, ["UVM"]))
    curve = full["targets"]["UVM"]["kaplan_meier"]["auto"]["high"]
    drawn = [np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines]
    assert any(np.array_equal(line, curve["survival"]) for line in drawn)


def test_every_cancer_has_a_place_in_the_map() -> None:
    groups = grouped([*Cancer, "XYZ"])
    order = [cancer for _, members in groups for cancer in members]
    assert sorted(order) == sorted([*Cancer, "XYZ"])
    assert order[-1] == "XYZ"
    assert grouped([]) == []


@given(st.lists(st.floats(0, 4), max_size=30).map(sorted), st.floats(0.001, 0.3))
def test_spread_keeps_order_distance_and_centre(places: list[float], gap: float) -> None:
    moved = spread(places, gap)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(moved))
    assert sum(moved) == pytest.approx(sum(places), abs=1e-9)
    if all(b - a >= gap + 1e-9 for a, b in itertools.pairwise(places)):
        assert moved == pytest.approx(places)
