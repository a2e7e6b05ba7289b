"""How well each expert ranks a target's patients, and what may be concluded from it.

Every choice made from these scores is made per fold, from the other folds alone: the patients
that judge the choice never take part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

from cropkt.survival.across import between_variance
from cropkt.survival.metrics import Estimate, Pairs, concordance_of, paired_difference

UNKNOWN_ERROR = 12**-0.5  # standard deviation of a C-index of which nothing is known
LEAST_ERROR = 1e-4  # below it an error comes of too few pairs to show one
TRACE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShot:
    """The zero-shot arm: risk without any training on the target."""

    answers: NDArray[np.float64]  # (K, n) of everybody, in the units of each fold
    choice: tuple[int | None, ...]  # per fold: the index of the source, None for the vote


def standardised(risk: NDArray[np.floating], reference: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return risks (S, n) in units of the reference patients (n,); a constant becomes 0."""
    known = risk[:, reference]
    return in_units(risk, known.mean(1), known.std(1))


def in_units(
    risk: NDArray[np.floating], mean: NDArray[np.floating], deviation: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return risks (S, n) in units of their mean and deviation (S,); a constant becomes 0."""
    centred, deviation = risk - mean[:, None], deviation[:, None]
    scaled: NDArray[np.float64] = np.divide(
        centred, deviation, out=np.zeros_like(centred, dtype=np.float64), where=deviation > 1e-12
    )
    return scaled


def held_out(answers: NDArray[np.floating], folds: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return each patient's risk (n,) in the units of their own fold, from answers (K, n)."""
    risk: NDArray[np.float64] = answers[folds, np.arange(len(folds))]
    return risk


def training_scores(
    pairs: Pairs, folds: NDArray[np.int64], risk: NDArray[np.floating]
) -> list[list[Estimate]]:
    """Return, per fold, the C-index of each risk (S, n) on the patients of all other folds."""
    return [
        [concordance_of(others, row) for row in risk]
        for others in (pairs.within(folds != fold) for fold in range(int(folds.max()) + 1))
    ]


def zero_shot(
    pairs: Pairs,
    folds: NDArray[np.int64],
    risks: Sequence[NDArray[np.floating]],
    *,
    kept: NDArray[np.bool_] | None = None,
) -> ZeroShot:
    """Return the better of the best single source and the equal vote, chosen per fold.

    The best of S noisy scores is mostly luck: on patients where all sources and the vote are
    equally good, the best of them is expected to lead by sqrt(2 ln S) paired standard errors. A
    source is taken only where it leads the vote by more than that on the other folds.

    Args:
        pairs: comparable pairs of the target's patients.
        folds: (n,) fold of each patient.
        risks: per fold the sources' risk (S, n), read in units learnt without that fold.
        kept: (n,) whose outcomes may be known; everybody's by default.
    """
    answers = np.empty((len(risks), len(folds)))
    choice: list[int | None] = []
    for fold, risk in enumerate(risks):
        others = folds != fold
        if kept is not None:
            others &= kept
        scaled = standardised(risk, others)
        equal = scaled.mean(0)
        leads = _leads(pairs.within(others), scaled, equal)
        best = int(np.argmax(leads))
        lucky = leads[best] <= sqrt(2 * log(len(risk)))
        choice.append(None if lucky else best)
        answers[fold] = equal if lucky else scaled[best]
    return ZeroShot(answers=answers, choice=tuple(choice))


def equal_vote(
    folds: NDArray[np.int64],
    risks: Sequence[NDArray[np.floating]],
    *,
    kept: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Return the equal vote of the sources (K, n), in the units of each fold.

    Args:
        folds: (n,) fold of each patient.
        risks: per fold the sources' risk (S, n), read in units learnt without that fold.
        kept: (n,) of whom anything may be learnt; everybody by default.
    """
    known = np.ones(len(folds), dtype=np.bool_) if kept is None else kept
    scaled = [standardised(risk, known & (folds != f)) for f, risk in enumerate(risks)]
    return np.stack([risk.mean(0) for risk in scaled])


def _leads(
    pairs: Pairs, risk: NDArray[np.float64], vote: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return by how many standard errors each risk (S, n) leads the vote (n,); 0 if unknown."""
    leads = np.zeros(len(risk))
    if pairs.count:
        for i, row in enumerate(risk):
            difference, error = paired_difference(pairs, row, vote)
            leads[i] = difference / error if error > 0 else 0.0
    return leads


def shrunken(c_index: NDArray[np.floating], error: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return C-indices (S,) pulled towards their mean by how uncertain they are.

    Empirical Bayes: the variance between experts is `between_variance`. Where nothing tells the
    experts apart they keep a trace of their order, so that a choice among equals is the better
    guess and not the alphabet.

    Args:
        c_index: (S,), nan where not estimable; such an expert gets the mean.
        error: (S,) standard errors; about 0, as a handful of pairs can give, counts as unknown.
    """
    known = np.isfinite(c_index)
    if not known.any():
        return np.full(len(c_index), 0.5)
    noise = np.where(error > LEAST_ERROR, error, UNKNOWN_ERROR)[known] ** 2
    value = c_index[known].astype(np.float64)
    between = between_variance(value, noise)
    centre = float(np.average(value, weights=1 / (between + noise)))
    result = np.full(len(c_index), centre)
    trust = between / (between + noise)
    result[known] += np.maximum(trust, TRACE) * (value - centre)
    return result
