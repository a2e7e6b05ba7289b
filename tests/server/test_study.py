"""The study's state machine, driven by hand-made replies instead of sites."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.errors import ConfigError
from cropkt.messages import (
    ArmScore,
    CohortCount,
    DescribeReply,
    ExpertReply,
    ExpertRequest,
    Failure,
    FedAvgReply,
    FedAvgRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    Score,
    SourceScore,
    TransferReply,
    TransferRequest,
)
from cropkt_server.results import results
from cropkt_server.store import Task, read_tasks
from cropkt_server.study import MAX_TRIES, Study

pytestmark = pytest.mark.usefixtures("all_admitted", "all_signed")

UVM, SKCM, KIPAN = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN
HOLDINGS = {"a": [UVM], "b": [SKCM], "c": [KIPAN, SKCM]}
EVENTS = {("a", UVM): 20, ("b", SKCM): 30, ("c", KIPAN): 50, ("c", SKCM): 10}
CONFIG = StudyConfig(folds=3, rounds=2)


def answer(task: Task, request: Message) -> Message:
    """Answer as a site would, with weights that tell who made them."""
    if task.cancer is None:
        cohorts = [
            CohortCount(cancer=c, patients=100, events=EVENTS[task.site, c], dim=8)
            for c in HOLDINGS[task.site]
        ]
        return DescribeReply(task=task.id, site=task.site, cohorts=tuple(cohorts))
    events = EVENTS[task.site, task.cancer]
    if isinstance(request, ExpertRequest):
        models = 7 if request.shared else 1
        start = 0.0 if request.weights is None else float(request.weights[0, 0])
        return ExpertReply(
            task=task.id,
            cancer=task.cancer,
            patients=100,
            events=events,
            weights=np.full((models, 4), start + events, dtype=np.float32),
            score=Score(c_index=0.6, se=0.05),
            seconds=1.0,
        )
    if isinstance(request, TransferRequest):
        row = tuple(Score(c_index=0.5 + 0.01 * i, se=0.02) for i in range(len(request.sources)))
        return TransferReply(
            task=task.id,
            cancer=task.cancer,
            scores=tuple(
                SourceScore(c_index=s.c_index, se=s.se, lead=0.03, lead_se=0.02) for s in row
            ),
            training_scores=(row,) * 3,
            seconds=1.0,
        )
    if isinstance(request, RouterRequest):
        return RouterReply(
            task=task.id,
            cancer=task.cancer,
            events=events,
            weights=np.full((4, 5), events, dtype=np.float32) if request.shared else None,
            seconds=1.0,
        )
    if isinstance(request, FedAvgRequest):
        start = 0.0 if request.weights is None else float(request.weights[0, 0])
        return FedAvgReply(
            task=task.id,
            cancer=task.cancer,
            patients=100,
            events=events,
            weights=np.full((4, 4), start + events, dtype=np.float32),
            seconds=1.0,
        )
    assert isinstance(request, ReleaseRequest)
    return ReleaseReply(
        task=task.id,
        cancer=task.cancer,
        patients=100,
        events=events,
        arms={
            "local": ArmScore(c_index=0.6, se=0.05, low=0.5, high=0.7, pairs=100),
            "roupkt": ArmScore(
                c_index=0.7,
                se=0.05,
                low=0.6,
                high=0.8,
                pairs=300,
                gain=0.1,
                gain_se=0.02,
                gain_low=0.06,
                gain_high=0.14,
            ),
        },
        routing={task.cancer: 0.5, KIPAN if task.cancer != KIPAN else UVM: 0.5},
        zero_shot_choice={"vote": 3},
        seconds=1.0,
    )


def run(study: Study, *, stop_after: int = 1_000) -> int:
    """Answer what is due until nothing is, or `stop_after` answers."""
    answered = 0
    while answered < stop_after and (due := study.due()):
        study.record(due[0], answer(due[0], study.request(due[0])))
        answered += 1
    return answered


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path, CONFIG, HOLDINGS)


def test_goes_through_every_row(study: Study) -> None:
    run(study)
    assert study.finished
    assert not study.failures()
    rows = [task.id for task in study.store.tasks()]
    assert rows.count("fit_expert/c/SKCM/1") == 1  # a shared cancer has a second round
    assert "fit_expert/a/UVM/1" not in rows
    assert len([row for row in rows if row.startswith("evaluate/")]) == 4


def test_shared_experts_are_averaged_by_events(study: Study) -> None:
    run(study)
    request = study.request(Task(kind="score_sources", site="a", cancer=UVM))
    assert isinstance(request, TransferRequest)
    assert request.sources == (KIPAN, SKCM)
    first = (30 * 30 + 10 * 10) / 40  # what round 0 made of SKCM's two sites
    second = first + (30 * 30 + 10 * 10) / 40
    assert request.weights[:, 0] == pytest.approx([50, second])


def test_the_second_round_starts_from_the_average_with_every_fold_model(study: Study) -> None:
    run(study)
    request = study.request(Task(kind="fit_expert", site="b", cancer=SKCM, round=1))
    assert isinstance(request, ExpertRequest)
    assert request.weights is not None
    assert request.weights.shape == (7, 4)
    assert request.weights[0, 0] == pytest.approx(25)
    router = study.request(Task(kind="fit_router", site="b", cancer=SKCM, round=1))
    assert isinstance(router, RouterRequest)
    assert router.own is not None
    assert router.own.shape == (7, 4)


def test_all_sites_train_one_model_together_where_the_study_asks_for_it(tmp_path: Path) -> None:
    study = Study(tmp_path, replace(CONFIG, fedavg_rounds=2), HOLDINGS)
    run(study)
    assert study.finished
    rows = [task.id for task in study.store.tasks() if task.kind == "fit_fedavg"]
    assert len(rows) == 8  # four of each round
    mean = (20 * 20 + 30 * 30 + 50 * 50 + 10 * 10) / 110
    second = study.request(Task(kind="fit_fedavg", site="a", cancer=UVM, round=1))
    assert isinstance(second, FedAvgRequest)
    assert second.weights is not None
    assert second.weights[:, 0] == pytest.approx([mean] * 4)
    last = study.request(Task(kind="evaluate", site="a", cancer=UVM))
    assert isinstance(last, ReleaseRequest)
    assert last.everyone is not None
    assert last.everyone[0, 0] == pytest.approx(2 * mean)


def test_a_site_that_cannot_take_part_in_one_model_costs_only_its_own_row(tmp_path: Path) -> None:
    study = Study(tmp_path, replace(CONFIG, fedavg_rounds=1), HOLDINGS)
    while due := study.due():
        task = due[0]
        if (task.kind, task.site) == ("fit_fedavg", "a"):
            study.record(task, Failure(task=task.id, code="policy", reference="ab12"))
        else:
            study.record(task, answer(task, study.request(task)))
    assert study.finished
    assert [task.id for task in study.failures()] == ["fit_fedavg/a/UVM/0"]
    last = study.request(Task(kind="evaluate", site="a", cancer=UVM))
    assert isinstance(last, ReleaseRequest)
    assert last.everyone is not None
    assert last.everyone[0, 0] == pytest.approx((30 * 30 + 50 * 50 + 10 * 10) / 90)


def test_a_failed_site_costs_only_its_own_rows(study: Study) -> None:
    while due := study.due():
        task = due[0]
        if task.kind == "fit_expert" and task.site == "a":
            study.record(task, Failure(task=task.id, code="training_failed", reference="ab12"))
        else:
            study.record(task, answer(task, study.request(task)))
    assert study.finished
    assert [task.id for task in study.failures()] == ["fit_expert/a/UVM/0"]
    assert study.bank() == (KIPAN, SKCM)
    found = results(study)
    assert found["failed"] == [
        {"row": "fit_expert/a/UVM/0", "cause": "training_failed (reference ab12)"}
    ]
    assert found["targets"]["UVM"]["arms"] == {}
    assert found["targets"]["KIPAN"]["arms"]["roupkt"]["c_index"] == pytest.approx(0.7)


@pytest.mark.parametrize("answers", range(1, 24, 3))
def test_goes_on_after_a_crash_at_any_row(tmp_path: Path, answers: int) -> None:
    whole = Study(tmp_path / "whole", CONFIG, HOLDINGS)
    total = run(whole)
    broken = Study(tmp_path / "broken", CONFIG, HOLDINGS)
    done = run(broken, stop_after=answers)
    for task in broken.due():
        broken.store.sent(task)  # under way when the process dies
    broken.store.close()
    again = Study(tmp_path / "broken", CONFIG, HOLDINGS)
    assert run(again) == total - done
    assert results(again) == results(whole)


def test_an_answer_to_another_task_is_refused(study: Study) -> None:
    task = study.due()[0]
    other = Task(kind="describe", site="b")
    study.record(task, answer(other, study.request(other)))
    (failed,) = study.failures()
    assert failed.id == task.id


def test_a_lost_message_is_due_again_until_it_is_hopeless(study: Study) -> None:
    for _ in range(MAX_TRIES):
        (task,) = [t for t in study.store.tasks() if t.id == "describe/a"]
        assert task.state == "due"
        study.store.sent(task)
        study.lost(task, "message lost")
    (task,) = [t for t in study.store.tasks() if t.id == "describe/a"]
    assert task.state == "failed"
    assert task.tries == MAX_TRIES


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Study(tmp_path, CONFIG, HOLDINGS).store.close()
    changed = replace(CONFIG, training=replace(CONFIG.training, alpha=0.25))
    with pytest.raises(ConfigError, match=r"training\.alpha was 0\.5 .* is 0\.25 now"):
        Study(tmp_path, changed, HOLDINGS)


def test_sites_of_a_cancer_are_joined_by_pairs(study: Study) -> None:
    run(study)
    found = results(study)
    skcm = found["targets"]["SKCM"]
    assert skcm["sites"] == 2
    assert skcm["arms"]["roupkt"]["pairs"] == 600
    assert skcm["arms"]["roupkt"]["se"] == pytest.approx(0.05 / np.sqrt(2))
    assert skcm["routing"] == pytest.approx({"self": 0.5, "KIPAN": 0.5})
    score = found["transfer"]["UVM"]["SKCM"]
    assert (score["c_index"], score["se"]) == pytest.approx((0.51, 0.02))
    assert (score["lead"], score["lead_se"]) == pytest.approx((0.03, 0.02))
    assert 0 < score["p_random"] <= score["p_random_bh"] <= score["p_random_holm"] <= 1


def test_the_table_can_be_read_while_the_study_runs(study: Study, tmp_path: Path) -> None:
    run(study, stop_after=2)
    assert [task.state for task in read_tasks(tmp_path)][:3] == ["done", "done", "due"]
    assert read_tasks(tmp_path / "nothing") == []
