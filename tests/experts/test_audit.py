from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from cropkt.cohort.bags import Cohort
from cropkt.cohort.splits import stratified_folds
from cropkt.config import ExpertShape, TrainingConfig
from cropkt.errors import NotEstimableError
from cropkt.experts.abmil import Abmil
from cropkt.experts.audit import (
    ATTACKS,
    ENOUGH,
    AuditResult,
    audit,
    clopper_pearson,
    comparisons,
    detectable,
    effective_trials,
    log_likelihoods,
    membership_auroc,
    passes,
    true_positive_rate,
)
from cropkt.experts.bank import consult
from cropkt.experts.training import Plan, train_experts

WIDE = ExpertShape(dim=24, embed=32, attention=8)
MEMORISED = TrainingConfig(epochs=25, batch=8, learning_rate=1e-2, weight_decay=0.0, dropout=0.0)
REGULARISED = replace(MEMORISED, epochs=2, learning_rate=1e-3, weight_decay=1.0, dropout=0.5)


def plan_of(cohort: Cohort, *, folds: int = 3, seed: int = 0) -> Plan:
    return Plan.cross_fitted(
        stratified_folds(cohort.event, cohort.time_bins, folds=folds, seed=seed)
    )


def trained(
    cohort: Cohort, plan: Plan, config: TrainingConfig, *, shape: ExpertShape = WIDE, seed: int = 0
) -> Abmil:
    initial = Abmil.initial(shape, seed=seed, hazard=0.06, models=len(plan.excluded))
    return train_experts(cohort, plan, initial=initial, config=config, seed=seed)


def covers(result: AuditResult, value: float) -> bool:
    return result.low <= value <= result.high


@pytest.fixture(scope="module")
def noisy(make_cohort: Callable[..., Cohort]) -> Cohort:
    """Few patients whose features say nothing of their outcomes: all that is learnt is by heart."""
    return make_cohort(patients=48, dim=24, effect=0.0)


@pytest.fixture(scope="module")
def memorised(noisy: Cohort) -> AuditResult:
    plan = plan_of(noisy)
    return audit(trained(noisy, plan, MEMORISED), noisy, plan)


def test_an_overfitted_expert_is_blocked_and_a_regularised_one_of_the_same_cohort_passes(
    noisy, memorised
) -> None:
    plan = plan_of(noisy)
    regularised = audit(trained(noisy, plan, REGULARISED), noisy, plan)
    assert memorised.low > 0.7
    assert regularised.auroc < memorised.auroc - 0.1
    assert not passes(memorised, max_auroc_upper=0.85)
    assert passes(regularised, max_auroc_upper=0.85)


def test_an_expert_that_learnt_nothing_tells_nothing(noisy) -> None:
    plan = plan_of(noisy)
    experts = Abmil.initial(WIDE, seed=0, models=len(plan.excluded))
    result = audit(experts, noisy, plan)
    assert result.auroc == 0.5
    assert covers(result, 0.5)
    assert result.high < result.detectable + 0.05


def test_no_leak_is_found_of_patients_whom_no_model_ever_saw(make_cohort) -> None:
    """The interval misses one half about as often as it says, though the models learnt by heart."""
    quick = replace(MEMORISED, epochs=8)
    shape = replace(WIDE, embed=8, attention=4)
    repeats, missed, of_members = 40, 0, []
    for seed in range(repeats):
        cohort = make_cohort(patients=60, dim=24, effect=0.5, seed=seed)
        seen, unseen = (cohort.subset(np.arange(60) % 2 == side) for side in (0, 1))
        plan = plan_of(seen, seed=seed)
        experts = trained(seen, plan, quick, shape=shape, seed=seed)
        missed += not covers(audit(experts, unseen, plan_of(unseen, seed=seed)), 0.5)
        of_members.append(audit(experts, seen, plan).auroc)
    assert missed <= binom.ppf(0.999, repeats, 0.05)
    assert np.mean(of_members) > 0.6  # the same models do leak of those they saw


def test_the_same_experts_give_the_same_result(noisy, memorised) -> None:
    plan = plan_of(noisy)
    experts = trained(noisy, plan, MEMORISED)
    assert audit(experts, noisy, plan) == memorised
    assert audit(experts, noisy, plan, opinions=consult(experts, noisy)) == memorised


@pytest.mark.parametrize("folds", [3, 4, 5])
def test_a_target_learnt_from_its_members_alone_and_its_shadows_treat_both_folds_alike(
    folds,
) -> None:
    plan = Plan.cross_fitted(np.arange(20) % folds)
    found = list(comparisons(plan))
    assert len({(at.members, at.non_members) for at in found}) == folds * (folds - 1)
    for at in found:
        assert plan.excluded[at.target] == (at.non_members,)
        assert set(plan.excluded[at.out_shadow]) == {at.members, at.non_members}
        assert len(at.in_shadows) >= 2
        assert at.target not in at.in_shadows
        for model in at.in_shadows:
            assert not {at.members, at.non_members} & set(plan.excluded[model])


@pytest.mark.parametrize(
    "plan",
    [
        Plan(np.arange(48) % 3, ((), (0,), (1,), (2,))),
        Plan(np.arange(48) % 3, ((0, 1), (0, 2), (1, 2), ())),
        Plan.cross_fitted(np.arange(48) % 2),
    ],
)
def test_a_plan_without_shadows_is_named(noisy, plan) -> None:
    experts = Abmil.initial(WIDE, seed=0, models=len(plan.excluded))
    with pytest.raises(NotEstimableError, match="lack shadows"):
        audit(experts, noisy, plan)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_auroc_equals_its_definition(make_cohort, attack) -> None:
    cohort = make_cohort(patients=30)
    plan = plan_of(cohort)
    confidence = -np.random.default_rng(0).exponential(size=(len(plan.excluded), 30)).round(1) - 0.1
    scores = [(at, attack(confidence, at, cohort.event)) for at in comparisons(plan)]
    expected = 0.0
    for died in (True, False):
        credit = []
        for (at, score), i, j in product(scores, range(30), range(30)):
            fitting = cohort.event[i] == cohort.event[j] == died
            if fitting and (plan.folds[i], plan.folds[j]) == (at.members, at.non_members):
                credit.append((score[i] > score[j]) + (score[i] == score[j]) / 2)
        expected += np.mean(credit) * np.mean(cohort.event == died)
    assert membership_auroc(scores, plan, cohort.event)[0] == pytest.approx(expected)


def test_the_variance_is_that_of_new_patients(make_cohort) -> None:
    """Over many draws of patients, whose scores depend on them and on the comparison."""
    rng = np.random.default_rng(3)
    cohort = make_cohort(patients=60)
    plan = plan_of(cohort)
    found = []
    for _ in range(400):
        self, leak = rng.normal(size=60), rng.normal(0.7, 0.7, size=60)
        scores = [
            (at, self + leak * (plan.folds == at.members) + rng.normal(size=60))
            for at in comparisons(plan)
        ]
        found.append(membership_auroc(scores, plan, cohort.event))
    auroc, variance = np.array(found).T
    assert variance.mean() == pytest.approx(auroc.var(), rel=0.2)


def test_nobody_to_compare_is_said() -> None:
    plan = Plan.cross_fitted(np.array([0, 2]))
    scores = [(at, np.zeros(2)) for at in comparisons(plan)]
    with pytest.raises(NotEstimableError, match="no two patients"):
        membership_auroc(scores, plan, np.array([True, False]))


@given(trials=st.integers(1, 400), data=st.data(), level=st.sampled_from([0.9, 0.95, 0.99]))
def test_the_interval_equals_scipy(trials, data, level) -> None:
    right = data.draw(st.integers(0, trials))
    expected = binomtest(right, trials).proportion_ci(level, method="exact")
    got = clopper_pearson(right, trials, level=level)
    assert got == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("trials", [20, 160, 600])
def test_a_leak_of_the_detectable_size_is_flagged_with_the_power_that_it_says(trials) -> None:
    smallest = detectable(trials)
    flagged = [right for right in range(trials + 1) if clopper_pearson(right, trials)[0] > 0.5]
    assert binom.sf(flagged[0] - 1, trials, smallest) == pytest.approx(0.8)
    assert detectable(2 * trials) < smallest


def test_five_trials_can_flag_nothing() -> None:
    assert detectable(5) == 1.0


def test_patients_count_at_most_once_in_each_role() -> None:
    assert effective_trials(0.5, 0.01, patients=40) == 25
    assert effective_trials(0.5, 1e-6, patients=40) == 80
    assert effective_trials(1.0, 0.0, patients=40) == 80


def test_one_percent_of_false_alarms_is_judged_in_large_cohorts_only(
    make_cohort, memorised
) -> None:
    assert memorised.tpr_at_1_percent is None
    assert f"fewer than {ENOUGH} patients" in memorised.sentence()
    cohort = make_cohort(patients=ENOUGH, dim=24, effect=0.0)
    plan = plan_of(cohort)
    experts = trained(cohort, plan, replace(MEMORISED, epochs=8))
    rate = audit(experts, cohort, plan).tpr_at_1_percent
    assert rate is not None
    assert 0.01 < rate.low < rate.value < rate.high


def test_the_true_positive_rate_is_at_one_percent_of_the_non_members() -> None:
    rng = np.random.default_rng(0)
    plan = Plan.cross_fitted(rng.permutation(ENOUGH) % 3)
    score = rng.permutation(ENOUGH).astype(float)
    found, event = score < 30, np.zeros(ENOUGH, dtype=np.bool_)

    def rate(of_the_found: float) -> float:
        scores = []
        for at in comparisons(plan):
            as_member = np.where(found, of_the_found, -1.0)
            scores.append((at, np.where(plan.folds == at.members, as_member, score)))
        result = true_positive_rate(scores, plan, event)
        assert result is not None
        return result.value

    assert rate(1000.0) == 30 / ENOUGH
    assert rate(250.0) == 0.0  # some fifty non-members score as high


def test_log_likelihoods_stay_where_the_logit_is_finite(noisy) -> None:
    experts = Abmil.initial(WIDE, seed=0, hazard=1e-12, models=2)
    found = log_likelihoods(experts, noisy)
    assert found.shape == (2, len(noisy))
    assert np.isfinite(np.log(-np.expm1(found))).all()


def test_the_sentence_says_that_a_pass_is_a_bound_and_not_a_promise(memorised) -> None:
    text = memorised.sentence()
    assert "not a promise" in text
    assert f"{memorised.auroc:.2f}" in text
    assert f"{memorised.detectable:.2f} could have stayed unseen" in text
