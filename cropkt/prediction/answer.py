"""What a released model answers for one patient.

Shapes: N patches of the patient's bag, T yearly bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from cropkt.cancers import Cancer
from cropkt.prediction.kept import Which
from cropkt.survival.accuracy import YEARS

FEWEST = 10  # training patients still followed, below which a probability is marked as thin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Voice:
    """One expert that spoke for a patient."""

    cancer: Cancer
    own: bool
    weight: float  # in the answer
    risk: float  # of this patient, in standard deviations of the training cohort
    attention: NDArray[np.float64]  # (N,) sums to 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probability:
    """Survival to one time, with its interval; None where nobody was followed so long."""

    years: int
    value: float | None
    low: float | None
    high: float | None
    followed: int  # training patients who were followed so long

    @property
    def thin(self) -> bool:
        """Whether so few were followed that the figure is hardly more than a guess."""
        return self.followed < FEWEST


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What one model says of one patient."""

    model: Which
    fold: int | None  # of a training patient: the one whose models answered
    risk: float  # higher dies earlier; has a meaning within this model alone
    percentile: float  # of the training cohort's out-of-fold risks that are lower
    high: bool  # above the cohort's median
    same_side: int  # of the fold models' answers, how many lie on the same side of the median
    versions: int  # of how many
    survival: NDArray[np.float64]  # (T,) at the end of each year
    low: NDArray[np.float64]  # (T,) interval; nan where there is none
    high_end: NDArray[np.float64]  # (T,)
    followed: tuple[int, ...]  # (T) training patients followed to the end of each year
    voices: tuple[Voice, ...]  # the largest weight first
    attention: NDArray[np.float64]  # (N,) of the answer: the experts', by their weights
    agreement: float | None  # mean rank correlation of the experts' attention, by pairs

    @property
    def horizon(self) -> int:
        """Years to whose end a training patient was followed."""
        return max((year for year, n in enumerate(self.followed, start=1) if n), default=0)

    @property
    def group(self) -> str:
        """Risk group against the training cohort."""
        return "high" if self.high else "low"

    def probabilities(self) -> tuple[Probability, ...]:
        """Return survival to 1, 3 and 5 years."""
        return tuple(self._at(year) for year in YEARS)

    def _at(self, years: int) -> Probability:
        followed = self.followed[years - 1] if years <= len(self.followed) else 0
        if not followed:
            return Probability(years=years, value=None, low=None, high=None, followed=0)
        value, low, high = (
            float(row[years - 1]) for row in (self.survival, self.low, self.high_end)
        )
        known = np.isfinite([low, high]).all()
        return Probability(
            years=years,
            value=value,
            low=low if known else None,
            high=high if known else None,
            followed=followed,
        )


def agreement(attention: list[NDArray[np.float64]]) -> float | None:
    """Return the mean Spearman correlation over pairs of experts' attention (N,) each.

    None for fewer than two experts or three patches, or where all look alike at everything.
    """
    if len(attention) < 2 or len(attention[0]) < 3:
        return None
    ranks = np.stack([rankdata(row) for row in attention])
    ranks = ranks[ranks.std(1) > 0]
    if len(ranks) < 2:
        return None
    return float(np.corrcoef(ranks)[np.triu_indices(len(ranks), 1)].mean())
