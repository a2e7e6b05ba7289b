"""Three hospitals over TLS get what the simulation gets, whatever happens to the coordinator."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cropkt.cancers import Cancer

SITES = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM, "kidney-clinic": Cancer.KIPAN}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed", "coordinator killed"])
def test_three_hospitals_get_what_the_simulation_gets(federation: Any, kill: bool) -> None:
    for seed, (site, cancer) in enumerate(SITES.items()):
        federation.add_site(site, cancer, seed=seed)
    expected = federation.simulated(SITES)
    federation.init(min_sites=3)
    invites = {site: federation.invite(site, cancer) for site, cancer in SITES.items()}
    coordinator = federation.start()
    for site, invite in invites.items():
        federation.enrol(site, invite)
    clients = [federation.serve(site, cancer) for site, cancer in SITES.items()]
    if kill:
        federation.until(
            lambda: any(t.kind == "fit_expert" and t.state == "done" for t in federation.tasks())
        )
        coordinator.kill()
        coordinator.wait()
        coordinator = federation.start()
    assert coordinator.wait(400) == 0, federation.logs()
    for client in clients:
        assert client.wait(100) == 0, federation.logs()

    found = federation.results()
    assert found["failed"] == []
    assert not federation.differences(found, expected)
    told = json.loads(federation.run("server", "status", str(federation.study), "--json"))
    assert told["state"] == "finished"
    assert {site["site"]: site["done"] for site in told["sites"]} == dict.fromkeys(SITES, 5)
    federation.run("server", "start", str(federation.study), "--linger", "0")  # over: says so again
