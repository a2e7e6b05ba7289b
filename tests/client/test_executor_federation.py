"""A real client against the real coordinator: TLS, enrolment, attacks, kills."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import psutil
import pytest
from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from cropkt.bundle import bundle
from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.invite import encode_invite
from cropkt.messages import (
    REPLIES,
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    Message,
)
from cropkt.wire import from_record, to_record
from cropkt_client.log import LOG_NAME, State, read_status

serving = pytest.importorskip("cropkt_server.superlink").serving
pki = pytest.importorskip("cropkt_server.pki")
roster = pytest.importorskip("cropkt_server.roster")
enrolment = pytest.importorskip("cropkt_server.enrolment")

pytestmark = [
    pytest.mark.federation,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # Flower's own database migrations, on the coordinator's side.
    pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CLIENT = [sys.executable, "-c", "from cropkt_client.cli import main; main()"]
SITE = "site-UVM"
Main = Callable[[Grid, Context], None]


class Federation:
    """A coordinator in this process, and one hospital in processes of its own."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config = folder / "coordinator", config
        self.state = config.parent / "state"
        self.folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.host = f"127.0.0.1:{probe.getsockname()[1]}"
        self.keys = pki.Keys.of(self.folder)
        pki.make_keys(self.keys, ["127.0.0.1"], study="eye")
        self._stack = ExitStack()
        self.client: subprocess.Popen[str] | None = None
        self.up()

    def up(self) -> None:
        """Start the coordinator."""
        self.link = self._stack.enter_context(
            serving(self.folder, study="eye", host=self.host, listen="127.0.0.1")
        )

    def down(self) -> None:
        """Stop the coordinator."""
        self._stack.close()

    def enrol(self) -> None:
        with_roster = roster.Roster(self.folder)
        door = enrolment.Enrolment(study="eye", host=self.host, keys=self.keys, roster=with_roster)
        invite = encode_invite(door.invite(SITE, [Cancer.UVM], time.time() + 3600))
        with_roster.close()
        self.run("enrol", invite)

    def revoke(self) -> None:
        with_roster = roster.Roster(self.folder)
        with_roster.revoke(SITE)
        with_roster.close()

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*CLIENT, *arguments, "--config", str(self.config)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode in (0, 3), done.stderr
        return done.stdout

    def serve(self) -> None:
        """Start the client."""
        self.client = subprocess.Popen(
            [*CLIENT, "--site", SITE, "--cancer", "UVM", "--config", str(self.config)],
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def kill(self) -> None:
        """Kill -9 the client."""
        assert self.client is not None
        self.client.kill()
        self.client.wait()

    def status(self) -> State:
        told = read_status(self.state)
        assert told is not None
        return told

    def log(self) -> str:
        path = self.state / LOG_NAME
        return path.read_text() if path.exists() else ""

    def ask(self, request: Message, kind: str) -> FlowerMessage:
        """Return the reply to one message, sent again with its task as long as it gets lost."""
        got: list[FlowerMessage] = []

        def main(grid: Grid, _: Context) -> None:
            end = time.monotonic() + 200
            waiting: list[str] = []
            while not got:
                assert time.monotonic() < end, self.log()
                if not waiting and (nodes := list(grid.get_node_ids())):
                    message = FlowerMessage(
                        to_record(request), dst_node_id=nodes[0], message_type=kind
                    )
                    waiting = list(grid.push_messages([message]))
                for reply in grid.pull_messages(waiting):
                    waiting = []
                    lost = reply.has_error() and reply.error.code in (
                        ErrorCode.NODE_UNAVAILABLE,
                        ErrorCode.CLIENT_APP_CRASHED,
                        ErrorCode.MESSAGE_UNAVAILABLE,
                        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
                    )
                    if not lost:
                        got.append(reply)
                time.sleep(0.2)

        self.link.run_server_app(main, {})
        return got[0]

    def close(self) -> None:
        if self.client and self.client.poll() is None:
            self.client.terminate()
            self.client.wait(40)
        self.down()


@pytest.fixture
def federation(tmp_path: Path, make_site: Any) -> Iterator[Federation]:
    make_site()
    federation = Federation(tmp_path, tmp_path / "UVM" / "site.yaml")
    yield federation
    federation.close()


def _until(true: Callable[[], object], *, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def _children(pid: int, name: str) -> list[psutil.Process]:
    """Return the children of a client that run `name`."""
    return [c for c in psutil.Process(pid).children() if any(name in a for a in c.cmdline())]


def _describe(study: StudyConfig) -> DescribeRequest:
    return DescribeRequest(task="describe/a", study=study)


def test_a_message_goes_round(federation: Federation, study: StudyConfig) -> None:
    federation.enrol()
    federation.serve()
    answer = from_record(
        federation.ask(_describe(study), "query.describe").content, expected=REPLIES
    )
    assert isinstance(answer, DescribeReply), answer
    assert answer.site == SITE
    assert federation.status().connected
    told = json.loads(federation.run("status", "--json"))
    assert told["running"]
    assert told["tasks_done"] == 1
    federation.run("stop")
    assert federation.client is not None
    assert federation.client.wait(10) == 143


def test_a_hostile_bundle_is_refused_and_executes_nothing(
    federation: Federation, study: StudyConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w')\n"
    stream = BytesIO(bundle())
    with ZipFile(stream, "a") as archive:
        for name in ("cropkt_client/__init__.py", "cropkt_client/app.py", "sitecustomize.py"):
            archive.writestr(name, code)
    hostile = stream.getvalue()
    federation.enrol()
    federation.serve()
    monkeypatch.setattr("cropkt_server.superlink.bundle", lambda: hostile)
    monkeypatch.setattr(
        "cropkt_server.superlink.bundle_hash", lambda: hashlib.sha256(hostile).hexdigest()
    )
    reply = federation.ask(_describe(study), "query.describe")
    assert reply.has_error()
    assert reply.error.code == ErrorCode.INVALID_FAB
    assert not marker.exists()
    assert "refused a foreign bundle" in federation.log()


def test_kills_of_every_process_cost_nothing_but_time(
    federation: Federation, study: StudyConfig
) -> None:
    """Kill -9 the training child, then the SuperNode, then the client, all in mid-task."""
    federation.enrol()
    federation.serve()
    study = replace(study, training=replace(study.training, minimum_updates=500))
    slow = ExpertRequest(task="expert/UVM/a", study=study, cancer=Cancer.UVM)
    kills: dict[str, float] = {}

    def kill() -> None:
        assert federation.client is not None
        pid = federation.client.pid
        _until(lambda: "train.expert: begins" in federation.log())
        _until(lambda: _children(pid, "cropkt_client.worker"))
        os.kill(_children(pid, "cropkt_client.worker")[0].pid, signal.SIGKILL)
        kills["training"] = time.monotonic()
        _until(lambda: "trying again" in federation.log())
        os.kill(_children(pid, "cropkt_client.supernode")[0].pid, signal.SIGKILL)
        kills["supernode"] = time.monotonic()
        time.sleep(1)
        children = psutil.Process(pid).children(recursive=True)
        federation.kill()
        kills["client"] = time.monotonic()
        _until(lambda: not any(child.is_running() for child in children))
        federation.serve()

    thread = threading.Thread(target=kill)
    thread.start()
    reply = federation.ask(slow, "train.expert")
    thread.join()
    sys.stderr.write(f"answered {time.monotonic() - kills['client']:.0f} s after the last kill\n")
    answer = from_record(reply.content, expected=REPLIES)
    assert isinstance(answer, ExpertReply), answer
    again = from_record(federation.ask(slow, "train.expert").content, expected=REPLIES)
    assert isinstance(again, ExpertReply)
    assert again.weights.tobytes() == answer.weights.tobytes()
    assert again.seconds == answer.seconds  # from the store: it was not trained again


def test_a_coordinator_that_restarts_is_found_again(
    federation: Federation, study: StudyConfig
) -> None:
    federation.enrol()
    federation.serve()
    federation.ask(_describe(study), "query.describe")
    federation.down()
    time.sleep(3)
    federation.up()
    reply = federation.ask(_describe(study), "query.describe")
    assert isinstance(from_record(reply.content, expected=REPLIES), DescribeReply)


def test_a_revoked_site_ends(federation: Federation, study: StudyConfig) -> None:
    federation.enrol()
    federation.serve()
    federation.ask(_describe(study), "query.describe")
    federation.revoke()
    assert federation.client is not None
    assert federation.client.wait(120) == 77
    assert "cut this site off" in str(federation.status().error)
