"""Every arm, with what it may learn from and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from cropkt.config import EVALUATED, Arm, StudyConfig
from cropkt.experts.abmil import flatten
from cropkt.survival.metrics import concordance, concordance_of
from cropkt.transfer import arms
from cropkt.transfer.arms import ARMS, Job, Kind, arms_of, predictions, router_arm
from cropkt.transfer.few_shot import draw_patients, few_shot
from cropkt.transfer.router_training import RouterStack

from .conftest import FOLDS, Scene

EVERY: tuple[Arm, ...] = tuple(ARMS)


def job_of(scene: Scene, *, everyone: bool = True) -> Job:
    stack = RouterStack(scene.target, scene.sources, scene.opinions, scene.study)
    stack.train()
    models = flatten(scene.target.own)[: scene.target.views].numpy()
    return Job(
        target=scene.target,
        study=replace(scene.study, fedavg_rounds=2),
        sources=scene.sources,
        opinions=scene.opinions,
        router=stack,
        everyone=models if everyone else None,
    )


@pytest.fixture(scope="module")
def job(scene) -> Job:
    return job_of(scene)


@pytest.mark.parametrize("arm", EVERY)
def test_an_arm_gives_every_patient_a_risk_and_a_falling_curve(job, arm) -> None:
    prediction, spent = predictions(job, [arm])[arm]
    n, bins = len(FOLDS), job.study.shape.bins
    assert prediction.risk.shape == (n,)
    assert np.isfinite(prediction.risk).all()
    assert prediction.survival.shape == (n, bins)
    assert ((prediction.survival >= 0) & (prediction.survival <= 1)).all()
    assert (np.diff(prediction.survival, axis=1) <= 1e-12).all()
    assert spent.seconds >= 0
    assert spent.gflop > 0
    # Within a fold the curve orders patients as the risk does.
    for fold in range(3):
        mine = fold == FOLDS
        later = np.argsort(prediction.risk[mine])
        years = prediction.survival[mine].sum(1)[later]
        assert (np.diff(years) <= 1e-6).all() or (np.diff(years) >= -1e-6).all()


def leaks(make: Callable[[], tuple[Scene, Scene]], arm: Arm) -> bool:
    """Return whether a fold's outcomes move what an arm says of its patients."""
    one, two = (predictions(job_of(scene, everyone=False), [arm])[arm][0].risk for scene in make())
    held_out = FOLDS == 1
    return bool(np.abs(one[held_out] - two[held_out]).max() > 1e-5)


@pytest.fixture
def both(make_scene, rewritten, study) -> Callable[[], tuple[Scene, Scene]]:
    def make() -> tuple[Scene, Scene]:
        one = make_scene(study)
        changed = rewritten(one.target.cohort, FOLDS == 1, outcomes=True)
        return one, make_scene(study, changed)

    return make


@pytest.mark.parametrize("arm", [a for a in EVALUATED if a != "permuted"])
def test_no_arm_learns_from_the_fold_it_is_judged_on(both, arm) -> None:
    assert not leaks(both, arm)


def test_a_planted_leak_is_caught(both, monkeypatch) -> None:
    """An arm that takes the source that is best on the very patients it is judged by."""

    def oracle(job: Job) -> arms.Prediction:
        pairs, risk = job.target.pairs, job.opinions[0].risk
        answers = np.empty((3, len(FOLDS)))
        for fold in range(3):
            judged = pairs.within(fold == FOLDS)
            scores = [concordance_of(judged, row).c_index or 0.5 for row in risk]
            answers[fold] = risk[int(np.argmax(scores))] * (1 + np.max(scores))
        return arms._of_answers(job, answers)

    monkeypatch.setitem(ARMS, "zero_shot", replace(ARMS["zero_shot"], predict=oracle))
    assert leaks(both, "zero_shot")


