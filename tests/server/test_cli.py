"""`cropkt-server` as a coordinator types it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from pydantic import TypeAdapter
from typer.testing import CliRunner

from cropkt.invite import decode_invite
from cropkt_server.cli import app
from cropkt_server.settings import Settings, load_settings, save_settings
from cropkt_server.store import Store, Task
from cropkt_server.template import template

COMMAND = [sys.executable, "-c", "from cropkt_server.cli import main; main()"]


def run(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    host = f"127.0.0.1:{port}"
    run("init", tmp_path / "study", "--study", "eye", "--host", host, "--encoder", "UNI2-h")
    return tmp_path / "study"


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, cropkt_server.cli\n"
        "assert not {'torch', 'flwr', 'numpy', 'pandas', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_init_makes_a_study_for_its_owner_alone(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    names = {path.name for path in folder.iterdir()}
    assert {"study.yaml", "keys", "roster.sqlite", "study.sqlite"} <= names
    again = run("init", folder, "--study", "eye", "--host", "127.0.0.1", code=78)
    assert "study.yaml: is already there" in again.stderr


def test_init_documents_every_setting() -> None:
    settings = Settings(name="eye", host="hub.example.org:8443")
    text = template(settings)
    read = TypeAdapter(Settings).validate_python(yaml.safe_load(text))
    assert read == settings
    lines = text.splitlines()

    def check(settings: Any) -> None:
        for item in fields(settings):
            (at, *_) = [
                i for i, line in enumerate(lines) if line.strip().startswith(f"{item.name}:")
            ]
            assert len(lines[at - 1].strip()) > 5, f"{item.name} is not documented"
            assert lines[at - 1].strip().startswith("# ")
            if is_dataclass(getattr(settings, item.name)):
                check(getattr(settings, item.name))

    check(read)
    assert all(line.strip() != "#" for line in lines)


@pytest.mark.parametrize("host", ["hub.example.org", "10.1.2.3", "hub.example.org:9000", "[::1]"])
def test_init_takes_names_addresses_and_ports(tmp_path: Path, host: str) -> None:
    run("init", tmp_path / "study", "--study", "eye", "--host", host)
    known = load_settings(tmp_path / "study").host
    assert known == (host if host.endswith("9000") else f"{host}:8443")


@pytest.mark.parametrize(
    ("study", "host", "says"),
    [("eye", "not a host", "--host"), ("eye", "hub:99999999", "--host"), ("a b", "hub", "--study")],
)
def test_init_refuses_what_cannot_be(tmp_path: Path, study: str, host: str, says: str) -> None:
    result = run("init", tmp_path / "x", "--study", study, "--host", host, code=64)
    assert result.stderr.startswith(f"cropkt-server: {says}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_an_invite_is_one_line_and_the_roster_knows_it(folder: Path) -> None:
    result = run("invite", folder, "--site", "lumc", "--cancer", "UVM", "--cancer", "SKCM")
    invite = decode_invite(result.stdout)
    assert (invite.site, invite.study) == ("lumc", "eye")
    assert invite.host == load_settings(folder).host
    (site,) = json.loads(run("roster", folder, "--json").stdout)
    assert (site["site"], site["cancers"], site["state"]) == ("lumc", ["UVM", "SKCM"], "invited")
    assert invite.token not in run("roster", folder).stdout
    assert "lumc (UVM SKCM): invited" in run("roster", folder).stdout
    assert "is void" in run("revoke", folder, "--site", "lumc").stdout
    assert "nobody is invited yet" in run("roster", folder).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["invite", "--site", "a", "--cancer", "NOPE"], 64, "--cancer: unknown code 'NOPE'"),
        (["invite", "--site", "a b", "--cancer", "UVM"], 64, "--site: 'a b' is no name"),
        (["invite", "--site", "a", "--cancer", "UVM", "--expires", "soon"], 64, "--expires"),
        (["revoke", "--site", "a"], 64, "a is not in the roster"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, arguments: list[str], code: int, says: str) -> None:
    command, *options = arguments
    result = run(command, folder, *options, code=code)
    assert result.stderr.startswith("cropkt-server: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["roster"], ["start"], ["stop"], ["pause"], ["resume"], ["retry"], ["renew"]],
)
def test_no_study_is_said_and_nothing_is_made(tmp_path: Path, arguments: list[str]) -> None:
    result = run(*arguments, tmp_path, code=78)
    assert "study.yaml: no such file. Make one with cropkt-server init." in result.stderr
    assert not list(tmp_path.iterdir())


def test_no_study_starts_before_its_encoder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    run("init", folder, "--study", "eye", "--host", "127.0.0.1")
    said = run("start", folder, code=78).stderr
    assert "study.yaml: study.encoder: is empty" in said
    assert "study.encoder: is empty" in run("doctor", folder, code=1).stdout
    run("invite", folder, "--site", "a", "--cancer", "UVM")  # inviting need not wait for it


def test_a_simulations_settings_are_not_started(tmp_path: Path) -> None:
    save_settings(Settings(name="sim", sites=("a",)), tmp_path)
    assert "only a simulation names its sites" in run("start", tmp_path, code=78).stderr


def test_status_is_truthful(folder: Path) -> None:
    run("invite", folder, "--site", "b", "--cancer", "SKCM")
    text = run("status", folder, code=3).stdout
    assert "does not run" in text
    assert "missing: b: invited, but did not enrol" in text
    store = Store(folder)
    task = Task(kind="fit_expert", site="b", cancer=None)
    store.add([Task(kind="describe", site="b"), task])
    store.failed(task, "out of memory")
    store.close_study()
    store.close()
    told = json.loads(run("status", folder, "--json", code=3).stdout)
    assert told["state"] == "incomplete"
    assert told["failed"] == {"fit_expert/b": "out of memory"}
    assert told["missing"] == {"b": "invited, but did not enrol"}
    assert (
        "this study is finished"
        in run("invite", folder, "--site", "c", "--cancer", "UVM", code=78).stderr
    )
    assert "again: fit_expert/b" in run("retry", folder, "--site", "b").stdout
    assert json.loads(run("status", folder, "--json", code=3).stdout)["state"] == "stopped"


def test_pause_and_resume(folder: Path) -> None:
    run("pause", folder)
    assert "is paused" in run("status", folder, code=3).stdout
    run("resume", folder)
    assert "paused" not in run("status", folder, code=3).stdout


def test_renew_changes_the_servers_certificate_only(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "keys").iterdir()}
    run("renew", folder)
    after = {path.name: path.read_bytes() for path in (folder / "keys").iterdir()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"server.key", "server.pem"}


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("null", None),
        ("2d", 172_900.0),
        ("1970-01-01T00:01:40Z", 100.0),
        ("1970-01-02 00:00Z", 86_400.0),
    ],
)
def test_deadlines(tmp_path: Path, text: str, after: float | None) -> None:
    (tmp_path / "study.yaml").write_text(f"name: eye\nhost: hub:1\ndeadline: {text}\n")
    settings = load_settings(tmp_path)
    assert settings.deadline_after(100.0) == after
    save_settings(settings, tmp_path)
    assert load_settings(tmp_path) == settings


def _start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "start", str(folder), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _listening(folder: Path) -> None:
    end = time.monotonic() + 60
    log = folder / "server.log"
    while not (log.exists() and "listens on" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.federation
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_cleanly_and_it_starts_again(
    folder: Path, number: int, code: int
) -> None:
    for _ in range(2):
        process = _start(folder)
        _listening(folder)
        second = subprocess.run(
            [*COMMAND, "start", str(folder)], capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 64
        assert f"(process {process.pid}) works in this folder" in second.stderr
        assert run("status", folder).stdout.startswith("study eye at 127.0.0.1")
        os.kill(process.pid, number)
        assert process.wait(30) == code
        (folder / "server.log").unlink()


@pytest.mark.federation
def test_it_runs_in_the_background_and_stops(folder: Path) -> None:
    started = subprocess.run(
        [*COMMAND, "start", str(folder), "--detach"], capture_output=True, text=True, timeout=60
    )
    assert started.returncode == 0, started.stderr
    host, _, port = (load_settings(folder).host or "").partition(":")
    socket.create_connection((host, int(port)), timeout=1).close()  # at once: it listens
    assert (folder / "server.log").stat().st_mode & 0o777 == 0o600
    assert "stopped" in run("stop", folder).stdout
    assert "not running" in run("stop", folder).stdout


@pytest.mark.federation
def test_what_keeps_it_from_listening_is_said_in_the_foreground(folder: Path) -> None:
    port = int((load_settings(folder).host or "").rpartition(":")[2])
    with socket.create_server(("0.0.0.0", port)):
        refused = run("start", folder, "--detach", code=78)
    assert f"0.0.0.0:{port}: cannot listen there (Address already in use)." in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.federation
def test_other_settings_and_names_are_refused_by_name(folder: Path) -> None:
    process = _start(folder)
    _listening(folder)
    process.terminate()
    process.wait(30)
    path = folder / "study.yaml"
    text = path.read_text()
    for old, new, says in (
        ("  seed: 0", "  seed: 1", "seed was 0 when this study began and is 1 now"),
        ("name: eye", "name: ear", "name was eye when this study began and is ear now"),
    ):
        path.write_text(text.replace(old, new))
        refused = subprocess.run(
            [*COMMAND, "start", str(folder)], capture_output=True, text=True, timeout=60
        )
        assert refused.returncode == 78, refused.stderr
        assert says in refused.stderr
