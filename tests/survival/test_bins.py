from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropkt.survival.bins import time_bins


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        *((0.5, 0), (1, 0), (364, 0), (364.99, 0), (365, 1), (729, 1), (730, 2)),
        *((31 * 365 - 1, 30), (31 * 365, 31), (11_679, 31), (11_680, 31), (1e9, 31)),
    ],
)
def test_edges(days: float, expected: int) -> None:
    got = time_bins(np.array([float(days)]))
    assert got.tolist() == [expected]
    assert got.dtype == np.int64


@given(
    days=st.lists(st.floats(0, 1e6), min_size=1),
    bins=st.integers(1, 40),
    width=st.integers(1, 1000),
)
def test_equals_counting_the_whole_widths_passed(days: list[float], bins: int, width: int) -> None:
    passed = [sum(k * width <= day for k in range(1, bins)) for day in days]
    assert time_bins(np.array(days), bins=bins, width=width).tolist() == passed
