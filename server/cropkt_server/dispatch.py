"""Carries a study's tasks over a Flower grid.

One message a site at a time and a bound on the bytes under way; every reply is stored before it
is acted on; a lost message is sent again with the same task, and a site that does not answer
costs only its own rows.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from flwr.app import Message as FlowerMessage
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from cropkt.errors import MessageError
from cropkt.messages import REPLIES, DescribeReply, DescribeRequest, Failure, Message
from cropkt.wire import from_record, to_record
from cropkt_server.store import Task
from cropkt_server.study import MESSAGE_TYPES, Study

log = logging.getLogger("cropkt.server")

MAX_UNDER_WAY = 1 << 30  # bytes of weights in messages not yet answered
TTL = 24 * 3600.0  # seconds a message may wait for its site
LOST = frozenset(
    {
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
        ErrorCode.LOAD_CLIENT_APP_EXCEPTION,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderWay:
    """A message that was sent: to which node, for which row, how large."""

    node: int
    task: Task | None  # None: asks an unknown node who it is
    size: int


class Dispatcher:
    """Sends due rows, pulls replies, until the study is finished."""

    def __init__(self, grid: Grid, study: Study, *, poll: float) -> None:
        self._grid, self._study, self._poll = grid, study, poll
        self._site_of: dict[int, str] = {}
        self._asked: set[int] = set()
        self._under_way: dict[str, UnderWay] = {}

    def run(self) -> None:
        """Return when no row is due or sent."""
        while not self._study.finished:
            online = sorted(self._grid.get_node_ids())
            self._ask_names(online)
            self._send_due(online)
            if not self._pull():
                time.sleep(self._poll)

    def _ask_names(self, online: list[int]) -> None:
        """Ask nodes that no roster names who they are: only a simulation's nodes may say so."""
        for node in online:
            if node not in self._asked:
                self._asked.add(node)
                request = DescribeRequest(task="describe/any", study=self._study.config)
                self._push(node, request, None)

    def _send_due(self, online: list[int]) -> None:
        busy = {sent.node for sent in self._under_way.values()}
        node_of = {
            self._site_of[node]: node
            for node in online
            if node in self._site_of and node not in busy
        }
        for task in self._study.due():
            node = node_of.get(task.site)
            if node is None or task.kind == "describe":
                continue  # a description comes as the answer of a node that says its name
            if sum(sent.size for sent in self._under_way.values()) > MAX_UNDER_WAY:
                return
            del node_of[task.site]
            self._study.store.sent(task)
            self._push(node, self._study.request(task), task)

    def _push(self, node: int, request: Message, task: Task | None) -> None:
        content = to_record(request)
        kind = MESSAGE_TYPES[task.kind if task else "describe"]
        message = FlowerMessage(
            content, dst_node_id=node, message_type=kind, ttl=TTL, group_id=request.task
        )
        (message_id,) = self._grid.push_messages([message])
        size = sum(
            len(array.data)
            for record in content.array_records.values()
            for array in record.values()
        )
        self._under_way[message_id] = UnderWay(node=node, task=task, size=size)

    def _pull(self) -> bool:
        """Take in what was answered; return whether anything was."""
        if not self._under_way:
            return False
        replies = list(self._grid.pull_messages(list(self._under_way)))
        for reply in replies:
            # An error reply may come from Flower itself: only this id tells what it answers.
            sent = self._under_way.pop(reply.metadata.reply_to_message_id)
            if sent.task is None:
                self._named(sent.node, reply)
            else:
                self._answered(sent.task, reply)
        return bool(replies)

    def _answered(self, task: Task, reply: FlowerMessage) -> None:
        if reply.has_error():
            cause = f"message lost (Flower error {reply.error.code})"
            log.warning("%s: %s", task.id, cause)
            self._study.lost(task, cause, final=reply.error.code not in LOST)
            return
        try:
            answer = from_record(reply.content, expected=REPLIES)
        except MessageError as error:
            log.warning("%s: %s", task.id, error)
            self._study.lost(task, "the reply is not in the contract", final=True)
            return
        self._study.record(task, answer)

    def _named(self, node: int, reply: FlowerMessage) -> None:
        """Learn which site a node is, and take its description."""
        if reply.has_error():
            self._asked.discard(node)
            return
        answer = from_record(reply.content, expected=(DescribeReply, Failure))
        site = answer.site if isinstance(answer, DescribeReply | Failure) else None
        if site is None or site not in self._study.sites:
            log.warning("a node named no site of this study")
            return
        self._site_of[node] = site
        self._study.record(Task(kind="describe", site=site), answer)
