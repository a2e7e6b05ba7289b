"""What the doctor says of the way to a coordinator: the coordinator's own door, with real TLS."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cropkt.cancers import Cancer
from cropkt.checkup import Finding, part, show
from cropkt.config import StudyConfig
from cropkt_client import doctor
from cropkt_client.doctor import connection
from cropkt_client.doctor.connection import Connection
from cropkt_client.enrol import Enrolment as Joined
from cropkt_client.enrol import join
from cropkt_client.settings import read_settings
from cropkt_client.supernode import free_port
from cropkt_server import pki
from cropkt_server.enrolment import Enrolment
from cropkt_server.pki import Keys, make_keys, renew
from cropkt_server.public import Listener, PublicDoor
from cropkt_server.roster import Roster

STUDY = StudyConfig(folds=4, endpoint="PFI")
LATER = ["certificate chain", "certificate dates", "clock", "versions", "roster"]


class _OtherFlower(Enrolment):
    def hello(self) -> dict[str, Any]:
        return {**super().hello(), "flwr": "1.39.2"}


class _OtherCropkt(Enrolment):
    def hello(self) -> dict[str, Any]:
        return {**super().hello(), "cropkt": "9.9.9"}


class Hub:
    """A coordinator's door and roster, without Flower behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys, self.roster = folder, Keys.of(folder), Roster(folder)
        make_keys(self.keys, ["127.0.0.1"], study="eye")
        self._listener: Listener | None = None
        self.port = free_port()

    def register(self, node_key: str, name: str) -> int:
        return 1 + len(self.roster.sites())

    def deregister(self, node_id: int) -> None:
        """Nobody is here."""

    def start(self, kind: type[Enrolment] = Enrolment) -> None:
        self.enrolment = kind(
            study="eye",
            host=f"127.0.0.1:{self.port}",
            keys=self.keys,
            roster=self.roster,
            config=STUDY,
        )

        async def nothing(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("no call to Flower is expected")

        door = PublicDoor(nothing, self.enrolment, self)
        self._listener = Listener(door, self.keys, host="127.0.0.1", port=self.port)

    def stop(self) -> None:
        if self._listener:
            self._listener.stop()
            self._listener = None

    @contextlib.contextmanager
    def changed(self, kind: type[Enrolment] = Enrolment) -> Iterator[None]:
        """Change something while the door is shut."""
        self.stop()
        yield
        self.start(kind)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    (tmp_path / "hub").mkdir()
    hub = Hub(tmp_path / "hub")
    hub.start()
    yield hub
    hub.stop()
    hub.roster.close()


@pytest.fixture
def config(hub: Hub, tmp_path: Path) -> Path:
    """Return the `site.yaml` of a hospital that has joined."""
    config = tmp_path / "hospital" / "site.yaml"
    config.parent.mkdir()
    join(hub.enrolment.invite("lumc", [Cancer.UVM], time.time() + 600), config)
    return config


def checked(config: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Finding]]:
    """Return the exit code of the checks of a connection, and what each found."""
    state = config.parent / "state"
    looked = Connection(read_settings(config), state)
    code = show(part("connection", looked.checks), as_json=True)
    listed = [Finding(**one) for one in json.loads(capsys.readouterr().out)]
    found = {finding.check: finding for finding in listed}
    assert len(found) == len(listed)
    assert all(finding.fix for finding in listed if finding.word in ("warn", "fail"))
    assert code == any(finding.word == "fail" for finding in listed)
    return code, found


def only(found: dict[str, Finding], check: str, word: str) -> Finding:
    """Return the finding of a check, the first that is not ok, and the only one not skipped."""
    wrong = [name for name, finding in found.items() if finding.word not in ("ok", "skipped")]
    assert wrong == [check], found
    assert found[check].word == word
    return found[check]


def edit(config: Path, **values: Any) -> None:
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **values}))


