"""Answers that wait for approval at their site: neither failed nor done, and asked for again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error
from flwr.app import Message as FlowerMessage
from flwr.common.constant import ErrorCode

import cropkt_server.dispatch
from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.messages import REQUESTS, Code, DescribeReply, Failure, HeldRequest, Message
from cropkt.wire import from_record, to_record
from cropkt_server.dispatch import Dispatcher
from cropkt_server.membership import Member, missing
from cropkt_server.progress import shown
from cropkt_server.results import results
from cropkt_server.settings import Settings, save_settings
from cropkt_server.status import read_status
from cropkt_server.store import Task
from cropkt_server.study import MAX_TRIES, Gathering, Study
from cropkt_server.words import in_words
from cropkt_sim.flower_internals import SERVER_NODE_ID, identify_process, new_message_id

pytestmark = pytest.mark.usefixtures("all_admitted", "all_signed")

UVM, SKCM = Cancer.UVM, Cancer.SKCM
MEMBERS = (Member("a", (UVM,)), Member("b", (SKCM,)))
NODES = {1: "a", 2: "b"}
HELD = "fit_expert/a/UVM/0"
DEADLINE = 1000.0


class Hospital:
    """Two sites; a releases nothing of one row until somebody approves it."""

    def __init__(self, sites: Any) -> None:
        self._sites = sites
        self.decision: Code | None = "awaiting_approval"
        self.asked: list[tuple[str, str]] = []
        self._questions: dict[str, Message] = {}
        self.lose = 0

    def answer(self, task: Task, request: Message) -> Message | Error:
        """Return what a site says, also when it is asked again."""
        self.asked.append((type(request).__name__, request.task))
        if isinstance(request, HeldRequest):
            if self.lose:
                self.lose -= 1
                return Error(code=ErrorCode.NODE_UNAVAILABLE)
            request = self._questions[request.task]
        self._questions[task.id] = request
        if task.id == HELD and self.decision is not None:
            return Failure(task=task.id, code=self.decision, reference="0a1b")
        answer: Message = self._sites.answer(task, request)
        return answer

    def times(self, kind: type[Message], task: str = HELD) -> int:
        return self.asked.count((kind.__name__, task))


class FakeGrid:
    """Answers at the next pull; `after` is called at every look for nodes."""

    def __init__(self, hospital: Hospital, after: Callable[[int], None] = lambda _: None) -> None:
        self._hospital, self._after, self._looks = hospital, after, 0
        self._waiting: dict[str, FlowerMessage] = {}

    def get_node_ids(self) -> list[int]:
        self._looks += 1
        self._after(self._looks)
        return list(NODES)

    def push_messages(self, messages: Iterable[FlowerMessage]) -> list[str]:
        pushed = {new_message_id(message): message for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> list[FlowerMessage]:
        replies = []
        for name in list(message_ids):
            message = self._waiting.pop(name)
            request = from_record(message.content, expected=REQUESTS)
            kind, site, *rest = request.task.split("/")
            task = Task(
                kind=kind,  # type: ignore[arg-type]
                site=site,
                cancer=Cancer(rest[0]) if rest else None,
                round=int(rest[1]) if rest else 0,
            )
            given = self._hospital.answer(task, request)
            content = given if isinstance(given, Error) else to_record(given)
            replies.append(FlowerMessage(content, reply_to=message))
        return replies


class StopError(Exception):
    """The coordinator is killed."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    identify_process(run_id=1, node_id=SERVER_NODE_ID)
    monkeypatch.setattr(cropkt_server.dispatch, "HELD", 0.0)


@pytest.fixture
def hospital(sites: Any) -> Hospital:
    return Hospital(sites)


@pytest.fixture
def open_study(tmp_path: Path) -> Callable[..., Study]:
    def open_(now: float = 0.0, *, deadline: bool = False) -> Study:
        waits = Gathering(deadline=lambda began: began + DEADLINE if deadline else None)
        return Study(tmp_path, StudyConfig(folds=3), MEMBERS, gathering=waits, clock=lambda: now)

    return open_


class Roster:
    def members(self) -> tuple[Member, ...]:
        return MEMBERS

    def site_of(self, node: int) -> str | None:
        return NODES.get(node)


def dispatch(grid: Any, study: Study) -> None:
    Dispatcher(grid, study, Roster(), poll=0.0).run()


def stopping(hospital: Hospital, at: int) -> FakeGrid:
    def stop(looks: int) -> None:
        if looks == at:
            raise StopError

    return FakeGrid(hospital, stop)


def test_a_held_row_is_asked_for_again_until_it_is_approved(
    open_study: Callable[..., Study], hospital: Hospital
) -> None:
    study = open_study()

    def approve(looks: int) -> None:
        if looks == MAX_TRIES + 20:
            assert study.store.state(Task(kind="fit_expert", site="a", cancer=UVM)) == "held"
            assert not study.finished
            hospital.decision = None

    dispatch(FakeGrid(hospital, approve), study)
    assert study.finished
    assert results(study)["failed"] == []
    assert hospital.times(HeldRequest) > MAX_TRIES  # waiting is no failed try
    assert sum(task == HELD for kind, task in hospital.asked if kind != "HeldRequest") == 1


def test_it_is_not_asked_for_all_the_time(
    open_study: Callable[..., Study], hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cropkt_server.dispatch, "HELD", 3600.0)
    with pytest.raises(StopError):
        dispatch(stopping(hospital, 60), open_study())
    assert hospital.times(HeldRequest) == 1


