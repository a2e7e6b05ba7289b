from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cropkt.cancers import Cancer
from cropkt.cohort.outcomes import read_outcomes
from cropkt.cohort.splits import comparable_pairs, hospital_folds, read_splits, stratified_folds
from cropkt.errors import CohortError

patients = st.lists(st.tuples(st.booleans(), st.integers(0, 31)), min_size=5, max_size=80)


def spread(fold: np.ndarray, chosen: np.ndarray, folds: int) -> int:
    return int(np.ptp(np.bincount(fold[chosen], minlength=folds)))


@settings(deadline=None, max_examples=60)
@given(patients=patients, folds=st.integers(2, 5), seed=st.integers(0, 99))
def test_sizes_events_and_strata_differ_by_at_most_one(patients, folds: int, seed: int) -> None:
    event, bins = (np.array(column) for column in zip(*patients, strict=True))
    fold = stratified_folds(event, bins, folds=folds, seed=seed)
    assert fold.dtype == np.int64
    assert set(fold) == set(range(folds))
    assert spread(fold, np.ones_like(event), folds) <= 1
    assert spread(fold, event, folds) <= 1
    for died, when in set(patients):
        assert spread(fold, (event == died) & (bins == when), folds) <= 1
    np.testing.assert_array_equal(fold, stratified_folds(event, bins, folds=folds, seed=seed))


def test_another_seed_gives_other_folds() -> None:
    event, bins = np.arange(60) % 3 == 0, np.arange(60) % 4
    first, second = (stratified_folds(event, bins, folds=5, seed=seed) for seed in (0, 1))
    assert (first != second).any()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("ABCDEFGH"), st.booleans(), st.integers(0, 5)),
        min_size=6,
        max_size=80,
    ),
    seed=st.integers(0, 99),
    with_bins=st.booleans(),
)
def test_no_hospital_is_in_two_folds(rows, seed: int, with_bins: bool) -> None:
    hospital, event, bins = zip(*rows, strict=True)
    if len(set(hospital)) < 3:
        with pytest.raises(CohortError, match=r"hospitals do not fill 3 folds"):
            hospital_folds(hospital, event, folds=3, seed=seed)
        return
    fold = hospital_folds(hospital, event, bins if with_bins else None, folds=3, seed=seed)
    assert len(set(zip(hospital, fold, strict=True))) == len(set(hospital))
    assert set(fold) == {0, 1, 2}
    deaths = np.bincount(fold, weights=event, minlength=3)
    largest = max(sum(e for h, e, _ in rows if h == name) for name in set(hospital))
    assert np.ptp(deaths) <= largest  # the bound of greedy balancing


def test_hospitals_balance_deaths_then_patients() -> None:
    hospital = list("AAAABBBBCCCCDDDD") + ["E"] * 6 + ["F"] * 6
    event = [name in "ABCD" for name in hospital]
    fold = hospital_folds(hospital, event, folds=2, seed=0)
    assert np.bincount(fold, weights=event).tolist() == [8, 8]
    assert np.bincount(fold).tolist() == [14, 14]


def test_hospital_folds_need_hospitals() -> None:
    with pytest.raises(CohortError, match="2 patients have no hospital"):
        hospital_folds(["", "A", "B", ""], [True] * 4, folds=2, seed=0)


@pytest.mark.parametrize(("folds", "says"), [(1, "1 folds cannot"), (4, "3 patients do not fill")])
def test_folds_need_patients(folds: int, says: str) -> None:
    with pytest.raises(CohortError, match=says):
        stratified_folds([True, False, True], [0, 0, 0], folds=folds, seed=0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=25))
def test_comparable_pairs_by_definition(rows) -> None:
    def comparable(one: tuple[int, bool], other: tuple[int, bool]) -> bool:
        (early, died), (late, died_too) = sorted([one, other], key=lambda p: (p[0], not p[1]))
        return died and (early < late or not died_too)

    expected = sum(comparable(one, other) for one, other in combinations(rows, 2))
    days, event = [row[0] for row in rows], [row[1] for row in rows]
    assert comparable_pairs(days, event) == expected


def test_comparable_pairs_as_scikit_survival() -> None:
    sksurv = pytest.importorskip("sksurv.metrics", reason="scikit-survival is not installed")
    rng = np.random.default_rng(0)
    days, event = rng.integers(1, 20, 60).astype(float), rng.random(60) < 0.4
    _, concordant, discordant, tied_risk, _ = sksurv.concordance_index_censored(
        event, days, rng.normal(size=60)
    )
    assert comparable_pairs(days, event) == concordant + discordant + tied_risk


