"""What each row asks its site: the same row always the same, whenever it is sent."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cropkt.cancers import Cancer
from cropkt.messages import (
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    TransferReply,
    TransferRequest,
    Weights,
)
from cropkt_server.findings import Findings
from cropkt_server.store import Kind, Task

MESSAGE_TYPES: dict[Kind, str] = {
    "describe": DescribeRequest.kind,
    "fit_expert": ExpertRequest.kind,
    "score_sources": TransferRequest.kind,
    "fit_router": RouterRequest.kind,
    "evaluate": ReleaseRequest.kind,
}
ANSWERS: dict[Kind, type[Message]] = {
    "describe": DescribeReply,
    "fit_expert": ExpertReply,
    "score_sources": TransferReply,
    "fit_router": RouterReply,
    "evaluate": ReleaseReply,
}


class Questions:
    """Makes the messages of a study's rows."""

    def __init__(self, findings: Findings) -> None:
        self._findings, self._study = findings, findings.config
        self._averages: dict[tuple[Kind, Cancer, int], Weights] = {}

    def of(self, task: Task) -> Message:
        """Return the message of a row."""
        if task.kind == "describe" or task.cancer is None:
            return DescribeRequest(task=task.id, study=self._study)
        cancer, shared = task.cancer, self._findings.shared(task.cancer)
        last = self._findings.last_round(cancer)
        if task.kind == "fit_expert":
            return ExpertRequest(
                task=task.id,
                study=self._study,
                cancer=cancer,
                round=task.round,
                shared=shared,
                weights=self._average("fit_expert", cancer, task.round - 1) if task.round else None,
            )
        if task.kind == "score_sources":
            sources = self._findings.others(cancer)
            return TransferRequest(
                task=task.id,
                study=self._study,
                cancer=cancer,
                sources=sources,
                weights=self._experts(sources),
            )
        if task.kind == "fit_router":
            sources = self._findings.sources(cancer)
            return RouterRequest(
                task=task.id,
                study=self._study,
                cancer=cancer,
                round=task.round,
                shared=shared,
                sources=sources,
                weights=self._experts(sources),
                own=self._average("fit_expert", cancer, last) if shared else None,
                routers=self._average("fit_router", cancer, task.round - 1) if task.round else None,
            )
        return ReleaseRequest(
            task=task.id,
            study=self._study,
            cancer=cancer,
            routers=self._average("fit_router", cancer, last) if shared else None,
        )

    def _experts(self, cancers: Iterable[Cancer]) -> Weights:
        """Return the bank's experts as rows (cancers, parameters)."""
        rows = []
        for cancer in cancers:
            stack = self._average("fit_expert", cancer, self._findings.last_round(cancer))
            published = self._study.source == "fold_0" and len(stack) > 1
            rows.append(stack[1 if published else 0])
        return np.stack(rows)

    def _average(self, kind: Kind, cancer: Cancer, number: int) -> Weights:
        """Return the average by events of a round's models, rows (F, parameters)."""
        key = (kind, cancer, number)
        if key not in self._averages:
            sites = self._findings.averaged(*key) or ()
            replies = [
                self._findings.store.reply(Task(kind=kind, site=site, cancer=cancer, round=number))
                for site in sites
            ]
            models = [r for r in replies if isinstance(r, ExpertReply | RouterReply)]
            weight = np.array([float(model.events) for model in models])
            weight = (
                weight / weight.sum() if weight.sum() else np.full(len(models), 1 / len(models))
            )
            total = np.zeros(models[0].weights.shape, dtype=np.float64)
            for share, model in zip(weight, models, strict=True):
                total += share * model.weights
            self._averages[key] = total.astype(np.float32)
        return self._averages[key]
