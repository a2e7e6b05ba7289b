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

from cropkt.survival.metrics import Estimate, Pairs, concordance_of, paired_difference


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShot:
    """The zero-shot arm: risk without any training on the target."""

    risk: NDArray[np.float64]  # (n,)
    choice: tuple[int | None, ...]  # per fold: the index of the source, None for the vote


def standardised(risk: NDArray[np.floating], reference: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return risks (S, n) in units of the reference patients (n,); a constant becomes 0."""
    known = risk[:, reference]
    centred = risk - known.mean(1, keepdims=True)
    deviation = known.std(1, keepdims=True)
    scaled: NDArray[np.float64] = np.divide(
        centred, deviation, out=np.zeros_like(centred, dtype=np.float64), where=deviation > 1e-12
    )
    return scaled


def training_scores(
    pairs: Pairs, folds: NDArray[np.int64], risk: NDArray[np.floating]
) -> list[list[Estimate]]:
    """Return, per fold, the C-index of each risk (S, n) on the patients of all other folds."""
    return [
        [concordance_of(others, row) for row in risk]
        for others in (pairs.within(folds != fold) for fold in range(int(folds.max()) + 1))
    ]


def zero_shot(
    pairs: Pairs, folds: NDArray[np.int64], risks: Sequence[NDArray[np.floating]]
) -> ZeroShot:
    """Return the better of the best single source and the equal vote, chosen per fold.

    The best of S noisy scores is mostly luck: on patients where all sources and the vote are
    equally good, the best of them is expected to lead by sqrt(2 ln S) paired standard errors. A
    source is taken only where it leads the vote by more than that on the other folds.

    Args:
        pairs: comparable pairs of the target's patients.
        folds: (n,) fold of each patient.
        risks: per fold the sources' risk (S, n), read in units learnt without that fold.
    """
    chosen_risk = np.empty(len(folds))
    choice: list[int | None] = []
    for fold, risk in enumerate(risks):
        mine, others = folds == fold, folds != fold
        scaled = standardised(risk, others)
        vote = scaled.mean(0)
        leads = _leads(pairs.within(others), scaled, vote)
        best = int(np.argmax(leads))
        lucky = leads[best] <= sqrt(2 * log(len(risk)))
        choice.append(None if lucky else best)
        chosen_risk[mine] = vote[mine] if lucky else scaled[best, mine]
    return ZeroShot(risk=chosen_risk, choice=tuple(choice))


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


def shrunken(scores: Sequence[Estimate]) -> NDArray[np.float64]:
    """Return C-indices (S,) pulled towards their mean by how uncertain they are.

    Empirical Bayes with the moment estimate of the variance between experts; an expert whose
    score is not estimable gets the mean of the others, or one half.

    References:
        DerSimonian and Laird, doi:10.1016/0197-2456(86)90046-2.
    """
    known = [(s.c_index, s.se or 0.0) for s in scores if s.c_index is not None]
    if not known:
        return np.full(len(scores), 0.5)
    c_index, error = np.array(known).T
    mean = float(c_index.mean())
    between = max(0.0, float(c_index.var()) - float((error**2).mean()))
    result = np.full(len(scores), mean)
    for i, score in enumerate(scores):
        if score.c_index is not None:
            noise = (score.se or 0.0) ** 2
            trust = between / (between + noise) if between else 0.0
            result[i] = mean + trust * (score.c_index - mean)
    return result
