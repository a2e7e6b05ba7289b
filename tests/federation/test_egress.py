"""The ledgers of all hospitals account for every byte that reached the coordinator."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.app import Message as FlowerMessage
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, node_pb2, run_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_body
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import verify_signature
from google.protobuf.message import Message as Proto

from cropkt.cancers import Cancer
from cropkt.config import ExpertShape, RouterConfig, TrainingConfig
from cropkt.messages import REPLIES
from cropkt.wire import from_record, payload, to_record
from cropkt_client.ledger import Ledger, Row, fingerprint, public_key
from cropkt_server.pki import Keys

pytestmark = pytest.mark.timeout(600)
SITES = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM}
TAPPED = Path(__file__).with_name("tapped.py")
KEEP = """
import base64, json, runpy, sys
from pathlib import Path
from cropkt_server.public import PublicDoor

answer, file = PublicDoor.__call__, Path(sys.argv[2]) / "calls.jsonl"

async def kept(self, scope, receive, send):
    body, told = bytearray(), bytearray()

    async def listening():
        event = await receive()
        body.extend(event.get("body", b""))
        return event

    async def telling(event):
        told.extend(event.get("body", b""))
        await send(event)

    await answer(self, scope, listening, telling)
    call = {
        "method": scope["method"],
        "path": (scope["raw_path"] + scope["query_string"]).decode("latin-1"),
        "headers": [[n.decode("latin-1"), v.decode("latin-1")] for n, v in scope["headers"]],
        "body": base64.b64encode(body).decode(),
        "told": base64.b64encode(told).decode(),
    }
    with file.open("a") as lines:
        lines.write(json.dumps(call) + "\\n")

PublicDoor.__call__ = kept
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""

HELLO = "/v1/cropkt/hello"
FLEET = {
    fleet_pb2: ("activate-node", "deactivate-node", "pull-messages", "push-messages"),
    message_pb2: ("push-object", "pull-object", "confirm-message-received"),
    heartbeat_pb2: ("send-node-heartbeat",),
    run_pb2: ("get-run",),
    fab_pb2: ("get-fab",),
}
CALLS: dict[str, tuple[Any, Any]] = {
    f"/v1/fleet/{call}": tuple(
        getattr(module, call.title().replace("-", "") + end) for end in ("Request", "Response")
    )
    for module, calls in FLEET.items()
    for call in calls
}
"""All that a hospital asks of Flower, as what Flower reads it, and what it answers."""
REPEATED = {HELLO, "/v1/fleet/pull-messages", "/v1/fleet/send-node-heartbeat"}
HEADERS = {
    *("host", "accept", "accept-encoding", "connection", "user-agent", "content-type"),
    *("flwr-package-name", "flwr-package-version", "flwr-component-name", "flwr-public-key"),
}
OWN = {"ttl", "created_at", "clientapp_runtime_list"}  # the numbers that Flower adds to a message

TRIES = 10  # of one call; a piece is asked for again until it is there
CONNECTION = 3_000  # bytes of a handshake and a farewell
TLS = 1.005, 250  # of the bytes; for the lines, records and small packets of a request


@dataclass(frozen=True)
class Call:
    """One request as it came through TLS, and the body of its answer."""

    method: str
    path: str  # with the query, if there is one
    headers: dict[str, str]
    body: bytes
    told: bytes

    @property
    def size(self) -> int:
        """Bytes of headers and body."""
        return len(self.body) + sum(len(n) + len(v) + 4 for n, v in self.headers.items())

    @property
    def asked(self) -> Any:
        """The body as Flower reads it, in which nothing else can hide."""
        read = CALLS[self.path][0].FromString(self.body)
        read.DiscardUnknownFields()
        assert read.SerializeToString(deterministic=True) == self.body, self.path
        return read

    @property
    def answer(self) -> Any:
        """What the coordinator said."""
        return CALLS[self.path][1].FromString(self.told)


