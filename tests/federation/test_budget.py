"""A private hospital that loses the record of its privacy budget: the study goes on without it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cropkt.cancers import Cancer
from cropkt_client.budget import FOLDER, NAME
from cropkt_client.ledger import Ledger, public_key
from cropkt_server.store import Task

EYE = "eye-clinic"
OTHERS = {"skin-clinic": Cancer.SKCM, "kidney-clinic": Cancer.KIPAN}
SITES = {EYE: Cancer.UVM, **OTHERS}
INCOMPLETE = 3  # exit code of a study that finished, but not with everything


@pytest.mark.timeout(900)
def test_a_study_goes_on_without_a_hospital_that_lost_its_budget(federation: Any) -> None:
    for seed, (site, cancer) in enumerate(SITES.items()):
        private = {"privacy": {"epsilon": 8.0, "delta": 1e-5}} if site == EYE else {}
        federation.add_site(site, cancer, seed=seed, **private)
    federation.init(min_sites=3)
    coordinator, clients = federation.serve_all(SITES, "--linger", "0")

    def of_eye(kind: str) -> Task | None:
        return next((t for t in federation.tasks() if t.kind == kind and t.site == EYE), None)

    federation.until(lambda: (task := of_eye("fit_expert")) and task.state == "done")
    clients[EYE].kill()
    clients[EYE].wait()
    state = federation.state(EYE)
    left = len(Ledger(state).rows())
    (federation.site(EYE).parent / FOLDER / NAME).unlink()
    clients[EYE] = federation.serve(EYE, SITES[EYE])
    assert coordinator.wait(400) == INCOMPLETE, federation.logs()

    log = (federation.folder / f"{EYE}.log").read_text()
    assert "1 payments were made, and 0 are here: what was spent is not known" in log
    rows = Ledger(state).rows()
    assert Ledger(state).problems(public_key(state)) == []
    assert {row.message for row in rows[left:]} == {"failure budget"}, rows

    failed = {task.id: task.cause for task in federation.tasks() if task.state == "failed"}
    assert failed
    for row, cause in failed.items():
        assert EYE in row or Cancer.UVM in row
        assert "privacy budget is used up, or its record is lost" in cause
    told = json.loads(
        federation.run("server", "status", str(federation.study), "--json", code=INCOMPLETE)
    )
    assert (told["state"], told["missing"], set(told["failed"])) == ("incomplete", {}, set(failed))
    found = federation.results()
    for cancer in OTHERS.values():
        arms = found["targets"][cancer]["arms"]
        assert set(arms) >= {"local", "zero_shot", "roupkt", "auto"}
        assert found["transfer"][cancer][Cancer.UVM]["c_index"] is not None
