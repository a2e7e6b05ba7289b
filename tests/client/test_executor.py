"""The executor against Flower's own SuperNode API on loopback, its app in a real child process."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from flwr.app import Context, Error, Message, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _pull_and_store_message

from cropkt.bundle import bundle, bundle_hash
from cropkt.cancers import Cancer
from cropkt.config import ExpertShape, StudyConfig
from cropkt.messages import REPLIES, ExpertReply, ExpertRequest, Failure, Fewest, Score
from cropkt.wire import from_record, to_record
from cropkt_client import executor as module
from cropkt_client.executor import Executor, run_app
from cropkt_client.gate import Gate
from cropkt_client.ledger import Ledger
from cropkt_client.log import Status
from cropkt_client.settings import ReleasePolicy
from cropkt_client.worker import Worker

HERE = Path(__file__).parent
NODE, RUN = 77, 5
STUDY = StudyConfig(folds=3, shape=ExpertShape(dim=1, embed=1, attention=1, bins=1))
SENT = np.arange(STUDY.models * STUDY.shape.parameters, dtype=np.float32).reshape(STUDY.models, -1)
toys = ClientApp()


@toys.train("expert")
def train(message: Message, context: Context) -> Message:
    """Do in the child what the round says."""
    request = from_record(message.content, expected=(ExpertRequest,))
    assert isinstance(request, ExpertRequest)
    marks = Path(str(context.node_config["marks"]))
    attempts = len(list(marks.iterdir()))
    (marks / f"{attempts}").touch()
    if request.round == 1:
        raise LookupError(f"patient-{815:04d}")
    if request.round == 2 or (request.round == 3 and attempts == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if request.round == 4:
        time.sleep(60)
    assert request.weights is not None
    reply = ExpertReply(
        task=request.task,
        cancer=request.cancer,
        patients=40,
        events=10,
        weights=2 * request.weights,
        score=Score(c_index=0.6, se=0.1),
        seconds=1.0,
        fewest=Fewest(patients=40, events=10),
    )
    if request.round == 5:
        return Message(to_record(reply), reply_to=message)
    gate = Gate(site="lumc", state=marks.parent / "state", release=ReleasePolicy(approval="auto"))
    return gate.release(reply, request, to=message)


def run_toy(
    identity: tuple[int, int, int], message: Message, context: Context
) -> tuple[Message, Context]:
    """Call the toy app as the installed one is called."""
    module.APP = "test_executor:toys"
    return run_app(identity, message, context)


class SuperNode:
    """Flower's SuperNode, with a test in the coordinator's place."""

    def __init__(self, marks: Path) -> None:
        objects = ObjectStoreFactory()
        factory = NodeStateFactory(objectstore_factory=objects)
        self.state, self.store = factory.state(), objects.store()
        self.state.set_node_id(NODE)
        self.secret = secrets.token_bytes(32)
        self._config: UserConfig = {"marks": str(marks)}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(create_app(factory, self.secret), log_level="warning", ws="none")
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._listener.close()

    def send(self, message: Message, fab: bytes, *, run: int = RUN) -> None:
        """Let the SuperNode pull a message, as from a coordinator that ships `fab`."""
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
        tree = get_object_tree(message)

        digest = hashlib.sha256(fab).hexdigest()

        def get_run(run_id: int) -> Run:
            found = Run.create_empty(run_id)
            found.fab_hash, found.fab_id, found.fab_version = digest, "cropkt/cropkt", "1.0.0"
            return found

        pulled = _pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config=self._config,
            receive=lambda: (message, tree),
            get_run=get_run,
            get_fab=lambda _, __: Fab(digest, fab, {}),
            pull_object=lambda _, name: objects[name],
            confirm_message_received=lambda _, __: None,
            trusted_entities=None,
        )
        assert pulled == run

    def reply(self, *, seconds: float = 30.0) -> Message:
        """Return the reply, with its content."""
        end = time.monotonic() + seconds
        while not (found := self.state.get_messages_legacy(is_reply=True)):
            assert time.monotonic() < end
            time.sleep(0.05)
        (reply,) = found
        name = reply.metadata.message_id
        tree = self.store.get_object_tree(name)
        names = [item.object_id for item in iterate_object_tree(tree)]
        while not all(self.store.get(each) for each in names):  # objects follow the message
            time.sleep(0.05)
        contents = {each: self.store.get(each) or b"" for each in names}
        whole = inflate_object_from_contents(name, contents)
        assert isinstance(whole, Message)
        return whole


def _request(round_: int) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1
    request = ExpertRequest(
        task=f"expert/{round_}",
        study=STUDY,
        cancer=Cancer.UVM,
        round=round_,
        shared=True,
        weights=SENT,
    )
    return Message(to_record(request), dst_node_id=NODE, message_type="train.expert")


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """One file for each time that the app ran."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture
def node(marks: Path) -> Iterator[SuperNode]:
    node = SuperNode(marks)
    yield node
    node.stop()


