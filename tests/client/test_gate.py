"""The gate: what leaves, what stays, and that there is no other way out."""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage
from hypothesis import given
from hypothesis import strategies as st

import cropkt_client
from cropkt.cancers import Cancer
from cropkt.config import StudyConfig, checked
from cropkt.errors import MessageError, RefusedError
from cropkt.experts.card import AuditSummary, Card, canonical, models_of, public_text
from cropkt.messages import (
    REPLIES,
    ArmScore,
    CohortCount,
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    Failure,
    HeldRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    Score,
    Signed,
    TransferReply,
    TransferRequest,
)
from cropkt.wire import from_record, payload, to_record
from cropkt_client.enrol import Keys
from cropkt_client.gate import Gate
from cropkt_client.held import Shelf
from cropkt_client.ledger import Ledger, public_key
from cropkt_client.policy import rounded
from cropkt_client.settings import ASKED, AuditLimit, ReleasePolicy

UVM, STUDY = Cancer.UVM, StudyConfig(folds=3)
AUTO = ReleasePolicy(approval="auto")
SOURCE = Path(cropkt_client.__file__).parent


@pytest.fixture(autouse=True)
def flower_identity() -> None:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2


def weights(models: int = 1) -> Any:
    return np.arange(models * 5, dtype=np.float32).reshape(models, 5)


def expert(patients: int | None = 48, events: int | None = 22, **changes: Any) -> ExpertReply:
    values: dict[str, Any] = {"weights": weights(), "score": Score(c_index=0.6, se=0.1)} | changes
    values = {"task": "expert/1", "cancer": UVM, "seconds": 1.0, **values}
    return ExpertReply(patients=patients, events=events, **values)


EXPERT = ExpertRequest(task="expert/1", study=STUDY, cancer=UVM)
SCORES = (Score(c_index=0.6, se=0.1),)
TRANSFER = TransferRequest(
    task="transfer/1", study=STUDY, cancer=UVM, sources=(Cancer.SKCM,), weights=weights()
)
RELEASE = ReleaseRequest(task="evaluate/1", study=STUDY, cancer=UVM)


def transfer(patients: int | None, events: int | None) -> TransferReply:
    return TransferReply(
        task="transfer/1",
        cancer=UVM,
        patients=patients,
        events=events,
        scores=SCORES,
        training_scores=(SCORES,) * 3,
        seconds=1.0,
    )


def release(patients: int, events: int) -> ReleaseReply:
    return ReleaseReply(
        task="evaluate/1",
        cancer=UVM,
        patients=patients,
        events=events,
        arms={"local": ArmScore(c_index=0.6, se=0.1, pairs=300)},
        routing={UVM: 0.7, Cancer.SKCM: 0.3},
        zero_shot_choice={"vote": 3},
        seconds=1.0,
    )


class Site:
    """One hospital's gate, and the coordinator's side of it."""

    def __init__(self, state: Path, policy: ReleasePolicy | None = AUTO) -> None:
        self.state, self.policy = state, policy
        self.ledger = Ledger(state)

    @property
    def gate(self) -> Gate:
        return Gate(site="leiden", state=self.state, release=self.policy)

    def answers(self, answer: Message, request: Message) -> Message:
        """Return what the coordinator gets for an answer of the site's task."""
        return self.received(self.gate.release(answer, request, to=asked(request)))

    def again(self, task: str) -> Message:
        """Return what the coordinator gets when it asks for a held answer."""
        request = HeldRequest(task=task)
        return self.received(self.gate.again(request, to=asked(request)))

    def received(self, reply: FlowerMessage) -> Message:
        row, measured = self.ledger.rows()[-1], payload(reply)
        assert (row.bytes, row.sha256) == (measured.bytes, measured.sha256)
        return from_record(reply.content, expected=REPLIES)


def card(site: Site, **changes: Any) -> Signed:
    """Return the card of an expert that `site` gives; nobody here looks at the signature."""
    values: dict[str, Any] = {"patients": 50, "events": 20} | changes
    told = Card(
        cancer=UVM,
        site="leiden",
        round=0,
        endpoint=STUDY.endpoint,
        encoder="",
        shape=STUDY.shape,
        models=models_of(weights(), [()]),
        m0="0" * 64,
        study=STUDY.hash(),
        training="0" * 64,
        created="2026-01-01",
        signer=public_text(Keys.of(site.state).signing),
        **values,
    )
    return Signed(card=canonical(told).decode(), signature="0" * 128)


