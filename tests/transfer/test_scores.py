from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cropkt.survival.metrics import Pairs, concordance
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
    assert np.array_equal(again.answers[fold, mine], there.answers[fold, mine])


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
        assert got.answers[fold, mine] == pytest.approx(scaled[mine])


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
                assert np.array_equal(got.answers[fold, mine], vote[mine])
    assert votes >= 72  # of 80


def test_zero_shot_reads_each_fold_s_own_units() -> None:
    days, event, folds, risk = sample(60, 2, seed=0)
    other = np.random.default_rng(9).normal(size=risk.shape)
    got = zero_shot(Pairs.of(days, event), folds, [risk, risk, other, risk])
    alone = zero_shot(Pairs.of(days, event), folds, [other] * 4)
    assert got.choice[2] == alone.choice[2]
    assert np.array_equal(got.answers[2], alone.answers[2])


def test_zero_shot_of_one_source_and_of_no_pairs() -> None:
    days, event, folds, risk = sample(20, 1, seed=0)
    assert zero_shot(Pairs.of(days, event), folds, [risk] * 4).choice == (None,) * 4
    none = zero_shot(Pairs.of(days, np.zeros(20, bool)), folds, [risk] * 4)
    assert none.choice == (None,) * 4
    assert np.isfinite(none.answers).all()


def test_standardised_by_the_reference_patients_only() -> None:
    risk = np.array([[1.0, 3.0, 100.0], [2.0, 2.0, 7.0]])
    got = standardised(risk, np.array([True, True, False]))
    assert got.tolist() == [[-1, 1, 98], [0, 0, 0]]  # a constant says nothing


scores = st.lists(
    st.tuples(st.just(np.nan) | st.floats(0, 1), st.floats(0.01, 0.5)), min_size=1, max_size=8
)


@given(scores=scores)
def test_shrunken_keeps_the_order_within_one_error_and_never_overshoots(scores) -> None:
    c_index, error = np.array(scores).T
    value = shrunken(c_index, error)
    known = np.isfinite(c_index)
    if not known.any():
        assert (value == 0.5).all()
        return
    low, high = c_index[known].min(), c_index[known].max()
    assert ((value >= low - 1e-9) & (value <= high + 1e-9)).all()
    same = shrunken(c_index, np.full(len(c_index), 0.1))
    order = np.argsort(c_index[known], kind="stable")
    assert (np.diff(same[known][order]) >= 0).all()


def test_shrunken_limits() -> None:
    def of(*pairs):
        return shrunken(*np.array(pairs, dtype=float).T).tolist()

    assert of((0.5, 1e-3), (0.7, 1e-3)) == pytest.approx([0.5, 0.7], abs=1e-4)  # as measured
    equal = of((0.5, 0.4), (0.7, 0.4))  # noise: all the same, but for a trace of the order
    assert equal == pytest.approx([0.6, 0.6], abs=1e-5)
    assert equal[0] < equal[1]
    assert of((0.55, 0.1)) == pytest.approx([0.55])
    assert of((np.nan, np.nan), (np.nan, np.nan)) == [0.5, 0.5]
    assert of((0.5, 0.01), (np.nan, 0.1), (0.7, 0.01))[1] == pytest.approx(0.6)
    # One wild score must not hide what the others say.
    wild = of((0.95, 0.5), (0.75, 0.01), (0.30, 0.01))
    assert wild[1] > 0.7
    assert wild[2] < 0.35
    # An error of 0, as one lucky pair gives, is no certainty.
    assert of((1.0, 0.0), (0.6, 0.02), (0.6, 0.02))[0] < 0.7


def test_shrunken_is_dersimonian_and_laird() -> None:
    c_index, error = np.array([0.55, 0.62, 0.7]), np.array([0.02, 0.03, 0.05])
    weight = error**-2
    fixed = (weight * c_index).sum() / weight.sum()
    q = (weight * (c_index - fixed) ** 2).sum()
    between = (q - 2) / (weight.sum() - (weight**2).sum() / weight.sum())
    total = 1 / (between + error**2)
    centre = (total * c_index).sum() / total.sum()
    expected = centre + between / (between + error**2) * (c_index - centre)
    assert shrunken(c_index, error).tolist() == pytest.approx(expected.tolist())
