"""The guard: how far a target moves from its own expert towards what the others say.

For every fold, from the other folds alone: experts that say nothing or the contrary are left
out; each candidate (the equal vote of self and sources, the sources' vote, the stacked experts)
is judged by its paired lead over the own expert on the same patients; the lead is shrunken by
what gains are plausible at all; and the answer moves from the own expert towards the best
candidate by how sure the lead is. With no evidence the target stays nearly local; nothing is
switched on or off at a threshold.

A stacked candidate is fitted again without each training fold in turn, so that the patients who
judge it did not choose its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from cropkt.survival.metrics import Pairs, concordance_of, paired_difference
from cropkt.transfer.scores import LEAST_ERROR, standardised
from cropkt.transfer.stacking import equal_weights, stacked

GAIN = 0.03  # what a transfer is expected to add to a C-index, and by how much that varies
GAIN_SPREAD = 0.03
CONTRARY = 2.0  # standard errors below .5 at which an expert counts as contrary

Candidate = Literal["equal", "vote", "stack"]
Fault = Literal["silent", "contrary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the guard decided for one fold, from the other folds."""

    candidate: Candidate
    share: float  # of the candidate in the answer; the rest is the own expert
    gain: float  # shrunken lead of the candidate over the own expert
    weights: NDArray[np.float64]  # (1 + S,) of the experts in the answer, summing to 1
    faults: dict[int, Fault]  # sources left out, by their index


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """The arms that the guard compares and its answer, all out of fold."""

    risk: NDArray[np.float64]  # (n,)
    candidates: dict[Candidate, NDArray[np.float64]]  # (n,) each
    decisions: tuple[Decision, ...]  # one a fold


def guarded(
    pairs: Pairs,
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
    own: Sequence[NDArray[np.floating]],
    sources: Sequence[NDArray[np.floating]],
) -> Guarded:
    """Return the guarded answer of one target.

    Args:
        pairs: comparable pairs of the target's patients.
        days: (n,) time of death or last follow-up.
        event: (n,) True for a death.
        folds: (n,) fold of each patient.
        own: per view the own experts' risk (n,): row 0 out of fold, row 1 + f for the patients
            outside fold f by models that saw neither them nor f.
        sources: per view the sources' risk (S, n); row 1 + f in units learnt without fold f.
    """
    risk = np.empty(len(folds))
    candidates: dict[Candidate, NDArray[np.float64]] = {
        "equal": np.empty(len(folds)),
        "vote": np.empty(len(folds)),
        "stack": np.empty(len(folds)),
    }
    decisions = []
    for fold in range(int(folds.max()) + 1):
        known = folds != fold
        mine = np.where(known, own[1 + fold], own[0])
        scaled = standardised(np.concatenate([mine[None], sources[1 + fold]]), known)
        judged = pairs.within(known)
        faults = _faults(judged, scaled[1:])
        kept = np.array([0] + [1 + i for i in range(len(scaled) - 1) if i not in faults])
        heard = scaled[kept].T  # (n, 1 + kept)
        weights = _candidates(heard[known], days[known], event[known], folds[known])
        within, shown = judged.inside(folds), dict[Candidate, NDArray[np.float64]]()
        for name, weight in weights.items():
            answer = heard @ weight
            candidates[name][~known] = answer[~known]
            shown[name] = answer
        shown["stack"] = _refitted(heard, days, event, folds, known)
        best, share, gain = _best(within, shown, scaled[0])
        chosen = weights[best]
        chosen = chosen / max(float((heard[known] @ chosen).std()), 1e-9)
        mixed = share * chosen
        mixed[0] += 1 - share
        risk[~known] = (heard @ mixed)[~known]
        whole = np.zeros(len(scaled))
        whole[kept] = mixed / mixed.sum()
        decisions.append(
            Decision(candidate=best, share=share, gain=gain, weights=whole, faults=faults)
        )
    return Guarded(risk=risk, candidates=candidates, decisions=tuple(decisions))


def _faults(pairs: Pairs, sources: NDArray[np.float64]) -> dict[int, Fault]:
    """Return the sources (S, n) that say the same of everybody, or the contrary of the truth."""
    faults: dict[int, Fault] = {}
    for index, risk in enumerate(sources):
        if not risk.any():
            faults[index] = "silent"
            continue
        estimate = concordance_of(pairs, risk)
        if estimate.c_index is None or estimate.se is None:
            continue
        if estimate.c_index + CONTRARY * max(estimate.se, LEAST_ERROR) < 0.5:
            faults[index] = "contrary"
    return faults


def _candidates(
    risks: NDArray[np.float64],
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
) -> dict[Candidate, NDArray[np.float64]]:
    """Return each candidate's weights (1 + S,) for the risks (n, 1 + S) of training patients."""
    equal = equal_weights(risks[:, 1:])
    vote = equal * (np.arange(len(equal)) > 0) if len(equal) > 1 else equal
    return {"equal": equal, "vote": vote, "stack": stacked(risks, days, event, folds)}


def _refitted(
    risks: NDArray[np.float64],
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
    known: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Return the stacked risk (n,) of each training patient by weights fitted without its fold."""
    answer = np.zeros(len(risks))
    for fold in np.unique(folds[known]):
        rest, mine = known & (folds != fold), folds == fold
        answer[mine] = risks[mine] @ stacked(risks[rest], days[rest], event[rest], folds[rest])
    return answer


def _best(
    pairs: Pairs, shown: dict[Candidate, NDArray[np.float64]], local: NDArray[np.float64]
) -> tuple[Candidate, float, float]:
    """Return the candidate of the highest shrunken lead over `local`, its share and that lead.

    The share is 2 Phi - 1 of the lead in its posterior standard deviations, 0 below none.
    """
    best: tuple[Candidate, float, float] | None = None
    for name, risk in shown.items():
        lead, error = (0.0, np.inf) if not pairs.count else paired_difference(pairs, risk, local)
        before, shown_by = GAIN_SPREAD**-2, max(error, LEAST_ERROR) ** -2  # precisions
        precision = before + shown_by
        gain = (GAIN * before + lead * shown_by) / precision
        share = max(0.0, 2 * float(norm.cdf(gain * sqrt(precision))) - 1)
        if best is None or gain > best[2]:
            best = (name, share, gain)
    assert best is not None
    return best
