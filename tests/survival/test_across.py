"""Several cohorts together: random effects against known truths and a slow formulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import wilcoxon

from cropkt.survival.across import DETECTED, across, between_variance
from cropkt.survival.metrics import Pairs, over_controls


def test_equal_values_have_no_spread_and_the_error_of_all_together() -> None:
    found = across(np.full(4, 0.03), np.full(4, 0.02))
    assert found is not None
    assert found.mean == pytest.approx(0.03)
    assert found.between == 0
    assert found.se == pytest.approx(0.01)
    assert found.detectable == pytest.approx(DETECTED * 0.01)
    assert found.interval == pytest.approx((0.03 - 0.0196, 0.03 + 0.0196), abs=1e-4)


def test_the_spread_between_cohorts_is_found_and_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    spreads, covered = [], 0
    for _ in range(200):
        error = rng.uniform(0.01, 0.04, 25)
        value = 0.02 + 0.05 * rng.standard_normal(25) + error * rng.standard_normal(25)
        found = across(value, error)
        assert found is not None
        spreads.append(found.between)
        covered += found.interval[0] <= 0.02 <= found.interval[1]
    assert np.mean(spreads) == pytest.approx(0.05, abs=0.005)
    assert 0.9 <= covered / 200 <= 0.98


def test_what_is_not_known_takes_no_part() -> None:
    value, error = np.array([0.1, np.nan, -0.05, 0.2]), np.array([0.05, 0.1, 0.02, np.nan])
    found = across(value, error)
    assert found is not None
    assert found.cohorts == 2
    assert found.wilcoxon == pytest.approx(wilcoxon([0.1, -0.05]).pvalue)
    assert across(np.array([np.nan]), np.array([0.1])) is None
    assert across(np.zeros(0), np.zeros(0)) is None
    nothing = across(np.zeros(3), np.ones(3))
    assert nothing is not None
    assert nothing.wilcoxon is None


def test_one_cohort_has_no_spread() -> None:
    assert between_variance(np.array([0.3]), np.array([0.01])) == 0


def test_a_risk_like_the_controls_seldom_leads_them() -> None:
    """Of risks that are one more draw of the controls, about 5 % are beyond 1.96 errors."""
    rng = np.random.default_rng(1)
    beyond = 0
    for _ in range(150):
        days, event = rng.exponential(size=50), rng.random(50) < 0.5
        shared = rng.standard_normal((4, 50))  # controls are alike, as untrained experts are
        draws = rng.standard_normal((9, 4)) @ shared
        lead, error = over_controls(Pairs.of(days, event), draws[:1], draws[1:])
        beyond += abs(lead[0]) > 1.96 * error[0]
    assert beyond / 150 <= 0.08


def test_a_risk_that_knows_leads_the_controls() -> None:
    rng = np.random.default_rng(2)
    days, event = rng.exponential(size=200), np.ones(200, dtype=bool)
    lead, error = over_controls(Pairs.of(days, event), -days[None], rng.normal(size=(8, 200)))
    assert lead[0] == pytest.approx(0.5, abs=0.05)
    assert lead[0] > 4 * error[0]
    nothing, _ = over_controls(Pairs.of(days, ~event), -days[None], rng.normal(size=(8, 200)))
    assert np.isnan(nothing).all()
