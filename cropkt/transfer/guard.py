"""The guard: how far a target moves from its own expert towards what the others say.

For every fold, from the other folds alone: experts that say nothing or the contrary are left
out; each candidate (the equal vote of self and sources, the sources' vote, the stacked experts,
the vote weighted by measured transfer) is judged by its paired lead in C-index over the own expert
on the same patients; the lead is shrunken by what gains are plausible at all; and the answer moves
from the own expert towards the best candidate by how sure the lead is, or by the candidate's odds
against the own expert in out-of-fold partial likelihood, if these are better: the guard steps back
to the own expert as far as both say so. With no evidence it is two thirds of the way to "self +
equal sources"; nothing is switched on or off at a threshold.

A candidate is fitted again without each training fold in turn, so that the patients who judge it
did not choose its weights. No source may hold more than a set part of the answer, however sure
the lead. Shapes: n patients, K folds, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax
from scipy.stats import norm

from cropkt.survival.metrics import Pairs, concordance_of, leads, paired_difference
from cropkt.transfer.scores import LEAST_ERROR, shrunken, standardised
from cropkt.transfer.stacking import equal_weights, log_evidence, stacked

GAIN = 0.03  # what a transfer is expected to add to a C-index, and by how much that varies
GAIN_SPREAD = 0.03
CONTRARY = 2.0  # standard errors below .5 at which an expert counts as contrary
SAME = 1e-6  # spread below which an answer says the same of everybody
STRENGTH = 30.0  # logits a unit of C-index, of the weights by measured transfer
CAP = 0.5  # of the answer's weight that any one source may hold

Candidate = Literal["equal", "vote", "stack", "measured"]
Arm = Literal["equal", "vote", "stack", "measured", "auto"]
Fault = Literal["silent", "contrary"]
CANDIDATES: tuple[Candidate, ...] = ("equal", "vote", "stack", "measured")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the guard decided for one fold, from the other folds, or for patients to come.

    The answer is the experts' risks, in units of the patients who decided, times `weights`.
    """

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
    # (K, n) each: row f holds what the arm says of every patient in fold f's units. Patients of
    # another fold g are answered by weights learnt without f and g, so a calibration for f that
    # is fitted on them sees answers like those it is for. Only f's candidate, share and faults
    # were chosen with g.
    answers: dict[Arm, NDArray[np.float64]]
    final: Decision  # from all patients' out-of-fold risks: for patients to come
    units: NDArray[np.float64]  # (2, 1 + S) mean and deviation of these risks, `final`'s units
    shown: NDArray[np.float64]  # (n,) what `final` shows of each, by weights without their fold
    # (S,) C-index that `risk` loses when the source's weight is taken out of every fold's answer,
    # nothing fitted again; negative where the source hurts, 0 where no pair is comparable.
    influence: NDArray[np.float64]


