"""What is said of a study: registered is not online is not contributed."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from cropkt.cancers import Cancer
from cropkt_server import lock
from cropkt_server.progress import shown
from cropkt_server.roster import Roster, Traffic
from cropkt_server.settings import Settings, save_settings
from cropkt_server.status import SILENT, StudyStatus, read_status
from cropkt_server.store import Store, Task
from cropkt_server.words import in_words, row_words, show, size

Enrol = Callable[[str], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_settings(Settings(name="eye", host="localhost:1"), tmp_path)
    Store(tmp_path).close()
    Roster(tmp_path).close()
    return tmp_path


@pytest.fixture
def enrol(folder: Path) -> Enrol:
    def enrol(site: str) -> None:
        with closing(Roster(folder)) as roster:
            roster.enrol(
                token=roster.invite(site, [Cancer.UVM], 4e9),
                site=site,
                node_key=f"key of {site}",
                signing_key="x",
                register=lambda key, name: len(name),
            )

    return enrol


@pytest.fixture
def running(folder: Path) -> Iterator[None]:
    with lock.locked(folder):
        yield


def of(folder: Path, site: str) -> tuple[StudyStatus, str]:
    status = read_status(folder)
    (line,) = [line for line in in_words(status) if line.startswith(f"{site} (")]
    return status, line


@pytest.mark.usefixtures("running")
def test_registered_is_not_online_is_not_contributed(folder: Path, enrol: Enrol) -> None:
    enrol("lumc")
    status, line = of(folder, "lumc")
    assert not status.sites[0].online
    assert line == "lumc (UVM): enrolled, last seen never, gave no expert yet"
    with closing(Roster(folder)) as roster:
        roster.seen("lumc")
    status, line = of(folder, "lumc")
    assert status.sites[0].online
    assert line == "lumc (UVM): enrolled, online, gave no expert yet"
    task = Task(kind="fit_expert", site="lumc", cancer=Cancer.UVM)
    with closing(Store(folder)) as store:
        store.add([task])
        store.sent(task)
    status, line = of(folder, "lumc")
    assert status.sites[0].since == pytest.approx(time.time(), abs=5)
    assert "online, at work on fit expert UVM since 2" in line
    with closing(Store(folder)) as store:
        store._set(task, "done", "")
    assert "gave UVM" in of(folder, "lumc")[1]


def test_nobody_works_or_is_online_while_the_coordinator_is_away(
    folder: Path, enrol: Enrol
) -> None:
    enrol("lumc")
    task = Task(kind="fit_expert", site="lumc", cancer=Cancer.UVM)
    with closing(Store(folder)) as store, closing(Roster(folder)) as roster:
        roster.seen("lumc")
        store.add([task])
        store.sent(task)
    status, line = of(folder, "lumc")
    assert not status.sites[0].online
    assert status.sites[0].doing is None
    assert "at work" not in line


def test_a_coordinator_that_is_gone_gives_no_answer_since_its_last_sign(folder: Path) -> None:
    with lock.locked(folder):
        os.utime(folder / "server.lock", (1.0, 1_700_000_000.0))
        assert read_status(folder).state == "silent"
        assert not read_status(folder).good
        lock.beat(folder)
        assert read_status(folder).state == "running"
        os.utime(folder / "server.lock", (1.0, time.time() - SILENT / 2))
        assert read_status(folder).state == "running"
    os.utime(folder / "server.lock", (1.0, 1_700_000_000.0))
    status = read_status(folder)
    assert (status.state, status.pid) == ("stopped", None)
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(1_700_000_000))
    assert next(iter(in_words(status))).endswith(f"does not run: no answer since {day}")


def test_a_study_that_is_over_is_finished_only_if_nothing_is_missing(
    folder: Path, enrol: Enrol
) -> None:
    with closing(Store(folder)) as store:
        store.close_study()
    assert (
        read_status(folder).problem == "fewer than two cancers have an expert: nothing to transfer"
    )
    with closing(Store(folder)) as store:
        store.set_meta("decided/bank", '["UVM", "SKCM"]')
    assert read_status(folder).state == "finished"
    enrol("lumc")
    status = read_status(folder)
    assert (status.state, status.problem, status.good) == (
        "incomplete",
        "1 site is missing",
        False,
    )
    assert not any("finished" in line for line in in_words(status))


def test_a_study_that_a_site_was_revoked_from_is_not_finished(folder: Path, enrol: Enrol) -> None:
    enrol("lumc")
    with closing(Store(folder)) as store:
        rows = [Task(kind="describe", site="lumc")]
        rows += [Task(kind="fit_expert", site="lumc", cancer=Cancer.UVM)]
        store.add(rows)
        for row in rows:
            store.done(row)
        store.set_meta("decided/bank", '["UVM", "SKCM"]')
        store.close_study()
    assert read_status(folder).state == "finished"
    with closing(Roster(folder)) as roster:
        roster.revoke("lumc")
    status = read_status(folder)
    assert (status.state, status.problem) == ("incomplete", "1 site is missing")
    assert "missing: lumc: revoked before it was finished" in list(in_words(status))


def test_a_study_that_waits_for_more_sites_says_so(folder: Path, enrol: Enrol) -> None:
    save_settings(Settings(name="eye", host="localhost:1", min_sites=2), folder)
    for site in ("lumc", "ucl"):
        enrol(site)
    ones = [Task(kind="describe", site=site) for site in ("lumc", "ucl")]
    lines: list[str] = []
    with closing(Store(folder)) as store:
        store.add(ones)
        store._set(ones[0], "done", "")
        assert read_status(folder).waits == ""  # the other one is at work
        store._set(ones[1], "failed", "data")
        waits = read_status(folder).waits
        assert waits.startswith("1 of 2 sites (min_sites) have described themselves; retry")
        assert f"waits for more sites: {waits}" in list(in_words(read_status(folder)))
        with shown(folder, Console(file=io.StringIO()), say=lines.append):
            deadline = time.monotonic() + 10
            while not any("waits" in line for line in lines) and time.monotonic() < deadline:
                time.sleep(0.05)
        assert lines.count(f"The study waits for more sites: {waits}") == 1
        store._set(ones[1], "done", "")
    assert read_status(folder).waits == ""


def test_bytes_are_added_up_over_restarts(folder: Path, enrol: Enrol) -> None:
    enrol("lumc")
    assert read_status(folder).received is None
    for _ in range(2):
        with closing(Roster(folder)) as roster:
            roster.seen("lumc", Traffic(received=1_500_000, sent=2_000))
    status, line = of(folder, "lumc")
    assert (status.sites[0].received, status.sites[0].sent) == (3_000_000, 4_000)
    assert line.endswith("3.0 MB in, 4.0 kB out")
    assert "bytes: 3.0 MB in, 4.0 kB out" in list(in_words(status))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_600, "100 kB"), (2.5e13, "25.0 TB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_rows_in_words() -> None:
    assert row_words("fit_expert/lumc/UVM/0") == "fit expert UVM at lumc"
    assert row_words("fit_expert/lumc/UVM/2", "lumc") == "fit expert UVM, round 2"
    assert row_words("describe/lumc") == "describe at lumc"
    assert row_words("describe/</b>/x") == "describe at </b>/x"


@pytest.mark.usefixtures("running")
def test_the_terminal_says_the_same_as_the_lines(folder: Path, enrol: Enrol) -> None:
    enrol("lumc")
    with closing(Roster(folder)) as roster:
        roster.invite("amc", [Cancer.SKCM], time.time() + 60)
        roster.seen("lumc", Traffic(7, 8))
    task = Task(kind="fit_expert", site="lumc", cancer=Cancer.UVM)
    with closing(Store(folder)) as store:
        store.add([task])
        store.failed(task, "out of [bold]memory[/bold]")
    status, screen = read_status(folder), io.StringIO()
    show(status, Console(file=screen, force_terminal=True, width=400, color_system=None))
    shown = " ".join(screen.getvalue().split())
    for line in in_words(status):
        for part in line.replace("): ", "), ").split(", "):
            assert part in shown, part


def test_reading_a_study_changes_no_byte_of_it(folder: Path) -> None:
    def state() -> dict[str, tuple[bytes, int]]:
        return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*.sqlite")}

    (folder / "bank.sqlite").unlink()
    before = state()
    read_status(folder)
    assert state() == before
    assert not (folder / "bank.sqlite").exists()


def test_a_simulation_lists_its_sites(tmp_path: Path) -> None:
    save_settings(Settings(name="sim", sites=("a", "b")), tmp_path)
    status = read_status(tmp_path)
    assert [(site.site, site.state) for site in status.sites] == [
        ("a", "simulated"),
        ("b", "simulated"),
    ]
    assert status.state == "simulation"
    assert {path.name for path in tmp_path.iterdir()} == {"study.yaml"}
