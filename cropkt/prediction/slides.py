"""Where patches lie on a slide, and files that say what was looked at: GeoJSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from cropkt.prediction.answer import Answer, Voice


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slide:
    """One slide of a patient: its part of the bag, and where its patches lie."""

    name: str
    first: int  # of its patches in the patient's bag
    patches: int
    coords: NDArray[np.int64] | None  # (patches, 2) upper left corners, pixels of the finest level
    patch_size: float | None  # pixels of the finest level
    guessed: bool = False  # the patch size is the spacing of the coordinates
    size: tuple[int, int] | None = None  # width and height of the finest level, pixels
    unchecked: tuple[str, ...] = ()  # what could not be compared with the training slides

    def part(self, attention: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the slide's own part (patches,) of a patient's attention (N,)."""
        return attention[self.first : self.first + self.patches]

    @property
    def drawable(self) -> bool:
        """Whether a map of it can be drawn."""
        return self.coords is not None and self.patch_size is not None


def spacing(coords: NDArray[np.int64]) -> float | None:
    """Return the smallest step between the coordinates (N, 2) of patches; None for one patch."""
    steps = [np.diff(np.unique(column)) for column in coords.T]
    found = [int(step.min()) for step in steps if len(step)]
    return float(min(found)) if found else None


def percentile_ranks(attention: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of patches (N,) at which a model looks less, from 0 to 1."""
    if len(attention) < 2:
        return np.ones_like(attention)
    ranks: NDArray[np.float64] = (rankdata(attention) - 1) / (len(attention) - 1)
    return ranks


def called(voice: Voice) -> str:
    """Return how an expert is called."""
    return f"{voice.cancer} (own)" if voice.own else str(voice.cancer)


def geojson(slide: Slide, answer: Answer) -> bytes:
    """Return the patches of a slide as tiles for QuPath, with what each model made of them.

    A measurement is a share of the patient's attention, times the number of patches: 1 is what
    each patch would get if all got the same.

    References:
        RFC 7946; https://qupath.readthedocs.io (objects as GeoJSON, `measurements` since 0.4).
    """
    if slide.coords is None or slide.patch_size is None:
        return b""
    scale = len(answer.attention)
    columns = {"attention": slide.part(answer.attention) * scale}
    columns |= {
        f"attention {called(voice)}": slide.part(voice.attention) * scale for voice in answer.voices
    }
    size = slide.patch_size
    features = []
    for row, (x, y) in enumerate(slide.coords.tolist()):
        right, below = x + size, y + size
        corners = [[x, y], [right, y], [right, below], [x, below], [x, y]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [corners]},
                "properties": {
                    "objectType": "tile",
                    "measurements": {n: float(f"{v[row]:.6g}") for n, v in columns.items()},
                },
            }
        )
    whole = {"type": "FeatureCollection", "features": features}
    return json.dumps(whole, separators=(",", ":"), allow_nan=False).encode()


def attention_csv(slides: Sequence[Slide], answer: Answer) -> bytes:
    """Return one row a patch and expert, and one for the answer: the shares of attention."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["slide", "patch", "x", "y", "expert", "attention"])
    several = [("answer", answer.attention)]
    several += [(called(voice), voice.attention) for voice in answer.voices]
    for slide in slides:
        corners = [["", ""]] * slide.patches if slide.coords is None else slide.coords.tolist()
        for name, attention in several:
            for patch, (corner, share) in enumerate(
                zip(corners, slide.part(attention), strict=True)
            ):
                rows.writerow([slide.name, patch, *corner, name, f"{share:.6g}"])
    return text.getvalue().encode()
