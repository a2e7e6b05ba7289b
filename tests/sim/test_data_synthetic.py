"""The planted truth is there, and only that."""

from __future__ import annotations

import csv
import json
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cropkt.cancers import Cancer
from cropkt.survival.metrics import concordance
from cropkt_sim import synthetic
from cropkt_sim.sites import prepare
from cropkt_sim.synthetic import PROGRAM_OF, Programs, SyntheticCohort, draw_cohort, relatives_of
from cropkt_sim.tcga import SIZES

Floats = NDArray[np.float64]


@cache
def cohort(cancer: Cancer, programs: Programs = "default") -> SyntheticCohort:
    return draw_cohort(cancer, seed=0, programs=programs)


def outcomes(of: SyntheticCohort) -> tuple[Floats, NDArray[np.bool_]]:
    rows = of.patients.rows
    return np.array([row.days for row in rows]), np.array([row.event for row in rows])


def pooled(of: SyntheticCohort) -> Floats:
    """Mean patch of each patient (n, D): what a probe without attention sees."""
    assert of.patients.bags is not None
    return np.stack([bag.astype(np.float64).mean(0) for bag in of.patients.bags.values()])


def probe(of: SyntheticCohort) -> Floats:
    """Return a direction (D,): ridge regression of deaths per follow-up on the mean patch."""
    x = pooled(of) - pooled(of).mean(0)
    days, event = outcomes(of)
    # Martingale residuals of the null model: deaths seen less deaths expected.
    order = np.argsort(days)
    at_risk = np.arange(len(days), 0, -1)
    expected = np.empty(len(days))
    expected[order] = np.cumsum(event[order] / at_risk)
    solved = np.linalg.solve(x.T @ x + 0.1 * len(x) * np.eye(x.shape[1]), x.T @ (event - expected))
    return np.asarray(solved)


def transfer(source: SyntheticCohort, target: SyntheticCohort) -> float:
    found = concordance(*outcomes(target), pooled(target) @ probe(source)).c_index
    assert found is not None
    return found


def test_sizes_are_those_of_tcga() -> None:
    assert sum(size.patients for size in SIZES.values()) == 10_445
    for cancer in Cancer:
        days, event = outcomes(cohort(cancer))
        size = SIZES[cancer]
        assert (len(days), event.sum()) == (size.patients, size.deaths)
        assert len({row.hospital for row in cohort(cancer).patients.rows}) == size.hospitals
        assert (days > 0).all()
        assert (days == np.round(days)).all()


def test_bags_vary_in_size_and_are_finite_float16() -> None:
    bags = cohort(Cancer.BRCA).patients.bags
    assert bags is not None
    counts = np.array([len(bag) for bag in bags.values()])
    assert counts.min() >= 8
    assert 22 < counts.mean() < 26
    assert np.quantile(counts, 0.9) > 2 * np.quantile(counts, 0.1)
    assert all(bag.dtype == np.float16 and bag.shape[1] == 32 for bag in bags.values())
    assert all(np.isfinite(bag).all() for bag in bags.values())


def test_the_best_reachable_c_index_is_about_78() -> None:
    big = [c for c in Cancer if SIZES[c].deaths >= 20]
    best = [synthetic.best_c_index(cohort(c)) for c in big]
    assert 0.74 < np.mean(best) < 0.82


def test_a_probe_serves_relatives_and_nobody_else() -> None:
    sources = [Cancer.LUNG, Cancer.OV, Cancer.STES, Cancer.SKCM, Cancer.GBMLGG]
    targets = [Cancer.HNSC, Cancer.BLCA, Cancer.UCEC, Cancer.LIHC, Cancer.PAAD, Cancer.KIPAN]
    strangers = []
    for source in sources:
        for target in targets:
            c_index = transfer(cohort(source), cohort(target))
            if PROGRAM_OF[source] == PROGRAM_OF[target]:
                assert c_index > 0.6, (source, target)
            else:
                strangers.append(c_index)
    assert abs(np.mean(strangers) - 0.5) < 0.03
    assert max(strangers) < 0.62


def test_without_programs_nothing_can_be_learnt() -> None:
    for target in (Cancer.HNSC, Cancer.BLCA):
        lung = cohort(Cancer.LUNG, "none")
        assert abs(transfer(lung, cohort(target, "none")) - 0.5) < 0.06
    x, risk = pooled(cohort(Cancer.BRCA, "none")), cohort(Cancer.BRCA, "none").risk
    correlation = np.corrcoef(x.T, risk)[-1, :-1]
    assert np.abs(correlation).max() < 4 / np.sqrt(len(risk))


def test_nearly_every_cancer_has_a_relative() -> None:
    alone = [c for c in Cancer if not relatives_of(c, tuple(Cancer))]
    assert alone == [Cancer.GBMLGG]
    assert relatives_of(Cancer.UVM, tuple(Cancer)) == ["PCPG", "SKCM"]


def test_a_cohort_depends_on_its_seed_alone() -> None:
    again, other = draw_cohort(Cancer.UVM, seed=0), draw_cohort(Cancer.UVM, seed=1)
    assert again.patients.rows == cohort(Cancer.UVM).patients.rows
    assert again.patients.rows != other.patients.rows
    assert (pooled(again) == pooled(cohort(Cancer.UVM))).all()
    assert not (pooled(again) == pooled(other)).any()


def write(folder: Path, *cancers: Cancer, programs: Programs = "default") -> Path:
    prepared = prepare(
        data="synthetic",
        folder=folder,
        cancers=cancers or None,
        seed=0,
        outcomes=None,
        features=(),
        endpoint="DSS",
        by="cancers",
        on_bad="raise",
        programs=programs,
    )
    assert prepared.planted == synthetic.read_planted(prepared.folder)
    return prepared.folder


def contents(folder: Path) -> dict[str, bytes]:
    names = ("outcomes.csv", "site.yaml", "pack/patches.npy", "pack/slides.csv")
    return {name: (folder / name).read_bytes() for name in names}


def test_all_cancers_are_written_in_seconds_and_a_subset_is_the_same(tmp_path: Path) -> None:
    started = time.monotonic()
    everything = write(tmp_path / "all")
    assert time.monotonic() - started < 30  # about 2 s alone on one core
    few = write(tmp_path / "few", Cancer.UVM, Cancer.SKCM)
    names = sorted(Cancer)
    assert contents(few / "0") == contents(everything / str(names.index(Cancer.SKCM)))
    assert contents(few / "1") == contents(everything / str(names.index(Cancer.UVM)))
    truth = json.loads((few / "truth.json").read_text())
    assert truth["relatives"] == {"SKCM": ["UVM"], "UVM": ["SKCM"]}
    assert truth["programs"] == {"SKCM": "neural crest", "UVM": "neural crest"}
    with (everything / "truth_risk.csv").open() as file:
        risk = {row["patient_id"]: float(row["risk"]) for row in csv.DictReader(file)}
    assert len(risk) == 10_445
    expected = cohort(Cancer.UVM)
    found = [risk[row.patient_id] for row in expected.patients.rows]
    assert found == pytest.approx(list(expected.risk), abs=1e-5)


def test_without_programs_the_truth_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path, Cancer.UVM, Cancer.SKCM, programs="none")
    truth = json.loads((folder / "truth.json").read_text())
    assert truth["relatives"] == {"SKCM": [], "UVM": []}
    assert truth["programs"] == {}
    assert set(truth["best_c_index"].values()) == {0.5}
