"""Fixed time bins: 32 bins of 365 days, the last one open.

Fixed bins carry no patient data to the coordinator; quantile bins would (arXiv 2508.13482).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 32
BIN_DAYS = 365


def time_bins(
    days: NDArray[np.floating], *, bins: int = BINS, width: int = BIN_DAYS
) -> NDArray[np.int64]:
    """Return the bin of each time. `days` (n,), positive; the result (n,) lies in [0, bins)."""
    bin_of: NDArray[np.int64] = np.minimum(days // width, bins - 1).astype(np.int64)
    return bin_of
