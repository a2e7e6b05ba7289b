"""Can who trained an expert be told from who did not? Asked before the expert leaves.

The released expert learnt from all patients, so nobody is left to compare them with. The models of
cross-fitting are of the same recipe, and for each of them a fold was left out. One comparison is:

    target       the model without fold f
    members      fold h: the target learnt from them
    non-members  fold f: it did not
    out shadow   the model without f and h: it learnt from neither
    in shadows   all models that learnt from both

The shadows treat f and h alike, and the folds are a random split, so members and non-members
differ in nothing but what the target learnt from them. Shadows that left out one of the two would
not do: fold h moves a model's answer for everybody, so the attack would recognise the fold, and
find a leak even of patients whom no model ever saw.

Who died and who was censored are not compared with one another: their losses differ anyway.
With folds by hospital, what an expert learnt of a hospital counts as a leak too.
Shapes: F models, n patients, K folds.

References:
    Watson et al., arXiv 2111.08440 (loss, calibrated by a shadow); Carlini et al., arXiv 2112.03570
    (likelihood ratio); Korn and Graubard, Survey Methodology 24(2), 1998 (interval).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass as plain_dataclass
from math import floor
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from scipy.stats import beta

from cropkt.cohort.bags import Cohort
from cropkt.errors import NotEstimableError
from cropkt.experts.abmil import Abmil
from cropkt.experts.bank import Opinions, consult
from cropkt.experts.device import device_of
from cropkt.experts.training import Plan
from cropkt.survival.likelihood import discrete_nll

CONFIDENCE = 0.95  # of all intervals of one audit together
POWER = 0.8
FALSE_POSITIVES = 0.01
ENOUGH = 300  # non-members, three of whom may pass as members
CERTAIN = -1e-9  # log-likelihoods are held below it, where the logit is finite

Floats = NDArray[np.float64]
Method = Literal["loss", "likelihood ratio"]
Share = Annotated[float, Field(ge=0, le=1)]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Rate:
    """A share with its exact interval."""

    value: Share
    low: Share
    high: Share


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AuditResult:
    """How well the strongest attack tells who trained an expert. An AUROC of .5 is a coin toss."""

    method: Method
    auroc: Share
    low: Share
    high: Share
    tpr_at_1_percent: Rate | None  # None: this cohort cannot show it
    patients: Annotated[int, Field(ge=0, le=10_000_000)]
    detectable: Share  # smallest AUROC that would have been told from .5, with 80 % power

    def sentence(self) -> str:
        """Return the result in plain words."""
        rate = self.tpr_at_1_percent
        few = (
            f"recognises {rate.value:.1%} of them ({rate.low:.1%} to {rate.high:.1%})"
            if rate
            else f"cannot be judged with fewer than {ENOUGH} patients"
        )
        return (
            f"The {self.method} attack on {self.patients} patients tells who trained the expert "
            f"from who did not with an AUROC of {self.auroc:.2f} ({CONFIDENCE:.0%} interval "
            f"{self.low:.2f} to {self.high:.2f}; 0.5 is a coin toss). At one false alarm in a "
            f"hundred it {few}. A leak below an AUROC of {self.detectable:.2f} could have stayed "
            "unseen. This bounds what these attacks find; it is not a promise that no other "
            "attack finds more."
        )


@plain_dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One target with its members and non-members, and the models that judge it."""

    non_members: int  # fold f
    members: int  # fold h
    target: int
    out_shadow: int
    in_shadows: tuple[int, ...]


Scores = list[tuple[Comparison, Floats]]  # of every patient (n,), higher for a member
Attack = Callable[[Floats, Comparison, NDArray[np.bool_]], Floats]


