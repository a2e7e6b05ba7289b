"""Who belongs to the study: invitations, and the sites that took one up.

A SQLite file of its own, `roster.sqlite`, because the commands `invite` and `revoke` write it
while another process serves the study. What they wrote counts at the next request: nothing is
remembered elsewhere. A token is kept as its SHA-256 only.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cropkt.cancers import Cancer
from cropkt.database import opened, reading, transaction
from cropkt.errors import CropktError, UsageError

Refusal = Literal[
    "used", "expired", "unknown", "altered", "revoked", "version", "malformed", "site", "later"
]

# The schema's steps: the file's user_version says how many it has.
SCHEMAS = (
    """
    CREATE TABLE invite (
        token_hash TEXT PRIMARY KEY,
        site TEXT NOT NULL,
        cancers TEXT NOT NULL,
        made_at REAL NOT NULL,
        expires REAL NOT NULL,
        used_at REAL,
        revoked_at REAL
    );
    CREATE TABLE site (
        name TEXT PRIMARY KEY,
        cancers TEXT NOT NULL,
        node_key TEXT NOT NULL UNIQUE,
        node_id TEXT NOT NULL UNIQUE,
        signing_key TEXT NOT NULL,
        token_hash TEXT NOT NULL,
        enrolled_at REAL NOT NULL,
        revoked_at REAL,
        last_seen REAL
    );
    """,
    """
    CREATE TABLE traffic (
        site TEXT PRIMARY KEY,
        received INTEGER NOT NULL,
        sent INTEGER NOT NULL
    );
    """,
)


class EnrolmentRefusedError(CropktError):
    """A site may not enrol; `code` says why in one word."""

    exit_code = 77

    def __init__(self, code: Refusal, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """An invite that was made, without its token."""

    site: str
    cancers: tuple[Cancer, ...]
    expires: float  # seconds since 1970
    used_at: float | None
    revoked_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolledSite:
    """A site that enrolled."""

    name: str
    cancers: tuple[Cancer, ...]
    node_key: str  # PEM, as Flower names a node
    node_id: int
    signing_key: str  # base64 of the raw Ed25519 public key
    enrolled_at: float
    revoked_at: float | None = None
    last_seen: float | None = None


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went through the door with one site, in bytes of bodies, without TLS and headers."""

    received: int = 0  # by the coordinator
    sent: int = 0


