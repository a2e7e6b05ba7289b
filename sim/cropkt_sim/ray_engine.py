"""The Ray engine: Flower's own simulation engine, on this machine or on a Ray cluster.

Flower's engine is used as it is, in a thread of its own, with three things around it so that it
gives what the local engine gives: one message per site at a time; only the name of an exception
in a reply; and the server app in the caller's thread, so that its errors and Ctrl-C go the usual
way.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import Any
from unittest.mock import patch

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from cropkt.errors import TrainingFailedError, UsageError
from cropkt_sim.apps import answer
from cropkt_sim.flower_internals import ErrorCode, run_on_ray
from cropkt_sim.grid import TurnGrid
from cropkt_sim.orphans import no_process_left

RunConfig = Mapping[str, str | int | float | bool]

_POLL = 0.05  # seconds; Flower's engine itself looks for new messages every 0.1
# Ray's sockets live below its folder, and the path of a socket may have 107 bytes.
_LONGEST_PARENT = 20


class SiteApp(ClientApp):
    """The app of every site, as the local engine calls it."""

    def __init__(self, client_app: str, run_config: RunConfig) -> None:
        super().__init__()
        self._reference = client_app
        self._run_config = dict(run_config)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message; never raises."""
        seen = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config=context.node_config,
            state=context.state,
            run_config=self._run_config,
        )
        outcome = answer(self._reference, message, seen)
        context.state = seen.state  # Flower keeps the context that it passed
        return Message(outcome, reply_to=message)


class RayGrid(TurnGrid):
    """Passes messages on to Flower's grid when it is their site's turn."""

    poll_interval = _POLL

    def __init__(self, flower: Grid) -> None:
        super().__init__(sorted(flower.get_node_ids()), flower.run)
        self._flower = flower
        self._sent: dict[str, Message] = {}  # by the id that Flower's grid gave

    def end(self, failure: BaseException) -> None:
        """Make every later call, and those that wait now, raise this."""
        self._fail(failure)

    def _exchange(self) -> None:
        with self._changed:
            if self._failure is not None:
                return
            for reply in self._flower.pull_messages(list(self._sent)) if self._sent else ():
                answered = self._sent.pop(reply.metadata.reply_to_message_id)
                self._deliver(answered, _outcome(reply))
            while (message := self._turns.take()) is not None:
                (flower_id,) = self._flower.push_messages([_copy(message)])
                self._sent[flower_id] = message


class _Door(ServerApp):
    """What Flower runs as server app: hands its grid out, and stays until told to leave."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self._nodes = nodes
        self.opened: queue.SimpleQueue[tuple[Grid, Context]] = queue.SimpleQueue()
        self.leave = threading.Event()

    def __call__(self, grid: Grid, context: Context) -> None:
        """Hand out the grid once all sites are there: Flower registers them meanwhile."""
        while len(list(grid.get_node_ids())) < self._nodes:
            if self.leave.wait(_POLL):
                return
        self.opened.put((grid, context))
        self.leave.wait()


class FlowerEngine:
    """Flower's engine in a thread; entering gives the grid and the server app's context.

    Leaving ends the engine and all that it started, whatever its sites are doing.
    """

    def __init__(self, client_app: str, *, nodes: int, run_config: RunConfig) -> None:
        self._site = SiteApp(client_app, run_config)
        self._nodes = nodes
        self._run_config = dict(run_config)
        # Flower makes these the options of its actors, which must be numbers. Without restarts,
        # a dead actor would fail every message that it is given later; without retries, every
        # message that it is given while it restarts. So a task that dies is tried once more.
        resources = {"num_cpus": 1, "num_gpus": 0, "max_restarts": -1, "max_task_retries": 1}
        self._backend = {"client_resources": resources}
        self._door = _Door(nodes)
        self._grid: RayGrid | None = None
        self._failure: TrainingFailedError | None = None
        self._thread = threading.Thread(target=self._run, name="flower", daemon=True)

    def __enter__(self) -> tuple[RayGrid, Context]:
        self._thread.start()
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    grid, context = self._door.opened.get(timeout=_POLL)
                    break
                if not self._thread.is_alive():
                    raise self._failure or RuntimeError("Flower's engine ended before it began")
        except BaseException:
            self.close()
            raise
        context.run_config = dict(self._run_config)
        self._grid = RayGrid(grid)
        if self._failure is not None:  # it failed while there was no grid to say so
            self._grid.end(self._failure)
        return self._grid, context

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine; calls on the grid raise from here on."""
        if self._grid is not None:
            self._grid.end(RuntimeError("the simulation is over"))
        with _quiet_flower():
            # Before Flower shuts Ray down: its threads wait for running tasks, and would wait for
            # ever once Ray is gone.
            _kill_actors()
            self._door.leave.set()
            self._thread.join()

    def _run(self) -> None:
        try:
            run_on_ray(
                server_app=self._door,
                client_app=self._site,
                nodes=self._nodes,
                backend=self._backend,
            )
        except Exception as error:
            cause = _root(error)
            self._failure = TrainingFailedError(
                "Flower's engine on Ray", f"{type(cause).__name__}: {cause}", "See its log above"
            )
            if self._grid is not None:
                self._grid.end(self._failure)