def audit(
    experts: Abmil, cohort: Cohort, plan: Plan, *, opinions: Opinions | None = None
) -> AuditResult:
    """Return how well membership is told from the experts of one cohort; nothing is trained.

    Every fold model is attacked in turn. They learnt from fewer patients than the expert of all,
    so each of their patients weighs a little more. The interval is over patients, given the models.

    Args:
        experts: the F trained models of `plan`.
        cohort: n patients.
        plan: who learnt from whom; its folds are a random split.
        opinions: what the experts say of the cohort; asked now by default.

    Raises:
        NotEstimableError: the plan lacks shadows, or no two patients can be compared.
    """
    event = cohort.event
    rounds = list(comparisons(plan))
    confidence = log_likelihoods(experts, cohort, opinions)
    scores = {
        method: [(at, attack(confidence, at, event)) for at in rounds]
        for method, attack in ATTACKS.items()
    }
    found = {method: membership_auroc(mine, plan, event) for method, mine in scores.items()}
    method = max(found, key=lambda name: found[name][0])
    auroc, variance = found[method]
    trials = effective_trials(auroc, variance, patients=len(cohort))
    # The strongest of several attacks is reported, so all intervals must hold at once.
    level = 1 - (1 - CONFIDENCE) / len(ATTACKS)
    low, high = clopper_pearson(auroc * trials, trials, level=level)
    return AuditResult(
        method=method,
        auroc=auroc,
        low=low,
        high=high,
        tpr_at_1_percent=true_positive_rate(scores[method], plan, event),
        patients=len(cohort),
        detectable=detectable(trials, level=level),
    )


def passes(result: AuditResult, *, max_auroc_upper: float) -> bool:
    """Return whether even the upper end of the AUROC's interval is within the policy."""
    return result.high <= max_auroc_upper


def comparisons(plan: Plan) -> Iterator[Comparison]:
    """Yield the K (K - 1) comparisons of a cross-fitted plan.

    Raises:
        NotEstimableError: a target, its out shadow or two in shadows are missing.
    """
    for f in range(folds := int(plan.folds.max()) + 1):
        for h in range(folds):
            if f == h:
                continue
            both = tuple(
                model for model, left_out in enumerate(plan.excluded) if not {f, h} & {*left_out}
            )
            try:
                target, out_shadow = plan.model(f), plan.model(f, h)
            except ValueError:
                both = ()
            if len(both) < 2:
                raise NotEstimableError(
                    "membership audit",
                    f"the models without fold {f} and with fold {h} lack shadows",
                    "Train with Plan.cross_fitted and at least 3 folds",
                )
            yield Comparison(
                non_members=f, members=h, target=target, out_shadow=out_shadow, in_shadows=both
            )


@torch.inference_mode()
def log_likelihoods(experts: Abmil, cohort: Cohort, opinions: Opinions | None = None) -> Floats:
    """Return each patient's log-likelihood under each model, (F, n), at most `CERTAIN`."""
    features = (opinions or consult(experts, cohort)).features.to(device_of(experts))
    logits = experts.predict(features).cpu().double()  # (F, n, T)
    bins, event = torch.from_numpy(cohort.time_bins), torch.from_numpy(cohort.event)
    found: Floats = (-discrete_nll(logits, bins, event)).clamp(max=CERTAIN).numpy()
    return found


def loss_attack(confidence: Floats, at: Comparison, event: NDArray[np.bool_]) -> Floats:
    """Return by how much a patient's loss is lower under the target than under its shadow, (n,)."""
    fall: Floats = confidence[at.target] - confidence[at.out_shadow]
    return fall


def ratio_attack(confidence: Floats, at: Comparison, event: NDArray[np.bool_]) -> Floats:
    """Return the log-likelihood ratio of a member against a non-member, (n,).

    Both are normal in the logit of a patient's likelihood, around what the shadows say of this
    patient. Few models cannot give each patient a spread: it is pooled over those of one outcome.
    """
    logit = confidence - np.log(-np.expm1(confidence))
    learnt = logit[list(at.in_shadows)]
    variance = learnt.var(0, ddof=1)
    for died in (True, False):
        if (same := event == died).any():
            variance[same] = variance[same].mean()
    given = logit[at.target]
    nearer = (given - logit[at.out_shadow]) ** 2 - (given - learnt.mean(0)) ** 2
    ratio: Floats = nearer / (2 * variance + 1e-12)
    return ratio


ATTACKS: dict[Method, Attack] = {"loss": loss_attack, "likelihood ratio": ratio_attack}


