"""One coordinator for a study folder at a time; the kernel lets go when it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cropkt.errors import UsageError

_NAME = "server.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a study folder.

    Raises:
        UsageError: another coordinator holds it.
    """
    descriptor = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for _ in range(5):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)  # a passing `status` holds it for a moment
        else:
            problem = f"a coordinator (process {running(folder)}) runs this study"
            raise UsageError(folder, problem, "Stop it with cropkt-server stop")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def running(folder: Path) -> int | None:
    """Return the process id of the coordinator that holds a study folder, or None."""
    try:
        descriptor = os.open(folder / _NAME, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return int(os.read(descriptor, 20) or b"0") or None
    finally:
        os.close(descriptor)