def asked(request: Message) -> FlowerMessage:
    return FlowerMessage(to_record(request), dst_node_id=2, message_type=request.kind)


def code(reply: Message) -> str:
    assert isinstance(reply, Failure)
    return reply.code


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "state")


# No other way out


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.name, ast.parse(path.read_text())


def called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def makes_a_reply(tree: ast.Module) -> set[str]:
    """Return how a module could make a Flower reply or record; empty if it cannot."""
    flower = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr")
        for alias in node.names
        if alias.name in ("Message", "Error", "RecordDict", "create_reply", "create_error_reply")
    }
    ways = set()
    for node in ast.walk(tree):
        if called(node) in flower | {"to_record", "RecordDict", "create_reply"}:
            ways.add(called(node))
        if isinstance(node, ast.Call) and any(key.arg == "reply_to" for key in node.keywords):
            ways.add("reply_to")
        if isinstance(node, ast.ImportFrom | ast.Import):
            ways |= {alias.name for alias in node.names} & {"to_record", "flwr"}
    return ways


def test_only_the_gate_makes_replies() -> None:
    found = {name: ways for name, tree in modules() if (ways := makes_a_reply(tree))}
    assert set(found) == {"gate.py"}
    assert found["gate.py"] >= {"to_record", "reply_to"}


@pytest.mark.parametrize(
    "text",
    [
        "from flwr.app import Message as M\nM({}, reply_to=x)",
        "from cropkt.wire import to_record as t",
        "from cropkt import wire\nwire.to_record(x)",
        "import flwr",
        "from flwr.app import Error\nError(1, 'a patient')",
        "from flwr.app import RecordDict\nRecordDict()",
    ],
)
def test_the_walk_finds_other_ways(text: str) -> None:
    assert makes_a_reply(ast.parse(text))


def test_only_these_modules_reach_a_network() -> None:
    network = {"socket", "httpx", "urllib", "requests", "http", "smtplib", "ftplib", "asyncio"}
    found = set()
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            if any(each.partition(".")[0] in network for each in names):
                found.add(name)
    # Enrolment and hello; the SuperNode's loopback; its connection; a free port; two pipe ends.
    assert found == {"link.py", "executor.py", "fleet.py", "supernode.py", "worker.py"}


# Before any work


def test_without_a_policy_nothing_leaves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = Site(tmp_path, None)
    for answer, request in ((expert(), EXPERT), (release(48, 22), RELEASE)):
        with pytest.raises(RefusedError, match="release: is not there, so nothing leaves"):
            site.gate.admit(request)
        assert code(site.answers(answer, request)) == "policy"
    assert "Decide what may leave" in caplog.text
    assert {row.message for row in site.ledger.rows()} == {"failure policy"}
    assert max(row.bytes for row in site.ledger.rows()) < 300


@pytest.mark.parametrize(
    ("policy", "request_"),
    [
        (replace(AUTO, messages=("query.describe",)), EXPERT),
        (replace(AUTO, cancers=(Cancer.SKCM,)), EXPERT),
        (replace(AUTO, purposes=("audit",)), EXPERT),
        (AUTO, replace(EXPERT, study=StudyConfig(folds=3, purpose="marketing"))),
    ],
)
def test_what_the_policy_does_not_name_stays(
    tmp_path: Path, policy: ReleasePolicy, request_: ExpertRequest
) -> None:
    site = Site(tmp_path, policy)
    with pytest.raises(RefusedError, match="does not name"):
        site.gate.admit(request_)
    assert code(site.answers(expert(), request_)) == "policy"


def test_every_question_can_be_forbidden(tmp_path: Path) -> None:
    router = RouterRequest(
        task="r", study=STUDY, cancer=UVM, sources=(Cancer.SKCM,), weights=weights()
    )
    requests = [DescribeRequest(task="d", study=STUDY), EXPERT, TRANSFER, router, RELEASE]
    assert tuple(request.kind for request in requests) == ASKED
    for request in requests:
        others = tuple(kind for kind in ASKED if kind != request.kind)
        Site(tmp_path).gate.admit(request)
        with pytest.raises(RefusedError):
            Site(tmp_path, replace(AUTO, messages=others)).gate.admit(request)