def membership_auroc(scores: Scores, plan: Plan, event: NDArray[np.bool_]) -> tuple[float, float]:
    """Return how often a member scores above a non-member, and the variance of that.

    Only patients of the same comparison and the same outcome (death or censoring) are compared;
    the two outcomes weigh as their patients. The variance is the infinitesimal jackknife over
    patients, since each of them takes part in many comparisons (Obuchowski, doi:10.2307/2533958).

    Raises:
        NotEstimableError: no two patients of different folds share an outcome.
    """
    n, value, weight = len(event), 0.0, 0.0
    influence = np.zeros(n)
    for died in (True, False):
        same = event == died
        won, met = np.zeros(n), np.zeros(n)
        for at, score in scores:
            members = np.flatnonzero(same & (plan.folds == at.members))
            others = np.flatnonzero(same & (plan.folds == at.non_members))
            lead = np.sign(score[members, None] - score[None, others])  # (members, others)
            credit = (lead + 1) / 2  # a tie is half right
            won[members] += credit.sum(1)
            won[others] += credit.sum(0)
            met[members] += len(others)
            met[others] += len(members)
        if not met.any():
            continue
        pairs, share = met.sum() / 2, same.mean()
        auroc = won.sum() / 2 / pairs
        value += share * auroc
        weight += share
        influence += share * (won - auroc * met) / pairs
    if weight == 0:
        problem = "no two patients of different folds share an outcome"
        raise NotEstimableError("membership audit", problem, "Audit a larger cohort")
    variance = (influence**2).sum() / weight**2 * n / (n - 1)
    return float(value / weight), float(variance)


def effective_trials(share: float, variance: float, *, patients: int) -> float:
    """Return how many independent comparisons would know a share as well.

    At most one for each patient as a member and one as a non-member: near 0 or 1 an estimated
    variance promises too much.
    """
    most = 2.0 * patients
    spread = share * (1 - share)
    return min(most, spread / variance) if spread > 0 and variance > 0 else most


def clopper_pearson(
    right: float, trials: float, *, level: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the exact interval of a share, of which `right` of `trials` were counted.

    Neither need be whole: Korn and Graubard use it with an effective number of trials.
    """
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, right, trials - right + 1)) if right > 0 else 0.0
    high = float(beta.ppf(1 - tail, right + 1, trials - right)) if right < trials else 1.0
    return low, high


def detectable(trials: float, *, level: float = CONFIDENCE, power: float = POWER) -> float:
    """Return the smallest AUROC whose interval would leave .5 below it, in `power` of audits."""
    whole = max(1, floor(trials))
    right = np.arange(whole // 2 + 1, whole + 1)
    flagged = right[beta.ppf((1 - level) / 2, right, whole - right + 1) > 0.5]
    if not flagged.size:
        return 1.0  # so few that not even a full score would show it
    return float(beta.ppf(power, flagged[0], whole - flagged[0] + 1))


def true_positive_rate(scores: Scores, plan: Plan, event: NDArray[np.bool_]) -> Rate | None:
    """Return the share of members found where 1 % of non-members pass; None below `ENOUGH`.

    Each fold stands against the next one only, so that every patient counts once as a member and
    once as a non-member. The interval is exact for the threshold that the non-members gave.
    """
    if len(event) < ENOUGH:
        return None
    folds = int(plan.folds.max()) + 1
    members, others = np.empty(len(event)), np.empty(len(event))
    for at, score in scores:
        if at.members != (at.non_members + 1) % folds:
            continue
        inside, outside = plan.folds == at.members, plan.folds == at.non_members
        level = np.zeros(len(event))  # what the target does to patients of an outcome, on the whole
        for died in (True, False):
            same = event == died
            if (here := same & (inside | outside)).any():
                level[same] = np.median(score[here])
        members[inside] = (score - level)[inside]
        others[outside] = (score - level)[outside]
    threshold = np.sort(others)[-1 - floor(FALSE_POSITIVES * len(others))]
    found = int((members > threshold).sum())
    low, high = clopper_pearson(found, len(members))
    return Rate(value=found / len(members), low=low, high=high)
