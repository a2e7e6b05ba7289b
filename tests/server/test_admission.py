"""What enters the bank: really trained experts do, planted bad ones do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort
from cropkt.cohort.splits import stratified_folds
from cropkt.config import ExpertShape, RouterConfig, StudyConfig, TrainingConfig
from cropkt.experts.abmil import Abmil, flatten, parameter_count
from cropkt.experts.training import Plan, cosine_with_warmup, train_experts
from cropkt.messages import (
    CohortCount,
    DescribeReply,
    ExpertReply,
    ExpertRequest,
    Message,
    RouterReply,
    RouterRequest,
    Score,
    SourceScore,
    TransferReply,
    TransferRequest,
    Weights,
)
from cropkt.transfer.roupkt import Roupkt
from cropkt_server.admission import FAR, Admission, copy_of, distances, outliers
from cropkt_server.cli import app
from cropkt_server.results import results
from cropkt_server.settings import Settings, save_settings
from cropkt_server.store import Store, Task
from cropkt_server.study import Study

pytestmark = pytest.mark.usefixtures("all_signed")

PATIENTS, EVENTS = 36, 20
STUDY = StudyConfig(
    folds=3,
    rounds=2,
    shape=ExpertShape(dim=6, embed=8, attention=4),
    training=TrainingConfig(epochs=6, minimum_updates=60, learning_rate=1e-2),
    router=RouterConfig(epochs=2, learning_rate=1e-3),
)
CANCERS = dict(zip("abcdefg", Cancer, strict=False))  # a cancer each
HOLDINGS = {site: (cancer,) for site, cancer in CANCERS.items()}
SHARED = {**HOLDINGS, "h": (CANCERS["a"],)}
ADMISSION = Admission(study=STUDY)
BINS = STUDY.shape.bins
HEAD = slice(-BINS * 9, None)  # of a row of weights: each bin from 8 numbers and a constant
Spoil = Callable[[Weights], Weights]


def task_of(site: str, number: int = 0) -> Task:
    cancer = CANCERS["a" if site == "h" else site]
    return Task(kind="fit_expert", site=site, cancer=cancer, round=number)


@pytest.fixture(scope="module")
def honest(make_cohort: Callable[..., Cohort]) -> dict[str, Weights]:
    """The models that eight sites really train, (7, parameters) each."""

    def train(seed: int) -> Weights:
        cohort = make_cohort(patients=PATIENTS, seed=seed, effect=0.3 + 0.1 * seed)
        folds = stratified_folds(cohort.event, cohort.time_bins, folds=STUDY.folds, seed=STUDY.seed)
        plan = Plan.cross_fitted(folds)
        start = Abmil.initial(
            STUDY.shape, seed=STUDY.seed, hazard=STUDY.initial_hazard, models=len(plan.excluded)
        )
        trained = train_experts(cohort, plan, initial=start, config=STUDY.training, seed=STUDY.seed)
        weights: Weights = flatten(trained).numpy()
        return weights

    return {site: train(seed) for seed, site in enumerate(SHARED)}


class Sites:
    """Sites that answer with the experts they are given, and remember what they were sent."""

    def __init__(
        self, experts: Mapping[str, Weights], holdings: Mapping[str, tuple[Cancer, ...]]
    ) -> None:
        self.experts, self.holdings = dict(experts), holdings
        self.sent: list[TransferRequest] = []

    def answer(self, task: Task, request: Message) -> Message | None:
        """Return the answer to a row; None where this test's sites have none."""
        if task.cancer is None:
            counts = (
                CohortCount(cancer=cancer, patients=PATIENTS, events=EVENTS, dim=6)
                for cancer in self.holdings[task.site]
            )
            return DescribeReply(task=task.id, site=task.site, cohorts=tuple(counts))
        if isinstance(request, TransferRequest):
            self.sent.append(request)
        if not isinstance(request, ExpertRequest):
            return None
        weights = self.experts[task.site]
        if request.weights is not None:  # a round that begins with an average
            weights = request.weights + np.float32(0.3) * (weights - ADMISSION.initial)
        return ExpertReply(
            task=task.id,
            cancer=task.cancer,
            patients=PATIENTS,
            events=EVENTS,
            weights=weights if request.shared else weights[:1],
            score=Score(c_index=0.6, se=0.05),
            seconds=1.0,
        )

    def run(self, study: Study, *, order: int = 0, stop_after: int = 1_000) -> None:
        """Answer what is due, in an order drawn from a seed."""
        rng = np.random.default_rng(order)
        asked: set[str] = set()
        for _ in range(stop_after):
            due = [task for task in study.due() if task.id not in asked]
            if not due:
                return
            task = due[int(rng.integers(len(due)))]
            reply = self.answer(task, study.request(task))
            if reply is None:
                asked.add(task.id)
            else:
                study.record(task, reply)


