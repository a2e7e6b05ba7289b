"""Three hospitals over TLS get what the simulation gets, whatever happens to the coordinator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cropkt.cancers import Cancer
from cropkt_sim import clinical
from cropkt_sim.sites import prepare

UVM, SKCM, KIPAN, BLCA = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN, Cancer.BLCA
TABLE = Path(__file__).parents[3] / "shared" / "data" / "tcga_cdr.csv"


def take_part(federation: Any, held: Mapping[str, tuple[Cancer, ...]], *, kill: bool) -> None:
    """Let the hospitals take part in a study, and compare it with the simulation's."""
    expected = federation.simulated(held)
    federation.init(min_sites=len(held))
    invites = {site: federation.invite(site, *cancers) for site, cancers in held.items()}
    coordinator = federation.start()
    for site, invite in invites.items():
        federation.enrol(site, invite)
    clients = [federation.serve(site, *cancers) for site, cancers in held.items()]
    if kill:
        federation.until(
            lambda: any(t.kind == "fit_expert" and t.state == "done" for t in federation.tasks())
        )
        coordinator.kill()
        coordinator.wait()
        coordinator = federation.start()
    assert coordinator.wait(600) == 0, federation.logs()
    for client in clients:
        assert client.wait(100) == 0, federation.logs()

    found = federation.results()
    assert found["failed"] == []
    assert set(found["targets"]) == {cancer for cancers in held.values() for cancer in cancers}
    assert not federation.differences(found, expected)
    told = json.loads(federation.run("server", "status", str(federation.study), "--json"))
    assert told["state"] == "finished"
    rows = {site: 1 + 4 * len(cancers) for site, cancers in held.items()}
    assert {site["site"]: site["done"] for site in told["sites"]} == rows
    federation.run("server", "start", str(federation.study), "--linger", "0")  # over: says so again


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed", "coordinator killed"])
def test_three_hospitals_get_what_the_simulation_gets(federation: Any, kill: bool) -> None:
    held = {"eye-clinic": (UVM,), "skin-clinic": (SKCM,), "south": (KIPAN, BLCA)}
    for seed, (site, cancers) in enumerate(held.items()):
        federation.add_site(site, *cancers, seed=seed)
    take_part(federation, held, kill=kill)


@pytest.mark.timeout(900)
@pytest.mark.skipif(not TABLE.exists(), reason="needs the outcomes of real patients")
def test_three_hospitals_with_real_patients_get_what_the_simulation_gets(federation: Any) -> None:
    ready = prepare(
        data="clinical",
        folder=federation.folder / "clinical",
        cancers=(UVM, SKCM, KIPAN),
        seed=0,
        outcomes=TABLE,
        features=(),
        endpoint="DSS",
        by="cancers",
        on_bad="skip",
    )
    for number, name in enumerate(ready.names):
        path = federation.site(name)
        shutil.copytree(ready.folder / str(number), path.parent)
        path.write_text(f"{path.read_text()}encoder: {federation.config.encoder}\n")
    federation.configure(shape=replace(federation.config.shape, dim=clinical.DIM))
    held = {name: (cancer,) for name, cancer in zip(ready.names, ready.cancers, strict=True)}
    take_part(federation, held, kill=False)
