"""Risk groups: who is at high risk, how the groups' curves run, and whether they differ.

References:
    Kaplan and Meier, JASA 53, 1958; log-rank: Mantel, Cancer Chemother. Rep. 50, 1966.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sksurv.compare import compare_survival
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv


def high_risk(
    risk: NDArray[np.floating], folds: NDArray[np.integer] | None = None
) -> NDArray[np.bool_]:
    """Return who is above the median risk, (n,); of their own fold where folds are given.

    Out-of-fold risks of two folds come from two models and share no scale.
    """
    if folds is None:
        folds = np.zeros(len(risk), dtype=np.int64)
    high = np.zeros(len(risk), dtype=np.bool_)
    for fold in np.unique(folds):
        mine = folds == fold
        high[mine] = risk[mine] > np.median(risk[mine])
    return high


def log_rank(
    days: NDArray[np.floating], event: NDArray[np.bool_], group: NDArray[np.bool_]
) -> float | None:
    """Return the p value that two groups survive alike; None where that cannot be told."""
    if len(np.unique(group)) < 2 or not event.any():
        return None
    try:
        p = float(compare_survival(Surv.from_arrays(event, days), group)[1])
    except np.linalg.LinAlgError:  # no patient of one group was at risk at any death
        return None
    return p if np.isfinite(p) else None


def kaplan_meier(
    days: NDArray[np.floating], event: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the times (k,) of a Kaplan-Meier curve from 0 on, and survival after each (k,)."""
    times, survival = kaplan_meier_estimator(event, days)
    return np.concatenate([[0.0], times]), np.concatenate([[1.0], survival])
