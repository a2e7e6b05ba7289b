"""Hospitals that come late, never come, or are cut off: the study goes on, and says so."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cropkt.cancers import Cancer
from cropkt.messages import REPLIES, ExpertReply, load
from cropkt_client.log import read_status
from cropkt_server.findings import Findings

INCOMPLETE = 3  # exit code of a study that finished, but not with everything
PATIENTS = 72  # a third of them, which models without two folds learn from, are enough to leave
REFUSED = 77  # exit code of a client whose site was revoked


def _slow(federation: Any, updates: int) -> None:
    """Let a training take long enough for something to happen meanwhile."""
    config = federation.config
    federation.configure(
        training=replace(config.training, minimum_updates=updates),
        router=replace(config.router, minimum_updates=updates),
    )


def _states(federation: Any, kind: str) -> dict[str, str]:
    return {task.id: task.state for task in federation.tasks() if task.kind == kind}


@pytest.mark.timeout(900)
def test_two_of_one_cancer_one_that_never_came_and_one_too_late(federation: Any) -> None:
    sites = {"north": Cancer.UVM, "south": Cancer.UVM, "skin": Cancer.SKCM}
    for seed, (site, cancer) in enumerate({**sites, "late": Cancer.KIPAN}.items()):
        federation.add_site(site, cancer, seed=seed, patients=PATIENTS)
    _slow(federation, 300)
    federation.configure(rounds=2)
    deadline = datetime.now(UTC) + timedelta(seconds=60)
    federation.init(min_sites=3, deadline=deadline.isoformat())
    federation.invite("never", Cancer.BLCA)
    coordinator, _ = federation.serve_all(sites, "--linger", "0")
    federation.until(lambda: "done" in _states(federation, "score_sources").values(), seconds=400)
    assert datetime.now(UTC) > deadline  # never was waited for until then
    federation.enrol("late", federation.invite("late", Cancer.KIPAN))
    federation.serve("late", Cancer.KIPAN)
    assert coordinator.wait(400) == INCOMPLETE, federation.logs()

    log = (federation.folder / "server.log").read_text()
    assert "describe/never (missing: invited, but did not enrol)" in log
    assert "Too late for the other targets, which were not scored again: late (KIPAN)." in log
    told = json.loads(
        federation.run("server", "status", str(federation.study), "--json", code=INCOMPLETE)
    )
    assert told["state"] == "incomplete"
    assert told["missing"] == {"never": "invited, but did not enrol"}
    assert told["failed"] == {}
    done = {site["site"]: (site["state"], site["done"], site["waiting"]) for site in told["sites"]}
    assert done == {
        "late": ("enrolled", 5, 0),
        "never": ("invited", 0, 0),
        "north": ("enrolled", 7, 0),  # two rounds of experts, and two of routers
        "skin": ("enrolled", 5, 0),
        "south": ("enrolled", 7, 0),
    }
    found = federation.results()
    assert [row["row"] for row in found["failed"]] == ["describe/never"]
    assert set(found["targets"]["KIPAN"]["arms"]) >= {"local", "zero_shot", "roupkt"}
    assert set(found["targets"]["KIPAN"]["routing"]) == {"self", "SKCM", "UVM"}
    assert set(found["transfer"]["UVM"]) == {"UVM", "SKCM"}  # the bank had no KIPAN
    assert set(found["transfer"]["SKCM"]) == {"UVM", "SKCM"}
    assert found["targets"]["UVM"]["sites"] == 2
    for site in ("north", "south"):
        first, last = (_gave(federation, site, number).weights for number in (0, 1))
        assert not np.array_equal(first, last)
    _end_with_the_average_by_events(federation, "north", "south", number=1)


def _gave(federation: Any, site: str, number: int) -> ExpertReply:
    """Return the expert of UVM that a hospital gave in a round."""
    path = federation.study / "replies" / f"fit_expert~{site}~UVM~{number}.npz"
    reply = load(path, expected=REPLIES)
    assert isinstance(reply, ExpertReply)
    return reply


def _end_with_the_average_by_events(federation: Any, *sites: str, number: int) -> None:
    """The hospitals end with one expert: what they gave in the last round, by their events."""
    replies = [_gave(federation, site, number) for site in sites]
    total = sum(reply.events for reply in replies)
    average = sum(reply.events / total * reply.weights.astype(np.float64) for reply in replies)
    for site in sites:
        with np.load(federation.state(site) / "UVM" / "experts.npz") as kept:
            np.testing.assert_allclose(kept["weights"], average, rtol=0, atol=1e-6)


@pytest.mark.timeout(900)
def test_a_second_hospital_of_a_cancer_that_comes_late_joins_the_next_round(
    federation: Any, tmp_path: Path
) -> None:
    sites = {"north": Cancer.UVM, "south": Cancer.UVM, "skin": Cancer.SKCM}
    for seed, (site, cancer) in enumerate(sites.items()):
        federation.add_site(site, cancer, seed=seed, patients=90 if site == "south" else PATIENTS)
    federation.configure(rounds=3)
    deadline = datetime.now(UTC) + timedelta(seconds=5)
    federation.init(min_sites=2, deadline=deadline.isoformat())
    invites = {site: federation.invite(site, cancer) for site, cancer in sites.items()}
    coordinator = federation.start("--linger", "0")
    go = tmp_path / "go"  # until it is there, north waits in its second round
    for site in ("north", "skin"):
        federation.enrol(site, invites[site])
        env = federation.waiting("fit_expert", go, number=1) if site == "north" else None
        federation.serve(site, sites[site], env=env)
    federation.until(lambda: _states(federation, "fit_expert").get("fit_expert/north/UVM/1"))
    federation.enrol("south", invites["south"])
    federation.serve("south", Cancer.UVM)
    federation.until(lambda: _states(federation, "describe").get("describe/south") == "done")
    go.touch()
    assert coordinator.wait(400) == 0, federation.logs()

    findings = Findings(federation.study, federation.config, read_only=True)
    experts = [findings.averaged("fit_expert", Cancer.UVM, number) for number in range(3)]
    routers = [findings.averaged("fit_router", Cancer.UVM, number) for number in range(3)]
    late = findings.late()
    findings.store.close()
    assert experts == [["north"], ["north"], ["north", "south"]]
    assert routers == [["north", "south"]] * 3
    assert late == []  # the bank has what south gave
    assert _gave(federation, "north", 2).events != _gave(federation, "south", 2).events
    _end_with_the_average_by_events(federation, "north", "south", number=2)
    told = json.loads(federation.run("server", "status", str(federation.study), "--json"))
    assert (told["state"], told["failed"], told["missing"]) == ("finished", {}, {})
    assert {site["site"]: site["done"] for site in told["sites"]} == {
        "north": 9,  # three rounds of experts, and three of routers
        "skin": 5,
        "south": 7,  # one of experts, three of routers
    }
    found = federation.results()
    assert found["failed"] == []
    assert found["targets"]["UVM"]["sites"] == 2


@pytest.mark.timeout(900)
def test_a_site_revoked_in_mid_task_costs_its_own_rows_only(federation: Any) -> None:
    sites = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM, "kidney-clinic": Cancer.KIPAN}
    for seed, (site, cancer) in enumerate(sites.items()):
        federation.add_site(site, cancer, seed=seed)
    _slow(federation, 500)
    federation.init(min_sites=3)
    coordinator, clients = federation.serve_all(sites, "--linger", "0")
    row = "fit_expert/kidney-clinic/KIPAN/0"
    state = federation.state("kidney-clinic")
    federation.until(lambda: (told := read_status(state)) and told.task == "train.expert")
    assert _states(federation, "fit_expert")[row] == "sent"
    federation.run("server", "revoke", str(federation.study), "--site", "kidney-clinic")
    federation.until(lambda: _states(federation, "fit_expert")[row] == "failed", seconds=10)
    running = json.loads(
        federation.run("server", "status", str(federation.study), "--json", code=3)
    )
    assert running["failed"] == {row: "revoked"}
    assert clients["kidney-clinic"].wait(60) == REFUSED, federation.logs()

    assert coordinator.wait(400) == INCOMPLETE, federation.logs()
    assert f"1 rows failed or are missing: {row} (revoked)" in federation.logs()
    told = json.loads(
        federation.run("server", "status", str(federation.study), "--json", code=INCOMPLETE)
    )
    assert told["state"] == "incomplete"
    assert told["failed"] == {row: "revoked"}
    assert told["missing"] == {}
    seen = {site["site"]: (site["state"], site["online"], site["done"]) for site in told["sites"]}
    assert seen == {
        "eye-clinic": ("enrolled", False, 5),
        "kidney-clinic": ("revoked", False, 1),
        "skin-clinic": ("enrolled", False, 5),
    }
    found = federation.results()
    assert found["failed"] == [{"row": row, "cause": "revoked"}]
    assert set(found["transfer"]) == {"UVM", "SKCM"}
    assert not list((federation.study / "replies").glob("fit_expert~kidney-clinic~*"))