def test_a_refused_release_is_a_failed_row_that_says_so(
    open_study: Callable[..., Study], hospital: Hospital
) -> None:
    study = open_study()

    def refuse(looks: int) -> None:
        if looks == 20:
            hospital.decision = "refused_release"

    dispatch(FakeGrid(hospital, refuse), study)
    (row,) = results(study)["failed"]
    assert row["row"] == HELD
    assert row["cause"] == (
        "refused_release: the site does not release its answer (reference 0a1b)"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("policy", "policy, which lets no such answer leave the site (reference 0a1b)"),
        ("suppressed", "suppressed: too few patients or events at the site (reference 0a1b)"),
        ("not_held", "not_held (reference 0a1b)"),
        ("data", "data (reference 0a1b)"),
    ],
)
def test_another_code_is_a_failed_row(
    open_study: Callable[..., Study], hospital: Hospital, code: Code, said: str
) -> None:
    study = open_study()
    hospital.decision = code
    dispatch(FakeGrid(hospital), study)
    (row,) = results(study)["failed"]
    assert row["cause"] == said


def test_a_held_row_survives_the_coordinator(
    open_study: Callable[..., Study], hospital: Hospital
) -> None:
    with pytest.raises(StopError):
        dispatch(stopping(hospital, 20), open_study())
    study = open_study()
    assert [task.id for task in study.held()] == [HELD]
    assert study.due() == []  # nothing is trained, or asked for in full, again
    hospital.decision = None
    dispatch(FakeGrid(hospital), study)
    assert study.finished
    assert not study.failures()


def test_a_question_that_was_lost_is_asked_again(
    open_study: Callable[..., Study], hospital: Hospital
) -> None:
    hospital.lose = MAX_TRIES + 3
    study = open_study()

    def approve(looks: int) -> None:
        if not hospital.lose:
            hospital.decision = None

    dispatch(FakeGrid(hospital, approve), study)
    assert not study.failures()


def test_a_site_that_knows_nothing_of_it_is_asked_in_full(
    open_study: Callable[..., Study], hospital: Hospital
) -> None:
    study = open_study()
    task = Task(kind="fit_expert", site="a", cancer=UVM)

    def forget(looks: int) -> None:
        if looks == 20:
            hospital.decision = "not_held"
        elif looks > 20 and study.store.state(task) == "due":
            hospital.decision = None

    dispatch(FakeGrid(hospital, forget), study)
    assert not study.failures()
    assert hospital.times(HeldRequest) >= 1
    assert sum(name == HELD for kind, name in hospital.asked if kind != "HeldRequest") == 2


def run_until_held(study: Study, hospital: Hospital) -> None:
    while due := study.due():
        answer = hospital.answer(due[0], study.request(due[0]))
        assert isinstance(answer, Message)
        study.record(due[0], answer)


def test_after_the_deadline_a_late_site_that_holds_is_given_up(
    open_study: Callable[..., Study], hospital: Hospital
) -> None:
    study = open_study(deadline=True)
    run_until_held(study, hospital)
    assert [task.id for task in study.held()] == [HELD]
    assert not study.finished
    study.store.close()
    late = open_study(DEADLINE + 1, deadline=True)
    assert late.finished
    late.give_up(())
    assert [task.id for task in late.failures()] == [HELD]
    assert "had not approved it" in late.failures()[0].cause


def test_a_revoked_site_holds_nothing(open_study: Callable[..., Study], hospital: Hospital) -> None:
    study = open_study()
    run_until_held(study, hospital)
    study.add_sites([replace(MEMBERS[0], state="revoked"), MEMBERS[1]])
    assert study.held() == []
    assert [task.id for task in study.failures()] == [HELD]


def test_a_held_description_is_awaited_but_not_missing(open_study: Callable[..., Study]) -> None:
    study = open_study()
    for task in study.due():
        study.record(task, Failure(task=task.id, code="awaiting_approval"))
    assert {task.site for task in study.held()} == {"a", "b"}
    assert not study.finished
    assert missing(MEMBERS, study.store.tasks()) == {}


def test_status_and_progress_say_what_waits(
    open_study: Callable[..., Study], hospital: Hospital, tmp_path: Path
) -> None:
    from rich.console import Console

    save_settings(Settings(name="eye", host="localhost:1", study=StudyConfig(folds=3)), tmp_path)
    study = open_study()
    run_until_held(study, hospital)
    study.store.close()
    status = read_status(tmp_path)
    assert status.held == (HELD,)
    assert f"waits for approval at the site: {HELD}" in list(in_words(status))
    assert status.stages["fit_expert"]["held"] == 1
    lines: list[str] = []
    with shown(tmp_path, Console(force_terminal=False), say=lines.append):
        pass
    assert f"{HELD} waits for approval at the site" in lines
    assert json.loads(json.dumps(status.stages))


def test_suppressed_counts_are_counted_as_unknown(
    open_study: Callable[..., Study], sites: Any
) -> None:
    study = open_study()
    while due := study.due():
        reply = sites.answer(due[0], study.request(due[0]))
        if isinstance(reply, DescribeReply) and due[0].site == "a":
            counts = tuple(replace(c, patients=None, events=None) for c in reply.cohorts)
            reply = replace(reply, cohorts=counts)
        study.record(due[0], reply)
    targets = results(study)["targets"]
    assert (targets["UVM"]["patients"], targets["UVM"]["events"]) == (None, None)
    assert targets["SKCM"]["patients"] == 100
