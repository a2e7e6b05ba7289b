"""A hospital where somebody approves each answer, through kills of both sides while they wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cropkt.cancers import Cancer
from cropkt_client.ledger import Ledger, public_key

pytestmark = pytest.mark.timeout(1200)
SITES = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM}
EYE = "eye-clinic"
TAPPED = Path(__file__).with_name("tapped.py")


def start(federation: Any, tap: Path) -> subprocess.Popen[str]:
    """Start a coordinator that asks every two seconds for what is held."""
    command = [sys.executable, str(TAPPED), str(tap), "start", str(federation.study)]
    with (federation.folder / "server.log").open("a") as log:
        environment = {**os.environ, "HELD": "2"}
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
    federation.processes.append(process)
    return process


def released(federation: Any, *arguments: str) -> str:
    config = str(federation.site(EYE))
    said: str = federation.run("client", "--config", config, "release", *arguments)
    return said


def test_held_answers_survive_both_sides_and_leave_when_approved(
    federation: Any, tmp_path: Path
) -> None:
    for seed, (site, cancer) in enumerate(SITES.items()):
        federation.add_site(site, cancer, seed=seed)
    expected = federation.simulated(SITES)
    path = federation.site(EYE)
    path.write_text(path.read_text().replace("approval: auto", "approval: human"))
    federation.init(min_sites=2)
    invites = {site: federation.invite(site, cancer) for site, cancer in SITES.items()}
    coordinator = start(federation, tmp_path / "tap")
    for site, invite in invites.items():
        federation.enrol(site, invite)
    clients = {site: federation.serve(site, cancer) for site, cancer in SITES.items()}

    def held() -> set[str]:
        return {task.id for task in federation.tasks() if task.state == "held"}

    federation.until(lambda: f"describe/{EYE}" in held())
    assert "UVM: counts: about 50 patients" in released(
        federation, "show", json.loads(released(federation, "list", "--json"))[0]["id"]
    )
    for process in (coordinator, clients[EYE]):
        process.kill()
        process.wait()
    coordinator = start(federation, tmp_path / "tap")
    clients[EYE] = federation.serve(EYE, SITES[EYE])
    federation.until(lambda: json.loads(released(federation, "list", "--json")))
    assert held() == {f"describe/{EYE}"}

    def over() -> bool:
        if released(federation, "list") != "nothing waits for approval\n":
            released(federation, "approve", "--all", "--by", "Dr A")
        return coordinator.poll() is not None

    federation.until(over, seconds=400)
    assert coordinator.returncode == 0, federation.logs()
    found = federation.results()
    assert found["failed"] == []
    assert not federation.differences(found, expected)
    state = federation.state(EYE)
    assert Ledger(state).problems(public_key(state)) == []
    rows = Ledger(state).rows()
    answers = [row for row in rows if not row.message.startswith("failure")]
    assert {row.approved.partition(" (")[2] for row in answers} == {"Dr A)"}
    assert len({row.task for row in answers}) == 5
    waiting = [row for row in rows if row.message == "failure awaiting_approval"]
    assert len(rows) == len(answers) + len(waiting)
