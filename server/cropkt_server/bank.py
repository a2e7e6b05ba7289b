"""The cards of a study's experts: who gave them, which rows used them, which were revoked.

A SQLite file of its own, `bank.sqlite`, because the commands `experts` and `revoke` use it while
another process serves the study. The weights lie with the replies.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cropkt.cancers import Cancer
from cropkt.database import opened, reading, transaction
from cropkt.errors import UsageError
from cropkt.experts.card import Card, read_card
from cropkt.messages import Signed

SHORTEST = 8  # characters of a hash that name an expert

SCHEMAS = (
    """
CREATE TABLE expert (
    hash TEXT PRIMARY KEY,
    task TEXT NOT NULL,
    card TEXT NOT NULL,
    signature TEXT NOT NULL,
    revoked_at REAL
);
CREATE TABLE used (
    task TEXT NOT NULL,
    place INTEGER NOT NULL,
    cancer TEXT NOT NULL,
    hash TEXT NOT NULL,
    PRIMARY KEY (task, place)
);
""",
)


@dataclass(frozen=True, slots=True)
class Banked:
    """One expert."""

    signed: Signed
    task: str  # that brought it; empty for an average
    revoked_at: float | None  # seconds since 1970

    @property
    def card(self) -> Card:
        """What it says of itself."""
        return read_card(self.signed.card)


class Bank:
    """The experts of one study folder; may be used from several threads."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self._lock = threading.RLock()
        open_ = reading if read_only else opened
        self._db = open_(folder / "bank.sqlite", SCHEMAS, wait=10)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def add(self, signed: Signed, *, task: str = "") -> None:
        """Take an expert in; one that was made from a revoked one is revoked."""
        parents = read_card(signed.card).parents
        with self._lock, transaction(self._db) as db:
            revoked_at = None if self._revoked(db).isdisjoint(parents) else time.time()
            db.execute(
                "INSERT OR IGNORE INTO expert VALUES (?, ?, ?, ?, ?)",
                (signed.hash, task, signed.card, signed.signature, revoked_at),
            )

    def experts(self) -> list[Banked]:
        """Return all experts in the order in which they came."""
        with self._lock:
            return self._experts(self._db)

    def revoked(self) -> frozenset[str]:
        """Return the hashes of those that were revoked."""
        with self._lock:
            return self._revoked(self._db)

    def revoke(self, beginning: str) -> list[Banked]:
        """Revoke an expert and all that was made from it; return them, itself first.

        Args:
            beginning: of its hash.

        Raises:
            UsageError: no expert has such a hash, or several have.
        """
        with self._lock, transaction(self._db) as db:
            experts = self._experts(db)
            found = [e for e in experts if e.signed.hash.startswith(beginning)]
            if len(found) != 1 or len(beginning) < SHORTEST:
                problem = "several experts have such a hash" if found else "no expert has this hash"
                fix = f"See cropkt-server experts; {SHORTEST} characters are the least"
                raise UsageError("--expert", problem, fix)
            gone = {found[0].signed.hash}
            for expert in experts:  # children come after their parents
                if gone.intersection(expert.card.parents):
                    found.append(expert)
                    gone.add(expert.signed.hash)
            db.executemany(
                "UPDATE expert SET revoked_at = ? WHERE hash = ? AND revoked_at IS NULL",
                [(time.time(), hash_) for hash_ in gone],
            )
        return found

    def use(self, task: str, experts: Mapping[Cancer, str]) -> None:
        """Note which experts a row is asked about, in their order."""
        with self._lock, transaction(self._db) as db:
            db.execute("DELETE FROM used WHERE task = ?", (task,))
            db.executemany(
                "INSERT INTO used VALUES (?, ?, ?, ?)",
                [(task, i, cancer, hash_) for i, (cancer, hash_) in enumerate(experts.items())],
            )

    def used(self, task: str) -> dict[Cancer, str]:
        """Return the hashes of the experts that a row was asked about, in their order."""
        with self._lock:
            rows = self._db.execute(
                "SELECT cancer, hash FROM used WHERE task = ? ORDER BY place", (task,)
            ).fetchall()
        return {Cancer(cancer): hash_ for cancer, hash_ in rows}

    def users(self, hashes: Iterable[str]) -> list[str]:
        """Return the rows that were asked about any of these experts."""
        with self._lock:
            rows = self._db.execute("SELECT task, hash FROM used ORDER BY task").fetchall()
        wanted = set(hashes)
        return list(dict.fromkeys(task for task, hash_ in rows if hash_ in wanted))

    @staticmethod
    def _experts(db: sqlite3.Connection) -> list[Banked]:
        rows = db.execute(
            "SELECT card, signature, task, revoked_at FROM expert ORDER BY rowid"
        ).fetchall()
        return [
            Banked(Signed(card=card, signature=signature), task, revoked_at)
            for card, signature, task, revoked_at in rows
        ]

    @staticmethod
    def _revoked(db: sqlite3.Connection) -> frozenset[str]:
        rows = db.execute("SELECT hash FROM expert WHERE revoked_at IS NOT NULL")
        return frozenset(hash_ for (hash_,) in rows)
