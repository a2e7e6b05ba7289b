"""What a site's cohorts have told of their patients, in epsilon, and whether they may tell more.

A cohort is a site's patients of one cancer. Every release that is trained on it is committed and
on disk here before its training begins, and stays, whatever becomes of the training. A training
that was killed goes on with what it has paid: nobody saw what it had made. From then on that what
it made may leave, the payment is used, and the same training once more has to be paid again.

What counts is the history of mechanisms, not a sum: the epsilon of all of it together is computed
for the delta that `site.yaml` says now.

The file is `cropkt-budget/budget.sqlite` beside the table of outcomes: all studies of the same
patients, each with a state folder of its own, spend from one. That it was removed, or an older copy
put back, shows in two other files: `budget.count` beside it has the number of payments, and the
egress ledger of the study the epsilon with which a cohort's answers left. Where the payments are
fewer than that, or answers left without differential privacy before, nothing is spent and nothing
leaves. What cannot be seen from here: all three removed, or put back together; and what left in
another study before the site was private.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import NoReturn

from cropkt.cancers import Cancer
from cropkt.database import opened, transaction
from cropkt.errors import BudgetError, ConfigError
from cropkt.experts.accountant import EPSILON_ERROR, Mechanism, epsilon_of
from cropkt.experts.card import Card
from cropkt.files import write_private
from cropkt_client.ledger import Ledger
from cropkt_client.policy import of_cancer
from cropkt_client.settings import Privacy, SiteConfig, read_settings

FOLDER, NAME, COUNT_NAME = "cropkt-budget", "budget.sqlite", "budget.count"
_PATIENCE = 600.0  # seconds to wait for another process, which computes an epsilon meanwhile
_SCHEMAS = (
    """
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
""",
    "ALTER TABLE payment ADD COLUMN expert TEXT",  # SHA-256 of the weights, once it is used
)


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
        folder: where it lies.
        privacy: what may be spent.
        state: the site's state folder, where its ledger lies; `folder` if not given.
    """

    def __init__(self, folder: Path, privacy: Privacy, *, state: Path | None = None) -> None:
        self._path, self._count, self._privacy = folder / NAME, folder / COUNT_NAME, privacy
        self._ledger = Ledger(state or folder)

    @classmethod
    def of(cls, folder: Path, settings: SiteConfig) -> Budget | None:
        """Return the budget of a site; None if it is not private.

        Args:
            folder: of its `site.yaml`.
            settings: what that says.
        """
        if settings.privacy is None:
            return None
        beside = (folder / settings.outcomes).resolve().parent
        return cls(beside / FOLDER, settings.privacy, state=folder / settings.state)

    def pay(self, mechanism: Mechanism, *, cancer: Cancer, task: str, request: str) -> Payment:
        """Write down a release that is about to be trained.

        Args:
            mechanism: of its training.
            cancer: of the cohort.
            task: what the coordinator calls it.
            request: SHA-256 of all that was asked.

        Raises:
            BudgetError: not so much is left, or what was spent is not known any more.
            ConfigError: the file is damaged.
        """
        delta = self._privacy.delta
        alone = epsilon_of([mechanism], delta=delta)
        with self._open() as database:
            with transaction(database):
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
                    "INSERT INTO payment (time, cancer, task, request, noise_multiplier, "
                    "sample_rate, steps, delta, epsilon, total) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(time.time(), cancer, task, request),
                        *(mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps),
                        *(delta, alone, total),
                    ),
                )
                number = added.lastrowid
            self._note(database)
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

    def use(self, payment: Payment, expert: str) -> None:
        """What was paid for is ready to leave. To be called before it can.

        Args:
            payment: for it.
            expert: SHA-256 of its weights, as on its card.

        Raises:
            BudgetError: another process was faster: what that made may leave.
        """
        with self._open() as database:
            changed = database.execute(
                "UPDATE payment SET used = 1, expert = ? WHERE number = ? AND NOT used",
                (expert, payment.number),
            )
            self._note(database)
        if changed.rowcount != 1:
            raise BudgetError("budget", "another process has used this payment", "Ask it instead")

    def has_paid(self, card: Card) -> bool:
        """Return whether a card is that of an expert, and of no other, which was paid for."""
        experts = [model.sha256 for model in card.models]
        with self._open() as database:
            rows = database.execute(
                "SELECT expert FROM payment "
                "WHERE cancer = ? AND epsilon = ? AND delta = ? AND used",
                (card.cancer, card.epsilon, card.delta),
            ).fetchall()
        return len(experts) == 1 and (experts[0],) in rows

    def spent(self, cancer: Cancer) -> float:
        """Return the epsilon of all that was trained on a cohort so far, at today's delta.

        Raises:
            BudgetError: it is not known any more.
        """
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

    def _note(self, database: sqlite3.Connection) -> None:
        """Write down beside the table how many payments it has."""
        with transaction(database):  # in here, no other process counts fewer
            write_private(self._count, f"{_payments(database)}\n".encode())

    def _counted(self) -> int:
        """Return how many payments were written down."""
        try:
            return int(self._count.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            fix = f"Write the number of payments in {NAME} into it, if that is the latest"
            raise ConfigError(self._count, "is no number", fix) from None

    def _left(self) -> dict[Cancer, float]:
        """Return the highest epsilon with which answers about each cohort left, by the ledger.

        It is infinite where one left without differential privacy.
        """
        cohorts, left = {of_cancer(cancer): cancer for cancer in Cancer}, dict[Cancer, float]()
        for row in self._ledger.rows():
            for cancer in filter(None, map(cohorts.get, row.checked.split("; "))):
                told = inf if row.epsilon is None else row.epsilon
                left[cancer] = max(left.get(cancer, 0.0), told)
        return left

    def _check(
        self, database: sqlite3.Connection | None, counted: int, left: dict[Cancer, float]
    ) -> None:
        """Check that no payment is gone.

        Raises:
            BudgetError: one is.
        """
        found = 0 if database is None else _payments(database)
        if found < counted:
            self._refuse(f"{counted} payments were made, and {found} are here")
        for cancer, epsilon in left.items():
            if epsilon == inf:
                raise BudgetError(
                    "site.yaml: privacy",
                    f"answers about {cancer} left without differential privacy before",
                    "What left cannot be taken back: no epsilon bounds what is known of them now",
                )
            known = 0.0 if database is None else self._highest(database, cancer, epsilon)
            if epsilon > known + 2 * EPSILON_ERROR:
                self._refuse(
                    f"answers about {cancer} left with epsilon {epsilon:.2f} spent, as the ledger "
                    f"shows, and here are payments for {known:.2f}"
                )

    def _highest(self, database: sqlite3.Connection, cancer: Cancer, enough: float) -> float:
        """Return the most epsilon that a cohort's payments can have been told as.

        The ledger does not say of which delta its epsilon is. The smaller delta, the more.
        """
        most, delta = database.execute(
            "SELECT max(total), min(delta) FROM payment WHERE cancer = ?", (cancer,)
        ).fetchone()
        if most is None or most >= enough:
            return float(most or 0.0)
        delta = min(delta, self._privacy.delta)
        return max(float(most), epsilon_of(self._history(database, cancer), delta=delta))

    def _refuse(self, problem: str) -> NoReturn:
        raise BudgetError(
            self._path,
            f"{problem}: what was spent is not known",
            "Put its latest copy back; without it, this site gives nothing more away",
        )

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open the file; what is not committed at the end is undone.

        Raises:
            BudgetError: payments are gone from it.
            ConfigError: it is damaged.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            fix = "Let the client write beside the table of outcomes: the budget lies there"
            raise ConfigError(self._path.parent, os.strerror(error.errno or 0), fix) from None
        counted, left = self._counted(), self._left()  # first: others may pay meanwhile
        if not self._path.exists():
            self._check(None, counted, left)
        try:
            database = opened(self._path, _SCHEMAS, wait=_PATIENCE, wal=False)
            with contextlib.closing(database):
                self._check(database, counted, left)
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
        budget = Budget.of(config.parent, read_settings(config))
        return None if budget is None else budget.spent(cancer)

    return spent


_COLUMNS = "number, noise_multiplier, sample_rate, steps, delta, epsilon, total"


def _payments(database: sqlite3.Connection) -> int:
    (number,) = database.execute("SELECT count(*) FROM payment").fetchone()
    return int(number)


def _payment(row: tuple[int, float, float, int, float, float, float]) -> Payment:
    number, noise, rate, steps, delta, epsilon, total = row
    mechanism = Mechanism(noise_multiplier=noise, sample_rate=rate, steps=steps)
    return Payment(number=number, mechanism=mechanism, delta=delta, epsilon=epsilon, total=total)
