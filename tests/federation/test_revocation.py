"""An expert taken back in the middle of a study: who used it is named, and nobody uses it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cropkt.cancers import Cancer
from cropkt.errors import RevokedExpertError
from cropkt.messages import ReleaseRequest
from cropkt_client import tasks
from cropkt_client.ledger import Ledger
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
