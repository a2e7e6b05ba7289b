"""Heat map of transfer: the C-index of every source's expert on every target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from cropkt.report import significance, values
from cropkt.report.canvas import FAINT, INK, axes_at, blank, empty, subtitle, write_at
from cropkt.report.groups import grouped
from cropkt.report.schema import Results, TransferScore
from cropkt.report.sentences import number

_TITLE = "Who helps whom: C-index of each expert on each cancer"
_LEFT, _RIGHT, _TOP, _BOTTOM = 1.35, 2.6, 2.15, 0.75  # inches around the map
_GAP = 0.18  # between organ systems, in cells


class _Look(TypedDict):
    """How a patch looks, on the map and in the legend."""

    facecolor: str
    edgecolor: str
    hatch: str | None
    linewidth: float


_NOT_ESTIMABLE = _Look(facecolor="#dcdcdc", edgecolor="#9a9a9a", hatch="/////", linewidth=0)
_NOT_MEASURED = _Look(facecolor="white", edgecolor="#bbbbbb", hatch=None, linewidth=0.6)
_RELATIVE = _Look(facecolor="none", edgecolor="black", hatch=None, linewidth=1.6)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each cancer's row and column starts, in cells."""

    groups: list[tuple[str, list[str]]]
    starts: dict[str, float]
    extent: float
    cell: float  # inches

    @classmethod
    def of(cls, groups: list[tuple[str, list[str]]]) -> _Layout:
        starts: dict[str, float] = {}
        for index, (_, members) in enumerate(groups):
            for cancer in members:
                starts[cancer] = len(starts) + index * _GAP
        extent = len(starts) + (len(groups) - 1) * _GAP
        return cls(groups, starts, extent, cell=min(max(0.4, 4 / extent), 1.2))

    @property
    def side(self) -> float:
        """Width and height of the map in inches."""
        return self.extent * self.cell


@dataclass(frozen=True, slots=True)
class _Colours:
    """Colours that diverge from .5."""

    scale: Normalize
    shades: Colormap
    half: float  # of the range of C-indices
    beyond: bool  # some score lies outside


def draw_transfer(results: Results) -> Figure:
    """Draw sources as rows and targets as columns, related cancers side by side.

    Colours diverge from .5. Hatched cells are not estimable, blank ones were not measured. Bold
    values are significant, as `significance.strictest` has it; frames mark planted relatives.
    """
    transfer = results.get("transfer", {})
    cancers = {*transfer, *(source for scores in transfer.values() for source in scores)}
    if not cancers:
        return empty(_TITLE, "No transfer between cancers was measured in this study.")
    layout = _Layout.of(grouped(cancers))
    colours, test = _colours(transfer), significance.strictest(transfer)
    figure = blank(max(_LEFT + layout.side + _RIGHT, 7.4), _TOP + layout.side + _BOTTOM)
    axes = axes_at(figure, _LEFT, _BOTTOM, layout.side, layout.side)
    for target, column in layout.starts.items():
        for source, row in layout.starts.items():
            score = transfer.get(target, {}).get(source)
            _draw_cell(axes, (column, row), score, colours, test)
    framed = _frame_relatives(axes, layout, results)
    _label(axes, layout)
    _colour_bar(figure, layout, colours)
    _legend(figure, axes, transfer, len(cancers), framed=framed)
    write_at(figure, 0.3, 0.25, _TITLE, bold=True)
    write_at(figure, 0.3, 0.56, _caption(results, test))
    return figure


def _colours(transfer: dict[str, dict[str, TransferScore]]) -> _Colours:
    """Return red below .5 and blue above, reaching as far as the scores, .1 to .3."""
    found = [values.finite(s.get("c_index")) for row in transfer.values() for s in row.values()]
    reach = max((abs(c - 0.5) for c in found if c is not None), default=0.0)
    # A few wild scores from a handful of deaths must not wash out all the others.
    half = min(max(math.ceil(reach * 20 - 1e-9) / 20, 0.1), 0.3)
    return _Colours(Normalize(0.5 - half, 0.5 + half), colormaps["RdBu"], half, reach > half)


