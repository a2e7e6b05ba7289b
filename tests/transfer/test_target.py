from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cropkt.cohort.bags import PackedBags
from cropkt.experts.abmil import Abmil, flatten
from cropkt.survival.metrics import concordance, leads
from cropkt.transfer.scores import shrunken
from cropkt.transfer.target import Target

FOLDS = np.arange(36) % 3


def rebuilt(target: Target, cohort) -> Target:
    """The same experts, other patients."""
    return Target.of(cohort, target.plan, target.own)


@pytest.mark.parametrize("view", [0, 1, 2, 3])
def test_no_patient_is_judged_by_a_model_that_saw_them_or_the_view_s_fold(scene, view) -> None:
    target = scene.target
    assert target.views == 4
    for patient, model in enumerate(target.own_model(view)):
        left_out = target.plan.excluded[model]
        expected = {int(FOLDS[patient])} | ({view - 1} if view else set())
        assert set(left_out) == expected  # these folds, and no more


@pytest.mark.parametrize("view", [0, 1, 2, 3])
def test_in_sample_is_the_model_of_the_view(scene, view) -> None:
    models = set(scene.target.own_model(view, in_sample=True).tolist())
    (model,) = models
    assert scene.target.plan.excluded[model] == (() if view == 0 else (view - 1,))


def test_local_risk_and_score(scene) -> None:
    target, cohort = scene.target, scene.target.cohort
    for view in range(4):
        risk = target.local_risk(view)
        for i in range(len(cohort)):
            assert risk[i] == target.opinions.risk[target.own_model(view)[i], i]
        keep = view - 1 != FOLDS
        brute = concordance(cohort.days[keep], cohort.event[keep], risk[keep], FOLDS[keep])
        assert target.local_score(view).c_index == pytest.approx(brute.c_index)
        assert target.local_score(view).pairs == brute.pairs


def test_sources_are_scored_without_the_view_s_fold(scene) -> None:
    cohort, opinions = scene.target.cohort, scene.opinions
    rows = scene.target.source_scores(opinions)
    apart = [replace(opinion, risk=opinion.risk.copy()) for opinion in opinions]
    separately = scene.target.source_scores(apart)  # the way of standardised features
    assert len(rows) == len(separately) == 4
    for view in range(4):
        keep = view - 1 != FOLDS
        for source in range(3):
            risk = opinions[view].risk[source]
            brute = concordance(cohort.days[keep], cohort.event[keep], risk[keep])
            for row in (rows, separately):
                assert row[view][source].c_index == pytest.approx(brute.c_index)
                assert row[view][source].se == pytest.approx(brute.se)


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_no_outcome_of_the_judged_fold_enters_its_scores_or_prior(scene, rewritten, fold) -> None:
    target, router = scene.target, scene.study.router
    leak = rebuilt(target, rewritten(target.cohort, fold == FOLDS, outcomes=True))
    assert leak.local_score(1 + fold) == target.local_score(1 + fold)
    for one, two in zip(
        leak.source_scores(scene.opinions)[1 + fold],
        target.source_scores(scene.opinions)[1 + fold],
        strict=True,
    ):
        assert one == two
    before, after = target.prior(scene.opinions, router), leak.prior(scene.opinions, router)
    assert torch.equal(before[1 + fold], after[1 + fold])
    for other in {0, 1, 2, 3} - {1 + fold}:
        assert not torch.equal(before[other], after[other])


def test_prior_is_the_shrunken_transfer(scene) -> None:
    target, router = scene.target, scene.study.router
    prior = target.prior(scene.opinions, router)
    assert prior.shape == (4, 4)
    for view in range(4):
        seen = target.pairs.inside(target.folds).within(target.folds != view - 1)
        risks = np.stack([target.local_risk(view), *scene.opinions[view].risk])
        value = shrunken(*leads(seen, risks))
        expected = router.prior_strength * (value - value.max())
        assert prior[view].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        assert prior[view].max() == 0
    flat = target.prior(scene.opinions, replace(router, prior_strength=0.0))
    assert torch.equal(flat, torch.zeros(4, 4))


@pytest.mark.parametrize("self_features", ["out_of_fold", "in_sample"])
def test_router_features_are_the_own_then_the_sources(scene, self_features) -> None:
    target = scene.target
    config = replace(scene.study.router, self_features=self_features)
    features = target.router_features(scene.opinions, config)
    assert features.shape == (4, 4, 36, 8)
    for view in range(4):
        models = target.own_model(view, in_sample=self_features == "in_sample")
        for i in range(36):
            assert torch.equal(features[view, 0, i], target.opinions.features[models[i], i])
        assert torch.equal(features[view, 1:], scene.opinions[view].features)


def test_sources_read_patches_in_the_target_s_units(scene, make_scene, sources) -> None:
    assert all(opinion is scene.opinions[0] for opinion in scene.opinions)
    study = replace(scene.study, training=replace(scene.study.training, standardise="site"))
    apart = make_scene(study)
    cohort = apart.target.cohort
    for view, opinion in enumerate(apart.opinions):
        seen = torch.cat([cohort.bag(i) for i in np.flatnonzero(view - 1 != FOLDS)])
        for i in (0, 7):
            scaled = (cohort.bag(i) - seen.mean(0)) / seen.std(0, correction=0)
            plain = Abmil.from_flat(sources.shape, flatten(sources))
            out = plain.outputs(PackedBags.of([scaled]))
            assert torch.allclose(opinion.features[:, i], out.features[:, 0], atol=1e-4)
    assert sources.plain  # whoever asks the same experts next is not told in these units
    assert torch.equal(sources.shift, torch.zeros_like(sources.shift))


def test_no_patch_of_the_judged_fold_enters_the_units(make_scene, scene, rewritten) -> None:
    study = replace(scene.study, training=replace(scene.study.training, standardise="site"))
    one = make_scene(study)
    two = make_scene(study, rewritten(one.target.cohort, FOLDS == 1, patches=True))
    others = FOLDS != 1
    assert np.array_equal(one.opinions[2].risk[:, others], two.opinions[2].risk[:, others])
    assert not np.array_equal(one.opinions[1].risk[:, others], two.opinions[1].risk[:, others])
