"""A shell that is told commands one at a time, as a reader of the pages tells his."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path


class Shell:
    """Bash in a folder of its own.

    Args:
        folder: where it begins.
        environment: variables beside this process's.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self.code = 0  # of the last command; -1: the shell has ended
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def lines(self, command: str) -> Iterator[str]:
        """Yield what a command prints, line by line with their ends; then `code` is its own."""
        mark = f"end-{secrets.token_hex(8)}"
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{command}\necho {mark} $?\n")
        stdin.flush()
        self.code = -1
        for line in stdout:
            before, found, code = line.partition(mark)
            if before:
                yield before
            if found:
                self.code = int(code)
                return

    def run(self, command: str) -> tuple[str, int]:
        """Return what a command printed, and its exit code."""
        return "".join(self.lines(command)), self.code

    def interrupt(self, command: str, said: str) -> tuple[str, int]:
        """Interrupt a command that stays once it has printed `said`; return the same.

        The code is 1 if it ended without having said it.
        """
        found = f"grep -qFe {shlex.quote(said)} $said"
        return self.run(
            f"""said=$(mktemp); set -m; {bare(command)} > $said 2>&1 &
            until {found} || ! kill -0 $! 2> /dev/null; do sleep 0.1; done
            kill -INT $! 2> /dev/null; wait $!; set +m -- $?; cat $said; {found} && (exit $1)"""
        )

    def close(self) -> None:
        """End the shell and whatever it left running."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.kill()
        self._process.communicate()  # closes the pipes


def bare(command: str) -> str:
    """Return a command without its remark."""
    return re.split(r"\s#", command)[0]
