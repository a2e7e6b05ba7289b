"""What transfer gains over local training, against how many events a cancer has."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from cropkt.report import values
from cropkt.report.canvas import FAINT, INK, axes_at, blank, empty, subtitle, write_at
from cropkt.report.schema import Results, TargetResult
from cropkt.report.sentences import signed

_TITLE = "What transfer gains over training on the cancer's own patients"
_WIDTH, _HEIGHT = 12.0, 6.9
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.95, 0.35, 1.95, 1.3  # inches around the axes
# Colours of Okabe and Ito, which colour-blind readers tell apart; the markers differ too.
_ZERO_SHOT = ("#D55E00", "o", "white")
_HEADLINE = ("#0072B2", "D", "#0072B2")
_LABEL_WIDTH = 0.14  # inches that one upright label needs


@dataclass(frozen=True, slots=True)
class _Point:
    """One target cancer on the horizontal axis."""

    cancer: str
    events: int
    place: float  # log10 of events, moved aside where cancers would cover each other
    target: TargetResult


def draw_gain(results: Results) -> Figure:
    """Draw the gain of zero-shot transfer and of the headline arm per target cancer.

    Whiskers are the paired 95 % intervals of the gain, where the results give them. Cancers
    with (nearly) equal event counts stand side by side; each label has the exact count.
    """
    styles = {"zero_shot": _ZERO_SHOT, values.headline(results): _HEADLINE}
    drawable = [
        (cancer, target)
        for cancer, target in values.targets_of(results).items()
        if (target.get("events") or 0) > 0
        and any(values.gain(target, arm) is not None for arm in styles)
    ]
    if not drawable:
        return empty(_TITLE, "No cancer has both a local C-index and one after transfer.")
    figure = blank(_WIDTH, _HEIGHT)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    axes = axes_at(figure, _LEFT, _BOTTOM, width, height)
    counts = [target.get("events") or 0 for _, target in drawable]
    low, high = math.log10(min(counts) / 1.35), math.log10(max(counts) * 1.35)
    if high - low < 1:  # a decade at least, or the axis has no ticks to read
        low, high = (low + high) / 2 - 0.5, (low + high) / 2 + 0.5
    gap = _LABEL_WIDTH * (high - low) / width
    points = _place(drawable, gap)
    low, high = min(low, points[0].place - gap), max(high, points[-1].place + gap)
    axes.set_xlim(low, high)
    whiskers = [
        _draw_arm(axes, points, arm, style, aside)
        for (arm, style), aside in zip(styles.items(), (-0.2 * gap, 0.2 * gap), strict=True)
    ]
    _few_events(axes, points, low)
    _label(axes, points)
    _legend(figure, axes)
    write_at(figure, 0.3, 0.25, _TITLE, bold=True)
    write_at(figure, 0.3, 0.56, _caption(results, whiskers=any(whiskers)))
    left_out = sorted(set(values.targets_of(results)) - {point.cancer for point in points})
    if left_out:
        text = f"Not drawn, as a gain or the count of events is missing: {', '.join(left_out)}."
        write_at(figure, _LEFT, _HEIGHT - 0.42, textwrap.fill(text, 130))
    return figure


def _place(drawable: list[tuple[str, TargetResult]], gap: float) -> list[_Point]:
    """Return the points by events, at least `gap` apart and otherwise moved as little as can be."""
    ranked = sorted(drawable, key=lambda pair: (pair[1].get("events") or 0, pair[0]))
    counts = [target.get("events") or 0 for _, target in ranked]
    places = spread([math.log10(count) for count in counts], gap)
    return [
        _Point(cancer, count, place, target)
        for (cancer, target), count, place in zip(ranked, counts, places, strict=True)
    ]


def spread(places: list[float], gap: float) -> list[float]:
    """Return ascending places moved to be `gap` apart, at the least sum of squared moves.

    Subtracting `gap` times the rank turns "at least a gap apart" into "not descending", which
    pooling adjacent violators (isotonic regression) solves exactly.
    """
    pools: list[tuple[float, int]] = []  # mean of a pool, and how many places it holds
    for rank, place in enumerate(places):
        mean, size = place - rank * gap, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    return [mean + rank * gap for rank, mean in enumerate(flat)]


def _draw_arm(
    axes: Axes, points: list[_Point], arm: str, style: tuple[str, str, str], aside: float
) -> bool:
    """Draw one arm's gains, moved `aside`; tell whether any of them has a whisker."""
    colour, marker, face = style
    whiskers = False
    for point in points:
        gain = values.gain(point.target, arm)
        if gain is None:
            continue
        ends = values.gain_interval(point.target, arm)
        if ends is not None:
            axes.plot(
                [point.place + aside] * 2,
                ends,
                color=colour,
                linewidth=1.1,
                alpha=0.75,
                solid_capstyle="butt",
                zorder=3,
            )
            whiskers = True
        axes.plot(
            point.place + aside,
            gain,
            marker,
            color=colour,
            markerfacecolor=face,
            markersize=5.5,
            markeredgewidth=1.3,
            zorder=4,
        )
    # One empty series carries the legend, however few gains there are.
    axes.plot(
        [],
        [],
        marker,
        color=colour,
        markerfacecolor=face,
        markersize=6,
        markeredgewidth=1.3,
        label=values.arm_title(arm),
    )
    return whiskers


def _few_events(axes: Axes, points: list[_Point], low: float) -> None:
    """Shade the cancers whose gain is noise, whatever it looks like."""
    few = [p.place for p in points if p.events < values.MIN_EVENTS]
    if not few:
        return
    enough = [p.place for p in points if p.events >= values.MIN_EVENTS]
    border = (few[-1] + enough[0]) / 2 if enough else axes.get_xlim()[1]
    axes.axvspan(
        low,
        border,
        color="#eeeeee",
        linewidth=0,
        zorder=0,
        label=f"fewer than {values.MIN_EVENTS} events: noise",
    )


def _label(axes: Axes, points: list[_Point]) -> None:
    for point in points:
        axes.axvline(point.place, color="#d5d5d5", linewidth=0.6, zorder=1)
        axes.text(
            point.place,
            1.015,
            f"{point.cancer} {point.events}",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=INK,
            transform=axes.get_xaxis_transform(),
        )
    axes.axhline(0, color=INK, linewidth=1.0, zorder=2)
    low, high = axes.get_xlim()
    round_counts = [m * 10**e for e in range(5) for m in (1, 2, 5)]
    axes.xaxis.set_major_locator(
        FixedLocator([math.log10(n) for n in round_counts if low <= math.log10(n) <= high])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{10**place:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda gain, _: signed(gain)))
    axes.tick_params(labelsize=9, color=FAINT)
    axes.set_xlabel("events of the target cancer (log scale)", fontsize=10, labelpad=6)
    axes.set_ylabel("C-index minus the local one", fontsize=10, labelpad=6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _legend(figure: Figure, axes: Axes) -> None:
    box = axes.get_position()
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        ncols=3,
        frameon=False,
        bbox_to_anchor=(box.x0, 0.66 / _HEIGHT),
        fontsize=9.5,
        borderaxespad=0,
        borderpad=0,
    )


def _caption(results: Results, *, whiskers: bool) -> str:
    """Return the line under the title."""
    facts = subtitle(results)
    reading = "Above 0, transfer helps. Each label has the number of events. "
    reading += (
        "Whiskers: paired 95 % intervals."
        if whiskers
        else ("The results give no interval of the gains.")
    )
    return f"{facts[:1].upper()}{facts[1:]}. {reading}" if facts else reading
