"""Takes revoked experts out of a study's rows, wherever those are not finished.

An expert that was not averaged yet is put away, and its row fails. Rows that were asked about a
revoked expert and did not succeed are asked again without it; a router that used one is trained
again, unless its target was evaluated already: that one is only listed. Of a shared cancer all
sites then train again, because routers of one average know the same sources.
"""

from __future__ import annotations

from cropkt.cancers import Cancer
from cropkt.messages import ExpertReply
from cropkt_server.findings import Findings
from cropkt_server.questions import Questions
from cropkt_server.store import Task

CAUSE = "its expert was revoked"
NOTHING_LEFT = "every expert that it could be asked about was revoked"
UNDER_WAY = ("sent", "held")


class Revocation:
    """Applies what was revoked to one study's rows."""

    def __init__(self, findings: Findings, questions: Questions) -> None:
        self._findings, self._questions, self._store = findings, questions, findings.store

    def apply(self) -> bool:
        """Bring the rows in line with what is revoked by now; return whether any changed."""
        revoked = self._questions.withdrawn = self._store.bank.revoked()
        if not revoked:
            return False
        changed = [self._route_again(cancer, revoked) for cancer in self._findings.holders()]
        for task in self._store.tasks():
            if task.state == "done" and self._not_averaged(task, revoked):
                self._store.quarantine(task, CAUSE)
            elif task.state == "due" and (cause := self._hopeless(task)):
                self._store.failed(task, cause)
            elif self._failed_with(task, revoked):
                self._store.bank.use(task.id, {})
                self._store.due(task)
            else:
                continue
            changed.append(True)
        return any(changed)

    def _route_again(self, cancer: Cancer, revoked: frozenset[str]) -> bool:
        tasks = [task for task in self._store.tasks() if task.cancer == cancer]
        routers = [task for task in tasks if task.kind == "fit_router"]
        finals = [task for task in tasks if task.kind == "evaluate"]
        used = any(self._used(task, revoked) for task in routers if task.state != "due")
        evaluated = bool(finals) and all(task.state == "done" for task in finals)
        under_way = any(task.state in UNDER_WAY for task in routers + finals)
        if not used or evaluated or under_way:
            return False
        for number in range(self._findings.last_round(cancer) + 1):
            self._findings.undecide(f"averaged/fit_router/{cancer}/{number}")
        for task in routers:
            self._store.bank.use(task.id, {})
        first = [task for task in routers if task.round == 0]
        self._store.restart(first, without=[t for t in routers + finals if t not in first])
        self._questions.forget(cancer)
        return True

    def _not_averaged(self, task: Task, revoked: frozenset[str]) -> bool:
        """Return whether a row brought a revoked expert, on which nothing rests yet."""
        if task.kind != "fit_expert" or task.cancer is None:
            return False
        if self._findings.averaged("fit_expert", task.cancer, task.round) is not None:
            return False
        signed = self._findings.answer(task, ExpertReply).signed
        return signed is not None and signed.hash in revoked

    def _hopeless(self, task: Task) -> str:
        """Return why a row that is due cannot be asked any more; nothing if it can."""
        cancer = task.cancer
        if cancer is None or task.kind in ("describe", "evaluate"):
            return ""
        if task.kind == "fit_expert":
            began = task.round and self._questions.revoked(cancer, task.round - 1)
            return CAUSE if began else ""
        last = self._findings.last_round(cancer)
        if self._findings.shared(cancer) and self._questions.revoked(cancer, last):
            return CAUSE
        return "" if self._questions.offered(cancer) else NOTHING_LEFT

    def _failed_with(self, task: Task, revoked: frozenset[str]) -> bool:
        failed = task.kind == "score_sources" and task.state == "failed"
        return failed and self._used(task, revoked)

    def _used(self, task: Task, revoked: frozenset[str]) -> bool:
        return not revoked.isdisjoint(self._store.bank.used(task.id).values())
