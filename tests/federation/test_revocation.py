"""What is taken back in the middle of a study: an expert, which nobody uses again, or a site."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cropkt.cancers import Cancer
from cropkt.errors import RevokedExpertError
from cropkt.messages import ReleaseRequest
from cropkt_client import tasks
from cropkt_client.ledger import Ledger
from cropkt_client.log import read_status
from cropkt_client.site import Site
from cropkt_client.trust import revoked

SITES = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM, "kidney-clinic": Cancer.KIPAN}
EYE, SKIN, KIDNEY = SITES
FINAL = f"evaluate/{EYE}/UVM/0"


def sources(federation: Any, site: str) -> set[str]:
    """Return the cancers whose experts a hospital keeps, to route among them."""
    kept: Path = federation.state(site) / SITES[site] / "sources.npz"
    with np.load(kept, allow_pickle=False) as found:
        return set(map(str, found["names"]))


@pytest.mark.timeout(900)
def test_a_revoked_expert_is_named_where_it_was_used_and_used_no_more(
    federation: Any, tmp_path: Path
) -> None:
    for seed, (site, cancer) in enumerate(SITES.items()):
        federation.add_site(site, cancer, seed=seed)
    federation.init(min_sites=3)
    invites = {site: federation.invite(site, cancer) for site, cancer in SITES.items()}
    coordinator = federation.start()
    go = tmp_path / "go"
    clients = {}
    for site, invite in invites.items():
        federation.enrol(site, invite)
        env = federation.waiting("release", go) if site == EYE else None
        clients[site] = federation.serve(site, SITES[site], env=env)

    def states() -> dict[str, str]:
        return {t.id: t.state for t in federation.tasks() if t.kind == "evaluate"}

    others = [f"evaluate/{site}/{SITES[site]}/0" for site in (SKIN, KIDNEY)]
    federation.until(
        lambda: states().get(FINAL) == "sent" and all(states().get(t) == "done" for t in others),
        seconds=400,
    )

    def experts() -> dict[str, Any]:
        told = federation.run("server", "experts", str(federation.study), "--json")
        return {expert["cancer"]: expert for expert in json.loads(told)}

    expert = experts()["SKCM"]
    used = sorted(f"{s} ({SITES[s]})" for s in SITES if "SKCM" in sources(federation, s))
    assert used == ["eye-clinic (UVM)", "kidney-clinic (KIPAN)"]
    command = ("revoke", str(federation.study), "--expert", expert["hash"][:16])
    lines = federation.run("server", *command).splitlines()
    assert lines[0] == f"revoked {expert['hash'][:16]} SKCM of skin-clinic"
    assert sorted(lines[1:]) == [f"used by the router of {name}" for name in used]

    federation.until(  # each learns of it, at work or not
        lambda: all(expert["hash"] in revoked(federation.state(site)) for site in SITES)
    )
    go.touch()
    assert coordinator.wait(400) == 0, federation.logs()
    for client in clients.values():
        assert client.wait(100) == 0, federation.logs()

    # The hospital that was at work refused what it had kept, and learnt a router without it.
    rows = [row for row in Ledger(federation.state(EYE)).rows() if row.task == FINAL]
    assert [row.message for row in rows] == ["failure refused", "evaluate.release"]
    assert "the coordinator revoked it" in (federation.folder / f"{EYE}.log").read_text()
    assert sources(federation, EYE) == {"KIPAN"}
    found = federation.results()
    assert set(found["targets"]["UVM"]["routing"]) == {"self", "KIPAN"}
    # The one that was done is named, not asked again; what it kept is of no more use to it.
    assert "SKCM" in found["targets"]["KIPAN"]["routing"]
    request = ReleaseRequest(task="again", study=federation.config, cancer=Cancer.KIPAN)
    with pytest.raises(RevokedExpertError, match="the coordinator revoked it"):
        tasks.release(request, Site.load(federation.site(KIDNEY)))
    assert (experts()["SKCM"]["revoked"], experts()["SKCM"]["used_by"]) == (True, [used[1]])
    assert "REVOKED" in federation.run("server", "experts", str(federation.study))


@pytest.mark.timeout(300)
def test_a_revoked_site_stops_training_and_ends_with_77(federation: Any) -> None:
    training = replace(federation.config.training, minimum_updates=100_000)  # minutes
    federation.configure(training=training)
    sites = {site: SITES[site] for site in (EYE, SKIN)}
    for seed, (site, cancer) in enumerate(sites.items()):
        federation.add_site(site, cancer, seed=seed)
    federation.init(min_sites=2)
    coordinator, clients = federation.serve_all(sites)

    kept = [federation.state(site) / cancer / "training.npz" for site, cancer in sites.items()]
    federation.until(lambda: all(checkpoint.exists() for checkpoint in kept))
    children = psutil.Process(clients[EYE].pid).children(recursive=True)
    assert any("cropkt_client.worker" in str(child.cmdline()) for child in children)
    federation.run("server", "revoke", str(federation.study), "--site", EYE)
    assert clients[EYE].wait(60) == 77, federation.logs()  # minutes before the training's end
    assert not any(child.is_running() for child in children)
    told = (federation.folder / f"{EYE}.log").read_text().splitlines()[-1]
    assert told.startswith("cropkt-client: ")
    assert "cut this site off" in told
    assert not list((federation.study / "replies").glob(f"fit_expert~{EYE}~*"))

    assert federation.serve(EYE, SITES[EYE]).wait(60) == 77, federation.logs()  # nor ever again
    assert coordinator.poll() is None
    assert clients[SKIN].poll() is None
    state = read_status(federation.state(SKIN))
    assert state is not None
    assert state.task == "train.expert"
