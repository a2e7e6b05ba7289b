from __future__ import annotations

import numpy as np
import pytest

from cropkt.survival.multiplicity import benjamini_hochberg, holm, two_sided

# Benjamini and Hochberg (1995), their example of 15 tests: 4 are rejected at .05, Bonferroni's 3.
P = np.loadtxt(
    [
        "0.0001 0.0004 0.0019 0.0095 0.0201 0.0278 0.0298 0.0344",
        "0.0459 0.3240 0.4262 0.5719 0.6528 0.7590 1.0000 nan",
    ]
).ravel()[:15]


def test_the_published_example() -> None:
    order = np.random.default_rng(0).permutation(len(P))
    adjusted = benjamini_hochberg(P[order])
    assert sorted(P[order][adjusted <= 0.05].tolist()) == P[:4].tolist()
    stepped = holm(P[order])
    assert sorted(P[order][stepped <= 0.05].tolist()) == P[:3].tolist()
    assert stepped[order == 3] == pytest.approx(0.0095 * 12)


def test_what_is_not_estimable_is_no_test() -> None:
    p = np.array([[0.01, np.nan], [0.02, 0.5]])
    for adjust in (benjamini_hochberg, holm):
        with_gap = adjust(p)
        assert np.isnan(with_gap[0, 1])
        assert with_gap[~np.isnan(p)] == pytest.approx(adjust(p[~np.isnan(p)]))


def test_false_discoveries_are_as_rare_as_promised() -> None:
    rng = np.random.default_rng(1)
    found = [(benjamini_hochberg(rng.random(650)) <= 0.05).any() for _ in range(400)]
    assert np.mean(found) < 0.08


def test_two_sided() -> None:
    p = two_sided(np.array([0.0, 1.96, -1.96, 1.0]), np.array([1.0, 1.0, 1.0, 0.0]))
    assert p[:3] == pytest.approx([1.0, 0.05, 0.05], abs=1e-3)
    assert np.isnan(p[3])
