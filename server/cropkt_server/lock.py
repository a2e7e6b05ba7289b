"""One coordinator for a study folder at a time."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from cropkt import lock

_NAME = "server.lock"


def locked(folder: Path) -> AbstractContextManager[None]:
    """Hold a study folder.

    Raises:
        UsageError: on entry, if another coordinator holds it.
    """
    return lock.locked(
        folder / _NAME, holder="another coordinator", fix="Stop it with cropkt-server stop"
    )


def beat(folder: Path) -> None:
    """Leave a sign of life of the coordinator that holds a study folder."""
    with suppress(OSError):  # of a disk in trouble; the next beat tries again
        os.utime(folder / _NAME)


def last_beat(folder: Path) -> float | None:
    """Return when a coordinator last gave a sign of life, in seconds since 1970, or None."""
    with suppress(FileNotFoundError):
        return (folder / _NAME).stat().st_mtime
    return None


def running(folder: Path) -> int | None:
    """Return the process id of the coordinator that holds a study folder, or None."""
    return lock.running(folder / _NAME)
