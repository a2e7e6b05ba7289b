from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

from cropkt.survival.partial import partial_likelihood


def sample(n: int = 60, p: int = 3, *, seed: int = 0, ties: bool = True):
    rng = np.random.default_rng(seed)
    covariates = rng.normal(size=(n, p))
    days = rng.exponential(np.exp(-covariates[:, 0])) * 30
    days = np.ceil(days) if ties else days
    return covariates, days, rng.random(n) < 0.6, rng.integers(0, 3, n)


def test_derivatives_are_those_of_the_value() -> None:
    covariates, days, event, strata = sample()
    at = np.array([0.3, -0.2, 0.5])

    def value(b):
        return partial_likelihood(b, covariates, days, event, strata).value

    curve = partial_likelihood(at, covariates, days, event, strata)
    assert curve.score == pytest.approx(approx_fprime(at, value, 1e-7), abs=1e-4)
    for i in range(3):
        slope = approx_fprime(
            at,
            lambda b, i=i: partial_likelihood(b, covariates, days, event, strata).score[i],
            1e-6,
        )
        assert -slope == pytest.approx(curve.information[i], abs=1e-3)


def test_one_stratum_has_the_maximum_of_scikit_survival() -> None:
    covariates, days, event, _ = sample(80, ties=True)
    strata = np.zeros(80, dtype=np.int64)
    ours = minimize(
        lambda b: -partial_likelihood(b, covariates, days, event, strata).value, np.zeros(3)
    ).x
    theirs = CoxPHSurvivalAnalysis(ties="breslow").fit(covariates, Surv.from_arrays(event, days))
    assert ours == pytest.approx(theirs.coef_, abs=1e-3)


def test_strata_are_compared_within_alone() -> None:
    covariates, days, event, strata = sample()
    at = np.array([0.3, -0.2, 0.5])
    whole = partial_likelihood(at, covariates, days, event, strata).value
    parts = sum(
        partial_likelihood(
            at, covariates[strata == s], days[strata == s], event[strata == s], strata[strata == s]
        ).value
        for s in range(3)
    )
    assert whole == pytest.approx(parts)
    shifted = covariates + strata[:, None] * 100.0
    moved = partial_likelihood(at, shifted, days, event, strata).value
    assert moved == pytest.approx(whole)


def test_no_death_says_nothing() -> None:
    covariates, days, event, strata = sample()
    curve = partial_likelihood(np.ones(3), covariates, days, event & False, strata)
    assert curve.value == 0
    assert not curve.score.any()
