"""What each row asks its site: the same row always the same, whenever it is sent."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cropkt.cancers import Cancer
from cropkt.errors import MessageError
from cropkt.experts.card import read_card
from cropkt.messages import (
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    FedAvgReply,
    FedAvgRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    Signed,
    TransferReply,
    TransferRequest,
    Weights,
)
from cropkt_server.experts import Experts
from cropkt_server.findings import Findings, shares
from cropkt_server.store import Kind, Task

ANSWERS: dict[Kind, type[Message]] = {
    "describe": DescribeReply,
    "fit_expert": ExpertReply,
    "score_sources": TransferReply,
    "fit_router": RouterReply,
    "fit_fedavg": FedAvgReply,
    "evaluate": ReleaseReply,
}


class Questions:
    """Makes the messages of a study's rows."""

    def __init__(self, findings: Findings) -> None:
        self._findings, self._study = findings, findings.config
        # An average of fold models may be large: the last one is kept, and what is small of all.
        self._last: tuple[tuple[Kind, Cancer, int], Weights] | None = None
        self._everyone: tuple[int, Weights] | None = None
        self._bank: dict[Cancer, Weights] = {}  # (parameters,) each
        self._signed: dict[tuple[Cancer, int], Signed] = {}
        self.signatures = Experts(findings)
        self.withdrawn = findings.store.bank.revoked()  # hashes of experts that nobody is sent

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
                weights=self.average("fit_expert", cancer, task.round - 1) if task.round else None,
                signed=self.signed(cancer, task.round - 1) if task.round else None,
            )
        if task.kind == "score_sources":
            sources = self._findings.asked(task) or self.offered(cancer)
            return TransferRequest(
                task=task.id,
                study=self._study,
                cancer=cancer,
                sources=sources,
                weights=self.experts(sources),
                signed=tuple(self.signed(source) for source in sources),
            )
        if task.kind == "fit_router":
            sources = self._findings.asked(task) or self._chosen(cancer)
            return RouterRequest(
                task=task.id,
                study=self._study,
                cancer=cancer,
                round=task.round,
                shared=shared,
                sources=sources,
                weights=self.experts(sources),
                signed=tuple(self.signed(source) for source in sources),
                own=self.average("fit_expert", cancer, last) if shared else None,
                own_signed=self.signed(cancer) if shared else None,
                routers=self.average("fit_router", cancer, task.round - 1) if task.round else None,
            )
        if task.kind == "fit_fedavg":
            return FedAvgRequest(
                task=task.id,
                study=self._study,
                cancer=cancer,
                round=task.round,
                weights=self.everyone(task.round - 1) if task.round else None,
            )
        return ReleaseRequest(
            task=task.id,
            study=self._study,
            cancer=cancer,
            routers=self.average("fit_router", cancer, last) if shared else None,
            everyone=self.everyone(self._study.fedavg_rounds - 1),
        )

    def everyone(self, number: int) -> Weights | None:
        """Return a round's model of all cancers, (1 + folds, parameters); None without one."""
        tasks = self._findings.trained_everyone(number)
        if not tasks:
            return None
        if self._everyone is None or self._everyone[0] != number:
            self._everyone = None
            self._everyone = number, self._mean(tasks)
        return self._everyone[1]

    def sending(self, task: Task) -> Message:
        """Return the message of a row that is about to be sent, and note what it is asked about."""
        cancer, bank = task.cancer, self._findings.store.bank
        if cancer is not None and task.kind in ("score_sources", "fit_router"):
            transfer = task.kind == "score_sources"
            sources = self.offered(cancer) if transfer else self._chosen(cancer)
            used = {source: self.signed(source).hash for source in sources}
            if not transfer and self._findings.shared(cancer):
                used[cancer] = self.signed(cancer).hash
            bank.use(task.id, used)
        return self.of(task)

    def offered(self, cancer: Cancer) -> tuple[Cancer, ...]:
        """Return the cancers whose experts a target may be asked about: none that is revoked."""
        return tuple(c for c in self._findings.others(cancer) if not self.revoked(c))

    def revoked(self, cancer: Cancer, number: int | None = None) -> bool:
        """Return whether the expert of a cancer's round, of the last by default, is revoked."""
        if not self.withdrawn:
            return False
        signed = self.signed(cancer, number)  # an average may be made only now
        return not self.withdrawn.isdisjoint({signed.hash, *read_card(signed.card).parents})

    def signed(self, cancer: Cancer, number: int | None = None) -> Signed:
        """Return the signed card of the experts of a round, of the last one by default."""
        number = self._findings.last_round(cancer) if number is None else number
        if (cancer, number) not in self._signed:
            average = self.average("fit_expert", cancer, number)
            self._signed[cancer, number] = self.signatures.signed(cancer, number, average)
        return self._signed[cancer, number]

    def _chosen(self, cancer: Cancer) -> tuple[Cancer, ...]:
        """Return the experts that a target's router may use: none that is revoked."""
        return tuple(c for c in self._findings.sources(cancer) if not self.revoked(c))

    def experts(self, cancers: Iterable[Cancer]) -> Weights:
        """Return the bank's experts as rows (cancers, parameters)."""
        return np.stack([self._expert(cancer) for cancer in cancers])

    def _expert(self, cancer: Cancer) -> Weights:
        """Return a cancer's expert in the bank, (parameters,)."""
        if cancer not in self._bank:
            stack = self.average("fit_expert", cancer, self._findings.last_round(cancer))
            published = self._study.source == "fold_0" and len(stack) > 1
            self._bank[cancer] = stack[1 if published else 0].copy()
        return self._bank[cancer]

    def forget(self, cancer: Cancer) -> None:
        """Average a cancer's models anew when they are asked for next."""
        self._last = None
        self._bank.pop(cancer, None)
        self._signed = {key: signed for key, signed in self._signed.items() if key[0] != cancer}

    def average(self, kind: Kind, cancer: Cancer, number: int) -> Weights:
        """Return the average by events of a round's models, rows (F, parameters)."""
        key = (kind, cancer, number)
        if self._last is None or self._last[0] != key:
            self._last = None  # not two of them at once
            self._last = key, self._averaged(*key)
        return self._last[1]

    def _averaged(self, kind: Kind, cancer: Cancer, number: int) -> Weights:
        """Make the average of a cancer's round."""
        sites = self._findings.averaged(kind, cancer, number) or ()
        tasks = [Task(kind=kind, site=site, cancer=cancer, round=number) for site in sites]
        if len(tasks) == 1:  # sent on under its own signature, so to the bit
            return self._models(tasks[0])[0]
        return self._mean(tasks)

    def _mean(self, tasks: list[Task]) -> Weights:
        """Return the mean by events of what rows gave, with one row's models in memory."""
        total = np.zeros(0)
        for share, task in zip(shares([self._models(t)[1] for t in tasks]), tasks, strict=True):
            rows, _ = self._models(task)
            total = total if total.size else np.zeros(rows.shape)
            for sum_of_row, row in zip(total, rows, strict=True):
                sum_of_row += share * row
        return total.astype(np.float32)

    def _models(self, task: Task) -> tuple[Weights, int]:
        """Return the models that a site gave, and the events behind them."""
        reply = self._findings.store.reply(task)
        if not isinstance(reply, ExpertReply | RouterReply | FedAvgReply) or reply.weights is None:
            raise MessageError(task.id, "the stored reply holds no models")
        return reply.weights, reply.events or 0
