"""Small figures of one target each, side by side in rows."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cropkt.report.canvas import FAINT, axes_at, blank, write_at

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 2.35, 1.7, 0.42, 0.72  # inches
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.75, 0.3, 1.65, 0.75
_COLUMNS = 4


def panels(count: int, title: str, caption: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with a number of empty panels below its title.

    Args:
        count: of panels, at least 1.
        title: of the figure.
        caption: line under the title; it may have two lines.
    """
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    wide = _LEFT + columns * _WIDTH + (columns - 1) * _GAP_X + _RIGHT
    high = _TOP + rows * _HEIGHT + (rows - 1) * _GAP_Y + _BOTTOM
    figure = blank(max(wide, 7.4), high)
    found = []
    for number in range(count):
        row, column = divmod(number, columns)
        bottom = _BOTTOM + (rows - 1 - row) * (_HEIGHT + _GAP_Y)
        axes = axes_at(figure, _LEFT + column * (_WIDTH + _GAP_X), bottom, _WIDTH, _HEIGHT)
        axes.tick_params(labelsize=8, color=FAINT, length=2.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        found.append(axes)
    write_at(figure, 0.3, 0.25, title, bold=True)
    write_at(figure, 0.3, 0.58, caption)
    return figure, found


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Put the legend of one panel above all of them."""
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        ncols=columns,
        frameon=False,
        bbox_to_anchor=(0.3 / figure.get_figwidth(), 1 - 0.98 / figure.get_figheight()),
        fontsize=9,
        borderaxespad=0,
        borderpad=0,
    )
