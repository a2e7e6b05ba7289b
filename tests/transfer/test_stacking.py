from __future__ import annotations

import numpy as np
import pytest

from cropkt.transfer.stacking import equal_weights, stacked


def sample(n: int, *, seed: int, knows: dict[int, float], sources: int = 4, censored: float = 2):
    """Return standardised risks (n, 1 + sources), days, event and folds."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    risks = rng.normal(size=(n, 1 + sources))
    for index, share in knows.items():
        risks[:, index] += share * truth
    risks = (risks - risks.mean(0)) / risks.std(0)
    death, end = rng.exponential(np.exp(-truth)), rng.exponential(censored, n)
    return risks, np.minimum(death, end), death <= end, np.arange(n) % 4


def shares(weights):
    return weights / weights.sum()


def test_without_events_the_prior_stands() -> None:
    risks, days, event, folds = sample(40, seed=0, knows={})
    assert np.array_equal(stacked(risks, days, event & False, folds), equal_weights(risks[:, 1:]))


def test_weights_are_not_negative() -> None:
    risks, days, event, folds = sample(300, seed=1, knows={0: 2.0, 2: -2.0})
    weights = stacked(risks, days, event, folds)
    assert (weights >= 0).all()
    assert weights[2] < weights[1:].max()


def test_many_events_find_who_knows() -> None:
    risks, days, event, folds = sample(1500, seed=2, knows={3: 2.0})
    share = shares(stacked(risks, days, event, folds))
    assert share.argmax() == 3
    assert share[3] > 2 * share[0]


def test_few_events_stay_closer_to_the_prior_than_many() -> None:
    def away(n: int) -> float:
        moves = []
        for seed in range(8):
            risks, days, event, folds = sample(n, seed=seed, knows={3: 2.0})
            equal = shares(equal_weights(risks[:, 1:]))
            moves.append(np.abs(shares(stacked(risks, days, event, folds)) - equal).sum())
        return float(np.mean(moves))

    assert away(40) < 0.7 * away(1500)


def test_folds_share_no_scale() -> None:
    risks, days, event, folds = sample(200, seed=3, knows={0: 1.0, 1: 1.0})
    shifted = risks.copy()
    shifted[:, 0] += 50 * folds
    assert stacked(shifted, days, event, folds) == pytest.approx(
        stacked(risks, days, event, folds), abs=1e-4
    )