def write(folder: Path, *files: str) -> list[Path]:
    paths = [folder / f"splits_{fold}.csv" for fold in range(len(files))]
    for path, text in zip(paths, files, strict=True):
        path.write_text(text)
    return paths


def test_reads_published_splits(tmp_path: Path) -> None:
    paths = write(
        tmp_path,
        ",train_patient,val_patient,test_patient\n0,a,d,b\n1,c,,e\n",
        ",train_patient,val_patient,test_patient\n0,b,,a\n1,e,,c\n2,,,d\n",
    )
    assert read_splits(paths, ["a", "b", "c", "d", "e"]).tolist() == [1, 0, 1, 1, 0]
    assert read_splits(paths, ["e"]).dtype == np.int64


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("train,test\na,b\nb,c\n",), "1 patients are both trained on and tested"),
        (
            ("train,test\nb,a\n", "train,test\nc,b\nd,a\n"),
            r"splits_1.csv: 1 patients are tested here and in .*splits_0.csv",
        ),
        (("train,test\na,b\n",), "1 of 2 patients are tested in no fold"),
        (("train,val\na,b\n",), "it has no columns train and test"),
        (("train,test,train_or_test\na,b,c\n",), "a column is named after two roles"),
        (("",), "cannot be read as a table of splits"),
        (("a,b\n",), "cannot be read as a table of splits"),
        ((), "2 of 2 patients are tested in no fold"),
    ],
)
def test_contradicting_splits(tmp_path: Path, files: tuple[str, ...], says: str) -> None:
    with pytest.raises(CohortError, match=says):
        read_splits(write(tmp_path, *files), ["a", "b"])


def test_absent_split_file(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="cannot be read as a table of splits"):
        read_splits([tmp_path / "splits_0.csv"], ["a"])


ALL = "case_id\tslide_id\tOS\tOS_event\tOS_days\tfold_0\tfold_10\tfold_2\n"


def patho_bench(folder: Path, *rows: str, header: str = ALL) -> Path:
    path = folder / "k=all.tsv"
    path.write_text(header + "".join(f"{row}\n".replace(" ", "\t") for row in rows))
    return path


def test_reads_the_splits_and_outcomes_of_patho_bench(tmp_path: Path) -> None:
    path = patho_bench(
        tmp_path,
        "a a1 0 1 90.0 train train test",
        "a a2 0 1 90.0 train train test",
        "b b1 1 0 800.0 test val train",
        "c c1 1 1 400.0 val test train",
    )
    read = read_outcomes(path, endpoint="OS", cancers=[Cancer.UVM])
    assert [(r.patient_id, r.days, r.event, r.slides) for r in read.rows] == [
        ("a", 90, True, ("a1", "a2")),
        ("b", 800, False, ("b1",)),
        ("c", 400, True, ("c1",)),
    ]
    assert read_splits([path], [r.patient_id for r in read.rows]).tolist() == [1, 0, 2]


def test_folds_are_counted_on_from_file_to_file(tmp_path: Path) -> None:
    (one,) = write(tmp_path, "train,test\na,b\n")
    path = patho_bench(tmp_path, "a a1 0 1 9 train train test", "b b1 0 1 9 train train train")
    assert read_splits([one, path], ["a", "b"]).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            ["a a1 0 1 9 train train test", "a a2 0 1 9 train train train"],
            "k=all.tsv: 1 patients are both trained on and tested in fold_2",
        ),
        (["a a1 0 1 9 test test train"], "1 patients are tested in fold_10 and in fold_0"),
        (["a a1 0 1 9 train val train"], "1 of 1 patients are tested in no fold"),
        (["a a1 0 1 9 test train Test"], "row 2: `fold_2` is not train, val or test"),
        (["a a1 0 1 9 test train "], "row 2: `fold_2` is not train, val or test"),
        ([" a1 0 1 9 test train train"], "row 2: no case_id"),
        (["a a1 0 1 9 test train"], "cannot be read as a table of splits"),
    ],
)
def test_contradicting_splits_of_patho_bench(tmp_path: Path, rows: list[str], says: str) -> None:
    with pytest.raises(CohortError, match=says):
        read_splits([patho_bench(tmp_path, *rows)], ["a"])


def test_folds_without_patients(tmp_path: Path) -> None:
    path = patho_bench(tmp_path, "a1 test", header="slide_id\tfold_0\n")
    with pytest.raises(CohortError, match="it has fold_0, but no case_id"):
        read_splits([path], ["a"])
