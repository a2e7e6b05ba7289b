"""What a client says of itself: one log file, and one small status file.

Everything a client and its children write ends in `<state>/cropkt-client.log`. Children write to
their standard output; one thread a child carries it over, so that a traceback, or the last words
of a process that was killed, arrive there too, and only one process ever rotates the file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

from cropkt.files import write_private

LOG_NAME, STATUS_NAME = "cropkt-client.log", "status.json"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b\s*:?\s*")

log = logging.getLogger("cropkt.client")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What `cropkt-client status` can say of a running client. Times are unix seconds."""

    pid: int
    site: str
    study: str
    since: float  # the client runs
    connected: bool = False
    connected_since: float | None = None  # the last change of `connected`
    task: str | None = None  # message type of the task at work
    task_since: float | None = None
    tasks_done: int = 0
    error: str | None = None  # the last one
    error_at: float | None = None
    closed: bool = False  # the study is over


class Status:
    """Keeps `status.json` true while a client runs; any thread may report."""

    def __init__(self, state: Path, *, site: str, study: str) -> None:
        self._path = state / STATUS_NAME
        self._lock = threading.Lock()
        now = time.time()
        self._state = State(pid=os.getpid(), site=site, study=study, since=now, connected_since=now)
        self._write()

    @property
    def state(self) -> State:
        """The state last reported."""
        return self._state

    def connected(self, yes: bool) -> bool:
        """Report whether the coordinator answers; return whether that is news."""
        if yes == self._state.connected:
            return False
        self._change(connected=yes, connected_since=time.time())
        return True

    def working(self, task: str) -> None:
        """Report the task that begins."""
        self._change(task=task, task_since=time.time())

    def idle(self) -> None:
        """Report that the task at work has ended."""
        self._change(task=None, task_since=None, tasks_done=self._state.tasks_done + 1)

    def failed(self, error: str) -> None:
        """Report the last error, as one line."""
        self._change(error=" ".join(error.split())[:500], error_at=time.time())

    def closed(self) -> None:
        """Report that the study is over."""
        self._change(closed=True)

    def _change(self, **values: object) -> None:
        with self._lock:
            self._state = replace(self._state, **values)  # type: ignore[arg-type]
            self._write()

    def _write(self) -> None:
        text = json.dumps(asdict(self._state), indent=1, sort_keys=True) + "\n"
        try:
            write_private(self._path, text.encode())
        except OSError as error:  # a full disk must not end the service
            log.warning("%s cannot be written: %s", self._path, error.strerror)


def read_status(state: Path) -> State | None:
    """Return what the client last reported, or None."""
    try:
        return State(**json.loads((state / STATUS_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


class _PrivateFile(RotatingFileHandler):
    """A rotating file that only its owner may read, and whose failures stop nobody."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the record: on a full disk there is nowhere to say so."""


def open_log(state: Path, *, terminal: bool, size: int = 5_000_000, files: int = 5) -> Path:
    """Send this process's log to one rotating file, and its news to the terminal; return the file.

    Args:
        state: the site's state folder.
        terminal: whether to say what happens on standard error too.
        size: bytes after which a new file is begun.
        files: how many older files are kept.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = state / LOG_NAME
    file = _PrivateFile(path, maxBytes=size, backupCount=files)
    file.setFormatter(logging.Formatter(_FORMAT))
    handlers: list[logging.Handler] = [file]
    if terminal:
        screen = logging.StreamHandler(sys.stderr)
        screen.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        screen.addFilter(_worth_showing)
        handlers.append(screen)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they log every request
    return path


def _worth_showing(record: logging.LogRecord) -> bool:
    return record.name == log.name or record.levelno >= logging.ERROR


def carry_over(output: IO[bytes], name: str, *, keep: int = 40) -> Carried:
    """Log a child's output until it ends, in a thread of its own."""
    return Carried(output, logging.getLogger(name), keep)


class Carried:
    """A child's output on its way to the log; `tail` are the last lines."""

    def __init__(self, output: IO[bytes], logger: logging.Logger, keep: int) -> None:
        self.tail: list[str] = []
        self._output, self._logger, self._keep = output, logger, keep
        self._thread = threading.Thread(target=self._run, daemon=True, name=logger.name)
        self._thread.start()

    def join(self, timeout: float = 2.0) -> None:
        """Wait for the rest; a grandchild that holds the pipe open is not waited for."""
        self._thread.join(timeout)

    def _run(self) -> None:
        with self._output:
            for raw in self._output:
                line = _COLOUR.sub("", raw.decode(errors="replace")).rstrip()
                level = _LEVEL.match(line)
                text = line[level.end() :] if level else line
                if text:
                    self.tail = [*self.tail, text][-self._keep :]
                    number = getattr(logging, level[1]) if level else logging.INFO
                    self._logger.log(number, "%s", text)
