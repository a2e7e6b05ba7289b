"""What `status` and `roster` say of a study, from its files alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cropkt_server.lock import running
from cropkt_server.membership import Member, members_of, missing
from cropkt_server.roster import Roster
from cropkt_server.settings import load_settings
from cropkt_server.store import STAGES, State, Store, Task, read_tasks

ONLINE = 150.0  # seconds: the door notes a site once a minute


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatus:
    """One site."""

    site: str
    cancers: tuple[str, ...]
    state: Literal["enrolled", "invited", "expired", "revoked"]
    online: bool
    last_seen: float | None  # seconds since 1970
    done: int  # rows
    failed: int
    waiting: int
    held: int  # of these, answered, and wait for approval at the site
    expires: float | None  # of an invite that is open


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus:
    """The whole study."""

    study: str
    host: str | None
    state: Literal["running", "paused", "stopped", "finished", "incomplete"]
    pid: int | None
    stages: dict[str, dict[str, int]]
    sites: tuple[SiteStatus, ...]
    failed: dict[str, str]  # row to cause
    held: tuple[str, ...]  # rows that wait for approval at their site
    missing: dict[str, str]  # site to cause


def read_status(folder: Path) -> StudyStatus:
    """Return the state of a study, whether it runs or not.

    Raises:
        ConfigError: there is no study.
    """
    settings, pid = load_settings(folder), running(folder)
    roster = Roster(folder)
    try:
        members = members_of(roster)
        seen = {site.name: site.last_seen for site in roster.sites()}
        expires = {i.site: i.expires for i in roster.invitations() if i.used_at is None}
    finally:
        roster.close()
    store = Store(folder)
    try:
        closed, paused = store.closed, store.paused
    finally:
        store.close()
    tasks = read_tasks(folder)
    failed = {task.id: task.cause for task in tasks if task.state == "failed"}
    absent = missing(members, tasks)
    state: Literal["running", "paused", "stopped", "finished", "incomplete"]
    if closed:
        state = "incomplete" if failed or absent else "finished"
    elif paused:
        state = "paused"
    else:
        state = "running" if pid else "stopped"
    return StudyStatus(
        study=settings.name,
        host=settings.host,
        state=state,
        pid=pid,
        stages=_stages(tasks),
        sites=tuple(
            _site(member, tasks, seen.get(member.name), expires, up=pid is not None)
            for member in members
        ),
        failed=failed,
        held=tuple(task.id for task in tasks if task.state == "held"),
        missing=absent,
    )


def _stages(tasks: list[Task]) -> dict[str, dict[str, int]]:
    counts = Counter((task.kind, task.state) for task in tasks)
    states: tuple[State, ...] = ("due", "sent", "held", "done", "failed")
    return {kind: {state: counts[kind, state] for state in states} for kind in STAGES}


def _site(
    member: Member, tasks: list[Task], seen: float | None, expires: dict[str, float], *, up: bool
) -> SiteStatus:
    states = Counter(task.state for task in tasks if task.site == member.name)
    recent = seen is not None and time.time() - seen < ONLINE
    return SiteStatus(
        site=member.name,
        cancers=tuple(map(str, member.cancers or ())),
        state=member.state,
        online=up and recent and member.state == "enrolled",
        last_seen=seen,
        done=states["done"],
        failed=states["failed"],
        waiting=states["due"] + states["sent"] + states["held"],
        held=states["held"],
        expires=expires.get(member.name) if member.state == "invited" else None,
    )


def in_words(status: StudyStatus) -> Iterator[str]:
    """Yield the lines of `status`."""
    words = {
        "running": f"runs, process {status.pid}",
        "paused": "is paused" + (f", process {status.pid}" if status.pid else ", and does not run"),
        "stopped": "does not run",
        "finished": "is finished: every row is done",
        "incomplete": "is finished, but rows failed or sites are missing",
    }
    yield f"study {status.study} at {status.host} {words[status.state]}"
    yield from roster_lines(status)
    for stage, counts in status.stages.items():
        whole = sum(counts.values())
        if whole:
            failed = f", {counts['failed']} failed" if counts["failed"] else ""
            yield f"{stage.replace('_', ' ')}: {counts['done']} of {whole} done{failed}"
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
        parts = [f"{site.site} ({' '.join(site.cancers)}): {site.state}"]
        if site.state == "enrolled":
            parts.append("online" if site.online else f"last seen {_when(site.last_seen)}")
        if site.expires is not None:
            parts.append(f"until {_when(site.expires)}")
        if site.done + site.failed + site.waiting:
            failed = f", {site.failed} failed" if site.failed else ""
            held = f", {site.held} of them wait for approval there" if site.held else ""
            parts.append(f"{site.done} rows done{failed}, {site.waiting} to do{held}")
        yield ", ".join(parts)


def _when(at: float | None) -> str:
    return "never" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
