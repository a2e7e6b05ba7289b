"""Harrell's concordance, its standard error and bootstrap interval, within and across folds.

A pair is comparable when the earlier time is a death (equal times: one death, one censored).
Ties in risk within 1e-8 count one half, as `sksurv.metrics.concordance_index_censored` does.
With `groups`, only pairs of the same group count: risks of two folds come from two models and
share no scale, so out-of-fold concordance is pooled over pairs within the folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cropkt.errors import NotEstimableError

Arm = TypeVar("Arm", bound=str)
TIE = 1e-8
REPLICATES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A C-index less another on the same patients, from paired resampling."""

    value: float
    se: float
    low: float  # 95 % percentile bootstrap over patients
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A C-index with what is known of its error, or None where no pair is comparable."""

    c_index: float | None
    se: float | None = None  # infinitesimal jackknife over patients
    low: float | None = None  # 95 % percentile bootstrap over patients
    high: float | None = None
    pairs: int = 0  # comparable pairs
    fold_mean: float | None = None  # mean over the folds that have a comparable pair
    pooled: float | None = None  # over all pairs, across folds too
    gain: float | None = None  # C-index less that of the first arm, from paired resampling
    gain_se: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    against: Mapping[str, Difference] = field(default_factory=dict)  # by control


@dataclass(frozen=True, slots=True)
class Pairs:
    """The comparable pairs of a cohort of n patients, d of whom died.

    Only a death makes a pair comparable, so the matrices have a row for each death alone.
    """

    died: NDArray[np.int64]  # (d,) who died
    earlier: NDArray[np.bool_]  # (d, n) True where row's death comes before column's time

    @classmethod
    def of(
        cls,
        days: NDArray[np.floating],
        event: NDArray[np.bool_],
        groups: NDArray[np.integer] | None = None,
    ) -> Pairs:
        """Return the pairs of `days` (n,), `event` (n,), within `groups` (n,) where given."""
        died = np.flatnonzero(event)
        then = days[died, None]
        pairs = cls(died, (then < days[None, :]) | ((then == days[None, :]) & ~event[None, :]))
        return pairs if groups is None else pairs.inside(groups)

    @property
    def count(self) -> int:
        """The number of comparable pairs."""
        return int(self.earlier.sum())

    def within(self, keep: NDArray[np.bool_]) -> Pairs:
        """Return the pairs whose both patients are kept; `keep` (n,)."""
        kept = keep[self.died]
        return Pairs(self.died[kept], self.earlier[kept] & keep[None, :])

    def inside(self, groups: NDArray[np.integer]) -> Pairs:
        """Return the pairs whose both patients are of the same group; `groups` (n,)."""
        return Pairs(self.died, self.earlier & (groups[self.died, None] == groups[None, :]))

    def credit(self, risk: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return the (d, n) credit of each pair: 1 concordant, one half tied, else 0."""
        difference = risk[self.died, None].astype(np.float64) - risk[None, :]
        credit = (difference > TIE).astype(np.float32)
        credit[np.abs(difference) <= TIE] = 0.5
        credit *= self.earlier
        return credit

    def margins(self, matrix: NDArray[np.float32] | NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return row sum plus column sum of each patient, (n,), of a (d, n) matrix."""
        margins: NDArray[np.float64] = matrix.sum(0, dtype=np.float64)
        margins[self.died] += matrix.sum(1, dtype=np.float64)
        return margins

    def weighted(
        self, weights: NDArray[np.float32], matrix: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Return the sum over pairs of w_i M_ij w_j, (r,), for patient weights (r, n)."""
        product: NDArray[np.float64] = ((weights[:, self.died] @ matrix) * weights).sum(
            1, dtype=np.float64
        )
        return product


def concordance(
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    risk: NDArray[np.floating],
    groups: NDArray[np.integer] | None = None,
) -> Estimate:
    """Return Harrell's C-index and its standard error, without an interval.

    Args:
        days: (n,) time of death or last follow-up.
        event: (n,) True for a death.
        risk: (n,) higher dies earlier.
        groups: (n,) only pairs of the same group count.

    References:
        Harrell et al., JAMA 247(18), 1982; infinitesimal jackknife: Efron, 1982.
    """
    return concordance_of(Pairs.of(days, event, groups), risk)


def concordance_of(pairs: Pairs, risk: NDArray[np.floating]) -> Estimate:
    """Return the C-index of `risk` (n,) over `pairs` and its standard error."""
    total = pairs.count
    if total == 0:
        return Estimate(c_index=None)
    c_index, influence = _influence(pairs, risk)
    return Estimate(c_index=c_index, se=float(np.sqrt((influence**2).sum())), pairs=total)


def paired_difference(
    pairs: Pairs, risk: NDArray[np.floating], other: NDArray[np.floating]
) -> tuple[float, float]:
    """Return C(risk) - C(other) on the same patients and the standard error of the difference.

    Raises:
        NotEstimableError: no pair is comparable.
    """
    if pairs.count == 0:
        raise NotEstimableError("concordance", "no pair of patients is comparable")
    c_index, influence = _influence(pairs, risk)
    c_other, influence_other = _influence(pairs, other)
    return c_index - c_other, float(np.sqrt(((influence - influence_other) ** 2).sum()))


def leads(
    pairs: Pairs, risks: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the C-index (k,) of k risks (k, n) and the standard errors (k,) of their leads.

    A lead is a C-index less the mean of all k. All are judged on the same patients, so most of
    their error is shared, and a lead is known far better than the C-index itself. Both are nan
    where no pair is comparable.
    """
    if pairs.count == 0:
        return np.full(len(risks), np.nan), np.full(len(risks), np.nan)
    both = [_influence(pairs, risk) for risk in risks]
    influence = np.stack([one for _, one in both])  # (k, n)
    error = np.sqrt(((influence - influence.mean(0)) ** 2).sum(1))
    return np.array([c_index for c_index, _ in both]), error


def over_controls(
    pairs: Pairs, risks: NDArray[np.floating], controls: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the lead (s,) of s risks (s, n) over r controls (r, n), and its standard error.

    A lead is a C-index less the controls' mean. Its error is that of the patients, paired, and
    how much one control differs from another: a risk that is no more than one more draw of the
    controls leads them by more than 1.96 errors in about 5 % of cases. Nan where no pair is
    comparable.
    """
    if pairs.count == 0:
        return np.full(len(risks), np.nan), np.full(len(risks), np.nan)
    theirs = [_influence(pairs, risk) for risk in controls]
    level = np.array([c_index for c_index, _ in theirs])
    common = np.mean([influence for _, influence in theirs], axis=0)
    ours = [_influence(pairs, risk) for risk in risks]
    drawn = float(level.var(ddof=1)) * (1 + 1 / len(level)) if len(level) > 1 else 0.0
    lead = np.array([c_index for c_index, _ in ours]) - level.mean()
    patients = [float(((influence - common) ** 2).sum()) for _, influence in ours]
    return lead, np.sqrt(np.array(patients) + drawn)


def bootstrap(
    pairs: Pairs, risks: NDArray[np.floating], *, seed: int, replicates: int = REPLICATES
) -> NDArray[np.float64]:
    """Return C-indices (replicates, k) of k risks (k, n) on the same resampled patients.

    Paired: row r of two columns is the same draw, so that their difference has an interval.
    A replicate without a comparable pair is nan.
    """
    n = risks.shape[1]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates)
    weights = draws.astype(np.float32)
    comparable = pairs.weighted(weights, pairs.earlier.astype(np.float32))
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = [pairs.weighted(weights, pairs.credit(risk)) / comparable for risk in risks]
    return np.stack(columns, axis=1)


def interval(replicates: NDArray[np.floating]) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of bootstrap `replicates` (r,), nan left out."""
    known = replicates[np.isfinite(replicates)]
    if known.size < replicates.size / 2:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def out_of_fold(
    days: NDArray[np.floating],
    event: NDArray[np.bool_],
    folds: NDArray[np.integer],
    risks: Mapping[Arm, NDArray[np.float64]],
    *,
    seed: int,
    controls: Sequence[Arm] = (),
    replicates: int = REPLICATES,
) -> dict[Arm, Estimate]:
    """Return what is known of each arm's out-of-fold risk (n,), the first arm being the baseline.

    The C-index is over pairs within a fold; an interval is given where at least half of the
    bootstrap draws hold a comparable pair. Gains over the first arm, and differences from the
    arms that are controls, are on the same draws.
    """
    whole = Pairs.of(days, event)
    within = whole.inside(folds)
    names = list(risks)
    points = {name: concordance_of(within, risks[name]) for name in names}
    if within.count == 0:
        return points
    draws = bootstrap(within, np.stack([risks[n] for n in names]), seed=seed, replicates=replicates)
    result = {}
    for name, column in zip(names, draws.T, strict=True):
        point = points[name]
        low, high = interval(column) or (None, None)
        leads_over = {
            other: lead
            for other in (names[0], *controls)
            if other != name and (lead := _difference(draws, points, names, name, other))
        }
        gain = leads_over.get(names[0])
        of_folds = [
            concordance_of(within.within(folds == fold), risks[name]).c_index
            for fold in np.unique(folds)
        ]
        known = [value for value in of_folds if value is not None]
        result[name] = replace(
            point,
            low=low,
            high=high,
            fold_mean=float(np.mean(known)),
            pooled=concordance_of(whole, risks[name]).c_index,
            gain=_lead(points, name, names[0]),
            gain_se=gain.se if gain else None,
            gain_low=gain.low if gain else None,
            gain_high=gain.high if gain else None,
            against={other: lead for other, lead in leads_over.items() if other in controls},
        )
    return result


def _lead(points: Mapping[Arm, Estimate], name: Arm, other: Arm) -> float | None:
    ours, theirs = points[name].c_index, points[other].c_index
    return None if ours is None or theirs is None else ours - theirs


def _difference(
    draws: NDArray[np.float64],
    points: Mapping[Arm, Estimate],
    names: Sequence[Arm],
    name: Arm,
    other: Arm,
) -> Difference | None:
    """Return one arm's lead over another from their bootstrap draws, None without an interval."""
    lead = _lead(points, name, other)
    column = draws[:, names.index(name)] - draws[:, names.index(other)]
    ends = interval(column)
    if lead is None or ends is None:
        return None
    return Difference(value=lead, se=float(np.nanstd(column)), low=ends[0], high=ends[1])


def _influence(pairs: Pairs, risk: NDArray[np.floating]) -> tuple[float, NDArray[np.float64]]:
    """Return the C-index and its derivative by each patient's weight, (n,)."""
    total = pairs.count
    credit = pairs.credit(risk)
    c_index = float(credit.sum(dtype=np.float64) / total)
    return c_index, (pairs.margins(credit) - c_index * pairs.margins(pairs.earlier)) / total