# After the work


def test_counts_leave_rounded(site: Site) -> None:
    answer = site.answers(expert(48, 22), EXPERT)
    assert isinstance(answer, ExpertReply)
    assert (answer.patients, answer.events) == (50, 20)
    np.testing.assert_array_equal(answer.weights, weights())
    row = site.ledger.rows()[-1]
    assert (row.message, row.task, row.approved) == ("train.expert", "expert/1", "by the policy")
    assert "48" not in row.checked


@given(count=st.integers(0, 10_000), minimum=st.integers(0, 100), to=st.integers(1, 100))
def test_a_rounded_count_is_near_and_a_small_one_is_none(count: int, minimum: int, to: int) -> None:
    found = rounded(count, minimum, to)
    if count < minimum:
        assert found is None
    else:
        assert found is not None
        assert found % to == 0
        assert abs(found - count) <= to / 2


@pytest.mark.parametrize(("patients", "events"), [(19, 15), (48, 9), (None, 22), (48, None)])
def test_a_model_of_too_few_stays(
    site: Site, patients: int | None, events: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert code(site.answers(expert(patients, events), EXPERT)) == "suppressed"
    request = RouterRequest(
        task="router/1", study=STUDY, cancer=UVM, sources=(Cancer.SKCM,), weights=weights()
    )
    router = RouterReply(
        task="router/1",
        cancer=UVM,
        patients=patients,
        events=events,
        weights=weights(),
        seconds=1,
    )
    assert code(site.answers(router, request)) == "suppressed"
    assert "its cohort has not 20 patients and 10 events" in caplog.text


def test_scores_of_too_few_are_left_out(site: Site) -> None:
    answer = site.answers(transfer(19, 15), TRANSFER)
    assert isinstance(answer, TransferReply)
    assert (answer.patients, answer.events) == (None, 15)
    assert answer.scores == (Score(),)
    assert answer.training_scores == ((Score(),),) * 3
    final = site.answers(release(48, 9), RELEASE)
    assert isinstance(final, ReleaseReply)
    assert (final.patients, final.events) == (50, None)
    assert final.arms == {"local": ArmScore()}
    assert (final.routing, final.zero_shot_choice) == ({}, {})


def test_scores_of_enough_leave_as_they_are(site: Site) -> None:
    answer = site.answers(transfer(20, 10), TRANSFER)
    assert isinstance(answer, TransferReply)
    assert (answer.patients, answer.events, answer.scores) == (20, 10, SCORES)


def test_a_description_is_rounded_and_names_only_cancers_that_may_be(tmp_path: Path) -> None:
    counts = [(UVM, 48, 9), (Cancer.SKCM, 19, 12), (Cancer.ACC, 99, 51)]
    reply = DescribeReply(
        task="describe/any",
        site="leiden",
        cohorts=tuple(
            CohortCount(cancer=cancer, patients=patients, events=events, dim=4)
            for cancer, patients, events in counts
        ),
    )
    site = Site(tmp_path, replace(AUTO, cancers=(UVM, Cancer.SKCM)))
    told = site.answers(reply, DescribeRequest(task="describe/any", study=STUDY))
    assert isinstance(told, DescribeReply)
    assert [(c.cancer, c.patients, c.events) for c in told.cohorts] == [
        (UVM, 50, None),
        (Cancer.SKCM, None, 10),
    ]
    elsewhere = replace(reply, site="delft")
    request = DescribeRequest(task="describe/any", study=STUDY)
    assert code(site.answers(elsewhere, request)) == "internal"


def test_the_simulation_changes_no_number(tmp_path: Path) -> None:
    from cropkt_sim.sites import _RELEASE

    site = Site(tmp_path, checked(ReleasePolicy, _RELEASE, "site.yaml"))
    answer = site.answers(expert(3, 1), EXPERT)
    assert isinstance(answer, ExpertReply)
    assert (answer.patients, answer.events) == (3, 1)


@pytest.mark.parametrize(
    ("answer", "request_", "said"),
    [
        (expert(task="expert/2"), EXPERT, "not the answer to its question"),
        (expert(cancer=Cancer.SKCM), EXPERT, "not the answer to its question"),
        (transfer(48, 22), EXPERT, "TransferReply is not expected here"),
        (expert(weights=weights(2)), EXPERT, "holds 2 models where 1 were asked for"),
        (expert(weights=weights(8)), replace(EXPERT, shared=True), "8 models where 7 were"),
        (expert(weights=weights() * np.float32("nan")), EXPERT, "values that are not finite"),
    ],
)
def test_an_answer_that_is_not_as_agreed_stays(
    site: Site,
    answer: Message,
    request_: Message,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert code(site.answers(answer, request_)) == "internal"
    assert said in caplog.text


def test_the_fold_models_of_a_shared_cancer_leave(site: Site) -> None:
    request = replace(EXPERT, shared=True)
    assert isinstance(site.answers(expert(weights=weights(7)), request), ExpertReply)


def test_an_answer_that_is_too_large_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path, replace(AUTO, max_megabytes=1))
    large = expert(weights=np.zeros((1, 250_001), np.float32))
    assert code(site.answers(large, EXPERT)) == "policy"
    assert "max_megabytes is 1" in caplog.text


@pytest.mark.parametrize(
    ("patients", "events", "leaves"), [(50, 20, True), (None, None, True), (48, 20, False)]
)
def test_a_signed_card_tells_no_more_than_the_answer(
    site: Site, patients: int | None, events: int | None, leaves: bool
) -> None:
    signed = card(site, patients=patients, events=events)
    answer = site.answers(expert(signed=signed), EXPERT)
    assert isinstance(answer, ExpertReply) if leaves else code(answer) == "policy"


def audited(site: Site, *, high: float | None, epsilon: float | None = None) -> ExpertReply:
    """Return an answer whose card says how well membership is told from the expert."""
    summary = high and AuditSummary(
        method="loss", auroc=0.6, low=0.5, high=high, patients=50, detectable=0.7
    )
    delta = 1e-5 if epsilon else None
    return expert(signed=card(site, epsilon=epsilon, delta=delta, audit=summary or None))


def test_an_expert_that_tells_its_patients_stays(tmp_path: Path) -> None:
    strict = Site(tmp_path, replace(AUTO, audit=AuditLimit(max_auroc_upper=0.7)))
    assert code(strict.answers(audited(strict, high=0.81), EXPERT)) == "audit"
    assert code(strict.answers(audited(strict, high=None), EXPERT)) == "audit"
    assert code(strict.answers(expert(), EXPERT)) == "audit"  # no card at all
    assert isinstance(strict.answers(audited(strict, high=0.69), EXPERT), ExpertReply)
    assert "AUROC at most 0.69" in strict.ledger.rows()[-1].checked
    private = audited(strict, high=None, epsilon=2.0)
    assert isinstance(strict.answers(private, EXPERT), ExpertReply)
    assert "differential privacy" in strict.ledger.rows()[-1].checked


# Recorded first


def test_nothing_leaves_that_the_ledger_does_not_take(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "append", full)
    with pytest.raises(OSError, match="No space left"):
        site.gate.release(expert(), EXPERT, to=asked(EXPERT))
    with pytest.raises(OSError, match="No space left"):
        site.gate.fail("t", "data", to=asked(EXPERT))
    with pytest.raises(OSError, match="No space left"):
        site.gate.error(2, "reference 0a", to=asked(EXPERT))


def test_a_failure_and_an_error_are_recorded_too(site: Site) -> None:
    reply = site.gate.fail("expert/1", "data", to=asked(EXPERT), reference="0a1b")
    failure = site.received(reply)
    assert (code(failure), getattr(failure, "site", "")) == ("data", "leiden")
    error = site.gate.error(2, "reference 0a1b", to=asked(EXPERT))
    rows = site.ledger.rows()
    assert [row.message for row in rows] == ["failure data", "error 2"]
    assert rows[1].sha256 == payload(error).sha256
    assert not site.ledger.problems(public_key(site.state))


@pytest.mark.parametrize("reason", ["/data/SECRET.svs", "patient-0815", "a\nb", "x" * 81])
def test_an_error_says_nothing_but_a_template(site: Site, reason: str) -> None:
    with pytest.raises(MessageError):
        site.gate.error(2, reason, to=asked(EXPERT))
    assert not site.ledger.rows()


def test_what_did_not_pass_is_known(site: Site) -> None:
    reply = site.gate.release(expert(), EXPERT, to=asked(EXPERT))
    assert site.gate.passed(reply)
    forged = FlowerMessage(to_record(expert(48, 22)), reply_to=asked(EXPERT))
    assert not site.gate.passed(forged)  # its counts are not rounded: other bytes
    record = to_record(expert(48, 22))
    record["more"] = record["message"]
    assert not site.gate.passed(FlowerMessage(record, reply_to=asked(EXPERT)))


def test_the_epsilon_spent_is_recorded(tmp_path: Path) -> None:
    spent: Callable[[Cancer], float | None] = {UVM: 2.5}.get
    gate = Gate(site="leiden", state=tmp_path, release=AUTO, spent=spent)
    gate.release(expert(), EXPERT, to=asked(EXPERT))
    gate.fail("t", "data", to=asked(EXPERT))
    assert [row.epsilon for row in Ledger(tmp_path).rows()] == [2.5, None]


# Approved by somebody


@pytest.fixture
def careful(tmp_path: Path) -> Site:
    return Site(tmp_path / "state", replace(AUTO, approval="human"))


def test_an_answer_waits_until_it_is_approved(
    careful: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert code(careful.answers(expert(), EXPERT)) == "awaiting_approval"
        assert code(careful.answers(expert(), EXPERT)) == "awaiting_approval"
    assert caplog.text.count("waits for approval") == 1
    assert code(careful.again("expert/1")) == "awaiting_approval"
    shelf = Shelf(careful.state)
    (held,) = shelf.all()
    shelf.decide(held, "approved", by="Dr A")
    answer = careful.again("expert/1")
    assert isinstance(answer, ExpertReply)
    assert (answer.patients, answer.events) == (50, 20)
    row = careful.ledger.rows()[-1]
    assert row.sha256 == held.sha256
    assert row.approved.startswith("approved by ")
    assert row.approved.endswith("(Dr A)")
    assert isinstance(careful.answers(expert(), EXPERT), ExpertReply)  # asked in full again


def test_a_refused_answer_stays_and_may_be_approved_later(careful: Site) -> None:
    careful.answers(expert(), EXPERT)
    shelf = Shelf(careful.state)
    shelf.decide(shelf.all()[0], "refused")
    assert code(careful.again("expert/1")) == "refused_release"
    assert code(careful.answers(expert(), EXPERT)) == "refused_release"
    shelf.decide(shelf.all()[0], "approved")
    assert isinstance(careful.again("expert/1"), ExpertReply)


def test_an_approval_is_for_these_bytes_only(careful: Site) -> None:
    careful.answers(expert(), EXPERT)
    shelf = Shelf(careful.state)
    shelf.decide(shelf.all()[0], "approved")
    other = expert(weights=weights() + 1)
    assert code(careful.answers(other, EXPERT)) == "awaiting_approval"
    assert [held.decision for held in shelf.all()] == ["approved", "waiting"]


def test_a_stricter_policy_counts_for_what_is_held(careful: Site) -> None:
    careful.answers(expert(), EXPERT)
    shelf = Shelf(careful.state)
    shelf.decide(shelf.all()[0], "approved")
    assert careful.policy is not None
    before = careful.policy
    careful.policy = replace(before, minimum_patients=100)
    assert code(careful.again("expert/1")) == "not_held"  # judged anew, in full
    assert code(careful.answers(expert(), EXPERT)) == "suppressed"
    careful.policy = replace(before, purposes=())
    assert code(careful.again("expert/1")) == "policy"
    careful.policy = None
    assert code(careful.again("expert/1")) == "policy"


def test_nothing_is_held_for_an_unknown_task(careful: Site) -> None:
    assert code(careful.again("expert/9")) == "not_held"
