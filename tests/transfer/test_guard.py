from __future__ import annotations

import numpy as np
import pytest

from cropkt.survival.metrics import Pairs, concordance_of
from cropkt.transfer import guard
from cropkt.transfer.guard import CANDIDATES, Guarded, guarded
from cropkt.transfer.scores import standardised

K = 4


def target(n: int, *, seed: int, own: float, sources: list[float]):
    """Return days, event, folds, the own risk (n,) and source risks (S, n) that know so much."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    death, end = rng.exponential(np.exp(-truth)), rng.exponential(2, n)
    mine = own * truth + rng.normal(size=n)
    risk = np.stack([share * truth + rng.normal(size=n) for share in sources])
    return np.minimum(death, end), death <= end, np.arange(n) % K, mine, risk


def decide(days, event, folds, mine, risk, kept=None) -> Guarded:
    pairs = Pairs.of(days, event)
    views = [mine] * (1 + K), [risk] * (1 + K)
    return guarded(pairs, days, event, folds, *views, kept=kept)


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
    gains, mine = [], []
    for seed in range(3):
        case = target(150, seed=seed, own=2.0, sources=[0.0] * 5)
        found = decide(*case)
        mine += [decision.weights[0] for decision in found.decisions]
        gains.append(c_index(*case[:3], found.risk) - c_index(*case[:4]))
    assert np.mean(mine) > 0.7
    assert np.mean(gains) > -0.005


def test_experts_that_hurt_are_not_followed_together() -> None:
    gains = []
    for seed in range(3):
        case = target(150, seed=seed, own=0.7, sources=[-0.5] * 6)
        gains.append(c_index(*case[:3], decide(*case).risk) - c_index(*case[:4]))
    assert np.mean(gains) > -0.005


def test_poisoned_experts_are_named_and_left_out() -> None:
    days, event, folds, mine, good = target(200, seed=2, own=0.7, sources=[1.0] * 8)
    bad = np.stack([-good[0] * 3, np.full(200, 7.0), np.where(good[1] > 1, np.inf, good[1])])
    poisoned = decide(days, event, folds, mine, np.concatenate([good, bad]))
    for decision in (*poisoned.decisions, poisoned.final):
        assert decision.faults == {8: "contrary", 9: "silent", 10: "silent"}
        assert decision.weights[9:] == pytest.approx(0)


def test_three_poisoned_of_twenty_five_cost_little() -> None:
    losses = []
    for seed in range(2):
        days, event, folds, mine, good = target(80, seed=seed, own=0.7, sources=[1.0] * 25)
        bad = good.copy()
        bad[0] = -good[0]
        bad[1] = np.random.default_rng(seed).permutation(good[1])
        bad[2] = -1.0
        clean, poisoned = (decide(days, event, folds, mine, s).risk for s in (good, bad))
        losses.append(c_index(days, event, folds, clean) - c_index(days, event, folds, poisoned))
    assert np.mean(losses) <= 0.005


def test_the_scale_of_a_source_does_not_matter() -> None:
    days, event, folds, mine, risk = target(100, seed=6, own=0.7, sources=[1.0, 0.5])
    once = decide(days, event, folds, mine, risk).risk
    scaled = decide(days, event, folds, mine, risk * [[1.0], [1000.0]]).risk
    assert scaled == pytest.approx(once, abs=1e-6)


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


def test_an_answer_stands_in_every_row_and_the_diagonal_is_the_risk() -> None:
    days, event, folds, mine, risk = target(100, seed=7, own=0.7, sources=[1.0, 0.5, 0.2])
    found = decide(days, event, folds, mine, risk)
    assert set(found.answers) == {*CANDIDATES, "auto"}
    for arm, rows in found.answers.items():
        assert rows.shape == (K, 100)
        whole = found.risk if arm == "auto" else found.candidates[arm]
        assert np.array_equal(rows[folds, np.arange(100)], whole)
    for fold, decision in enumerate(found.decisions):
        scaled = standardised(np.stack([mine, *risk]), folds != fold)
        here = folds == fold
        assert found.risk[here] == pytest.approx(decision.weights @ scaled[:, here])


def test_training_patients_are_answered_by_weights_learnt_without_them() -> None:
    days, event, folds, mine, risk = target(120, seed=8, own=0.3, sources=[2.0, 0.2])
    before = decide(days, event, folds, mine, risk)
    held = folds == 1
    other = event ^ (held & (np.arange(120) % 3 == 0))
    after = decide(days, other, folds, mine, risk)
    assert before.decisions[0].faults == after.decisions[0].faults == {}
    stack = before.answers["stack"][0], after.answers["stack"][0]
    assert np.array_equal(stack[0][held], stack[1][held])
    assert not np.allclose(stack[0][folds == 2], stack[1][folds == 2])


def test_the_final_decision_is_from_everybody() -> None:
    days, event, folds, mine, risk = target(200, seed=9, own=0.5, sources=[1.0, 1.0])
    final = decide(days, event, folds, mine, risk).final
    everybody = guarded(
        *(Pairs.of(days, event), days, event, folds),
        [mine, *[np.zeros(200)] * K],  # what a fold may see says nothing
        [risk, *[np.zeros((2, 200))] * K],
    )
    assert np.array_equal(everybody.final.weights, final.weights)
    assert final.share > 0.9
    assert final.weights.sum() == pytest.approx(1)
    assert all(decision.share == 0 for decision in everybody.decisions)


def test_influence_is_what_the_answer_loses_without_a_source() -> None:
    days, event, folds, mine, risk = target(160, seed=10, own=0.7, sources=[2.0, 0.5, 0.0])
    found = decide(days, event, folds, mine, risk)
    for index in range(3):
        answer = np.empty(160)
        for fold, decision in enumerate(found.decisions):
            weights = decision.weights.copy()
            weights[1 + index] = 0
            scaled = standardised(np.stack([mine, *risk]), folds != fold)
            answer[folds == fold] = (weights / weights.sum() @ scaled)[folds == fold]
        loss = c_index(days, event, folds, found.risk) - c_index(days, event, folds, answer)
        assert found.influence[index] == pytest.approx(loss, abs=1e-9)
    assert found.influence[0] > 0.02
    assert found.influence.argmax() == 0


def test_few_shot_learns_from_the_kept_alone() -> None:
    days, event, folds, mine, risk = target(120, seed=11, own=0.7, sources=[1.0, 0.5])
    kept = np.random.default_rng(0).random(120) < 0.4
    few = decide(days, event, folds, mine, risk, kept)
    other_days, other_event = np.where(kept, days, days[::-1]), np.where(kept, event, ~event)
    same = decide(other_days, other_event, folds, mine, risk, kept)
    assert np.isfinite(few.risk).all()
    for arm, rows in few.answers.items():
        assert np.array_equal(rows, same.answers[arm])
    assert np.array_equal(few.final.weights, same.final.weights)
    everybody = decide(days, event, folds, mine, risk)
    assert few.final.share != everybody.final.share


def test_no_source_holds_more_than_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    case = target(200, seed=12, own=0.0, sources=[2.0])
    capped = decide(*case).final.weights
    assert capped[1] == guard.CAP
    assert capped.sum() == pytest.approx(1)
    monkeypatch.setattr(guard, "CAP", 1.0)
    assert decide(*case).final.weights[1] > 0.8


def test_the_likelihood_knows_the_better_risk() -> None:
    days, event, folds, mine, risk = target(400, seed=13, own=0.0, sources=[1.5])
    patients = (days, event, folds)
    scaled = standardised(np.stack([mine, risk[0]]), folds >= 0)
    assert guard._likely(scaled[1], scaled[0], *patients) > 0.99
    assert guard._likely(1000 * scaled[1], scaled[0], *patients) > 0.99
    assert guard._likely(scaled[0], scaled[1], *patients) < 0.01
    nobody = (days, event & False, folds)
    assert guard._likely(scaled[1], scaled[0], *nobody) == pytest.approx(0.5)


def test_without_sources_the_answer_is_local() -> None:
    days, event, folds, mine, _ = target(80, seed=5, own=1.0, sources=[1.0])
    found = decide(days, event, folds, mine, np.empty((0, 80)))
    assert found.influence.shape == (0,)
    assert c_index(days, event, folds, found.risk) == c_index(days, event, folds, mine)
    for candidate in found.candidates.values():
        assert np.array_equal(candidate, found.risk)
    assert [decision.share for decision in found.decisions] == [0] * K
    assert list(found.final.weights) == [1]


@pytest.mark.parametrize("case", ["own", "sources", "both", "fold", "one fold", "kept", "nobody"])
def test_what_says_nothing_breaks_nothing(case: str) -> None:
    days, event, folds, mine, risk = target(60, seed=14, own=1.0, sources=[1.0, 0.5])
    kept = None
    if case in ("own", "both"):
        mine = np.full(60, 3.0)
    if case in ("sources", "both"):
        risk = np.full((2, 60), -2.0)
    if case == "fold":
        event = event & (folds != 1)
    if case == "one fold":
        event = event & (folds == 1)
    if case == "kept":
        kept = folds == 1
    if case == "nobody":
        kept = folds < 0
    found = decide(days, event, folds, mine, risk, kept)
    assert np.isfinite(found.risk).all()
    assert np.isfinite(found.influence).all()
    for decision in (*found.decisions, found.final):
        assert decision.weights.sum() == pytest.approx(1)
        assert (decision.weights >= 0).all()
    silent = dict.fromkeys(range(2), "silent")
    assert (found.final.faults == silent) == (case in ("sources", "both"))
    if case == "own":  # then the sources decide alone
        assert c_index(days, event, folds, found.risk) > 0.6
    if case in ("sources", "nobody"):
        assert c_index(days, event, folds, found.risk) == c_index(days, event, folds, mine)
