"""The SuperNode's keeper: what it passes on, what it says of an end, when it starts again."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from hypothesis import given
from hypothesis import strategies as st

from cropkt.errors import ConfigError, UsageError
from cropkt_client import supernode
from cropkt_client.log import LOG_NAME, Status, open_log, read_status
from cropkt_client.serve import locked, running
from cropkt_client.supernode import SuperNode, _quoted, settle_environment

REFUSED = "print('ERROR: Exit Code: 305'); print('[code: 2004] no'); raise SystemExit(1)"
CUT_OFF = "print('INFO : SuperNode terminated gracefully.')"
UNTRUSTED = "print('ERROR: SSL: CERTIFICATE_VERIFY_FAILED'); raise SystemExit(1)"
BROKEN = f"print('ERROR: [SSL: UNEXPECTED_EOF] EOF'); raise SystemExit({supernode.GAVE_UP})"
STAYS = "import time; print('INFO : up'); time.sleep(60)"


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1))
def test_flower_reads_any_path_as_it_is(path: str) -> None:
    try:
        quoted = _quoted(path)
    except ConfigError:
        assert "'" in path
        assert '"' in path or "\\" in path
        return
    assert parse_config_args([f"config={quoted} site='x'"]) == {"config": path, "site": "x"}


@pytest.fixture
def keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], tuple[SuperNode, list[str]]]]:
    nodes: list[SuperNode] = []

    def begin(code: str) -> tuple[SuperNode, list[str]]:
        monkeypatch.setattr(supernode, "_START", code)
        said: list[str] = []
        node = SuperNode(
            host="127.0.0.1:1",
            state=tmp_path,
            node_config={"config": "x"},
            report=said.append,
            barred=lambda: said.append("barred"),
        )
        nodes.append(node)
        return node, said

    yield begin
    for node in nodes:
        node.stop()


Keep = Callable[[str], tuple[SuperNode, list[str]]]


def _tend(node: SuperNode, until: Callable[[], object], *, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        node.tend()
        time.sleep(0.02)


def test_the_secret_is_this_users_alone(keep: Keep, tmp_path: Path) -> None:
    node, _ = keep(STAYS)
    file = tmp_path / "flower" / "executor.secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_bytes() == node.secret
    assert len(node.secret) == 32


def test_a_lingering_session_is_waited_for_quietly_but_not_for_ever(
    keep: Keep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supernode, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(supernode, "LONGEST_WAIT_FOR_SESSION", 0.05)
    node, said = keep(REFUSED)
    with caplog.at_level(logging.INFO):
        _tend(node, lambda: "waiting for its end" in caplog.text)
        assert said == []
        assert not [
            r for r in caplog.records if r.levelno > logging.INFO and r.name == "cropkt.client"
        ]
        monkeypatch.setattr(supernode, "SESSION", 0.2)
        _tend(node, lambda: said)
    assert "revoked" in said[0]


def test_the_cause_of_an_end_is_reported_and_it_starts_again(
    keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "FIRST_WAIT", 0.05)
    node, said = keep(UNTRUSTED)
    _tend(node, lambda: len(said) == 2)
    assert "certificate is not trusted" in said[0]
    assert node.address is None
    monkeypatch.setattr(supernode, "_START", STAYS)
    _tend(node, lambda: node.address)
    first = node.pid
    assert first is not None
    os.kill(first, 9)
    _tend(node, lambda: node.pid not in (None, first))
    assert "code -9" in said[-1]


def test_a_site_that_was_cut_off_is_told(keep: Keep) -> None:
    node, said = keep(CUT_OFF)
    _tend(node, lambda: said)
    assert "revoked" in said[0]
    assert said[1:] == ["barred"]


def test_a_broken_handshake_is_no_untrusted_certificate(keep: Keep) -> None:
    node, said = keep(BROKEN)
    _tend(node, lambda: said)
    assert "connection to the coordinator broke" in said[0]
    assert len(said) == 1


def test_each_failure_is_waited_for_longer(keep: Keep) -> None:
    node, _ = keep(REFUSED)
    _tend(node, lambda: node._wait == 2 * supernode.FIRST_WAIT)
    assert node._due > time.monotonic() + 1


def test_two_clients_cannot_hold_one_state_folder(tmp_path: Path) -> None:
    assert running(tmp_path) is None
    with locked(tmp_path):
        assert running(tmp_path) == os.getpid()
        with pytest.raises(UsageError, match=f"process {os.getpid()}"), locked(tmp_path):
            pass
    assert running(tmp_path) is None


def test_the_proxy_never_catches_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("no_proxy", "intra.example,localhost")
    settle_environment(tmp_path)
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "intra.example,localhost,127.0.0.1"
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_HOME"] == str(tmp_path / "flower")


@pytest.fixture
def _logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("_logging")
def test_the_log_rotates_and_stays_private(tmp_path: Path) -> None:
    path = open_log(tmp_path, terminal=False, size=500, files=2)
    for number in range(40):
        logging.getLogger("cropkt.client").info("line %d", number)
    found = sorted(tmp_path.glob(f"{LOG_NAME}*"))
    assert [file.name for file in found] == [LOG_NAME, f"{LOG_NAME}.1", f"{LOG_NAME}.2"]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in found)
    assert "line 39" in path.read_text()


def test_the_status_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = Status(tmp_path, site="lumc", study="eye")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cropkt_client.log.write_private", full)
    status.working("train.expert")
    assert status.state.task == "train.expert"
    told = read_status(tmp_path)
    assert told is not None
    assert told.task is None
