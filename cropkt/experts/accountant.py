"""How much releases of models trained by DP-SGD tell of a patient at most, all of them together.

The unit is the patient: neighbouring cohorts differ by one patient, added or removed. A release
is T steps of the Poisson-subsampled Gaussian mechanism: each patient takes part in a step with
probability q, and the sum of clipped per-patient gradients gets Gaussian noise whose standard
deviation is the noise multiplier times the clip. Releases are composed by their privacy losses,
which is tighter than adding their epsilons.

References:
    Abadi et al., arXiv 1607.00133; Gopi et al. (PRV accountant), arXiv 2106.02848; Mironov et
    al. (Rényi differential privacy), arXiv 1908.10530.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isfinite

import numpy as np

# Opacus takes seconds to import, and who reads a budget needs none of it: the functions do.

EPSILON_ERROR = 0.005  # of the PRV accountant's grid; its figure lies above the truth by up to this
SHORTFALL = 0.01  # share of epsilon that a calibrated mechanism may leave
TRIES = 5  # to leave no more
ORDERS = [*(x / 2 for x in range(3, 20)), *range(10, 64), *(1 << k for k in range(6, 11))]

History = list[tuple[float, float, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """One release."""

    noise_multiplier: float  # standard deviation of the noise over the clip
    sample_rate: float  # probability that a patient takes part in a step, in (0, 1]
    steps: int


def epsilon_of(releases: Sequence[Mechanism], *, delta: float) -> float:
    """Return the epsilon of all releases together at `delta`, an upper bound.

    It is the smaller of two upper bounds, the PRV accountant's, which does not converge for every
    mechanism, and the Rényi accountant's, which is looser and always there.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for release in releases:
        steps[release.noise_multiplier, release.sample_rate] += release.steps
    history = [(noise, rate, count) for (noise, rate), count in sorted(steps.items())]
    return min(_prv(history, delta), _renyi(history, delta)) if history else 0.0


def calibrated(*, epsilon: float, delta: float, sample_rate: float, steps: int) -> Mechanism:
    """Return a mechanism with little noise that alone spends no more than `epsilon`.

    The Rényi accountant, which is fast, gives noise that is enough; the other one tells, step by
    step, how much less will do.
    """
    from opacus.accountants.utils import get_noise_multiplier

    with _quiet():
        noise = get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            accountant="rdp",
            epsilon_tolerance=SHORTFALL * epsilon,
            alphas=ORDERS,
        )
    enough = Mechanism(noise_multiplier=float(noise), sample_rate=sample_rate, steps=steps)
    spent, power = epsilon_of([enough], delta=delta), 0.6
    for _ in range(TRIES):
        if spent >= (1 - SHORTFALL) * epsilon:
            break
        # Were epsilon noise^(-1 / power), this would spend all of it; at low noise it is steeper.
        less = replace(enough, noise_multiplier=noise * (spent / epsilon) ** power)
        now = epsilon_of([less], delta=delta)
        if now > epsilon:
            power /= 2
        else:
            enough, noise, spent = less, less.noise_multiplier, now
    return enough


def _prv(history: History, delta: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = history
    try:
        with _quiet():
            epsilon = float(accountant.get_epsilon(delta, eps_error=EPSILON_ERROR))
    except (ArithmeticError, RuntimeError, ValueError):  # the grid does not hold the distribution
        return inf
    return epsilon if isfinite(epsilon) else inf


def _renyi(history: History, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = history
    with _quiet():
        return float(accountant.get_epsilon(delta, alphas=ORDERS))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Opacus where the best Rényi order is its last, or a limit is log 0 or exp 1000."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        yield