@pytest.fixture
def start(
    node: SuperNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[], tuple[Executor, Status]]]:
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [path])]))
    monkeypatch.setattr(module, "POLL", 0.05)
    executors: list[Executor] = []

    def begin() -> tuple[Executor, Status]:
        status = Status(tmp_path / "state", site="lumc", study="s")
        executor = Executor(
            address=lambda: node.address,
            secret=node.secret,
            worker=Worker("test_executor:run_toy"),
            bundle=bundle_hash(),
            gate=Gate(site="lumc", state=tmp_path / "state"),
            status=status,
        )
        executors.append(executor)
        executor.start()
        return executor, status

    yield begin
    for executor in executors:
        executor.stop()


Start = Callable[[], tuple[Executor, Status]]


def _error(reply: Message) -> Error:
    assert reply.has_error()
    return reply.error


def _failure(reply: Message) -> Failure:
    failure = from_record(reply.content, expected=REPLIES)
    assert isinstance(failure, Failure)
    return failure


def _idle(status: Status) -> None:
    end = time.monotonic() + 20
    while status.state.task is not None or not status.state.tasks_done:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_installed_app_answers(node: SuperNode, start: Start) -> None:
    _, status = start()
    node.send(_request(0), bundle())
    answer = from_record(node.reply().content, expected=REPLIES)
    assert isinstance(answer, ExpertReply)
    assert answer.task == "expert/0"
    np.testing.assert_array_equal(answer.weights, 2 * SENT)
    _idle(status)
    assert status.state.error is None


def test_a_foreign_bundle_is_refused_and_nothing_runs(
    node: SuperNode, start: Start, marks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, status = start()
    from io import BytesIO
    from zipfile import ZipFile

    stream = BytesIO(bundle())
    with ZipFile(stream, "a") as archive:
        archive.writestr("cropkt_client/app.py", "raise SystemExit")
    node.send(_request(0), stream.getvalue())
    error = _error(node.reply())
    assert error.code == ErrorCode.INVALID_FAB
    _idle(status)
    assert not list(marks.iterdir())
    assert "refused a foreign bundle" in caplog.text
    assert "refused a foreign bundle" in str(status.state.error)


def test_an_exception_crosses_as_a_code_only(
    node: SuperNode, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    start()
    node.send(_request(1), bundle())
    failure = _failure(node.reply())
    assert (failure.task, failure.code, failure.site) == ("expert/1", "internal", "lumc")
    assert failure.reference in caplog.text
    assert "patient-0815" not in caplog.text


def test_an_answer_that_went_round_the_gate_is_not_handed_over(
    node: SuperNode, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start()
    node.send(_request(5), bundle())
    failure = _failure(node.reply())
    assert (failure.task, failure.code) == ("expert/5", "internal")
    assert "did not come through the gate" in caplog.text
    assert [row.message for row in Ledger(tmp_path / "state").rows()] == ["failure internal"]


def test_a_child_that_keeps_dying_is_a_failed_row_and_the_client_lives(
    node: SuperNode, start: Start, marks: Path
) -> None:
    _, status = start()
    node.send(_request(2), bundle())
    failure = _failure(node.reply())
    assert (failure.task, failure.code) == ("expert/2", "training_failed")
    assert len(list(marks.iterdir())) == module.ATTEMPTS
    assert "SIGKILL" in str(status.state.error)
    _idle(status)


def test_a_child_killed_once_goes_on(node: SuperNode, start: Start, marks: Path) -> None:
    start()
    node.send(_request(3), bundle())
    answer = from_record(node.reply().content, expected=REPLIES)
    assert isinstance(answer, ExpertReply)
    assert len(list(marks.iterdir())) == 2


def test_a_message_outside_the_contract_is_an_error_without_text(
    node: SuperNode, start: Start
) -> None:
    start()
    message = _request(0)
    message.metadata.message_type = "query.unknown"
    message.content.config_records["message"]["json"] = "{}"
    node.send(message, bundle())
    error = _error(node.reply())
    assert error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert str(error.reason).startswith("reference ")


def test_heartbeats_keep_a_long_task_and_stop_cuts_it_off(
    node: SuperNode, start: Start, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[float] = []
    beat = module.Heartbeats._beat

    def count(self: module.Heartbeats) -> bool:
        beats.append(time.monotonic())
        return beat(self)

    monkeypatch.setattr(module.Heartbeats, "_beat", count)
    monkeypatch.setattr("flwr.supercore.heartbeat.HEARTBEAT_DEFAULT_INTERVAL", 5.5)
    executor, status = start()
    node.send(_request(4), bundle())
    end = time.monotonic() + 30
    while len(beats) < 4 or not list(marks.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert status.state.task == "train.expert"
    assert not executor.stop_when_idle()
    executor.stop()
    assert not executor.is_alive()
    assert not node.state.get_messages_legacy(is_reply=True)  # it comes again instead


def test_a_supernode_that_is_gone_kills_nobody(
    node: SuperNode, start: Start, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own helpers send SIGINT to this process where the token is unknown."""
    executor, _ = start()
    node.send(_request(4), bundle())
    end = time.monotonic() + 30
    while not list(marks.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.05)
    node.stop()
    executor.stop()
    assert not executor.is_alive()
