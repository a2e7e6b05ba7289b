from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropkt.cancers import Cancer
from cropkt.survival.metrics import Estimate
from cropkt.transfer.plan import sources_for
from cropkt.transfer.scores import shrunken


def of(**c_index: list[float | None]) -> dict[Cancer, list[Estimate]]:
    return {
        Cancer(name): [Estimate(c_index=c, se=0.01) for c in row] for name, row in c_index.items()
    }


SCORES = of(
    ACC=[0.70, 0.50, 0.50],
    BLCA=[0.55, 0.80, 0.50],
    BRCA=[0.50, 0.50, 0.90],
    CESC=[0.45, 0.45, 0.45],
    CHOL=[0.69, 0.79, 0.89],
)


def test_all_where_there_is_room() -> None:
    for limit in (5, 25):
        names = sources_for(SCORES, limit=limit)
        assert names == tuple(sorted(SCORES))
    assert sources_for({}, limit=3) == ()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1, "ACC BLCA BRCA"), (2, "ACC BLCA BRCA CHOL"), (4, "ACC BLCA BRCA CHOL")],
)
def test_the_best_of_each_fold_together(limit, expected) -> None:
    got = sources_for(SCORES, limit=limit)
    assert " ".join(got) == expected


def values(scores):
    """Return the shrunken values of estimates."""
    return shrunken(
        np.array([np.nan if s.c_index is None else s.c_index for s in scores]),
        np.array([s.se or 0.0 for s in scores]),
    )


def test_an_uncertain_lead_does_not_count() -> None:
    row = {
        Cancer.ACC: [Estimate(c_index=0.80, se=0.2)],
        Cancer.BRCA: [Estimate(c_index=0.75, se=0.01)],
        Cancer.CHOL: [Estimate(c_index=0.30, se=0.01)],
    }
    assert values([score for (score,) in row.values()])[0] < 0.75
    assert sources_for(row, limit=1) == (Cancer.BRCA,)


def test_an_unknown_score_is_an_average_one_and_ties_go_by_name() -> None:
    assert sources_for(of(ACC=[0.4], BRCA=[None], CHOL=[0.6]), limit=2) == ("BRCA", "CHOL")
    assert sources_for(of(CHOL=[None], BRCA=[None], ACC=[None]), limit=2) == ("ACC", "BRCA")


@given(data=st.data(), limit=st.integers(1, 6), folds=st.integers(1, 4))
def test_bounds(data, limit, folds) -> None:
    names = data.draw(st.lists(st.sampled_from(list(Cancer)), min_size=1, max_size=8, unique=True))
    scores = {
        name: [
            Estimate(c_index=data.draw(st.floats(0, 1)), se=data.draw(st.floats(0, 0.3)))
            for _ in range(folds)
        ]
        for name in names
    }
    got = sources_for(scores, limit=limit)
    assert list(got) == sorted(set(got))
    assert min(limit, len(names)) <= len(got) <= min(len(names), limit * folds)
    assert sources_for(dict(reversed(scores.items())), limit=limit) == got
    for fold in range(folds):  # whoever was left out is beaten by `limit` others in every fold
        value = dict(zip(scores, values([row[fold] for row in scores.values()]), strict=True))
        for name in set(names) - set(got):
            assert sum(value[other] >= value[name] - 1e-12 for other in got) >= limit
