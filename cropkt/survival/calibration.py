"""Survival curves for a risk that has no scale: Cox's model of one covariate.

References:
    Cox, J. R. Stat. Soc. B 34(2), 1972; baseline: Breslow, ibid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

from cropkt.survival.bins import bin_ends

RIDGE = 1e-2  # keeps the slope of a risk that separates everybody finite


def calibrated(
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
    answers: NDArray[np.floating],
    *,
    bins: int,
    kept: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Return out-of-fold survival (n, T) at the end of each yearly bin.

    Args:
        days: (n,) time of death or last follow-up.
        event: (n,) True for a death.
        folds: (n,) fold of each patient.
        answers: (K, n) risk of everybody in the units of each fold; the patients of the other
            folds, from whom the curve is learnt, are judged by models that did not see them.
        bins: T.
        kept: (n,) who may be learnt from; everybody by default.
    """
    ends = bin_ends(bins)
    survival = np.ones((len(days), bins))
    for fold, risk in enumerate(answers):
        mine, known = folds == fold, folds != fold
        if kept is not None:
            known &= kept
        if event[known].any():
            scaled = (risk - risk[known].mean()) / max(float(risk[known].std()), 1e-12)
            # A constant risk learns no slope, and leaves the baseline.
            model = CoxPHSurvivalAnalysis(alpha=RIDGE).fit(
                scaled[known, None], Surv.from_arrays(event[known], days[known])
            )
            steps = model.predict_survival_function(scaled[mine, None], return_array=True)
            at = np.searchsorted(model.unique_times_, ends, side="right") - 1
            survival[mine] = np.where(at >= 0, steps[:, np.maximum(at, 0)], 1.0)
    return survival
