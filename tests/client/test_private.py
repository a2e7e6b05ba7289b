"""A private site: one paid expert leaves, and nothing else that is computed from patients."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import yaml
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.errors import BudgetError, ConfigError, RefusedError
from cropkt.experts import private
from cropkt.experts.card import read_card
from cropkt.experts.private import NoisySum
from cropkt.messages import (
    REPLIES,
    ArmScore,
    ExpertReply,
    ExpertRequest,
    Failure,
    Fewest,
    Message,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    Score,
    SourceScore,
    TransferReply,
    TransferRequest,
)
from cropkt.wire import from_record, to_record
from cropkt_client import app as client
from cropkt_client import tasks
from cropkt_client.budget import FOLDER, NAME, Budget
from cropkt_client.ledger import Ledger
from cropkt_client.private import PrivateExpert
from cropkt_client.site import Site

UVM, SKCM, KIPAN = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN


def made_private(site: Site, **privacy: float) -> Site:
    path = site.folder / "site.yaml"
    privacy = {"epsilon": 8.0, "delta": 1e-5, **privacy}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"privacy": privacy}))
    return Site.load(path)


@pytest.fixture
def study(study: StudyConfig) -> StudyConfig:
    return replace(study, training=replace(study.training, learning_rate=1e-3, minimum_updates=0))


@pytest.fixture
def site(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(private, "STEPS", 8)
    return made_private(make_site())


def request_for(study: StudyConfig, task: str = "t", *, shared: bool = False) -> ExpertRequest:
    return ExpertRequest(task=task, study=study, cancer=UVM, shared=shared)


def budget_of(site: Site) -> Budget:
    budget = Budget.of(site.folder, site.config)
    assert budget is not None
    return budget


def test_only_the_private_expert_leaves(
    site: Site, make_site: Callable[..., Site], study: StudyConfig
) -> None:
    others = [
        tasks.fit_expert(ExpertRequest(task="t", study=study, cancer=cancer), make_site(cancer))
        for cancer in (KIPAN, SKCM)
    ]
    own = tasks.fit_expert(request_for(study), site)
    kept = site.kept("UVM/experts")
    assert kept is not None
    assert own.weights.shape == (1, kept["weights"].shape[1])
    assert not (kept["weights"] == own.weights).all(1).any()
    assert (own.score, own.seconds) == (Score(), 0)
    (payment,) = budget_of(site).spent_by("t")
    assert payment.epsilon == pytest.approx(2.0, rel=0.02)  # a quarter of 8
    assert payment.mechanism.sample_rate == 1  # 48 patients, told as 50, and a lot of 64
    assert own.signed is not None
    card = read_card(own.signed.card)
    assert (card.epsilon, card.delta) == (payment.epsilon, 1e-5)

    weights = np.concatenate([reply.weights for reply in others])
    signed = tuple(reply.signed for reply in others if reply.signed)
    scores = tasks.score_sources(
        TransferRequest(
            task="s", study=study, cancer=UVM, sources=(KIPAN, SKCM), weights=weights, signed=signed
        ),
        site,
    )
    assert scores.scores == (SourceScore(), SourceScore())
    assert scores.training_scores == ((Score(), Score()),) * 3
    router = tasks.fit_router(
        RouterRequest(
            task="r", study=study, cancer=UVM, sources=(KIPAN, SKCM), weights=weights, signed=signed
        ),
        site,
    )
    assert router.weights is None
    assert site.kept("UVM/routers") is not None
    release = tasks.release(ReleaseRequest(task="e", study=study, cancer=UVM), site)
    assert all(arm == ArmScore() for arm in release.arms.values())
    assert (release.routing, release.zero_shot_choice) == ({}, {})
    assert release.reason == "withheld for privacy"
    assert scores.seconds == router.seconds == release.seconds == 0
    assert '"c_index":0.' in (site.state / "UVM" / "release.json").read_text()
    assert budget_of(site).spent(UVM) == payment.total  # nothing else costs anything


def test_the_count_that_trains_is_the_rounded_one(
    site: Site, study: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "LOT", 45)
    tasks.fit_expert(request_for(study), site)
    (payment,) = budget_of(site).spent_by("t")
    release = site.config.release
    step = release.round_counts_to if release else 1
    assert payment.mechanism.sample_rate == 45 / (round(48 / step) * step)


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"source": "fold_0"}, ConfigError, "depends on which patients share a fold"),
        ({"loss": "clamped"}, ConfigError, "cannot be trained privately"),
        ({"standardise": "site"}, ConfigError, "depend on all patients"),
        ({"shared": True}, RefusedError, "UVM is shared by several sites"),
        ({"delta": 0.03}, ConfigError, "release of a whole patient of 48"),
    ],
)
def test_what_cannot_be_private_is_refused_before_anything_is_spent(
    site: Site,
    study: StudyConfig,
    change: dict[str, object],
    error: type[Exception],
    what: str,
) -> None:
    if "delta" in change:
        site = made_private(site, delta=0.03)
    if "source" in change:
        study = replace(study, source="fold_0")
    training = {name: value for name, value in change.items() if name in ("loss", "standardise")}
    study = replace(study, training=replace(study.training, **training))  # type: ignore[arg-type]
    with pytest.raises(error, match=what):
        tasks.fit_expert(request_for(study, shared="shared" in change), site)
    assert budget_of(site).spent(UVM) == 0


def test_routers_of_a_shared_cancer_are_refused(site: Site, study: StudyConfig) -> None:
    nothing = np.zeros((1, 1), dtype=np.float32)
    request = RouterRequest(
        task="r", study=study, cancer=UVM, shared=True, sources=(SKCM,), weights=nothing, signed=()
    )
    with pytest.raises(RefusedError, match="UVM is shared"):
        tasks.fit_router(request, site)


class KilledError(RuntimeError):
    """Stands for the end of a process."""


def test_a_killed_training_is_paid_once_and_a_second_release_again(
    site: Site, study: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, real = list[int](), NoisySum.finish

    def dies(self: NoisySum) -> None:
        if len(steps) == 5:
            raise KilledError
        steps.append(1)
        real(self)

    monkeypatch.setattr(NoisySum, "finish", dies)
    request = request_for(study)
    with pytest.raises(KilledError):
        tasks.fit_expert(request, site)
    spent = budget_of(site).spent(UVM)
    assert spent > 0  # before the work, and not given back
    monkeypatch.setattr(NoisySum, "finish", real)
    first = tasks.fit_expert(request, site)
    assert budget_of(site).spent(UVM) == spent
    # As if the site had lost its answer after it left: what leaves next has other noise.
    second = tasks.fit_expert(request, site)
    assert budget_of(site).spent(UVM) > spent
    assert not np.array_equal(first.weights, second.weights)


# Through the app and the gate.


@pytest.fixture
def ask(site: Site) -> Callable[[Message], Message]:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2
    context = Context(
        run_id=1,
        node_id=2,
        node_config={"config": str(site.folder / "site.yaml")},
        state=RecordDict(),
        run_config={},
    )

    def send(request: Message) -> Message:
        message = FlowerMessage(to_record(request), dst_node_id=2, message_type=type(request).kind)
        reply = client.app(message=message, context=context)
        return from_record(reply.content, expected=REPLIES)

    return send


def test_a_used_up_budget_is_a_failure_with_its_code(
    site: Site,
    ask: Callable[[Message], Message],
    study: StudyConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    site = made_private(site, epsilon=2.5, per_release=2.0)
    first = ask(request_for(study, "fit_expert/one"))
    assert isinstance(first, ExpertReply)
    spent = budget_of(site).spent(UVM)
    again = ask(request_for(study, "fit_expert/one"))
    assert isinstance(again, ExpertReply)
    assert np.array_equal(again.weights, first.weights)
    assert budget_of(site).spent(UVM) == spent  # answered from the store
    with caplog.at_level(logging.ERROR):
        refusal = ask(request_for(replace(study, seed=1), "fit_expert/two"))
    assert isinstance(refusal, Failure)
    assert refusal.code == "budget"
    assert f"UVM has spent {spent:.2f} of epsilon 2.5" in caplog.text
    with pytest.raises(BudgetError):
        tasks.fit_expert(request_for(replace(study, seed=1)), site)
    rows = Ledger(site.state).rows()
    assert [row.epsilon for row in rows] == [spent, spent, None]  # a failure tells nothing


def test_a_lost_budget_is_a_failure_with_its_code(
    site: Site,
    ask: Callable[[Message], Message],
    study: StudyConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = request_for(study, "fit_expert/one")
    first = ask(request)
    assert isinstance(first, ExpertReply)
    path = site.folder / FOLDER / NAME
    content = path.read_bytes()
    path.unlink()
    for again in (request, request_for(replace(study, seed=1), "fit_expert/two")):
        refusal = ask(again)
        assert isinstance(refusal, Failure)
        assert refusal.code == "budget"
    assert f"{path}: 1 payments were made, and 0 are here" in caplog.text
    assert not path.exists()
    path.write_bytes(content)
    answer = ask(request)
    assert isinstance(answer, ExpertReply)
    assert np.array_equal(answer.weights, first.weights)


def test_the_gate_stops_a_task_that_forgets_that_its_site_is_private(
    site: Site,
    ask: Callable[[Message], Message],
    study: StudyConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def code(reply: Message) -> str:
        assert isinstance(reply, Failure)
        return reply.code

    weights = np.ones((1, 5), dtype=np.float32)
    about = {"cancer": UVM, "patients": 48, "events": 22, "fewest": Fewest(patients=32, events=14)}
    scores = TransferReply(
        task="s",
        scores=(SourceScore(c_index=0.7, se=0.1),),
        training_scores=((Score(),),) * 3,
        seconds=0.0,
        **about,
    )
    router = RouterReply(task="r", weights=weights, seconds=0.0, **about)
    monkeypatch.setattr(tasks, "score_sources", lambda *_: scores)
    monkeypatch.setattr(tasks, "fit_router", lambda *_: router)
    sources = {"study": study, "cancer": UVM, "sources": (SKCM,), "weights": weights}
    assert code(ask(TransferRequest(task="s", **sources))) == "policy"
    assert code(ask(RouterRequest(task="r", **sources))) == "policy"
    assert "the scores of a TransferReply would leave a private site" in caplog.text
    assert "the weights of a RouterReply would leave a private site" in caplog.text
    # The experts without noise, which it trains for its own use, given away in place of the other.
    monkeypatch.setattr(PrivateExpert, "of", lambda *_: None)
    monkeypatch.setattr(tasks, "audited", lambda *_: None)
    assert code(ask(request_for(study, "fit_expert/one"))) == "policy"
    assert {row.message for row in Ledger(site.state).rows()} == {"failure policy"}
