"""Carries a study's tasks over a Flower grid.

One message a site at a time and a bound on the bytes under way; every reply is stored before it
is acted on; a lost message is sent again with the same task, and a site that does not answer
costs only its own rows. Nodes that are no site of the study are not spoken to.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from cropkt.errors import MessageError
from cropkt.messages import (
    MAX_TEXT,
    PROTOCOL,
    REPLIES,
    DescribeReply,
    DescribeRequest,
    Failure,
    HeldRequest,
    Message,
)
from cropkt.wire import from_record, to_record
from cropkt_server.membership import Membership, Named
from cropkt_server.store import Task
from cropkt_server.study import Study

log = logging.getLogger("cropkt.server")

MAX_UNDER_WAY = 1 << 33  # bytes of weights in messages not yet answered, which lie on disk
TTL = 24 * 3600.0  # seconds a message may wait for its site
AWAY = 300.0  # seconds without a sign of a site, after which it counts as away
HELD = 60.0  # seconds between questions whether an answer has been approved
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
class Sent:
    """A message that was sent: to which node, for which row, how large."""

    node: int
    task: Task | None  # None: asks a simulation's node who it is
    size: int


class Dispatcher:
    """Sends due rows, pulls replies, until the study is finished."""

    def __init__(self, grid: Grid, study: Study, membership: Membership, *, poll: float) -> None:
        self._grid, self._study, self._membership, self._poll = grid, study, membership, poll
        self._asked: set[int] = set()
        self._under_way: dict[str, Sent] = {}
        self._began = time.monotonic()
        self._seen: dict[str, float] = {}
        self._asked_again: dict[str, float] = {}  # held rows

    def run(self) -> None:
        """Return when the study is finished."""
        while True:
            self._study.add_sites(self._membership.members())
            online = sorted(self._grid.get_node_ids())
            node_of = self._node_of(online)
            away = self._away(node_of)
            if self._study.finished_without(away):
                return self._study.give_up(away)
            if not self._study.store.paused:
                if isinstance(self._membership, Named):
                    self._ask_names(online)
                self._send_due(node_of)
            if not self._pull():
                time.sleep(self._poll)

    def _node_of(self, online: list[int]) -> dict[str, int]:
        """Return the node of each site that is online."""
        names = {node: self._membership.site_of(node) for node in online}
        return {site: node for node, site in names.items() if site is not None}

    def _away(self, node_of: dict[str, int]) -> set[str]:
        """Return the sites that nothing was heard of for a while."""
        now = time.monotonic()
        self._seen.update(dict.fromkeys(node_of, now))
        return {s for s in self._study.sites if now - self._seen.get(s, self._began) > AWAY}

    def _ask_names(self, online: list[int]) -> None:
        """Ask nodes that no roster names who they are: only a simulation's nodes may say so."""
        for node in online:
            if node not in self._asked:
                self._asked.add(node)
                request = DescribeRequest(task="describe/any", study=self._study.config)
                if not self._push(node, request, None):
                    self._asked.discard(node)

    def _send_due(self, node_of: dict[str, int]) -> None:
        busy = {sent.node for sent in self._under_way.values()}
        free = {site: node for site, node in node_of.items() if node not in busy}
        for task in self._study.due():
            if task.site not in free:
                continue
            if task.kind == "describe" and isinstance(self._membership, Named):
                continue  # comes as the answer of a node that says its name
            if sum(sent.size for sent in self._under_way.values()) > MAX_UNDER_WAY:
                return
            # Sent before the row says so: what was sent twice is answered from the site's store.
            if self._push(free.pop(task.site), self._study.request(task), task):
                self._study.store.sent(task)
        self._ask_again(free)

    def _ask_again(self, free: dict[str, int]) -> None:
        """Ask sites with nothing else to do whether what they hold has been approved."""
        now = time.monotonic()
        for task in self._study.held():
            if task.site in free and now - self._asked_again.get(task.id, -HELD) >= HELD:
                self._asked_again[task.id] = now
                described = task.kind == "describe" and isinstance(self._membership, Named)
                name = "describe/any" if described else task.id
                self._push(free.pop(task.site), HeldRequest(task=name), task)

    def _push(self, node: int, request: Message, task: Task | None) -> bool:
        """Send a message; return whether Flower took it."""
        content = to_record(request)
        message = FlowerMessage(
            content, dst_node_id=node, message_type=request.kind, ttl=TTL, group_id=request.task
        )
        del request  # its weights are in the message, too
        (message_id,) = self._grid.push_messages([message])
        if not message_id:  # the node has just gone
            return False
        size = sum(
            len(array.data)
            for record in content.array_records.values()
            for array in record.values()
        )
        self._under_way[message_id] = Sent(node=node, task=task, size=size)
        return True

    def _pull(self) -> bool:
        """Take in what was answered; return whether anything was."""
        before = len(self._under_way)
        while self._under_way:
            replies = list(self._grid.pull_messages(list(self._under_way)))
            if not replies:
                break
            for reply in replies:
                # An error reply may come from Flower itself: only this id tells what it answers.
                sent = self._under_way.pop(reply.metadata.reply_to_message_id)
                if sent.task is None:
                    self._named(sent.node, reply)
                else:
                    self._answered(sent.task, reply)
        return len(self._under_way) < before

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
            self._study.lost(task, _unreadable(reply.content), final=True)
            return
        self._study.record(task, answer)

    def _named(self, node: int, reply: FlowerMessage) -> None:
        """Learn which site a node is, and take its description."""
        if reply.has_error():
            self._asked.discard(node)
            return
        answer = from_record(reply.content, expected=(DescribeReply, Failure))
        site = answer.site if isinstance(answer, DescribeReply | Failure) else None
        if site is None or site not in self._study.sites or not isinstance(self._membership, Named):
            log.warning("a node named no site of this study")
            return
        self._membership.learn(node, site)
        self._study.record(Task(kind="describe", site=site), answer)


def _unreadable(content: RecordDict) -> str:
    """Return why a reply is not taken: another protocol, or just anything."""
    try:
        text = content.config_records["message"]["json"]
        known = isinstance(text, str) and len(text) <= MAX_TEXT
        protocol = json.loads(str(text))["values"]["protocol"] if known else PROTOCOL
    except (KeyError, TypeError, ValueError, RecursionError):
        protocol = PROTOCOL
    if isinstance(protocol, int) and protocol != PROTOCOL and 0 <= protocol <= 10_000:
        return f"the coordinator speaks protocol {PROTOCOL}, the site protocol {protocol}"
    return "the reply is not in the contract"
