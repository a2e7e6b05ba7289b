from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sksurv.metrics import concordance_index_censored

from cropkt.errors import NotEstimableError
from cropkt.survival.metrics import (
    Pairs,
    bootstrap,
    concordance,
    concordance_of,
    interval,
    out_of_fold,
    paired_difference,
)


def by_counting(days, event, risk, groups=None) -> tuple[float, int]:
    """Return (credit, pairs), pair by pair."""
    credit, pairs = 0.0, 0
    for i in range(len(days)):
        for j in range(len(days)):
            sooner = days[i] < days[j] or (days[i] == days[j] and not event[j])
            if i == j or not event[i] or not sooner:
                continue
            if groups is not None and groups[i] != groups[j]:
                continue
            pairs += 1
            credit += 0.5 if abs(risk[i] - risk[j]) <= 1e-8 else float(risk[i] > risk[j])
    return credit, pairs


@st.composite
def patients(draw, smallest: int = 2, largest: int = 25):
    """Few days and few risks, so that both tie often."""
    n = draw(st.integers(smallest, largest))

    def column(values):
        return np.array(draw(st.lists(values, min_size=n, max_size=n)))

    risk = column(st.integers(-3, 3)) / 3 + column(st.sampled_from([0, 1e-9, 0.1]))
    return column(st.integers(1, 8)).astype(float), column(st.booleans()), risk


def sample(n: int, seed: int = 0, link: float = 1.0):
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    death, censored = rng.exponential(np.exp(-link * risk)), rng.exponential(1.5, size=n)
    return np.minimum(death, censored), death <= censored, risk


@given(cohort=patients())
def test_equals_scikit_survival(cohort) -> None:
    days, event, risk = cohort
    assume(by_counting(*cohort)[1] > 0)
    theirs = concordance_index_censored(event, days, risk)
    ours = concordance(days, event, risk)
    assert ours.c_index == pytest.approx(theirs[0], abs=1e-12)
    assert ours.pairs == theirs[1] + theirs[2] + theirs[3]


@given(cohort=patients(), data=st.data())
def test_groups_count_pairs_within_groups_only(cohort, data) -> None:
    n = len(cohort[0])
    groups = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    credit, pairs = by_counting(*cohort, groups)
    got = concordance(*cohort, groups)
    assert got.pairs == pairs
    assert got.c_index == (pytest.approx(credit / pairs) if pairs else None)
    kept = Pairs.of(cohort[0], cohort[1]).within(groups == 1)
    chosen = groups == 1
    assert kept.count == by_counting(*(column[chosen] for column in cohort))[1]


@given(cohort=patients())
def test_turned_risk_turns_the_index(cohort) -> None:
    days, event, risk = cohort
    there, back = concordance(days, event, risk), concordance(days, event, -risk)
    assume(there.c_index is not None)
    assert there.c_index + back.c_index == pytest.approx(1)
    assert there.se == pytest.approx(back.se)


@pytest.mark.parametrize("groups", [None, np.arange(150) % 3])
def test_standard_error_equals_the_jackknife(groups) -> None:
    days, event, risk = sample(150)
    n = len(days)
    without = []
    for i in range(n):
        keep = np.arange(n) != i
        mine = None if groups is None else groups[keep]
        without.append(concordance(days[keep], event[keep], risk[keep], mine).c_index)
    jackknife = np.sqrt((n - 1) / n * np.square(without - np.mean(without)).sum())
    assert concordance(days, event, risk, groups).se == pytest.approx(jackknife, rel=0.05)


def test_standard_error_equals_a_brute_bootstrap() -> None:
    days, event, risk = sample(120, seed=3)
    rng = np.random.default_rng(1)
    draws = [rng.integers(0, 120, size=120) for _ in range(400)]
    values = [concordance(days[d], event[d], risk[d]).c_index for d in draws]
    assert concordance(days, event, risk).se == pytest.approx(np.std(values), rel=0.15)


def test_bootstrap_equals_repeating_the_patients() -> None:
    days, event, risk = sample(30, seed=5)
    other, groups = np.round(risk), np.arange(30) % 2
    got = bootstrap(Pairs.of(days, event, groups), np.stack([risk, other]), seed=8, replicates=20)
    draws = np.random.default_rng(8).multinomial(30, np.full(30, 1 / 30), size=20)
    for row, draw in zip(got, draws, strict=True):
        who = np.repeat(np.arange(30), draw)
        for value, column in zip(row, (risk, other), strict=True):
            brute = concordance(days[who], event[who], column[who], groups[who])
            assert value == pytest.approx(brute.c_index, abs=1e-6)