@pytest.fixture
def run(tmp_path: Path, honest: dict[str, Weights]) -> Callable[..., tuple[Study, Sites]]:
    """Return what runs a study in which some sites' experts are spoilt."""

    def run_with(
        spoilt: Mapping[str, Weights] | None = None,
        *,
        holdings: Mapping[str, tuple[Cancer, ...]] = HOLDINGS,
        order: int = 0,
    ) -> tuple[Study, Sites]:
        folder = tmp_path / f"study-{order}"
        sites = Sites({**honest, **(spoilt or {})}, holdings)
        study = Study(folder, STUDY, holdings)
        sites.run(study, order=order)
        return study, sites

    return run_with


def causes(study: Study) -> dict[str, str]:
    return {task.id: task.cause for task in study.failures()}


def scaled(factor: float) -> Spoil:
    return lambda weights: weights * np.float32(factor)


def with_head(change: Callable[[Weights], Any]) -> Spoil:
    def spoil(weights: Weights) -> Weights:
        spoilt = weights.copy()
        spoilt[:, HEAD] = change(spoilt[:, HEAD])
        return spoilt

    return spoil


def constant(head: Weights) -> Weights:
    only_constants = np.zeros_like(head)
    only_constants[:, -BINS:] = head[:, -BINS:]
    return only_constants


def permuted(weights: Weights) -> Weights:
    """Shuffle each tensor in itself, the same for all models."""
    spoilt, rng, at = weights.copy(), np.random.default_rng(5), 0
    for parameter in Abmil(STUDY.shape).parameters():
        size = parameter[0].numel()
        spoilt[:, at : at + size] = spoilt[:, at + rng.permutation(size)]
        at += size
    return spoilt


def noise(weights: Weights) -> Weights:
    rng = np.random.default_rng(6)
    drawn: Weights = (weights.std() * rng.normal(size=weights.shape)).astype(np.float32)
    return drawn


def barely_trained(weights: Weights) -> Weights:
    """Every check of one expert alone passes this."""
    spoilt: Weights = ADMISSION.initial + np.float32(0.05) * (weights - ADMISSION.initial)
    return spoilt


# Honest experts


@pytest.mark.parametrize("order", range(3))
def test_experts_that_were_really_trained_enter_in_any_order(run: Any, order: int) -> None:
    study, sites = run(holdings=SHARED, order=order)
    assert causes(study) == {}
    assert study.bank() == tuple(sorted(CANCERS.values()))
    assert sites.sent


def test_they_are_far_from_every_bound(honest: dict[str, Weights]) -> None:
    portraits = {site: ADMISSION.portrait(rows[0]) for site, rows in honest.items()}
    assert max(abs(z) for _, _, z in distances(portraits)) < 0.8 * FAR
    for site, rows in honest.items():
        assert ADMISSION.expert(rows, patients=PATIENTS, start=None) == ""
        others = {name: portrait for name, portrait in portraits.items() if name != site}
        assert copy_of(portraits[site], others) == ""


