"""Who takes part, and which node is which site.

In a simulation the nodes themselves say who they are. In a deployed study only the roster counts:
a site is the node that it enrolled as, whatever that node says of itself.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from cropkt.cancers import Cancer
from cropkt_server.roster import Roster
from cropkt_server.store import Task

_ANSWERED = ("held", "done", "failed")  # of a description


@dataclass(frozen=True, slots=True)
class Member:
    """One site as the coordinator knows it before it describes itself."""

    name: str
    cancers: tuple[Cancer, ...] | None = None  # None: only the site itself knows
    state: Literal["enrolled", "invited", "expired", "revoked"] = "enrolled"
    key: str | None = None  # base64 of its Ed25519 key; None, in a simulation: the first it shows


class Membership(Protocol):
    """Where a dispatcher learns whom to ask."""

    def members(self) -> tuple[Member, ...]:
        """Return every site, as of now."""

    def site_of(self, node: int) -> str | None:
        """Return the site that a node is; None if it is none of this study's."""


class Named:
    """A simulation's sites: fixed, and a node is the site that it says it is."""

    def __init__(self, sites: Iterable[str]) -> None:
        self._members = tuple(Member(site) for site in sites)
        self._site_of: dict[int, str] = {}

    def members(self) -> tuple[Member, ...]:
        """Return the sites."""
        return self._members

    def site_of(self, node: int) -> str | None:
        """Return what the node said."""
        return self._site_of.get(node)

    def learn(self, node: int, site: str) -> None:
        """The node said so."""
        self._site_of[node] = site


class Enrolled:
    """The sites of a roster."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self._roster = Roster(folder, read_only=read_only)

    def close(self) -> None:
        """Close the roster."""
        self._roster.close()

    def members(self) -> tuple[Member, ...]:
        """Return the sites that enrolled or were invited; not those whose invite was withdrawn."""
        return members_of(self._roster)

    def site_of(self, node: int) -> str | None:
        """Return the site of a node; None if nobody enrolled it, or its site is revoked."""
        return self._roster.site_of(node)


def members_of(roster: Roster) -> tuple[Member, ...]:
    """Return the members in a roster, by name."""
    now = time.time()
    found: dict[str, Member] = {}
    for invite in roster.invitations():
        if invite.used_at is None and invite.revoked_at is None:
            state: Literal["invited", "expired"] = "invited" if invite.expires > now else "expired"
            found[invite.site] = Member(invite.site, invite.cancers, state)
    for site in roster.sites():
        if site.revoked_at is None:
            found[site.name] = Member(site.name, site.cancers, key=site.signing_key)
        else:
            found.setdefault(site.name, Member(site.name, site.cancers, "revoked"))
    return tuple(found[name] for name in sorted(found))


def missing(members: Iterable[Member], tasks: Iterable[Task]) -> dict[str, str]:
    """Return the sites that have not contributed anything, or were cut off on the way, and why.

    A row that failed tells of its site by itself.
    """
    rows: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        rows[task.site].append(task)
    causes = {
        "invited": "invited, but did not enrol",
        "expired": "did not enrol before its invite expired",
        "enrolled": "enrolled, but has not answered",
    }
    found: dict[str, str] = {}
    for member in members:
        described = any(t.kind == "describe" and t.state in _ANSWERED for t in rows[member.name])
        if not described and member.state in causes:
            found[member.name] = causes[member.state]
        elif described and member.state != "enrolled" and _cut_off(rows[member.name]):
            found[member.name] = "revoked before it was finished"
    return found


def _cut_off(rows: list[Task]) -> bool:
    """Return whether rows that would have come next are not there, and no row says why."""
    if any(task.state == "failed" for task in rows):
        return False
    evaluated = {t.cancer for t in rows if t.kind == "evaluate" and t.state == "done"}
    return not evaluated or any(task.cancer not in {None, *evaluated} for task in rows)
