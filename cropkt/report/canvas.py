"""Blank figures laid out in inches; their PNG and SVG bytes depend on nothing but the content."""

from __future__ import annotations

import io

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cropkt.report.schema import Results

DPI = 150
INK = "#222222"
FAINT = "#707070"


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, without touching pyplot's global state."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Return new axes at a place in inches from the figure's lower left corner."""
    wide, high = figure.get_size_inches()
    return figure.add_axes((left / wide, bottom / high, width / wide, height / high))


def write_at(figure: Figure, left: float, top: float, text: str, *, bold: bool = False) -> None:
    """Write text whose upper left corner lies `left` and `top` inches from the upper left one."""
    wide, high = figure.get_size_inches()
    figure.text(
        left / wide,
        1 - top / high,
        text,
        ha="left",
        va="top",
        linespacing=1.35,
        fontsize=13 if bold else 9,
        fontweight="bold" if bold else "normal",
        color=INK if bold else FAINT,
    )


def subtitle(results: Results) -> str:
    """Return what a figure was made from, as far as the results say."""
    facts = [f"{results['data']} data"] if "data" in results else []
    facts += [f"{results['endpoint']}"] if "endpoint" in results else []
    facts += [f"{results['folds']} folds"] if "folds" in results else []
    facts += [f"seed {results['seed']}"] if "seed" in results else []
    return ", ".join(facts)


def empty(title: str, message: str) -> Figure:
    """Return a figure that says why there is nothing to draw."""
    figure = blank(7, 1.4)
    write_at(figure, 0.3, 0.3, title, bold=True)
    write_at(figure, 0.3, 0.75, message)
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes under one matplotlib."""
    picture = io.BytesIO()
    # matplotlib would stamp its version into every file.
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    return picture.getvalue()


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG, letters as outlines; equal figures give equal bytes."""
    picture = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Without a salt the ids in the file are random.
    with rc_context({"svg.hashsalt": "cropkt", "svg.fonttype": "path"}):
        figure.savefig(picture, format="svg", metadata=nothing)
    return picture.getvalue()
