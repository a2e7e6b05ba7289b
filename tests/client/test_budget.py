"""A cohort's privacy budget: spent before the work, never given back, by one process at a time."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from cropkt.cancers import Cancer
from cropkt.errors import BudgetError, ConfigError
from cropkt.experts.accountant import Mechanism, epsilon_of
from cropkt_client.budget import COUNT_NAME, NAME, Budget, Payment
from cropkt_client.ledger import SIMULATION, Entry, Ledger
from cropkt_client.policy import of_cancer
from cropkt_client.settings import Privacy, SiteConfig

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
    budget.use(payment, "0" * 64)
    assert budget.paid("a") is None
    with pytest.raises(BudgetError, match="another process has used"):
        budget.use(payment, "0" * 64)


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
    with pytest.raises(ConfigError, match="has schema 9, this cropkt knows 2"):
        budget.spent(UVM)


# What was spent stays spent, whatever becomes of the file


def leaves(state: Path, epsilon: float | None, *, cancer: Cancer = UVM) -> None:
    """Write into the ledger that an answer about a cohort left."""
    row = Entry(
        study=SIMULATION,
        task="t",
        message="train.expert",
        recipient=SIMULATION,
        bytes=1,
        sha256="0" * 64,
        checked=f"purpose research; {of_cancer(cancer)}; counts rounded to 5",
        approved="by the policy",
        epsilon=epsilon,
    )
    Ledger(state).append(row)


def refuses(state: Path, said: str, privacy: Privacy | None = None) -> None:
    """Check that nothing can be spent, and that what was spent is not told as less."""
    budget, before = Budget(state, privacy or Privacy(epsilon=4.0)), (state / NAME).exists()
    for use in (
        pay,
        lambda b: pay(b, cancer=SKCM),  # what was spent on it is not known either
        lambda b: b.paid("a"),
        lambda b: b.spent(UVM),
    ):
        with pytest.raises(BudgetError, match=said) as refusal:
            use(budget)
    assert f"{state / NAME}" in str(refusal.value)
    assert "Put its latest copy back" in str(refusal.value)
    assert (state / NAME).exists() == before  # nothing that looks like a fresh budget


def test_a_budget_that_was_removed_does_not_begin_again(tmp_path: Path) -> None:
    budget = Budget(tmp_path, Privacy(epsilon=4.0))
    first = pay(budget, "a")
    leaves(tmp_path, first.total)
    copy = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).unlink()
    refuses(tmp_path, "1 payments were made, and 0 are here")
    (tmp_path / COUNT_NAME).unlink()  # the ledger knows it, too
    refuses(tmp_path, r"answers about UVM left with epsilon 2\.00 spent.* payments for 0\.00")
    (tmp_path / NAME).write_bytes(copy)
    assert budget.spent(UVM) == first.total
    assert pay(budget, "b").total > first.total


def test_an_older_copy_is_not_taken_for_the_budget(tmp_path: Path) -> None:
    budget = Budget(tmp_path, Privacy(epsilon=4.0))
    pay(budget, "a")
    files = {name: (tmp_path / name).read_bytes() for name in (NAME, COUNT_NAME)}
    second = pay(budget, "b")
    latest = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(files[NAME])
    refuses(tmp_path, "2 payments were made, and 1 are here")
    (tmp_path / NAME).write_bytes(latest)
    leaves(tmp_path, second.total)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    refuses(tmp_path, rf"epsilon {second.total:.2f} spent.* payments for 2\.00")


def test_what_never_left_costs_nothing_once_its_record_is_gone(tmp_path: Path) -> None:
    """Nobody saw it: the expert that was trained cannot leave without its payment."""
    budget = Budget(tmp_path, Privacy(epsilon=4.0))
    pay(budget, "a")
    leaves(tmp_path, 0.0)
    for name in (NAME, COUNT_NAME):
        (tmp_path / name).unlink()
    assert budget.spent(UVM) == 0


def test_what_left_before_the_site_was_private_cannot_be_paid_for(tmp_path: Path) -> None:
    leaves(tmp_path, None)
    with pytest.raises(BudgetError, match="about UVM left without differential privacy before"):
        pay(Budget(tmp_path, Privacy(epsilon=4.0)))


def test_two_studies_of_the_same_patients_spend_from_one_budget(tmp_path: Path) -> None:
    def budget_of(study: str, outcomes: str) -> Budget:
        settings = SiteConfig(
            site="lumc", outcomes=Path(outcomes), cancers=(UVM,), privacy=Privacy(epsilon=4.0)
        )
        budget = Budget.of(tmp_path / study, settings)
        assert budget is not None
        return budget

    for study in ("one", "two"):
        (tmp_path / study).mkdir()
    spent = pay(budget_of("one", "../outcomes.csv"), "a").total
    again = budget_of("two", str(tmp_path / "outcomes.csv"))
    assert again.spent(UVM) == spent
    assert pay(again, "b").total > spent
    assert budget_of("two", "other/outcomes.csv").spent(UVM) == 0


def test_another_delta_is_not_taken_for_a_loss(tmp_path: Path) -> None:
    budget = Budget(tmp_path, Privacy(epsilon=4.0, delta=1e-5))
    pay(budget, "a")
    stricter = Privacy(epsilon=4.0, delta=1e-7)
    leaves(tmp_path, Budget(tmp_path, stricter).spent(UVM))  # more, of the same payment
    assert pay(Budget(tmp_path, stricter), "b").total > budget.spent(UVM)
    laxer = Budget(tmp_path, Privacy(epsilon=4.0, delta=1e-4))
    assert laxer.spent(UVM) < Budget(tmp_path, stricter).spent(UVM)


def test_a_damaged_count_is_named(tmp_path: Path) -> None:
    budget = Budget(tmp_path, Privacy(epsilon=4.0))
    pay(budget)
    (tmp_path / COUNT_NAME).write_text("many\n")
    with pytest.raises(ConfigError, match=r"budget.count: is no number"):
        budget.spent(UVM)


def test_a_kill_before_the_count_costs_nothing(tmp_path: Path) -> None:
    budget = Budget(tmp_path, Privacy(epsilon=4.0))
    pay(budget, "a")
    count = (tmp_path / COUNT_NAME).read_bytes()
    second = pay(budget, "b")
    (tmp_path / COUNT_NAME).write_bytes(count)
    assert budget.spent(UVM) == second.total
    budget.use(second, "0" * 64)  # before anything can leave, the count is right again
    assert (tmp_path / COUNT_NAME).read_text() == "2\n"


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
