"""Who is tested when: folds that keep a patient, or a whole hospital, on one side.

Fold arrays are (n,) int64, the fold in which each patient is in the test set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cropkt.cohort.tables import TextTable, read_table
from cropkt.errors import CohortError, OutcomeTableError

_ROLES = ("train", "test", "val")
_PATIENT = "case_id"


def comparable_pairs(days: ArrayLike, event: ArrayLike) -> int:
    """Return how many pairs Harrell's C compares.

    A pair is comparable if the earlier time is a death; at equal times, if exactly one of the
    two is a death (as in scikit-survival's `concordance_index_censored`).

    Args:
        days: (n,) times.
        event: (n,) True for a death.
    """
    t, died = np.asarray(days, dtype=np.float64), np.asarray(event, dtype=np.bool_)
    later = t.size - np.searchsorted(np.sort(t), t[died], side="right")
    lived = np.sort(t[~died])
    tied = np.searchsorted(lived, t[died], "right") - np.searchsorted(lived, t[died], "left")
    return int(later.sum() + tied.sum())


def stratified_folds(
    event: ArrayLike, bins: ArrayLike, *, folds: int, seed: int
) -> NDArray[np.int64]:
    """Return folds whose sizes, events and (event, bin) counts differ by at most one.

    Patients are sorted by event and time bin, shuffled within, and dealt out in turn.

    Args:
        event: (n,) True for a death.
        bins: (n,) time bins.
        folds: at least 2, at most n.
        seed: the same seed and patients give the same folds.

    Raises:
        CohortError: too few folds, or fewer patients than folds.
    """
    died, when = np.asarray(event, dtype=np.bool_), np.asarray(bins, dtype=np.int64)
    _check_folds(died.size, folds, "patients")
    shuffle = np.random.default_rng(seed).permutation(died.size)
    order = np.lexsort((shuffle, when, ~died))  # deaths first, then by bin, then at random
    fold = np.empty(died.size, dtype=np.int64)
    fold[order] = np.arange(died.size) % folds
    return fold


def hospital_folds(
    hospital: Sequence[str],
    event: ArrayLike,
    bins: ArrayLike | None = None,
    *,
    folds: int,
    seed: int,
) -> NDArray[np.int64]:
    """Return folds that no hospital spans, with events, then patients, balanced greedily.

    Hospitals are placed from most to fewest deaths, ties at random: one with deaths in the fold
    with fewest deaths, one without in the fold with fewest patients. With `bins`, remaining ties
    go to the fold that holds fewest patients of the same bins. No fold stays empty.

    Raises:
        CohortError: a patient without hospital, or fewer hospitals than folds.
    """
    died = np.asarray(event, dtype=np.bool_)
    if unknown := sum(not name for name in hospital):
        raise CohortError(
            "hospital",
            f"{unknown} patients have no hospital",
            "Add the site column to the outcome table, or split by patient",
        )
    names, which = np.unique(np.asarray(hospital, dtype=np.str_), return_inverse=True)
    _check_folds(names.size, folds, "hospitals")
    when = np.zeros(died.size, dtype=np.int64) if bins is None else np.asarray(bins, np.int64)
    profile = np.zeros((names.size, int(when.max()) + 1), dtype=np.int64)  # patients by bin
    np.add.at(profile, (which, when), 1)
    patients = profile.sum(axis=1)
    deaths = np.bincount(which, weights=died, minlength=names.size).astype(np.int64)
    shuffle = np.random.default_rng(seed).permutation(names.size)
    held_deaths, held = np.zeros(folds, np.int64), np.zeros((folds, profile.shape[1]), np.int64)
    fold_of = np.empty(names.size, dtype=np.int64)
    for site in np.lexsort((shuffle, -patients, -deaths)):
        # A hospital without deaths leaves the balance of deaths as it is.
        by_deaths = held_deaths if deaths[site] else np.zeros(folds, np.int64)
        fold = np.lexsort((held @ profile[site], held.sum(axis=1), by_deaths))[0]
        fold_of[site] = fold
        held_deaths[fold] += deaths[site]
        held[fold] += profile[site]
    return fold_of[which]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fold:
    path: Path
    column: str  # "" where the file is one fold
    train: frozenset[str]
    test: frozenset[str]


def read_splits(paths: Sequence[Path], patient_ids: Sequence[str]) -> NDArray[np.int64]:
    """Return the fold of each patient from published split files.

    A file is one fold, with patient ids in columns whose names contain train, test or val; or it
    is Patho-Bench's `k=all.tsv`: a row a slide, with `case_id`, and train, test or val in `fold_0`,
    `fold_1` and so on. Ids of patients that are not in `patient_ids` are checked and otherwise
    ignored.

    Args:
        paths: `splits_0.csv`, `splits_1.csv` and so on, in the order of the folds, or `k=all.tsv`.
        patient_ids: n patients.

    Raises:
        CohortError: a patient in train and test of one fold, in the test sets of two folds or of
            none; a file in neither form.
    """
    folds = [fold for path in paths for fold in _folds_in(path)]
    tested: dict[str, int] = {}
    for number, fold in enumerate(folds):
        here = f" in {fold.column}" if fold.column else ""
        if both := len(fold.train & fold.test):
            raise CohortError(
                fold.path,
                f"{both} patients are both trained on and tested{here}",
                "Results on such a split are not results: correct the file",
            )
        if twice := Counter(tested[patient] for patient in fold.test if patient in tested):
            first, count = twice.most_common(1)[0]
            other = folds[first]
            there = other.column if other.path == fold.path and here else str(other.path)
            raise CohortError(
                fold.path,
                f"{count} patients are tested{here or ' here'} and in {there}",
                "A patient is tested once: correct the files, or give each file once",
            )
        tested |= dict.fromkeys(fold.test, number)
    if untested := sum(patient not in tested for patient in patient_ids):
        raise CohortError(
            ", ".join(str(path) for path in paths) or "splits",
            f"{untested} of {len(patient_ids)} patients are tested in no fold",
            "Give the files of all folds; ids must be written as in the outcome table",
        )
    return np.array([tested[patient] for patient in patient_ids], dtype=np.int64)


def _folds_in(path: Path) -> list[_Fold]:
    """Return the folds of one file. A file without header holds patients in it: it is not shown."""
    try:
        table = read_table(path)
    except OutcomeTableError as error:
        raise CohortError(
            path,
            "cannot be read as a table of splits",
            "Give splits_<fold>.csv or k=all.tsv, with a header and rows of its length",
        ) from error
    columns = [name for name in table.columns if re.fullmatch(r"fold_\d+", name)]
    if not columns:
        return [_one_fold(path, table)]
    columns.sort(key=lambda name: int(name.removeprefix("fold_")))
    return [_fold_of_column(path, table, column) for column in columns]


def _one_fold(path: Path, table: TextTable) -> _Fold:
    """Read ids in columns named after a role."""
    roles = {name: [role for role in _ROLES if role in name] for name in table.columns}
    if any(len(role) > 1 for role in roles.values()):
        raise CohortError(path, "a column is named after two roles", "Rename it")
    if not {"train", "test"} <= {name for role in roles.values() for name in role}:
        raise CohortError(
            path,
            "it has no columns train and test, nor fold_0",
            "Name the columns train, val and test, or case_id, fold_0, fold_1 and so on",
        )

    def ids(wanted: str) -> frozenset[str]:
        columns = [name for name, role in roles.items() if wanted in role]
        return frozenset(cells[name] for _, cells in table.rows for name in columns) - {""}

    return _Fold(path=path, column="", train=ids("train"), test=ids("test"))


def _fold_of_column(path: Path, table: TextTable, column: str) -> _Fold:
    """Read the roles in one column of Patho-Bench's table."""
    if _PATIENT not in table.columns:
        raise CohortError(path, f"it has {column}, but no {_PATIENT}", "Add the patients' ids")
    ids: dict[str, set[str]] = {role: set() for role in _ROLES}
    for number, cells in table.rows:
        patient, role = cells[_PATIENT], cells[column]
        if not patient:
            raise CohortError(path, f"row {number}: no {_PATIENT}", "Fill it in")
        if role not in ids:
            problem = f"row {number}: `{column}` is not train, val or test"
            raise CohortError(path, problem, "Correct or remove the row")
        ids[role].add(patient)
    return _Fold(
        path=path, column=column, train=frozenset(ids["train"]), test=frozenset(ids["test"])
    )


def _check_folds(available: int, folds: int, what: str) -> None:
    if folds < 2:
        raise CohortError("folds", f"{folds} folds cannot test anyone", "Use at least 2")
    if available < folds:
        raise CohortError(
            "folds", f"{available} {what} do not fill {folds} folds", "Use fewer folds"
        )
