"""Folders of simulated sites: whole or not there, found again, read as a hospital's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cropkt.cancers import Cancer
from cropkt.cohort.outcomes import PatientOutcome, read_outcomes
from cropkt.cohort.pack import Pack
from cropkt.config import StudyConfig, with_shape
from cropkt.errors import CohortError, NotEstimableError, OutcomeTableError, UsageError
from cropkt_client.site import Site
from cropkt_sim.sites import Prepared, prepare, site_name
from cropkt_sim.tcga import has_comparable_pair, split_by_hospital

CDR = Path(__file__).resolve().parents[3] / "shared" / "data" / "tcga_cdr.csv"
needs_cdr = pytest.mark.skipif(not CDR.exists(), reason=f"{CDR} is absent: the real outcomes")
FEW = (Cancer.CHOL, Cancer.UVM)


def run(folder: Path, **changed: Any) -> Prepared:
    options: dict[str, Any] = {
        "data": "synthetic",
        "folder": folder,
        "cancers": FEW,
        "seed": 0,
        "outcomes": None,
        "features": (),
        "endpoint": "DSS",
        "by": "cancers",
        "on_bad": "raise",
    }
    return prepare(**options | changed)


def patient(i: int, hospital: str, *, event: bool = False, days: float = 100) -> PatientOutcome:
    return PatientOutcome(
        patient_id=f"P{i:03d}", days=days, event=event, cancer=Cancer.UVM, hospital=hospital
    )


def hospital_rows(name: str, count: int, *, first: int, deaths: int) -> list[PatientOutcome]:
    return [patient(first + i, name, event=i < deaths, days=100 + i) for i in range(count)]


def test_a_site_folder_is_a_hospital_s(tmp_path: Path) -> None:
    prepared = run(tmp_path)
    assert prepared.folder == tmp_path / "sites"
    assert prepared.names == ("CHOL", "UVM")
    assert prepared.cancers == FEW
    written = yaml.safe_load((prepared.folder / "1" / "site.yaml").read_text())
    assert written["site"] == "UVM"
    assert written["pack"] == "pack"
    with (prepared.folder / "1" / "outcomes.csv").open() as file:
        assert file.readline().strip() == "patient_id,slide_id,time,event,cancer,site"
    site = Site.load(prepared.folder / "1" / "site.yaml")
    study = with_shape(StudyConfig(), dim=prepared.dim)
    cohort, dropped = site.cohort(Cancer.UVM, study, check_values=True)
    assert (len(cohort), int(cohort.event.sum()), dropped) == (80, 21, ())
    assert all(cohort.hospital)
    Pack(prepared.folder / "1" / "pack").verify()


def test_sites_can_be_private(tmp_path: Path) -> None:
    prepared = run(tmp_path, epsilon=8.0)
    privacy = Site.load(prepared.folder / "1" / "site.yaml").config.privacy
    assert privacy is not None
    assert (privacy.epsilon, privacy.of_one) == (8.0, 8.0)
    with pytest.raises(UsageError, match="other inputs"):
        run(tmp_path)


def test_a_second_run_finds_the_first_and_keeps_what_sites_learnt(tmp_path: Path) -> None:
    first = run(tmp_path)
    (first.folder / "0" / "state").mkdir()
    before = (first.folder / "0" / "pack" / "patches.npy").stat().st_mtime_ns
    assert run(tmp_path) == first
    assert (first.folder / "0" / "state").is_dir()
    assert (first.folder / "0" / "pack" / "patches.npy").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"cancers": (Cancer.UVM,)}, {"programs": "none"}, {"patches": 30}]
)
def test_other_inputs_never_replace_a_folder(tmp_path: Path, changed: dict[str, Any]) -> None:
    run(tmp_path)
    with pytest.raises(UsageError, match="other inputs"):
        run(tmp_path, **changed)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    with pytest.raises(UsageError, match="other inputs"):
        run(tmp_path)
    assert not any((tmp_path / "sites").iterdir())


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cropkt_sim.sites.write_pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "new" / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changed",
    [
        {"data": "clinical"},
        {"data": "features"},
        {"data": "features", "outcomes": Path(__file__)},
        {"data": "synthetic", "outcomes": Path(__file__)},
        {"data": "clinical", "outcomes": Path(__file__), "features": (Path(),)},
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        run(tmp_path / "out", **changed)
    assert not any(tmp_path.iterdir())


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutcomeTableError, match="no such file"):
        run(tmp_path / "out", data="clinical", outcomes=tmp_path / "none.csv")
    assert not any(tmp_path.iterdir())


def test_small_hospitals_are_pooled() -> None:
    rows = [
        *hospital_rows("A", 30, first=0, deaths=5),
        *hospital_rows("B", 19, first=100, deaths=5),
        *hospital_rows("C", 25, first=200, deaths=0),  # nobody to compare
    ]
    sites, notes = split_by_hospital(rows)
    assert {name: len(members) for name, members in sites.items()} == {"A": 30, "other": 44}
    assert notes == ()


@pytest.mark.parametrize(("count", "deaths"), [(15, 0), (3, 2)])
def test_a_pool_that_cannot_stand_alone_joins_the_largest(count: int, deaths: int) -> None:
    rows = [
        *hospital_rows("A", 30, first=0, deaths=5),
        *hospital_rows("B", 31, first=100, deaths=5),
        *hospital_rows("C", count, first=200, deaths=deaths),
    ]
    sites, notes = split_by_hospital(rows)
    assert {name: len(members) for name, members in sites.items()} == {"A": 30, "B": 31 + count}
    assert notes == (
        f"{count} UVM patients of small hospitals joined B: too few for a site of their own",
    )


def test_without_any_hospital_there_is_no_split() -> None:
    with pytest.raises(CohortError, match="none of 3 UVM patients"):
        split_by_hospital(hospital_rows("", 3, first=0, deaths=1))


def test_site_names_are_names_a_roster_accepts() -> None:
    assert site_name(Cancer.UVM, "Univ. of Köln (2)") == "UVM-Univ.-of-K-ln-2-"
    assert len(site_name(Cancer.UVM, "x" * 99)) <= 62


def test_hospitals_that_differ_in_a_sign_only_stay_apart(tmp_path: Path) -> None:
    table = tmp_path / "cdr.csv"
    lines = ["patient_id,slide_id,time,event,cancer,site"]
    folder = tmp_path / "slides"
    folder.mkdir()
    for i in range(60):
        np.save(folder / f"S{i}.npy", np.zeros((2, 3), dtype=np.float32))
        lines.append(f"P{i},S{i},{10 + i},{i % 2},UVM,{'A b' if i < 30 else 'A/b'}")
    table.write_text("\n".join(lines) + "\n")
    prepared = run(
        tmp_path / "out",
        data="features",
        cancers=None,
        outcomes=table,
        features=(folder,),
        by="hospitals",
    )
    assert prepared.names == ("UVM-A-b", "UVM-A-b-2")


@needs_cdr
def test_hospitals_of_the_real_table() -> None:
    table = read_outcomes(CDR)
    for cancer in Cancer:
        rows = table.of(cancer).rows
        sites, _ = split_by_hospital(rows)
        assert Counter(row.patient_id for members in sites.values() for row in members) == (
            Counter(row.patient_id for row in rows)
        )
        for name, members in sites.items():
            assert name == "other" or len(members) >= 20
            assert has_comparable_pair(members)
            if name != "other" and len({row.hospital for row in members}) > 1:
                assert "other" not in sites  # it took the pool in


@needs_cdr
def test_sites_by_hospital_from_the_real_table(tmp_path: Path) -> None:
    prepared = run(tmp_path, data="clinical", outcomes=CDR, by="hospitals")
    # CHOL has no hospital of 20 patients: one site. UVM has two.
    assert prepared.names == ("CHOL", "UVM-V4", "UVM-VD", "UVM-other")
    sizes = [
        len(read_outcomes(prepared.folder / str(i) / "outcomes.csv"))
        for i in range(len(prepared.names))
    ]
    assert sum(sizes) == 42 + 80


@needs_cdr
def test_a_cancer_without_comparable_pair_is_an_error_or_left_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": "clinical", "outcomes": CDR, "endpoint": "DFI"}
    options["cancers"] = (Cancer.GBMLGG, Cancer.SKCM)  # no SKCM patient has a DFI
    with pytest.raises(NotEstimableError, match="no pair of 0 SKCM patients"):
        run(tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())
    prepared = run(tmp_path / "out", **options, on_bad="skip")
    assert prepared.names == ("GBMLGG",)
    assert any("SKCM left out" in note for note in prepared.notes)