def test_all_is_well(hub: Hub, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked(config, capsys)
    assert code == 0
    assert {finding.word for finding in found.values()} == {"ok"}, found
    assert [*found][-6:] == ["port", *LATER]
    assert "not needed: 127.0.0.1 is an address" in found["DNS"].found
    assert "lumc is there with these keys" in found["roster"].found


def test_what_the_coordinator_tells_the_site_is_the_study(hub: Hub, config: Path) -> None:
    looked = Connection(read_settings(config), config.parent / "state")
    list(looked.checks())
    assert looked.known is not None
    assert looked.known.config == STUDY
    assert looked.known.cancers == (Cancer.UVM,)


def test_without_an_enrolment_the_rest_is_skipped(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "state" / "enrolment.json").unlink()
    code, found = checked(config, capsys)
    assert code == 1
    assert "cropkt-client enrol INVITE" in only(found, "enrolment", "fail").fix
    assert [f.word for f in found.values()].count("skipped") == len(found) - 1 == 9


def test_an_unknown_name(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _moved(config, "no-such-host.invalid:8443")
    code, found = checked(config, capsys)
    assert code == 1
    assert "no-such-host.invalid: this host name is not known" in only(found, "DNS", "fail").found
    assert all(found[name].word == "skipped" for name in ("port", *LATER))


def test_nobody_answers(hub: Hub, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.stop()
    code, found = checked(config, capsys)
    failed = only(found, "port", "fail")
    assert code == 1
    assert "no connection (Connection refused)" in failed.found
    assert f"outgoing TCP to 127.0.0.1:{hub.port}" in failed.fix
    assert all(found[name].word == "skipped" for name in LATER)


def test_another_authority_on_the_way(
    hub: Hub, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub.changed():
        shutil.rmtree(hub.keys.folder)
        make_keys(hub.keys, ["127.0.0.1"], study="eye")
    code, found = checked(config, capsys)
    failed = only(found, "certificate chain", "fail")
    assert code == 1
    assert "not issued by the study's authority" in failed.found
    assert "If a firewall here opens TLS" in failed.fix
    assert found["port"].word == "ok"


@pytest.mark.parametrize(
    ("days", "host", "check", "word", "says", "fix"),
    [
        (0, "127.0.0.1", "certificate chain", "fail", "has expired", "renew"),
        (20, "127.0.0.1", "certificate dates", "warn", "the server's ends in 20 days", "renew"),
        (99, "hub.example", "certificate chain", "fail", "for another host name", "Use the name"),
    ],
)
def test_a_certificate_that_will_not_do(
    hub: Hub,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    days: int,
    host: str,
    check: str,
    word: str,
    says: str,
    fix: str,
) -> None:
    monkeypatch.setattr(pki, "SERVER_DAYS", days)
    with hub.changed():
        renew(hub.keys, [host])
    code, found = checked(config, capsys)
    finding = only(found, check, word)
    assert says in finding.found
    assert fix in finding.fix
    assert code == (word == "fail")


@pytest.mark.parametrize(("seconds", "word"), [(60, "ok"), (-60, "ok"), (400, "warn")])
def test_a_clock_that_is_wrong(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
    word: str,
) -> None:
    monkeypatch.setattr(connection, "time", SimpleNamespace(time=lambda: time.time() + seconds))
    code, found = checked(config, capsys)
    side = "ahead of" if seconds > 0 else "behind"
    assert (code, found["clock"].word) == (0, word)
    assert f"s {side} the coordinator's" in found["clock"].found
    assert ("NTP" in found["clock"].fix) == (word == "warn")


@pytest.mark.parametrize(
    ("kind", "says", "fix"),
    [
        (_OtherFlower, "Flower is 1.39.2 at the coordinator", "pip install flwr==1.39.2"),
        (_OtherCropkt, "cropkt is '9.9.9' at the coordinator", "Install the coordinator's version"),
    ],
)
def test_versions_that_do_not_go_together(
    hub: Hub,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    kind: type[Enrolment],
    says: str,
    fix: str,
) -> None:
    with hub.changed(kind):
        pass
    code, found = checked(config, capsys)
    failed = only(found, "versions", "fail")
    assert code == 1
    assert says in failed.found
    assert fix in failed.fix


def test_a_site_that_was_revoked(
    hub: Hub, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.roster.revoke("lumc")
    code, found = checked(config, capsys)
    failed = only(found, "roster", "fail")
    assert code == 1
    assert "cut this site off" in failed.found
    assert "new invite" in failed.fix


@pytest.mark.parametrize(
    ("key", "says"), [("node.key", "no such site and key"), ("signing.key", "another signing key")]
)
def test_keys_that_did_not_enrol(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, says: str
) -> None:
    from cropkt_client.enrol import Keys as SiteKeys

    SiteKeys.of(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "keys" / key, config.parent / "state" / "keys" / key)
    code, found = checked(config, capsys)
    assert code == 1
    assert says in only(found, "roster", "fail").found


def test_keys_that_others_may_read(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config.parent / "state" / "keys" / "signing.key"
    path.chmod(0o644)
    code, found = checked(config, capsys)
    assert code == 1
    assert only(found, "keys", "fail").fix == f"chmod 600 {path}"
    assert found["roster"].word == "skipped"


def test_a_missing_key_is_not_made_anew(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config.parent / "state" / "keys" / "node.key"
    path.unlink()
    code, found = checked(config, capsys)
    assert code == 1
    assert "Restore it" in only(found, "keys", "fail").fix
    assert not path.exists()


def test_a_missing_authority(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "state" / "ca.pem").write_text("nothing")
    code, found = checked(config, capsys)
    assert code == 1
    assert "Restore it" in only(found, "certificate chain", "fail").fix


def test_a_cancer_that_was_not_invited(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(config, cancers=["UVM", "SKCM"])
    code, found = checked(config, capsys)
    assert code == 1
    assert "SKCM" in found["enrolment"].found
    assert "with all its cancers" in found["enrolment"].fix
    assert found["roster"].word == "fail"


def test_a_study_that_is_over(hub: Hub, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.enrolment.closed.set()
    code, found = checked(config, capsys)
    assert code == 0
    assert only(found, "study", "warn").found == "it is over"


@pytest.fixture
def proxy() -> Iterator[Callable[[], tuple[str, list[bytes]]]]:
    """Return what starts an HTTP proxy that knows CONNECT alone, and notes what it was asked."""
    closing = contextlib.ExitStack()

    def start() -> tuple[str, list[bytes]]:
        door = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
        asked: list[bytes] = []

        def carry(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65_536):
                    sink.sendall(data)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = closing.enter_context(door.accept()[0])
                    asked.append(client.recv(65_536))
                    name, _, port = asked[-1].split()[1].decode().rpartition(":")
                    there = closing.enter_context(socket.create_connection((name, int(port))))
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    for pair in ((client, there), (there, client)):
                        threading.Thread(target=carry, args=pair, daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{door.getsockname()[1]}", asked

    with closing:
        yield start


def test_a_proxy_is_used_and_its_password_not_shown(
    hub: Hub,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    proxy: Callable[[], tuple[str, list[bytes]]],
) -> None:
    where, asked = proxy()
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:hunter2@{where}")
    code, found = checked(config, capsys)
    assert (code, found["proxy"].found) == (0, f"through {where}")
    assert found["DNS"].word == "skipped"
    assert all(found[name].word == "ok" for name in ("port", *LATER))
    assert asked[0].startswith(f"CONNECT 127.0.0.1:{hub.port} ".encode())
    assert not any("hunter2" in finding.line for finding in found.values())


@pytest.mark.parametrize(
    ("proxy", "says", "fix"),
    [
        ("http://user:hunter2@127.0.0.1:1", "through the proxy 127.0.0.1:1", "check HTTPS_PROXY"),
        ("socks5://127.0.0.1:1", "127.0.0.1:1 is of an unknown kind", "begins with http://"),
        ("ftp://user:hunter2@127.0.0.1:1", "127.0.0.1:1 is of an unknown kind", "NO_PROXY"),
    ],
)
def test_a_proxy_that_does_not_work(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    proxy: str,
    says: str,
    fix: str,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    code, found = checked(config, capsys)
    failed = only(found, "port", "fail")
    assert code == 1
    assert says in failed.found
    assert fix in failed.fix
    assert "hunter2" not in failed.line


def test_a_site_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("site: lumc\nslidez: []\n")
    first, *others = doctor.examine(path)
    assert (first.part, first.word) == ("settings", "fail")
    assert "Correct" in first.fix
    assert [(finding.part, finding.word) for finding in others] == [
        ("connection", "skipped"),
        ("compute", "skipped"),
        ("data", "skipped"),
    ]


def _moved(config: Path, host: str) -> None:
    """Let the site believe that its coordinator is elsewhere."""
    path = config.parent / "state" / "enrolment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": host}))
    assert Joined.load(path.parent).host == host
