"""Who is tested when: folds that keep a patient, or a whole hospital, on one side.

Fold arrays are (n,) int64, the fold in which each patient is in the test set.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cropkt.errors import CohortError


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


def read_splits(paths: Sequence[Path], patient_ids: Sequence[str]) -> NDArray[np.int64]:
    """Return the fold of each patient from published split files.

    A file has patient ids in columns whose names contain train, test or val. The fold of a
    patient is the place in `paths` of the file in whose test column the patient stands. Ids of
    patients that are not in `patient_ids` are checked and otherwise ignored.

    Args:
        paths: `splits_0.csv`, `splits_1.csv` and so on, in the order of the folds.
        patient_ids: n patients.

    Raises:
        CohortError: a patient in train and test of one file, in the test columns of two files
            or of none; a file without train and test columns.
    """
    tested: dict[str, int] = {}
    for fold, path in enumerate(paths):
        columns = _split_columns(path)
        if both := len(columns["train"] & columns["test"]):
            raise CohortError(
                path,
                f"{both} patients stand in both the train and the test column",
                "Results on such a split are not results: correct the file",
            )
        if twice := Counter(tested[p] for p in columns["test"] if p in tested):
            first, count = twice.most_common(1)[0]
            raise CohortError(
                path,
                f"{count} patients stand in its test column and in that of {paths[first]}",
                "A patient is tested once: correct the files, or give each file once",
            )
        tested |= dict.fromkeys(columns["test"], fold)
    if untested := sum(patient not in tested for patient in patient_ids):
        raise CohortError(
            ", ".join(str(path) for path in paths) or "splits",
            f"{untested} of {len(patient_ids)} patients stand in no test column",
            "Give the files of all folds; ids must be written as in the outcome table",
        )
    return np.array([tested[patient] for patient in patient_ids], dtype=np.int64)


def _split_columns(path: Path) -> dict[str, set[str]]:
    """Return the ids in the train, test and val columns of one file."""
    ids: dict[str, set[str]] = {"train": set(), "test": set(), "val": set()}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CohortError(path, "cannot be read as CSV", "Give a splits_<fold>.csv") from error
    roles = [[role for role in ids if role in name.lower()] for name in header]
    if any(len(role) > 1 for role in roles):
        raise CohortError(path, "a column is named after two roles", "Rename it")
    if not {"train", "test"} <= {name for role in roles for name in role}:
        problem = "it has no columns train and test"  # without a header, a row is not repeated
        raise CohortError(path, problem, "Name the columns train, val and test")
    for row in rows:
        for role, cell in zip(roles, row, strict=False):
            if role and cell.strip():
                ids[role[0]].add(cell.strip())
    return ids


def _check_folds(available: int, folds: int, what: str) -> None:
    if folds < 2:
        raise CohortError("folds", f"{folds} folds cannot test anyone", "Use at least 2")
    if available < folds:
        raise CohortError(
            "folds", f"{available} {what} do not fill {folds} folds", "Use fewer folds"
        )