# Cells go in as artists, not patches: the limits of the axes are known, not to be found.
def _draw_cell(
    axes: Axes,
    corner: tuple[float, float],
    score: TransferScore | None,
    colours: _Colours,
    test: significance.Test,
) -> None:
    inner = corner[0] + 0.03, corner[1] + 0.03
    if score is None:
        axes.add_artist(Rectangle(inner, 0.94, 0.94, **_NOT_MEASURED))
        return
    c_index = values.finite(score.get("c_index"))
    if c_index is None:
        axes.add_artist(Rectangle(inner, 0.94, 0.94, **_NOT_ESTIMABLE))
        return
    shade = colours.shades(float(colours.scale(c_index)))
    axes.add_artist(Rectangle(corner, 1, 1, facecolor=shade, edgecolor="white", linewidth=0.6))
    clear = significance.significant(score, test)
    luminance = float(np.dot(shade[:3], (0.299, 0.587, 0.114)))
    axes.text(
        corner[0] + 0.5,
        corner[1] + 0.5,
        number(c_index),
        ha="center",
        va="center_baseline",
        fontsize=9,
        fontweight="bold" if clear else "normal",
        color="white" if luminance < 0.5 else INK,
    )


def _frame_relatives(axes: Axes, layout: _Layout, results: Results) -> bool:
    """Frame the pairs that the simulator planted; tell whether there was one."""
    planted = results.get("planted") or {}
    pairs = [
        (layout.starts[target], layout.starts[source])
        for target, sources in planted.get("relatives", {}).items()
        for source in sources
        if target in layout.starts and source in layout.starts
    ]
    for column, row in pairs:
        axes.add_artist(Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, **_RELATIVE))
    return bool(pairs)


def _label(axes: Axes, layout: _Layout) -> None:
    axes.set(xlim=(0, layout.extent), ylim=(layout.extent, 0))
    middles = [start + 0.5 for start in layout.starts.values()]
    axes.set_xticks(middles, list(layout.starts), rotation=90, fontsize=9)
    axes.set_yticks(middles, list(layout.starts), fontsize=9)
    axes.tick_params(length=0, pad=4, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("target (patients)", fontsize=10, labelpad=8)
    axes.set_ylabel("source (expert)", fontsize=10, labelpad=8)
    axes.spines[:].set_visible(False)
    for system, members in layout.groups:
        top, bottom = layout.starts[members[0]], layout.starts[members[-1]] + 1
        edge = layout.extent + 0.1 / layout.cell
        axes.plot(
            [edge, edge], [top + 0.08, bottom - 0.08], color=FAINT, linewidth=1.2, clip_on=False
        )
        axes.text(
            edge + 0.08 / layout.cell,
            (top + bottom) / 2,
            system,
            ha="left",
            va="center",
            fontsize=9,
            color=FAINT,
            linespacing=1.0,
        )


def _colour_bar(figure: Figure, layout: _Layout, colours: _Colours) -> None:
    height = min(4.0, layout.side * 0.9)
    left = _LEFT + layout.side + 1.55
    axes = axes_at(figure, left, _BOTTOM + (layout.side - height) / 2, 0.2, height)
    bar = figure.colorbar(
        ScalarMappable(colours.scale, colours.shades),
        cax=axes,
        extend="both" if colours.beyond else "neither",
        extendfrac=0.04,
    )
    bar.outline.set_visible(False)
    reach = round(colours.half * 20)
    steps = [s for s in range(-reach, reach + 1) if height > 2 or s % 2 == 0]
    ticks = [0.5 + step / 20 for step in steps]
    bar.set_ticks(ticks, labels=[number(tick) for tick in ticks])
    axes.tick_params(labelsize=9, length=2)
    axes.set_ylabel("C-index", fontsize=9, labelpad=6)


def _legend(
    figure: Figure,
    axes: Axes,
    transfer: dict[str, dict[str, TransferScore]],
    cancers: int,
    *,
    framed: bool,
) -> None:
    scores = [score for row in transfer.values() for score in row.values()]
    handles = []
    if any(values.finite(score.get("c_index")) is None for score in scores):
        handles.append(Patch(**_NOT_ESTIMABLE, label="not estimable"))
    if len(scores) < cancers**2:
        handles.append(Patch(**_NOT_MEASURED, label="not measured"))
    if framed:
        handles.append(Patch(**_RELATIVE, label="planted relatives"))
    if handles:
        box = axes.get_position()
        below = box.y0 - 0.15 / figure.get_figheight()
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(box.x0, below),
            ncols=3,
            frameon=False,
            fontsize=9,
            borderaxespad=0,
            borderpad=0,
        )


def _caption(results: Results, test: significance.Test) -> str:
    """Return the lines under the title, short enough for a map of one cancer."""
    facts = subtitle(results)
    reading = (
        "Above .5: better than chance. Diagonal: the target's own expert, out of fold.\n"
        f"Bold: {significance.IN_WORDS[test]}."
    )
    return f"{facts[:1].upper()}{facts[1:]}.\n{reading}" if facts else reading