def simulate_on_ray(
    server_app: ServerApp, client_app: str, *, nodes: int, run_config: RunConfig, workers: int
) -> None:
    """Run the apps on Flower's simulation engine; what the server app raises passes through.

    Joins the Ray cluster at RAY_ADDRESS, whose size then takes the place of `workers`. Otherwise
    starts Ray on this machine, and ends it.

    Raises:
        UsageError: Ray is not installed, or already runs in this process.
        TrainingFailedError: Flower's engine failed.
    """
    check_ray()
    engine = FlowerEngine(client_app, nodes=nodes, run_config=run_config)
    with _ray(min(workers, nodes)), engine as (grid, context):
        server_app(grid=grid, context=context)


def check_ray() -> None:
    """Check that Ray can be started.

    Raises:
        UsageError: it is not installed, or this process already uses it.
    """
    if find_spec("ray") is None:
        raise UsageError(
            "--engine ray", "Ray is not installed", 'Run: pip install "cropkt[ray]", or use local'
        )
    import ray

    if ray.is_initialized():
        raise UsageError(
            "--engine ray", "Ray already runs in this process", "Call ray.shutdown() before"
        )


@contextlib.contextmanager
def _ray(workers: int) -> Iterator[None]:
    """Start or join Ray; Flower's engine uses what it finds running."""
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    # Ray's processes have the environment of this one, but not its path; and sites log their
    # tracebacks there, which only log_to_driver brings to the user.
    arguments: dict[str, Any] = {
        "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
        "log_to_driver": True,
        "logging_level": logging.ERROR,
    }
    with _ray_folder() as folder, no_process_left(), _no_dashboard():
        if not os.environ.get("RAY_ADDRESS"):
            # "local": with no address, Ray would join any cluster that it finds on this machine.
            arguments |= {"address": "local", "include_dashboard": False, "num_cpus": workers}
            arguments |= {"_temp_dir": folder}
        try:
            ray.init(**arguments)
            if threading.current_thread() is threading.main_thread():
                # Ray replaces this handler, and its own aborts the process after three seconds.
                signal.signal(signal.SIGTERM, on_sigterm)
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _no_dashboard() -> Iterator[None]:
    """Keep Ray from starting its dashboard.

    What is left of it without its pages asks the metadata services of three clouds where it runs,
    one of them by a name that the DNS has to look up, before it sees that it must report nothing.
    """
    from ray._private.node import Node

    def nothing(self: Node, *, include_dashboard: bool, raise_on_failure: bool) -> None:
        """Start nothing; takes what the real one takes."""

    with patch.object(Node, "start_api_server", nothing):
        yield


@contextlib.contextmanager
def _ray_folder() -> Iterator[str]:
    """Yield a folder for Ray's logs and sockets that is removed afterwards."""
    parent = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(
        prefix="cropkt-ray-",
        dir=parent if len(parent) < _LONGEST_PARENT else "/tmp",
        ignore_cleanup_errors=True,  # Ray's processes may still be writing their last line
    ) as folder:
        yield folder


def _kill_actors() -> None:
    """End Flower's actors, and with them the tasks that they are working on.

    Flower keeps its actors to itself, and Ray lists them only through its dashboard. Ray did not
    run before the engine started it, so that every actor that this process knows is one of them.
    """
    import ray
    from ray.actor import ActorHandle

    if not ray.is_initialized():
        return
    for actor in [thing for thing in gc.get_objects() if isinstance(thing, ActorHandle)]:
        with contextlib.suppress(Exception):  # it has ended
            ray.kill(actor)


@contextlib.contextmanager
def _quiet_flower() -> Iterator[None]:
    """Hold back Flower's log while its tasks are ended: it reports each as an error."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _copy(message: Message) -> Message:
    """Return a new message to the same site; Flower's grid changes the one that it is given."""
    given = message.metadata
    return Message(
        message.content,
        given.dst_node_id,
        given.message_type,
        ttl=given.ttl,
        group_id=given.group_id,
    )


def _outcome(reply: Message) -> RecordDict | Error:
    """Return what a reply of Flower's engine carries."""
    if reply.has_content():
        return reply.content
    # SiteApp never raises: an unknown error is the death of the actor that ran it. Flower's
    # reason holds the text of the exception, so another takes its place.
    if reply.error.code == ErrorCode.UNKNOWN:
        return Error(ErrorCode.CLIENT_APP_CRASHED, "worker died on Ray")
    return reply.error


def _root(error: BaseException) -> BaseException:
    """Return the first cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
