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
import yaml
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from hypothesis import given
from hypothesis import strategies as st

import cropkt_client
from cropkt.cancers import Cancer
from cropkt.config import ExpertShape, StudyConfig, TrainingConfig, checked
from cropkt.errors import MessageError, RefusedError
from cropkt.experts.accountant import Mechanism
from cropkt.experts.card import AuditSummary, Card, canonical, digest, models_of, public_text
from cropkt.messages import (
    REPLIES,
    ArmScore,
    CohortCount,
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    Failure,
    FedAvgReply,
    FedAvgRequest,
    Fewest,
    HeldRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    Score,
    Signed,
    SourceScore,
    TransferReply,
    TransferRequest,
)
from cropkt.wire import from_record, payload, to_record
from cropkt_client import gate, ledger
from cropkt_client.app import app
from cropkt_client.budget import COUNT_NAME, NAME, Budget, Payment
from cropkt_client.enrol import Keys
from cropkt_client.gate import Gate
from cropkt_client.held import Held, Shelf
from cropkt_client.ledger import Ledger, public_key
from cropkt_client.policy import SUPPRESSED, WITHHELD, PrivateError, private, rounded
from cropkt_client.settings import ASKED, AuditLimit, Privacy, ReleasePolicy
from cropkt_client.site import Site as SiteOnDisk

UVM = Cancer.UVM
STUDY = StudyConfig(folds=3, shape=ExpertShape(dim=1, embed=1, attention=1, bins=1))
AUTO = ReleasePolicy(approval="auto")
SOURCE = Path(cropkt_client.__file__).parent


@pytest.fixture(autouse=True)
def flower_identity() -> None:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2


def weights(models: int = 1) -> Any:
    one = STUDY.shape.parameters
    return np.arange(models * one, dtype=np.float32).reshape(models, one)


MANY = Fewest(patients=48, events=22)


def expert(patients: int | None = 48, events: int | None = 22, **changes: Any) -> ExpertReply:
    values: dict[str, Any] = {"weights": weights(), "score": Score(c_index=0.6, se=0.1)} | changes
    values = {"task": "expert/1", "cancer": UVM, "seconds": 1.0, "fewest": MANY, **values}
    return ExpertReply(patients=patients, events=events, **values)


EXPERT = ExpertRequest(task="expert/1", study=STUDY, cancer=UVM)
SCORES = (SourceScore(c_index=0.6, se=0.1),)
FOLD_SCORES = (Score(c_index=0.6, se=0.1),)
TRANSFER = TransferRequest(
    task="transfer/1", study=STUDY, cancer=UVM, sources=(Cancer.SKCM,), weights=weights()
)
ROUTER = RouterRequest(
    task="router/1", study=STUDY, cancer=UVM, sources=(Cancer.SKCM,), weights=weights()
)
RELEASE = ReleaseRequest(task="evaluate/1", study=STUDY, cancer=UVM)


def transfer(
    patients: int | None, events: int | None, fewest: Fewest | None = MANY
) -> TransferReply:
    return TransferReply(
        task="transfer/1",
        cancer=UVM,
        patients=patients,
        events=events,
        scores=SCORES,
        training_scores=(FOLD_SCORES,) * 3,
        seconds=1.0,
        fewest=fewest,
    )


def router(patients: int | None = 48, events: int | None = 22, **changes: Any) -> RouterReply:
    values: dict[str, Any] = {"weights": None, "seconds": 1.0, "fewest": MANY} | changes
    return RouterReply(task="router/1", cancer=UVM, patients=patients, events=events, **values)


def release(patients: int, events: int, **changes: Any) -> ReleaseReply:
    values: dict[str, Any] = {
        "arms": {"local": ArmScore(c_index=0.6, se=0.1, pairs=300)},
        "routing": {UVM: 0.7, Cancer.SKCM: 0.3},
        "zero_shot_choice": {"vote": 3},
        "seconds": 1.0,
    } | changes
    return ReleaseReply(task="evaluate/1", cancer=UVM, patients=patients, events=events, **values)


