"""Bars of what each target's answer is made of: its own expert and those of other cancers."""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from cropkt.report import values
from cropkt.report.canvas import FAINT, INK, axes_at, blank, empty, subtitle, write_at
from cropkt.report.groups import ORGAN_SYSTEMS
from cropkt.report.schema import Results

_TITLE = "Whose experts each answer is made of"
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 9.6, 1.15, 0.35, 1.05, 1.3  # inches
_ROW = 0.32
_SHOWN = 0.02  # smaller weights are drawn together
_OWN, _REST = "#30475e", "#cfcfcf"


def draw_routing(results: Results) -> Figure:
    """Draw one stacked bar a target: the own expert first, then the others by weight."""
    found = {c: w for c, t in values.targets_of(results).items() if (w := values.weights_of(t))}
    if not found:
        return empty(_TITLE, "Experts were not weighed in this study.")
    height = len(found) * _ROW
    figure = blank(_WIDTH, _TOP + height + _BOTTOM)
    axes = axes_at(figure, _LEFT, _BOTTOM, _WIDTH - _LEFT - _RIGHT, height)
    colours = _colours()
    for row, (cancer, weights) in enumerate(found.items()):
        _draw(axes, row, cancer, weights, colours)
    axes.set(xlim=(0, 1), ylim=(len(found) - 0.5, -0.5))
    axes.set_yticks(range(len(found)), list(found), fontsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.tick_params(labelsize=9, color=FAINT)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    _legend(figure)
    facts = subtitle(results)
    write_at(figure, 0.3, 0.25, _TITLE, bold=True)
    write_at(figure, 0.3, 0.58, f"{facts[:1].upper()}{facts[1:]}")
    return figure


def _colours() -> dict[str, str]:
    """Return a light colour for each cancer, the same within an organ system."""
    shades = colormaps["Set3"].resampled(12)
    places = (0, 3, 4, 5, 6, 7, 9)  # without those that look alike
    hexes = ["#" + "".join(f"{round(255 * part):02x}" for part in shades(p)[:3]) for p in places]
    return {
        str(cancer): colour
        for members, colour in zip(ORGAN_SYSTEMS.values(), hexes, strict=True)
        for cancer in members
    }


def _draw(
    axes: Axes, row: int, cancer: str, weights: dict[str, float], colours: dict[str, str]
) -> None:
    own = weights.get("self", 0.0) + weights.get(cancer, 0.0)
    others = {s: w for s, w in weights.items() if s not in ("self", cancer)}
    shown = sorted((s for s, w in others.items() if w >= _SHOWN), key=lambda s: (-others[s], s))
    rest = sum(others.values()) - sum(others[source] for source in shown)
    parts = [("own", own, _OWN), *((s, others[s], colours.get(s, _REST)) for s in shown)]
    left = 0.0
    for name, weight, colour in [*parts, ("", rest, _REST)]:
        if weight <= 0:
            continue
        axes.barh(row, weight, left=left, height=0.74, color=colour, edgecolor="white", linewidth=1)
        if name and weight > 0.011 * len(name) + 0.004:
            axes.text(
                left + weight / 2,
                row,
                name,
                ha="center",
                va="center_baseline",
                fontsize=8,
                color="white" if colour == _OWN else INK,
            )
        left += weight


def _legend(figure: Figure) -> None:
    colours = _colours()
    handles = [Patch(color=_OWN, label="own expert")]
    for system, members in ORGAN_SYSTEMS.items():
        handles.append(Patch(color=colours[str(members[0])], label=system.replace("\n", " ")))
    handles.append(Patch(color=_REST, label=f"all others below {100 * _SHOWN:.0f} %"))
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=4,
        frameon=False,
        bbox_to_anchor=(_LEFT / _WIDTH, 0.78 / figure.get_figheight()),
        fontsize=8.5,
        borderaxespad=0,
        borderpad=0,
    )
