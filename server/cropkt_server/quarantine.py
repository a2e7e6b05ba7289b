"""Applies the admission checks to a study's rows, and keeps apart what does not pass.

A model in quarantine is stored and sent to nobody; its row has failed, with the cause. What was
decided is read from the table, so a coordinator that was killed decides the same again.
`cropkt-server retry` asks the site again; `cropkt-server admit` takes the very model that lies in
quarantine, if the site sends it again.
"""

from __future__ import annotations

from collections.abc import Iterable

from cropkt.cancers import Cancer
from cropkt.experts.card import read_card
from cropkt.messages import (
    CohortCount,
    ExpertReply,
    ExpertRequest,
    FedAvgReply,
    FedAvgRequest,
    Message,
    RouterReply,
    RouterRequest,
)
from cropkt_server.admission import ENOUGH, Admission, Portrait, copy_of, outliers
from cropkt_server.findings import Findings
from cropkt_server.questions import Questions
from cropkt_server.store import Task, digest_of

Reply = ExpertReply | RouterReply | FedAvgReply
CAUSE = "quarantined: "
SUPPRESSED = 100  # patients, where a site does not say how many
SURPLUS = 10  # events that a reply may count beyond one and a half times those described


class Quarantine:
    """The admission of one study's experts and routers."""

    def __init__(self, findings: Findings, questions: Questions) -> None:
        self._findings, self._questions, self._store = findings, questions, findings.store
        self._admission = Admission(study=findings.config)
        self._portraits: dict[str, Portrait] = {}
        self.put_away = 0  # rows, since this process began

    def takes(self, task: Task, reply: Message) -> bool:
        """Return whether a reply may be used; if not, keep it apart and fail its row."""
        if not isinstance(reply, ExpertReply | RouterReply | FedAvgReply):
            return True
        self._portraits.pop(task.id, None)
        request = self._questions.of(task)
        cause = self._form(reply, request)
        if not cause and not self._admitted(task, reply):
            cause = self._objection(task, reply, request)
        if cause:
            self._store.quarantine(task, CAUSE + cause, reply)
            self.put_away += 1
        return not cause

    def thins_round(self, tasks: Iterable[Task]) -> bool:
        """Put away experts of a round, about to be averaged, that lie far from others; say if any.

        It is asked when the average is decided, of all experts of that round that are there then.
        """
        mine = {task.id: task for task in tasks if task.kind == "fit_expert"}
        if len(mine) < 2:
            return False  # an expert that is averaged with none is looked at with the bank
        number = next(iter(mine.values())).round
        rows = [task for task in self._done() if task.round == number]
        if len(rows) < ENOUGH:
            return False
        found = outliers({task.id: self._portrait(task) for task in rows})
        put = [self._put_away([mine[name]], found[name]) for name in found if name in mine]
        return any(put)

    def thins_bank(self) -> bool:
        """Put away experts of cancers, about to enter the bank, that lie far from others.

        Those of as many rounds are compared. An average is put away with all that it is made of.
        """
        bank, before = self._findings.bank(), self.put_away
        for number in {self._findings.last_round(cancer) for cancer in bank}:
            alike = [cancer for cancer in bank if self._findings.last_round(cancer) == number]
            if len(alike) < ENOUGH:
                continue
            weights = self._questions.experts(alike)
            portraits = {
                str(cancer): self._admission.portrait(row)
                for cancer, row in zip(alike, weights, strict=True)
            }
            for name, cause in outliers(portraits).items():
                self._out_of_bank(Cancer(name), number, cause)
        return self.put_away > before

    def _out_of_bank(self, cancer: Cancer, number: int, cause: str) -> None:
        averaged = f"averaged/fit_expert/{cancer}/{number}"
        sites = self._findings.decided(averaged) or ()
        tasks = [Task(kind="fit_expert", site=s, cancer=cancer, round=number) for s in sites]
        if self._put_away(tasks, cause):
            # Nothing rests on this average yet: it is made anew of what comes.
            self._findings.undecide(averaged)
            self._questions.forget(cancer)

    def _put_away(self, tasks: Iterable[Task], cause: str) -> bool:
        """Put stored experts into quarantine, unless somebody admitted them; return if any."""
        tasks = [t for t in tasks if not self._admitted(t, self._stored(t))]
        for task in tasks:
            self._store.quarantine(task, CAUSE + cause)
        self.put_away += len(tasks)
        return bool(tasks)

    def _form(self, reply: Reply, request: Message) -> str:
        """Return why a reply's weights are none of this study's; this cannot be overruled."""
        if isinstance(reply, ExpertReply) and isinstance(request, ExpertRequest):
            return self._admission.expert_form(reply.weights, shared=request.shared)
        if isinstance(reply, FedAvgReply):
            return self._admission.fold_models_form(reply.weights)
        if isinstance(reply, RouterReply) and isinstance(request, RouterRequest):
            if not request.shared:
                return "" if reply.weights is None else "it holds routers that nobody averages"
            if reply.weights is None:
                return "it has no routers to average"
            return self._admission.router_form(reply.weights, sources=len(request.sources))
        return ""

    def _objection(self, task: Task, reply: Reply, request: Message) -> str:
        described = self._described(task)
        events = described.events
        if events is not None and (reply.events or 0) > 1.5 * events + SURPLUS:
            return f"it counts {reply.events} events, its site described {events}"
        patients = SUPPRESSED if described.patients is None else described.patients
        if reply.weights is None:
            return ""
        if isinstance(request, RouterRequest):
            sent = (request.weights, request.own, request.routers)
            return self._admission.router(reply.weights, patients=patients, sent=sent)
        if isinstance(request, FedAvgRequest):
            return self._admission.travel(reply.weights, patients=patients, start=request.weights)
        if not isinstance(request, ExpertRequest) or not isinstance(reply, ExpertReply):
            return ""
        start = request.weights
        private = reply.signed is not None and read_card(reply.signed.card).epsilon is not None
        cause = self._admission.expert(
            reply.weights, patients=patients, start=start, private=private
        )
        if cause:
            return cause
        row = self._admission.sent(reply.weights)
        mine = self._admission.portrait(reply.weights[row], None if start is None else start[row])
        return copy_of(mine, {other.id: self._portrait(other) for other in self._done()})

    def _described(self, task: Task) -> CohortCount:
        cohorts = self._findings.descriptions()[task.site].cohorts
        return next(count for count in cohorts if count.cancer == task.cancer)

    def _done(self) -> list[Task]:
        tasks = self._store.tasks()
        return [task for task in tasks if task.kind == "fit_expert" and task.state == "done"]

    def _stored(self, task: Task) -> ExpertReply:
        return self._findings.answer(task, ExpertReply)

    def _portrait(self, task: Task) -> Portrait:
        if task.id not in self._portraits:
            weights = self._stored(task).weights
            row = weights[self._admission.sent(weights)]
            self._portraits[task.id] = self._admission.portrait(row)
        return self._portraits[task.id]

    def _admitted(self, task: Task, reply: Reply) -> bool:
        """Return whether the coordinator overruled the quarantine of exactly this model."""
        return self._store.admitted(task) == digest_of(reply)
