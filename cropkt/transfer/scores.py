"""How well each expert ranks a target's patients, and what may be concluded from it.

Every choice made from these scores is made per fold, from the other folds alone: the patients
that judge the choice never take part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cropkt.survival.metrics import Estimate, Pairs, concordance_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShot:
    """The zero-shot arm: risk without any training on the target."""

    risk: NDArray[np.float64]  # (n,)
    choice: tuple[int | None, ...]  # per fold: the index of the source, None for the vote


def standardised(risk: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return risks (S, n) with mean 0 and deviation 1 over patients; a constant becomes 0."""
    centred = risk - risk.mean(1, keepdims=True)
    deviation = centred.std(1, keepdims=True)
    return np.divide(
        centred, deviation, out=np.zeros_like(centred, dtype=np.float64), where=deviation > 1e-12
    )


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
    risk: NDArray[np.floating],
    scores: Sequence[Sequence[Estimate]],
) -> ZeroShot:
    """Return the better of the best single source and the equal vote, chosen per fold.

    A single source is taken only where it beats the vote by more than one standard error of the
    vote on the other folds: the best of many noisy scores is mostly luck.

    Args:
        pairs: comparable pairs of the target's patients.
        folds: (n,) fold of each patient.
        risk: (S, n) of the sources.
        scores: `training_scores` of `risk`.
    """
    scaled = standardised(risk)
    vote = scaled.mean(0)
    chosen_risk = vote.copy()
    choice: list[int | None] = []
    for fold, of_sources in enumerate(scores):
        of_vote = concordance_of(pairs.within(folds != fold), vote)
        known = [(s.c_index, i) for i, s in enumerate(of_sources) if s.c_index is not None]
        best, index = max(known, default=(0.0, 0))
        if of_vote.c_index is None or best <= of_vote.c_index + (of_vote.se or 0.0):
            choice.append(None)
            continue
        choice.append(index)
        chosen_risk[folds == fold] = scaled[index, folds == fold]
    return ZeroShot(risk=chosen_risk, choice=tuple(choice))


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
