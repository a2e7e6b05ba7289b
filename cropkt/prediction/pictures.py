"""Pictures of an answer: where experts look on a slide, and the survival curve."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image

from cropkt.prediction.answer import Answer
from cropkt.prediction.slides import Slide, called, percentile_ranks
from cropkt.report.canvas import FAINT, INK, axes_at, blank

SHOWN = 5  # experts beside the answer; the others hold less weight
_SIDE = 640  # pixels of a map's longer side
_MARGIN = 2  # patches around the tissue
_COLUMNS = 3
_PANEL, _GAP, _TOP, _SMALLEST = 2.6, 0.18, 0.42, 1.0  # inches
_COLOURS = "viridis"  # told apart by every eye, and in grey
_COVER = (0.2, 0.8)  # of the thumbnail by the colours of least and most
_CURVE = "#0072B2"

Pixels = NDArray[np.float64]


def heat_map(slide: Slide, answer: Answer, thumbnail: Image.Image | None = None) -> Figure:
    """Draw where the answer and its loudest experts look, side by side, on one slide.

    Colours are ranks within the slide and model: a model that looks everywhere alike shows the
    same range as one that looks at one spot.

    Args:
        slide: with coordinates and patch size.
        answer: to the patient.
        thumbnail: of the whole slide, whose size is known then.
    """
    if slide.coords is None or slide.patch_size is None:
        raise ValueError("a slide without coordinates has no map")
    margin = _MARGIN * slide.patch_size
    origin = slide.coords.min(0) - margin
    wide, high = (slide.coords.max(0) + slide.patch_size + margin - origin).tolist()
    scale = _SIDE / max(wide, high)
    shape = (max(1, round(high * scale)), max(1, round(wide * scale)))
    below = _below(thumbnail, slide, origin, scale, shape)
    several = [("the answer", answer.attention)]
    several += [
        (f"{called(voice)}  {100 * voice.weight:.0f} %", voice.attention)
        for voice in answer.voices[:SHOWN]
    ]
    if len(answer.voices) == 1:
        several = several[1:]  # the answer looks where its only expert does
    columns = min(len(several), 4 if len(several) == 4 else _COLUMNS)  # no panel alone in a row
    rows = -(-len(several) // columns)
    tall = max(_PANEL * shape[0] / shape[1], _SMALLEST)
    tall = min(tall, 2 * _PANEL)
    figure = blank(0.3 + columns * (_PANEL + _GAP) + 0.75, 0.2 + rows * (tall + _TOP) + 0.1)
    for number, (title, attention) in enumerate(several):
        row, column = divmod(number, columns)
        axes = axes_at(
            figure,
            0.3 + column * (_PANEL + _GAP),
            0.2 + (rows - 1 - row) * (tall + _TOP),
            _PANEL,
            tall,
        )
        ranks = percentile_ranks(slide.part(attention))
        axes.imshow(_painted(slide, ranks, below, origin, scale, shape), interpolation="nearest")
        axes.set_title(title, fontsize=9, color=INK, loc="left", pad=4)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#cccccc")
    bar = figure.colorbar(
        ScalarMappable(cmap=colormaps[_COLOURS]),
        cax=axes_at(figure, 0.3 + columns * (_PANEL + _GAP), 0.2, 0.12, min(tall, 2.2)),
    )
    bar.outline.set_visible(False)
    bar.set_ticks([0, 1], labels=["least", "most"], fontsize=8)
    bar.ax.tick_params(length=0)
    return figure


def survival_curve(answer: Answer) -> Figure:
    """Draw survival by year with its interval, as far as training patients were followed."""
    last = answer.horizon
    years = np.arange(last + 1)
    figure = blank(5.2, 2.7)
    axes = axes_at(figure, 0.62, 0.5, 4.4, 2.05)
    if np.isfinite(answer.low[:last]).all():
        low, high = (np.concatenate([[1.0], row[:last]]) for row in (answer.low, answer.high_end))
        axes.fill_between(years, low, high, color=_CURVE, alpha=0.18, linewidth=0)
    curve = np.concatenate([[1.0], answer.survival[:last]])
    axes.plot(years, curve, color=_CURVE, linewidth=1.8, marker="o", markersize=2.5)
    axes.set(xlim=(0, max(last, 1)), ylim=(0, 1.03))
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1))
    axes.set_xticks(range(0, last + 1, 1 if last <= 12 else 2 if last <= 24 else 4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.set_xlabel("years after diagnosis", fontsize=9, color=INK)
    axes.tick_params(labelsize=9, color=FAINT, length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure


def _below(
    thumbnail: Image.Image | None,
    slide: Slide,
    origin: NDArray[np.float64],
    scale: float,
    shape: tuple[int, int],
) -> Pixels | None:
    """Return what lies under the colours, (h, w, 3) from 0 to 1; None without a thumbnail."""
    if thumbnail is None or slide.size is None:
        return None
    fit = np.array(thumbnail.size) / np.array(slide.size)
    left, top = origin * fit
    right, bottom = (origin + np.array(shape[::-1]) / scale) * fit
    box = (left, top, right, bottom)
    part = thumbnail.transform(shape[::-1], Image.Transform.EXTENT, box, fillcolor="white")
    pixels: Pixels = np.asarray(part, dtype=np.float64) / 255
    return pixels


def _painted(
    slide: Slide,
    ranks: NDArray[np.float64],
    below: Pixels | None,
    origin: NDArray[np.float64],
    scale: float,
    shape: tuple[int, int],
) -> Pixels:
    """Return the picture (h, w, 3) with each patch in the colour of its rank."""
    if slide.coords is None or slide.patch_size is None:
        raise ValueError("a slide without coordinates has no map")
    shade = np.full(shape, np.nan)
    corners = (slide.coords - origin) * scale
    starts = np.floor(corners).astype(int).clip(0)
    ends = np.maximum(np.ceil(corners + slide.patch_size * scale).astype(int), starts + 1)
    for patch in np.argsort(ranks, kind="stable"):  # the most looked at lie on top
        (left, top), (right, bottom) = starts[patch], ends[patch]
        shade[top:bottom, left:right] = ranks[patch]
    seen = np.isfinite(shade)
    rank = np.where(seen, shade, 0.0)
    colours = colormaps[_COLOURS](rank)[..., :3]
    if below is None:
        return np.where(seen[..., None], colours, 1.0)
    least, most = _COVER
    cover = np.where(seen, least + (most - least) * rank, 0.0)[..., None]
    painted: Pixels = colours * cover + below * (1 - cover)
    return painted
