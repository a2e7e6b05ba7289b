"""What a message costs on each engine of the simulation: empty tasks, on this machine.

    python benchmarks/bench_engines.py [--nodes 26 --nodes 260] [--engine local --engine ray]

Start-up is from the call of `simulate` to the first line of the server app; the first round also
waits for workers to start. Later rounds are the median of several.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from rich.console import Console
from rich.table import Table

from cropkt_sim.engine import Engine, simulate

server = ServerApp()
client = ClientApp()


@server.main()
def rounds(grid: Grid, context: Context) -> None:
    """Send every site an empty message, several times, and write how long each round took."""
    seconds = [time.time() - float(context.run_config["started"])]
    for _ in range(int(context.run_config["rounds"])):
        start = time.perf_counter()
        messages = [Message(RecordDict(), node, "query.nothing") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages))
        seconds.append(time.perf_counter() - start)
        if len(replies) != len(messages) or any(reply.has_error() for reply in replies):
            raise RuntimeError("a message failed, so that the times mean nothing")
    Path(str(context.run_config["out"])).write_text(json.dumps(seconds))


@client.query("nothing")
def nothing(message: Message, context: Context) -> Message:
    """Answer nothing."""
    return Message(RecordDict(), reply_to=message)


def measure(engine: Engine, nodes: int, *, rounds: int, workers: int) -> list[float]:
    """Return the seconds of start-up, and of each round."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        simulate(
            server_app="engines:server",
            client_app="engines:client",
            nodes=nodes,
            run_config={"out": str(out), "rounds": rounds, "started": time.time()},
            engine=engine,
            workers=workers,
        )
        seconds: list[float] = json.loads(out.read_text())
    return seconds


def main(
    nodes: Annotated[list[int] | None, typer.Option(help="Sites; repeat for several.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="local or ray; repeat.")] = None,
    rounds: Annotated[int, typer.Option(min=2)] = 6,
    workers: Annotated[int, typer.Option(help="0 for one per usable core.")] = 0,
) -> None:
    """Measure the engines and print a table."""
    cores = workers or len(os.sched_getaffinity(0))
    table = Table(
        "engine", "sites", "start-up, s", "first round, s", "later round, s", "ms/message"
    )
    table.title = f"empty tasks, {cores} workers, {rounds - 1} later rounds"
    for name in engine or ["local", "ray"]:
        for count in nodes or [26, 260]:
            start, first, *later = measure(
                "ray" if name == "ray" else "local", count, rounds=rounds, workers=workers
            )
            median = statistics.median(later)
            each = f"{1000 * median / count:.2f}"
            table.add_row(name, str(count), f"{start:.2f}", f"{first:.2f}", f"{median:.3f}", each)
    Console().print(table)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # workers find this file as "engines"
    typer.run(main)
