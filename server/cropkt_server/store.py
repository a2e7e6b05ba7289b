"""The study's durable table of tasks, in SQLite, and the replies, as files.

A reply is on disk before its row says `done`; a row that says `sent` after a crash is due again,
because a site answers the same task from its own store. WAL with full synchronisation: what was
committed survives a kill at any time.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from cropkt.cancers import Cancer
from cropkt.database import opened, reading, transaction
from cropkt.messages import REPLIES, Message, load, pack, save
from cropkt_server.bank import Bank

Kind = Literal["describe", "fit_expert", "score_sources", "fit_router", "fit_fedavg", "evaluate"]
STAGES: tuple[Kind, ...] = get_args(Kind)
"""In their order; `fit_fedavg` only where a study asks for it."""
State = Literal["due", "sent", "held", "done", "failed"]  # held: waits for approval at the site
OPEN: tuple[State, ...] = ("due", "sent", "held")

SCHEMAS = (
    """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE task (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    site TEXT NOT NULL,
    cancer TEXT NOT NULL DEFAULT '',
    round INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'due',
    cause TEXT NOT NULL DEFAULT '',
    tries INTEGER NOT NULL DEFAULT 0,
    changed REAL NOT NULL DEFAULT (julianday('now'))
);
""",
)
_ANEW = (
    "UPDATE task SET state = 'due', cause = '', tries = 0, changed = julianday('now') WHERE id = ?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row: what one site does, for one cancer and round."""

    kind: Kind
    site: str
    cancer: Cancer | None = None
    round: int = 0
    state: State = "due"
    cause: str = ""
    tries: int = 0
    changed: float | None = field(default=None, compare=False)  # seconds since 1970

    @property
    def id(self) -> str:
        """The name that request and reply carry."""
        parts = [self.kind, self.site]
        if self.cancer:
            parts += [self.cancer, str(self.round)]
        return "/".join(parts)

    @property
    def settled(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.state in ("done", "failed")


class Store:
    """Rows and replies of one study folder."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.folder = folder
        self._replies = folder / "replies"
        if not read_only:
            self._replies.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.bank = Bank(folder, read_only=read_only)
        open_ = reading if read_only else opened
        self._db = open_(folder / "study.sqlite", SCHEMAS, wait=5)

    def close(self) -> None:
        """Close the database."""
        self._db.close()
        self.bank.close()

    def meta(self, key: str) -> str | None:
        """Return a value kept with the study."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        """Keep a value with the study."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def forget(self, key: str) -> None:
        """Keep a value no longer."""
        self._db.execute("DELETE FROM meta WHERE key = ?", (key,))

    @property
    def paused(self) -> bool:
        """Whether nothing new is to be sent."""
        return self.meta("paused") == "yes"

    def pause(self, yes: bool) -> None:
        """Send nothing new, or go on; what is under way is still taken in."""
        self.set_meta("paused", "yes" if yes else "no")

    @property
    def closed(self) -> bool:
        """Whether the study is over."""
        return self.meta("closed") == "yes"

    def close_study(self, yes: bool = True) -> None:
        """The study is over, or goes on after all."""
        self.set_meta("closed", "yes" if yes else "no")

    def retry(self, site: str | None = None, row: str | None = None) -> list[Task]:
        """Make failed rows due with all their tries; return them.

        Args:
            site: only those of this site.
            row: only the one of this name.
        """
        failed = [task for task in self.tasks() if task.state == "failed"]
        again = [t for t in failed if site in (None, t.site) and row in (None, t.id)]
        self._again(again)
        return again

    def _again(self, again: list[Task]) -> None:
        """Make failed rows due with all their tries."""
        with transaction(self._db) as db:
            db.executemany(f"{_ANEW} AND state = 'failed'", [(task.id,) for task in again])
        if again and (gathered := self.meta("decided/gathered")) is not None:
            # Whoever is asked again is waited for, though the deadline may have passed.
            sites = {task.site for task in again}.union(json.loads(gathered))
            self.set_meta("decided/gathered", json.dumps(sorted(sites)))

    def add(self, tasks: Iterable[Task]) -> None:
        """Add the rows that are not there yet, all or none."""
        with transaction(self._db) as db:
            db.executemany(
                "INSERT OR IGNORE INTO task (id, kind, site, cancer, round) VALUES (?, ?, ?, ?, ?)",
                [(t.id, t.kind, t.site, t.cancer or "", t.round) for t in tasks],
            )

    def restart(self, again: Iterable[Task], *, without: Iterable[Task]) -> None:
        """Make rows due as if they had never been sent, and drop others, all or none."""
        with transaction(self._db) as db:
            db.executemany(_ANEW, [(task.id,) for task in again])
            db.executemany("DELETE FROM task WHERE id = ?", [(task.id,) for task in without])

    def tasks(self) -> list[Task]:
        """Return all rows in the order they were added."""
        return _tasks(self._db)

    def state(self, task: Task) -> State | None:
        """Return what became of a row; None if there is no such row."""
        row = self._db.execute("SELECT state FROM task WHERE id = ?", (task.id,)).fetchone()
        return None if row is None else row[0]

    def sent(self, task: Task) -> None:
        """The task left for its site, once more."""
        self._set(task, "sent", "", tries=1)

    def due(self, task: Task, cause: str = "") -> None:
        """The task must be sent again."""
        self._set(task, "due", cause)

    def held(self, task: Task) -> None:
        """The answer is there, and waits for somebody at the site to approve it."""
        self._set(task, "held", "")

    def failed(self, task: Task, cause: str) -> None:
        """The task ended without a reply that could be used."""
        self._set(task, "failed", cause)

    def keep(self, task: Task, reply: Message) -> None:
        """Put the reply on disk; its row is not done yet."""
        save(reply, self._reply(task))

    def done(self, task: Task) -> None:
        """The reply of the task, which is kept, has been taken in."""
        self._set(task, "done", "")

    def quarantine(self, task: Task, cause: str, reply: Message | None = None) -> None:
        """Fail a row whose reply is not to be used, and keep that reply apart.

        Args:
            task: the row.
            cause: why.
            reply: what just came; None takes the reply that is stored.
        """
        apart = self._apart(task)
        apart.parent.mkdir(exist_ok=True, mode=0o700)
        if reply is not None:
            save(reply, apart)
        self.failed(task, cause)
        if reply is None:  # moved last: a row that is done has its reply
            self._reply(task).replace(apart)

    def admit(self, site: str, cancer: Cancer) -> list[Task]:
        """Let the models of a site that lie in quarantine pass when they are sent again.

        Returns:
            Their rows, which are due again.
        """
        again = []
        for task in self.tasks():
            if (task.site, task.cancer, task.state) == (site, cancer, "failed"):
                with suppress(FileNotFoundError):
                    kept = load(self._apart(task), expected=REPLIES)
                    self.set_meta(f"admitted/{task.id}", digest_of(kept))
                    again.append(task)
        self._again(again)
        return again

    def admitted(self, task: Task) -> str | None:
        """Return the digest of the model that somebody admitted for a row, if so."""
        return self.meta(f"admitted/{task.id}")

    def reply(self, task: Task) -> Message:
        """Return the reply of a task that is done."""
        return load(self._reply(task), expected=REPLIES)

    def lost(self) -> list[Task]:
        """Return the rows that are done, and whose reply is not there any more."""
        return [t for t in self.tasks() if t.state == "done" and not self._reply(t).exists()]

    def resume(self) -> None:
        """Make what was under way when the last process ended due again."""
        self._db.execute("UPDATE task SET state = 'due' WHERE state = 'sent'")

    def _set(self, task: Task, state: State, cause: str, tries: int = 0) -> None:
        self._db.execute(
            "UPDATE task SET state = ?, cause = ?, tries = tries + ?, changed = julianday('now') "
            "WHERE id = ?",
            (state, cause, tries, task.id),
        )

    def _reply(self, task: Task) -> Path:
        return self._replies / f"{task.id.replace('/', '~')}.npz"

    def _apart(self, task: Task) -> Path:
        return self.folder / "quarantine" / self._reply(task).name


def digest_of(reply: Message) -> str:
    """Return a SHA-256 of the arrays of a reply."""
    _, arrays = pack(reply)
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def read_tasks(folder: Path) -> list[Task]:
    """Return the rows of a study that another process or thread is running."""
    with closing(reading(folder / "study.sqlite", SCHEMAS, wait=5)) as database:
        return _tasks(database)


def _tasks(database: sqlite3.Connection) -> list[Task]:
    rows = database.execute(
        "SELECT kind, site, cancer, round, state, cause, tries, "
        "(changed - 2440587.5) * 86400 FROM task ORDER BY rowid"  # from Julian days
    )
    return [
        Task(
            kind=kind,
            site=site,
            cancer=Cancer(cancer) if cancer else None,
            round=number,
            state=state,
            cause=cause,
            tries=tries,
            changed=changed,
        )
        for kind, site, cancer, number, state, cause, tries, changed in rows
    ]
