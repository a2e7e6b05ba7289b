import base64
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import cropkt
from cropkt.bundle import bundle_hash
from cropkt.cancers import Cancer
from cropkt.config import StudyConfig, parse_study
from cropkt.invite import decode_invite, encode_invite
from cropkt.knock import VALID, Knock
from cropkt_client.enrol import Keys as SiteKeys
from cropkt_server.enrolment import Allowance, Enrolment
from cropkt_server.pki import Keys, make_keys
from cropkt_server.roster import EnrolmentRefusedError, Roster

COMPRESSED = (
    "ecdsa-sha2-nistp384 "
    + base64.b64encode(
        b"\0\0\0\x13ecdsa-sha2-nistp384\0\0\0\x08nistp384\0\0\0\x31\2" + b"x" * 48
    ).decode()
)
"""A key whose parser raises another error than all others."""


class Nodes:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.registered: list[str] = []
        self.cut_off: list[int] = []

    def register(self, node_key: str, name: str) -> int:
        self.registered.append(node_key)
        return 10 + len(self.registered)

    def deregister(self, node_id: int) -> None:
        self.cut_off.append(node_id)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    keys = Keys.of(tmp_path_factory.mktemp("study"))
    make_keys(keys, ["localhost"], study="rare")
    return keys


@pytest.fixture
def enrolment(keys: Keys, tmp_path: Path) -> Iterator[Enrolment]:
    roster = Roster(tmp_path)
    yield Enrolment(study="rare", host="localhost:9443", keys=keys, roster=roster)
    roster.close()


@pytest.fixture
def request_of(enrolment: Enrolment) -> dict[str, Any]:
    invite = enrolment.invite("A", [Cancer("UVM")], time.time() + 60)
    node = ec.generate_private_key(ec.SECP384R1()).public_key()
    signing = ed25519.Ed25519PrivateKey.generate().public_key()
    return {
        "token": invite.token,
        "site": "A",
        "node_key": node.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
        "signing_key": base64.b64encode(signing.public_bytes_raw()).decode(),
        "cropkt": cropkt.__version__,
        "protocol": 1,
        "flwr": version("flwr"),
    }


def refusal(enrolment: Enrolment, body: Any) -> EnrolmentRefusedError:
    nodes = Nodes()
    with pytest.raises(EnrolmentRefusedError) as caught:
        enrolment.accept(body if isinstance(body, bytes) else json.dumps(body).encode(), nodes)
    assert nodes.registered == []
    return caught.value


def test_an_invite_says_where_and_who(enrolment: Enrolment, keys: Keys) -> None:
    invite = enrolment.invite("A", [Cancer("UVM")], time.time() + 60)
    assert decode_invite(encode_invite(invite)) == invite
    assert (invite.host, invite.ca) == ("localhost:9443", keys.fingerprint())
    assert (invite.site, invite.study) == ("A", "rare")


def test_accepts_and_answers(enrolment: Enrolment, request_of: dict[str, Any], keys: Keys) -> None:
    nodes = Nodes()
    answer = enrolment.accept(json.dumps(request_of).encode(), nodes)
    assert answer == {
        "study": "rare",
        "site": "A",
        "cancers": ["UVM"],
        "coordinator_key": base64.b64encode(keys.signing_public_bytes()).decode(),
        "bundle": bundle_hash(),
    }
    (pem,) = nodes.registered
    assert pem.startswith("-----BEGIN PUBLIC KEY-----\n")
    assert enrolment.roster.site_of(11) == "A"


def test_new_keys_cut_the_old_node_off(enrolment: Enrolment, request_of: dict[str, Any]) -> None:
    nodes = Nodes()
    enrolment.accept(json.dumps(request_of).encode(), nodes)
    node = ec.generate_private_key(ec.SECP384R1()).public_key()
    request_of["node_key"] = node.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    request_of["token"] = enrolment.invite("A", [Cancer("UVM")], time.time() + 60).token
    enrolment.accept(json.dumps(request_of).encode(), nodes)
    assert nodes.cut_off == [11]


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"protocol": 2}, "version", "protocol 1 .* protocol 2"),
        ({"cropkt": "9.8.7"}, "version", "cropkt .*, the site cropkt 9.8.7"),
        ({"flwr": "1.7.0"}, "version", rf"flwr {version('flwr')}, the site flwr 1\.7\.0"),
        ({"token": "short"}, "altered", "token was altered"),
        ({"token": "x" * 43}, "unknown", "no such invite"),
        ({"site": "B"}, "site", "not for site B"),
        ({"site": "../B"}, "malformed", "site"),
        ({"node_key": "ssh-rsa AAAA"}, "malformed", "node key"),
        ({"node_key": "x" * 2001}, "malformed", "node_key"),
        ({"node_key": "ecdsa-sha2-nistp999 AAAA"}, "malformed", "node key"),
        ({"node_key": COMPRESSED}, "malformed", "node key"),
        ({"protocol": 10**4000}, "malformed", "protocol"),
        ({"signing_key": "A" * 43 + "="}, None, ""),
        ({"signing_key": "A" * 42 + "B="}, "malformed", "signing key"),
        ({"signing_key": "AAAA"}, "malformed", "signing_key"),
        ({"more": 1}, "malformed", "more"),
        ({"protocol": "1"}, "malformed", "protocol"),
    ],
)
def test_refusals_have_a_code_and_a_sentence(
    enrolment: Enrolment,
    request_of: dict[str, Any],
    change: dict[str, Any],
    code: str | None,
    says: str,
) -> None:
    if code is None:
        enrolment.accept(json.dumps(request_of | change).encode(), Nodes())
        return
    found = refusal(enrolment, request_of | change)
    assert found.code == code
    with pytest.raises(EnrolmentRefusedError, match=says):
        raise found
    assert request_of["token"] not in str(found)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP521R1()])
