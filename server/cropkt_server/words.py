"""A study's status in words: the lines of `status`, its tables on a terminal, and the board's."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cropkt_server.status import SiteStatus, StudyStatus

_COLOURS = {"finished": "green", "running": "green", "paused": "yellow", "simulation": "cyan"}


@dataclass(frozen=True, slots=True)
class SiteWords:
    """What is said of one site; an empty text where there is nothing to say."""

    state: str  # on the roster
    presence: str
    doing: str
    given: str
    rows: str
    traffic: str


def state_of(status: StudyStatus) -> str:
    """Return what a study does, as what follows its name."""
    silent = no_answer(status)
    return {
        "running": f"runs, process {status.pid}",
        "silent": f"has process {status.pid}, but {silent}",
        "paused": "is paused"
        + (f", process {status.pid}" if status.pid else f", and does not run{_since(silent)}"),
        "stopped": f"does not run{_since(silent)}",
        "finished": "is finished: every row is done",
        "incomplete": f"is over, but not complete: {status.problem}",
        "simulation": "is a simulation: only cropkt-sim knows whether it runs",
    }[status.state]


def no_answer(status: StudyStatus) -> str:
    """Return since when the coordinator has been gone; nothing if it is there, or not awaited."""
    gone = status.pid is None or status.state == "silent"
    over = status.state in ("finished", "incomplete", "simulation")
    if not gone or over or status.answered is None:
        return ""
    return f"no answer since {when(status.answered)}"


def site_words(site: SiteStatus) -> SiteWords:
    """Return what is said of one site."""
    presence = ""
    if site.state == "enrolled":
        presence = "online" if site.online else f"last seen {when(site.last_seen)}"
    elif site.expires is not None:
        presence = f"until {when(site.expires)}"
    doing = ""
    if site.doing:
        here = site.online or site.state == "simulated"
        how, link = ("at work on", "since") if here else ("was sent", "at")
        doing = f"{how} {row_words(site.doing, site.site)} {link} {when(site.since)}"
    given = f"gave {' '.join(site.contributed)}" if site.contributed else ""
    if not given and site.state in ("enrolled", "revoked", "simulated"):
        given = "gave no expert yet" if site.state != "revoked" else "gave no expert"
    rows = ""
    if site.done + site.failed + site.waiting:
        failed = f", {site.failed} failed" if site.failed else ""
        held = f", {site.held} of them wait for approval there" if site.held else ""
        rows = f"{site.done} rows done{failed}, {site.waiting} to do{held}"
    return SiteWords(
        state=site.state,
        presence=presence,
        doing=doing,
        given=given,
        rows=rows,
        traffic=traffic_words(site.received, site.sent),
    )


def traffic_words(received: int | None, sent: int | None) -> str:
    """Return bytes in and out, as the coordinator sees them; nothing if nobody counted."""
    if received is None or sent is None:
        return ""
    return f"{size(received)} in, {size(sent)} out"


def row_words(row: str, site: str = "") -> str:
    """Return a row's name for a reader; without its site if that is named beside it."""
    kind, _, rest = row.partition("/")
    found = re.fullmatch(r"(.+)/([A-Z]+)/(\d+)", rest)  # of a cancer, where a row is of one
    whose, cancer, number = found.groups() if found else (rest, "", "0")
    what = f"{kind.replace('_', ' ')} {cancer}".rstrip()
    what += "" if site else f" at {whose}"
    return what if number == "0" else f"{what}, round {number}"


def in_words(status: StudyStatus) -> Iterator[str]:
    """Yield the lines of `status`."""
    yield f"study {status.study} at {status.host or 'no address'} {state_of(status)}"
    yield from roster_lines(status)
    for stage, line in stage_lines(status):
        yield f"{stage}: {line}"
    if words := traffic_words(status.received, status.sent):
        yield f"bytes: {words}"
    yield from trouble(status)


def stage_lines(status: StudyStatus) -> Iterator[tuple[str, str]]:
    """Yield each stage that has rows, and how far it is."""
    for stage, counts in status.stages.items():
        whole = sum(counts.values())
        if whole:
            failed = f", {counts['failed']} failed" if counts["failed"] else ""
            yield stage.replace("_", " "), f"{counts['done']} of {whole} done{failed}"


def trouble(status: StudyStatus) -> Iterator[str]:
    """Yield a line for all that waits or failed and for each site that is missing."""
    if status.waits:
        yield f"waits for more sites: {status.waits}"
    for row in status.held:
        yield f"waits for approval at the site: {row}"
    for row, cause in status.failed.items():
        yield f"failed: {row}: {cause}"
    for site, cause in status.missing.items():
        yield f"missing: {site}: {cause}"


def roster_lines(status: StudyStatus) -> Iterator[str]:
    """Yield a line a site."""
    if not status.sites:
        yield "nobody is invited yet"
    for site in status.sites:
        words = site_words(site)
        parts = [f"{site.site} ({' '.join(site.cancers)}): {words.state}", words.presence]
        parts += [words.doing, words.given, words.rows, words.traffic]
        yield ", ".join(part for part in parts if part)


def show(status: StudyStatus, console: Console) -> None:
    """Print the status as tables; the same words as its lines."""
    head = Text.assemble(
        (f"study {status.study}", "bold"),
        f" at {status.host or 'no address'} ",
        (state_of(status), _COLOURS.get(status.state, "red")),
    )
    console.print(head)
    if not status.sites:
        console.print("nobody is invited yet")
    else:
        console.print(_table(status))
    for stage, line in stage_lines(status):
        console.print(Text(f"{stage}: {line}", "red" if "failed" in line else ""))
    if words := traffic_words(status.received, status.sent):
        console.print(Text(f"bytes: {words}"))
    for line in trouble(status):
        console.print(Text(line, "red" if line.startswith("failed") else "yellow"))


def _table(status: StudyStatus) -> Table:
    said = [(site, site_words(site)) for site in status.sites]
    heads = ("site", "state", "presence", "at work", "expert", "rows", "bytes")
    texts = [
        (
            f"{site.site} ({' '.join(site.cancers)})",
            words.state,
            words.presence,
            words.doing,
            words.given,
            words.rows,
            words.traffic,
        )
        for site, words in said
    ]
    table = Table(box=box.SIMPLE, pad_edge=False)
    shown = [i for i in range(len(heads)) if any(row[i] for row in texts)]
    for i in shown:
        table.add_column(heads[i], overflow="fold")
    for (site, _), row in zip(said, texts, strict=True):
        style = "green" if site.online else "red" if site.failed else ""
        table.add_row(*(Text(row[i], style if i < 3 else "") for i in shown))
    return table


def when(at: float | None) -> str:
    """Return a time of this machine's clock, or never."""
    return "never" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def size(count: int) -> str:
    """Return a number of bytes with its unit, powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _since(silent: str) -> str:
    return f": {silent}" if silent else ""
