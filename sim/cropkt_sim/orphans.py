"""End the processes that a run started, also those whose parent died before them.

Ray's helpers notice that their parent has gone only once they have started up: an interrupt
before that leaves them running for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_GRACE = 2.0  # seconds in which to end by themselves


@contextlib.contextmanager
def no_process_left() -> Iterator[None]:
    """End, on leaving, every descendant of this process that was not there on entering.

    In between this process takes the place of init for its descendants: what their parents leave
    behind becomes its own child instead of getting out of sight.
    """
    before = _descendants()
    _adopt_orphans(True)
    try:
        yield
    finally:
        deadline = time.monotonic() + _GRACE
        while left := _running(_descendants() - before):
            if time.monotonic() > deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        _adopt_orphans(False)


def _adopt_orphans(adopt: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def _descendants() -> set[int]:
    """Return the ids of all descendants of this process, the dead but unburied included."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            text = stat.read_text()
            # pid (name, which may hold anything) state parent ...
            parents[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found, newest = set[int](), {os.getpid()}
    while newest:
        newest = {pid for pid, parent in parents.items() if parent in newest}
        found |= newest
    return found


def _running(pids: set[int]) -> set[int]:
    """Bury those that are dead children of this process, and return the others."""
    running = set()
    for pid in pids:
        try:
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                running.add(pid)
        except ChildProcessError:  # a grandchild, or buried by someone else
            if Path(f"/proc/{pid}").exists():
                running.add(pid)
    return running
