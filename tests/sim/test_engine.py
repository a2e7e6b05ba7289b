"""Both engines run the same small federation, and leave nothing behind."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from cropkt.errors import MessageError, TrainingFailedError, UsageError
from cropkt_sim.apps import load_app
from cropkt_sim.engine import Engine, simulate
from cropkt_sim.flower_internals import ErrorCode, identify_process
from cropkt_sim.grid import Turns

HERE = Path(__file__).parent
NODES = 5
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install ".[ray]"'
)
# Ray leaves files and Popen objects to the garbage collector: not ours to fix.
untidy = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
ray = pytest.param("ray", marks=[needs_ray, untidy, pytest.mark.ray])
both = pytest.mark.parametrize("engine", ["local", ray])


@pytest.fixture(autouse=True)
def toy_apps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find the toy apps; workers inherit its path."""
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Give each test a home directory, in which nothing may appear."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield folder
    gc.collect()  # so that what Ray left warns here, where a test may ignore it
    assert list(folder.iterdir()) == []


def run(app: str, out: Path, *, engine: Engine = "local", client: str = "toy_apps:client") -> Any:
    """Run a toy server app, and return what it wrote."""
    simulate(
        server_app=f"toy_apps:{app}",
        client_app=client,
        nodes=NODES,
        run_config={"out": str(out), "greeting": "hello", "rate": 1.5, "deep": True},
        engine=engine,
        workers=2,
    )
    return json.loads(out.read_text())


def workers() -> list[psutil.Process]:
    """Return this process's descendants, less the tracker that Python keeps until it exits."""
    processes = psutil.Process().children(recursive=True)
    return [p for p in processes if "resource_tracker" not in " ".join(p.cmdline())]


def by_definition(site: int) -> dict[str, Any]:
    """Return what a site must answer to the messages of toy_apps.main."""

    def expert(calls: int) -> dict[str, Any]:
        first = [[float(x * (site + 1) + calls) for x in row] for row in ([0, 1, 2], [3, 4, 5])]
        second = [x * (site + 1) + calls for x in (0.1, 0.3)]
        return {
            "arrays": [["<f4", first], ["<f8", pytest.approx(second)]],
            "metrics": {"calls": calls, "loss": pytest.approx(math.exp(-site) / calls)},
        }

    raised = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return {  # the first call was the query that found the sites
        f"{site}/0/train.expert": expert(2),
        f"{site}/1/evaluate.transfer": {
            "arrays": [],
            "metrics": {"calls": 3, "c_index": [0.5, 0.625]},
        },
        f"{site}/2/train.expert": expert(4),
        f"{site}/3/train.fails": {"error": raised, "reason": "ZeroDivisionError"},
        f"{site}/4/query.unknown": {"error": raised, "reason": "ValueError"},
        f"{site}/5/query.describe": {
            "arrays": [],
            "metrics": {"calls": 5},
            "config": {"partition-id": site, "num-partitions": NODES, "greeting": "hello"},
        },
    }


def test_every_site_answers_as_defined(tmp_path: Path) -> None:
    result = run("app", tmp_path / "out")
    assert result["run_config"] == {"greeting": "hello", "rate": 1.5, "deep": True}
    assert result["replies"] == {
        k: v for site in range(NODES) for k, v in by_definition(site).items()
    }


@needs_ray
@untidy
@pytest.mark.ray
def test_ray_gives_what_local_gives(tmp_path: Path) -> None:
    assert run("app", tmp_path / "r", engine="ray") == run("app", tmp_path / "l", engine="local")


@both
def test_an_error_of_the_server_app_passes_through(engine: Engine, tmp_path: Path) -> None:
    before = dict(os.environ)
    start = time.monotonic()
    with pytest.raises(LookupError, match="from the server app"):
        run("failing", tmp_path / "out", engine=engine)
    assert time.monotonic() - start < 55  # its sites would sleep for a minute
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    _, alive = psutil.wait_procs(workers(), timeout=5)
    assert alive == []


@both
def test_a_server_app_may_exit(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="3"):
        run("leaving", tmp_path / "out", engine=engine)


@both
def test_a_killed_worker_costs_only_its_message(engine: Engine, tmp_path: Path) -> None:
    result = run("crashing", tmp_path / "out", engine=engine)
    assert result["died"] == ErrorCode.CLIENT_APP_CRASHED
    assert result["counts"] == [2] * NODES + [3] * NODES + [4] * NODES  # after the first query


@both
def test_a_site_has_one_thread(engine: Engine, tmp_path: Path) -> None:
    replies = run("counting", tmp_path / "out", engine=engine)
    assert [r["config"] for r in replies] == [{"torch": 1, "omp": "1"}] * NODES