class Roster:
    """Invitations and sites of one study folder; may be used from several threads."""

    def __init__(
        self, folder: Path, *, clock: Callable[[], float] = time.time, read_only: bool = False
    ) -> None:
        self._clock, self._lock = clock, threading.RLock()
        open_ = reading if read_only else opened
        self._db = open_(folder / "roster.sqlite", SCHEMAS, wait=10)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def invite(self, site: str, cancers: Sequence[Cancer], expires: float) -> str:
        """Return the token of a new invite; an unused one for the same site is void.

        Args:
            site: for whom.
            cancers: what the site may contribute, at least one.
            expires: seconds since 1970.
        """
        if not cancers:
            raise UsageError("invite", "no cancer is named", "Give --cancer CODE")
        if expires <= self._clock():
            raise UsageError("invite", "would have expired already", "Give a longer --expires")
        token, now = secrets.token_urlsafe(32), self._clock()
        with self._lock, transaction(self._db) as db:
            db.execute(
                "UPDATE invite SET revoked_at = ? "
                "WHERE site = ? AND used_at IS NULL AND revoked_at IS NULL",
                (now, site),
            )
            db.execute(
                "INSERT INTO invite (token_hash, site, cancers, made_at, expires) "
                "VALUES (?, ?, ?, ?, ?)",
                (_digest(token), site, " ".join(dict.fromkeys(cancers)), now, expires),
            )
        return token

    def enrol(
        self,
        *,
        token: str,
        site: str,
        node_key: str,
        signing_key: str,
        register: Callable[[str, str], int],
    ) -> tuple[EnrolledSite, int | None]:
        """Take up an invite, once; all of it happens or nothing.

        The same site with the same keys and token is answered the same again: its first answer
        may have been lost on the way.

        Args:
            token: as in the invite.
            site: as in the invite.
            node_key: PEM of the site's node key.
            signing_key: base64 of its raw Ed25519 key.
            register: makes the node known to Flower, by key and name; returns its id, or
                raises ValueError if that key was cut off.

        Returns:
            The site, and the node that it had before, to be cut off.

        Raises:
            EnrolmentRefusedError: with the reason.
        """
        digest, now = _digest(token), self._clock()
        with self._lock, transaction(self._db) as db:
            # Looked up by hash: how long that takes tells nothing about any token.
            row = db.execute(
                "SELECT site, cancers, expires, used_at, revoked_at FROM invite "
                "WHERE token_hash = ?",
                (digest,),
            ).fetchone()
            if row is None:
                raise EnrolmentRefusedError("unknown", "The coordinator made no such invite.")
            invited, cancers, expires, used_at, revoked_at = row
            if invited != site:
                raise EnrolmentRefusedError("site", f"The invite is not for site {site}.")
            before = self._site(site)
            if revoked_at is not None or (used_at is not None and before and before.revoked_at):
                raise EnrolmentRefusedError(
                    "revoked", "The invite was withdrawn; ask the coordinator for a new one."
                )
            if used_at is not None:
                same = (digest, node_key, signing_key)
                kept = db.execute(
                    "SELECT token_hash, node_key, signing_key FROM site WHERE name = ?", (site,)
                ).fetchone()
                if before is not None and kept == same and now < expires:
                    return before, None
                raise EnrolmentRefusedError("used", "The invite was used before.")
            if now >= expires:
                raise EnrolmentRefusedError(
                    "expired", "The invite has expired; ask the coordinator for a new one."
                )
            owner = db.execute("SELECT name FROM site WHERE node_key = ?", (node_key,)).fetchone()
            if owner is not None:
                raise EnrolmentRefusedError(*_KEY_KNOWN)
            try:
                node_id = register(node_key, site)
            except ValueError:
                raise EnrolmentRefusedError(*_KEY_KNOWN) from None
            db.execute(
                "INSERT OR REPLACE INTO site (name, cancers, node_key, node_id, signing_key, "
                "token_hash, enrolled_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (site, cancers, node_key, str(node_id), signing_key, digest, now),
            )
            db.execute("UPDATE invite SET used_at = ? WHERE token_hash = ?", (now, digest))
            enrolled = self._site(site)
        if enrolled is None:
            raise AssertionError(site)
        return enrolled, None if before is None else before.node_id

    def revoke(self, site: str) -> EnrolledSite | None:
        """Cut a site off, and void its open invites; return it if it had enrolled.

        Raises:
            UsageError: nobody of that name was ever invited.
        """
        with self._lock, transaction(self._db) as db:
            known = db.execute("SELECT 1 FROM invite WHERE site = ?", (site,)).fetchone()
            if known is None:
                raise UsageError("--site", f"{site} is not in the roster", "See roster")
            now = self._clock()
            db.execute(
                "UPDATE invite SET revoked_at = ? WHERE site = ? AND used_at IS NULL", (now, site)
            )
            db.execute(
                "UPDATE site SET revoked_at = ? WHERE name = ? AND revoked_at IS NULL", (now, site)
            )
            return self._site(site)

    def site_of(self, node_id: int) -> str | None:
        """Return the site that a node is, by its registration; None if revoked or unknown."""
        return self._name("node_id = ? AND revoked_at IS NULL", str(node_id))

    def site_of_key(self, node_key: str) -> tuple[str, bool] | None:
        """Return a node key's site and whether it is revoked; None if nobody enrolled it."""
        with self._lock:
            row = self._db.execute(
                "SELECT name, revoked_at FROM site WHERE node_key = ?", (node_key,)
            ).fetchone()
        return None if row is None else (str(row[0]), row[1] is not None)

    def sites(self) -> list[EnrolledSite]:
        """Return every site that ever enrolled, by name."""
        with self._lock:
            rows = self._db.execute(f"{_SELECT_SITE} ORDER BY name").fetchall()
        return [_enrolled(row) for row in rows]

    def invitations(self) -> list[Invitation]:
        """Return every invite, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT site, cancers, expires, used_at, revoked_at FROM invite ORDER BY made_at"
            ).fetchall()
        return [
            Invitation(
                site=site,
                cancers=_cancers(cancers),
                expires=expires,
                used_at=used_at,
                revoked_at=revoked_at,
            )
            for site, cancers, expires, used_at, revoked_at in rows
        ]

    def seen(self, site: str, traffic: Traffic | None = None) -> None:
        """The site has just been heard of; so much went to and fro since that was said last."""
        with self._lock, transaction(self._db) as db:
            db.execute("UPDATE site SET last_seen = ? WHERE name = ?", (self._clock(), site))
            if traffic is not None:
                db.execute(
                    "INSERT INTO traffic VALUES (?, ?, ?) ON CONFLICT (site) DO UPDATE SET "
                    "received = received + excluded.received, sent = sent + excluded.sent",
                    (site, traffic.received, traffic.sent),
                )

    def traffic(self) -> dict[str, Traffic]:
        """Return what went to and fro with each site that was ever heard of."""
        with self._lock:
            rows = self._db.execute("SELECT site, received, sent FROM traffic").fetchall()
        return {site: Traffic(received, sent) for site, received, sent in rows}

    def moved(self, site: str, node_id: int) -> None:
        """The site's node has another id: Flower's database was lost and made anew."""
        with self._lock, transaction(self._db) as db:
            db.execute("UPDATE site SET node_id = ? WHERE name = ?", (str(node_id), site))

    def _site(self, name: str) -> EnrolledSite | None:
        row = self._db.execute(f"{_SELECT_SITE} WHERE name = ?", (name,)).fetchone()
        return None if row is None else _enrolled(row)

    def _name(self, condition: str, value: str) -> str | None:
        with self._lock:
            row = self._db.execute(f"SELECT name FROM site WHERE {condition}", (value,)).fetchone()
        return None if row is None else str(row[0])


_KEY_KNOWN: tuple[Refusal, str] = ("site", "This node key was used before: make new keys.")
_SELECT_SITE = (
    "SELECT name, cancers, node_key, node_id, signing_key, enrolled_at, revoked_at, last_seen "
    "FROM site"
)


def _enrolled(row: tuple[Any, ...]) -> EnrolledSite:
    name, cancers, node_key, node_id, signing_key, enrolled_at, revoked_at, last_seen = row
    return EnrolledSite(
        name=name,
        cancers=_cancers(cancers),
        node_key=node_key,
        node_id=int(node_id),  # unsigned 64 bits: more than SQLite's integers hold
        signing_key=signing_key,
        enrolled_at=enrolled_at,
        revoked_at=revoked_at,
        last_seen=last_seen,
    )


def _cancers(text: str) -> tuple[Cancer, ...]:
    return tuple(Cancer(code) for code in text.split())


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
