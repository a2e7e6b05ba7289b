"""Fixed time bins: 32 bins of 365 days, the last one open.

Fixed bins carry no patient data to the coordinator; quantile bins would (arXiv 2508.13482).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 32
BIN_DAYS = 365


def bin_ends(bins: int) -> NDArray[np.float64]:
    """Return the last day of each of `bins` time bins, (T,)."""
    ends: NDArray[np.float64] = BIN_DAYS * np.arange(1.0, bins + 1)
    return ends


def time_bins(
    days: NDArray[np.floating], *, bins: int = BINS, width: int = BIN_DAYS
) -> NDArray[np.int64]:
    """Return the bin of each time. `days` (n,), positive; the result (n,) lies in [0, bins)."""
    bin_of: NDArray[np.int64] = np.minimum(days // width, bins - 1).astype(np.int64)
    return bin_of
