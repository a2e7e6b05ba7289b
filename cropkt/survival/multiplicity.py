"""Many tests at once: adjusted p values, where some may not be estimable."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, norm


def two_sided(value: NDArray[np.floating], error: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the p value of a normal `value` being 0; nan where its error is 0 or unknown."""
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(error > 0, value / error, np.nan)
    p: NDArray[np.float64] = 2 * norm.sf(np.abs(z))
    return p


def benjamini_hochberg(p: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return p values adjusted for the false discovery rate; nan stays nan and is no test.

    References:
        Benjamini and Hochberg, J. R. Stat. Soc. B 57(1), 1995.
    """
    adjusted = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        adjusted[known] = false_discovery_control(p[known])
    return adjusted


def holm(p: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return p values adjusted for the family-wise error; nan stays nan and is no test.

    References:
        Holm, Scand. J. Stat. 6(2), 1979.
    """
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p.flat[known], kind="stable")]
    steps = p.flat[order] * np.arange(len(order), 0, -1)
    adjusted.flat[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted
