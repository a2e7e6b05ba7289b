from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cropkt.config import OptimiserConfig, TrainingConfig
from cropkt.errors import TrainingFailedError
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.bank import consult
from cropkt.experts.training import (
    Plan,
    batches,
    cosine_with_warmup,
    hash_seed,
    masked_mean,
    moments,
    train_experts,
    updates_per_epoch,
)
from cropkt.survival.metrics import concordance

FOLDS = np.arange(36) % 3
QUICK = TrainingConfig(epochs=3, batch=8, learning_rate=3e-3)


def train(cohort, plan, shape, config=QUICK, *, seed=0, **kwargs) -> Abmil:
    initial = Abmil.initial(shape, seed=7, hazard=0.06, models=len(plan.excluded))
    return train_experts(cohort, plan, initial=initial, config=config, seed=seed, **kwargs)


@pytest.mark.parametrize(
    "config",
    [
        QUICK,
        replace(QUICK, dropout=0.0, drop_last=True, loss="clamped", alpha=0.0),
        replace(QUICK, standardise="site", minimum_updates=20),
    ],
)
def test_each_model_equals_the_model_trained_alone(make_cohort, shape, config) -> None:
    cohort, plan = make_cohort(), Plan.cross_fitted(FOLDS)
    together = train(cohort, plan, shape, config)
    assert len(torch.unique(flatten(together), dim=0)) == len(plan.excluded)  # all learnt
    risks = consult(together, cohort).risk
    for f, excluded in enumerate(plan.excluded):
        alone = train(cohort, Plan(FOLDS, (excluded,)), shape, config)
        for (name, one), two in zip(together.named_parameters(), alone.parameters(), strict=True):
            if name != "score_bias":  # it cancels in the softmax: its gradient is rounding noise
                assert torch.allclose(one[f], two[0], atol=1e-6), (excluded, name)
        assert risks[f] == pytest.approx(consult(alone, cohort).risk[0], abs=1e-5)


@pytest.mark.parametrize("standardise", ["none", "site"])
def test_a_model_knows_nothing_of_the_folds_it_leaves_out(
    make_cohort, rewritten, shape, standardise
) -> None:
    cohort, plan = make_cohort(), Plan.cross_fitted(FOLDS)
    config = replace(QUICK, standardise=standardise)
    changed = rewritten(cohort, FOLDS == 1, outcomes=True, patches=True)
    one, two = (flatten(train(c, plan, shape, config)) for c in (cohort, changed))
    for f, excluded in enumerate(plan.excluded):
        if 1 in excluded:
            assert torch.equal(one[f], two[f]), excluded
        else:
            assert not torch.allclose(one[f], two[f], atol=1e-4), excluded


def test_the_same_seed_gives_the_same_experts(make_cohort, shape) -> None:
    cohort, plan = make_cohort(), Plan(FOLDS, ((), (0,)))
    assert torch.equal(*(flatten(train(cohort, plan, shape)) for _ in range(2)))
    other = flatten(train(cohort, plan, shape, seed=1))
    assert not torch.allclose(other, flatten(train(cohort, plan, shape)))


def test_trained_experts_are_frozen_and_epochs_reported(make_cohort, shape) -> None:
    seen = []
    experts = train(make_cohort(), Plan(FOLDS, ((),)), shape, on_epoch=seen.append)
    assert [(epoch.number, epoch.of) for epoch in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0].loss > seen[2].loss > 0
    assert not any(parameter.requires_grad for parameter in experts.parameters())
    seen.clear()  # 36 patients in eights: 4 updates an epoch
    longer = replace(QUICK, minimum_updates=17)
    train(make_cohort(), Plan(FOLDS, ((),)), shape, longer, on_epoch=seen.append)
    assert (seen[-1].number, seen[-1].of) == (5, 5)


def test_training_ranks_patients_it_never_saw(make_cohort, shape) -> None:
    cohort = make_cohort(patients=90, effect=2.0)
    folds = np.arange(90) % 3
    config = TrainingConfig(epochs=12, batch=8, learning_rate=1e-2)
    opinions = consult(train(cohort, Plan(folds, ((0,), (1,), (2,))), shape, config), cohort)
    held_out = opinions.risk[folds, np.arange(90)]
    assert concordance(cohort.days, cohort.event, held_out, folds).c_index > 0.8


def test_divergence_is_an_error_that_ray_can_carry(make_cohort, rewritten, shape) -> None:
    cohort = make_cohort()
    cohort.source.slides["s000-0"][0, 0] = torch.nan
    with pytest.raises(TrainingFailedError, match=r"after epoch 1.*learning_rate") as caught:
        train(cohort, Plan(FOLDS, ((),)), shape)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_plan_of_nested_cross_fitting() -> None:
    plan = Plan.cross_fitted(np.array([0, 1, 2, 0]))
    assert plan.excluded == ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2))
    learns = plan.learns()
    for f, excluded in enumerate(plan.excluded):
        assert learns[f].tolist() == [fold not in excluded for fold in plan.folds]
    assert plan.model() == 0
    assert plan.model(2, 0) == plan.model(0, 2) == 5
    assert plan.model(1, 1) == plan.model(1) == 2


def test_the_fewest_that_a_model_learns_from() -> None:
    plan = Plan.cross_fitted(np.array([0, 1, 2, 0]))
    died = np.array([True, False, True, True])
    assert plan.fewest(died, without=0) == (4, 3)
    assert plan.fewest(died) == (2, 1)  # without fold 0
    assert plan.fewest(died, without=2) == (1, 0)


@given(patients=st.integers(1, 100), batch=st.integers(1, 20), drop_last=st.booleans())
def test_an_epoch_is_every_patient_once(patients, batch, drop_last) -> None:
    config = OptimiserConfig(batch=batch, drop_last=drop_last)
    groups = list(batches(patients, config, np.random.default_rng(0)))
    everybody = np.concatenate(groups)
    assert len(groups) == updates_per_epoch(patients, config)
    assert len(set(everybody)) == len(everybody)
    if drop_last and patients >= batch:
        assert {len(group) for group in groups} == {batch}
        assert len(everybody) == patients - patients % batch
    else:
        assert sorted(everybody) == list(range(patients))
        assert max(map(len, groups)) <= max(1.5 * batch, batch + 1)
        assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_epochs_differ_in_their_order() -> None:
    rng = np.random.default_rng(0)
    one, two = (np.concatenate(list(batches(50, OptimiserConfig(), rng))) for _ in range(2))
    assert one.tolist() != two.tolist()


def test_learning_rate_rises_then_falls_to_nothing() -> None:
    factors = [cosine_with_warmup(at, total=20, warmup=5) for at in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1
    assert all(one > two for one, two in pairwise(factors[5:]))
    assert factors[12] == pytest.approx(0.5 * (1 + np.cos(np.pi * 7 / 15)))
    assert cosine_with_warmup(20, total=20, warmup=5) == pytest.approx(0)
    assert cosine_with_warmup(0, total=3, warmup=0) == 1
    assert cosine_with_warmup(3, total=3, warmup=3) == 1  # warm-up alone does not divide by 0


def test_masked_mean_is_each_model_s_own_mean() -> None:
    losses, mask = torch.tensor([[1.0, 3, 5], [2, 4, 6]]), torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert masked_mean(losses, mask.bool()).item() == 2 + 6
    assert masked_mean(losses, torch.zeros(2, 3).bool()).item() == 0


def test_seeds_of_parts() -> None:
    seeds = [hash_seed(0), hash_seed(0, 0), hash_seed(0, 1), hash_seed(0, 0, 1), hash_seed(1, 0)]
    assert len(set(seeds)) == 5
    assert hash_seed(3, 1, 2) == hash_seed(3, 1, 2)


def test_moments_are_those_of_the_patches_a_model_may_see(make_cohort) -> None:
    cohort, plan = make_cohort(), Plan.cross_fitted(FOLDS)
    mean, deviation = moments(cohort, plan)
    for f, learns in enumerate(plan.learns()):
        patches = torch.cat([cohort.bag(i) for i in np.flatnonzero(learns)]).double()
        assert torch.allclose(mean[f].double(), patches.mean(0), atol=1e-6)
        assert torch.allclose(deviation[f].double(), patches.std(0, correction=0), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-3, 7.3, 3e4])
def test_a_constant_feature_stays_harmless(make_cohort, shape, value) -> None:
    cohort = make_cohort()
    for slide in cohort.source.slides.values():
        slide[:, 2] = value
    mean, deviation = moments(cohort, Plan(FOLDS, ((), (1,))))
    assert deviation[:, 2].tolist() == [1, 1]
    assert mean[:, 2].tolist() == pytest.approx([value] * 2)
    experts = train(cohort, Plan(FOLDS, ((),)), shape, replace(QUICK, standardise="site"))
    assert torch.isfinite(flatten(experts)).all()


@pytest.mark.parametrize("standardise", ["none", "site"])
def test_a_model_that_may_learn_from_nobody_does_not_break_the_others(
    make_cohort, shape, standardise
) -> None:
    plan = Plan.cross_fitted(np.arange(36) % 2)  # of two folds, one model leaves out both
    experts = train(make_cohort(), plan, shape, replace(QUICK, standardise=standardise))
    assert torch.isfinite(flatten(experts)).all()