def test_an_expert_that_moved_as_far_as_adamw_can_is_taken_in() -> None:
    """Gradients that grow from step to step make the longest steps."""
    module = Abmil.initial(STUDY.shape, seed=STUDY.seed, hazard=STUDY.initial_hazard)
    config, updates = STUDY.training, 62
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, eps=0
    )
    for step in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * cosine_with_warmup(step, total=updates, warmup=2)
        for number, parameter in enumerate(module.parameters()):
            parameter.grad = torch.full_like(parameter, (-1.1) ** number * 1.1**step)
        optimizer.step()
    weights: Weights = flatten(module).numpy()
    assert "times as far" not in ADMISSION.expert(weights, patients=PATIENTS, start=None)
    beyond = ADMISSION.initial + 2.5 * (weights - ADMISSION.initial)
    assert "times as far" in ADMISSION.expert(beyond, patients=PATIENTS, start=None)


# One expert alone


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (scaled(10), "times as far from where it began as the study's learning rates can move it"),
        (scaled(-10), "times as far"),
        (scaled(1e30), "times as far"),
        (with_head(constant), "the same risk"),
        (lambda _: np.tile(ADMISSION.initial, (7, 1)), "the model that the training began with"),
    ],
)
def test_a_bad_expert_is_kept_apart(
    run: Any, honest: dict[str, Weights], spoil: Spoil, said: str
) -> None:
    study, sites = run({"c": spoil(honest["c"])})
    (cause,) = causes(study).values()
    assert list(causes(study)) == ["fit_expert/c/" + CANCERS["c"] + "/0"]
    assert cause.startswith("quarantined: ")
    assert said in cause
    assert CANCERS["c"] not in study.bank()
    assert all(CANCERS["c"] not in request.sources for request in sites.sent)
    assert len(sites.sent) == len(CANCERS) - 1  # and its own target waits


@pytest.mark.parametrize(
    "weights",
    [
        np.ones((2, ADMISSION.initial.size), dtype=np.float32),
        np.ones((1, ADMISSION.initial.size - 1), dtype=np.float32),
        np.full((1, ADMISSION.initial.size), np.nan, dtype=np.float32),
    ],
)
def test_weights_of_another_form_are_no_expert(weights: Weights) -> None:
    assert ADMISSION.expert_form(weights, shared=False)


def test_an_answer_that_overflows_is_no_answer() -> None:
    loose = replace(STUDY, training=replace(STUDY.training, learning_rate=1e36))
    weights = ADMISSION.initial[None] * np.float32(1e30)
    said = Admission(study=loose).expert(weights, patients=PATIENTS, start=None)
    assert said == "it has no finite answer to a probe bag"


def test_a_private_training_takes_longer_steps() -> None:
    shift = np.zeros_like(ADMISSION.initial[None])
    shift[0, :8] = 20.0
    weights = ADMISSION.initial[None] + shift
    weights[:, HEAD] += np.linspace(-1, 1, 9 * BINS, dtype=np.float32)
    assert "times as far" in ADMISSION.expert(weights, patients=PATIENTS, start=None)
    assert ADMISSION.expert(weights, patients=PATIENTS, start=None, private=True) == ""


def test_a_site_cannot_weigh_more_than_it_described(
    tmp_path: Path, honest: dict[str, Weights]
) -> None:
    class Boasting(Sites):
        def answer(self, task: Task, request: Message) -> Message | None:
            reply = super().answer(task, request)
            many = isinstance(reply, ExpertReply) and task.site == "h"
            return replace(reply, events=1_000_000) if many else reply

    study = Study(tmp_path, STUDY, SHARED)
    Boasting(honest, SHARED).run(study)
    assert causes(study) == {
        task_of("h").id: "quarantined: it counts 1000000 events, its site described 20"
    }


