"""The released model against the guard, the router and the own expert that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cropkt.errors import BagShapeError
from cropkt.experts.abmil import Abmil
from cropkt.prediction import model as module
from cropkt.prediction.answer import agreement
from cropkt.transfer.scores import standardised

VARIANTS = ["plain", "standardised", "published"]
every = pytest.mark.parametrize("variant", VARIANTS)


def bags(case: Any) -> list[torch.Tensor]:
    return [case.cohort.bag(i) for i in range(len(case.cohort))]


@every
def test_training_patients_get_the_guards_final_answer(
    make_case: Callable[..., Any], variant: str
) -> None:
    case = make_case(variant)
    target, final = case.job.target, case.job.guarded.final
    risks = np.concatenate([target.local_risk()[None], case.job.opinions[0].risk])
    by_guard = final.weights @ standardised(risks, np.ones(len(case.cohort), dtype=bool))
    answers = case.model().predict(bags(case), folds=target.folds.tolist())
    assert [answer.risk for answer in answers] == pytest.approx(by_guard, abs=1e-5)
    assert np.ptp(by_guard) > 0.5


@every
def test_training_patients_get_the_routers_and_the_own_experts_answer(
    make_case: Callable[..., Any], variant: str
) -> None:
    case = make_case(variant)
    folds = case.job.target.folds.tolist()
    routed, weights = case.job.routed
    answers = case.model().predict(bags(case), model="router", folds=folds)
    assert [answer.risk for answer in answers] == pytest.approx(routed.risk, abs=1e-5)
    assert np.stack([a.survival for a in answers]) == pytest.approx(routed.survival, abs=1e-5)
    for answer, row in zip(answers, weights, strict=True):
        assert [v.weight for v in answer.voices] == pytest.approx(-np.sort(-row)[:2], abs=1e-5)
    local = case.model().predict(bags(case), model="local", folds=folds)
    assert [a.risk for a in local] == pytest.approx(case.job.target.local_risk(), abs=1e-5)


def test_new_patients_are_answered_by_the_models_of_all_patients(
    make_case: Callable[..., Any],
) -> None:
    case = make_case()
    target, guarded = case.job.target, case.job.guarded
    whole = np.concatenate([target.opinions.risk[:1], case.job.opinions[0].risk])
    centre, deviation = guarded.units[:, :, None]
    want = guarded.final.weights @ ((whole - centre) / deviation)
    answers = case.model().predict(bags(case))
    assert [answer.risk for answer in answers] == pytest.approx(want, abs=1e-5)
    assert all(answer.versions == 3 for answer in answers)
    for answer in answers:
        inside = slice(0, answer.horizon)
        assert (answer.low <= answer.survival + 1e-12)[inside].all()
        assert (answer.survival <= answer.high_end + 1e-12)[inside].all()
        assert (np.diff(answer.survival) <= 1e-12).all()
        assert sum(voice.weight for voice in answer.voices) == pytest.approx(1)
        assert answer.attention.sum() == pytest.approx(1)


def test_risk_groups_halve_the_training_cohort(make_case: Callable[..., Any]) -> None:
    case = make_case()
    answers = case.model().predict(bags(case), folds=case.job.target.folds.tolist())
    assert sum(answer.high for answer in answers) == len(answers) / 2
    order = np.argsort([answer.risk for answer in answers])
    percentiles = np.array([answer.percentile for answer in answers])[order]
    assert (np.diff(percentiles) >= 0).all()
    assert (percentiles[0], percentiles[-1]) == pytest.approx((0, 100))


def test_only_experts_that_speak_are_asked(
    make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, asked = make_case(), []
    model, one = case.model(), case.cohort.bag(0)
    expert = type(model)._expert

    def watched(self: Any, name: str, view: int) -> Abmil:
        asked.append(name)
        return expert(self, name, view)

    monkeypatch.setattr(module.ReleasedModel, "_expert", watched)
    (answer,) = model.predict([one], model="router", folds=[0])
    assert len(answer.voices) == 2  # of four
    assert len(asked) == 2
    asked.clear()
    model.predict([one], model="local", folds=[0])
    assert asked == ["own/1"]


def test_a_year_to_which_nobody_was_followed_has_no_probability(
    make_case: Callable[..., Any],
) -> None:
    (answer,) = make_case().model().predict([make_case().cohort.bag(0)])
    far = type(answer)._at(answer, answer.horizon + 1)
    assert far.value is None
    near = answer.probabilities()[0]
    assert near.value is not None
    assert near.low is not None
    assert near.high is not None
    assert near.low <= near.value <= near.high


def test_a_bag_of_another_width_is_refused(make_case: Callable[..., Any]) -> None:
    model = make_case().model()
    for bag in (torch.zeros(3, 7), torch.zeros(0, 6), torch.zeros(6)):
        with pytest.raises(BagShapeError, match=r"expected \(patches, 6\)"):
            model.predict([bag])


def test_agreement_is_the_mean_rank_correlation() -> None:
    up = np.array([0.1, 0.2, 0.7])
    assert agreement([up, up**2]) == pytest.approx(1)
    assert agreement([up, up[::-1]]) == pytest.approx(-1)
    assert agreement([up, up, up[::-1]]) == pytest.approx(-1 / 3)
    assert agreement([up]) is None
    assert agreement([up[:2], up[:2]]) is None
    assert agreement([up, np.full(3, 1 / 3)]) is None
