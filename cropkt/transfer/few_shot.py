"""Few-shot: what arms are worth to a target that has only a few patients to learn from.

A draw keeps some patients, events in proportion, from every fold; all that is trained or chosen
comes from those of the other folds, and all patients of the fold are judged. So every draw is
judged on the same patients, and a curve over the number of patients compares like with like.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cropkt.config import Arm, StudyConfig
from cropkt.experts.abmil import Abmil
from cropkt.experts.device import device_of
from cropkt.experts.training import Plan, hash_seed, train_experts
from cropkt.survival.metrics import concordance_of
from cropkt.transfer.arms import guard
from cropkt.transfer.scores import equal_vote, held_out, zero_shot
from cropkt.transfer.target import Target


def few_shot(
    target: Target, sources: Abmil, study: StudyConfig
) -> Iterator[tuple[int, dict[Arm, tuple[float, ...]]]]:
    """Yield, for each number of training patients, each arm's C-index in every draw.

    A number of which the target has no more in a training set is left out, and so is an arm
    whose C-index is not estimable.

    Args:
        target: with all its patients.
        sources: experts of other cancers.
        study: `shots` and `draws` are read; training is as of an expert.
    """
    for shots in study.shots:
        folds = target.folds
        if shots > len(folds) - int(np.bincount(folds).max()):
            continue
        found: dict[Arm, list[float]] = {}
        for draw in range(study.draws):
            rng = np.random.default_rng(hash_seed(study.seed, 8, shots, draw))
            kept = draw_patients(folds, target.cohort.event, shots, rng)
            for arm, risk in _arms(target, sources, study, kept).items():
                score = concordance_of(target.pairs.inside(folds), risk).c_index
                if score is not None:
                    found.setdefault(arm, []).append(score)
        yield shots, {arm: tuple(scores) for arm, scores in found.items()}


def draw_patients(
    folds: NDArray[np.int64], event: NDArray[np.bool_], shots: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Return whom a draw keeps, (n,), so that about `shots` lie outside every fold.

    Each fold keeps its share of those who died and of those who did not, as evenly as whole
    patients allow.
    """
    count = int(folds.max()) + 1
    whole = min(len(folds), round(shots * count / (count - 1)))
    deaths = round(whole * float(event.mean()))
    kept = np.zeros(len(folds), dtype=np.bool_)
    for group, wanted in ((event, max(deaths, 1)), (~event, whole - max(deaths, 1))):
        # One of each fold in turn, so that no fold is more than one patient ahead.
        order = rng.permutation(np.flatnonzero(group))
        turn = np.empty(len(order), dtype=np.int64)
        for fold in range(count):
            mine = folds[order] == fold
            turn[mine] = np.arange(mine.sum())
        kept[order[np.lexsort((rng.permutation(len(order)), turn))][:wanted]] = True
    return kept


def _arms(
    target: Target, sources: Abmil, study: StudyConfig, kept: NDArray[np.bool_]
) -> dict[Arm, NDArray[np.float64]]:
    """Return the out-of-fold risk (n,) of each arm that a draw compares."""
    cohort, plan = target.cohort, Plan.cross_fitted(target.folds, kept)
    initial = Abmil.initial(
        study.shape, seed=study.seed, hazard=study.initial_hazard, models=len(plan.excluded)
    )
    own = train_experts(
        cohort,
        plan,
        initial=initial.to(device_of(sources)),
        config=study.training,
        seed=study.seed,
    )
    few = Target.of(cohort, plan, own)
    opinions = few.consult(sources, study)
    risks = [opinion.risk for opinion in opinions[1:]]
    found = guard(few, opinions, kept=kept)
    return {
        "local": few.local_risk(),
        "vote": held_out(equal_vote(few.folds, risks, kept=kept), few.folds),
        "zero_shot": held_out(zero_shot(few.pairs, few.folds, risks, kept=kept).answers, few.folds),
        "stack": held_out(found.answers["stack"], few.folds),
        "auto": found.risk,
    }
