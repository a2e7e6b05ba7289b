"""Features on disk: real ones through the whole path, and every kind of bad input."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig, with_shape
from cropkt.errors import (
    BagShapeError,
    CohortError,
    DataError,
    MissingSlideError,
    NotEstimableError,
    OutcomeTableError,
    SlideFileError,
    UsageError,
)
from cropkt_client.site import Site
from cropkt_sim.sites import Prepared, prepare

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
HIF = SHARED / "hif607_5cancers_slides.csv.gz"
PATCHES = SHARED / "real_patch_bags"
HEADER = "patient_id,slide_id,time,event,cancer,site"


def run(folder: Path, outcomes: Path, *features: Path, **changed: Any) -> Prepared:
    options: dict[str, Any] = {
        "data": "features",
        "folder": folder,
        "cancers": None,
        "seed": 0,
        "outcomes": outcomes,
        "features": features,
        "endpoint": "DSS",
        "by": "cancers",
        "on_bad": "raise",
    }
    return prepare(**options | changed)


def cohort_of(prepared: Prepared, index: int) -> tuple[Any, tuple[str, ...]]:
    site = Site.load(prepared.folder / str(index) / "site.yaml")
    study = with_shape(StudyConfig(), dim=prepared.dim)
    return site.cohort(prepared.cancers[index], study)


def save(path: Path, features: NDArray[np.floating]) -> None:
    """Write a slide in the format that the suffix of `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("features", data=features)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(features), path)
    else:
        np.save(path, features)


# --- real features of real slides -------------------------------------------------------------


@cache
def read_hif() -> tuple[list[str], list[list[str]], NDArray[np.float64]]:
    """Return column names, cells and features (slides, 607), gaps as NaN."""
    with gzip.open(HIF, "rt", newline="") as file:
        header, *rows = list(csv.reader(file))
    first = header.index("OS.time") + 1
    values = np.array([[float(c) if c else np.nan for c in row[first:]] for row in rows])
    return header[:first], [row[:first] for row in rows], values


def write_hif(folder: Path, *, only: str = "", gaps: bool = False) -> tuple[Path, Path]:
    """Write the real slides out as a release has them; return outcomes and slide folder.

    One row is one slide, a bag of one vector (607,) float32 (values reach 1.8e7); formats take
    turns, folders are per study. 26 slides have gaps: they get the column's median over all
    slides, or with `gaps` stay NaN, which the loader must refuse. Slides without a positive
    DSS time or a DSS flag are left out, as no outcome table could hold them.
    """
    header, rows, values = read_hif()
    column = {name: i for i, name in enumerate(header)}
    if not gaps:
        values = np.where(np.isnan(values), np.nanmedian(values, axis=0), values)
    lines = [HEADER]
    for i, row in enumerate(rows):
        patient, slide, study, cancer, hospital, days, event = (
            row[column[name]]
            for name in ("patient_id", "slide_key", "type", "cancer26", "tss", "DSS.time", "DSS")
        )
        if not event or not days or float(days) <= 0 or (only and cancer != only):
            continue
        save(folder / f"TCGA-{study}" / f"{slide}{('.h5', '.npy', '.pt')[i % 3]}", f32(values[i]))
        lines.append(f"{patient},{slide},{days},{event},{cancer},{hospital}")
    (folder / "outcomes.csv").write_text("\n".join(lines) + "\n")
    return folder / "outcomes.csv", folder


def f32(values: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


@pytest.fixture(scope="module")
def hif(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if not HIF.exists():
        pytest.skip(f"{HIF} is absent: it holds real slides' features")
    return write_hif(tmp_path_factory.mktemp("hif"))


def test_real_slides_through_the_whole_path(hif: tuple[Path, Path], tmp_path: Path) -> None:
    outcomes, slides = hif
    prepared = run(tmp_path, outcomes, slides)
    assert prepared.names == ("BRCA", "LUNG", "SKCM", "STES")
    assert (prepared.dim, prepared.planted) == (607, None)
    sizes = []
    for index in range(4):
        cohort, dropped = cohort_of(prepared, index)
        assert dropped == ()
        assert cohort.bag(0).shape[1] == 607
        sizes.append((len(cohort), int(cohort.event.sum())))
    assert sizes == [(872, 61), (760, 166), (310, 122), (348, 93)]  # as PROVENANCE says
    assert any("2290 patients of 4 cancers, 442 events" in note for note in prepared.notes)
    written = yaml.safe_load((prepared.folder / "0" / "site.yaml").read_text())
    assert written["slides"] == [str(slides.resolve())]
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 1_000_000
    assert run(tmp_path, outcomes, slides) == prepared


def test_real_slides_by_hospital(hif: tuple[Path, Path], tmp_path: Path) -> None:
    prepared = run(tmp_path, *hif, cancers=(Cancer.SKCM, Cancer.STES), by="hospitals")
    assert "SKCM-other" in prepared.names
    assert list(prepared.names) == sorted(prepared.names)
    total = 0
    for index, name in enumerate(prepared.names):
        site = Site.load(prepared.folder / str(index) / "site.yaml")
        study = with_shape(StudyConfig(), dim=607)
        cohort, _ = site.cohort(Cancer(name.split("-")[0]), study)
        assert name.endswith("other") or len(cohort) >= 20
        total += len(cohort)
    assert total == 310 + 348


def test_gaps_in_real_features_are_refused_or_left_out(tmp_path: Path) -> None:
    if not HIF.exists():
        pytest.skip(f"{HIF} is absent: it holds real slides' features")
    outcomes, slides = write_hif(tmp_path / "hif", only="STES", gaps=True)
    with pytest.raises(SlideFileError, match=r"outcomes.csv row \d+: .*NaN"):
        run(tmp_path / "out", outcomes, slides)
    assert not (tmp_path / "out").exists()
    prepared = run(tmp_path / "out", outcomes, slides, on_bad="skip")
    gap = "STES: 3 slides left out: the slide's features hold NaN or infinite values"
    assert gap in prepared.notes
    _, dropped = cohort_of(prepared, 0)
    assert dropped == ()  # the site's table names usable slides only


def test_real_patch_bags(tmp_path: Path) -> None:
    if not PATCHES.exists():
        pytest.skip(f"{PATCHES} is absent: it holds real slides' patches")
    paths = sorted(PATCHES.glob("*.npy"))
    lines = [HEADER]
    for i, path in enumerate(paths):
        features = np.load(path)[:, 3:]  # without x, y, 0
        save(tmp_path / "slides" / path.name, features)
        lines.append(f"P{i},{path.stem},{100 + i},{1 - i % 2},BRCA,H")
    (tmp_path / "outcomes.csv").write_text("\n".join(lines) + "\n")
    prepared = run(tmp_path / "out", tmp_path / "outcomes.csv", tmp_path / "slides")
    cohort, _ = cohort_of(prepared, 0)
    assert prepared.dim == 256
    assert sorted(len(cohort.bag(i)) for i in range(3)) == sorted(len(np.load(p)) for p in paths)


# --- bad input --------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> tuple[Path, Path]:
    """Eight patients of two cancers with one slide each."""
    lines = [HEADER]
    for i in range(8):
        features = np.random.default_rng(i).normal(size=(5, 6)).astype(np.float32)
        save(tmp_path / "slides" / f"S{i}.h5", features)
        lines.append(f"P{i},S{i},{100 + i},{i % 2},{'UVM' if i < 4 else 'SKCM'},H")
    (tmp_path / "outcomes.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "outcomes.csv", tmp_path / "slides"


def bag(slide: str, features: NDArray[np.floating], suffix: str = ".h5") -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / "slides" / f"{slide}.h5").unlink()
        save(root / "slides" / f"{slide}{suffix}", features)

    return change


def row(number: int, text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        lines = (root / "outcomes.csv").read_text().splitlines()
        lines[number - 1 :] = [text, *lines[number:]]
        (root / "outcomes.csv").write_text("\n".join(lines) + "\n")

    return change


def missing(root: Path) -> None:
    (root / "slides" / "S1.h5").unlink()


def truncated(root: Path) -> None:
    path = root / "slides" / "S1.h5"
    path.write_bytes(path.read_bytes()[:900])


def not_a_tensor(root: Path) -> None:
    (root / "slides" / "S1.h5").unlink()
    torch.save(["not", "a", "tensor"], root / "slides" / "S1.pt")


def nobody_dies(root: Path) -> None:
    lines = [HEADER, *(f"P{i},S{i},{100 + i},0,UVM,H" for i in range(4))]
    lines += [f"P{i},S{i},{100 + i},{i % 2},SKCM,H" for i in range(4, 8)]
    (root / "outcomes.csv").write_text("\n".join(lines) + "\n")


BAD: dict[str, tuple[Callable[[Path], None], type[DataError], str]] = {
    "missing slide": (missing, MissingSlideError, "row 3: no file"),
    "wrong width": (bag("S1", np.ones((5, 7), np.float32)), BagShapeError, "row 3: .*(5, 7)"),
    "NaN": (bag("S1", np.full((5, 6), np.nan, np.float32)), SlideFileError, "row 3: .*NaN"),
    "infinite": (bag("S1", np.full((5, 6), np.inf, np.float32)), SlideFileError, "row 3: .*inf"),
    "empty bag": (bag("S1", np.ones((0, 6), np.float32)), SlideFileError, "row 3: .*empty"),
    "truncated": (truncated, SlideFileError, "S1.h5: truncated"),
    "not a tensor": (not_a_tensor, SlideFileError, "S1.pt: .*tensor"),
    "duplicate": (row(3, "P0,S1,999,1,UVM,H"), OutcomeTableError, "row 3: .*differ from row 2"),
    "time": (row(3, "P1,S1,0,1,UVM,H"), OutcomeTableError, "row 3: .*not positive"),
    "event": (row(3, "P1,S1,5,2,UVM,H"), OutcomeTableError, "row 3: .*not 0 or 1"),
    "unknown cancer": (row(3, "P1,S1,5,1,XYZ,H"), OutcomeTableError, "row 3: .*unknown code"),
    "two cancers": (row(9, "P0,S7,100,0,SKCM,H"), OutcomeTableError, "row 9: .*UVM before"),
    "no pair": (nobody_dies, NotEstimableError, "4 UVM patients .0 events. is comparable"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_error_and_leaves_nothing(
    release: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    change, error, message = BAD[kind]
    change(tmp_path)
    with pytest.raises(error, match=message) as raised:
        run(tmp_path / "out", *release)
    assert raised.value.exit_code == 65
    assert "\n" not in str(raised.value)
    assert not any(f"P{i}" in str(raised.value) for i in range(8))  # never names a patient
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outcomes.csv", "slides"]


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_can_be_skipped_and_is_reported(
    release: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    BAD[kind][0](tmp_path)
    prepared = run(tmp_path / "out", *release, on_bad="skip")
    assert any("left out" in note for note in prepared.notes)
    patients = 0
    for index in range(len(prepared.names)):
        cohort, dropped = cohort_of(prepared, index)
        assert dropped == ()
        patients += len(cohort)
    assert 4 <= patients < 8


def test_nobody_is_left(release: tuple[Path, Path], tmp_path: Path) -> None:
    for path in (tmp_path / "slides").iterdir():
        path.write_bytes(b"")
    with pytest.raises(CohortError, match="no cancer is left"):
        run(tmp_path / "out", *release, on_bad="skip")
    assert not (tmp_path / "out").exists()


def test_a_cancer_that_is_not_in_the_table(release: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="no CHOL patient"):
        run(tmp_path / "out", *release, cancers=(Cancer.CHOL, Cancer.UVM))
    assert not (tmp_path / "out").exists()


def test_cancers_of_different_widths(release: tuple[Path, Path], tmp_path: Path) -> None:
    for i in range(4, 8):
        bag(f"S{i}", np.ones((5, 9), np.float32))(tmp_path)
    with pytest.raises(BagShapeError, match="expected"):
        run(tmp_path / "out", *release)
    assert not (tmp_path / "out").exists()


def test_a_table_that_does_not_say_whose_cancer(release: tuple[Path, Path], tmp_path: Path) -> None:
    outcomes, slides = release
    lines = [",".join(line.split(",")[:4]) for line in outcomes.read_text().splitlines()]
    outcomes.write_text("\n".join(lines) + "\n")
    with pytest.raises(OutcomeTableError, match="no cancer column"):
        run(tmp_path / "out", outcomes, slides)
    assert run(tmp_path / "out", outcomes, slides, cancers=(Cancer.UVM,)).names == ("UVM",)


def test_a_changed_slide_is_another_input(release: tuple[Path, Path], tmp_path: Path) -> None:
    run(tmp_path / "out", *release)
    bag("S1", np.ones((4, 6), np.float32))(tmp_path)
    with pytest.raises(UsageError, match="other inputs"):
        run(tmp_path / "out", *release)
