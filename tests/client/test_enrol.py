"""Joining and serving, against a toy coordinator with real TLS of its own making."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

import cropkt
from cropkt.bundle import bundle_hash
from cropkt.errors import ConfigError, UnavailableError
from cropkt.invite import Invite, encode_invite
from cropkt.knock import Knock
from cropkt_client import serve, supernode
from cropkt_client.cli import app
from cropkt_client.enrol import Enrolment, Keys, join
from cropkt_client.link import Coordinator
from cropkt_client.log import LOG_NAME, read_status
from cropkt_client.settings import SiteConfig, read_settings

CLIENT = [sys.executable, "-c", "from cropkt_client.cli import main; main()"]
SERVE = ["--site", "lumc", "--cancer", "UVM"]
Key = ec.EllipticCurvePrivateKey


def _certificate(
    name: str, key: Key, issuer: tuple[str, Key] | None, *, host: str = "", days: int = 30
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    by, signer = issuer or (name, key)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(by))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=60))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(issuer is None, None), True)
    )
    if host:
        try:
            alias: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alias = x509.DNSName(host)
        builder = builder.add_extension(x509.SubjectAlternativeName([alias]), False)
    return builder.sign(signer, hashes.SHA256())


class Toy:
    """A coordinator in a thread: its own routes, and what it was told.

    While there are `standings`, answers to the next knocks, it bars the SuperNode.
    """

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", days: int = 30) -> None:
        self.folder = folder
        self.enrolled: list[dict[str, Any]] = []
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.standings: list[tuple[int, dict[str, Any]]] = []
        self.knocks: list[dict[str, Any]] = []
        self.hello: dict[str, Any] = {}
        self.closed_after = 10**9  # hellos
        self.hellos = 0
        self.host = ""
        self.renew(host=host, days=days)

    def renew(self, *, host: str = "127.0.0.1", days: int = 30) -> None:
        """Make a new authority and certificate."""
        ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.ca = _certificate("toy CA", ca_key, None)
        leaf = _certificate("toy", key, ("toy CA", ca_key), host=host, days=days)
        private = key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption())
        (self.folder / "toy.key").write_bytes(private)
        (self.folder / "toy.pem").write_bytes(leaf.public_bytes(ser.Encoding.PEM))

    def start(self, port: int = 0, *, address: str = "127.0.0.1") -> None:
        self._listener = socket.create_server((address, port))
        self.host = f"{address}:{self._listener.getsockname()[1]}"
        routes = [
            Route("/v1/cropkt/ca", self._ca),
            Route("/v1/cropkt/hello", self._hello),
            Route("/v1/cropkt/enrol", self._enrol, methods=["POST"]),
            Route("/v1/cropkt/knock", self._knock, methods=["POST"]),
            Route("/v1/fleet/{call}", self._fleet, methods=["POST"]),
        ]
        self._server = uvicorn.Server(
            uvicorn.Config(
                Starlette(routes=routes),
                log_level="critical",
                lifespan="off",
                ws="none",
                ssl_keyfile=str(self.folder / "toy.key"),
                ssl_certfile=str(self.folder / "toy.pem"),
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._listener.close()

    def invite(self, **changes: Any) -> Invite:
        der = self.ca.public_bytes(ser.Encoding.DER)
        values = {
            "host": self.host,
            "ca": hashlib.sha256(der).hexdigest(),
            "token": "t" * 43,
            "site": "lumc",
            "study": "eye",
        }
        return Invite(**{**values, **changes})

    async def _ca(self, request: Request) -> Response:
        return PlainTextResponse(self.ca.public_bytes(ser.Encoding.PEM))

    async def _hello(self, request: Request) -> Response:
        self.hellos += 1
        values = {
            "study": "eye",
            "cropkt": cropkt.__version__,
            "protocol": 1,
            "flwr": version("flwr"),
            "bundle": bundle_hash(),
            "time": time.time(),
            "closed": self.hellos > self.closed_after,
            "news": "from a later version",
        }
        return JSONResponse({**values, **self.hello})

    async def _enrol(self, request: Request) -> Response:
        body = await request.json()
        if self.refusal:
            return JSONResponse(self.refusal[1], self.refusal[0])
        self.enrolled.append(body)
        answer = {
            "study": "eye",
            "site": body["site"],
            "cancers": ["UVM"],
            "coordinator_key": base64.b64encode(bytes(32)).decode(),
            "bundle": bundle_hash(),
        }
        return JSONResponse(answer)

    async def _knock(self, request: Request) -> Response:
        self.knocks.append(await request.json())
        status, answer = self.standings.pop(0)
        return JSONResponse(answer, status)

    async def _fleet(self, request: Request) -> Response:
        return JSONResponse({}, 401 if self.standings else 404)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    for name in ("FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        monkeypatch.setenv(name, "0")  # so that what a test sets does not outlive it
    for name in ("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        for form in (name, name.lower()):
            monkeypatch.setenv(form, "")
            monkeypatch.delenv(form)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    interrupted = signal.getsignal(signal.SIGINT)  # a client that ends ignores it
    folder = tmp_path / "toy"
    folder.mkdir()
    toy = Toy(folder)
    toy.start()
    yield toy
    toy.stop()
    signal.signal(signal.SIGINT, interrupted)
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "hospital"
    folder.mkdir()
    return folder / "site.yaml"


@pytest.fixture
def joined(toy: Toy, config: Path) -> Path:
    """Return the configuration of a site that is enrolled."""
    join(toy.invite(), config)
    config.write_text(config.read_text().replace('encoder: ""', "encoder: UNI2-h"))
    return config


def run(*arguments: object) -> tuple[int, str]:
    """Return exit code and what a command says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def _until(true: Callable[[], object], *, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_enrolling_makes_keys_here_and_sends_only_their_public_halves(
    toy: Toy, config: Path
) -> None:
    code, said = run("enrol", encode_invite(toy.invite()), "--config", config)
    assert (code, "fill in" in said) == (0, True), said
    state = config.parent / "state"
    (body,) = toy.enrolled
    assert set(body) == {"token", "site", "node_key", "signing_key", "cropkt", "protocol", "flwr"}
    for name in ("node.key", "signing.key"):
        assert stat.S_IMODE((state / "keys" / name).stat().st_mode) == 0o600
        secret = (state / "keys" / name).read_text()
        assert not any(line in json.dumps(body) for line in secret.splitlines()[1:-1])
    node = ser.load_ssh_private_key((state / "keys/node.key").read_bytes(), None)
    assert isinstance(node, ec.EllipticCurvePrivateKey)
    assert isinstance(node.curve, ec.SECP384R1)
    public = ser.load_ssh_public_key(body["node_key"].encode())
    assert public == node.public_key()
    ed25519.Ed25519PublicKey.from_public_bytes(base64.b64decode(body["signing_key"]))
    kept = Enrolment.load(state)
    assert (kept.host, kept.study, kept.site, kept.cancers) == (toy.host, "eye", "lumc", ("UVM",))
    assert x509.load_pem_x509_certificate((state / "ca.pem").read_bytes()) == toy.ca


def test_the_template_documents_every_field_and_loads(joined: Path) -> None:
    text = joined.read_text()
    for item in fields(SiteConfig):
        assert f"\n{item.name}:" in text or f"\n# {item.name}:" in text
    loaded = read_settings(joined)
    assert (loaded.site, list(loaded.cancers)) == ("lumc", ["UVM"])


def test_an_enrolment_that_was_cut_off_is_repeated_with_the_same_keys(
    toy: Toy, config: Path, tmp_path: Path
) -> None:
    state = config.parent / "state"
    file = tmp_path / "invite.txt"
    file.write_text(encode_invite(toy.invite()) + "\n")
    toy.refusal = (503, {"code": "busy", "message": "later"})
    assert run("enrol", file, "--config", config)[0] == 69
    before = [(state / "keys" / n).read_bytes() for n in ("node.key", "signing.key")]
    assert not (state / "enrolment.json").exists()
    toy.refusal = None
    assert run("enrol", file, "--config", config)[0] == 0
    (state / "enrolment.json").unlink()  # as if cut off between answer and write
    config.unlink()
    assert run("enrol", file, "--config", config)[0] == 0
    assert [(state / "keys" / n).read_bytes() for n in ("node.key", "signing.key")] == before
    assert toy.enrolled[0] == toy.enrolled[1]
    assert Enrolment.load(state).site == "lumc"


def _one_line(said: str) -> str:
    (line,) = said.strip().splitlines()
    assert line.startswith("cropkt-client: ")
    return line


def test_a_refusal_is_one_line(toy: Toy, config: Path) -> None:
    toy.refusal = (403, {"code": "used", "message": "this invite was used\nbefore\x1b[2J"})
    code, said = run("enrol", encode_invite(toy.invite()), "--config", config)
    assert code == 77
    assert "this invite was used before" in _one_line(said)
    assert "\x1b" not in said
    assert "t" * 43 not in said


def test_another_authority_never_sees_the_token(toy: Toy, config: Path) -> None:
    code, said = run("enrol", encode_invite(toy.invite(ca="0" * 64)), "--config", config)
    assert code == 77
    assert "not the one in the invite" in _one_line(said)
    assert toy.enrolled == []


@pytest.mark.parametrize(
    ("certificate", "code", "words"),
    [
        ({"days": -1}, 77, "has expired"),
        ({"host": "elsewhere.example"}, 77, "for another host name"),
        ({"host": "192.0.2.7"}, 77, "for another host name"),
    ],
)
def test_a_bad_certificate_is_one_line_and_never_sees_the_token(
    toy: Toy, config: Path, certificate: dict[str, Any], code: int, words: str
) -> None:
    toy.stop()
    toy.renew(**certificate)
    toy.start()
    got, said = run("enrol", encode_invite(toy.invite()), "--config", config)
    assert got == code
    assert words in _one_line(said)
    assert toy.enrolled == []


def test_a_new_authority_is_refused_while_serving(toy: Toy, joined: Path) -> None:
    port = int(toy.host.rpartition(":")[2])
    toy.stop()
    toy.renew()
    toy.start(port)
    code, said = run(*SERVE, "--config", joined)
    assert code == 77
    assert "not issued by the study's authority" in said


def test_nobody_there_is_one_line(toy: Toy, config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    code, said = run(
        "enrol", encode_invite(toy.invite(host=f"127.0.0.1:{port}")), "--config", config
    )
    assert code == 69
    assert "Connection refused" in _one_line(said)


def test_an_unknown_host_is_one_line(toy: Toy, config: Path) -> None:
    invite = encode_invite(toy.invite(host="no-such-host.invalid:443"))
    code, said = run("enrol", invite, "--config", config)
    assert code == 69
    assert "host name is not known" in _one_line(said)


def test_the_proxy_is_used_and_its_failures_are_one_line(
    toy: Toy, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def proxy(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            seen.append(connection.recv(4096))
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=proxy, args=(listener,), daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@{address}")
        code, said = run("enrol", encode_invite(toy.invite()), "--config", config)
    assert code == 69
    assert address in _one_line(said)
    assert "407" in said
    assert "secret" not in said
    assert seen[0].startswith(f"CONNECT {toy.host} ".encode())
    code, said = run("enrol", encode_invite(toy.invite()), "--config", config)
    assert code == 69
    assert f"through the proxy {address}" in _one_line(said)


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        ({"protocol": 2}, "protocol is '2' at the coordinator and 1 here"),
        ({"cropkt": "9.9"}, "cropkt is '9.9' at the coordinator and"),
        ({"flwr": "1.40.9"}, "Flower is 1.40.9 at the coordinator and"),
        ({"bundle": "a" * 64}, "bundle is"),
        ({"time": None}, "not understood (time)"),
    ],
)
def test_versions_that_differ_are_named(
    toy: Toy, joined: Path, hello: dict[str, Any], words: str
) -> None:
    toy.hello = hello
    code, said = run(*SERVE, "--config", joined)
    assert code == 76
    assert words in said
    code, said = run("enrol", encode_invite(toy.invite()), "--config", joined)
    assert code == 76
    assert words in _one_line(said)


def test_another_patch_of_the_same_releases_fits(toy: Toy, joined: Path) -> None:
    here = {"cropkt": cropkt.__version__, "flwr": version("flwr")}
    toy.hello = {name: f"{v.rpartition('.')[0]}.999" for name, v in here.items()}
    ca = toy.ca.public_bytes(ser.Encoding.PEM)
    serve.check(Coordinator(toy.host, ca).hello(), Enrolment.load(joined.parent / "state"))
    code, said = run("enrol", encode_invite(toy.invite()), "--config", joined)
    assert code == 0, said


def test_another_sites_invite_is_refused_before_anything_is_sent(toy: Toy, joined: Path) -> None:
    for invite in (toy.invite(site="amc"), toy.invite(study="ear")):
        code, said = run("enrol", encode_invite(invite), "--config", joined)
        assert code == 78, said
    assert len(toy.enrolled) == 1


def test_a_damaged_key_is_not_replaced(joined: Path, toy: Toy) -> None:
    key = joined.parent / "state" / "keys" / "node.key"
    key.write_text("nonsense")
    with pytest.raises(ConfigError, match="Restore it"):
        Keys.of(joined.parent / "state")
    assert key.read_text() == "nonsense"


def test_an_answer_without_end_is_cut(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.hello = {"news": "x" * 2_000_000}
    ca = toy.ca.public_bytes(ser.Encoding.PEM)
    with pytest.raises(UnavailableError, match="too long"):
        Coordinator(toy.host, ca).hello()


def test_a_closed_study_ends_the_client_with_0(toy: Toy, joined: Path) -> None:
    toy.closed_after = 0
    code, said = run(*SERVE, "--config", joined)
    assert (code, "closed" in said) == (0, True), said
    code, said = run("status", "--config", joined)
    assert code == 3
    assert "the study is closed" in said


def test_what_the_coordinator_revokes_is_remembered(toy: Toy, joined: Path) -> None:
    toy.hello, toy.closed_after = {"revoked": ["1" * 64]}, 0
    assert run(*SERVE, "--config", joined)[0] == 0
    assert json.loads((joined.parent / "state" / "revoked.json").read_text()) == ["1" * 64]
    toy.hello = {"revoked": ["not a hash"]}
    code, said = run(*SERVE, "--config", joined)
    assert (code, "not understood (revoked)" in said) == (76, True), said


def test_a_site_that_was_cut_off_ends_with_77_and_no_other_answer_ends_it(
    toy: Toy, joined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "FIRST_WAIT", 0.1)
    cut_off = "The coordinator cut this site off."
    toy.standings = [
        (403, {"code": "unknown", "message": "The coordinator knows no such site and key."}),
        (503, {"code": "revoked", "message": "Somebody else's page."}),
        (200, {"site": "lumc", "cancers": ["UVM"]}),
        (403, {"code": "revoked", "message": cut_off}),
    ]
    code, said = run(*SERVE, "--config", joined)
    assert (code, toy.standings) == (77, []), said
    assert cut_off in said.splitlines()[-1]
    keys = Keys.of(joined.parent / "state").public()
    for knock in [Knock(**values) for values in toy.knocks]:
        assert (knock.study, knock.site, knock.node_key) == ("eye", "lumc", keys["node_key"])
        assert knock.signed_by(keys["signing_key"])
        assert abs(knock.at - time.time()) < 200


def test_a_device_that_is_not_there_is_said_before_the_first_task(toy: Toy, joined: Path) -> None:
    code, said = run(*SERVE, "--config", joined, "--device", "cuda:9")
    assert code == 64
    assert "torch finds no cuda:9 on this machine, only" in said
    assert "no cuda:9" in (joined.parent / "state" / LOG_NAME).read_text()


@pytest.mark.parametrize("ahead", [-600, 600])
def test_a_clock_that_is_off_is_said(toy: Toy, joined: Path, ahead: int) -> None:
    toy.hello, toy.closed_after = {"time": time.time() - ahead}, 0
    code, said = run(*SERVE, "--config", joined)
    assert code == 0
    log = (joined.parent / "state" / LOG_NAME).read_text()
    assert f"clock is {ahead:+}"[:-2] in log + said


def test_a_client_in_the_background_says_what_it_does_and_is_stopped(
    toy: Toy, joined: Path
) -> None:
    """The toy has no fleet route: the SuperNode is refused over and over, the client lives."""
    state = joined.parent / "state"
    code, said = run("status", "--config", joined)
    assert (code, "not running" in said, "enrolled as lumc (UVM)" in said) == (3, True, True)
    started = subprocess.run(
        [*CLIENT, *SERVE, "--config", str(joined), "--detach"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.returncode == 0, started.stderr
    assert "serving in the background" in started.stdout
    pid = serve.running(state)
    assert pid is not None
    try:
        code, said = run("status", "--config", joined, "--json")
        told = json.loads(said)
        assert (code, told["running"], told["enrolled"], told["pid"]) == (0, True, True, pid)
        again = subprocess.run(
            [*CLIENT, *SERVE, "--config", str(joined)], capture_output=True, text=True, timeout=60
        )
        assert again.returncode == 64
        assert f"process {pid}" in _one_line(again.stderr)
        _until(lambda: "connection process ended" in (state / LOG_NAME).read_text())
        children = psutil.Process(pid).children(recursive=True)
        code, said = run("status", "--config", joined)
        assert code == 0
        assert "connected since" in said
        assert "last error" in said
        assert stat.S_IMODE((state / LOG_NAME).stat().st_mode) == 0o600
    finally:
        code, said = run("stop", "--config", joined)
    assert (code, said.strip()) == (0, "stopped")
    assert serve.running(state) is None
    _until(lambda: not any(child.is_running() for child in children))
    code, said = run("status", "--config", joined)
    assert (code, "not running" in said) == (3, True)


def test_a_killed_client_leaves_no_orphan_and_no_lock(toy: Toy, joined: Path) -> None:
    state = joined.parent / "state"
    client = subprocess.Popen([*CLIENT, *SERVE, "--config", str(joined)], stderr=subprocess.DEVNULL)
    _until(lambda: psutil.Process(client.pid).children())
    children = psutil.Process(client.pid).children(recursive=True)
    client.send_signal(signal.SIGKILL)
    client.wait()
    assert serve.running(state) is None
    _until(lambda: not any(child.is_running() for child in children))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_client_says_so(
    toy: Toy, joined: Path, number: signal.Signals, code: int
) -> None:
    client = subprocess.Popen(
        [*CLIENT, *SERVE, "--config", str(joined)], stderr=subprocess.PIPE, text=True
    )
    _until(lambda: psutil.Process(client.pid).children())
    client.send_signal(number)
    _, said = client.communicate(timeout=40)
    assert client.returncode == code, said
    assert "Traceback" not in said


def test_a_coordinator_that_comes_late_or_goes_is_waited_for(
    toy: Toy, joined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = joined.parent / "state"
    for name, seconds in (("POLL", 0.2), ("POLL_LOST", 0.2)):
        monkeypatch.setattr(serve, name, seconds)
    port = int(toy.host.rpartition(":")[2])
    toy.stop()
    story: list[str] = []

    def connected(yes: bool) -> bool:
        told = read_status(state)
        return told is not None and told.connected is yes

    def play() -> None:
        _until(lambda: read_status(state) and "refused" in str(read_status(state)))
        story.append("late")
        toy.start(port)
        _until(lambda: connected(True))
        story.append("there")
        toy.stop()
        _until(lambda: connected(False))
        story.append("gone")
        toy.start(port)
        _until(lambda: connected(True))
        toy.closed_after = 0

    thread = threading.Thread(target=play)
    thread.start()
    code, said = run(*SERVE, "--config", joined)
    thread.join()
    assert code == 0, said
    assert story == ["late", "there", "gone"]
    log = (state / LOG_NAME).read_text()
    assert "the coordinator answers again" in log
    assert os.environ["FLWR_HOME"] == str(state / "flower")
