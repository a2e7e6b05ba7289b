"""Which messages are under way to which node, and which of them the network has swallowed.

Flower hands a message out once. If the connection breaks while it is taken, or while its answer is
sent, nobody repeats it, and its row would wait for ever at a site that is online. But a SuperNode
asks for the next message only when it is done with the last one. So who asks again without having
answered has lost the message, and who asks again after half an answer has given the rest up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

Pieces = tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class _Sent:
    node: int
    asked: int = 0  # how often its node asked for more since it was sent, or since its answer began
    pieces: Pieces | None = None  # of its answer; None before it begins


class UnderWay:
    """Messages from when they are sent until their answers are taken. Any thread may tell."""

    def __init__(self) -> None:
        self._sent: dict[str, _Sent] = {}
        self._lock = threading.Lock()

    def forget(self) -> None:
        """A new run begins; the messages of the last one are void."""
        with self._lock:
            self._sent.clear()

    def sent(self, message: str, node: int) -> None:
        """A message waits for a node."""
        with self._lock:
            self._sent[message] = _Sent(node=node)

    def asked(self, node: int) -> None:
        """A node asks for its next message."""
        with self._lock:
            for sent in self._sent.values():
                if sent.node == node:
                    sent.asked += 1

    def answered(self, message: str, node: int, pieces: Iterable[str]) -> None:
        """A node begins to send its answer, in these pieces."""
        with self._lock:
            sent = self._sent.get(message)
            if sent is not None and sent.node == node:
                sent.asked, sent.pieces = 0, tuple(pieces)

    def taken(self, message: str) -> None:
        """The answer, or the news that there is none, has been taken."""
        with self._lock:
            self._sent.pop(message, None)

    def of(self, node: int) -> set[str]:
        """Return the messages of one node."""
        with self._lock:
            return {message for message, sent in self._sent.items() if sent.node == node}

    def judge(
        self,
        messages: Iterable[str],
        *,
        whole: Callable[[Pieces], bool],
        online: Callable[[], Iterable[int]],
    ) -> tuple[set[str], set[str]]:
        """Return which messages were lost, and of which an answer is still coming in.

        Args:
            messages: to look at.
            whole: says whether all these pieces of an answer are there.
            online: says which nodes are online; asked at most once.
        """
        lost, coming = set[str](), set[str]()
        nodes = cache(lambda: frozenset(online()))
        for message in messages:
            with self._lock:
                sent = self._sent.get(message)
                if sent is None:
                    continue
                node, asked, pieces = sent.node, sent.asked, sent.pieces
            # The first question fetches the message; one may have been on its way before.
            if pieces is None and asked >= 2:
                lost.add(message)
            elif pieces and not whole(pieces):
                (coming if asked == 0 and node in nodes() else lost).add(message)
        return lost, coming
