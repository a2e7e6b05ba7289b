"""One process at a time in a folder; the kernel lets go when that process dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cropkt.errors import UsageError


@contextlib.contextmanager
def locked(path: Path, *, holder: str, fix: str) -> Iterator[None]:
    """Hold the lock file `path`.

    Args:
        path: the lock file, made if it is not there.
        holder: what works in its folder, for the error: "another client".
        fix: what to do about it.

    Raises:
        UsageError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for _ in range(5):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)  # a passing look by `running` holds it for a moment
        else:
            problem = f"{holder} (process {running(path)}) works in this folder"
            raise UsageError(path.parent, problem, fix)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def running(path: Path) -> int | None:
    """Return the process id that holds the lock file `path`, or None."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return int(os.read(descriptor, 20) or b"0") or None
    finally:
        os.close(descriptor)
