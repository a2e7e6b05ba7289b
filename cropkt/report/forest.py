"""Forest plots: differences in C-index with their intervals, one line each."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cropkt.report import values, verdicts
from cropkt.report.canvas import FAINT, INK, axes_at, blank, empty, subtitle, write_at
from cropkt.report.schema import Results
from cropkt.report.sentences import difference, signed

GAINED, LOST, OPEN = "#0072B2", "#D55E00", "#5f5f5f"
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 8.6, 2.2, 2.1, 1.15, 0.75  # inches
_ROW = 0.27
_WIDEST = 0.5  # a wilder interval ends in an arrow


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a forest plot."""

    label: str
    value: float
    low: float | None
    high: float | None
    told: bool = True  # False: too few events to be told from chance, whatever the interval

    @property
    def colour(self) -> str:
        """Blue above 0, orange below, grey where the interval holds 0 or there is none."""
        if not self.told or self.low is None or self.high is None:
            return OPEN
        return GAINED if self.low > 0 else LOST if self.high < 0 else OPEN


def draw_gained(results: Results) -> Figure:
    """Draw the gain of the headline arm over local in every target, as `verdicts.ranked`."""
    targets, headline = values.targets_of(results), values.headline(results)
    title = "Who gained: C-index over the cancer's own model"
    lines = []
    for cancer in verdicts.ranked(targets, headline):
        target = targets[cancer]
        gain = values.gain(target, headline)
        if gain is None:
            continue
        low, high = values.gain_interval(target, headline) or (None, None)
        events = target.get("events")
        label = cancer if events is None else f"{cancer} ({events} events)"
        told = verdicts.verdict(target, headline) != "few"
        lines.append(Line(label, gain, low, high, told))
    if not lines:
        return empty(title, "No cancer has both a local C-index and one after transfer.")
    return forest(lines, title, subtitle(results))


def draw_arms(results: Results) -> Figure:
    """Draw every arm's mean difference from local over all targets."""
    title = "Every arm against local, mean over the cancers"
    across = {arm: found.get("local") for arm, found in results.get("across", {}).items()}
    lines = [
        Line(f"{values.arm_title(arm)} ({found['targets']})", *_ends(found["mean"], found))
        for arm in values.in_order(across)
        if (found := across[arm]) is not None
    ]
    if not lines:
        return empty(title, "The arms were not compared over all cancers in this study.")
    return forest(lines, title, f"{subtitle(results)}. In brackets: cancers compared.")


def _ends(mean: float, found: object) -> tuple[float, float | None, float | None]:
    ends = found if isinstance(found, dict) else {}
    return mean, values.finite(ends.get("low")), values.finite(ends.get("high"))


def forest(lines: list[Line], title: str, caption: str) -> Figure:
    """Return a figure with one line a difference, its numbers to the right."""
    height = len(lines) * _ROW
    figure = blank(_WIDTH, _TOP + height + _BOTTOM)
    axes = axes_at(figure, _LEFT, _BOTTOM, _WIDTH - _LEFT - _RIGHT, height)
    ends = [e for line in lines for e in (line.low, line.high, line.value) if e is not None]
    reach = min(max(0.05, *(abs(end) for end in ends)) * 1.06, _WIDEST)
    axes.set(xlim=(-reach, reach), ylim=(len(lines) - 0.4, -0.6))
    for row, line in enumerate(lines):
        _draw(axes, row, line, reach)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    axes.set_yticks(range(len(lines)), [line.label for line in lines], fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda gain, _: signed(gain)))
    axes.tick_params(labelsize=9, color=FAINT)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("difference in C-index, with 95 % interval", fontsize=9.5, labelpad=6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    write_at(figure, 0.3, 0.25, title, bold=True)
    write_at(figure, 0.3, 0.58, f"{caption[:1].upper()}{caption[1:]}")
    return figure


def _draw(axes: Axes, row: int, line: Line, reach: float) -> None:
    if row % 2:
        axes.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", linewidth=0, zorder=0)
    text = difference(line.value)
    if line.low is not None and line.high is not None:
        text = difference(line.value, (line.low, line.high))
        axes.plot(
            [max(line.low, -reach), min(line.high, reach)],
            [row, row],
            color=line.colour,
            linewidth=1.6,
            solid_capstyle="butt",
            zorder=2,
        )
        for end, beyond, marker in (
            (-reach, line.low < -reach, "<"),
            (reach, line.high > reach, ">"),
        ):
            if beyond:
                axes.plot(end, row, marker, color=line.colour, markersize=5, clip_on=False)
    if abs(line.value) <= reach:
        shape, face = ("s", line.colour) if line.colour != OPEN else ("o", "white")
        axes.plot(
            line.value, row, shape, color=line.colour, markerfacecolor=face, markersize=6, zorder=3
        )
    axes.text(
        1.03,
        row,
        text,
        transform=axes.get_yaxis_transform(),
        ha="left",
        va="center",
        fontsize=9,
        color=INK if line.colour == OPEN else line.colour,
    )
