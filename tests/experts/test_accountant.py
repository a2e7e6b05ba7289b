"""The privacy accountant against computations that share no code with it."""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import fft, integrate, optimize, stats

from cropkt.experts import accountant
from cropkt.experts.accountant import Mechanism, calibrated, epsilon_of

DELTA = 1e-5
CASES = [
    Mechanism(noise_multiplier=1.5, sample_rate=0.13, steps=100),
    Mechanism(noise_multiplier=0.9, sample_rate=0.06, steps=100),
    Mechanism(noise_multiplier=6.0, sample_rate=0.64, steps=100),
]


def gaussian_epsilon(noise: float, steps: int) -> float:
    """Return epsilon where everybody takes part in every step (Balle and Wang, 1805.06530)."""
    mu = sqrt(steps) / noise

    def excess(epsilon: float) -> float:
        above = stats.norm.cdf(mu / 2 - epsilon / mu)
        return float(above - exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) - DELTA)

    return float(optimize.brentq(excess, 0, 100))


def composed_epsilon(mechanism: Mechanism) -> float:
    """Return epsilon by convolving discretised privacy losses, a patient added or removed."""
    noise, q, span, points = mechanism.noise_multiplier, mechanism.sample_rate, 32.0, 1 << 18
    step = 2 * span / points
    loss = (np.arange(points) - points // 2) * step

    def of_loss(edge: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the z at which log(1 - q + q exp((2 z - 1) / 2 noise^2)) is `edge`."""
        inside = np.maximum(np.exp(edge) - 1 + q, 1e-300) / q
        return noise**2 * np.log(inside) + 0.5

    edges = np.append(loss - step / 2, loss[-1] + step / 2)
    found = []
    for removed in (True, False):  # z from the mixture, or from the normal with the sign turned
        if removed:
            z = of_loss(edges)
            below = (1 - q) * stats.norm.cdf(z / noise) + q * stats.norm.cdf((z - 1) / noise)
        else:
            below = 1 - stats.norm.cdf(of_loss(-edges) / noise)
        mass = np.maximum(np.diff(below), 0)
        spectrum = fft.rfft(fft.ifftshift(mass))
        total = fft.fftshift(fft.irfft(spectrum**mechanism.steps, points))

        def delta(epsilon: float, total: NDArray[np.float64] = total) -> float:
            above = loss > epsilon
            return float((total[above] * -np.expm1(epsilon - loss[above])).sum())

        found.append(optimize.brentq(lambda e: delta(e) - DELTA, 1e-3, span - 1))
    return float(max(found))


def renyi_epsilon(mechanism: Mechanism) -> float:
    """Return epsilon from the Rényi divergences' integrals (Mironov et al., 1908.10530)."""
    noise, q = mechanism.noise_multiplier, mechanism.sample_rate

    def at(order: float) -> float:
        def integrand(z: float) -> float:
            mixture = np.logaddexp(log(1 - q), log(q) + (2 * z - 1) / (2 * noise**2))
            return float(np.exp(order * mixture + stats.norm.logpdf(z / noise)) / noise)

        moment, _ = integrate.quad(
            integrand, -20 * noise, 20 * noise + order, limit=500, points=[0.0, float(order)]
        )
        renyi = mechanism.steps * log(moment) / (order - 1)
        return renyi + log((order - 1) / order) - (log(DELTA) + log(order)) / (order - 1)

    return min(at(order) for order in np.arange(1.5, 12, 0.5))


@pytest.mark.parametrize(("noise", "steps"), [(4.0, 50), (12.0, 100), (40.0, 100)])
def test_full_participation_equals_the_closed_form(noise: float, steps: int) -> None:
    mechanism = Mechanism(noise_multiplier=noise, sample_rate=1.0, steps=steps)
    want = gaussian_epsilon(noise, steps)
    assert want <= epsilon_of([mechanism], delta=DELTA) <= 1.01 * want


@pytest.mark.parametrize("mechanism", CASES)
def test_sampling_equals_the_convolution_of_losses(mechanism: Mechanism) -> None:
    want = composed_epsilon(mechanism)
    assert epsilon_of([mechanism], delta=DELTA) == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("mechanism", CASES)
def test_the_renyi_bound_is_that_of_the_integrals(mechanism: Mechanism) -> None:
    history = [(mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps)]
    want = renyi_epsilon(mechanism)
    assert accountant._renyi(history, DELTA) == pytest.approx(want, rel=0.01)
    assert epsilon_of([mechanism], delta=DELTA) < want


def test_where_one_accountant_fails_the_other_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: object, delta: float, **_: float) -> float:
        raise RuntimeError("the grid does not hold it")

    monkeypatch.setattr("opacus.accountants.PRVAccountant.get_epsilon", failing)
    want = renyi_epsilon(CASES[0])
    assert epsilon_of(CASES[:1], delta=DELTA) == pytest.approx(want, rel=0.01)


def test_releases_compose_better_than_their_sum() -> None:
    one, two = CASES[:2]
    alone = [epsilon_of([m], delta=DELTA) for m in (one, two)]
    both = epsilon_of([one, two], delta=DELTA)
    assert max(alone) < both < sum(alone)
    assert epsilon_of([two, one], delta=DELTA) == both
    assert epsilon_of([], delta=DELTA) == 0
    halves = Mechanism(noise_multiplier=1.5, sample_rate=0.13, steps=50)
    assert epsilon_of([halves, halves], delta=DELTA) == pytest.approx(alone[0])


def test_calibration_spends_what_was_asked_and_no_more() -> None:
    mechanism = calibrated(epsilon=2.0, delta=DELTA, sample_rate=0.13, steps=100)
    spent = epsilon_of([mechanism], delta=DELTA)
    assert 0.98 * 2.0 < spent <= 2.0
    assert composed_epsilon(mechanism) <= 2.0
