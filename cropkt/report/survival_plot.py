"""Kaplan-Meier curves of the halves of a target at low and at high predicted risk."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cropkt.report import values
from cropkt.report.canvas import FAINT, INK, empty
from cropkt.report.panels import legend, panels
from cropkt.report.schema import CurveResult, Results, TargetResult
from cropkt.report.sentences import p_value

_TITLE = "Survival of the halves at low and at high predicted risk"
_COLOURS = {"low": "#0072B2", "high": "#D55E00"}
_DASHES = {"low": "-", "high": "--"}
_YEAR = 365.25


def curves_of(target: TargetResult, headline: str) -> tuple[str, dict[str, CurveResult]] | None:
    """Return the arm whose risk groups are shown, the headline if it has any, and its curves."""
    found = target.get("kaplan_meier") or {}
    arms = [headline, *values.in_order(found)]
    arm = next((arm for arm in arms if found.get(arm)), None)
    return None if arm is None else (arm, found[arm])


def draw_survival(results: Results) -> Figure:
    """Draw the curves of every target that has them, with its log-rank p value."""
    headline = values.headline(results)
    targets = values.targets_of(results)
    found = {c: k for c, t in targets.items() if (k := curves_of(t, headline)) is not None}
    if not found:
        return empty(_TITLE, "No survival curve: event times do not leave a hospital.")
    figure, axes = panels(
        len(found), _TITLE, "Kaplan-Meier, years after diagnosis; risk predicted out of fold."
    )
    for (cancer, (arm, curves)), panel in zip(found.items(), axes, strict=True):
        _draw(panel, curves)
        result = values.arm_of(targets[cancer], arm)
        p = values.finite(result.get("log_rank")) if result is not None else None
        tests = "" if p is None else f", log-rank {p_value(p)}"
        which = "" if arm == headline else f" [{values.arm_title(arm)}]"
        panel.set_title(f"{cancer}{which}{tests}", fontsize=9, color=INK, loc="left", pad=5)
    for group, colour in _COLOURS.items():
        axes[0].plot([], [], _DASHES[group], color=colour, label=f"{group} risk")
    legend(figure, axes[0], 2)
    return figure


def _draw(axes: Axes, curves: dict[str, CurveResult]) -> None:
    for group, curve in sorted(curves.items()):
        steps = list(zip(curve["days"], curve["survival"], strict=False))
        axes.step(
            [day / _YEAR for day, _ in steps],
            [survival for _, survival in steps],
            where="post",
            color=_COLOURS.get(group, FAINT),
            linestyle=_DASHES.get(group, ":"),
            linewidth=1.5,
        )
    axes.set_ylim(0, 1.03)
    last = max((day for curve in curves.values() for day in curve["days"]), default=0) / _YEAR
    axes.set_xlim(0, max(last, 1))
    step = next(years for years in (1, 2, 5, 10, 100) if last < 6 * years or years == 100)
    axes.set_xticks(range(0, int(max(last, 1)) + 1, step))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1))
    counts = [
        f"{curve['patients']} at {group}" for group, curve in sorted(curves.items(), reverse=True)
    ]
    axes.text(
        0.03,
        0.05,
        ", ".join(counts),
        transform=axes.transAxes,
        fontsize=7.5,
        color=FAINT,
    )
