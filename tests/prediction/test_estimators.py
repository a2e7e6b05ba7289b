"""Experts and released models as scikit-survival's own functions take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sksurv.metrics import integrated_brier_score
from sksurv.util import Surv

from cropkt import SurvivalEstimator
from cropkt.experts.abmil import Abmil
from cropkt.experts.single import SlideExpert
from cropkt.survival.metrics import concordance


@pytest.fixture(params=["expert", "released"])
def told(request: pytest.FixtureRequest, make_case: Callable[..., Any]) -> Any:
    """Return a case and an estimator of it."""
    case = make_case()
    own = case.job.target.own
    one = Abmil.from_flat(own.shape, flat_of(own)).requires_grad_(False)
    model = SlideExpert(one) if request.param == "expert" else case.model()
    return case, SurvivalEstimator(model)


def flat_of(own: Abmil) -> torch.Tensor:
    """Return the weights of the model of all patients, (1, parameters)."""
    return torch.cat([weight[:1].reshape(1, -1) for weight in own.parameters()], dim=1).detach()


def test_scores_as_scikit_survival_does(told: Any) -> None:
    case, estimator = told
    cohort = case.cohort
    bags = [cohort.bag(i) for i in range(len(cohort))]
    y = Surv.from_arrays(cohort.event, cohort.days)
    ours = concordance(cohort.days, cohort.event, estimator.predict(bags)).c_index
    assert estimator.score(bags, y) == pytest.approx(ours, abs=1e-3)  # ties in time differ
    assert estimator.fit(bags, y) is estimator
    assert clone(estimator, safe=False) is not None


def test_survival_functions_are_those_of_the_model(told: Any) -> None:
    case, estimator = told
    cohort = case.cohort
    bags = [cohort.bag(i).numpy() for i in range(12)]
    array = estimator.predict_survival_function(bags, return_array=True)
    assert array.shape == (12, len(estimator.unique_times_))
    assert (np.diff(array, axis=1) <= 1e-12).all()
    functions = estimator.predict_survival_function(bags)
    hazards = estimator.predict_cumulative_hazard_function(bags)
    for row, survival, hazard in zip(array, functions, hazards, strict=True):
        assert survival(100) == 1.0
        assert survival(365) == row[0]
        assert survival(3 * 365 + 10) == row[2]
        assert hazard(3 * 365) == pytest.approx(-np.log(row[2]))
    y = Surv.from_arrays(cohort.event, cohort.days)
    times = np.array([400.0, 800.0, 1100.0])
    at = np.stack([function(times) for function in functions])
    assert 0 < integrated_brier_score(y, y[:12], at, times) < 0.5
