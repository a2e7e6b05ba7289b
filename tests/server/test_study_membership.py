"""Sites that come late, stay away, or are cut off; the deadline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.messages import DescribeReply, ExpertRequest, Message, RouterRequest, TransferRequest
from cropkt_server.membership import Member, missing
from cropkt_server.results import results
from cropkt_server.runtime import _problem
from cropkt_server.store import Store, Task
from cropkt_server.study import Gathering, Study

pytestmark = pytest.mark.usefixtures("all_admitted", "all_signed")

UVM, SKCM, KIPAN = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN
CONFIG = StudyConfig(folds=3, rounds=2)
A, B, C, D = Member("a", (UVM,)), Member("b", (SKCM,)), Member("c", (KIPAN,)), Member("d", (UVM,))
DEADLINE = 1_000.0


def invited(member: Member) -> Member:
    return Member(member.name, member.cancers, "invited")


class Driver:
    """A deployed study, its clock, and what its sites were asked."""

    def __init__(self, folder: Path, sites: Any) -> None:
        self.folder, self.sites, self.now = folder, sites, 0.0
        self.asked: dict[str, Message] = {}
        self.study: Study

    def open(self, *members: Member, min_sites: int = 1, deadline: bool = False) -> Study:
        waits = Gathering(
            min_sites=min_sites, deadline=lambda began: began + DEADLINE if deadline else None
        )
        self.study = Study(self.folder, CONFIG, members, gathering=waits, clock=lambda: self.now)
        return self.study

    def answer(self, name: str) -> None:
        (task,) = [task for task in self.study.due() if task.id == name]
        self.asked[name] = self.study.request(task)
        self.study.record(task, self.sites.answer(task, self.asked[name]))

    def run(self, *, but: tuple[str, ...] = ()) -> None:
        """Answer what is due, except for the sites that are away."""
        while due := [task for task in self.study.due() if task.site not in but]:
            self.answer(due[0].id)

    def ids(self) -> set[str]:
        return {task.id for task in self.study.store.tasks()}


@pytest.fixture
def driver(tmp_path: Path, sites: Any) -> Driver:
    return Driver(tmp_path, sites)


def test_scoring_waits_for_whoever_is_invited_but_training_does_not(driver: Driver) -> None:
    study = driver.open(A, B, invited(C))
    driver.run()
    assert driver.ids() == {"describe/a", "describe/b", "fit_expert/a/UVM/0", "fit_expert/b/SKCM/0"}
    assert not study.finished
    study.add_sites([A, B, C])
    driver.run()
    assert study.finished
    assert study.bank() == (KIPAN, SKCM, UVM)
    assert results(study)["failed"] == []


def test_nobody_is_enough_for_nothing(driver: Driver) -> None:
    study = driver.open(A, B, min_sites=3)
    driver.run()
    assert not study.finished
    assert not any(name.startswith("score") for name in driver.ids())
    study.add_sites([A, B, C])
    driver.run()
    assert study.finished


def test_a_study_without_sites_is_not_finished(driver: Driver) -> None:
    assert not driver.open().finished


def test_after_the_deadline_it_goes_on_with_who_is_there(driver: Driver) -> None:
    study = driver.open(A, B, C, invited(D), deadline=True)
    driver.run(but=("c",))
    assert not study.finished
    driver.now = DEADLINE
    study.add_sites([A, B, C, invited(D)])
    driver.run(but=("c",))
    assert study.bank() == (SKCM, UVM)
    assert not study.finished  # c may only be slow
    assert study.finished_without({"c"})
    study.give_up({"c"})
    assert study.finished
    rows = {row["row"]: row.get("cause", "") for row in results(study)["failed"]}
    assert rows == {
        "describe/c": "missing: the site was away when the study finished",
        "describe/d": "missing: invited, but did not enrol",
    }


def test_the_deadline_waits_for_the_least_number_of_sites(driver: Driver) -> None:
    study = driver.open(A, B, invited(C), min_sites=3, deadline=True)
    driver.run()
    driver.now = DEADLINE
    study.add_sites([A, B, invited(C)])
    driver.run()
    assert not study.finished
    study.add_sites([A, B, C])
    driver.run()
    assert study.finished


def test_the_deadline_does_not_wait_for_an_expert_in_training(driver: Driver) -> None:
    study = driver.open(A, B, C, deadline=True)
    for name in ("describe/a", "describe/b", "describe/c", "fit_expert/a/UVM/0"):
        driver.answer(name)
    driver.answer("fit_expert/b/SKCM/0")
    study.store.sent(Task(kind="fit_expert", site="c", cancer=KIPAN))
    driver.now = DEADLINE
    study.add_sites([A, B, C])
    assert study.bank() == (SKCM, UVM)
    assert not study.finished_without(())
    study.store.due(Task(kind="fit_expert", site="c", cancer=KIPAN))
    driver.run()
    assert study.finished
    assert study.late() == ["c (KIPAN)"]


def test_a_late_site_uses_the_bank_and_does_not_change_it(driver: Driver) -> None:
    study = driver.open(A, B)
    driver.run()
    before = results(study)["targets"]["SKCM"]
    study.add_sites([A, B, C])
    driver.run()
    assert study.finished
    assert study.bank() == (SKCM, UVM)
    score = driver.asked["score_sources/c/KIPAN/0"]
    assert isinstance(score, TransferRequest)
    assert score.sources == (SKCM, UVM)
    assert "evaluate/c/KIPAN/0" in driver.ids()
    assert results(study)["targets"]["SKCM"] == before
    assert study.late() == ["c (KIPAN)"]


@pytest.mark.parametrize("answers", range(4, 9))
def test_a_late_site_of_a_shared_cancer_joins_the_next_round(driver: Driver, answers: int) -> None:
    """E, a third holder of UVM, comes at several moments; nothing asked before changes."""
    driver.sites.holdings["e"] = [UVM]
    study = driver.open(A, B, D)
    for _ in range(answers):
        driver.answer(study.due()[0].id)
    before = {name: study.request(task) for name, task in _done(study) if task.cancer}
    study.add_sites([A, B, D, Member("e", (UVM,))])
    driver.run()
    assert study.finished
    assert "evaluate/e/UVM/0" in driver.ids()
    second = driver.asked["fit_expert/e/UVM/1"]
    assert isinstance(second, ExpertRequest)
    assert second.weights is not None
    for name, request in before.items():
        task = next(task for row, task in _done(study) if row == name)
        again = study.request(task)
        for field in ("weights", "own", "routers"):
            one, other = getattr(request, field, None), getattr(again, field, None)
            np.testing.assert_equal(other, one)


def test_a_late_second_holder_of_an_unshared_cancer_stays_by_itself(driver: Driver) -> None:
    study = driver.open(A, B)
    driver.run()
    study.add_sites([A, B, D])
    driver.run()
    assert study.finished
    router = driver.asked["fit_router/d/UVM/0"]
    assert isinstance(router, RouterRequest)
    assert not router.shared
    assert study.late() == ["d (UVM)"]
    assert results(study)["targets"]["UVM"]["sites"] == 2


def test_a_revoked_site_fails_at_once_and_holds_nobody_up(driver: Driver) -> None:
    study = driver.open(A, B, C)
    driver.run(but=("c",))
    (task,) = study.due()
    study.store.sent(task)
    study.add_sites([A, B, Member("c", (KIPAN,), "revoked")])
    driver.run()
    assert study.finished
    assert [(t.id, t.cause) for t in study.failures()] == [("describe/c", "revoked")]
    study.record(task, DescribeReply(task=task.id, site="c", cohorts=()))  # too late
    assert [t.id for t in study.failures()] == ["describe/c"]
    study.add_sites([A, B, C])  # it was invited and enrolled again
    assert [t.id for t in study.due()] == ["describe/c"]


def revoked(member: Member) -> Member:
    return Member(member.name, member.cancers, "revoked")


@pytest.mark.parametrize("again", [revoked(A), invited(A)])
def test_a_site_revoked_between_two_rows_is_missing(driver: Driver, again: Member) -> None:
    study = driver.open(A, B, C)
    driver.run(but=("c",))
    assert not [task for task in study.due() if task.site == "a"]  # its expert is given
    study.add_sites([revoked(A), B, C])
    driver.run()
    assert study.finished
    assert study.failures() == []
    assert results(study)["targets"]["UVM"]["arms"] == {}
    row = {"row": "describe/a", "cause": "missing: revoked before it was finished"}
    assert results(study)["failed"] == [row]
    assert "1 rows failed or are missing: describe/a" in _problem(results(study), study.bank())
    assert missing([again], study.store.tasks()) == {"a": "revoked before it was finished"}


def test_a_site_revoked_when_one_of_its_cancers_is_finished_is_missing() -> None:
    rows = [Task(kind="describe", site="a", state="done")]
    rows += [Task(kind="fit_expert", site="a", cancer=c, state="done") for c in (UVM, SKCM)]
    rows += [Task(kind="evaluate", site="a", cancer=UVM, state="done")]
    assert set(missing([revoked(A)], rows)) == {"a"}
    rows += [Task(kind="evaluate", site="a", cancer=SKCM, state="done")]
    assert missing([revoked(A)], rows) == {}


def test_a_site_revoked_after_its_last_row_is_not_missing(driver: Driver) -> None:
    study = driver.open(A, B, C)
    driver.run()
    study.add_sites([revoked(A), B, C])
    assert study.finished
    assert results(study)["failed"] == []
    assert results(study)["targets"]["UVM"]["arms"]


def test_an_expired_invite_is_not_waited_for(driver: Driver) -> None:
    study = driver.open(A, B, invited(C))
    driver.run()
    study.add_sites([A, B, Member("c", (KIPAN,), "expired")])
    driver.run()
    assert study.finished
    assert study.missing() == {"c": "did not enrol before its invite expired"}


def test_a_cancer_without_invite_and_another_release_are_refused(driver: Driver) -> None:
    study = driver.open(Member("a", (SKCM,)), B)
    driver.answer("describe/a")
    task = next(task for task in study.due() if task.site == "b")
    study.record(
        task, DescribeReply(task=task.id, site="b", cohorts=(), versions={"cropkt": "9.9.0"})
    )
    causes = {task.id: task.cause for task in study.failures()}
    assert causes["describe/a"] == "it describes UVM, for which it was not invited"
    assert "the coordinator runs cropkt 0." in causes["describe/b"]
    assert "the site cropkt 9.9.0" in causes["describe/b"]


def test_failed_rows_can_be_tried_again_after_the_end(driver: Driver) -> None:
    study = driver.open(A, B, C, deadline=True)
    driver.run(but=("c",))
    driver.now = DEADLINE
    study.add_sites([A, B, C])
    driver.run(but=("c",))
    study.give_up({"c"})
    study.store.close()
    store = Store(driver.folder)
    assert [task.id for task in store.retry("c")] == ["describe/c"]
    store.close()
    study = driver.open(A, B, C, deadline=True)
    assert not study.finished_without({"c"})  # it was asked for by name
    driver.run()
    assert study.finished
    assert results(study)["failed"] == []


def test_it_goes_on_after_a_crash_with_late_sites(driver: Driver) -> None:
    study = driver.open(A, B, D, deadline=True)
    driver.run(but=("d",))
    driver.now = DEADLINE
    study.add_sites([A, B, D])
    driver.run()
    rows, found = driver.ids(), results(study)
    study.store.close()
    again = driver.open(A, B, D, deadline=True)
    assert again.finished
    assert driver.ids() == rows
    assert results(again) == found


def _done(study: Study) -> list[tuple[str, Task]]:
    return [(task.id, task) for task in study.store.tasks() if task.state == "done"]
