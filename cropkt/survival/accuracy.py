"""How good a predicted survival curve is: discrimination, calibration and both together.

All figures are out of fold: a fold's patients are judged by a model that never saw them, and the
censoring distribution comes from the other folds.

References:
    C-index weighted by inverse probability of censoring: Uno et al., Stat. Med. 30(10), 2011;
    time-dependent AUC: Hung and Chiang, Can. J. Stat. 38(1), 2010; Brier score: Graf et al.,
    Stat. Med. 18, 1999; D-calibration: Haider et al., JMLR 21(85), 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2
from sksurv.metrics import concordance_index_ipcw, cumulative_dynamic_auc, integrated_brier_score
from sksurv.util import Surv

from cropkt.survival.bins import BIN_DAYS

YEARS = (1, 3, 5)
DECILES = 10
GRID = 20  # times at which the Brier score is integrated


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Figures of one arm on one cohort; None where it cannot be estimated."""

    c_ipcw: float | None = None
    brier: float | None = None  # integrated; 0 is perfect, .25 a coin
    auc: tuple[float | None, ...] = ()  # after each of YEARS
    d_calibration: float | None = None  # p value; small: the curves are not calibrated


def accuracy(
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
    survival: NDArray[np.floating],
    risk: NDArray[np.floating],
) -> Accuracy:
    """Return the figures as means over the folds where they can be estimated.

    Args:
        days: (n,) time of death or last follow-up.
        event: (n,) True for a death.
        folds: (n,) fold of each patient.
        survival: (n, T) out-of-fold survival at the end of each yearly bin.
        risk: (n,) out-of-fold; higher dies earlier.
    """
    found = [
        _of_fold(days, event, folds == fold, survival, risk)
        for fold in np.unique(folds)
        if event[folds == fold].any() and event[folds != fold].any()
    ]
    return Accuracy(
        c_ipcw=_mean([one.c_ipcw for one in found]),
        brier=_mean([one.brier for one in found]),
        auc=tuple(_mean([one.auc[i] for one in found]) for i in range(len(YEARS))),
        d_calibration=d_calibration(days, event, survival),
    )


def survival_at(survival: NDArray[np.floating], days: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return survival (n, m) at `days` (m,): within a bin the hazard is spread evenly.

    Args:
        survival: (n, T) at the end of each yearly bin.
        days: (m,) of any time; after the last bin its end counts.
    """
    logs = np.log(np.clip(survival, 1e-12, 1.0)).astype(np.float64)
    whole = np.concatenate([np.zeros((len(logs), 1)), logs], axis=1)
    years = np.clip(np.asarray(days, dtype=np.float64) / BIN_DAYS, 0, survival.shape[1])
    before = np.minimum(years.astype(np.int64), survival.shape[1] - 1)
    part = years - before
    curve: NDArray[np.float64] = np.exp(whole[:, before] * (1 - part) + whole[:, before + 1] * part)
    return curve


def d_calibration(
    days: NDArray[np.floating], event: NDArray[np.bool_], survival: NDArray[np.floating]
) -> float | None:
    """Return the p value that the survival each patient reached is uniform, None without deaths.

    A death at predicted survival s counts in the tenth that holds s; a censored patient is spread
    over all that may still come, below s.
    """
    if not event.any():
        return None
    each = [
        survival_at(row[None], np.array([then]))[0, 0]
        for row, then in zip(survival, days, strict=True)
    ]
    reached = np.clip(each, 1e-9, 1.0)
    edges = np.linspace(0, 1, DECILES + 1)
    counts = np.histogram(reached[event], bins=edges)[0].astype(np.float64)
    for s in reached[~event]:
        covered = np.clip(s - edges[:-1], 0, 1 / DECILES)
        counts += covered / s
    expected = len(days) / DECILES
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), DECILES - 1))


def _of_fold(
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    mine: NDArray[np.bool_],
    survival: NDArray[np.floating],
    risk: NDArray[np.floating],
) -> Accuracy:
    """Return the figures of one fold, judged where the other folds still follow patients."""
    others = Surv.from_arrays(event[~mine], days[~mine])
    end = min(float(days[~mine].max()), float(days[mine].max()))
    keep = mine & (days < end)  # whose weight the other folds know
    if not event[keep].any() or keep.sum() < 2:
        return Accuracy(auc=(None,) * len(YEARS))
    own = Surv.from_arrays(event[keep], days[keep])
    first, last = float(days[keep].min()), float(days[keep].max())
    times = np.linspace(first, last, GRID + 2)[1:-1]
    brier = None
    if last > first:
        curves = survival_at(survival[keep], times)
        brier = _known(lambda: float(integrated_brier_score(others, own, curves, times)))
    return Accuracy(
        c_ipcw=_known(lambda: float(concordance_index_ipcw(others, own, risk[keep])[0])),
        brier=brier,
        auc=tuple(
            _known(partial(_auc, others, own, risk[keep], year * BIN_DAYS))
            if first < year * BIN_DAYS < last
            else None
            for year in YEARS
        ),
    )


def _auc(
    others: NDArray[np.void], own: NDArray[np.void], risk: NDArray[np.floating], at: float
) -> float:
    return float(cumulative_dynamic_auc(others, own, risk, [at])[0][0])


def _known(figure: Callable[[], float]) -> float | None:
    """Return a figure, None where scikit-survival finds that it cannot be estimated."""
    try:
        with np.errstate(all="ignore"):
            value = figure()
    except (ValueError, ZeroDivisionError):
        return None
    return value if np.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
