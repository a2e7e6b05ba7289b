"""Saying that the coordinator listens, or why not: systemd's notify protocol, both ends.

A process whose starter wants to know is given the path of a datagram socket in `NOTIFY_SOCKET`,
by systemd (`Type=notify`) or by `cropkt-server start --detach`, and sends it `READY=1` or
`STATUS=text`. Reference: sd_notify(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from cropkt.errors import CropktError

_VARIABLE = "NOTIFY_SOCKET"
_READY, _STATUS = "READY=1", "STATUS="
_LONGEST = 4096  # bytes of one message
_LOOK = 0.1  # seconds between looks whether a process still lives


def tell_ready() -> None:
    """Tell whoever started this process that it listens."""
    _tell(_READY)


@contextlib.contextmanager
def telling_why() -> Iterator[None]:
    """Tell whoever started this process by which of our errors the block ends."""
    try:
        yield
    except CropktError as error:
        _tell(_STATUS + " ".join(str(error).split()))
        raise


def _tell(message: str) -> None:
    address = os.environ.get(_VARIABLE, "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract one
    with (
        contextlib.suppress(OSError),  # nobody listens any more
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
    ):
        sender.sendto(message.encode()[:_LONGEST], address)


class Readiness:
    """What a process that was started with `environment` says of itself."""

    def __init__(self, receiver: socket.socket, path: Path) -> None:
        self._receiver, self._path = receiver, path
        self._receiver.settimeout(_LOOK)

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for the process."""
        return {_VARIABLE: str(self._path)}

    def wait(self, process: subprocess.Popen[bytes]) -> str | None:
        """Wait until a process listens, or has ended.

        Returns:
            None if it listens, else its last status, "" if it gave none.
        """
        status, ended = "", False
        while True:
            try:
                message = self._receiver.recv(_LONGEST).decode(errors="replace")
            except TimeoutError:
                if ended:
                    return status
                ended = process.poll() is not None  # one more look: its last words may wait
                continue
            if message == _READY:
                return None
            status = message.removeprefix(_STATUS)


@contextlib.contextmanager
def readiness() -> Iterator[Readiness]:
    """Listen to what a process says that is about to be started."""
    with (
        tempfile.TemporaryDirectory(prefix="cropkt-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
    ):
        path = Path(folder, "notify")
        receiver.bind(str(path))
        yield Readiness(receiver, path)
