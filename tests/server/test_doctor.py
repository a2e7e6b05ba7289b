"""What the coordinator's doctor says of a study folder, one fault at a time."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from cropkt import versions
from cropkt.cancers import Cancer
from cropkt.config import ExpertShape, StudyConfig
from cropkt.experts.card import public_text
from cropkt.messages import ExpertReply, ExpertRequest, Score
from cropkt_server import pki
from cropkt_server.cli import app
from cropkt_server.enrolment import Enrolment
from cropkt_server.lock import locked
from cropkt_server.pki import Keys, renew
from cropkt_server.public import Listener, PublicDoor
from cropkt_server.roster import Roster
from cropkt_server.settings import load_settings, save_settings
from cropkt_server.store import Store, Task
from cropkt_server.study import Study

TASK = Task(kind="fit_expert", site="lumc", cancer=Cancer.UVM)
STUDY = StudyConfig(encoder="UNI2-h", folds=3, shape=ExpertShape(dim=6, embed=8, attention=4))

Found = dict[str, dict[str, str]]


def doctor(folder: Path, *, code: int) -> Found:
    """Return what each check found; a warning or a failure names a fix."""
    result = CliRunner().invoke(app, ["doctor", str(folder), "--json"])
    assert result.exit_code == code, result.output
    listed = json.loads(result.stdout)
    assert all(bool(one["fix"]) == (one["word"] in ("warn", "fail")) for one in listed), listed
    return {one["check"]: one for one in reversed(listed)}


def only(found: Found, check: str, word: str) -> dict[str, str]:
    """Return the finding of a check, which is the only one that is neither ok nor skipped."""
    assert [n for n, one in found.items() if one["word"] not in ("ok", "skipped")] == [check], found
    assert found[check]["word"] == word
    return found[check]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a study that has invited one hospital, and has a free port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = tmp_path / "study"
    made = CliRunner().invoke(
        app, ["init", str(path), "--study", "eye", "--host", f"127.0.0.1:{port}"]
    )
    assert made.exit_code == 0, made.output
    save_settings(replace(load_settings(path), listen="127.0.0.1", study=STUDY), path)
    with closing(Roster(path)) as roster:
        roster.invite("lumc", [Cancer.UVM], time.time() + 600)
    return path


@pytest.fixture
def banked(folder: Path, sign_reply: Callable[..., ExpertReply]) -> Path:
    """Return the study after its site has enrolled and given an expert."""
    key = Ed25519PrivateKey.generate()
    with closing(Roster(folder)) as roster:
        roster.enrol(
            token=roster.invite("lumc", [Cancer.UVM], time.time() + 600),
            site="lumc",
            node_key="a key",
            signing_key=public_text(key),
            register=lambda key, name: 7,
        )
    with closing(Study(folder, STUDY, ["lumc"]).store) as store:
        request = ExpertRequest(task=TASK.id, cancer=Cancer.UVM, study=STUDY, round=0, shared=False)
        reply = sign_reply(TASK, _reply(1.0), request, key=key)
        store.add([TASK])
        store.keep(TASK, reply)
        assert reply.signed is not None
        store.bank.add(reply.signed, task=TASK.id)
        store.done(TASK)
    return folder


def _reply(value: float) -> ExpertReply:
    return ExpertReply(
        task=TASK.id,
        cancer=Cancer.UVM,
        patients=100,
        events=40,
        weights=np.full((1, 9), value, dtype=np.float32),
        score=Score(c_index=0.6, se=0.05),
        seconds=1.0,
    )


def test_all_is_well(banked: Path) -> None:
    found = doctor(banked, code=0)
    assert {one["word"] for one in found.values()} == {"ok"}, found
    assert "1 experts, their signatures and weights verified" in found["bank"]["found"]
    assert found["sites"]["found"] == "1 enrolled; 1 with experts"
    assert "is free" in found["port"]["found"]


def test_a_terminal_that_is_none_gets_a_line_each(folder: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(folder)])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].startswith("ok      settings: study.yaml: study eye at 127.0.0.1:")
    assert lines[-1] == f"{len(lines) - 1} ok"


def test_a_new_study_has_invited_nobody(folder: Path) -> None:
    (folder / "roster.sqlite").unlink()
    Roster(folder).close()
    found = doctor(folder, code=0)
    assert "cropkt-server invite" in found["sites"]["fix"]
    assert found["min_sites"]["word"] == "warn"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hots": "hub:1"}, "hots"),
        ({"host": None}, "host: is missing"),
        ({"sites": ["a"]}, "only a simulation"),
    ],
)
def test_a_study_yaml_that_cannot_be_used(folder: Path, change: dict[str, Any], says: str) -> None:
    _edit(folder, **change)
    found = doctor(folder, code=1)
    assert says in only(found, "study.yaml", "fail")["found"]
    assert found["all of it"]["word"] == "skipped"


@pytest.mark.parametrize("name", ["server.key", "coordinator.key", "ca.key"])
def test_a_key_that_others_may_read(folder: Path, name: str) -> None:
    (folder / "keys" / name).chmod(0o640)
    found = doctor(folder, code=1)
    assert only(found, "keys", "fail")["fix"] == f"chmod 600 {folder / 'keys' / name}"


def test_a_key_that_is_missing(folder: Path) -> None:
    (folder / "keys" / "ca.key").unlink()
    assert "elsewhere" in doctor(folder, code=0)["keys"]["found"]
    (folder / "keys" / "coordinator.key").unlink()
    assert "Restore" in only(doctor(folder, code=1), "keys", "fail")["fix"]


@pytest.mark.parametrize(
    ("days", "host", "check", "word", "says"),
    [
        (0, "127.0.0.1", "certificate", "fail", "expired on"),
        (20, "127.0.0.1", "certificate dates", "warn", "the server's ends in 20 days"),
        (99, "hub.example", "certificate", "fail", "names hub.example, not 127.0.0.1"),
    ],
)
def test_a_certificate_that_will_not_do(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    days: int,
    host: str,
    check: str,
    word: str,
    says: str,
) -> None:
    monkeypatch.setattr(pki, "SERVER_DAYS", days)
    renew(Keys.of(folder), [host])
    finding = only(doctor(folder, code=int(word == "fail")), check, word)
    assert says in finding["found"]
    assert "cropkt-server renew" in finding["fix"]


def test_a_port_that_another_program_has(folder: Path) -> None:
    host, _, port = str(load_settings(folder).host).rpartition(":")
    with socket.create_server((host, int(port))):
        finding = only(doctor(folder, code=1), "port", "fail")
    assert "cannot listen there (Address already in use)" in finding["found"]
    assert "stop what uses it" in finding["fix"]


@pytest.fixture
def running(folder: Path) -> Iterator[Callable[[Keys], None]]:
    """Return what opens the door of the study, held by this process, with some keys."""
    doors: list[Listener] = []
    host = str(load_settings(folder).host)

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("no call to Flower is expected")

    def start(keys: Keys) -> None:
        enrolment = Enrolment(study="eye", host=host, keys=keys, roster=roster)
        door = PublicDoor(nothing, enrolment, nodes=None)  # type: ignore[arg-type]
        doors.append(Listener(door, keys, host="127.0.0.1", port=int(host.rpartition(":")[2])))

    with locked(folder), closing(Roster(folder)) as roster:
        yield start
        for door in doors:
            door.stop()


def test_a_coordinator_that_runs(folder: Path, running: Callable[[Keys], None]) -> None:
    finding = only(doctor(folder, code=1), "port", "fail")
    assert f"process {os.getpid()}) runs, but" in finding["found"]
    running(Keys.of(folder))
    finding = doctor(folder, code=0)["port"]
    assert f"answered by this study's coordinator, process {os.getpid()}" in finding["found"]


def test_a_coordinator_with_another_certificate(
    folder: Path, running: Callable[[Keys], None], tmp_path: Path
) -> None:
    other = Keys.of(tmp_path / "other")
    pki.make_keys(other, ["127.0.0.1"], study="eye")
    running(other)
    finding = only(doctor(folder, code=1), "port", "fail")
    assert "answered by another certificate" in finding["found"]


def _no_database(path: Path) -> None:
    path.write_bytes(b"no database" * 100)


def _lacks_pages(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def _is_newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("roster.sqlite", _no_database, "cannot be read"),
        ("bank.sqlite", _lacks_pages, ""),
        ("study.sqlite", _is_newer, "has schema 99, this cropkt knows 1"),
        ("study.sqlite", Path.unlink, "no such file"),
        ("study.sqlite", lambda path: path.write_bytes(b""), "is empty"),
        ("flower.sqlite", _no_database, "cannot be read"),
    ],
)
def test_a_database_that_cannot_be_used(
    folder: Path, name: str, damage: Callable[[Path], object], says: str
) -> None:
    path = folder / name
    if not path.exists():
        path.touch()
    damage(path)
    before = path.read_bytes() if path.exists() else None
    found = doctor(folder, code=1)
    finding = only(found, "databases", "fail")
    assert f"{path} " in finding["found"]
    assert says in finding["found"]
    assert ("made anew" if name == "flower.sqlite" else "backup") in finding["fix"]
    assert found["bank"]["word"] == found["sites"]["word"] == "skipped"
    assert (path.read_bytes() if path.exists() else None) == before


def test_an_answer_that_is_lost(banked: Path) -> None:
    (answer,) = (banked / "replies").iterdir()
    answer.unlink()
    found = doctor(banked, code=1)
    assert "1 rows are done, but their answers are missing" in found["answers"]["found"]
    assert "backup" in found["answers"]["fix"]


def test_an_expert_whose_weights_changed(banked: Path) -> None:
    with closing(Store(banked)) as store:
        kept = store.reply(TASK)
        assert isinstance(kept, ExpertReply)
        store.keep(TASK, replace(kept, weights=kept.weights + 1))
    finding = only(doctor(banked, code=1), "bank", "fail")
    assert "1 of 1 experts" in finding["found"]
    assert "its weights are not those that were signed" in finding["found"]
    assert "cropkt-server revoke" in finding["fix"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE expert SET signature = replace(signature, substr(signature, 1, 8), '01234567')",
         "its card is not what was signed"),
        ("UPDATE expert SET card = replace(card, '\"patients\":100', '\"patients\":101')",
         "its card is not what was signed"),
    ],
)  # fmt: skip
def test_an_expert_that_is_not_as_signed(banked: Path, change: str, says: str) -> None:
    with closing(sqlite3.connect(banked / "bank.sqlite")) as database, database:
        assert database.execute(change).rowcount == 1
    assert says in only(doctor(banked, code=1), "bank", "fail")["found"]


def test_an_expert_of_somebody_else(banked: Path) -> None:
    with closing(sqlite3.connect(banked / "roster.sqlite")) as database, database:
        other = public_text(Ed25519PrivateKey.generate())
        database.execute("UPDATE site SET signing_key = ?", (other,))
    finding = only(doctor(banked, code=1), "bank", "fail")
    assert "it is not signed with the key of lumc" in finding["found"]


def test_settings_that_changed(banked: Path) -> None:
    settings = load_settings(banked)
    save_settings(replace(settings, study=replace(STUDY, seed=7)), banked)
    finding = only(doctor(banked, code=1), "settings", "fail")
    assert "seed was 0 when this study began and is 7 now" in finding["found"]
    assert "Set it back" in finding["fix"]


def test_sites_that_do_not_come(folder: Path) -> None:
    _edit(folder, min_sites=3)
    finding = only(doctor(folder, code=1), "min_sites", "fail")
    assert finding["found"] == "1 of at least 3 sites are enrolled or invited"
    _edit(folder, min_sites=1)
    with closing(sqlite3.connect(folder / "roster.sqlite")) as database, database:
        database.execute("UPDATE invite SET expires = 1")
    found = doctor(folder, code=1)
    assert "the invite of lumc has expired" in found["sites"]["found"]
    assert found["min_sites"]["word"] == "fail"


def test_a_clock_that_was_set_back(folder: Path) -> None:
    soon = time.time() + 4000
    os.utime(folder / "study.yaml", (soon, soon))
    assert "NTP" in only(doctor(folder, code=0), "clock", "warn")["fix"]


def test_a_flower_that_is_too_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda _: "1.99.0")
    finding = only(doctor(folder, code=1), "versions", "fail")
    assert "flwr 1.99.0 is installed, cropkt asks for" in finding["found"]


def _edit(folder: Path, **change: Any) -> None:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
