from __future__ import annotations

import numpy as np
import pytest

from cropkt.survival.metrics import Pairs, concordance_of
from cropkt.transfer.guard import Guarded, guarded

K = 4


def target(n: int, *, seed: int, own: float, sources: list[float]):
    """Return days, event, folds, the own risk (n,) and source risks (S, n) that know so much."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    death, end = rng.exponential(np.exp(-truth)), rng.exponential(2, n)
    mine = own * truth + rng.normal(size=n)
    risk = np.stack([share * truth + rng.normal(size=n) for share in sources])
    return np.minimum(death, end), death <= end, np.arange(n) % K, mine, risk


def decide(days, event, folds, mine, risk) -> Guarded:
    pairs = Pairs.of(days, event)
    return guarded(pairs, days, event, folds, [mine] * (1 + K), [risk] * (1 + K))


def c_index(days, event, folds, risk) -> float:
    found = concordance_of(Pairs.of(days, event).inside(folds), risk).c_index
    assert found is not None
    return found


def test_better_sources_are_followed() -> None:
    case = target(300, seed=0, own=0.3, sources=[1.5, 1.5, 1.5])
    found = decide(*case)
    assert all(decision.share > 0.9 for decision in found.decisions)
    assert c_index(*case[:3], found.risk) > c_index(*case[:4]) + 0.05


def test_worse_sources_are_not() -> None:
    gains = []
    for seed in range(6):
        case = target(300, seed=seed, own=2.0, sources=[0.0] * 5)
        found = decide(*case)
        assert np.mean([decision.share for decision in found.decisions]) < 0.3
        gains.append(c_index(*case[:3], found.risk) - c_index(*case[:4]))
    assert np.mean(gains) > -0.005


def test_poisoned_experts_are_named_and_cost_little() -> None:
    days, event, folds, mine, good = target(250, seed=2, own=0.7, sources=[1.0] * 8)
    rng = np.random.default_rng(9)
    clean = c_index(days, event, folds, decide(days, event, folds, mine, good).risk)
    bad = np.concatenate(
        [
            -good[:1] * 3,  # sign-flipped
            np.full((1, 250), 7.0),  # constant
            good[1:2] * 1e6,  # scaled
            rng.permutation(good[2])[None],  # knows nothing
        ]
    )
    poisoned = decide(days, event, folds, mine, np.concatenate([good, bad]))
    for decision in poisoned.decisions:
        assert decision.faults[8] == "contrary"
        assert decision.faults[9] == "silent"
        assert set(decision.faults) <= {8, 9, 11}
        assert decision.weights[[9, 10]] == pytest.approx(0)
    assert c_index(days, event, folds, poisoned.risk) > clean - 0.02


def test_the_fold_that_judges_takes_no_part() -> None:
    days, event, folds, mine, risk = target(120, seed=3, own=0.7, sources=[1.0, 0.2])
    before = decide(days, event, folds, mine, risk)
    held = folds == 1
    days, event = days.copy(), event.copy()
    days[held], event[held] = days[held][::-1].copy(), ~event[held]
    after = decide(days, event, folds, mine, risk)
    assert np.array_equal(after.risk[held], before.risk[held])
    assert after.decisions[1].share == before.decisions[1].share
    assert after.decisions[0].share != before.decisions[0].share


def test_no_event_is_no_evidence() -> None:
    days, event, folds, mine, risk = target(40, seed=4, own=1.0, sources=[1.0])
    found = decide(days, event & False, folds, mine, risk)
    assert np.isfinite(found.risk).all()
    assert all(decision.gain == pytest.approx(0.03, abs=1e-4) for decision in found.decisions)


def test_without_sources_the_target_stays_local() -> None:
    days, event, folds, mine, _ = target(80, seed=5, own=1.0, sources=[1.0])
    found = decide(days, event, folds, mine, np.empty((0, 80)))
    assert c_index(days, event, folds, found.risk) == pytest.approx(
        c_index(days, event, folds, mine)
    )
