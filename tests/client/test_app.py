"""The hospital's Flower app: stored answers, failures without text."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.messages import (
    REPLIES,
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    Failure,
    Message,
)
from cropkt.wire import from_record, to_record
from cropkt_client import app as client
from cropkt_client import tasks
from cropkt_client.site import Site

SECRET = "SECRETPATIENT"  # every id of the small hospital begins with it
Ask = Callable[[Message], Message]


def asking(site: Site, **node: str) -> Ask:
    """Return what sends a message through the app to a site and returns its answer."""
    context = Context(
        run_id=1,
        node_id=2,
        node_config={"config": str(site.folder / "site.yaml"), **node},
        state=RecordDict(),
        run_config={},
    )

    def send(request: Message) -> Message:
        message = FlowerMessage(to_record(request), dst_node_id=2, message_type=type(request).kind)
        reply = client.app(message=message, context=context)
        return from_record(reply.content, expected=REPLIES)

    return send


@pytest.fixture
def ask(make_site: Callable[..., Site]) -> Ask:
    return asking(make_site())


@pytest.fixture(autouse=True)
def flower_identity() -> None:
    """Flower messages are made inside a task, which a test has to be, too."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2


def test_describe(ask: Ask, study: StudyConfig) -> None:
    reply = ask(DescribeRequest(task="describe/any", study=study))
    assert isinstance(reply, DescribeReply)
    assert reply.site == "site-UVM"


def test_a_repeated_task_answers_from_the_store(
    ask: Ask, study: StudyConfig, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError(f"the patient {SECRET}-UVM-003 is at /data/slides"), "internal"),
        (KeyError(f"{SECRET}-UVM-003"), "internal"),
        (MemoryError(f"{SECRET}-UVM-003"), "training_failed"),
        (torch.OutOfMemoryError(f"CUDA out of memory; {SECRET}"), "training_failed"),
        (RuntimeError(f"DefaultCPUAllocator: can't allocate memory; {SECRET}"), "training_failed"),
    ],
)
def test_a_failure_tells_a_code_and_its_text_goes_nowhere(
    ask: Ask,
    study: StudyConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    code: str,
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(tasks, "train_experts", crash)
    with caplog.at_level(logging.DEBUG):
        reply = ask(ExpertRequest(task="fit_expert/a/UVM/0", study=study, cancer=Cancer.UVM))
    assert isinstance(reply, Failure)
    assert (reply.code, reply.site) == (code, "site-UVM")
    assert reply.reference in caplog.text
    assert f"{type(error).__name__} raised in" in caplog.text
    assert "test_app.py" in caplog.text  # where it was raised is known
    assert SECRET not in caplog.text
    assert "Traceback" not in caplog.text


def test_an_error_of_our_own_keeps_its_text_on_the_site(
    ask: Ask, study: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    weights = np.zeros((1, 7), np.float32)
    reply = ask(ExpertRequest(task="t", study=study, cancer=Cancer.UVM, weights=weights))
    assert isinstance(reply, Failure)
    assert reply.code == "bad_message"
    assert "the expert of UVM is not signed" in caplog.text


def test_only_the_cancers_served_are_told_of(
    make_site: Callable[..., Site], study: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    path, table = site.folder / "site.yaml", site.folder / "outcomes.csv"
    path.write_text(path.read_text().replace("- UVM", "- UVM\n- SKCM"))
    lines = table.read_text().splitlines()
    half = [line.replace(",UVM,", ",SKCM,") for line in lines[:24]] + lines[24:]
    table.write_text("\n".join(half) + "\n")

    def told(ask: Ask) -> list[str]:
        reply = ask(DescribeRequest(task="describe/any", study=study))
        assert isinstance(reply, DescribeReply)
        return [count.cancer for count in reply.cohorts]

    assert told(asking(site)) == ["UVM", "SKCM"]
    only = asking(site, cancers="SKCM")
    assert told(only) == ["SKCM"]  # not the answer kept of before
    assert told(asking(site, cancers="SKCM UVM")) == ["UVM", "SKCM"]
    reply = only(ExpertRequest(task="t", study=study, cancer=Cancer.UVM))
    assert isinstance(reply, Failure)
    assert reply.code == "data"
    assert "it serves SKCM, not UVM" in caplog.text


def test_a_device_that_is_not_there_fails_the_task(
    ask: Ask,
    study: StudyConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CROPKT_DEVICE", "cuda:9")
    assert isinstance(ask(DescribeRequest(task="t", study=study)), Failure)
    assert "torch finds no cuda:9" in caplog.text


def test_a_cancer_the_site_does_not_hold(ask: Ask, study: StudyConfig) -> None:
    reply = ask(ExpertRequest(task="fit_expert/a/SKCM/0", study=study, cancer=Cancer.SKCM))
    assert isinstance(reply, Failure)
    assert reply.code == "data"