def test_refuses_other_curves(
    enrolment: Enrolment, request_of: dict[str, Any], curve: ec.EllipticCurve
) -> None:
    node = ec.generate_private_key(curve).public_key()
    request_of["node_key"] = node.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    assert refusal(enrolment, request_of).code == "malformed"


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"\xff", b"{" * 5000, b'{"token": 1}'])
def test_refuses_other_bodies(enrolment: Enrolment, body: bytes) -> None:
    assert refusal(enrolment, body).code == "malformed"


def test_an_allowance_is_by_key_and_time() -> None:
    now = [0.0]
    allowance = Allowance(2, 60.0, clock=lambda: now[0])
    assert [allowance.take("a") for _ in range(3)] == [True, True, False]
    assert allowance.take("b")
    now[0] = 61.0
    assert allowance.take("a")


@pytest.fixture
def site_keys(tmp_path: Path) -> SiteKeys:
    return SiteKeys.of(tmp_path / "site")


@pytest.fixture
def knock(enrolment: Enrolment, request_of: dict[str, Any], site_keys: SiteKeys) -> Knock:
    """Return the signed knock of a site that has enrolled."""
    request = {**request_of, **site_keys.public()}
    enrolment.accept(json.dumps(request).encode(), Nodes())
    made = Knock(study="rare", site="A", node_key=request["node_key"], at=time.time())
    return made.signed(site_keys.signing)


def body(knock: Knock) -> bytes:
    return json.dumps(asdict(knock)).encode()


def test_a_site_that_shows_its_keys_is_told_what_the_study_asks(
    enrolment: Enrolment, knock: Knock
) -> None:
    config = StudyConfig(folds=4, encoder="UNI2-h")
    told = json.loads(json.dumps(replace(enrolment, config=config).known(body(knock))))
    assert (told["site"], told["cancers"]) == ("A", ["UVM"])
    assert parse_study(told["config"], "answer") == config
    assert set(told) == {"site", "cancers", "config"}


def test_a_knock_that_is_not_the_sites_is_refused(
    enrolment: Enrolment, knock: Knock, site_keys: SiteKeys, tmp_path: Path
) -> None:
    other = SiteKeys.of(tmp_path / "other")
    later = replace(knock, at=knock.at + 2 * VALID).signed(site_keys.signing)
    for wrong, code in (
        (replace(knock, signature=""), "unknown"),
        (replace(knock, at=knock.at + 1), "unknown"),  # not what was signed
        (knock.signed(other.signing), "unknown"),
        (replace(knock, node_key=other.public()["node_key"]).signed(site_keys.signing), "unknown"),
        (replace(knock, site="B").signed(site_keys.signing), "unknown"),
        (replace(knock, study="other").signed(site_keys.signing), "unknown"),
        (replace(knock, node_key="ssh-rsa AAAA").signed(site_keys.signing), "malformed"),
        (later, "expired"),
    ):
        with pytest.raises(EnrolmentRefusedError) as refused:
            enrolment.known(body(wrong))
        assert refused.value.code == code, wrong
    for text in (b"", b"{}", b"[1]", body(knock)[:-2], b"\xff"):
        with pytest.raises(EnrolmentRefusedError, match="not as agreed"):
            enrolment.known(text)


def test_a_revoked_site_is_told_that_alone(enrolment: Enrolment, knock: Knock) -> None:
    enrolment.roster.revoke("A")
    with pytest.raises(EnrolmentRefusedError, match="cut this site off") as refused:
        enrolment.known(body(knock))
    assert refused.value.code == "revoked"
