"""A child process in which training runs, and what is left of it when it dies.

A crash, an out-of-memory kill or a SIGKILL of training ends the child, never the client. The
child stays warm between calls, so that torch is imported once. It dies with its parent, because
it holds the read end of a pipe whose only write end the parent holds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from cropkt.errors import DiskFullError, TrainingFailedError
from cropkt.files import disk_full
from cropkt_client.log import Carried, carry_over

_START = "from cropkt_client.worker import main; main()"
log = logging.getLogger("cropkt.client")
_FIX = "Look at the end of this site's log, and at the memory of this machine"


class WorkerDiedError(TrainingFailedError):
    """The child process died in the middle of a call."""


class WorkerRaisedError(TrainingFailedError):
    """The called function raised; where, is in the log."""


@dataclass(frozen=True, slots=True)
class Child:
    """A Python process on a leash, and its output on the way to the log."""

    process: subprocess.Popen[bytes]
    output: Carried

    @classmethod
    def start(
        cls,
        command: list[str],
        *,
        name: str,
        environment: Mapping[str, str],
        keep_open: tuple[int, ...] = (),
    ) -> Child:
        """Start Python code that calls `wear_leash` first, so that it dies with this process.

        A pipe holds the leash, and not PR_SET_PDEATHSIG: it works beyond Linux, and does not
        depend on which thread started the child.

        Args:
            command: the code, then its arguments.
            name: of the logger that gets the output.
            environment: variables on top of this process's own.
            keep_open: file descriptors that the child inherits.
        """
        process = subprocess.Popen(
            # -P: a file in the working directory must not shadow a module.
            [sys.executable, "-P", "-c", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            pass_fds=keep_open,
            start_new_session=True,  # Ctrl-C in the terminal reaches the client alone
        )
        if process.stdout is None:
            raise RuntimeError("Popen made no pipe")
        return cls(process, carry_over(process.stdout, name))

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Kill the process and its own children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, *, grace: float = 0.0) -> None:
        """End the process, politely first if there is `grace` in seconds, and clear it away."""
        if grace and self.alive:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        self.kill()
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        self.output.join()


def wear_leash() -> None:
    """Let this process and its own children be killed when the parent is gone."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="leash").start()


class Worker:
    """Calls one function in a warm child process, one call at a time.

    Args:
        target: `module:function` to call; imported in the child only.
        environment: variables that the child gets on top of this process's own.
    """

    def __init__(self, target: str, environment: Mapping[str, str] | None = None) -> None:
        self._target, self._environment = target, dict(environment or {})
        self._child: Child | None = None
        self._connection: Connection | None = None
        self._calling = threading.Lock()
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is a child."""
        child = self._child
        return child.process.pid if child else None

    def call(self, *arguments: object) -> Any:
        """Return what the function returns.

        Raises:
            WorkerDiedError: the child died; the next call gets a new one.
            DiskFullError: the function found a disk full.
            WorkerRaisedError: the function raised otherwise.
        """
        with self._calling:
            child, connection = self._started()
            try:
                connection.send(arguments)
                while not connection.poll(0.5):
                    # A grandchild may outlive the child and keep the connection: look at both.
                    if not child.alive and not connection.poll(0):
                        raise EOFError
                kind, value = connection.recv()
            except (EOFError, OSError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(5)  # its connection ends a moment before the process
                code = child.process.poll()
                self._clear()
                raise WorkerDiedError("training", _cause(code), _FIX) from None
        if kind == "full":
            raise DiskFullError("state", "no space is left on its disk", "Free some")
        if kind == "raised":
            raise WorkerRaisedError("training", f"it raised {value}", "See this site's log")
        return value

    def rest(self) -> None:
        """End the child, and with it what it holds of memory and GPU; the next call starts one."""
        with self._calling:
            self._clear()

    def stop(self) -> None:
        """End the child for good, also from another thread in the middle of a call."""
        self._stopped = True
        child = self._child
        if child:
            child.kill()
        self.rest()

    def _started(self) -> tuple[Child, Connection]:
        if self._child and self._connection and self._child.alive:
            return self._child, self._connection
        self._clear()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._child = Child.start(
                [_START, self._target, str(theirs.fileno())],
                name="cropkt.training",
                environment=self._environment,
                keep_open=(theirs.fileno(),),
            )
            self._connection = Connection(ours.detach())
        if self._stopped:  # looked at after the child is there: `stop` looks the other way round
            self._clear()
            raise WorkerDiedError("training", "the client stops")
        return self._child, self._connection

    def _clear(self) -> None:
        if self._child:
            self._child.end()
        if self._connection:
            self._connection.close()
        self._child = self._connection = None


def _cause(code: int | None) -> str:
    """Return in words how a process ended."""
    if code is None:
        return "its process stopped answering"
    if code == -signal.SIGKILL:
        return "its process was killed (SIGKILL), most often for want of memory"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"its process crashed ({signal.Signals(-code).name})"
    return f"its process ended with exit code {abs(code)}"


def main() -> None:
    """Serve calls in the child; its arguments are `module:function` and a file descriptor."""
    wear_leash()
    faulthandler.enable()  # a segmentation fault, too, leaves its traceback in the log
    logging.basicConfig(
        level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s"
    )
    if os.environ.get("CROPKT_DEVICE") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: no memory on a GPU
    target, descriptor = sys.argv[1:]
    module, name = target.split(":")
    with Connection(int(descriptor)) as connection:
        while True:
            try:
                arguments = connection.recv()
            except (EOFError, OSError):
                return
            try:
                answer = ("value", getattr(importlib.import_module(module), name)(*arguments))
            except Exception as error:
                log_frames(error)
                answer = ("full" if disk_full(error) else "raised", type(error).__name__)
            connection.send(answer)


def log_frames(error: Exception) -> None:
    """Log where an error came from, without its text: that may hold a patient's name."""
    frames = traceback.extract_tb(error.__traceback__)
    way = " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
    log.error("%s raised in %s; its text is left out", type(error).__name__, way)