def guarded(
    pairs: Pairs,
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
    own: Sequence[NDArray[np.floating]],
    sources: Sequence[NDArray[np.floating]],
    *,
    kept: NDArray[np.bool_] | None = None,
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
        kept: (n,) False for patients who are answered but not learnt from; all are, if not given.
    """
    learnt = np.ones(len(folds), dtype=bool) if kept is None else kept
    risks = all_risks(own[0], sources[0])
    units = risks[:, learnt] if learnt.any() else risks
    decided = [_decided(pairs, days, event, folds, known=learnt, risks=risks)]
    for fold in range(int(folds.max()) + 1):
        mine = np.where(folds != fold, own[1 + fold], own[0])
        risks = all_risks(mine, sources[1 + fold])
        known = learnt & (folds != fold)
        decided.append(_decided(pairs, days, event, folds, known=known, risks=risks))
    final, *views = decided
    at = (folds, np.arange(len(folds)))
    answers = {arm: np.stack([view.answers[arm] for view in views]) for arm in final.answers}
    return Guarded(
        risk=answers["auto"][at],
        candidates={name: answers[name][at] for name in CANDIDATES},
        decisions=tuple(view.decision for view in views),
        answers=answers,
        final=final.decision,
        units=np.stack([units.mean(1), units.std(1)]),
        shown=final.answers["auto"],
        influence=_influence(pairs.inside(folds), folds, views),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """One decision and what each arm then says of everybody."""

    decision: Decision
    risks: NDArray[np.float64]  # (1 + S, n) in the units of those who decided
    answers: dict[Arm, NDArray[np.float64]]  # (n,) each


def all_risks(own: NDArray[np.floating], sources: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return all risks (1 + S, n), the own expert first; one that is not finite says nothing."""
    finite = np.isfinite(sources).all(1, keepdims=True)
    return np.concatenate([own[None], np.where(finite, sources, 0.0)]).astype(np.float64)


def _decided(
    pairs: Pairs,
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
    *,
    known: NDArray[np.bool_],
    risks: NDArray[np.float64],
) -> _View:
    """Return the decision of the `known` patients (n,) on `risks` (1 + S, n).

    The answers of a known patient's fold come from the other known patients alone.
    """
    if not known.any():
        return _local(risks, {})
    scaled = standardised(risks, known)
    judged = pairs.within(known)
    faults = _faults(judged, scaled[1:])
    heard = np.array([i for i in range(len(scaled)) if i - 1 not in faults])  # the own one is 0
    if len(heard) == 1:
        return _local(scaled, faults)
    spoken = scaled[heard].T  # (n, 1 + heard)

    def fitted(who: NDArray[np.bool_]) -> dict[Candidate, NDArray[np.float64]]:
        return _candidates(spoken[who], days[who], event[who], folds[who])

    weights = fitted(known)
    rest = [known & (folds != fold) for fold in range(int(folds.max()) + 1)]
    # A fold of which nobody is known loses nobody, and needs no second fit.
    without = [weights if who.sum() == known.sum() else fitted(who) for who in rest]
    shown = {
        name: _answered(spoken, folds, [weight[name] for weight in without]) for name in CANDIDATES
    }
    best, sure, gain = _best(judged.inside(folds), shown, scaled[0])
    likely = _likely(
        *(shown[best][known], scaled[0, known]), days[known], event[known], folds[known]
    )
    share = max(sure, likely)
    mixed = [
        _mixed(spoken[who], weight[best], share) for who, weight in zip(rest, without, strict=True)
    ]
    answers: dict[Arm, NDArray[np.float64]] = {name: shown[name] for name in CANDIDATES}
    answers["auto"] = _answered(spoken, folds, mixed)
    whole = np.zeros(len(scaled))
    whole[heard] = _mixed(spoken[known], weights[best], share)
    return _View(
        decision=Decision(candidate=best, share=share, gain=gain, weights=whole, faults=faults),
        risks=scaled,
        answers=answers,
    )


def _local(risks: NDArray[np.float64], faults: dict[int, Fault]) -> _View:
    """Return the decision for the own expert, row 0 of `risks`, where there is no other."""
    weights = np.zeros(len(risks))
    weights[0] = 1.0
    arms: tuple[Arm, ...] = (*CANDIDATES, "auto")
    return _View(
        decision=Decision(candidate="equal", share=0.0, gain=0.0, weights=weights, faults=faults),
        risks=risks,
        answers=dict.fromkeys(arms, risks[0]),
    )


def _answered(
    risks: NDArray[np.float64],
    folds: NDArray[np.integer],
    weights: Sequence[NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Return the answer (n,) to `risks` (n, 1 + S) by each fold's own weights (1 + S,)."""
    answer: NDArray[np.float64] = (risks * np.stack(weights)[folds]).sum(1)
    return answer


def _mixed(
    risks: NDArray[np.float64], weights: NDArray[np.float64], share: float
) -> NDArray[np.float64]:
    """Return the answer's weights (1 + S,), summing to 1: so much of a candidate, the rest own.

    The candidate is mixed in the units of its own spread over `risks` (n, 1 + S). What a source
    would hold above the cap goes to the own expert.
    """
    spread = float((risks @ weights).std()) if len(risks) else 1.0
    mixed = share * weights / (spread if spread > SAME else 1.0)
    mixed[0] += 1 - share
    if mixed.sum() > 0:
        mixed /= mixed.sum()
    mixed[1:] = np.minimum(mixed[1:], CAP)
    mixed[0] = max(0.0, 1 - mixed[1:].sum())
    return mixed


def _influence(
    pairs: Pairs, folds: NDArray[np.integer], views: Sequence[_View]
) -> NDArray[np.float64]:
    """Return what the answer's C-index loses without each source, (S,).

    That the other weights would be made to sum to 1 again changes no order within a fold.
    """
    answer = np.empty((len(views[0].risks), len(folds)))  # row 0 with all, row 1 + i without i
    for fold, view in enumerate(views):
        mine = folds == fold
        parts = view.decision.weights[:, None] * view.risks[:, mine]
        answer[:, mine] = parts.sum(0)
        answer[1:, mine] -= parts[1:]
    found = [concordance_of(pairs, risk).c_index for risk in answer]
    return np.array([(found[0] or 0.0) - (c_index or 0.0) for c_index in found[1:]])


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
    vote = equal * (np.arange(len(equal)) > 0)
    return {
        "equal": equal,
        "vote": vote,
        "stack": stacked(risks, days, event, folds),
        "measured": _measured(Pairs.of(days, event, folds), risks),
    }


def _measured(pairs: Pairs, risks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return weights (1 + S,) that grow with each expert's measured C-index, as a router's start.

    It is what the repaired router is before it learns: where a few relatives stand out they speak
    almost alone, which the pull to equal sources of `stacked` gives slowly.
    """
    value = shrunken(*leads(pairs, risks.T))
    weights: NDArray[np.float64] = softmax(STRENGTH * (value - value.max()))
    return weights


def _best(
    pairs: Pairs, shown: dict[Candidate, NDArray[np.float64]], local: NDArray[np.float64]
) -> tuple[Candidate, float, float]:
    """Return the candidate of the highest shrunken lead, how sure it is, and that lead.

    How sure is 2 Phi - 1 of the lead in its posterior standard deviations, 0 below none.
    """
    judged = {name: _posterior(pairs, risk, local) for name, risk in shown.items()}
    best = max(judged, key=lambda name: judged[name][0])
    gain, deviation = judged[best]
    return best, max(0.0, 2 * float(norm.cdf(gain / deviation)) - 1), gain


def _posterior(
    pairs: Pairs, risk: NDArray[np.float64], local: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the shrunken lead of `risk` (n,) over `local` (n,) and its standard deviation."""
    lead, error = (0.0, np.inf) if not pairs.count else paired_difference(pairs, risk, local)
    before, seen = GAIN_SPREAD**-2, max(error, LEAST_ERROR) ** -2  # precisions
    return (GAIN * before + lead * seen) / (before + seen), (before + seen) ** -0.5


def _likely(
    risk: NDArray[np.float64],
    local: NDArray[np.float64],
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
) -> float:
    """Return how likely `risk` (n,) is the truth and not `local` (n,), by partial likelihood."""
    spread = float(risk.std())
    scaled = risk / (spread if spread > SAME else 1.0)
    patients = (days, event, folds)
    return float(expit(log_evidence(scaled, *patients) - log_evidence(local, *patients)))