# Copies


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (scaled(1), "its attention is a copy of that in fit_expert/{}"),
        (lambda w: w * np.float32(1.0005), "is a copy of that in fit_expert/{}"),
        (
            with_head(lambda head: np.concatenate([-head[:, :-BINS], head[:, -BINS:]], axis=1)),
            "its attention is a copy of that in fit_expert/{}",
        ),
        (
            with_head(lambda head: head * np.float32(0.9)),
            "its attention is a copy of that in fit_expert/{}",
        ),
    ],
)
def test_a_copy_is_kept_apart_and_the_first_is_not(
    run: Any, honest: dict[str, Weights], spoil: Spoil, said: str
) -> None:
    for order in range(3):
        study, _ = run({"c": spoil(honest["e"])}, order=order)
        ((row, cause),) = causes(study).items()
        first, later = ("e", "c") if "/c/" in row else ("c", "e")
        assert row.split("/")[1] == later
        assert said.format(first) in cause
        study.store.close()


def test_a_changed_sign_is_named(honest: dict[str, Weights]) -> None:
    victim = {"e": ADMISSION.portrait(honest["e"][0])}
    turned = honest["c"][0].copy()
    turned[HEAD] = -honest["e"][0][HEAD]
    assert copy_of(ADMISSION.portrait(turned), victim) == (
        "its head is that in e with the sign changed"
    )


def test_a_copy_with_much_noise_is_not_seen(honest: dict[str, Weights]) -> None:
    """What it cannot see: such a copy is as far from its source as two honest experts."""
    rng = np.random.default_rng(0)
    moved = honest["e"][0] - ADMISSION.initial
    noisy = honest["e"][0] + 0.2 * np.abs(moved).mean() * rng.normal(size=moved.size)
    portrait = ADMISSION.portrait(noisy.astype(np.float32))
    assert copy_of(portrait, {"e": ADMISSION.portrait(honest["e"][0])}) == ""


# Outliers


@pytest.mark.parametrize("spoil", [permuted, noise, barely_trained])
@pytest.mark.parametrize("order", range(3))
def test_an_outlier_is_put_away_before_the_bank_is_decided(
    run: Any, honest: dict[str, Weights], spoil: Spoil, order: int
) -> None:
    study, sites = run({"c": spoil(honest["c"])}, order=order)
    ((row, cause),) = causes(study).items()
    assert row == f"fit_expert/c/{CANCERS['c']}/0"
    assert "robust standard deviations from the bank" in cause or "times as far" in cause
    assert CANCERS["c"] not in study.bank()
    assert len(study.bank()) == len(CANCERS) - 1
    assert all(CANCERS["c"] not in request.sources for request in sites.sent)


def test_fewer_than_five_are_not_compared(honest: dict[str, Weights]) -> None:
    portraits = {site: ADMISSION.portrait(honest[site][0]) for site in "abc"}
    portraits["d"] = ADMISSION.portrait(permuted(honest["d"])[0])
    assert outliers(portraits) == {}
    portraits["e"] = ADMISSION.portrait(honest["e"][0])
    assert set(outliers(portraits)) == {"d"}


def test_of_sites_that_share_a_cancer_the_outlier_is_not_averaged(
    run: Any, honest: dict[str, Weights]
) -> None:
    study, _ = run(holdings=SHARED)
    study.store.close()
    # All others came before; then the spoilt one of the two that share.
    folder = study.store.folder.parent / "shared"
    study = Study(folder, STUDY, SHARED)
    sites = Sites({**honest, "h": barely_trained(honest["h"])}, SHARED)
    for task in study.due():
        study.record(task, sites.answer(task, study.request(task)))
    rows = sorted(study.due(), key=lambda task: task.site == "h")
    for task in rows:
        study.record(task, sites.answer(task, study.request(task)))
    assert list(causes(study)) == [task_of("h").id]
    assert study.averaged("fit_expert", CANCERS["a"], 0) == ["a"]
    assert task_of("h", 1).id not in {task.id for task in study.store.tasks()}


# What becomes of it


