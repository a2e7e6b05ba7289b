"""The coordinator's command with a tap at the plaintext end of its connections.

    python tapped.py TAP start STUDY ...

In the folder TAP: `bodies.bin`, every byte of every request as the TLS layer hands it over;
`requests.jsonl`, the path, the length and the head's length of each; `answers.jsonl`, the payload
of each message as the coordinator's app receives it. The environment variable HELD is how many
seconds it lets pass between questions for an answer that waits for approval.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cropkt_server.dispatch
from cropkt.wire import payload
from cropkt_server.cli import main
from cropkt_server.dispatch import Dispatcher
from cropkt_server.public import PublicDoor


def note(file: Path, **values: Any) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(values) + "\n")


def tap_door(tap: Path) -> None:
    answer = PublicDoor.__call__

    async def tapped(self: PublicDoor, scope: Any, receive: Any, send: Any) -> None:
        head = sum(len(name) + len(value) + 4 for name, value in scope.get("headers", ()))
        length = 0

        async def listening() -> Any:
            nonlocal length
            event = await receive()
            body = event.get("body", b"")
            length += len(body)
            with (tap / "bodies.bin").open("ab") as file:
                file.write(body)
            return event

        with (tap / "bodies.bin").open("ab") as file:
            file.write(repr(scope.get("headers")).encode() + scope.get("raw_path", b""))
        await answer(self, scope, listening, send)
        note(tap / "requests.jsonl", path=scope.get("path"), head=head, body=length)

    PublicDoor.__call__ = tapped  # type: ignore[method-assign]


class Listening:
    """A grid that notes every answer."""

    def __init__(self, grid: Any, tap: Path) -> None:
        self._grid, self._file = grid, tap / "answers.jsonl"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            measured = payload(reply)
            note(self._file, bytes=measured.bytes, sha256=measured.sha256)
        return replies


def tap_app(tap: Path) -> None:
    begin = Dispatcher.__init__

    def tapped(self: Dispatcher, grid: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, Listening(grid, tap), *args, **kwargs)  # type: ignore[arg-type]

    Dispatcher.__init__ = tapped  # type: ignore[method-assign]


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    folder.mkdir(exist_ok=True)
    cropkt_server.dispatch.HELD = float(os.environ.get("HELD", cropkt_server.dispatch.HELD))
    tap_door(folder)
    tap_app(folder)
    main()