class Site:
    """One hospital's gate, and the coordinator's side of it."""

    def __init__(
        self, state: Path, policy: ReleasePolicy | None = AUTO, privacy: Privacy | None = None
    ) -> None:
        self.state, self.policy, self.privacy = state, policy, privacy
        self.ledger = Ledger(state)

    @property
    def gate(self) -> Gate:
        if self.privacy is None:
            return Gate(site="leiden", state=self.state, release=self.policy)
        budget = Budget(self.state, self.privacy)
        return Gate(
            site="leiden",
            state=self.state,
            release=self.policy,
            spent=budget.spent,
            budget=budget,
        )

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
    models = models_of(weights(), [()])
    values: dict[str, Any] = {"patients": 50, "events": 20, "models": models} | changes
    told = Card(
        cancer=UVM,
        site="leiden",
        round=0,
        endpoint=STUDY.endpoint,
        encoder="",
        shape=STUDY.shape,
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


FLOWERS = {"Message", "FlowerMessage", "RecordDict", "ArrayRecord", "ConfigRecord", "to_record"}
"""Names by which a reply can be made, wherever they come from."""
HARMLESS = {"Context", "from_record", "payload"}  # beside them
RARE = {
    *("exec", "eval", "__import__", "import_module", "setattr", "__setattr__", "__dict__", "vars"),
    *("system", "popen"),
}
"""Names by which all else can be done."""
NETWORK = {
    *("socket", "ssl", "http", "httpx", "requests", "urllib", "urllib3", "aiohttp", "asyncio"),
    *("smtplib", "ftplib", "xmlrpc", "socketserver", "grpc", "multiprocessing", "subprocess"),
    *("starlette", "uvicorn"),
}

# What each module may do of all that `ways_out` looks for. Who is not here may do nothing of it.
ALLOWED = {
    "app.py": {
        *("flwr.app.Context", "flwr.app.Message", "flwr.clientapp.ClientApp"),
        "cropkt.wire.from_record",
    },
    "executor.py": {
        *("flwr.app.Context", "flwr.app.Message", "cropkt.wire.from_record"),
        *("flwr.common.constant.ErrorCode", "flwr.common.constant.SubStatus"),
        "flwr.proto.runtime_pb2.AcquireTaskRequest",
        "flwr.proto.runtime_pb2.SendTaskHeartbeatRequest",
        "flwr.supercore.heartbeat.HeartbeatSender",
        "flwr.supercore.interceptors.RuntimeTokenHttpInterceptor",
        "flwr.supercore.interceptors.RuntimeVersionHttpInterceptor",
        "flwr.supercore.interceptors.SuperExecAuthHttpInterceptor",
        *("flwr.supercore.retry.RetryInvoker", "flwr.supercore.retry.exponential"),
        "flwr.supercore.runtime.RuntimeHttpClient",
        "flwr.supercore.task_identity.TaskIdentity",
        "flwr.supernode.runtime.run_clientapp.pull_task_input",
        "flwr.supernode.runtime.run_clientapp.push_message",
        "flwr.supernode.runtime.run_clientapp.push_task_output",
        *("push_message in Executor._deliver", "push_task_output in Executor._deliver"),
        "import_module in run_app",  # the installed app
    },
    "fleet.py": {
        *("flwr.supercore.retry.RetryInvoker", "flwr.supercore.run.RunNotRunningException"),
        "flwr.supernode.fleet_http_connection",
        "flwr.supernode.node_auth_http_interceptor",
        "flwr.supernode.start_client_internal",
        "flwr.supernode.fleet_http_client.FleetHttpClient",
        "setattr in settle",
    },
    "gate.py": {
        *("flwr.app.Error", "flwr.app.Message", "cropkt.wire.payload", "cropkt.wire.to_record"),
        *(f"Message in Gate.{name}" for name in ("release", "again", "fail", "error")),
        *(f"to_record in Gate.{name}" for name in ("release", "again", "fail")),
        *(f"reply_to in Gate.{name}" for name in ("release", "again", "fail", "error")),
        "Error in Gate.error",
    },
    "link.py": {  # of an HTTP answer
        *("answer.content", "told.content"),
        "cls(invite.host, None)._ask('GET', '/v1/cropkt/ca').content",
    },
    "worker.py": {"import_module in main"},
}
# Enrolment and hello; the SuperNode's loopback; its connection; a free port; two pipe ends and a
# child process; the doctor's look at the coordinator's certificate and port, and at a GPU.
NETWORKED = {
    "link.py": {"ssl", "urllib", "httpx"},
    "executor.py": {"httpx"},
    "fleet.py": {"httpx"},
    "supernode.py": {"socket"},
    "worker.py": {"socket", "subprocess", "multiprocessing"},
    "doctor/connection.py": {"socket"},
    "doctor/machine.py": {"subprocess"},
    "cli.py": {"subprocess"},
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each name that a module imports, in full, and what it calls it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from ((f"{source}.{a.name}", a.asname or a.name) for a in node.names)


def scoped(node: ast.AST, where: str = "") -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """Yield each node that is no annotation, what it stands in, and its parent."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child, where, node
                inner = where
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    inner = f"{where}.{child.name}".lstrip(".")
                yield from scoped(child, inner)


def ways_out(tree: ast.Module) -> set[str]:
    """Return all by which a module could make a Flower reply, change or send one."""
    ways, mine = set[str](), dict[str, str]()
    for name, called in imported(tree):
        source, _, last = name.rpartition(".")
        again = last in FLOWERS and name != "cropkt.messages.Message"  # from who imported it
        if again or last == "*" or name.startswith(("flwr", "cropkt.wire", ".")):
            ways.add(name)
        makes = source in ("flwr.app", "cropkt.wire") and last not in HARMLESS
        if makes or last.startswith("push"):
            mine[called] = last
    for node, where, parent in scoped(tree):
        if isinstance(node, ast.Name) and node.id in mine:
            ways.add(f"{mine[node.id]} in {where}")
        elif isinstance(node, ast.Name) and node.id in RARE:
            ways.add(f"{node.id} in {where}")
        elif isinstance(node, ast.keyword) and node.arg == "reply_to":
            ways.add(f"reply_to in {where}")
        elif isinstance(node, ast.Attribute) and node.attr in ("content", "metadata"):
            if not only_read(node, parent):
                ways.add(ast.unparse(node))
        elif isinstance(node, ast.Attribute) and (
            node.attr in FLOWERS | RARE or node.attr.lower().startswith(("push", "create_"))
        ):
            ways.add(f"{node.attr} in {where}")
    return ways


def only_read(part: ast.Attribute, parent: ast.AST) -> bool:
    """Return whether a message's content or metadata is seen by nothing that could change it."""
    if part.attr == "metadata":
        return isinstance(parent, ast.Attribute) and isinstance(parent.ctx, ast.Load)
    called = ast.unparse(parent.func) if isinstance(parent, ast.Call) else ""
    return called in ("from_record", "hashlib.sha256")


def test_only_the_gate_makes_replies() -> None:
    assert {name: ways for name, tree in modules() if (ways := ways_out(tree))} == ALLOWED


@pytest.mark.parametrize("name", ["x/gate.py", "doctor/gate.py", "app.py", "executor.py"])
def test_a_second_gate_is_found(name: str) -> None:
    gate = ways_out(dict(modules())["gate.py"])
    assert gate - ALLOWED.get(name, set()) >= {"reply_to in Gate.fail", "to_record in Gate.fail"}


@pytest.mark.parametrize(
    "text",
    [
        "import flwr",
        "import flwr.app as f\nf.Message({}, 1, 'query')",
        "import flwr.app\nflwr.app.Error(1, 'a patient')",
        "from flwr import app as f\nf.Message({}, 1, 'query')",
        "from flwr.app import Message as M\nM({}, 1, 'query')",
        "def f(x: object) -> object:\n    return type(x)({}, reply_to=x)",
        "from flwr.app import Message\nmade = Message",
        "from flwr.app import Error\nError(1, 'a patient')",
        "from flwr.app import RecordDict\nRecordDict()",
        "from flwr.app import *",
        "from cropkt.wire import to_record as t\nt(x)",
        "from cropkt.wire import FlowerMessage",
        "from cropkt import wire\nwire.to_record(x)",
        "import cropkt.wire as w",
        "from cropkt_client.gate import FlowerMessage as M",
        "from cropkt_client import gate as g\ng.FlowerMessage({}, x)",
        "from .gate import FlowerMessage",
        "from flwr.supernode.runtime.run_clientapp import push_message as p\np(client, reply, x)",
        "from cropkt_client import executor\nexecutor.push_message(client, reply, x)",
        "def f(client, x):\n    client.PushMessage(x)",
        "def f(message, y):\n    message.content['x'] = y",
        "def f(message, y):\n    message.content = y",
        "def f(message):\n    message.content.update({})",
        "def f(message, y):\n    held = message.content\n    held['x'] = y",
        "def f(message):\n    message.metadata.group_id = 'a patient'",
        "def f(message):\n    of = message.metadata\n    of.group_id = 'a patient'",
        "def f(message, y):\n    setattr(message, 'content', y)",
        "def f(message, y):\n    message.__dict__['_content'] = y",
        "import importlib\nimportlib.import_module('flwr.app')",
        "__import__('flwr.app')",
    ],
)
def test_another_way_out_is_found(text: str) -> None:
    """In each module, whatever else that one may do."""
    ways = ways_out(ast.parse(text))
    assert all(ways - allowed for allowed in (*ALLOWED.values(), set()))


def networks(tree: ast.Module) -> set[str]:
    return {name.partition(".")[0] for name, _ in imported(tree)} & NETWORK


def test_only_these_modules_reach_a_network() -> None:
    assert {name: used for name, tree in modules() if (used := networks(tree))} == NETWORKED


@pytest.mark.parametrize("name", ["doctor/link.py", "connection.py", "fleet.py", "gate.py"])
@pytest.mark.parametrize(
    "text",
    [
        "import socket as s",
        "from urllib import request",
        "def f():\n    import http.client",
        "from subprocess import run",
    ],
)
def test_another_network_is_found(name: str, text: str) -> None:
    assert networks(ast.parse(text)) - NETWORKED.get(name, set())


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
    requests = [DescribeRequest(task="d", study=STUDY), EXPERT, TRANSFER, ROUTER, RELEASE]
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
    assert code(site.answers(router(patients, events), ROUTER)) == "suppressed"
    assert "its cohort has not 20 patients and 10 events" in caplog.text


@pytest.mark.parametrize(("patients", "events"), [(19, 15), (48, 9)])
def test_a_model_of_too_few_within_a_cohort_of_enough_stays(
    site: Site, patients: int, events: int, caplog: pytest.LogCaptureFixture
) -> None:
    few, sevens = Fewest(patients=patients, events=events), weights(7)
    shared = replace(EXPERT, shared=True)
    assert code(site.answers(expert(weights=sevens, fewest=few), shared)) == "suppressed"
    routers = router(weights=np.ones((4, 18), dtype=np.float32), fewest=few)
    assert code(site.answers(routers, replace(ROUTER, shared=True))) == "suppressed"
    assert "not every model learnt from 20 patients and 10 events" in caplog.text
    assert isinstance(site.answers(router(fewest=few), ROUTER), RouterReply)  # it stays here


def test_scores_of_too_few_within_a_cohort_of_enough_are_left_out(site: Site) -> None:
    answer = site.answers(transfer(24, 12, Fewest(patients=16, events=8)), TRANSFER)
    assert isinstance(answer, TransferReply)
    assert (answer.patients, answer.events, answer.scores) == (25, 10, SCORES)
    assert answer.training_scores == ((Score(),),) * 3
    assert "scores of folds suppressed" in site.ledger.rows()[-1].checked


def test_how_few_stand_behind_an_answer_is_said_and_stays(site: Site) -> None:
    for answer, request in ((expert(), EXPERT), (transfer(48, 22), TRANSFER), (router(), ROUTER)):
        said = site.answers(answer, request)
        assert isinstance(said, ExpertReply | TransferReply | RouterReply)
        assert said.fewest is None
        assert code(site.answers(replace(answer, fewest=None), request)) == "internal"


def test_scores_of_too_few_are_left_out(site: Site) -> None:
    answer = site.answers(transfer(19, 15), TRANSFER)
    assert isinstance(answer, TransferReply)
    assert (answer.patients, answer.events) == (None, 15)
    assert answer.scores == (SourceScore(),)
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
        (expert(weights=weights(2)), EXPERT, "holds 2 models of 10 weights where 1"),
        (
            expert(weights=weights(8)),
            replace(EXPERT, shared=True),
            "8 models of 10 weights where 7",
        ),
        (
            expert(weights=weights(6)),
            replace(EXPERT, shared=True),
            "6 models of 10 weights where 7",
        ),
        (expert(weights=weights()[:, 1:]), EXPERT, "1 models of 9 weights where 1 of 10"),
        (router(weights=weights()), ROUTER, "1 models of 10 weights where 0"),
        (router(weights=weights(4)), replace(ROUTER, shared=True), "where 4 of 18"),
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


def test_routers_leave_where_others_average_them_and_no_audit_is_asked_for(
    site: Site, tmp_path: Path
) -> None:
    assert site.answers(router(), ROUTER) == router(50, 20, fewest=None)
    request, routers = replace(ROUTER, shared=True), np.ones((4, 18), dtype=np.float32)
    assert isinstance(site.answers(router(weights=routers), request), RouterReply)
    strict = Site(tmp_path / "strict", replace(AUTO, audit=AuditLimit()))
    assert code(strict.answers(router(weights=routers), request)) == "audit"
    assert isinstance(strict.answers(router(), ROUTER), RouterReply)


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


def limited(site: SiteOnDisk, limit: float) -> None:
    """Let `site.yaml` set a limit to how well membership may be told."""
    path = site.folder / "site.yaml"
    values = yaml.safe_load(path.read_text())
    values["release"] = {"approval": "auto", "audit": {"max_auroc_upper": limit}}
    path.write_text(yaml.safe_dump(values))


def shuffled(site: SiteOnDisk) -> None:
    """Give each patient another one's outcome: nothing is left to learn but by heart."""
    table = site.folder / "outcomes.csv"
    head, *rows = (line.split(",") for line in table.read_text().splitlines())
    others = np.random.default_rng(0).permutation(len(rows))
    mixed = [[*row[:2], *rows[other][2:]] for row, other in zip(rows, others, strict=True)]
    table.write_text("\n".join(map(",".join, [head, *mixed])) + "\n")


def test_an_expert_that_learnt_by_heart_is_blocked_through_the_app(
    make_site: Callable[..., SiteOnDisk], study: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A real Flower message in, a code out; the weights stay."""
    hospital = make_site()
    shuffled(hospital)
    context = Context(
        run_id=1,
        node_id=2,
        node_config={"config": str(hospital.folder / "site.yaml")},
        state=RecordDict(),
        run_config={},
    )

    def answer(task: str, training: TrainingConfig) -> Message:
        shape = replace(study.shape, embed=32, attention=8)
        asks = replace(study, shape=shape, training=training)
        reply = app(
            message=asked(ExpertRequest(task=task, study=asks, cancer=UVM)), context=context
        )
        assert Ledger(hospital.state).rows()[-1].bytes == payload(reply).bytes
        return from_record(reply.content, expected=REPLIES)

    by_heart = TrainingConfig(
        epochs=60, batch=8, learning_rate=1e-2, weight_decay=0.0, dropout=0.0, minimum_updates=0
    )
    limited(hospital, 0.85)
    assert code(answer("expert/1", by_heart)) == "audit"
    assert "membership is told with an AUROC of up to" in caplog.text
    (row,) = Ledger(hospital.state).rows()
    assert row.message == "failure audit"
    assert row.bytes < 300
    # The same patients' expert, hardly trained, is within the same limit.
    careful = replace(by_heart, epochs=1, learning_rate=1e-4, dropout=0.5, weight_decay=1.0)
    assert isinstance(answer("expert/2", careful), ExpertReply)


# From a private site: counts and one expert that is paid for


@pytest.fixture
def paid(tmp_path: Path) -> Site:
    """A private site that has paid for one expert, whose weights are `weights()`."""
    site = Site(tmp_path / "state", privacy=Privacy(epsilon=8.0))
    pay(site, weights())
    return site


def pay(site: Site, expert: Any, cancer: Cancer = UVM) -> Payment:
    assert site.privacy is not None
    budget = Budget(site.state, site.privacy)
    mechanism = Mechanism(noise_multiplier=20.0, sample_rate=1.0, steps=100)
    payment = budget.pay(mechanism, cancer=cancer, task="expert/1", request="r")
    budget.use(payment, digest(expert[0]))
    return payment


NOTHING: dict[str, Any] = {"score": Score(), "seconds": 0.0}
EMPTY: dict[str, Any] = {
    "arms": {"local": ArmScore()},
    "routing": {},
    "zero_shot_choice": {},
    "seconds": 0.0,
}


def private_expert(site: Site, *, told: Any = None, **changes: Any) -> ExpertReply:
    """Return the paid expert of a private site, with what is wrong about it."""
    assert site.privacy is not None
    on_card = {"epsilon": Budget(site.state, site.privacy).spent(UVM), "delta": 1e-5}
    return expert(**(NOTHING | {"signed": card(site, **(on_card | (told or {})))} | changes))


def test_a_private_site_gives_counts_and_a_paid_expert(paid: Site) -> None:
    answer = paid.answers(private_expert(paid), EXPERT)
    assert isinstance(answer, ExpertReply)
    assert (answer.patients, answer.score) == (50, Score())
    row = paid.ledger.rows()[-1]
    assert "private: its expert's epsilon of 2 is paid" in row.checked
    assert row.epsilon == pytest.approx(2.0, abs=0.01)
    counts = DescribeReply(
        task="d",
        site="leiden",
        cohorts=(CohortCount(cancer=UVM, patients=48, events=22, dim=4),),
        versions={"cropkt": "1.0"},
    )
    withheld = replace(
        transfer(48, 22),
        scores=(SourceScore(),),
        training_scores=((Score(),),) * 3,
        seconds=0.0,
    )
    for answer, request in (
        (counts, DescribeRequest(task="d", study=STUDY)),
        (withheld, TRANSFER),
        (router(weights=None, seconds=0.0), ROUTER),
        (release(48, 22, **EMPTY, reason=WITHHELD), RELEASE),
    ):
        assert not isinstance(paid.answers(answer, request), Failure)
        assert "private: counts only" in paid.ledger.rows()[-1].checked


@pytest.mark.parametrize(
    ("answer", "request_", "field"),
    [
        (transfer(48, 22), TRANSFER, "scores"),
        (replace(transfer(48, 22), scores=(SourceScore(),)), TRANSFER, "training_scores"),
        (replace(transfer(48, 22), scores=(SourceScore(c_index=0.0),)), TRANSFER, "scores"),
        (
            router(weights=np.ones((4, 18), dtype=np.float32), seconds=0.0),
            replace(ROUTER, shared=True),
            "weights",
        ),
        (router(weights=None), ROUTER, "seconds"),
        (release(48, 22), RELEASE, "arms"),
        (release(48, 22, **EMPTY | {"routing": {UVM: 0.7}}), RELEASE, "routing"),
        (release(48, 22, **EMPTY | {"zero_shot_choice": {"vote": 3}}), RELEASE, "zero_shot_choice"),
        (release(48, 22, **EMPTY | {"arms": {"local": ArmScore(pairs=10)}}), RELEASE, "arms"),
        (release(48, 22, **EMPTY, reason="no comparable pair"), RELEASE, "reason"),
        (release(19, 22), RELEASE, "arms"),  # refused, though the scores of so few are left out
    ],
)
def test_what_a_faulty_task_tells_of_a_private_cohort_stays(
    paid: Site, answer: Message, request_: Message, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert code(paid.answers(answer, request_)) == "policy"
    assert f"the {field} of a {type(answer).__name__} would leave a private site" in caplog.text
    open_site = Site(paid.state)
    assert not isinstance(open_site.answers(answer, request_), Failure)  # the privacy is why


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": Score(c_index=0.6)}, "the score of a ExpertReply"),
        ({"seconds": 1.0}, "the seconds of a ExpertReply"),
        ({"signed": None}, "an expert without a card"),
        ({"told": {"epsilon": None, "delta": None}}, "has not paid for the expert"),
        ({"told": {"epsilon": 0.5}}, "has not paid for the expert"),
        ({"told": {"delta": 1e-3}}, "has not paid for the expert"),
        ({"weights": weights() + 1}, "its weights are not those that were signed"),
        (
            {"weights": weights() + 1, "told": {"models": models_of(weights() + 1, [()])}},
            "has not paid for the expert",  # another expert at the price of the paid one
        ),
        ({"told": {"models": models_of(weights(2), [(), (0,)])}}, "has not paid for the expert"),
        (
            {
                "told": {
                    "audit": AuditSummary(
                        method="loss", auroc=0.6, low=0.5, high=0.7, patients=50, detectable=0.7
                    )
                }
            },
            "the audit on its expert's card",
        ),
    ],
)
def test_an_expert_that_is_not_the_paid_one_stays(
    paid: Site, changes: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert code(paid.answers(private_expert(paid, **changes), EXPERT)) == "policy"
    assert said in caplog.text


def test_the_models_of_all_cancers_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Though its policy names them: their rounds have no payment."""
    policy = replace(AUTO, messages=(*ASKED, "train.fedavg"))
    site = Site(tmp_path, policy, Privacy(epsilon=8.0))
    request = FedAvgRequest(task="fedavg/1", study=STUDY, cancer=UVM)
    told: dict[str, Any] = {"task": "fedavg/1", "cancer": UVM, "patients": 48, "events": 22}
    reply = FedAvgReply(weights=weights(4), seconds=0.0, fewest=MANY, **told)
    assert code(site.answers(reply, request)) == "policy"
    assert "the weights of a FedAvgReply would leave a private site" in caplog.text
    site.privacy = None
    assert isinstance(site.answers(reply, request), FedAvgReply)
    careful = Site(tmp_path / "careful", replace(policy, audit=AuditLimit(max_auroc_upper=0.7)))
    assert code(careful.answers(reply, request)) == "audit"  # nobody audits them


def test_what_stays_is_a_typed_error(paid: Site) -> None:
    assert paid.privacy is not None
    budget = Budget(paid.state, paid.privacy)
    with pytest.raises(PrivateError, match="the arms of a ReleaseReply"):
        private(release(48, 22), budget.has_paid)
    suppressed = release(48, 22, **EMPTY, reason=SUPPRESSED)
    assert private(suppressed, budget.has_paid) == "private: counts only"


def test_another_cohorts_payment_does_not_count(tmp_path: Path) -> None:
    site = Site(tmp_path, privacy=Privacy(epsilon=8.0))
    payment = pay(site, weights(), Cancer.SKCM)
    told = {"epsilon": payment.epsilon}
    assert code(site.answers(private_expert(site, told=told), EXPERT)) == "policy"


def test_an_answer_that_was_held_before_the_site_became_private_stays(careful: Site) -> None:
    careful.answers(transfer(48, 22), TRANSFER)
    shelf = Shelf(careful.state)
    shelf.decide(shelf.all()[0], "approved")
    careful.privacy = Privacy(epsilon=8.0)
    assert code(careful.again("transfer/1")) == "policy"
    careful.privacy = None
    assert isinstance(careful.again("transfer/1"), TransferReply)


def test_nothing_leaves_once_the_budget_is_lost(
    paid: Site, caplog: pytest.LogCaptureFixture
) -> None:
    answer = private_expert(paid)
    assert isinstance(paid.answers(answer, EXPERT), ExpertReply)
    (paid.state / NAME).unlink()
    empty = router(weights=None, seconds=0.0)
    assert code(paid.answers(answer, EXPERT)) == "budget"
    assert code(paid.answers(empty, ROUTER)) == "budget"
    assert "Put its latest copy back" in caplog.text
    (paid.state / COUNT_NAME).unlink()
    assert code(paid.answers(empty, ROUTER)) == "budget"
    assert "answers about UVM left with epsilon 2.00 spent" in caplog.text


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
        site.gate.error(2, "reference 0a1b2c3d", to=asked(EXPERT))


def test_a_failure_and_an_error_are_recorded_too(site: Site) -> None:
    reply = site.gate.fail("expert/1", "data", to=asked(EXPERT), reference="0a1b")
    failure = site.received(reply)
    assert (code(failure), getattr(failure, "site", "")) == ("data", "leiden")
    error = site.gate.error(2, "reference 0a1b2c3d", to=asked(EXPERT))
    rows = site.ledger.rows()
    assert [row.message for row in rows] == ["failure data", "error 2"]
    assert rows[1].sha256 == payload(error).sha256
    assert not site.ledger.problems(public_key(site.state))


@pytest.mark.parametrize(
    "reason", ["/data/SECRET.svs", "patient 0815 died day 1234", "reference 0815", "", "a\nb"]
)
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


@pytest.mark.parametrize("change", [{"recipient": "0" * 64}, {"study": "another"}])
def test_an_approval_is_for_one_recipient_only(
    careful: Site, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    careful.answers(expert(), EXPERT)
    shelf = Shelf(careful.state)
    shelf.decide(shelf.all()[0], "approved")
    study, recipient = ledger.recipient(careful.state)
    other = {"study": study, "recipient": recipient} | change
    to = (other["study"], other["recipient"])
    monkeypatch.setattr(gate, "recipient", lambda _: to)
    assert code(careful.again("expert/1")) == "not_held"
    assert code(careful.answers(expert(), EXPERT)) == "awaiting_approval"
    assert [held.decision for held in shelf.all()] == ["approved", "waiting"]


def test_an_approval_is_not_taken_over_by_one_of_the_same_short_name(
    careful: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight characters can be met by trying keys."""
    monkeypatch.setattr(Held, "id", "0815abcd")
    careful.answers(expert(), EXPERT)
    shelf = Shelf(careful.state)
    shelf.decide(shelf.all()[0], "approved")
    monkeypatch.setattr(gate, "recipient", lambda _: ("another", "0" * 64))
    assert code(careful.answers(expert(), EXPERT)) == "awaiting_approval"


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