def test_a_model_in_quarantine_is_kept_and_shown(run: Any, honest: dict[str, Weights]) -> None:
    study, _ = run({"c": scaled(10)(honest["c"])})
    (cause,) = causes(study).values()
    found = results(study)
    assert {"row": task_of("c").id, "cause": cause} in found["failed"]
    (kept,) = (study.store.folder / "quarantine").iterdir()
    with np.load(kept) as stored:
        np.testing.assert_array_equal(stored["weights"], 10 * honest["c"][:1].reshape(-1))
    assert not (study.store.folder / "replies" / kept.name).exists()


def test_a_study_that_was_killed_decides_the_same(
    tmp_path: Path, honest: dict[str, Weights]
) -> None:
    spoilt = {"b": scaled(10)(honest["b"]), "c": barely_trained(honest["c"]), "f": honest["d"]}
    sites = Sites({**honest, **spoilt}, HOLDINGS)
    study = Study(tmp_path / "whole", STUDY, HOLDINGS)
    sites.run(study, order=1)
    whole = causes(study)
    assert len(whole) == 3
    for _ in range(40):
        study = Study(tmp_path / "killed", STUDY, HOLDINGS)
        sites.run(study, order=1, stop_after=1)
        study.store.close()
    study = Study(tmp_path / "killed", STUDY, HOLDINGS)
    # Another order of replies decides which of two equals is the copy, and nothing else.
    ignored = {task_of("d").id, task_of("f").id}
    killed = causes(study)
    assert {k: v for k, v in whole.items() if k not in ignored} == {
        k: v for k, v in killed.items() if k not in ignored
    }
    assert len(killed) == 3


def test_retry_asks_again_and_judges_again(run: Any, honest: dict[str, Weights]) -> None:
    study, sites = run({"c": barely_trained(honest["c"]), "d": scaled(10)(honest["d"])})
    before = causes(study)
    assert len(before) == 2
    assert len(study.store.retry()) == 2
    sites.run(study)
    assert causes(study).keys() == {task_of("d").id}  # c: too late for the bank
    assert study.late() == [f"c ({CANCERS['c']})"]
    study.store.retry()
    sites.experts["d"] = honest["d"]
    sites.run(study)
    assert causes(study) == {}
    assert CANCERS["d"] not in study.bank()


def test_the_coordinator_may_admit_that_very_model_and_no_other(
    run: Any, honest: dict[str, Weights]
) -> None:
    study, sites = run({"d": scaled(10)(honest["d"])})
    (task,) = study.store.admit("d", CANCERS["d"])
    assert task.id == task_of("d").id
    sites.experts["d"] = scaled(11)(honest["d"])
    sites.run(study)
    assert causes(study)  # another model than was admitted
    study.store.retry()
    sites.experts["d"] = scaled(10)(honest["d"])
    sites.run(study)
    assert causes(study) == {}
    assert study.store.admit("a", CANCERS["a"]) == []


def test_admit_is_a_command(tmp_path: Path, honest: dict[str, Weights]) -> None:
    save_settings(Settings(name="rare", host="localhost:9443"), tmp_path)
    store = Store(tmp_path)
    task, sites = task_of("c"), Sites(honest, HOLDINGS)
    request = ExpertRequest(task=task.id, study=STUDY, cancer=CANCERS["c"])
    reply = sites.answer(task, request)
    store.add([task])
    store.quarantine(task, "quarantined: for a test", reply)
    command = ["admit", str(tmp_path), "--site", "c", "--cancer"]
    other = CliRunner().invoke(app, [*command, CANCERS["d"]])
    assert "lies in quarantine" in other.output
    again = CliRunner().invoke(app, [*command, CANCERS["c"]])
    assert f"again: {task.id}" in again.output
    assert store.state(task) == "due"
    store.close()


# Routers


def router(factor: float = 1.0, *, experts: int = 3, models: int = 1) -> Weights:
    module = Roupkt.initial(
        STUDY.shape, experts=experts, models=models, seed=1, config=STUDY.router
    )
    weights: Weights = flatten(module).numpy() * np.float32(factor)
    return weights


