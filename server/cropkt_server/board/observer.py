"""What the board reads of a study, again and again, and never twice at once.

Everything comes from the functions behind `status`, `experts` and `report`. Files that have not
changed are not read again, and reading the replies takes at most a sixth of this process's time.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from cropkt.errors import CropktError
from cropkt.report.schema import Results
from cropkt_server.catalogue import ExpertStatus, read_experts
from cropkt_server.reading import reading
from cropkt_server.results import results
from cropkt_server.runtime import LOG_NAME
from cropkt_server.status import StudyStatus, read_status
from cropkt_server.store import Task, read_tasks

log = logging.getLogger("cropkt.server")

Value = TypeVar("Value")

FRESH = 1.0  # seconds
PATIENCE = 5.0  # times as long as reading took, until it is read again
LOG_LINES, LOG_BYTES = 80, 64 << 10


@dataclass(slots=True)
class _Kept(Generic[Value]):
    """Something that was read, with when and from what."""

    value: Value | None = None
    stamp: object = None
    until: float = 0.0  # monotonic
    lock: threading.Lock = field(default_factory=threading.Lock)


class Observer:
    """Reads one study folder; may be used from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, float] = {}  # C-index by an expert's hash
        self._status: _Kept[StudyStatus] = _Kept()
        self._tasks: _Kept[list[Task]] = _Kept()
        self._experts: _Kept[list[ExpertStatus]] = _Kept()
        self._results: _Kept[Results] = _Kept()

    def status(self) -> StudyStatus:
        """Return what `cropkt-server status` says."""
        return self._read(self._status, lambda: read_status(self.folder), changes=False)

    def tasks(self) -> list[Task]:
        """Return the rows."""
        return self._read(self._tasks, lambda: read_tasks(self.folder))

    def experts(self) -> list[ExpertStatus]:
        """Return what `cropkt-server experts` lists."""
        return self._read(self._experts, lambda: read_experts(self.folder, self._known))

    def results(self) -> Results:
        """Return what the study has found so far, as its report would."""
        return self._read(self._results, self._found)

    def log(self) -> list[str]:
        """Return the last lines of the coordinator's log."""
        with suppress(FileNotFoundError), open(self.folder / LOG_NAME, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
            return lines[1 if size > LOG_BYTES else 0 :][-LOG_LINES:]
        return []

    def _found(self) -> Results:
        with reading(self.folder) as study:
            return results(study)

    def _read(
        self, kept: _Kept[Value], read: Callable[[], Value], *, changes: bool = True
    ) -> Value:
        """Return what was read last if it is good enough, else read.

        Rows and replies are read one after the other while the study goes on. Where the two do
        not fit together for a moment, what was read before stays.

        Args:
            kept: what was read last.
            read: reads it.
            changes: whether it changes only when a database does.
        """
        with kept.lock:
            stamp = self._stamp() if changes else None
            same = changes and stamp == kept.stamp
            if kept.value is not None and (same or time.monotonic() < kept.until):
                return kept.value
            began = time.monotonic()
            try:
                kept.value = read()
            except (CropktError, OSError, ValueError, LookupError, sqlite3.Error):
                if kept.value is None:
                    raise
                log.warning("the study could not be read this time", exc_info=True)
            else:
                kept.stamp = stamp
            took = time.monotonic() - began
            kept.until = time.monotonic() + max(FRESH, PATIENCE * took)
            return kept.value

    def _stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Return when the study's databases changed last."""
        found = []
        for name in ("study.sqlite", "study.sqlite-wal", "bank.sqlite", "bank.sqlite-wal"):
            with suppress(FileNotFoundError):
                now = (self.folder / name).stat()
                if now.st_size:  # reading may leave an empty log behind, or take it away
                    found.append((name, now.st_mtime_ns, now.st_size))
        return tuple(found)
