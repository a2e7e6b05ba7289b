"""Few-shot curves: the C-index with 20, 50, 100 or all training patients of a target."""

from __future__ import annotations

from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from cropkt.report import values
from cropkt.report.canvas import INK, empty
from cropkt.report.panels import legend, panels
from cropkt.report.schema import Results, ShotsResult
from cropkt.report.sentences import number

_TITLE = "With few patients of its own"
_COLOURS = ("#5f5f5f", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX"


def draw_few_shot(results: Results) -> Figure:
    """Draw the mean C-index over the draws against the number of training patients."""
    found = {c: s for c, t in values.targets_of(results).items() if (s := t.get("few_shot"))}
    arms = values.in_order(
        {arm for shots in found.values() for shot in shots for arm in shot["arms"]}
    )
    if not arms:
        return empty(_TITLE, "Training with few patients was not evaluated in this study.")
    figure, axes = panels(
        len(found), _TITLE, "C-index out of fold by number of training patients; dots are draws."
    )
    styles = {arm: (_COLOURS[i % 7], _MARKERS[i % 7]) for i, arm in enumerate(arms)}
    for (cancer, shots), panel in zip(found.items(), axes, strict=True):
        _draw(panel, cancer, shots, styles)
    # An invisible series for each arm: the first panel need not have all of them.
    for arm, (colour, marker) in styles.items():
        line = Line2D([], [], color=colour, marker=marker, label=values.arm_title(arm))
        axes[0].add_line(line)
    legend(figure, axes[0], min(len(arms), 4))
    return figure


def _draw(
    axes: Axes, cancer: str, shots: list[ShotsResult], styles: dict[str, tuple[str, str]]
) -> None:
    ranked = sorted(shots, key=lambda shot: (shot["patients"] is None, shot["patients"] or 0))
    for arm, (colour, marker) in styles.items():
        draws = [(x, shot["arms"][arm]) for x, shot in enumerate(ranked) if shot["arms"].get(arm)]
        for x, several in draws:
            if len(several) > 1:
                axes.plot([x] * len(several), several, ".", color=colour, alpha=0.35, markersize=4)
        places, means = [x for x, _ in draws], [fmean(several) for _, several in draws]
        axes.plot(places, means, color=colour, marker=marker, markersize=4.5, linewidth=1.3)
    axes.axhline(0.5, color="#c0c0c0", linewidth=0.8, zorder=0)
    names = ["all" if s["patients"] is None else str(s["patients"]) for s in ranked]
    axes.set_xticks(range(len(ranked)), names)
    axes.set_xlim(-0.3, len(ranked) - 0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_title(cancer, fontsize=9.5, color=INK, loc="left", pad=5)
