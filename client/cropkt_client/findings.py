"""What a site found about its arms, as the numbers that a reply carries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from cropkt.cancers import Cancer
from cropkt.messages import ArmScore, Cost, Difference, Verdict, Voice
from cropkt.survival.accuracy import accuracy
from cropkt.survival.metrics import Estimate
from cropkt.survival.strata import high_risk, log_rank
from cropkt.transfer.arms import CONTROLS, Prediction, Spent
from cropkt.transfer.guard import Guarded
from cropkt.transfer.target import Target


def arm_score(estimate: Estimate, prediction: Prediction, spent: Spent, target: Target) -> ArmScore:
    """Return all that is told of one arm."""
    cohort, folds = target.cohort, target.folds
    figures = accuracy(cohort.days, cohort.event, folds, prediction.survival, prediction.risk)
    return ArmScore(
        c_index=estimate.c_index,
        se=estimate.se,
        low=estimate.low,
        high=estimate.high,
        pairs=estimate.pairs,
        fold_mean=estimate.fold_mean,
        pooled=estimate.pooled,
        gain=estimate.gain,
        gain_se=estimate.gain_se,
        gain_low=estimate.gain_low,
        gain_high=estimate.gain_high,
        against={
            arm: Difference(**asdict(estimate.against[arm]))
            for arm in CONTROLS
            if arm in estimate.against
        },
        c_ipcw=figures.c_ipcw,
        brier=figures.brier,
        auc=figures.auc,
        d_calibration=figures.d_calibration,
        log_rank=log_rank(cohort.days, cohort.event, high_risk(prediction.risk, folds)),
        cost=Cost(**asdict(spent)),
    )


def verdict(found: Guarded) -> Verdict:
    """Return what the guard decided, over the folds."""
    return Verdict(
        share=float(np.clip(np.mean([one.share for one in found.decisions]), 0, 1)),
        candidates=dict(Counter(one.candidate for one in found.decisions)),
        gain=float(np.clip(np.mean([one.gain for one in found.decisions]), -1, 1)),
    )


def voices(found: Guarded, cancer: Cancer, sources: Sequence[Cancer]) -> dict[Cancer, Voice]:
    """Return every expert's part in the guarded answer, the own one under its cancer."""
    weights = np.clip([one.weights for one in found.decisions], 0, 1)  # (K, 1 + S)
    told = {cancer: Voice(weight=float(weights[:, 0].mean()), weight_sd=float(weights[:, 0].std()))}
    for index, source in enumerate(sources):
        faults = Counter(one.faults.get(index) for one in found.decisions)
        told[source] = Voice(
            weight=float(weights[:, 1 + index].mean()),
            weight_sd=float(weights[:, 1 + index].std()),
            cost=float(np.clip(found.influence[index], -1, 1)),
            silent=faults["silent"],
            contrary=faults["contrary"],
        )
    return told