@given(cohort=patients())
def test_a_risk_does_not_differ_from_itself(cohort) -> None:
    days, event, risk = cohort
    pairs = Pairs.of(days, event)
    assume(pairs.count)
    assert paired_difference(pairs, risk, risk) == (0, 0)
    there, back = paired_difference(pairs, risk, days), paired_difference(pairs, days, risk)
    assert there[0] == pytest.approx(-back[0])
    assert there[1] == pytest.approx(back[1])


def test_paired_error_equals_a_brute_bootstrap() -> None:
    days, event, risk = sample(120, seed=3)
    noisy = risk + np.random.default_rng(2).normal(size=120)
    pairs = Pairs.of(days, event)
    difference, error = paired_difference(pairs, risk, noisy)
    draws = bootstrap(pairs, np.stack([risk, noisy]), seed=0, replicates=800)
    assert difference == pytest.approx(
        concordance_of(pairs, risk).c_index - concordance_of(pairs, noisy).c_index
    )
    assert error == pytest.approx((draws[:, 0] - draws[:, 1]).std(), rel=0.15)


def test_nothing_is_made_up_where_no_pair_is_comparable() -> None:
    days, event = np.array([1.0, 2.0, 3.0]), np.array([False, False, True])
    risk = np.array([0.1, 0.2, 0.3])
    got = concordance(days, event, risk)
    assert (got.c_index, got.se, got.pairs) == (None, None, 0)
    with pytest.raises(NotEstimableError, match="no pair"):
        paired_difference(Pairs.of(days, event), risk, risk)
    arms = out_of_fold(days, event, np.zeros(3, int), {"local": risk, "other": risk}, seed=0)
    assert [(a.c_index, a.low, a.gain, a.pooled) for a in arms.values()] == [(None,) * 4] * 2


def test_pairs_across_folds_do_not_count_out_of_fold() -> None:
    days, event = np.array([1.0, 2.0]), np.array([True, True])
    arms = out_of_fold(days, event, np.array([0, 1]), {"local": -days}, seed=0)
    assert arms["local"].c_index is None


def test_interval_needs_half_of_the_draws() -> None:
    assert interval(np.array([0.5, np.nan, np.nan])) is None
    assert interval(np.array([0.4, 0.6, np.nan])) == pytest.approx((0.405, 0.595))


def test_one_pair_gives_an_index_and_no_interval() -> None:
    # Both patients of the pair are drawn in (1 - 1/e)^2 = 40 % of the draws.
    days = np.arange(1.0, 31)
    event = np.arange(30) == 28
    arms = out_of_fold(
        days, event, np.zeros(30, int), {"local": -days, "other": days}, seed=0, replicates=200
    )
    assert (arms["local"].c_index, arms["other"].c_index) == (1, 0)
    assert arms["local"].low is None
    assert arms["other"].gain == -1
    assert arms["other"].gain_low is None
    assert arms["other"].gain_se is None


def test_out_of_fold_intervals_and_gains_are_of_the_same_draws() -> None:
    days, event, risk = sample(90, seed=4)
    folds = np.arange(90) % 3
    noise = np.random.default_rng(0).normal(size=90)
    risks = {"local": noise, "better": risk, "copy": noise}
    arms = out_of_fold(days, event, folds, risks, seed=6, replicates=100)
    pairs = Pairs.of(days, event, folds)
    draws = bootstrap(pairs, np.stack(list(risks.values())), seed=6, replicates=100)

    base, better, copy = arms["local"], arms["better"], arms["copy"]
    assert (base.gain, base.gain_se, base.gain_low) == (0, None, None)
    assert (copy.gain, copy.gain_se, copy.gain_low, copy.gain_high) == (0, 0, 0, 0)
    assert better.gain == pytest.approx(better.c_index - base.c_index)
    assert better.gain_se == pytest.approx((draws[:, 1] - draws[:, 0]).std())
    assert [better.gain_low, better.gain_high] == pytest.approx(
        np.quantile(draws[:, 1] - draws[:, 0], [0.025, 0.975])
    )
    assert [better.low, better.high] == pytest.approx(np.quantile(draws[:, 1], [0.025, 0.975]))
    assert better.low < better.c_index < better.high

    of_folds = [
        concordance(days[folds == f], event[folds == f], risk[folds == f]).c_index for f in range(3)
    ]
    assert better.fold_mean == pytest.approx(np.mean(of_folds))
    assert better.pooled == pytest.approx(concordance(days, event, risk).c_index)
    assert better.c_index == pytest.approx(concordance(days, event, risk, folds).c_index)
