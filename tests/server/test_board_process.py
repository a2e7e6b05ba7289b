"""The board as a process: alone, and beside a coordinator that it never disturbs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from cropkt_server.cli import app
from cropkt_server.lock import running

COMMAND = [sys.executable, "-c", "from cropkt_server.cli import main; main()"]
LONG = 90.0  # seconds


def until(reached: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LONG
    while not reached():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Return whether a board is there and opens to its token."""
    try:
        with httpx.Client(follow_redirects=True, trust_env=False) as client:
            return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments = ["init", str(tmp_path / "study"), "--study", "eye", "--host", f"127.0.0.1:{port}"]
    arguments += ["--encoder", "UNI2-h"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return tmp_path / "study"


@pytest.fixture
def begin(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return what starts a command of this study."""
    begun: list[subprocess.Popen[str]] = []

    def begin(command: str, *options: str) -> subprocess.Popen[str]:
        begun.append(
            subprocess.Popen(
                [*COMMAND, command, str(folder), *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def test_it_runs_alone_and_prints_its_address(begin: Callable[..., subprocess.Popen[str]]) -> None:
    process = begin("board", "--port", "0")
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    assert answers(url)
    with httpx.Client(trust_env=False) as client:
        assert client.get(url.partition("?")[0]).status_code == 401
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--host", "hub.example.org"], 64, "--host: 'hub.example.org' is no address"),
        (["--host", "192.0.2.1"], 78, "192.0.2.1:8765: cannot listen there"),
    ],
)
def test_where_it_cannot_listen_is_one_line(
    folder: Path, options: list[str], code: int, says: str
) -> None:
    result = CliRunner().invoke(app, ["board", str(folder), *options])
    assert result.exit_code == code
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.federation
def test_it_comes_and_goes_with_the_coordinator(
    folder: Path, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    coordinator = begin("start", "--board=0")
    url = folder / "board.url"
    until(url.exists, "the board came up")
    assert url.stat().st_mode & 0o777 == 0o600
    address = url.read_text().strip()
    assert answers(address)
    assert address.partition("=")[2] not in (folder / "server.log").read_text()
    until(lambda: "listens on" in (folder / "server.log").read_text(), "the coordinator came up")
    coordinator.terminate()
    assert coordinator.wait(60) == 143
    assert not answers(address)
    assert not url.exists()


@pytest.mark.federation
def test_a_board_that_is_killed_or_cannot_listen_stops_no_study(
    folder: Path, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    log = folder / "server.log"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        coordinator = begin("start", f"--board={taken.getsockname()[1]}")
        until(lambda: log.exists() and "cannot listen there" in log.read_text(), "it said so")
        until(lambda: "the board has ended with code 78" in log.read_text(), "the board ended")
        assert running(folder) == coordinator.pid
        coordinator.terminate()
        assert coordinator.wait(60) == 143
    coordinator = begin("start", "--board=0")
    until((folder / "board.url").exists, "the board came up")
    (child,) = [
        each for each in psutil.Process(coordinator.pid).children() if "board" in each.cmdline()
    ]
    child.kill()
    until(lambda: "the board has ended with code -9" in log.read_text(), "it was noticed")
    time.sleep(1)
    assert running(folder) == coordinator.pid


@pytest.mark.federation
def test_a_coordinator_that_is_killed_leaves_no_board_behind(
    folder: Path, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    coordinator = begin("start", "--board=0")
    until((folder / "board.url").exists, "the board came up")
    address = (folder / "board.url").read_text().strip()
    os.kill(coordinator.pid, signal.SIGKILL)
    until(lambda: not answers(address), "the board ended, too")


@pytest.mark.federation
def test_in_the_background_it_says_where_the_board_is(folder: Path) -> None:
    started = subprocess.run(
        [*COMMAND, "start", str(folder), "--detach", "--board=0"],
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    try:
        assert started.returncode == 0, started.stderr
        assert answers(started.stdout.partition("the board: ")[2].strip())
    finally:
        assert CliRunner().invoke(app, ["stop", str(folder)]).exit_code == 0
    assert not (folder / "board.url").exists()