@both
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(engine: str, number: signal.Signals, tmp_path: Path) -> None:
    process = _start_waiting(engine, tmp_path)
    children = process.children(recursive=True)
    assert any("time.sleep(60)" in " ".join(c.cmdline()) for c in children)
    process.send_signal(number)
    code = process.wait(timeout=20)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    assert code == (-signal.SIGINT if number == signal.SIGINT else 128 + signal.SIGTERM)
    assert not (tmp_path / "out").exists()  # the server app did not go on
    assert list((tmp_path / "tmp").iterdir()) == []


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    process = _start_waiting("local", tmp_path)
    children = process.children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs([process, *children], timeout=10)
    assert alive == []


def _as_from_a_terminal() -> None:
    """Undo what this process may have inherited: signals ignored or blocked."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def _start_waiting(engine: str, folder: Path) -> psutil.Popen:
    """Start a simulation in a process, and return once two sites are working."""
    (folder / "tmp").mkdir()
    config = {"out": str(folder / "out"), "greeting": "hello"}
    script = (
        "from cropkt_sim.engine import simulate\n"
        "simulate(server_app='toy_apps:waiting', client_app='toy_apps:client', "
        f"nodes=3, run_config={config!r}, engine={engine!r}, workers=2)"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(folder / "tmp"),
    }
    log = (folder / "log").open("w")
    process = psutil.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=_as_from_a_terminal,
    )
    log.close()
    deadline = time.monotonic() + 90
    while len(list(folder.glob("out.*.started"))) < 2:
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    return process


def test_a_client_app_that_cannot_be_imported(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "broken_app.py").write_text("raise OSError('/data/secret')")
    monkeypatch.syspath_prepend(tmp_path)
    replies = run("counting", tmp_path / "out", client="broken_app:client")
    code = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
    assert replies == [{"error": code, "reason": "OSError"}] * NODES


def test_workers_that_cannot_start(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "deadly_app.py").write_text("import os; os._exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingFailedError, match="died at start, exit code 3"):
        run("counting", tmp_path / "out", client="deadly_app:client")
    assert workers() == []


def test_a_wait_has_a_limit(tmp_path: Path) -> None:
    assert run("impatient", tmp_path / "out") == {"early": 0, "late": 1}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"nodes": 0}, "needs a site"),
        ({"workers": -1}, "negative"),
        ({"engine": "spark"}, "Choose local or ray"),
        ({"client_app": "toy_apps"}, "package.module:attribute"),
        ({"client_app": "no_such.module:app"}, "no module no_such.module"),
        ({"server_app": "toy_apps:client"}, "not a ServerApp"),
        ({"server_app": "toy_apps:nothing"}, "not a ServerApp"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], match: str) -> None:
    right = {"server_app": "toy_apps:app", "client_app": "toy_apps:client", "nodes": 1}
    with pytest.raises(UsageError, match=match):
        simulate(run_config={}, **cast(Any, right | wrong))


def test_without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cropkt_sim.ray_engine.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        run("app", tmp_path / "out", engine="ray")


def test_an_app_is_loaded_once() -> None:
    from flwr.clientapp import ClientApp

    app = load_app("toy_apps:client", ClientApp)
    assert load_app("toy_apps:client", ClientApp) is app


def _message(node: int) -> Message:
    identify_process(run_id=1, node_id=1)
    return Message(RecordDict(), node, "train.expert")


@given(order=st.lists(st.integers(0, 3), max_size=20), data=st.data())
def test_turns(order: list[int], data: st.DataObject) -> None:
    """Each site answers in order, one at a time, and no site waits while another goes twice."""
    turns = Turns(range(4))
    messages = [_message(node) for node in order]
    pending, busy, taken = list(messages), list[Message](), list[Message]()
    for message in messages:
        turns.put(message)
    while pending or busy:
        idle = [
            m
            for m in pending
            if m.metadata.dst_node_id not in {b.metadata.dst_node_id for b in busy}
        ]
        if busy and (not idle or data.draw(st.booleans())):
            done = busy.pop(data.draw(st.integers(0, len(busy) - 1)))
            turns.done(done.metadata.dst_node_id)
            continue
        message = turns.take()  # type: ignore[assignment]
        assert message in idle
        node = message.metadata.dst_node_id
        assert message is next(m for m in pending if m.metadata.dst_node_id == node)
        pending.remove(message)
        busy.append(message)
        taken.append(message)
    assert turns.take() is None
    assert len(taken) == len(messages)


def test_turns_are_fair() -> None:
    turns = Turns([0, 1, 2])
    for node in [0, 0, 0, 1, 1, 2]:
        turns.put(_message(node))
    order = []
    while (message := turns.take()) is not None:  # one worker
        order.append(message.metadata.dst_node_id)
        turns.done(order[-1])
    assert order == [0, 1, 2, 0, 1, 0]


def test_no_such_node() -> None:
    with pytest.raises(MessageError, match="node 7"):
        Turns([1]).put(_message(7))
