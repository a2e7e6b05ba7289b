"""Sites that answer by hand, for tests of the study without any site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from cropkt.cancers import Cancer
from cropkt.messages import (
    CohortCount,
    DescribeReply,
    ExpertReply,
    ExpertRequest,
    Message,
    ReleaseReply,
    RouterReply,
    RouterRequest,
    Score,
    TransferReply,
    TransferRequest,
)
from cropkt_server.store import Task


class Sites:
    """Answers as sites would, with weights that tell who made them."""

    def __init__(self, holdings: Mapping[str, Sequence[Cancer]]) -> None:
        self.holdings = dict(holdings)

    def answer(self, task: Task, request: Message) -> Message:
        """Return the site's answer to one row."""
        if task.cancer is None:
            counts = [
                CohortCount(cancer=cancer, patients=100, events=10, dim=8)
                for cancer in self.holdings[task.site]
            ]
            return DescribeReply(task=request.task, site=task.site, cohorts=tuple(counts))
        cancer, mark = task.cancer, float(sum(task.site.encode()))
        if isinstance(request, ExpertRequest):
            return ExpertReply(
                task=task.id,
                cancer=cancer,
                patients=100,
                events=10,
                weights=np.full((7 if request.shared else 1, 4), mark, dtype=np.float32),
                score=Score(c_index=0.6, se=0.05),
                seconds=1.0,
            )
        if isinstance(request, TransferRequest):
            row = tuple(Score(c_index=0.6, se=0.02) for _ in request.sources)
            return TransferReply(
                task=task.id, cancer=cancer, scores=row, training_scores=(row,) * 3, seconds=1.0
            )
        if isinstance(request, RouterRequest):
            weights = np.full((4 if request.shared else 1, 5), mark, dtype=np.float32)
            return RouterReply(task=task.id, cancer=cancer, events=10, weights=weights, seconds=1.0)
        return ReleaseReply(
            task=task.id,
            cancer=cancer,
            patients=100,
            events=10,
            arms={},
            routing={cancer: 1.0},
            zero_shot_choice={},
            seconds=1.0,
        )


@pytest.fixture
def sites() -> Sites:
    """Four hospitals; a and d hold the same cancer."""
    uvm, skcm, kipan = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN
    return Sites({"a": [uvm], "b": [skcm], "c": [kipan], "d": [uvm]})
