"""Who receives what: a pure function of the scores that the sites sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cropkt.cancers import Cancer
from cropkt.survival.metrics import Estimate
from cropkt.transfer.scores import shrunken


def sources_for(scores: Mapping[Cancer, Sequence[Estimate]], *, limit: int) -> tuple[Cancer, ...]:
    """Return the experts that a target's router may use, in alphabetical order.

    A source is kept if it is among the best `limit` for at least one fold, judged by the
    shrunken C-index on the training patients of that fold alone.

    Args:
        scores: per source, its score on the training patients of each fold.
        limit: experts a fold.
    """
    sources = sorted(scores)
    if len(sources) <= limit:
        return tuple(sources)
    kept: set[Cancer] = set()
    for of_fold in zip(*(scores[source] for source in sources), strict=True):
        value = shrunken(
            np.array([np.nan if s.c_index is None else s.c_index for s in of_fold]),
            np.array([s.se or 0.0 for s in of_fold]),
        )
        kept.update(sorted(sources, key=lambda s: (-value[sources.index(s)], s))[:limit])
    return tuple(sorted(kept))
