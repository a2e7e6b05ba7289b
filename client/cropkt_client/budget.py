"""What a site's cohorts have told of their patients, in epsilon, and whether they may tell more.

A cohort is a site's patients of one cancer. Every release that is trained on it is committed and
on disk here before its training begins, and stays, whatever becomes of the training. A training
that was killed goes on with what it has paid: nobody saw what it had made. From then on that what
it made may leave, the payment is used, and the same training once more has to be paid again.

What counts is the history of mechanisms, not a sum: the epsilon of all of it together is computed
for the delta that `site.yaml` says now. The file is `<state>/budget.sqlite`; who can write there
can also remove it, which this cannot see.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cropkt.cancers import Cancer
from cropkt.database import opened, transaction
from cropkt.errors import BudgetError, ConfigError
from cropkt.experts.accountant import Mechanism, epsilon_of
from cropkt_client.settings import Privacy, read_settings

NAME = "budget.sqlite"
_PATIENCE = 600.0  # seconds to wait for another process, which computes an epsilon meanwhile
_TABLE = """
CREATE TABLE payment (
    number INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    cancer TEXT NOT NULL,
    task TEXT NOT NULL,
    request TEXT NOT NULL,
    noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    delta REAL NOT NULL,
    epsilon REAL NOT NULL,
    total REAL NOT NULL,
    used INTEGER NOT NULL DEFAULT 0
) STRICT
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """One release, paid for."""

    number: int
    mechanism: Mechanism
    delta: float
    epsilon: float  # of this release alone
    total: float  # of the cohort, with this release


class Budget:
    """The budget of one site's cohorts.

    Args:
        state: the site's state folder.
        privacy: what may be spent.
    """

    def __init__(self, state: Path, privacy: Privacy) -> None:
        self._path, self._privacy = state / NAME, privacy

    def pay(self, mechanism: Mechanism, *, cancer: Cancer, task: str, request: str) -> Payment:
        """Write down a release that is about to be trained.

        Args:
            mechanism: of its training.
            cancer: of the cohort.
            task: what the coordinator calls it.
            request: SHA-256 of all that was asked.

        Raises:
            BudgetError: not so much is left.
            ConfigError: the file is damaged.
        """
        delta = self._privacy.delta
        alone = epsilon_of([mechanism], delta=delta)
        with self._open() as database, transaction(database):
            history = self._history(database, cancer)
            total = epsilon_of([*history, mechanism], delta=delta)
            if total > self._privacy.epsilon:
                spent = epsilon_of(history, delta=delta)
                raise BudgetError(
                    "site.yaml: privacy",
                    f"{cancer} has spent {spent:.2f} of epsilon {self._privacy.epsilon:g}; "
                    f"with {task} it would be {total:.2f}",
                    "No more of this cohort can leave, unless the hospital allows more",
                )
            added = database.execute(
                "INSERT INTO payment (time, cancer, task, request, noise_multiplier, sample_rate, "
                "steps, delta, epsilon, total) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(time.time(), cancer, task, request),
                    *(mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps),
                    *(delta, alone, total),
                ),
            )
            number = added.lastrowid
        return Payment(
            number=number or 0, mechanism=mechanism, delta=delta, epsilon=alone, total=total
        )

    def paid(self, request: str) -> Payment | None:
        """Return the payment for a request of which nothing could leave yet, if there is one."""
        with self._open() as database:
            row = database.execute(
                f"SELECT {_COLUMNS} FROM payment WHERE request = ? AND NOT used", (request,)
            ).fetchone()
        return None if row is None else _payment(row)

    def use(self, payment: Payment) -> None:
        """What was paid for is ready to leave. To be called before it can.

        Raises:
            BudgetError: another process was faster: what that made may leave.
        """
        with self._open() as database:
            changed = database.execute(
                "UPDATE payment SET used = 1 WHERE number = ? AND NOT used", (payment.number,)
            )
        if changed.rowcount != 1:
            raise BudgetError("budget", "another process has used this payment", "Ask it instead")

    def spent(self, cancer: Cancer) -> float:
        """Return the epsilon of all that was trained on a cohort so far, at today's delta."""
        if not self._path.exists():
            return 0.0
        with self._open() as database:
            last = database.execute(
                "SELECT delta, total FROM payment WHERE cancer = ? ORDER BY number DESC LIMIT 1",
                (cancer,),
            ).fetchone()
            if last is not None and last[0] == self._privacy.delta:
                return float(last[1])
            return epsilon_of(self._history(database, cancer), delta=self._privacy.delta)

    def spent_by(self, task: str) -> list[Payment]:
        """Return what was paid for a task, in all studies that had one of that name."""
        if not self._path.exists():
            return []
        with self._open() as database:
            rows = database.execute(
                f"SELECT {_COLUMNS} FROM payment WHERE task = ? ORDER BY number", (task,)
            ).fetchall()
        return [_payment(row) for row in rows]

    def _history(self, database: sqlite3.Connection, cancer: Cancer) -> list[Mechanism]:
        rows = database.execute(
            "SELECT noise_multiplier, sample_rate, steps FROM payment WHERE cancer = ?", (cancer,)
        )
        return [
            Mechanism(noise_multiplier=noise, sample_rate=rate, steps=steps)
            for noise, rate, steps in rows
        ]

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open the file; what is not committed at the end is undone."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            database = opened(self._path, (_TABLE,), wait=_PATIENCE, wal=False)
            with contextlib.closing(database):
                yield database
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                self._path,
                f"cannot be read ({type(error).__name__}), so nothing can be spent",
                "Put the latest copy of it back; without it what was spent is not known",
            ) from None


def spent_on(config: Path) -> Callable[[Cancer], float | None]:
    """Return what tells a gate the epsilon spent on a cohort of the site of a `site.yaml`."""

    def spent(cancer: Cancer) -> float | None:
        settings = read_settings(config)
        if settings.privacy is None:
            return None
        return Budget(config.parent / settings.state, settings.privacy).spent(cancer)

    return spent


_COLUMNS = "number, noise_multiplier, sample_rate, steps, delta, epsilon, total"


def _payment(row: tuple[int, float, float, int, float, float, float]) -> Payment:
    number, noise, rate, steps, delta, epsilon, total = row
    mechanism = Mechanism(noise_multiplier=noise, sample_rate=rate, steps=steps)
    return Payment(number=number, mechanism=mechanism, delta=delta, epsilon=epsilon, total=total)
