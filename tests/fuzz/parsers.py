"""Everything that reads bytes of the other side, with valid input to begin from."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

import cropkt
from cropkt import published
from cropkt.bundle import bundle_hash
from cropkt.cancers import Cancer
from cropkt.config import ExpertShape, StudyConfig
from cropkt.errors import ArtifactError, CropktError, MessageError
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.artifact import Artifact, load_artifact, m0_hash
from cropkt.experts.card import Card, models_of, public_text, sign, training_hash, verified
from cropkt.invite import PREFIX, Invite, decode_invite, encode_invite
from cropkt.knock import Knock
from cropkt.messages import REPLIES, REQUESTS, ExpertReply, Score, load, pack, save, unpack
from cropkt.wire import from_record
from cropkt_client.link import Accepted, Answer, Coordinator, Hello, Known, check_versions, skew
from cropkt_server.dispatch import _unreadable
from cropkt_server.enrolment import Enrolment, pem_of
from cropkt_server.pki import Keys, make_keys
from cropkt_server.roster import EnrolmentRefusedError, Roster

EVERY = REQUESTS + REPLIES
STUDY = StudyConfig(shape=ExpertShape(dim=3, embed=4, attention=2, bins=2))
INVITE = Invite(host="hub.example.org:9443", ca="0f" * 32, token="A" * 43, site="a", study="rare")
FLAT = np.arange(6, dtype=np.float32)
Draw = Any  # of conftest


@dataclass(frozen=True)
class Parser:
    """Something that reads a stranger's bytes."""

    read: Callable[[bytes], object]
    refusal: type[Exception] | tuple[type[Exception], ...]  # the only thing that it may raise
    valid: Callable[[Draw], bytes]
    tree: Callable[[Draw], Any] | None = None  # the same as a JSON tree, if it is one
    wrapped: Callable[[bytes], bytes] = bytes  # what a sender makes of that tree's text

    def __call__(self, content: bytes) -> bool:
        """Read, and return whether the content was taken.

        Raises:
            AssertionError: a refusal that nobody could show.
        """
        try:
            self.read(content)
        except self.refusal as refusal:
            shown = str(refusal)
            assert len(shown.encode()) < 1_000, shown[:200]  # and no lone surrogate
            return False
        return True


def parsers(folder: Path) -> dict[str, Parser]:
    """Return all parsers; those of files use `folder`."""
    key = ed25519.Ed25519PrivateKey.generate()
    weights = flatten(Abmil.initial(STUDY.shape, seed=0)).numpy()
    card = Card(
        cancer=Cancer.UVM,
        site="a",
        round=0,
        patients=80,
        events=20,
        endpoint=STUDY.endpoint,
        encoder="UNI2-h",
        shape=STUDY.shape,
        models=models_of(weights, [()]),
        m0=m0_hash(STUDY),
        study=STUDY.hash(),
        training=training_hash(STUDY),
        created="2026-03-01",
        signer=public_text(key),
    )
    text, signature = sign(card, key)
    expert = Artifact.signed(card, weights, key).save(folder).read_bytes()
    reply = ExpertReply(
        task="t",
        cancer=Cancer.UVM,
        patients=80,
        events=20,
        weights=weights,
        score=Score(),
        seconds=1,
    )
    save(reply, folder / "message.npz")
    kept = (folder / "message.npz").read_bytes()
    found = {
        "message": Parser(_message, MessageError, _message_text, _message_tree),
        "array": Parser(_array, MessageError, lambda _: _npy(FLAT)),
        "record": Parser(
            _record, MessageError, lambda _: json.dumps(_in_parts()).encode(), lambda _: _in_parts()
        ),
        "unreadable": Parser(_text_of_reply, (), _message_text, _message_tree),
        "file": Parser(
            _in_file(folder, lambda path: load(path, expected=EVERY)), MessageError, lambda _: kept
        ),
        "invite": Parser(
            lambda content: decode_invite(content.decode("latin-1")),
            MessageError,
            lambda _: encode_invite(INVITE).encode(),
            lambda _: asdict(INVITE),
            _as_invite,
        ),
        "card": Parser(
            lambda content: verified(content.decode("latin-1"), signature),
            ArtifactError,
            lambda _: text.encode(),
            lambda _: json.loads(text),
        ),
        "expert": Parser(
            _in_file(folder, lambda path: load_artifact(path, trusted=lambda _: True)),
            ArtifactError,
            lambda _: expert,
        ),
        "checkpoint": Parser(
            _in_file(folder, published.load_expert), ArtifactError, lambda _: _checkpoint()
        ),
    }
    return found | _of_enrolment(folder) | _of_link()


