"""One coordinator for a study folder at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager
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


def running(folder: Path) -> int | None:
    """Return the process id of the coordinator that holds a study folder, or None."""
    return lock.running(folder / _NAME)
