from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cropkt.cohort.bags import PackedBags
from cropkt.experts.abmil import flatten
from cropkt.survival.likelihood import risk
from cropkt.survival.metrics import concordance
from cropkt.transfer.router_training import RouterStack

FOLDS = np.arange(36) % 3


def stack_of(scene) -> RouterStack:
    return RouterStack(scene.target, scene.sources, scene.opinions, scene.study)


def trained(scene) -> RouterStack:
    stack = stack_of(scene)
    stack.train()
    return stack


def test_before_training_a_router_is_the_vote_of_the_experts(scene) -> None:
    stack, target = stack_of(scene), scene.target
    survival, weights = stack.predict()
    got = -survival.sum(1)
    prior = target.prior(scene.opinions, scene.study.router)
    for i in range(36):
        bag = PackedBags.of([target.cohort.bag(i)])
        view = 1 + FOLDS[i]
        own = target.own.outputs(bag).logits[target.plan.model(FOLDS[i])]
        votes = torch.stack([own[0], *scene.sources.outputs(bag).logits[:, 0]])
        gates = prior[view].softmax(0)
        keep = gates.argsort(descending=True, stable=True)[:2]
        share = torch.zeros(4)
        share[keep] = gates[keep] / gates[keep].sum()
        assert got[i] == pytest.approx(risk(share @ votes).item(), abs=1e-4)
        assert weights[i] == pytest.approx(share.numpy(), abs=1e-6)


def test_training_changes_every_router_and_helps_on_its_own_patients(scene) -> None:
    stack = stack_of(scene)
    before = flatten(stack.module)
    seen = []
    stack.train(on_epoch=seen.append)
    after = flatten(stack.module)
    assert (seen[-1].number, seen[-1].of) == (3, 3)
    assert torch.isfinite(after).all()
    assert ((after - before).abs().amax(1) > 1e-3).all()
    assert len(torch.unique(after, dim=0)) == 4
    again = trained(scene)
    assert torch.equal(flatten(again.module), after)


def test_a_patient_is_judged_by_the_router_that_held_them_out(scene) -> None:
    stack = trained(scene)
    survival, weights = stack.predict()
    got = -survival.sum(1)
    assert got.shape == (36,)
    assert weights.shape == (36, 4)
    assert weights.sum(1) == pytest.approx(np.ones(36), abs=1e-6)
    assert ((weights > 0).sum(1) == 2).all()
    for i in range(36):
        out = stack.module.outputs(
            PackedBags.of([scene.target.cohort.bag(i)]),
            stack.features[:, :, [i]],
            scene.study.router,
        )
        view = 1 + FOLDS[i]
        assert got[i] == pytest.approx(risk(out.logits)[view, 0].item(), abs=1e-5)
        assert weights[i] == pytest.approx(out.weights[view, 0].detach().numpy(), abs=1e-6)


def test_loading_restores_the_routers(scene) -> None:
    stack = trained(scene)
    fresh = stack_of(scene)
    fresh.load(flatten(stack.module).numpy())
    for one, two in zip(fresh.predict(), stack.predict(), strict=True):
        assert np.array_equal(one, two)


@pytest.mark.parametrize("balance", ["batch", "patient"])
@pytest.mark.parametrize("standardise", ["none", "site"])
def test_nothing_of_a_fold_enters_the_router_that_holds_it_out(
    make_scene, rewritten, study, balance, standardise
) -> None:
    """The whole way, own experts included: only its patches decide a held-out patient's risk."""
    study = replace(
        study,
        router=replace(study.router, balance=balance, balance_weight=1.0),
        training=replace(study.training, standardise=standardise),
    )
    one = make_scene(study)
    held_out = FOLDS == 1
    two = make_scene(study, rewritten(one.target.cohort, held_out, outcomes=True, patches=True))
    mine, theirs = trained(one), trained(two)
    a, b = flatten(mine.module), flatten(theirs.module)
    assert torch.allclose(a[2], b[2], atol=1e-6)
    assert not torch.allclose(a[1], b[1], atol=1e-4)

    outcomes = make_scene(study, rewritten(one.target.cohort, held_out, outcomes=True))
    got, weights = trained(outcomes).predict()
    expected, expected_weights = mine.predict()
    assert got[held_out] == pytest.approx(expected[held_out], abs=1e-6)
    assert weights[held_out] == pytest.approx(expected_weights[held_out], abs=1e-6)


def test_the_published_preset_goes_through(make_scene, published) -> None:
    scene = make_scene(published)
    stack = trained(scene)
    assert stack.module.head.shape[1] == 1
    assert not stack.module.prior.any()
    got, weights = stack.predict()
    assert np.isfinite(got).all()
    assert ((weights > 0).sum(1) == 2).all()
    assert (weights.sum(1) < 1).all()  # not renormalised
    for view in range(4):  # in sample: the view's one model speaks for all patients
        model = scene.target.plan.model(*(() if view == 0 else (view - 1,)))
        assert torch.equal(stack.features[view, 0], scene.target.opinions.features[model])


def test_a_router_ranks_patients_it_never_saw(make_scene, make_cohort, study) -> None:
    cohort = make_cohort(effect=2.0, seed=3)
    study = replace(study, training=replace(study.training, minimum_updates=60))
    scene = make_scene(study, cohort)
    survival, _ = trained(scene).predict()
    assert concordance(cohort.days, cohort.event, -survival.sum(1), FOLDS).c_index > 0.7
