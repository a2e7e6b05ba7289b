"""Differences of several cohorts together: their mean, how they vary, and what could be seen.

References:
    Random effects: DerSimonian and Laird, doi:10.1016/0197-2456(86)90046-2; signed ranks:
    Wilcoxon, Biometrics Bull. 1(6), 1945.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, wilcoxon

LEAST_ERROR = 1e-3  # a smaller standard error of a C-index comes of too few pairs to show one
DETECTED = float(norm.ppf(0.975) + norm.ppf(0.8))  # errors that 80 % power at 5 % takes
NORMAL_95 = float(norm.ppf(0.975))


@dataclass(frozen=True, slots=True, kw_only=True)
class Across:
    """Values of several cohorts, each with its error, taken together."""

    cohorts: int
    mean: float
    se: float
    between: float  # standard deviation of the true values
    wilcoxon: float | None  # p value that they are as often and as far above 0 as below

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean."""
        return self.mean - NORMAL_95 * self.se, self.mean + NORMAL_95 * self.se

    @property
    def detectable(self) -> float:
        """The mean that would be found with 80 % power at the 5 % level."""
        return DETECTED * self.se


def across(value: NDArray[np.floating], error: NDArray[np.floating]) -> Across | None:
    """Return the random-effects summary of values (k,) and their standard errors (k,).

    Entries that are not finite are left out; None if nothing is left.
    """
    known = np.isfinite(value) & np.isfinite(error)
    value = np.asarray(value[known], dtype=np.float64)
    noise = np.square(np.maximum(np.asarray(error[known], dtype=np.float64), LEAST_ERROR))
    if not len(value):
        return None
    between = between_variance(value, noise)
    weight = 1 / (between + noise)
    return Across(
        cohorts=len(value),
        mean=float(np.average(value, weights=weight)),
        se=sqrt(1 / float(weight.sum())),
        between=sqrt(between),
        wilcoxon=float(wilcoxon(value).pvalue) if np.any(value != 0) else None,
    )


def between_variance(value: NDArray[np.floating], noise: NDArray[np.floating]) -> float:
    """Return the variance of the true values, from values (k,) and the variance of each (k,)."""
    weight = 1 / noise
    mean = float(np.average(value, weights=weight))
    spread = float((weight * (value - mean) ** 2).sum()) - (len(value) - 1)
    scale = float(weight.sum() - (weight**2).sum() / weight.sum())
    return max(0.0, spread / scale) if scale > 0 else 0.0
