"""The private parts of Flower that a simulation cannot do without, all in one place.

Everything else in `cropkt_sim` uses Flower's public packages `flwr.app`, `flwr.clientapp` and
`flwr.serverapp`. An upgrade of Flower that breaks the simulation breaks it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from flwr.app import Message
from flwr.clientapp import ClientApp

# The numbers of the errors that a reply can carry: documented, exported by no public package.
from flwr.common.constant import ErrorCode as ErrorCode
from flwr.serverapp import ServerApp

# Only the type of `Grid.run`, which the public abstract class makes every grid provide.
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1
"""The node id of the server: Flower gives no hospital this one."""


def identify_process(*, run_id: int, node_id: int) -> None:
    """Say which node of which run this process is.

    `Message(...)` reads its sender from this global and fails where it is unset. Flower's own
    runtimes set it in the processes that they start; the local engine starts its own.
    """
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id


def new_message_id(message: Message) -> str:
    """Give a message a fresh id, as the link does that would carry it, and return the id.

    `Metadata.message_id` has no setter; Flower's own grids write it in this same way.
    """
    message_id = uuid4().hex
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


def run_on_ray(
    *, server_app: ServerApp, client_app: ClientApp, nodes: int, backend: Mapping[str, Any]
) -> None:
    """Run Flower's simulation engine in this process until the server app has returned.

    Of its two public doors `run_simulation` is deprecated, and `run_simulation_process` needs a
    SuperLink to talk to. Both call the function used here, whose arguments have not changed with
    the door.
    """
    # Imported late: Ray is an optional dependency, and a second of start-up.
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore import telemetry

    # The engine sends an event when it ends, from a thread that outlives the run. Flower read
    # FLWR_TELEMETRY_ENABLED when it was imported, perhaps before `simulate` could set it; and
    # without a source at hand, the thread writes one into the home directory.
    telemetry.FLWR_TELEMETRY_ENABLED = "0"
    telemetry.state["source"] = "unavailable"
    _run_simulation(
        num_supernodes=nodes,
        exit_event=telemetry.EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app=client_app,
        server_app=server_app,
        backend_name="ray",
        backend_config=dict(backend),
    )
