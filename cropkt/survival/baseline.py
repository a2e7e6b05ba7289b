"""From a risk without scale to a survival curve for patients to come, and how sure it is.

Cox's model of one covariate with Breslow's baseline, as `calibration` fits it per fold, here once
on a whole cohort and again on bootstrap samples of its patients. All samples are fitted in one
vectorised pass: scikit-survival, which the tests compare with, would take minutes for hundreds.
Shapes: n patients, B samples, T yearly bins, m patients to come.

References:
    Cox, J. R. Stat. Soc. B 34(2), 1972; Breslow, ibid.; Efron and Tibshirani, An Introduction to
    the Bootstrap, 1993.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cropkt.survival.bins import bin_ends
from cropkt.survival.calibration import RIDGE

DRAWS = 200
_STEPS = 30  # of Newton, at most
_LONGEST = 1.0  # step: keeps an early overshoot from running away
_FURTHEST = 50.0  # log hazard ratio beyond which nothing changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Slope and cumulative hazard of the whole cohort, in row 0, and of each bootstrap sample."""

    slope: NDArray[np.float64]  # (1 + B,) log hazard ratio of one standard deviation of risk
    hazard: NDArray[np.float64]  # (1 + B, T) cumulative, at mean risk, at the end of each bin
    centre: float  # mean risk of the cohort
    spread: float  # its standard deviation

    @classmethod
    def of(
        cls,
        risk: NDArray[np.floating],
        days: NDArray[np.floating],
        event: NDArray[np.bool_],
        *,
        bins: int,
        seed: int,
        draws: int = DRAWS,
    ) -> Baseline:
        """Return the baseline of a cohort.

        Args:
            risk: (n,) of each patient by models that did not see them; higher dies earlier.
            days: (n,) time of death or last follow-up.
            event: (n,) True for a death.
            bins: T.
            seed: of the bootstrap.
            draws: B.
        """
        n, rng = len(risk), np.random.default_rng(seed)
        centre, spread = float(risk.mean()), max(float(risk.std()), 1e-12)
        counts = np.ones((1 + draws, n))
        counts[1:] = rng.multinomial(n, np.full(n, 1 / n), size=draws)
        latest = np.argsort(-days, kind="stable")
        x = (risk[latest].astype(np.float64) - centre) / spread
        then, died = days[latest], event[latest]
        # The risk set of a death are all whose time is not shorter: a prefix of this order.
        last = np.searchsorted(-then, -then[died], side="right") - 1
        cohort = _Deaths(x=x, counts=counts[:, latest], died=died, last=last)
        slope = cohort.slopes()
        steps = cohort.steps(slope)  # (1 + B, deaths)
        ends = bin_ends(bins)
        hazard = steps @ (then[died][:, None] <= ends).astype(np.float64)
        return cls(slope=slope, hazard=hazard, centre=centre, spread=spread)

    def survival(self, risk: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return survival (m, 1 + B, T) at the end of each bin, of patients with `risk` (m,)."""
        away = (np.asarray(risk, dtype=np.float64) - self.centre) / self.spread
        ratio = np.exp(np.clip(self.slope * away[:, None], -_FURTHEST, _FURTHEST))  # (m, 1 + B)
        curves: NDArray[np.float64] = np.exp(-self.hazard * ratio[:, :, None])
        return curves


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deaths:
    """Patients by descending time, with how often each sample holds them."""

    x: NDArray[np.float64]  # (n,)
    counts: NDArray[np.float64]  # (1 + B, n)
    died: NDArray[np.bool_]  # (n,)
    last: NDArray[np.int64]  # (deaths,) end of each death's risk set

    def slopes(self) -> NDArray[np.float64]:
        """Return the slope of the highest penalised partial likelihood of each sample, (1 + B,)."""
        slope = np.zeros(len(self.counts))
        deaths, at = self.counts[:, self.died], self.x[self.died]
        for _ in range(_STEPS):
            share = self._shares(slope)
            total = _known(share.cumsum(1)[:, self.last])
            mean = (share * self.x).cumsum(1)[:, self.last] / total
            square = (share * self.x**2).cumsum(1)[:, self.last] / total
            gradient = (deaths * (at - mean)).sum(1) - RIDGE * slope
            curvature = (deaths * (square - mean**2)).sum(1) + RIDGE
            step = np.clip(gradient / curvature, -_LONGEST, _LONGEST)
            slope = slope + step
            if np.abs(step).max() < 1e-9:
                break
        return slope

    def steps(self, slope: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return by how much the cumulative hazard rises at each death, (1 + B, deaths)."""
        total = _known(self._shares(slope).cumsum(1)[:, self.last])
        rise: NDArray[np.float64] = self.counts[:, self.died] / total
        return rise

    def _shares(self, slope: NDArray[np.float64]) -> NDArray[np.float64]:
        away = np.clip(slope[:, None] * self.x, -_FURTHEST, _FURTHEST)
        shares: NDArray[np.float64] = self.counts * np.exp(away)
        return shares


def _known(total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return risk sets' totals, 1 for a death that its sample does not hold with anybody."""
    return np.where(total > 0, total, 1.0)
