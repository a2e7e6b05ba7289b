"""Run the coordinator's and the hospitals' apps on one machine or cluster.

The ServerApp and ClientApp are those of a real federation. Two engines carry their messages:

- "local": processes of this machine. Starts in a second, needs nothing but Flower.
- "ray": Flower's simulation engine on Ray, which also spans a cluster.

Deterministic apps give the same results on both: sites answer one message at a time, each with
one thread. Node ids differ, as they do in a real federation; apps tell sites by what they say.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Literal, get_args

from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from cropkt.errors import UsageError
from cropkt_sim.apps import check_reference, load_app
from cropkt_sim.flower_internals import SERVER_NODE_ID, identify_process

Engine = Literal["local", "ray"]

_ENVIRONMENT = {
    # Nobody phones home, and Flower's reads of a file in the home directory find none.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers read these before their first line runs, so they must be set before they start.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Ray would wrap its workers in `uv run`, and hide GPUs from actors that reserve none.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # By default Ray repeats for ever what it killed for want of memory.
    "RAY_task_oom_retries": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def simulate(
    *,
    server_app: str,
    client_app: str,
    nodes: int,
    run_config: Mapping[str, str | int | float | bool],
    engine: Engine = "local",
    workers: int = 0,
) -> None:
    """Run a federation until its server app returns.

    The server app runs in the calling thread. Whatever ends the run, Ctrl-C and SIGTERM included,
    leaves no process behind.

    A site's task whose process dies is answered by the error CLIENT_APP_CRASHED, on Ray after a
    second try. An app that raises is answered by CLIENT_APP_RAISED_EXCEPTION and the exception's
    name.

    Args:
        server_app: import reference of a `ServerApp`, as in "cropkt_server.app:app".
        client_app: import reference of a `ClientApp`; each worker imports it once.
        nodes: number of sites. Site i sees the node_config {"partition-id": i,
            "num-partitions": nodes}.
        run_config: what both apps see as `context.run_config`.
        engine: what carries the messages.
        workers: sites that work at the same time; 0 for one per usable core.

    Raises:
        UsageError: an argument is wrong, or Ray is asked for and not there.
        TrainingFailedError: the engine itself failed.
        BaseException: what the server app raised.
    """
    _check(server_app, client_app, nodes=nodes, engine=engine, workers=workers)
    workers = workers or len(os.sched_getaffinity(0))
    with _environment(), _sigterm_raises():
        app = load_app(server_app, ServerApp)
        if engine == "ray":
            from cropkt_sim.ray_engine import simulate_on_ray  # not needed for "local"

            simulate_on_ray(app, client_app, nodes=nodes, run_config=run_config, workers=workers)
        else:
            _simulate_locally(app, client_app, nodes=nodes, run_config=run_config, workers=workers)


def _simulate_locally(
    server_app: ServerApp,
    client_app: str,
    *,
    nodes: int,
    run_config: Mapping[str, str | int | float | bool],
    workers: int,
) -> None:
    from cropkt_sim.local_grid import LocalGrid

    run_id = secrets.randbits(62)
    identify_process(run_id=run_id, node_id=SERVER_NODE_ID)
    context = Context(
        run_id=run_id,
        node_id=SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    with LocalGrid(
        client_app, nodes=nodes, run_config=run_config, workers=workers, run_id=run_id
    ) as grid:
        server_app(grid=grid, context=context)


def _check(server_app: str, client_app: str, *, nodes: int, engine: str, workers: int) -> None:
    if engine not in get_args(Engine):
        choices = " or ".join(get_args(Engine))
        raise UsageError("--engine", f"there is no engine {engine!r}", f"Choose {choices}")
    if nodes < 1:
        raise UsageError("nodes", f"a federation needs a site, got {nodes}")
    if workers < 0:
        raise UsageError("--workers", f"cannot be negative, got {workers}", "0 means all cores")
    check_reference(server_app)
    check_reference(client_app)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Set `_ENVIRONMENT` and a Flower home for the run, and restore all variables after it."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="cropkt-flower-") as home:
        os.environ.update(_ENVIRONMENT, FLWR_HOME=home)
        if not os.environ.get("RAY_ADDRESS"):
            # Elsewhere the default: Ray then listens on loopback only. It asks nobody who comes
            # for a password, and whoever comes may run code.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        try:
            yield
        finally:
            # All of them: Flower's engine also changes PYTHONPATH.
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit for the run, so that it unwinds as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