def test_shuffled_outcomes_tell_nothing_of_who_is_who(make_scene, make_cohort, study) -> None:
    """Where local ranks well, experts on dealt-out outcomes alone rank by chance."""
    scene = make_scene(
        replace(study, training=replace(study.training, minimum_updates=60)),
        make_cohort(effect=2.0, seed=3),
    )
    seen = []

    def listen(target, opinions, *, kept=None):
        seen.append(opinions[0].risk)
        return guard(target, opinions, kept=kept)

    guard, arms.guard = arms.guard, listen
    try:
        predictions(job_of(scene), ["permuted"])
    finally:
        arms.guard = guard
    cohort = scene.target.cohort
    scores = [concordance(cohort.days, cohort.event, row).c_index for row in seen[0]]
    local = concordance(cohort.days, cohort.event, scene.target.local_risk(), FOLDS).c_index
    assert local > 0.7
    assert np.mean(scores) < 0.65
    assert len({row.tobytes() for row in seen[0]}) == len(seen[0]) == 3


def test_the_study_s_router_counts_as_published_or_repaired(study, published) -> None:
    assert router_arm(study.router) == "roupkt+"
    assert router_arm(published.router) == "roupkt"
    assert arms_of(published) == ("local", "zero_shot", "roupkt")
    assert set(arms_of(study)) == set(EVALUATED)
    assert arms_of(replace(study, arms=())) == ("local", "roupkt+")


def test_without_a_model_of_all_cancers_its_arms_are_left_out(scene) -> None:
    found = predictions(job_of(scene, everyone=False), ["local", "fedavg", "fedavg_tuned"])
    assert set(found) == {"local"}


def test_what_an_arm_receives_and_sends(job) -> None:
    expert = flatten(job.sources).shape[1] * 4 / 1e6
    found = {arm: spent for arm, (_, spent) in predictions(job, EVERY).items()}
    assert found["auto"].received == pytest.approx(3 * expert)
    assert found["random_init"].received == 0
    assert found["fedavg"].received == pytest.approx(4 * expert)
    assert found["local"].sent == pytest.approx(expert)
    assert {arm for arm, spent in found.items() if spent.sent} == {"local", "fedavg"}
    ((_, routed),) = predictions(replace(job, shared=True), ["roupkt+"]).values()
    views, router = job.target.views, flatten(job.router.module).shape[1]
    assert routed.sent == pytest.approx(views * router * 4 / 1e6)


def test_every_arm_says_what_it_is(job) -> None:
    for kind in ARMS.values():
        assert isinstance(kind, Kind)
        assert kind.trains


def test_a_draw_keeps_events_in_proportion_and_folds_even() -> None:
    rng = np.random.default_rng(0)
    folds, event = np.arange(300) % 5, rng.random(300) < 0.2
    kept = draw_patients(folds, event, 100, rng)
    assert kept.sum() == 125
    assert event[kept].mean() == pytest.approx(event.mean(), abs=0.01)
    for fold in range(5):
        assert abs((kept & (folds != fold)).sum() - 100) <= 2
        assert event[kept & (folds != fold)].any()


def test_few_shots_are_judged_on_everybody_and_learn_from_few(scene, study) -> None:
    config: StudyConfig = replace(study, shots=(12, 500), draws=2)
    rows = list(few_shot(scene.target, scene.sources, config))
    assert [shots for shots, _ in rows] == [12]  # of 500 there are none
    found = rows[0][1]
    assert set(found) == {"local", "vote", "zero_shot", "stack", "auto"}
    assert all(len(values) == 2 for values in found.values())
    assert found["local"][0] != found["local"][1]  # two draws
    assert list(few_shot(scene.target, scene.sources, config)) == rows  # the same again


def test_nobody_left_out_of_a_draw_is_learnt_from(
    make_scene, make_cohort, rewritten, study
) -> None:
    one = make_scene(study)
    config = replace(study, shots=(12,), draws=1)
    kept = draw_patients(
        FOLDS,
        one.target.cohort.event,
        12,
        np.random.default_rng(arms.hash_seed(study.seed, 8, 12, 0)),
    )
    from cropkt.transfer.few_shot import _arms

    # Deaths stay deaths, so that the draw is the same: times alone are dealt out anew.
    cohort = one.target.cohort
    days = cohort.days.copy()
    days[~kept] = np.random.default_rng(1).permutation(days[~kept]) * 1.5
    two = make_scene(study, replace(cohort, days=days))
    mine = _arms(one.target, one.sources, config, kept)
    theirs = _arms(two.target, two.sources, config, kept)
    for arm, risk in mine.items():
        assert risk == pytest.approx(theirs[arm], abs=1e-5), arm
    assert torch.is_tensor(one.opinions[0].features)