def _message(content: bytes) -> None:
    """Read a message with arrays as it declares them, if they are small."""
    text = content.decode("utf-8", "surrogateescape")
    arrays = {}
    try:
        shapes = json.loads(text)["shapes"].items()
        arrays = {name: np.ones(rows * width, np.float32) for name, (rows, width) in shapes}
    except Exception:  # whatever the spoilt text makes impossible
        arrays = dict.fromkeys(("weights", "own"), FLAT)
    read = unpack(text, arrays, expected=EVERY)
    again = pack(read)
    assert pack(unpack(*again, expected=EVERY))[0] == again[0]


def _message_tree(draw: Draw) -> Any:
    return draw.message(draw.rng.choice(EVERY))


def _message_text(draw: Draw) -> bytes:
    return json.dumps(_message_tree(draw)).encode()


def _text_of_reply(content: bytes) -> None:
    said = _unreadable(
        RecordDict({"message": ConfigRecord({"json": content.decode("utf-8", "surrogateescape")})})
    )
    assert len(said) < 100


def _reply() -> str:
    """Return the text of a message with six weights."""
    text, _ = pack(
        ExpertReply(
            task="t",
            cancer=Cancer.UVM,
            patients=80,
            events=20,
            weights=FLAT.reshape(2, 3),
            score=Score(),
            seconds=1,
        )
    )
    return text


def _in_parts() -> dict[str, Any]:
    return {"json": _reply(), "parts": {"weights.00000": 3, "weights.00001": 3}}


def _record(content: bytes) -> None:
    """Read a record whose arrays are named and sized as a stranger likes."""
    try:
        tree = json.loads(content)
        text = str(tree["json"])
        parts = {
            str(name): Array(np.ones(min(abs(int(size)), 64), np.float32))
            for name, size in tree["parts"].items()
        }
    except Exception:
        raise MessageError("record", "no sender could make it") from None
    record = {"message": ConfigRecord({"json": text}), "weights": ArrayRecord(parts)}
    from_record(RecordDict(record), expected=EVERY)