def scores_of(task: Task, request: Message, score: float | None = 0.6) -> TransferReply:
    """Return a site's answer to `score_sources`; of a private one, without any score."""
    assert isinstance(request, TransferRequest)
    told = (Score(c_index=score),) * len(request.sources)
    return TransferReply(
        task=task.id,
        cancer=request.cancer,
        scores=(SourceScore(c_index=score),) * len(request.sources),
        training_scores=(told,) * STUDY.folds,
        seconds=0.0,
    )


def test_routers_are_held_against_form_and_size() -> None:
    routers = router(models=1 + STUDY.folds)
    assert ADMISSION.router_form(routers, sources=2) == ""
    assert parameter_count(Abmil(STUDY.shape)) != routers.shape[1]
    assert ADMISSION.router_form(router(), sources=2)
    assert ADMISSION.router_form(routers, sources=3)
    assert ADMISSION.router_form(routers * np.float32(np.inf), sources=2)
    for factor, good in ((1.0, True), (-1.0, True), (1e4, False)):
        said = ADMISSION.router(router(factor), patients=PATIENTS, sent=(None,))
        assert (said == "") == good
    large = np.full((1, 3), 1e4, dtype=np.float32)  # what it was sent, it may hold
    assert ADMISSION.router(router(1e3), patients=PATIENTS, sent=(large, None)) == ""


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (scaled(np.nan), "its routers hold values that are not finite"),
        (lambda rows: rows[:, 1:], "its routers have shape (4, {}), expected (4, {})"),
        (lambda rows: rows[:1], "its routers have shape (1, {1}), expected (4, {1})"),
        (scaled(1e4), "a weight of a router lies"),
    ],
)
def test_a_bad_router_fails_its_row(run: Any, spoil: Spoil, said: str) -> None:
    """Of two sites that share a cancer, only the other one's routers are averaged."""
    study, _ = run(holdings=SHARED)
    shared = CANCERS["a"]
    for task in study.due():
        if task.cancer == shared:
            study.record(task, scores_of(task, study.request(task)))
    bad, good = sorted(
        (task for task in study.due() if task.kind == "fit_router"), key=lambda task: task.site
    )
    assert (bad.site, good.site) == ("a", "h")
    for task, change in ((bad, spoil), (good, scaled(1))):
        request = study.request(task)
        assert isinstance(request, RouterRequest)
        assert request.shared
        sound = router(experts=1 + len(request.sources), models=1 + STUDY.folds)
        values: dict[str, Any] = {"cancer": shared, "events": EVENTS, "seconds": 1.0}
        study.record(task, RouterReply(task=task.id, weights=change(sound), **values))
    ((row, cause),) = causes(study).items()
    assert row == bad.id
    assert cause.startswith("quarantined: " + said.format(sound.shape[1] - 1, sound.shape[1]))
    assert study.averaged("fit_router", shared, 0) == ["h"]


def test_private_sites_tell_no_scores_and_keep_their_routers(run: Any) -> None:
    study, _ = run()
    task = next(task for task in study.due() if task.kind == "score_sources")
    cancer, scores = task.cancer, scores_of(task, study.request(task), None)
    study.record(task, scores)
    routing = next(task for task in study.due() if task.kind == "fit_router")
    request = study.request(routing)
    assert isinstance(request, RouterRequest)
    assert len(request.sources) == len(scores.scores)  # nothing tells them apart: all may be used
    kept = RouterReply(task=routing.id, cancer=cancer, events=10, weights=None, seconds=0.0)
    assert "no routers to average" in study._quarantine._form(kept, replace(request, shared=True))
    told = replace(kept, weights=router())
    assert "routers that nobody averages" in study._quarantine._form(told, request)
    study.record(routing, kept)
    assert any(task.kind == "evaluate" and task.cancer == cancer for task in study.due())
    assert results(study)["targets"][cancer].get("best_source") is None
