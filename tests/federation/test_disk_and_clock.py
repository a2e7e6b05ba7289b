"""A disk that fills up, on either side, and clocks that are ten minutes apart."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cropkt.cancers import Cancer
from cropkt_client.log import read_status

pytestmark = pytest.mark.timeout(600)
SITES = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM}
FULL = 74  # exit code
BALLAST = "ballast"
SKEW = 600  # seconds
SHIFTED = """
import datetime, os, time
import pandas  # while it can still see the real class: its C code ends the process otherwise
ahead = float(os.environ["CLOCK_AHEAD"])
true_time, true_datetime = time.time, datetime.datetime
class Shifted(true_datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(true_time() + ahead, tz)
    @classmethod
    def utcnow(cls):
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)
time.time = lambda: true_time() + ahead
datetime.datetime = Shifted
"""

Small = Callable[[Path], None]


@pytest.fixture
def small_disk() -> Iterator[Small]:
    """Give a folder a disk of its own, of 16 MB."""
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "cropkt-test", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        if done.returncode:
            pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no byte free."""
    with (folder / BALLAST).open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def torn(folder: Path) -> list[str]:
    """Return what a write that was cut off has left, and the databases that are damaged."""
    left = [str(path) for path in folder.rglob(".*.*") if path.is_file()]
    for path in folder.rglob("*.sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as database:
            if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                left.append(str(path))
    return left


def say(text: str) -> None:
    sys.stderr.write(f"\n{text}\n")


def shown(log: Path) -> str:
    """Return what a process has written on its terminal."""
    return log.read_text() if log.exists() else ""


def prepare(federation: Any) -> dict[str, Any]:
    """Set two hospitals up; return what their study gives undisturbed."""
    for seed, (site, cancer) in enumerate(SITES.items()):
        federation.add_site(site, cancer, seed=seed)
    return dict(federation.simulated(SITES))


def some_expert(federation: Any) -> bool:
    return any(t.kind == "fit_expert" and t.state == "done" for t in federation.tasks())


def test_a_full_disk_stops_the_coordinator_and_costs_nothing(
    federation: Any, small_disk: Small
) -> None:
    expected = prepare(federation)
    small_disk(federation.study)
    federation.init(min_sites=2)
    coordinator, _ = federation.serve_all(SITES, "--linger", "0")
    federation.until(lambda: some_expert(federation))
    filled = time.monotonic()
    fill(federation.study)
    assert coordinator.wait(120) == FULL, federation.logs()
    say(f"coordinator: stopped {time.monotonic() - filled:.0f} s after its disk was full")
    lines = [line for line in shown(federation.folder / "server.log").splitlines() if line]
    assert lines[-1].startswith(f"cropkt-server: {federation.study}: no space is left on its disk.")
    assert "Traceback" not in "\n".join(lines)
    fill(federation.study)  # what the databases gave back when they were closed
    again = federation.start("--linger", "0")
    assert again.wait(60) == FULL, federation.logs()

    (federation.study / BALLAST).unlink()
    assert not torn(federation.study)
    freed = time.monotonic()
    coordinator = federation.start("--linger", "0")
    assert coordinator.wait(200) == 0, federation.logs()
    say(f"coordinator: finished {time.monotonic() - freed:.0f} s after there was space")
    assert not federation.differences(federation.results(), expected)


def test_a_full_disk_holds_a_client_up_and_costs_nothing(
    federation: Any, small_disk: Small
) -> None:
    expected = prepare(federation)
    federation.init(min_sites=2)
    state, log = federation.state("eye-clinic"), federation.folder / "eye-clinic.log"
    small_disk(state)
    coordinator = federation.start("--linger", "0")
    for site, cancer in SITES.items():
        federation.enrol(site, federation.invite(site, cancer))
    fill(state)
    client = federation.serve("eye-clinic", Cancer.UVM)
    assert client.wait(60) == FULL, federation.logs()
    (line,) = [line for line in shown(log).splitlines() if line.startswith("cropkt-client: ")]
    assert "no space is left on a disk" in line

    (state / BALLAST).unlink()
    clients = [federation.serve(site, cancer) for site, cancer in SITES.items()]
    federation.until(lambda: "train.expert: begins" in shown(log))
    fill(state)
    filled = time.monotonic()
    federation.until(lambda: "train.expert: state: no space is left on its disk" in shown(log))
    say(f"client: said so {time.monotonic() - filled:.0f} s after its disk was full")
    time.sleep(15)  # it asks again, in vain
    assert all(client.poll() is None for client in clients)
    assert not [t for t in federation.tasks() if t.state == "failed"]
    (state / BALLAST).unlink()
    assert not torn(state)
    freed = time.monotonic()
    assert coordinator.wait(200) == 0, federation.logs()
    say(f"client: the study was finished {time.monotonic() - freed:.0f} s after there was space")
    assert not federation.differences(federation.results(), expected)


@pytest.mark.parametrize("ahead", [SKEW, -SKEW], ids=["ahead", "behind"])
def test_a_clock_that_is_off_by_ten_minutes_changes_nothing(federation: Any, ahead: int) -> None:
    expected = prepare(federation)
    env = federation.customised(SHIFTED, CLOCK_AHEAD=str(ahead))
    federation.init(min_sites=2)
    coordinator = federation.start("--linger", "0")
    began = time.monotonic()
    for site, cancer in SITES.items():
        federation.enrol(site, federation.invite(site, cancer))
        federation.serve(site, cancer, env=env if cancer == Cancer.UVM else None)
    assert coordinator.wait(200) == 0, federation.logs()
    say(f"clock {ahead:+d} s: the study was finished after {time.monotonic() - began:.0f} s")
    told = read_status(federation.state("eye-clinic"))
    assert told is not None
    assert abs(told.since - time.time() - ahead) < 300, "the client's clock was not shifted"
    log = shown(federation.folder / "eye-clinic.log")
    said = re.search(r"this clock is ([+-]\d+) s from", log)
    assert said, log
    assert abs(int(said[1]) - ahead) <= 5  # the other clock is told in whole seconds
    assert not federation.differences(federation.results(), expected)
