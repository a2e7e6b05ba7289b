"""The hospital's Flower app: stored answers, failures without text."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.messages import DescribeReply, DescribeRequest, ExpertReply, ExpertRequest, Failure
from cropkt.messages import REPLIES, Message
from cropkt.wire import from_record, to_record
from cropkt_client import app as client
from cropkt_client import tasks
from cropkt_client.site import Site


@pytest.fixture
def ask(make_site: Callable[..., Site]) -> Callable[[Message], Message]:
    """Send a message through the app to a site; return its answer."""
    site = make_site()
    context = Context(
        run_id=1,
        node_id=2,
        node_config={"config": str(site.folder / "site.yaml")},
        state=RecordDict(),
        run_config={},
    )

    def send(request: Message) -> Message:
        message = FlowerMessage(
            to_record(request), dst_node_id=2, message_type=type(request).kind
        )
        reply = client.app(message=message, context=context)
        return from_record(reply.content, expected=REPLIES)

    return send


@pytest.fixture(autouse=True)
def flower_identity() -> None:
    """Flower messages are made inside a task, which a test has to be, too."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2


def test_describe(ask: Callable[[Message], Message], study: StudyConfig) -> None:
    reply = ask(DescribeRequest(task="describe/any", study=study))
    assert isinstance(reply, DescribeReply)
    assert reply.site == "site-UVM"


def test_a_repeated_task_answers_from_the_store(
    ask: Callable[[Message], Message], study: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ExpertRequest(task="fit_expert/a/UVM/0", study=study, cancer=Cancer.UVM)
    first = ask(request)
    assert isinstance(first, ExpertReply)

    def never(*_: object) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(tasks, "train_experts", never)
    second = ask(request)
    assert isinstance(second, ExpertReply)
    assert (second.weights == first.weights).all()


def test_a_failure_tells_a_code_and_keeps_its_text(
    ask: Callable[[Message], Message],
    study: StudyConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("the patient SECRETPATIENT-UVM-003 is at /data/slides")

    monkeypatch.setattr(tasks, "train_experts", crash)
    with caplog.at_level(logging.ERROR):
        reply = ask(ExpertRequest(task="fit_expert/a/UVM/0", study=study, cancer=Cancer.UVM))
    assert isinstance(reply, Failure)
    assert (reply.code, reply.site) == ("internal", "site-UVM")
    assert reply.reference in caplog.text


def test_a_cancer_the_site_does_not_hold(
    ask: Callable[[Message], Message], study: StudyConfig
) -> None:
    reply = ask(ExpertRequest(task="fit_expert/a/SKCM/0", study=study, cancer=Cancer.SKCM))
    assert isinstance(reply, Failure)
    assert reply.code == "data"
