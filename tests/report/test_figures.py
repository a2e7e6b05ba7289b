"""The figures: that nothing overlaps or falls outside, and that bytes depend on content only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cropkt.cancers import Cancer
from cropkt.report import gain_plot, heat_map
from cropkt.report.figures import draw_gain, draw_transfer
from cropkt.report.gain_plot import spread
from cropkt.report.groups import grouped
from cropkt.report.schema import Results

Draw = Callable[[Results, Path], None]
MODULES: dict[Draw, ModuleType] = {draw_transfer: heat_map, draw_gain: gain_plot}


def drawn(draw: Draw, results: Results, monkeypatch: pytest.MonkeyPatch) -> Figure:
    kept: list[Figure] = []
    monkeypatch.setattr(MODULES[draw], "save", lambda figure, path: kept.append(figure))
    draw(results, Path("unused.png"))
    return kept[0]


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
@pytest.mark.parametrize("draw", list(MODULES))
def test_no_text_overlaps_or_leaves_the_page(
    draw: Draw, cancers: list[str], results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = drawn(draw, cut(results, cancers), monkeypatch)
    boxes = texts(figure)
    for text, box in boxes:
        page = Bbox.union([figure.bbox, box])
        assert np.array_equal(page.extents, figure.bbox.extents), text
    # Line spacing counts as part of a box; a pixel of it may be shared.
    x0, y0, x1, y1 = np.array([box.padded(-1).extents for _, box in boxes]).T[:, :, None]
    meet = (x0 < x1.T) & (x1 > x0.T) & (y0 < y1.T) & (y1 > y0.T)
    assert [(boxes[i][0], boxes[j][0]) for i, j in np.argwhere(np.triu(meet, 1))] == []


def test_the_heat_map_shows_every_score(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(draw_transfer, results, monkeypatch)
    shown = [text.get_text() for text in figure.axes[0].texts if text.get_text().startswith(".")]
    assert len(shown) == 25 * 26  # all but the column of TGCT
    hatched = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    assert len(hatched) == 26
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {
        "not estimable",
        "planted relatives",
    }


def test_the_middle_of_the_colours_is_half(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    for c_index, want in ((0.5, None), (0.7, "blue"), (0.3, "red")):
        results["transfer"] = {"UVM": {"UVM": {"c_index": c_index}}}
        figure = drawn(draw_transfer, results, monkeypatch)
        red, _, blue = to_rgb(figure.axes[0].patches[0].get_facecolor())
        assert (want == "blue") == (blue > red + 0.2)
        assert (want == "red") == (red > blue + 0.2)


def test_scores_not_measured_are_told_from_scores_not_estimable(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    results["transfer"] = {"UVM": {"UVM": {"c_index": 0.6}, "SKCM": {"c_index": None}}}
    figure = drawn(draw_transfer, results, monkeypatch)
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["not estimable", "not measured", "planted relatives"]


def test_the_gain_plot_draws_whiskers_only_where_given(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whiskers() -> int:
        figure = drawn(draw_gain, results, monkeypatch)
        lines = [np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines]
        guides = 25 + 1  # one for each cancer, and the zero line
        return sum(len(line) == 2 for line in lines) - guides

    assert whiskers() == 50
    for target in results["targets"].values():
        for arm in target["arms"].values():
            arm.pop("gain_low", None)
    assert whiskers() == 0


def test_drawing_leaves_no_pyplot_state_and_no_version(results: Results, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    for name, draw in (("gain.png", draw_gain), ("transfer.png", draw_transfer)):
        draw(cut(results, ["UVM", "SKCM"]), tmp_path / name)
        assert b"Software" not in (tmp_path / name).read_bytes()
    assert plt.get_fignums() == []


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
