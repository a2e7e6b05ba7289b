from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cropkt.survival.metrics import Estimate, Pairs, concordance
from cropkt.transfer.scores import shrunken, standardised, training_scores, zero_shot


def sample(n: int, sources: int, *, seed: int, good: dict[int, float] | None = None):
    """Return days, event, folds and risks (S, n); `good` sources know the truth in part."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    death, censored = rng.exponential(np.exp(-truth)), rng.exponential(2, size=n)
    risk = rng.normal(size=(sources, n))
    for source, share in (good or {}).items():
        risk[source] += share * truth
    return np.minimum(death, censored), death <= censored, np.arange(n) % 4, risk


def test_training_scores_leave_the_fold_out() -> None:
    days, event, folds, risk = sample(60, 3, seed=0)
    got = training_scores(Pairs.of(days, event), folds, risk)
    assert len(got) == 4
    for fold, row in enumerate(got):
        rest = folds != fold
        for source, estimate in enumerate(row):
            brute = concordance(days[rest], event[rest], risk[source, rest])
            assert estimate.c_index == pytest.approx(brute.c_index)
            assert estimate.se == pytest.approx(brute.se)
            assert estimate.pairs == brute.pairs


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), fold=st.integers(0, 3))
def test_zero_shot_never_reads_the_outcomes_it_is_judged_by(seed, fold) -> None:
    days, event, folds, risk = sample(60, 5, seed=seed, good={seed % 5: 2.0})
    there = zero_shot(Pairs.of(days, event), folds, [risk] * 4)
    rng, mine = np.random.default_rng(seed + 1), folds == fold
    days[mine], event[mine] = rng.exponential(size=mine.sum()), rng.random(mine.sum()) < 0.5
    again = zero_shot(Pairs.of(days, event), folds, [risk] * 4)
    assert again.choice[fold] == there.choice[fold]
    assert np.array_equal(again.risk[mine], there.risk[mine])


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), fold=st.integers(0, 3))
def test_zero_shot_never_reads_the_patches_it_is_judged_by(seed, fold) -> None:
    days, event, folds, risk = sample(60, 5, seed=seed, good={seed % 5: 2.0})
    mine, changed = folds == fold, risk.copy()
    changed[:, mine] = np.random.default_rng(seed).normal(size=(5, mine.sum())) * 9
    there = zero_shot(Pairs.of(days, event), folds, [risk] * 4)
    again = zero_shot(Pairs.of(days, event), folds, [changed] * 4)
    assert again.choice[fold] == there.choice[fold]


def test_zero_shot_takes_the_source_that_knows() -> None:
    days, event, folds, risk = sample(400, 4, seed=1, good={2: 8.0})
    got = zero_shot(Pairs.of(days, event), folds, [risk] * 4)
    assert got.choice == (2, 2, 2, 2)
    for fold in range(4):
        mine, rest = folds == fold, folds != fold
        scaled = (risk[2] - risk[2, rest].mean()) / risk[2, rest].std()
        assert got.risk[mine] == pytest.approx(scaled[mine])


def test_zero_shot_takes_the_vote_where_none_stands_out() -> None:
    votes = 0
    for seed in range(20):
        days, event, folds, risk = sample(60, 6, seed=seed, good=dict.fromkeys(range(6), 0.7))
        got = zero_shot(Pairs.of(days, event), folds, [risk] * 4)
        votes += got.choice.count(None)
        for fold, choice in enumerate(got.choice):
            mine, rest = folds == fold, folds != fold
            if choice is None:
                vote = standardised(risk, rest).mean(0)
                assert np.array_equal(got.risk[mine], vote[mine])
    assert votes >= 72  # of 80


def test_zero_shot_reads_each_fold_s_own_units() -> None:
    days, event, folds, risk = sample(60, 2, seed=0)
    other = np.random.default_rng(9).normal(size=risk.shape)
    got = zero_shot(Pairs.of(days, event), folds, [risk, risk, other, risk])
    alone = zero_shot(Pairs.of(days, event), folds, [other] * 4)
    assert got.choice[2] == alone.choice[2]
    assert np.array_equal(got.risk[folds == 2], alone.risk[folds == 2])


def test_zero_shot_of_one_source_and_of_no_pairs() -> None:
    days, event, folds, risk = sample(20, 1, seed=0)
    assert zero_shot(Pairs.of(days, event), folds, [risk] * 4).choice == (None,) * 4
    none = zero_shot(Pairs.of(days, np.zeros(20, bool)), folds, [risk] * 4)
    assert none.choice == (None,) * 4
    assert np.isfinite(none.risk).all()


def test_standardised_by_the_reference_patients_only() -> None:
    risk = np.array([[1.0, 3.0, 100.0], [2.0, 2.0, 7.0]])
    got = standardised(risk, np.array([True, True, False]))
    assert got.tolist() == [[-1, 1, 98], [0, 0, 0]]  # a constant says nothing


estimates = st.lists(
    st.builds(Estimate, c_index=st.none() | st.floats(0, 1), se=st.floats(0, 0.5)),
    min_size=1,
    max_size=8,
)


@given(scores=estimates)
def test_shrunken_lies_between_the_mean_and_the_score(scores) -> None:
    known = [s.c_index for s in scores if s.c_index is not None]
    mean = np.mean(known) if known else 0.5
    for value, score in zip(shrunken(scores), scores, strict=True):
        if score.c_index is None:
            assert value == pytest.approx(mean)
        else:
            low, high = sorted([mean, score.c_index])
            assert low - 1e-12 <= value <= high + 1e-12


def test_shrunken_limits() -> None:
    def of(*pairs):
        return shrunken([Estimate(c_index=c, se=se) for c, se in pairs]).tolist()

    assert of((0.5, 0.0), (0.7, 0.0)) == pytest.approx([0.5, 0.7])  # certain: as measured
    assert of((0.5, 0.4), (0.7, 0.4)) == pytest.approx([0.6, 0.6])  # noise: all the same
    assert of((0.55, 0.1)) == pytest.approx([0.55])
    assert of((None, None), (None, None)) == [0.5, 0.5]
    assert of((0.5, 0.01), (None, None), (0.7, 0.01))[1] == pytest.approx(0.6)
    # var .01 between, noise .01^2 and .1^2: by hand, trust .00495/(.00495 + se^2).
    trust = [0.00495 / (0.00495 + se**2) for se in (0.01, 0.1)]
    expected = [0.6 - trust[0] * 0.1, 0.6 + trust[1] * 0.1]
    assert of((0.5, 0.01), (0.7, 0.1)) == pytest.approx(expected)
