"""The ledgers of all hospitals account for every byte that reached the coordinator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cropkt.cancers import Cancer
from cropkt.config import ExpertShape, RouterConfig, TrainingConfig
from cropkt_client.ledger import Ledger, Row, fingerprint, public_key
from cropkt_server.pki import Keys

pytestmark = pytest.mark.timeout(600)
SITES = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM}
TAPPED = Path(__file__).with_name("tapped.py")

HEAD = 1_000  # bytes of one request's line and headers
CALL = 4_000  # bytes of the body of a call that carries no payload: ids, a message's metadata
OBJECT = 1_000  # bytes around one piece of a payload: its name, type and Flower's signature
TLS = 1.02, 64_000  # of the bytes, and for handshakes and the closing of connections


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def begin(federation: Any, relay: Any, tap: Path, sites: dict[str, Cancer]) -> Any:
    """Start a tapped coordinator behind the relay, and enrol everybody."""
    federation.host = relay.host
    federation.init(min_sites=len(sites), port=relay.target)
    invites = {site: federation.invite(site, cancer) for site, cancer in sites.items()}
    with (federation.folder / "server.log").open("a") as log:
        command = [sys.executable, str(TAPPED), str(tap), "start", str(federation.study)]
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
    federation.processes.append(process)
    for site, invite in invites.items():
        federation.enrol(site, invite)
    return process


def test_the_ledgers_account_for_every_byte(federation: Any, relay: Any, tmp_path: Path) -> None:
    federation.configure(
        shape=ExpertShape(dim=6, embed=256, attention=128),
        training=TrainingConfig(epochs=2),
        router=RouterConfig(epochs=1),
    )
    for seed, (site, cancer) in enumerate(SITES.items()):
        federation.add_site(site, cancer, seed=seed)
    tap = tmp_path / "tap"
    coordinator = begin(federation, relay, tap, SITES)
    enrolled, at_enrolment = relay.up, len(lines(tap / "requests.jsonl"))
    clients = [federation.serve(site, cancer) for site, cancer in SITES.items()]
    assert coordinator.wait(300) == 0, federation.logs()
    for client in clients:
        assert client.wait(100) == 0, federation.logs()
    sent = relay.up - enrolled

    # Each message that the coordinator's app received has its row, and each row its message.
    rows: list[Row] = []
    for site in SITES:
        state = federation.state(site)
        ledger = Ledger(state)
        assert ledger.problems(public_key(state)) == []
        federation.run("client", "ledger", "verify", "--config", str(federation.site(site)))
        rows += ledger.rows()
    received = Counter((each["bytes"], each["sha256"]) for each in lines(tap / "answers.jsonl"))
    assert received == Counter((row.bytes, row.sha256) for row in rows)
    assert Counter(row.message for row in rows) == {
        kind: len(SITES)
        for kind in (
            *("query.describe", "train.expert", "evaluate.transfer"),
            *("train.router", "evaluate.release"),
        )
    }
    key = Keys.of(federation.study).signing_public_bytes()
    assert {(row.study, row.recipient) for row in rows} == {("eye", fingerprint(key))}

    # What arrived in plaintext is those payloads, each piece in an envelope, and small calls.
    requests = lines(tap / "requests.jsonl")[at_enrolment:]
    recorded = sum(row.bytes for row in rows)
    pieces = [each["body"] for each in requests if each["path"].endswith("/push-object")]
    others = [each["body"] for each in requests if not each["path"].endswith("/push-object")]
    assert recorded <= sum(pieces) <= recorded + OBJECT * len(pieces)
    assert max(others) <= CALL
    assert max(each["head"] for each in requests) <= HEAD

    # What crossed the network is that, under TLS.
    plain = sum(each["head"] + each["body"] for each in requests)
    assert plain < sent <= TLS[0] * plain + TLS[1] + 200 * len(requests)
    around = sent - recorded
    sys.stderr.write(
        f"\nledgers {recorded:,} bytes in {len(rows)} messages; pieces {sum(pieces):,} bytes in "
        f"{len(pieces)}, so {(sum(pieces) - recorded) / len(pieces):.0f} around each; "
        f"{len(others)} other calls of at most {max(others)} bytes, heads of at most "
        f"{max(each['head'] for each in requests)}; network {sent:,} bytes, {around:,} "
        f"({around / sent:.1%}) of them protocol and TLS\n"
    )
