"""What `status`, `roster` and the board say of a study, from its files alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cropkt_server.lock import last_beat, running
from cropkt_server.membership import Member, Named, members_of, missing
from cropkt_server.roster import Roster, Traffic
from cropkt_server.settings import load_settings
from cropkt_server.store import STAGES, State, Store, Task

ONLINE = 150.0  # seconds: the door notes a site once a minute
SILENT = 60.0  # seconds: a coordinator gives a sign of life every five

Whole = Literal["running", "silent", "paused", "stopped", "finished", "incomplete", "simulation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatus:
    """One site."""

    site: str
    cancers: tuple[str, ...]
    state: Literal["enrolled", "invited", "expired", "revoked", "simulated"]
    online: bool
    last_seen: float | None  # seconds since 1970
    doing: str | None  # the row that it was sent and has not answered, while the study runs
    since: float | None  # seconds since 1970, of `doing`
    contributed: tuple[str, ...]  # cancers whose expert it gave
    done: int  # rows
    failed: int
    waiting: int
    held: int  # of these, answered, and wait for approval at the site
    causes: dict[str, str]  # row that failed to cause
    expires: float | None  # of an invite that is open
    received: int | None  # bytes from it; None: nobody counted
    sent: int | None  # bytes to it


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus:
    """The whole study."""

    study: str
    host: str | None
    state: Whole
    pid: int | None
    answered: float | None  # the coordinator's last sign of life, in seconds since 1970
    problem: str  # why a study that is over has not succeeded; nothing if it has
    stages: dict[str, dict[str, int]]
    sites: tuple[SiteStatus, ...]
    failed: dict[str, str]  # row to cause
    held: tuple[str, ...]  # rows that wait for approval at their site
    missing: dict[str, str]  # site to cause
    waits: str  # why it goes no further though everything asked is answered; nothing if it does
    received: int | None  # bytes from all sites; None: nobody counted
    sent: int | None

    @property
    def good(self) -> bool:
        """Whether it has succeeded, or runs and nothing has failed."""
        up = self.pid is not None and self.state != "silent"
        return self.state == "finished" or (up and not self.failed)


def read_status(folder: Path) -> StudyStatus:
    """Return the state of a study, whether it runs or not; nothing in its folder changes.

    Raises:
        ConfigError: there is no study.
    """
    settings, pid = load_settings(folder), running(folder)
    with closing(Roster(folder, read_only=True)) as roster:
        simulated = bool(settings.sites)
        members = Named(settings.sites).members() if simulated else members_of(roster)
        seen = {site.name: site.last_seen for site in roster.sites()}
        expires = {i.site: i.expires for i in roster.invitations() if i.used_at is None}
        traffic = roster.traffic()
    with closing(Store(folder, read_only=True)) as store:
        closed, paused, tasks = store.closed, store.paused, store.tasks()
        bank = json.loads(store.meta("decided/bank") or "[]")
        gathered = store.meta("decided/gathered") is not None
    failed = {task.id: task.cause for task in tasks if task.state == "failed"}
    absent = missing(members, tasks)
    over = closed or (simulated and bool(tasks) and all(task.settled for task in tasks))
    problem = _problem(failed, absent, bank) if over else ""
    beat = last_beat(folder)
    sites = tuple(
        _site(
            member,
            [task for task in tasks if task.site == member.name],
            seen=seen.get(member.name),
            expires=expires,
            traffic=traffic.get(member.name),
            up=not over and (simulated or pid is not None),
            simulated=simulated,
        )
        for member in members
    )
    state: Whole
    if over:
        state = "incomplete" if problem else "finished"
    elif simulated:
        state = "simulation"
    elif pid is not None and beat is not None and time.time() - beat > SILENT:
        state = "silent"
    elif paused:
        state = "paused"
    else:
        state = "stopped" if pid is None else "running"
    return StudyStatus(
        study=settings.name,
        host=settings.host,
        state=state,
        pid=pid,
        answered=beat,
        problem=problem,
        stages=_stages(tasks),
        sites=sites,
        failed=failed,
        held=tuple(task.id for task in tasks if task.state == "held"),
        missing=absent,
        waits="" if over or simulated or gathered else _waits(tasks, settings.min_sites),
        received=sum(one.received for one in traffic.values()) if traffic else None,
        sent=sum(one.sent for one in traffic.values()) if traffic else None,
    )


def _waits(tasks: list[Task], min_sites: int) -> str:
    """Return what sites are lacking before experts are shared; nothing while some work."""
    described = sum(task.kind == "describe" and task.state == "done" for task in tasks)
    if not tasks or described >= min_sites or not all(task.settled for task in tasks):
        return ""
    return (
        f"{described} of {min_sites} sites (min_sites) have described themselves; "
        "retry what failed, invite more, or lower min_sites in study.yaml and start again"
    )


def _problem(failed: Mapping[str, str], absent: Mapping[str, str], bank: list[str]) -> str:
    """Return what keeps a study that is over from having succeeded; nothing if it did."""
    problems = [f"{len(failed)} {'row' if len(failed) == 1 else 'rows'} failed"] if failed else []
    if absent:
        are = "site is" if len(absent) == 1 else "sites are"
        problems.append(f"{len(absent)} {are} missing")
    lack = nothing_to_transfer(len(bank))
    problems += [lack] if lack else []
    return ", ".join(problems)


def nothing_to_transfer(bank: int) -> str:
    """Return why experts of so many cancers help nobody; nothing if they may."""
    return "" if bank > 1 else "fewer than two cancers have an expert: nothing to transfer"


def _stages(tasks: Iterable[Task]) -> dict[str, dict[str, int]]:
    counts = Counter((task.kind, task.state) for task in tasks)
    states: tuple[State, ...] = ("due", "sent", "held", "done", "failed")
    return {kind: {state: counts[kind, state] for state in states} for kind in STAGES}


def _site(
    member: Member,
    tasks: list[Task],
    *,
    seen: float | None,
    expires: Mapping[str, float],
    traffic: Traffic | None,
    up: bool,
    simulated: bool,
) -> SiteStatus:
    states = Counter(task.state for task in tasks)
    recent = seen is not None and time.time() - seen < ONLINE
    under_way = next((task for task in tasks if up and task.state == "sent"), None)
    given = {t.cancer for t in tasks if t.kind == "fit_expert" and t.state == "done" and t.cancer}
    described = {task.cancer for task in tasks if task.cancer}
    return SiteStatus(
        site=member.name,
        cancers=tuple(map(str, member.cancers or sorted(described))),
        state="simulated" if simulated else member.state,
        online=up and recent and member.state == "enrolled" and not simulated,
        last_seen=seen,
        doing=under_way.id if under_way else None,
        since=under_way.changed if under_way else None,
        contributed=tuple(sorted(map(str, given))),
        done=states["done"],
        failed=states["failed"],
        waiting=states["due"] + states["sent"] + states["held"],
        held=states["held"],
        causes={task.id: task.cause for task in tasks if task.state == "failed"},
        expires=expires.get(member.name) if member.state == "invited" else None,
        received=traffic.received if traffic else None,
        sent=traffic.sent if traffic else None,
    )