def _array(content: bytes) -> None:
    array = Array(dtype="float32", shape=(6,), stype="numpy.ndarray", data=content)
    arrays = ArrayRecord({"weights": array})
    record = {"message": ConfigRecord({"json": _reply()}), "weights": arrays}
    from_record(RecordDict(record), expected=EVERY)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _in_file(folder: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    path = folder / "stranger.bin"

    def written_and_read(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    return written_and_read


def _as_invite(text: bytes) -> bytes:
    body = base64.urlsafe_b64encode(text).decode().rstrip("=")
    check = hashlib.sha256(f"{PREFIX}{body}".encode()).hexdigest()[:8]
    return f"{PREFIX}{body}.{check}".encode()


def _checkpoint() -> bytes:
    names = published._ATTENTION
    parameters = dict(Abmil.initial(STUDY.shape, seed=0).named_parameters())
    tensors = {name: parameters[mine].detach()[0].clone() for name, mine in names.items()}
    tensors["attention_net.attention_c.weight"] = parameters["score"].detach().clone()
    stream = io.BytesIO()
    torch.save({"model": tensors, "epoch": 3}, stream)
    return stream.getvalue()


class Nodes:
    """Takes any node."""

    def register(self, node_key: str, name: str) -> int:
        """Return an id."""
        return 1

    def deregister(self, node_id: int) -> None:
        """Do nothing."""


def _of_enrolment(folder: Path) -> dict[str, Parser]:
    keys = Keys.of(folder)
    make_keys(keys, ["localhost"], study="rare")
    door = Enrolment(study="rare", host="localhost:9443", keys=keys, roster=Roster(folder))
    token = door.invite("a", [Cancer.UVM], time.time() + 1e6).token
    node = ec.generate_private_key(ec.SECP384R1()).public_key()
    body = {
        "token": token,
        "site": "a",
        "node_key": node.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
        "signing_key": base64.b64encode(bytes(32)).decode(),
        "cropkt": cropkt.__version__,
        "protocol": 1,
        "flwr": version("flwr"),
    }
    blob = base64.b64decode(body["node_key"].split()[1])

    def with_key(content: bytes) -> bytes:
        spoilt = f"ecdsa-sha2-nistp384 {base64.b64encode(content).decode()}"
        return json.dumps({**body, "node_key": spoilt}).encode()

    def read(content: bytes) -> None:
        door.accept(content, Nodes())

    signing = ed25519.Ed25519PrivateKey.generate()
    other = ec.generate_private_key(ec.SECP384R1()).public_key()
    shown = other.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    door.roster.enrol(
        token=door.invite("b", [Cancer.UVM], time.time() + 1e6).token,
        site="b",
        node_key=pem_of(shown),
        signing_key=base64.b64encode(signing.public_key().public_bytes_raw()).decode(),
        register=lambda key, name: 2,
    )

    def knock() -> dict[str, Any]:
        made = Knock(study="rare", site="b", node_key=shown, at=time.time())
        return asdict(made.signed(signing))

    return {
        "knock": Parser(
            door.known,
            EnrolmentRefusedError,
            lambda _: json.dumps(knock()).encode(),
            lambda _: knock(),
        ),
        "enrolment": Parser(
            read, EnrolmentRefusedError, lambda _: json.dumps(body).encode(), lambda _: body
        ),
        "node key": Parser(
            lambda content: read(with_key(content)), EnrolmentRefusedError, lambda _: blob
        ),
    }


def _of_link() -> dict[str, Parser]:
    hub = Coordinator("hub.example.org:9443", None)
    hello = {
        "study": "rare",
        "cropkt": cropkt.__version__,
        "protocol": 1,
        "flwr": version("flwr"),
        "bundle": bundle_hash(),
        "time": 1.8e9,
        "closed": False,
        "revoked": ["0a" * 32],
    }
    accepted = {
        "study": "rare",
        "site": "a",
        "cancers": ["UVM"],
        "coordinator_key": "A" * 43 + "=",
        "bundle": bundle_hash(),
    }
    known = {"site": "a", "cancers": ["UVM"], "config": asdict(STUDY)}
    refusal = {"code": "version", "message": "The coordinator runs cropkt 2."}

    class Offered(Coordinator):
        content = b""

        def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
            return Answer(self.content, None, None)

    def pinned(content: bytes) -> None:
        Offered.content = content
        Offered.pinned(INVITE)

    def read_hello(content: bytes) -> None:
        told = hub._understood(Hello, content)
        check_versions(told)
        assert abs(skew(told)) < 1e300

    def read_refusal(content: bytes) -> None:
        for status in (400, 403, 404, 429, 500):
            refused = hub._refusal(status, content)
            assert isinstance(refused, CropktError)
            assert len(str(refused).encode()) < 1_000

    ours = (CropktError,)
    certificate = base64.b64encode(bytes(200)).decode()
    pem = f"-----BEGIN CERTIFICATE-----\n{certificate}\n-----END CERTIFICATE-----\n".encode()
    return {
        "certificate": Parser(pinned, ours, lambda _: pem),
        "hello": Parser(read_hello, ours, lambda _: json.dumps(hello).encode(), lambda _: hello),
        "known": Parser(
            lambda content: hub._understood(Known, content),
            ours,
            lambda _: json.dumps(known).encode(),
            lambda _: known,
        ),
        "accepted": Parser(
            lambda content: hub._understood(Accepted, content),
            ours,
            lambda _: json.dumps(accepted).encode(),
            lambda _: accepted,
        ),
        "refusal": Parser(
            read_refusal, (), lambda _: json.dumps(refusal).encode(), lambda _: refusal
        ),
    }
