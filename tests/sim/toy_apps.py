"""A small federation for the tests of the engines; imported by name in workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
failing = ServerApp()
leaving = ServerApp()
waiting = ServerApp()
crashing = ServerApp()
counting = ServerApp()
impatient = ServerApp()
client = ClientApp()


def _ask(node: int, kind: str, **values: Any) -> Message:
    arrays = ArrayRecord([np.arange(6, dtype=np.float32).reshape(2, 3), np.array([0.1, 0.3])])
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(values)})
    return Message(content, node, kind, group_id=kind)


def _read(reply: Message) -> dict[str, Any]:
    if reply.has_error():
        return {"error": reply.error.code, "reason": reply.error.reason}
    arrays = reply.content.array_records.get("arrays", ArrayRecord())
    return {
        "arrays": [[a.dtype.str, a.tolist()] for a in arrays.to_numpy_ndarrays()],
        **{name: dict(record) for name, record in reply.content.metric_records.items()},
        **{name: dict(record) for name, record in reply.content.config_records.items()},
    }


def _sites(grid: Grid) -> dict[int, int]:
    """Return the node of each site: only the sites know who they are."""
    replies = grid.send_and_receive([_ask(n, "query.describe") for n in grid.get_node_ids()])
    return {
        int(r.content["config"]["partition-id"]): r.metadata.src_node_id  # type: ignore[arg-type]
        for r in replies
    }


def _write(context: Context, result: Any) -> None:
    Path(str(context.run_config["out"])).write_text(json.dumps(result))


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Send every site several messages at once, of several kinds, two of which fail."""
    nodes = _sites(grid)
    kinds = ["train.expert", "evaluate.transfer", "train.expert", "train.fails", "query.unknown"]
    asked = {}
    for turn, kind in enumerate([*kinds, "query.describe"]):
        messages = [_ask(node, kind, turn=turn) for _, node in sorted(nodes.items())]
        for site, message_id in zip(sorted(nodes), grid.push_messages(messages), strict=True):
            asked[message_id] = f"{site}/{turn}/{kind}"
    result = {}
    while asked:
        for reply in grid.pull_messages(list(asked)):
            name = asked.pop(reply.metadata.reply_to_message_id)
            assert reply.metadata.src_node_id == nodes[int(name.split("/")[0])]
            result[name] = _read(reply)
        time.sleep(0.01)
    config = {k: v for k, v in context.run_config.items() if k != "out"}
    _write(context, {"run_config": config, "replies": dict(sorted(result.items()))})


@failing.main()
def fail(grid: Grid, context: Context) -> None:
    grid.push_messages([_ask(node, "train.sleeps") for node in grid.get_node_ids()])
    raise LookupError("from the server app")


@leaving.main()
def leave(grid: Grid, context: Context) -> None:
    raise SystemExit(3)


@waiting.main()
def wait(grid: Grid, context: Context) -> None:
    try:
        grid.send_and_receive([_ask(node, "train.sleeps") for node in grid.get_node_ids()])
    except Exception:  # what a server app may do: it must not keep it from ending
        _write(context, "kept going")


@crashing.main()
def crash(grid: Grid, context: Context) -> None:
    """Kill the worker of site 0 in mid-task, with work queued for all sites."""
    nodes = _sites(grid)
    messages = [_ask(nodes[0], "train.dies")]
    messages += [_ask(n, "train.expert", turn=t) for t in range(3) for n in nodes.values()]
    replies = grid.send_and_receive(messages)
    by_id = {r.metadata.reply_to_message_id: _read(r) for r in replies}
    died, *others = [by_id[m.metadata.message_id] for m in messages]
    counts = [o["metrics"]["calls"] for o in others if "error" not in o]
    _write(context, {"died": died["error"], "counts": counts})


@counting.main()
def threads(grid: Grid, context: Context) -> None:
    messages = [_ask(node, "query.threads") for node in grid.get_node_ids()]
    _write(context, [_read(reply) for reply in grid.send_and_receive(messages)])


@impatient.main()
def hurry(grid: Grid, context: Context) -> None:
    """Wait too short a time for a reply, then for as long as it takes."""
    message = _ask(next(iter(grid.get_node_ids())), "train.expert")
    early = list(grid.send_and_receive([message], timeout=0.01))
    late: list[Message] = []
    while not late:
        late += grid.pull_messages([message.metadata.message_id])
        time.sleep(0.01)
    _write(context, {"early": len(early), "late": len(late)})


def _count(context: Context) -> int:
    """Count the calls of this site in its state."""
    record = context.state.metric_records.setdefault("calls", MetricRecord({"n": 0}))
    calls = record["n"]
    assert isinstance(calls, int)
    record["n"] = calls + 1
    return calls + 1


@contextlib.contextmanager
def _alone(context: Context) -> Iterator[None]:
    """Fail if another message of this site is being answered at the same time."""
    out = context.run_config.get("out")
    lock = Path(f"{out}.{context.node_config['partition-id']}.lock")
    lock.touch(exist_ok=False)
    try:
        yield
    finally:
        lock.unlink()


@client.query("describe")
def describe(message: Message, context: Context) -> Message:
    config = ConfigRecord({**context.node_config, "greeting": context.run_config["greeting"]})
    metrics = MetricRecord({"calls": _count(context)})
    return Message(RecordDict({"config": config, "metrics": metrics}), reply_to=message)


@client.train("expert")
def train(message: Message, context: Context) -> Message:
    with _alone(context):
        time.sleep(0.05)
        calls, site = _count(context), int(context.node_config["partition-id"])
        arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
        trained = ArrayRecord([a * (site + 1) + calls for a in arrays])
    metrics = MetricRecord({"calls": calls, "loss": float(np.exp(-site) / calls)})
    return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)


@client.evaluate("transfer")
def evaluate(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"calls": _count(context), "c_index": [0.5, 0.625]})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@client.train("fails")
def fails(message: Message, context: Context) -> Message:
    _count(context)  # must not be kept
    context.run_config["greeting"] = "changed"  # nor this
    raise ZeroDivisionError("patient-0815 in /data/secret")


@client.train("dies")
def dies(message: Message, context: Context) -> Message:
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@client.train("sleeps")
def sleeps(message: Message, context: Context) -> Message:
    """Work for a minute, with a child process of its own."""
    import subprocess

    out = Path(f"{context.run_config['out']}.{context.node_config['partition-id']}.started")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        out.write_text(str(child.pid))
        child.wait()
    return Message(RecordDict(), reply_to=message)


@client.query("threads")
def count_threads(message: Message, context: Context) -> Message:
    import torch

    config = ConfigRecord(
        {"torch": torch.get_num_threads(), "omp": os.environ.get("OMP_NUM_THREADS", "")}
    )
    return Message(RecordDict({"config": config}), reply_to=message)
