"""The only way out of a hospital.

    request -> admit -> work -> answer -> release: contract, policy, approval -> ledger -> Flower

Every reply that Flower carries is made here. It is a message of the contract, checked field by
field as if a stranger had made it, within this site's policy, and on disk in the ledger before
Flower gets it. Whatever is missing (a policy, an approval, room for the ledger) keeps an answer
here; what leaves instead is a code that says nothing of the data, or nothing.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Error
from flwr.app import Message as FlowerMessage

from cropkt.cancers import Cancer
from cropkt.errors import BudgetError, CropktError, MessageError, RefusedError
from cropkt.messages import Code, Failure, HeldRequest, Message
from cropkt.wire import payload, to_record
from cropkt_client import policy
from cropkt_client.budget import Budget
from cropkt_client.held import Held, Question, Shelf
from cropkt_client.ledger import Entry, Ledger, recipient
from cropkt_client.policy import AuditRefusedError, SuppressedError
from cropkt_client.settings import ReleasePolicy, read_settings

log = logging.getLogger("cropkt.client")

FOREIGN = "not the bundle of this version of cropkt"
_REASON = re.compile(rf"{FOREIGN}|reference [0-9a-f]{{8}}")  # all that a Flower error may say
_CODE_ONLY = "a code and a reference, no text"
Spent = Callable[[Cancer], float | None]


class Gate:
    """The gate of one site.

    Args:
        site: its name.
        state: its state folder, where ledger, keys and held answers lie.
        release: its policy. None: only failures leave.
        spent: returns the epsilon spent on a cohort so far, None without differential privacy.
        budget: of its cohorts, if the site is private: then only what it has paid for leaves.
    """

    def __init__(
        self,
        *,
        site: str,
        state: Path,
        release: ReleasePolicy | None = None,
        spent: Spent = lambda _: None,
        budget: Budget | None = None,
    ) -> None:
        self._site, self._policy, self._spent = site, release, spent
        self._paid = None if budget is None else budget.has_paid
        self._study, self._recipient = recipient(state)
        self._ledger, self._shelf = Ledger(state), Shelf(state)

    @classmethod
    def of(cls, config: Path, *, spent: Spent = lambda _: None) -> Gate:
        """Return the gate of the site whose `site.yaml` is `config`.

        Raises:
            ConfigError: the file, or the site's enrolment, is damaged.
        """
        settings = read_settings(config)
        return cls(
            site=settings.site,
            state=config.parent / settings.state,
            release=settings.release,
            spent=spent,
            budget=Budget.of(config.parent, settings),
        )

    def admit(self, request: Message) -> None:
        """Let a request pass whose answer may leave; before any work for it.

        Raises:
            MessageError: it is no request.
            RefusedError: the policy is missing, or does not allow it.
        """
        policy.admit(self._policy, policy.question(request))

    def release(self, answer: Message, request: Message, *, to: FlowerMessage) -> FlowerMessage:
        """Return the reply that carries what of an answer may leave, or a code in its place.

        Args:
            answer: of this site's task.
            request: that it answers.
            to: the Flower message that brought the request.
        """
        try:
            asked = policy.question(request)
            rules = policy.admit(self._policy, asked)
            answer, checked = policy.within(rules, answer, asked, site=self._site, paid=self._paid)
            epsilon = self._epsilon(asked)
        except CropktError as error:
            log.error("%s: the answer stays here: %s", request.task, error)
            return self.fail(request.task, _code(error), to=to)
        reply = FlowerMessage(to_record(answer), reply_to=to)
        if rules.approval == "auto":
            return self._leave(
                reply, asked, checked=checked, approved="by the policy", epsilon=epsilon
            )
        measured, now = payload(reply), time.time()
        held = Held(
            question=asked,
            study=self._study,
            recipient=self._recipient,
            bytes=measured.bytes,
            sha256=measured.sha256,
            checked=checked,
            policy=policy.version(rules),
            since=now,
        )
        held = self._shelf.put(held, answer)
        if held.since == now:
            text = "%s waits for approval: cropkt-client release show %s"
            log.warning(text, request.task, held.id)
        return self._decided(held, reply, to, epsilon)

    def again(self, request: HeldRequest, *, to: FlowerMessage) -> FlowerMessage:
        """Return what became of the answer that is held for a task."""
        held = self._shelf.of_task(request.task)
        try:
            if held is None:
                raise MessageError(request.task, "no answer to it is held")
            rules = policy.admit(self._policy, held.question)
            if (held.study, held.recipient) != (self._study, self._recipient):
                raise MessageError(request.task, "it is held for somebody else")
            if policy.version(rules) != held.policy:
                raise MessageError(request.task, "the policy has changed since it was held")
            answer = self._shelf.answer(held)
            if self._paid is not None:  # the site may have become private since
                policy.private(answer, self._paid)
            epsilon = self._epsilon(held.question)
        except MessageError:
            return self.fail(request.task, "not_held", to=to)  # it comes again in full
        except CropktError as error:
            log.error("%s: the answer stays here: %s", request.task, error)
            return self.fail(request.task, _code(error), to=to)
        reply = FlowerMessage(to_record(answer), reply_to=to)
        return self._decided(held, reply, to, epsilon)

    def fail(
        self,
        task: str,
        code: Code,
        *,
        to: FlowerMessage,
        reference: str = "",
        approved: str = "needs no approval",
    ) -> FlowerMessage:
        """Return a reply that says only that there is no answer, and by a code why."""
        failure = Failure(task=task, code=code, site=self._site, reference=reference)
        reply = FlowerMessage(to_record(failure), reply_to=to)
        return self._record(
            reply, task=task, message=f"failure {code}", checked=_CODE_ONLY, approved=approved
        )

    def error(self, code: int, reason: str, *, to: FlowerMessage) -> FlowerMessage:
        """Return a Flower error, for a message that names no task.

        Raises:
            MessageError: the reason is none of the two that there are.
        """
        if not _REASON.fullmatch(reason):
            raise MessageError("gate", "the reason of an error is not a template")
        return self._record(
            FlowerMessage(Error(code, reason), reply_to=to),
            task="",
            message=f"error {code}",
            checked=_CODE_ONLY,
            approved="needs no approval",
        )

    def passed(self, reply: FlowerMessage) -> bool:
        """Return whether a reply went through the gate: whether the ledger has its payload."""
        try:
            measured = payload(reply)
        except MessageError:
            return False
        return self._ledger.knows(measured.sha256, measured.bytes)

    def _epsilon(self, asked: Question) -> float | None:
        return None if asked.cancer is None else self._spent(asked.cancer)

    def _decided(
        self, held: Held, reply: FlowerMessage, to: FlowerMessage, epsilon: float | None
    ) -> FlowerMessage:
        task = held.question.task
        if held.decision == "waiting":
            return self.fail(task, "awaiting_approval", to=to)
        if held.decision == "refused":
            return self.fail(task, "refused_release", to=to, approved=f"refused by {held.by}")
        return self._leave(
            reply,
            held.question,
            checked=held.checked,
            approved=f"approved by {held.by}",
            epsilon=epsilon,
        )

    def _leave(
        self,
        reply: FlowerMessage,
        asked: Question,
        *,
        checked: str,
        approved: str,
        epsilon: float | None,
    ) -> FlowerMessage:
        return self._record(
            reply,
            task=asked.task,
            message=asked.kind,
            checked=checked,
            approved=approved,
            epsilon=epsilon,
        )

    def _record(
        self,
        reply: FlowerMessage,
        *,
        task: str,
        message: str,
        checked: str,
        approved: str,
        epsilon: float | None = None,
    ) -> FlowerMessage:
        """Write the ledger's row of a reply, then hand the reply out."""
        measured = payload(reply)
        self._ledger.append(
            Entry(
                study=self._study,
                task=task,
                message=message,
                recipient=self._recipient,
                bytes=measured.bytes,
                sha256=measured.sha256,
                checked=checked,
                approved=approved,
                epsilon=epsilon,
            )
        )
        return reply


def _code(error: CropktError) -> Code:
    if isinstance(error, SuppressedError):
        return "suppressed"
    if isinstance(error, AuditRefusedError):
        return "audit"
    if isinstance(error, BudgetError):
        return "budget"
    return "policy" if isinstance(error, RefusedError) else "internal"
