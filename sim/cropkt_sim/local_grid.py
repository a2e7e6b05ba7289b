"""The local engine: a Flower grid over processes of this machine.

Each worker is a process of its own with a pipe to this one, rather than a member of a
`ProcessPoolExecutor`: when the kernel kills one for its memory, only the message it worked on is
lost, where an executor breaks as a whole and takes the messages of its neighbours with it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from cropkt.errors import TrainingFailedError
from cropkt_sim.apps import answer, load_app
from cropkt_sim.flower_internals import SERVER_NODE_ID, ErrorCode, Run
from cropkt_sim.grid import TurnGrid

# Spawn: a fork would copy locks of torch's threads, and the server app's open database.
_processes = multiprocessing.get_context("spawn")

_FAILED_STARTS = 3  # in a row, after which starting another worker is pointless
_SECONDS_BETWEEN_CHECKS = 1.0

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class _Worker:
    """A process that answers messages, and the one it is working on."""

    process: SpawnProcess
    pipe: Connection
    ready: bool = False
    message: Message | None = None

    def kill(self) -> None:
        """Kill the process, and those that its app may have started; from any thread."""
        pid = self.process.pid
        try:
            if pid is not None:
                os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, or is gone
            self.process.kill()

    def end(self) -> None:
        """Kill the process and let go of what is left of it."""
        self.kill()
        self.process.join()
        self.pipe.close()


class LocalGrid(TurnGrid):
    """Carries messages to client apps in processes of this machine.

    Use it as a context manager: leaving it ends every worker, whatever it is doing.

    Args:
        client_app: reference of the app of every site.
        nodes: number of sites.
        run_config: what every site sees as `context.run_config`.
        workers: most processes at a time.
        run_id: of the run.
    """

    def __init__(
        self,
        client_app: str,
        *,
        nodes: int,
        run_config: Mapping[str, str | int | float | bool],
        workers: int,
        run_id: int,
    ) -> None:
        first = SERVER_NODE_ID + 1
        super().__init__(range(first, first + nodes), Run.create_empty(run_id))
        self._client_app = client_app
        self._contexts = {
            first + i: Context(
                run_id=run_id,
                node_id=first + i,
                node_config={"partition-id": i, "num-partitions": nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(nodes)
        }
        self._most_workers = min(workers, nodes)
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._closing = False
        self._rung = False  # _changed guards it
        self._wakeup, self._alarm = _processes.Pipe(duplex=False)
        self._courier = threading.Thread(target=self._carry, name="simulation", daemon=True)

    def __enter__(self) -> LocalGrid:
        try:
            self._start_workers()  # now: they import the client app while the server app starts
            self._courier.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; calls on the grid raise from here on."""
        self._closing = True
        # At once, and before the courier, who may be waiting for one to take a long message.
        for worker in list(self._workers):
            worker.kill()
        self._fail(RuntimeError("the simulation is over"))
        if self._courier.is_alive():
            self._exchange()
            self._courier.join()
        while self._workers:
            self._workers.pop().end()
        self._wakeup.close()
        self._alarm.close()

    def _exchange(self) -> None:
        """Wake the courier, unless somebody has: there may be something to send."""
        with self._changed:
            if not self._rung:
                self._rung = True
                self._alarm.send_bytes(b"!")

    def _carry(self) -> None:
        """Bring messages to workers and replies back, until the grid closes."""
        try:
            while not self._closing:
                self._start_workers()
                self._assign()
                self._collect()
        except BaseException as error:
            # A thread's errors reach nobody: the server app would wait for ever.
            if not self._closing:
                self._fail(error)

    def _start_workers(self) -> None:
        """Replace the workers that died."""
        while len(self._workers) < self._most_workers and not self._closing:
            ours, theirs = _processes.Pipe()
            process = _processes.Process(
                target=_work,
                args=(theirs, self._client_app, logging.getLogger().getEffectiveLevel()),
                name=f"site-worker-{len(self._workers) + 1}",
            )
            process.start()
            theirs.close()  # so that the pipe ends with the worker
            self._workers.append(_Worker(process=process, pipe=ours))

    def _assign(self) -> None:
        """Give every idle worker a message."""
        for worker in [w for w in self._workers if w.ready and w.message is None]:
            with self._changed:
                message = self._turns.take()
            if message is None:
                return
            worker.message = message
            try:
                worker.pipe.send((message, self._contexts[message.metadata.dst_node_id]))
            except OSError:  # it died while idle, or half-way through the message
                self._bury(worker)

    def _collect(self) -> None:
        """Wait for something to happen, and take in what workers have to say."""
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in wait([self._wakeup, *pipes], timeout=_SECONDS_BETWEEN_CHECKS):
            if pipe is self._wakeup:
                with self._changed:
                    self._wakeup.recv_bytes()
                    self._rung = False
            elif (worker := pipes[pipe]) in self._workers:  # type: ignore[index]
                self._receive(worker)
        # Processes that an app forked hold a dead worker's pipe open: look at the worker itself.
        for worker in [w for w in self._workers if not w.process.is_alive()]:
            if not worker.pipe.poll():
                self._bury(worker)

    def _receive(self, worker: _Worker) -> None:
        """Take one message of a worker: that it is ready, or the outcome of its task."""
        try:
            result: tuple[RecordDict | Error, RecordDict] | None = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if result is None or worker.message is None:
            worker.ready, self._failed_starts = True, 0
            return
        message, worker.message = worker.message, None
        outcome, state = result
        self._contexts[message.metadata.dst_node_id].state = state
        self._deliver(message, outcome)

    def _bury(self, worker: _Worker) -> None:
        """Remove a worker that died, and answer for it.

        Raises:
            TrainingFailedError: worker after worker dies before it can work.
        """
        worker.end()
        self._workers.remove(worker)
        code = worker.process.exitcode
        if self._closing:
            return
        if (message := worker.message) is not None:
            site = self._contexts[message.metadata.dst_node_id].node_config["partition-id"]
            _log.error("the worker of site %s died with exit code %s", site, code)
            self._deliver(
                message, Error(ErrorCode.CLIENT_APP_CRASHED, f"worker died, exit code {code}")
            )
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                raise TrainingFailedError(
                    "local engine",
                    f"{self._failed_starts} workers in a row died at start, exit code {code}",
                    "A script that calls simulate() needs: if __name__ == '__main__'",
                )


def _work(pipe: Connection, client_app: str, log_level: int) -> None:
    """Answer messages from the pipe until it ends; the main function of a worker."""
    # A group of its own: Ctrl-C in the terminal reaches the parent alone, which then ends the
    # group, so that nothing an app started stays behind.
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(
        level=log_level, format="%(asctime)s %(processName)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        load_app(client_app, ClientApp)
    except Exception:
        _log.debug("cannot load %s: each message will say so", client_app, exc_info=True)
    pipe.send(None)
    while True:
        try:
            message, context = pipe.recv()
        except EOFError:
            return
        outcome = answer(client_app, message, context)
        pipe.send((outcome, context.state))


def _end_with_parent() -> None:
    """End this process group when the parent has gone, even in the middle of a task."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os.killpg(0, signal.SIGKILL)
