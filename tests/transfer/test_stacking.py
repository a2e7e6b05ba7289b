from __future__ import annotations

import numpy as np
import pytest

from cropkt.survival.partial import partial_likelihood
from cropkt.transfer.stacking import (
    SCALE,
    SCALE_SPREAD,
    equal_weights,
    log_evidence,
    stacked,
)


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


def test_evidence_is_the_integral_over_the_scale() -> None:
    risks, days, event, folds = sample(120, seed=4, knows={0: 1.0, 1: 0.5})
    scales = np.linspace(-1.5, 3, 181)
    prior = -0.5 * ((scales - SCALE) / SCALE_SPREAD) ** 2

    def by_sum(risk) -> float:
        curves = [partial_likelihood(np.array([b]), risk, days, event, folds) for b in scales]
        log = np.array([curve.value for curve in curves]) + prior
        density = np.exp(log - log.max()).sum() * (scales[1] - scales[0])
        return float(log.max() + np.log(density / SCALE_SPREAD / np.sqrt(2 * np.pi)))

    for column in (0, 1):
        exact = by_sum(risks[:, [column]])
        assert log_evidence(risks[:, column], days, event, folds) == pytest.approx(exact, abs=0.1)


def test_evidence_prefers_who_knows_and_nobody_without_events() -> None:
    risks, days, event, folds = sample(200, seed=5, knows={0: 1.5})
    knows, guesses = (log_evidence(risks[:, i], days, event, folds) for i in (0, 1))
    assert knows > guesses + 5
    knows, guesses = (log_evidence(risks[:, i], days, event & False, folds) for i in (0, 1))
    assert knows == pytest.approx(guesses)


def test_without_patients_the_prior_stands() -> None:
    assert equal_weights(np.empty((0, 2))) == pytest.approx([0.5, 0.25, 0.25])
