"""Cox's partial likelihood within strata: its value, its gradient and its curvature.

Patients are compared within their stratum alone, so a covariate needs no common scale across
strata. Tied times follow Breslow.

References:
    Cox, J. R. Stat. Soc. B 34(2), 1972; Breslow, ibid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The logarithm of a partial likelihood at one point, up to second order."""

    value: float
    score: NDArray[np.float64]  # (p,) gradient
    information: NDArray[np.float64]  # (p, p) negative Hessian


def partial_likelihood(
    coefficients: NDArray[np.float64],
    covariates: NDArray[np.float64],
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    strata: NDArray[np.integer],
) -> Curve:
    """Return the log partial likelihood of `coefficients` (p,) and its derivatives.

    Args:
        coefficients: log hazard ratio of each covariate.
        covariates: (n, p).
        days: (n,) time of death or last follow-up.
        event: (n,) True for a death.
        strata: (n,) who is compared with whom.
    """
    p = covariates.shape[1]
    value, score, information = 0.0, np.zeros(p), np.zeros((p, p))
    for stratum in np.unique(strata[event]):
        latest = np.flatnonzero(strata == stratum)
        latest = latest[np.argsort(-days[latest], kind="stable")]
        x, then = covariates[latest], days[latest]
        eta = x @ coefficients
        top = float(eta.max())
        share = np.exp(eta - top)
        # The risk set of a death are all whose time is not shorter: a prefix of this order.
        died = np.flatnonzero(event[latest])
        last = np.searchsorted(-then, -then[died], side="right") - 1
        total = share.cumsum()[last]
        mean = (share[:, None] * x).cumsum(0)[last] / total[:, None]
        value += float((eta[died] - top - np.log(total)).sum())
        score += (x[died] - mean).sum(0)
        # Each patient's weight summed over the risk sets that hold them.
        times = np.zeros(len(latest))
        np.add.at(times, last, 1 / total)
        held = share * times[::-1].cumsum()[::-1]
        information += (x * held[:, None]).T @ x - mean.T @ mean
    return Curve(value=value, score=score, information=information)
