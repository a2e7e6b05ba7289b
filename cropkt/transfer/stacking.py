"""Stacking: one weight an expert, not negative, pulled to "self + equal sources".

The log hazard of a patient is a weighted sum of the experts' standardised risks. The prior is
half of the weight on the target's own expert and half shared equally by the sources. Three
standard deviations say how far the weights may move from there: together (their scale), the own
expert against the sources, and each source alone. The first is fixed; the other two maximise the
marginal likelihood, so few events leave the prior nearly untouched and many let the data speak.

Only patients of one fold are compared with each other: the own expert's risks of two folds come
from two models and share no scale.

References:
    Breiman, Mach. Learn. 24, 1996 (weights not negative); MacKay, Neural Comput. 4(3), 1992
    (evidence); Tierney and Kadane, JASA 81, 1986 (Laplace).
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from cropkt.survival.partial import Curve, partial_likelihood

SCALE = 0.7  # log hazard ratio of one standard deviation of a good risk: C-index near .69
SCALE_SPREAD = 0.5
SPREADS = (0.03, 0.1, 0.2, 0.4, 0.8)  # candidates, relative to the weight itself
EXPECTED = 0.3  # of an exponential hyperprior on both spreads
NEWTON = 20  # iterations, at most


def equal_weights(sources: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the prior's weights (1 + S,) for standardised source risks (n, S).

    The sources together weigh as much as the own expert, in units of their vote's own spread:
    a vote of experts that disagree varies less than any of them.
    """
    count = sources.shape[1]
    if count == 0:
        return np.ones(1)
    spread = max(float(sources.mean(1).std()), 0.2) if len(sources) else 1.0
    return np.concatenate([[0.5], np.full(count, 0.5 / count / spread)])


def stacked(
    risks: NDArray[np.float64],
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
) -> NDArray[np.float64]:
    """Return the weights (1 + S,) of the experts.

    Args:
        risks: (n, 1 + S) standardised risks, the own expert first.
        days: (n,) time of death or last follow-up.
        event: (n,) True for a death.
        folds: (n,) patients of one fold are compared with each other.
    """
    equal = equal_weights(risks[:, 1:])
    if not event.any():
        return equal
    scale = _scale(risks @ equal, days, event, folds)
    centre = scale * equal
    curve = partial_likelihood(centre, risks, days, event, folds)
    covariance = max(_covariances(centre), key=lambda v: _evidence(curve, v[0]) + v[1])[0]
    precision = np.linalg.inv(covariance).astype(np.float64)
    return _mode(risks, days, event, folds, centre=centre, precision=precision)


def log_evidence(
    risk: NDArray[np.float64],
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
) -> float:
    """Return the log marginal likelihood of one standardised risk (n,), its scale unknown.

    Up to a constant that is the same for every risk of these patients; by Laplace.
    """
    scale = _scale_mode(risk, days, event, folds)
    curve = partial_likelihood(scale, risk[:, None], days, event, folds)
    away = float(scale[0] - SCALE) / SCALE_SPREAD
    information = float(curve.information[0, 0]) * SCALE_SPREAD**2
    return curve.value - 0.5 * away**2 - 0.5 * float(np.log1p(information))


def _scale(
    risk: NDArray[np.float64],
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
) -> float:
    """Return the log hazard ratio of a unit of the prior's risk (n,), at least a trace."""
    return max(float(_scale_mode(risk, days, event, folds)[0]), 0.05)


def _scale_mode(
    risk: NDArray[np.float64],
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
) -> NDArray[np.float64]:
    """Return the likeliest log hazard ratio (1,) of a unit of risk (n,), not negative."""
    return _mode(
        risk[:, None],
        days,
        event,
        folds,
        centre=np.array([SCALE]),
        precision=np.array([[SCALE_SPREAD**-2]]),
    )


def _covariances(centre: NDArray[np.float64]) -> list[tuple[NDArray[np.float64], float]]:
    """Return each candidate's prior covariance, with its log hyperprior."""
    against = centre * np.where(np.arange(len(centre)) == 0, 1.0, -1.0)
    scale = SCALE_SPREAD**2 * np.outer(centre, centre)
    return [
        (
            scale + own**2 * np.outer(against, against) + np.diag((each * centre) ** 2),
            -(own + each) / EXPECTED,
        )
        for own, each in product(SPREADS, SPREADS)
    ]


def _evidence(curve: Curve, covariance: NDArray[np.float64]) -> float:
    """Return the log marginal likelihood of a prior, up to a constant, by a Laplace step.

    To second order the score is normal with the information as its covariance about the
    deviation's effect, and the deviation integrates out.
    """
    root = np.linalg.cholesky(covariance)
    inner = np.eye(len(root)) + root.T @ curve.information @ root
    pulled = root.T @ curve.score
    return float(
        0.5 * pulled @ np.linalg.solve(inner, pulled) - 0.5 * np.linalg.slogdet(inner).logabsdet
    )


def _mode(
    risks: NDArray[np.float64],
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
    *,
    centre: NDArray[np.float64],
    precision: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the weights, not negative, of the highest posterior: Newton with step halving."""

    def posterior(at: NDArray[np.float64]) -> tuple[float, Curve]:
        curve = partial_likelihood(at, risks, days, event, folds)
        away = at - centre
        return curve.value - 0.5 * float(away @ precision @ away), curve

    weights = np.maximum(centre, 0.0)
    height, curve = posterior(weights)
    for _ in range(NEWTON):
        hessian = curve.information + precision
        gradient = curve.score - precision @ (weights - centre)
        root = np.linalg.cholesky(hessian)
        target, _ = nnls(root.T, np.linalg.solve(root, hessian @ weights + gradient))
        step, length = target - weights, 1.0
        while length > 1e-3:
            higher, there = posterior(weights + length * step)
            if higher >= height:
                break
            length /= 2
        else:
            break
        moved = length * float(np.abs(step).max())
        weights, height, curve = weights + length * step, higher, there
        if moved < 1e-6:
            break
    return weights
