"""The baseline against scikit-survival's Cox model, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

from cropkt.survival.baseline import Baseline
from cropkt.survival.bins import BIN_DAYS
from cropkt.survival.calibration import RIDGE

T = 8


def patients(n: int, seed: int, *, ties: bool = False) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    risk = rng.normal(3, 5, size=n)
    death = rng.exponential(1500 * np.exp(-(risk - 3) / 5))
    censored = rng.exponential(3000, size=n)
    days = np.ceil(np.minimum(death, censored) / (400 if ties else 1)) * (400 if ties else 1)
    return risk, days, death <= censored


def by_sksurv(risk, days, event, held, at) -> tuple[float, np.ndarray]:
    """Return slope and survival of `at` by the patients `held`, in units of all."""
    x = (risk - risk.mean()) / risk.std()
    model = CoxPHSurvivalAnalysis(alpha=RIDGE, tol=1e-12).fit(
        x[held, None], Surv.from_arrays(event[held], days[held])
    )
    ends = BIN_DAYS * np.arange(1, T + 1)
    functions = model.predict_survival_function(((at - risk.mean()) / risk.std())[:, None])
    curves = [[1.0 if end < f.x[0] else f(min(end, f.x[-1])) for end in ends] for f in functions]
    return float(model.coef_[0]), np.array(curves)


@pytest.mark.parametrize("ties", [False, True])
def test_whole_cohort_and_samples_equal_sksurv(ties: bool) -> None:
    risk, days, event = patients(80, 0, ties=ties)
    found = Baseline.of(risk, days, event, bins=T, seed=5, draws=4)
    at = np.array([-4.0, 3.0, 11.0])
    curves = found.survival(at)  # (3, 5, T)
    counts = np.random.default_rng(5).multinomial(80, np.full(80, 1 / 80), size=4)
    for row, held in enumerate([np.arange(80), *(np.repeat(np.arange(80), c) for c in counts)]):
        slope, expected = by_sksurv(risk, days, event, held, at)
        assert found.slope[row] == pytest.approx(slope, abs=1e-6)
        assert curves[:, row] == pytest.approx(expected, abs=1e-6)


def test_intervals_narrow_as_patients_grow() -> None:
    widths = []
    for n in (40, 640):
        found = Baseline.of(*patients(n, 1), bins=T, seed=0)
        low, high = np.percentile(found.survival(np.array([3.0]))[0, :, 2], [2.5, 97.5])
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize("case", ["constant", "separated", "one event", "no event"])
def test_what_says_little_breaks_nothing(case: str) -> None:
    risk, days, event = patients(30, 2)
    if case == "constant":
        risk = np.full(30, 2.0)
    if case == "separated":
        risk = -days
    if case == "one event":
        event = event & (np.arange(30) == np.flatnonzero(event)[0])
    if case == "no event":
        event = event & False
    curves = Baseline.of(risk, days, event, bins=T, seed=0).survival(risk)
    assert np.isfinite(curves).all()
    assert ((curves >= 0) & (curves <= 1)).all()
    assert (np.diff(curves, axis=-1) <= 0).all()
    assert (curves == 1).all() == (case == "no event")
