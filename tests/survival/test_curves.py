"""Curves made from risks: calibration, risk groups, log-rank, Kaplan-Meier."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cropkt.survival.accuracy import d_calibration
from cropkt.survival.calibration import calibrated
from cropkt.survival.strata import high_risk, kaplan_meier, log_rank


def sample(
    n: int, *, effect: float, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64], NDArray[np.float64]]:
    """Return days, event, folds and a risk whose log hazard ratio is `effect`."""
    rng = np.random.default_rng(seed)
    risk = rng.standard_normal(n)
    death = rng.exponential(1500 / np.exp(effect * risk))
    last = rng.uniform(300, 6000, n)
    return np.minimum(death, last), death <= last, np.arange(n) % 5, risk


def test_a_calibrated_risk_gives_calibrated_curves() -> None:
    days, event, folds, risk = sample(1500, effect=1.0)
    survival = calibrated(days, event, folds, np.tile(risk, (5, 1)), bins=16)
    assert survival.shape == (1500, 16)
    assert ((survival >= 0) & (survival <= 1)).all()
    assert (np.diff(survival, axis=1) <= 1e-12).all()
    p = d_calibration(days, event, survival)
    assert p is not None
    assert p > 0.01
    # The scale of a risk does not matter, its direction does.
    again = calibrated(days, event, folds, np.tile(7 * risk - 3, (5, 1)), bins=16)
    assert again == pytest.approx(survival, abs=1e-6)
    truth = np.exp(-365 * 3 / 1500 * np.exp(risk))
    assert np.abs(survival[:, 2] - truth).mean() < 0.05


def test_a_constant_risk_gives_everybody_the_baseline() -> None:
    days, event, folds, _ = sample(200, effect=0.0)
    survival = calibrated(days, event, folds, np.zeros((5, 200)), bins=16)
    assert np.ptp(survival[folds == 0, 2]) < 1e-9
    assert 0.2 < survival[0, 2] < 0.8


def test_the_curves_of_a_fold_know_nothing_of_its_outcomes() -> None:
    days, event, folds, risk = sample(100, effect=1.0)
    before = calibrated(days, event, folds, np.tile(risk, (5, 1)), bins=16)
    mine = folds == 2
    days[mine], event[mine] = days[mine][::-1] / 3, ~event[mine]
    after = calibrated(days, event, folds, np.tile(risk, (5, 1)), bins=16)
    assert np.array_equal(before[mine], after[mine])
    assert not np.array_equal(before[~mine], after[~mine])


def test_only_kept_patients_are_learnt_from_and_none_is_enough() -> None:
    days, event, folds, risk = sample(100, effect=1.0)
    kept = np.arange(100) < 60
    before = calibrated(days, event, folds, np.tile(risk, (5, 1)), bins=16, kept=kept)
    days[~kept] /= 2
    after = calibrated(days, event, folds, np.tile(risk, (5, 1)), bins=16, kept=kept)
    assert np.array_equal(before, after)
    nobody = calibrated(days, np.zeros(100, bool), folds, np.tile(risk, (5, 1)), bins=16)
    assert (nobody == 1).all()


def test_halves_are_of_each_fold_and_differ_where_the_risk_knows() -> None:
    days, event, folds, risk = sample(400, effect=1.0)
    shifted = risk + 10 * folds  # folds share no scale
    high = high_risk(shifted, folds)
    assert [high[folds == fold].sum() for fold in range(5)] == [40] * 5
    assert high_risk(np.arange(10.0)).sum() == 5
    p = log_rank(days, event, high)
    assert p is not None
    assert p < 1e-6
    chance = log_rank(days, event, np.random.default_rng(0).random(400) < 0.5)
    assert chance is not None
    assert chance > 0.001


def test_what_cannot_be_told_is_none() -> None:
    days, event, _, _ = sample(40, effect=0.0)
    assert log_rank(days, event, np.zeros(40, bool)) is None
    assert log_rank(days, np.zeros(40, bool), np.arange(40) < 20) is None


def test_kaplan_meier_by_hand() -> None:
    times, survival = kaplan_meier(
        np.array([1.0, 2.0, 2.0, 3.0]), np.array([True, True, False, True])
    )
    assert times.tolist() == [0, 1, 2, 3]
    assert survival == pytest.approx([1, 3 / 4, 1 / 2, 0])
