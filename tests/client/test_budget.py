"""A cohort's privacy budget: spent before the work, never given back, by one process at a time."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from cropkt.cancers import Cancer
from cropkt.errors import BudgetError, ConfigError
from cropkt.experts.accountant import Mechanism, epsilon_of
from cropkt_client.budget import NAME, Budget, Payment
from cropkt_client.settings import Privacy

UVM, SKCM = Cancer.UVM, Cancer.SKCM
ONE = Mechanism(noise_multiplier=20.0, sample_rate=1.0, steps=100)  # epsilon 2 at 1e-5


def pay(budget: Budget, request: str = "r", *, cancer: Cancer = UVM) -> Payment:
    return budget.pay(ONE, cancer=cancer, task="t", request=request)


def test_releases_are_paid_until_nothing_is_left(tmp_path: Path) -> None:
    budget = Budget(tmp_path, Privacy(epsilon=4.0))
    assert budget.spent(UVM) == 0
    first = pay(budget, "a")
    second = pay(budget, "b")
    assert first.epsilon == first.total == second.epsilon == pytest.approx(2.0, abs=0.01)
    assert budget.spent(UVM) == second.total == epsilon_of([ONE, ONE], delta=1e-5)
    third = pay(budget, "c")
    assert second.total < third.total < 4
    with pytest.raises(BudgetError, match=r"UVM has spent 3\.\d\d of epsilon 4; with t it would"):
        pay(budget, "d")
    assert budget.spent(UVM) == third.total
    assert pay(budget, cancer=SKCM).total == first.total  # another cohort
    assert [p.epsilon for p in budget.spent_by("t")][:2] == [first.epsilon, second.epsilon]
    assert budget.spent_by("other") == []


def test_other_settings_do_not_bring_back_what_was_spent(tmp_path: Path) -> None:
    pay(Budget(tmp_path, Privacy(epsilon=4.0)))
    spent = Budget(tmp_path, Privacy(epsilon=4.0)).spent(UVM)
    with pytest.raises(BudgetError):
        pay(Budget(tmp_path, Privacy(epsilon=1.0)))
    assert Budget(tmp_path, Privacy(epsilon=100.0)).spent(UVM) == spent
    assert pay(Budget(tmp_path, Privacy(epsilon=100.0))).total > spent
    stricter = Budget(tmp_path, Privacy(epsilon=100.0, delta=1e-7))
    assert stricter.spent(UVM) == epsilon_of([ONE, ONE], delta=1e-7)


def test_a_payment_serves_one_release(tmp_path: Path) -> None:
    budget = Budget(tmp_path, Privacy(epsilon=4.0))
    assert budget.paid("a") is None
    payment = pay(budget, "a")
    assert Budget(tmp_path, Privacy(epsilon=4.0)).paid("a") == payment
    assert budget.paid("b") is None
    budget.use(payment)
    assert budget.paid("a") is None
    with pytest.raises(BudgetError, match="another process has used"):
        budget.use(payment)


def test_a_damaged_budget_lets_nothing_be_spent(tmp_path: Path) -> None:
    budget = Budget(tmp_path, Privacy(epsilon=4.0))
    pay(budget)
    assert (tmp_path / NAME).stat().st_mode & 0o077 == 0
    (tmp_path / NAME).write_bytes(b"no database at all, but long enough to be looked at" * 9)
    for use in (pay, lambda b: b.paid("r"), lambda b: b.spent(UVM)):
        with pytest.raises(ConfigError, match=r"budget.sqlite: cannot be read"):
            use(budget)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    budget = Budget(tmp_path, Privacy(epsilon=4.0))
    pay(budget)
    with sqlite3.connect(tmp_path / NAME) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(ConfigError, match="has schema 9, this cropkt knows 1"):
        budget.spent(UVM)


def spend_one(state: Path, number: int) -> bool:
    try:
        pay(Budget(state, Privacy(epsilon=2.2)), str(number))
    except BudgetError:
        return False
    return True


def test_two_processes_do_not_both_spend_the_last(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        spent = pool.starmap(spend_one, [(tmp_path, i) for i in range(4)])
    assert sum(spent) == 1
    assert len(Budget(tmp_path, Privacy(epsilon=2.2)).spent_by("t")) == 1
