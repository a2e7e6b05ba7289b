"""What the grids of both engines share: one message per site at a time, and fair turns."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from cropkt.errors import MessageError
from cropkt_sim.flower_internals import Run, new_message_id


class Turns:
    """Messages that wait for their sites, in the order in which they may go.

    A site is one hospital with its own state, so that its messages go one by one, in order. Sites
    take turns: after each message the next site is the one that has waited longest.
    """

    def __init__(self, nodes: Iterable[int]) -> None:
        self._waiting: dict[int, deque[Message]] = {node: deque() for node in nodes}
        self._ready: deque[int] = deque()  # nodes that are idle and have a message
        self._busy: set[int] = set()

    def put(self, message: Message) -> None:
        """Queue a message for its site.

        Raises:
            MessageError: there is no such site.
        """
        node = message.metadata.dst_node_id
        if node not in self._waiting:
            raise MessageError(
                f"message {message.metadata.message_type} to node {node}",
                "this simulation has no such node",
                "Take node ids from grid.get_node_ids()",
            )
        self._waiting[node].append(message)
        if node not in self._busy and len(self._waiting[node]) == 1:
            self._ready.append(node)

    def take(self) -> Message | None:
        """Return the next message whose site is idle; the site is busy until `done`."""
        if not self._ready:
            return None
        node = self._ready.popleft()
        self._busy.add(node)
        return self._waiting[node].popleft()

    def done(self, node: int) -> None:
        """Say that a site has answered the message taken for it."""
        self._busy.discard(node)
        if self._waiting[node]:
            self._ready.append(node)


class TurnGrid(Grid):
    """A grid that keeps `Turns`; a subclass carries the messages and calls `_deliver`.

    All methods may be called from any thread. `_changed` guards the turns and the replies.
    """

    poll_interval: float | None = None
    """Seconds between calls of `_exchange` while waiting; None where `_deliver` wakes the wait."""

    def __init__(self, nodes: Sequence[int], run: Run) -> None:
        self._nodes = tuple(nodes)
        self._run = run
        self._turns = Turns(nodes)
        self._replies: dict[str, Message] = {}  # by the id of the message that they answer
        self._changed = threading.Condition()
        self._failure: BaseException | None = None

    @abstractmethod
    def _exchange(self) -> None:
        """Send what may go, and deliver what has come; return at once."""

    def set_run(self, run: Run) -> None:
        """Set the run that the messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that the messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message; Flower asks for this method, and recommends `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all sites: none ever leaves a simulation."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, and return their ids in the same order.

        Raises:
            MessageError: a message to a node that does not exist.
        """
        ids = []
        with self._changed:
            self._raise_failure()
            for message in messages:
                ids.append(new_message_id(message))
                self._turns.put(message)
        self._exchange()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these messages that have come; each reply is returned once."""
        with self._changed:
            self._raise_failure()
        self._exchange()
        with self._changed:
            return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and wait for the replies, at most `timeout` seconds."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        missing = set(self.push_messages(messages))
        replies: list[Message] = []
        while missing:
            come = self.pull_messages(missing)
            replies += come
            missing -= {reply.metadata.reply_to_message_id for reply in come}
            left = deadline - time.monotonic()
            if not missing or left <= 0:
                break
            self._wait_for(missing, left)
        return replies

    def _wait_for(self, missing: set[str], seconds: float) -> None:
        """Wait until one of these replies may have come."""
        limits = [s for s in (seconds, self.poll_interval) if s is not None and s != float("inf")]
        with self._changed:
            if self._failure is None and missing.isdisjoint(self._replies):
                self._changed.wait(min(limits, default=None))

    def _deliver(self, message: Message, outcome: RecordDict | Error) -> None:
        """Store the reply to a message, and give its site the next turn."""
        reply = Message(outcome, reply_to=message)
        new_message_id(reply)
        with self._changed:
            self._replies[message.metadata.message_id] = reply
            self._turns.done(message.metadata.dst_node_id)
            self._changed.notify_all()

    def _fail(self, failure: BaseException) -> None:
        """Make every later call, and those that wait now, raise this."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
