"""The dispatcher over a grid that loses, refuses and lies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error
from flwr.app import Message as FlowerMessage
from flwr.common.constant import ErrorCode

import cropkt_server.dispatch
from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.messages import REQUESTS, Failure, Message
from cropkt.wire import from_record, to_record
from cropkt_server.dispatch import Dispatcher
from cropkt_server.membership import Member
from cropkt_server.store import Task
from cropkt_server.study import MAX_TRIES, Gathering, Study
from cropkt_sim.flower_internals import SERVER_NODE_ID, identify_process, new_message_id

pytestmark = pytest.mark.usefixtures("all_admitted", "all_signed")

UVM, SKCM, KIPAN = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN
MEMBERS = (Member("a", (UVM,)), Member("b", (SKCM,)), Member("c", (KIPAN,)))
NODES = {1: "a", 2: "b", 3: "c"}
Answer = Callable[[Task, Message], Message | Error]


class Roster:
    """Who enrolled, and as which node."""

    def __init__(self) -> None:
        self.now: tuple[Member, ...] = MEMBERS

    def members(self) -> tuple[Member, ...]:
        return self.now

    def site_of(self, node: int) -> str | None:
        return NODES.get(node)


class FakeGrid:
    """Answers at the next pull; notes what was sent to whom."""

    def __init__(self, answer: Answer, nodes: Iterable[int] = NODES) -> None:
        self.answer, self.nodes = answer, list(nodes)
        self.sent: list[tuple[int, str]] = []
        self.waiting: dict[str, FlowerMessage] = {}
        self.most_waiting: dict[int, int] = {}
        self.gone: set[int] = set()
        self.hold = False

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[FlowerMessage]) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.gone:
                self.gone.discard(node)
                ids.append("")
                continue
            name = new_message_id(message)
            self.sent.append((node, message.metadata.group_id))
            self.waiting[name] = message
            ids.append(name)
        for node in NODES:
            waits = sum(m.metadata.dst_node_id == node for m in self.waiting.values())
            self.most_waiting[node] = max(self.most_waiting.get(node, 0), waits)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[FlowerMessage]:
        if self.hold:
            return []
        replies = []
        for name in list(message_ids):
            message = self.waiting.pop(name)
            request = from_record(message.content, expected=REQUESTS)
            given = self.answer(_task(request), request)
            content = given if isinstance(given, Error) else to_record(given)
            replies.append(FlowerMessage(content, reply_to=message))
        return replies


def _task(request: Message) -> Task:
    kind, site, *rest = request.task.split("/")
    return Task(
        kind=kind,  # type: ignore[arg-type]
        site=site,
        cancer=Cancer(rest[0]) if rest else None,
        round=int(rest[1]) if rest else 0,
    )


@pytest.fixture(autouse=True)
def _flower() -> None:
    identify_process(run_id=1, node_id=SERVER_NODE_ID)  # Flower's messages ask for it


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path, StudyConfig(folds=3), MEMBERS, gathering=Gathering())


def dispatch(grid: Any, study: Study, roster: Roster | None = None) -> None:
    Dispatcher(grid, study, roster or Roster(), poll=0.0).run()


def test_every_site_gets_its_own_rows_one_at_a_time(study: Study, sites: Any) -> None:
    grid = FakeGrid(sites.answer)
    dispatch(grid, study)
    assert not study.failures()
    assert len(grid.sent) == 15
    assert all(task.split("/")[1] == NODES[node] for node, task in grid.sent)
    assert set(grid.most_waiting.values()) == {1}


def test_a_node_that_nobody_enrolled_is_not_spoken_to(study: Study, sites: Any) -> None:
    grid = FakeGrid(sites.answer, nodes=[99, *NODES])
    dispatch(grid, study)
    assert 99 not in {node for node, _ in grid.sent}


def test_lost_messages_are_sent_again(study: Study, sites: Any) -> None:
    lost = {"fit_expert/a/UVM/0": 3, "describe/b": 1}

    def answer(task: Task, request: Message) -> Message | Error:
        if lost.get(task.id, 0):
            lost[task.id] -= 1
            return Error(code=ErrorCode.NODE_UNAVAILABLE)
        reply: Message = sites.answer(task, request)
        return reply

    grid = FakeGrid(answer)
    dispatch(grid, study)
    assert not study.failures()
    assert [task for _, task in grid.sent].count("fit_expert/a/UVM/0") == 4


def test_a_site_that_never_answers_costs_only_its_rows(study: Study, sites: Any) -> None:
    def answer(task: Task, request: Message) -> Message | Error:
        if task.id == "fit_expert/c/KIPAN/0":
            return Error(code=ErrorCode.CLIENT_APP_CRASHED)
        reply: Message = sites.answer(task, request)
        return reply

    grid = FakeGrid(answer)
    dispatch(grid, study)
    assert [task.id for task in study.failures()] == ["fit_expert/c/KIPAN/0"]
    assert [task for _, task in grid.sent].count("fit_expert/c/KIPAN/0") == MAX_TRIES
    assert study.bank() == (SKCM, UVM)


def test_a_node_that_went_while_it_was_asked_is_asked_again(study: Study, sites: Any) -> None:
    grid = FakeGrid(sites.answer)
    grid.gone = {1}
    dispatch(grid, study)
    assert not study.failures()
    (task,) = [task for task in study.store.tasks() if task.id == "describe/a"]
    assert task.tries == 1  # what Flower did not take is no try


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (Failure(task="describe/a", code="data", reference="ab"), "data (reference ab)"),
        (Error(code=ErrorCode.INVALID_FAB), f"message lost (Flower error {ErrorCode.INVALID_FAB})"),
    ],
)
def test_a_refusal_is_final(study: Study, sites: Any, reply: Message | Error, cause: str) -> None:
    def answer(task: Task, request: Message) -> Message | Error:
        return reply if task.id == "describe/a" else sites.answer(task, request)

    grid = FakeGrid(answer)
    dispatch(grid, study)
    assert [(task.id, task.cause) for task in study.failures()] == [("describe/a", cause)]
    assert [task for _, task in grid.sent].count("describe/a") == 1


def test_a_site_cannot_describe_another(study: Study, sites: Any) -> None:
    def answer(task: Task, request: Message) -> Message:
        reply: Message = sites.answer(
            Task(kind="describe", site="b") if task.id == "describe/a" else task, request
        )
        return reply

    dispatch(FakeGrid(answer), study)
    assert [task.id for task in study.failures()] == ["describe/a"]


def test_another_protocol_is_named(study: Study, sites: Any) -> None:
    class Newer(FakeGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[FlowerMessage]:
            replies = super().pull_messages(message_ids)
            for reply in replies:
                whole = json.loads(str(reply.content.config_records["message"]["json"]))
                if whole["values"].get("site") == "a":
                    whole["values"]["protocol"] = 2
                    reply.content["message"] = ConfigRecord({"json": json.dumps(whole)})
            return replies

    dispatch(Newer(sites.answer), study)
    assert [task.cause for task in study.failures()] == [
        "the coordinator speaks protocol 1, the site protocol 2"
    ]


def test_bytes_under_way_are_bounded(
    study: Study, sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cropkt_server.dispatch, "MAX_UNDER_WAY", 100)
    grid = FakeGrid(sites.answer)
    dispatcher = Dispatcher(grid, study, Roster(), poll=0.0)  # type: ignore[arg-type]
    for kind in ("describe", "fit_expert"):
        for task in study.due():
            assert task.kind == kind
            study.record(task, sites.answer(task, study.request(task)))
    grid.hold = True
    dispatcher._send_due({site: node for node, site in NODES.items()})
    assert len(grid.sent) == 1  # two experts are more than is allowed; the rest waits
    grid.hold = False
    dispatcher.run()
    assert not study.failures()


def test_a_pause_sends_nothing_and_takes_answers_in(study: Study, sites: Any) -> None:
    looks, sent_at = 0, []

    class Looked(FakeGrid):
        def get_node_ids(self) -> list[int]:
            nonlocal looks
            looks += 1
            study.store.pause(2 <= looks < 6)
            return list(NODES)

        def push_messages(self, messages: Iterable[FlowerMessage]) -> list[str]:
            sent_at.append(looks)
            return super().push_messages(messages)

    grid = Looked(sites.answer)
    dispatch(grid, study)
    assert study.finished
    assert not set(sent_at) & {2, 3, 4, 5}


def test_a_revoked_site_is_asked_nothing_more(study: Study, sites: Any) -> None:
    roster = Roster()

    def answer(task: Task, request: Message) -> Message:
        if task.id == "fit_expert/c/KIPAN/0":
            roster.now = (*MEMBERS[:2], Member("c", (KIPAN,), "revoked"))
            study.add_sites(roster.now)
        reply: Message = sites.answer(task, request)
        return reply

    grid = FakeGrid(answer)
    dispatch(grid, study, roster)
    assert [(t.id, t.cause) for t in study.failures()] == [("fit_expert/c/KIPAN/0", "revoked")]
    assert not any("/c/" in task for _, task in grid.sent if task.startswith("score"))


def test_sites_that_stay_away_after_the_deadline_do_not_hold_it_open(
    tmp_path: Path, sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cropkt_server.dispatch, "AWAY", -1.0)
    gathering = Gathering(deadline=lambda began: began)
    study = Study(tmp_path, StudyConfig(folds=3), MEMBERS, gathering=gathering)
    dispatch(FakeGrid(sites.answer, nodes=[1, 2]), study)
    assert study.finished
    assert {task.site for task in study.failures()} == {"c"}
    assert "evaluate/a/UVM/0" in {task.id for task in study.store.tasks() if task.state == "done"}
