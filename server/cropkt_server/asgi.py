"""What the door needs of ASGI: its types, turns for calls, and long answers in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PIECE = 256 << 10  # bytes of an answer given to TLS at once; a connection keeps such a buffer


class Turns:
    """So many calls at work at once; of those that wait, the last to come is the next to go.

    When more is asked than can be done, the first to come is about to leave, and to ask again:
    work for it would be for nothing, and soon for everybody.
    """

    def __init__(self, places: int) -> None:
        self._free, self._waiting = places, list[asyncio.Future[None]]()

    async def take(self) -> None:
        """Wait for a place."""
        if self._free:
            self._free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():
                self.give()  # it had just got one
            elif place in self._waiting:
                self._waiting.remove(place)
            raise

    def give(self) -> None:
        """Give a place back."""
        while self._waiting:
            place = self._waiting.pop()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1


class Turn:
    """One call's turn to be at work: from when its request is there until its answer begins."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._mine = turns, False

    async def begin(self, last: Event, receive: Receive) -> Event:
        """Return a request's last event when its turn has come, or that its caller has left."""
        place = asyncio.ensure_future(self._turns.take())
        await asyncio.sleep(0)
        while not place.done():
            gone = asyncio.ensure_future(receive())
            await asyncio.wait((place, gone), return_when=asyncio.FIRST_COMPLETED)
            if not place.done() and gone.result()["type"] == "http.disconnect":
                place.cancel()
                return gone.result()
            gone.cancel()
        self._mine = True
        return last

    def end(self) -> None:
        """Let another begin."""
        if self._mine:
            self._mine = False
            self._turns.give()


async def in_pieces(send: Send, event: Event) -> None:
    """Send an event of an answer, a long body piece by piece, each when the last is under way."""
    body, more = event.get("body", b""), event.get("more_body", False)
    if len(body) <= PIECE:
        await send(event)
        return
    for start in range(0, len(body), PIECE):
        end = start + PIECE
        await send({**event, "body": body[start:end], "more_body": more or end < len(body)})
