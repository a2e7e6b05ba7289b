from __future__ import annotations

import numpy as np
import pytest

from cropkt.survival.accuracy import accuracy, d_calibration, survival_at

T = 32


def sample(n: int = 600, *, seed: int = 0):
    """Return days, event and the true survival curves (n, T) of exponential deaths."""
    rng = np.random.default_rng(seed)
    rate = 0.12 * np.exp(rng.normal(size=n))  # a year
    death, end = rng.exponential(1 / rate), rng.uniform(0.5, 15, n)
    curves = np.exp(-rate[:, None] * np.arange(1, T + 1))
    return 365 * np.minimum(death, end), death <= end, curves


def test_survival_between_the_bins_is_that_of_an_even_hazard() -> None:
    curve = np.exp(-0.2 * np.arange(1, T + 1))[None]
    days = np.array([0.0, 100.0, 365.0, 1000.0, 365.0 * 40])
    expected = np.exp(-0.2 * np.minimum(days / 365, T))
    assert survival_at(curve, days)[0] == pytest.approx(expected)


def test_true_curves_are_calibrated_and_others_are_not() -> None:
    days, event, curves = sample()
    assert d_calibration(days, event, curves) > 0.01
    assert d_calibration(days, event, curves**3) < 1e-6
    assert d_calibration(days, event & False, curves) is None


def test_true_curves_beat_shuffled_ones() -> None:
    days, event, curves = sample()
    folds = np.arange(len(days)) % 5
    mixed = np.random.default_rng(1).permutation(curves)
    truth = accuracy(days, event, folds, curves, -curves.sum(1))
    chance = accuracy(days, event, folds, mixed, -mixed.sum(1))
    assert truth.c_ipcw > 0.65
    assert abs(chance.c_ipcw - 0.5) < 0.06
    assert truth.brier < chance.brier - 0.03
    assert all(value > 0.65 for value in truth.auc)
    assert all(abs(value - 0.5) < 0.1 for value in chance.auc)


def test_what_cannot_be_estimated_is_none() -> None:
    days, event, curves = sample(40)
    folds = np.arange(40) % 5
    nobody = accuracy(days, event & False, folds, curves, -curves.sum(1))
    assert (nobody.c_ipcw, nobody.brier, nobody.d_calibration) == (None, None, None)
    short = accuracy(np.minimum(days, 300), event, folds, curves, -curves.sum(1))
    assert short.auc == (None, None, None)