def calls(file: Path) -> list[Call]:
    """Return what was noted."""
    found = []
    for values in lines(file):
        headers = dict(values["headers"])
        assert len(headers) == len(values["headers"]), values["headers"]
        body, told = (base64.b64decode(values[name]) for name in ("body", "told"))
        found.append(Call(values["method"], values["path"], headers, body, told))
    return found


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def leaves(message: Proto) -> Iterator[tuple[str, Any]]:
    """Yield name and value of all that a protobuf message holds."""
    for field, value in message.ListFields():
        one = isinstance(value, Proto | str | bytes | int | float)
        for each in [value] if one else value:
            if isinstance(each, Proto):
                yield from leaves(each)
            else:
                yield field.name, each


def check_heads(found: list[Call], keys: int) -> None:
    """Find in every request's headers who asks and when, signed, and the same text as ever."""
    same = set[tuple[str, str]]()
    for call in found:
        values = dict(call.headers)
        assert int(values.pop("content-length", "0")) == len(call.body)
        if call.path != HELLO:
            at, pem = values.pop("flwr-timestamp"), base64.b64decode(values["flwr-public-key"])
            signer, signature = load_pem_public_key(pem), values.pop("flwr-signature")
            assert isinstance(signer, EllipticCurvePublicKey)
            assert datetime.fromisoformat(at).isoformat() == at
            assert verify_signature(signer, at.encode(), base64.b64decode(signature))
        assert set(values) <= HEADERS, values
        same |= set(values.items())
    names = Counter(name for name, _ in same)
    assert names.pop("flwr-public-key") == keys
    assert max(names.values()) <= 2, names  # Flower's client and the hospital's
    assert max(len(value) for _, value in same) < 400


def answered(found: list[Call]) -> list[FlowerMessage]:
    """Return the messages that were pushed, each put together of its pieces."""
    pieces = dict[str, bytes]()
    for call in found:
        if call.path == "/v1/fleet/pull-object":
            pieces[call.asked.object_id] = call.answer.object_content
        elif call.path == "/v1/fleet/push-object":
            assert hashlib.sha256(call.asked.object_content).hexdigest() == call.asked.object_id
            pieces[call.asked.object_id] = call.asked.object_content
    trees = {
        tree.object_id
        for call in found
        if call.path == "/v1/fleet/push-messages"
        for tree in call.asked.message_object_trees
    }
    messages = [inflate_object_from_contents(one, dict(pieces)) for one in sorted(trees)]
    assert all(isinstance(message, FlowerMessage) for message in messages)
    return messages  # type: ignore[return-value]


def unsaid(found: list[Call], messages: list[FlowerMessage]) -> list[tuple[str, Any]]:
    """Return what of the bodies neither the coordinator said nor a ledger has.

    A body repeats numbers and names that the coordinator gave out, or holds pieces of messages
    that can be made again, bit for bit, from the recorded payload alone.
    """
    flower = [call for call in found if call.path != HELLO]
    known = {value for call in flower for _, value in leaves(call.answer)}
    known |= {base64.b64decode(call.headers["flwr-public-key"]) for call in flower}
    known.add(HEARTBEAT_DEFAULT_INTERVAL)
    left = list[tuple[str, Any]]()
    for message in messages:
        again = to_record(from_record(message.content, expected=REPLIES))
        made = get_all_nested_objects(again)
        assert again.object_id == message.content.object_id
        known |= {message.object_id, message.deflate(), *made}
        known |= {made[name].deflate() for name in made}
        around = message_pb2.Message.FromString(get_object_body(message.deflate(), FlowerMessage))
        left += [leaf for leaf in leaves(around) if leaf[1] not in known]
    return left + [leaf for call in flower for leaf in leaves(call.asked) if leaf[1] not in known]


def test_what_the_coordinator_did_not_say_is_found() -> None:
    """In a call's fields, and beside them."""
    path = "/v1/fleet/pull-messages"
    told = fleet_pb2.PullMessagesResponse(
        messages_list=[message_pb2.Message(metadata=message_pb2.Metadata(message_id="0a"))]
    ).SerializeToString()

    def asking(request: Proto, more: bytes = b"") -> Call:
        body = request.SerializeToString(deterministic=True) + more
        return Call("POST", path, {"flwr-public-key": ""}, body, told)

    known = fleet_pb2.PullMessagesRequest(message_ids=["0a"])
    other = fleet_pb2.PullMessagesRequest(message_ids=["0a", "a patient"])
    node = fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=815))
    assert unsaid([asking(known)], []) == []
    assert unsaid([asking(other)], []) == [("message_ids", "a patient")]
    assert unsaid([asking(node)], []) == [("node_id", 815)]
    hidden = b"\x7a\x09a patient"  # a field 15, which no message of Flower's has
    for more in (hidden, b"\x12\x02\x30\x61\x0a\x00"):
        with pytest.raises(AssertionError, match="pull-messages"):
            unsaid([asking(known, more)], [])


def begin(federation: Any, relay: Any, tap: Path, sites: dict[str, Cancer]) -> Any:
    """Start a tapped coordinator behind the relay, and enrol everybody."""
    federation.host = relay.host
    federation.init(min_sites=len(sites), port=relay.target)
    invites = {site: federation.invite(site, cancer) for site, cancer in sites.items()}
    with (federation.folder / "server.log").open("a") as log:
        command = [sys.executable, "-c", KEEP, str(TAPPED), str(tap), "start"]
        process = subprocess.Popen(
            [*command, str(federation.study)], stdout=log, stderr=log, text=True
        )
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
    enrolled, at_enrolment = relay.up, len(calls(tap / "calls.jsonl"))
    connections, began = len(relay.opened), time.monotonic()
    clients = [federation.serve(site, cancer) for site, cancer in SITES.items()]
    assert coordinator.wait(300) == 0, federation.logs()
    for client in clients:
        assert client.wait(100) == 0, federation.logs()
    sent, seconds = relay.up - enrolled, time.monotonic() - began
    connections = len(relay.opened) - connections

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

    # What arrived in plaintext is those payloads, and what the coordinator itself had said.
    found = calls(tap / "calls.jsonl")[at_enrolment:]
    assert {(call.method, call.path) for call in found} == {
        ("GET", HELLO),
        *(("POST", path) for path in CALLS),
    }
    assert not any(call.body for call in found if call.path == HELLO)
    check_heads(found, keys=len(SITES))
    messages = answered(found)
    recorded = sum(row.bytes for row in rows)
    measured = [payload(message) for message in messages]
    assert Counter((each.bytes, each.sha256) for each in measured) == received
    left = unsaid(found, messages)
    assert {name for name, _ in left} <= OWN
    assert all(isinstance(value, float) for _, value in left)
    assert len(left) <= 2 * len(OWN) * len(messages)

    # How often it was called: so often in a while, or once for each thing.
    often = [call for call in found if call.path in REPEATED]
    assert len(often) <= len(SITES) * (10 + seconds)
    once = Counter((call.path, call.body) for call in found if call.path not in REPEATED)
    assert max(once.values()) <= TRIES, once.most_common(1)

    # What crossed the network is that, under TLS.
    plain = sum(call.size for call in found)
    around = TLS[0] * plain + TLS[1] * len(found) + CONNECTION * connections
    sys.stderr.write(
        f"\nledgers {recorded:,} bytes in {len(rows)} messages; {len(found)} calls, {len(often)} "
        f"of them repeated, in {seconds:.0f} s over {connections} connections; {len(left)} numbers "
        f"of Flower's own; plaintext {plain:,} bytes, network {sent:,}, at most {around:,.0f}\n"
    )
    assert plain < sent <= around
