"""A hospital's own files with synthetic patients, for people who practise a federation."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from cropkt.cancers import Cancer
from cropkt.cohort.features import write_slide_h5
from cropkt.cohort.outcomes import PatientOutcome
from cropkt.errors import UsageError
from cropkt_sim.synthetic import DIM, draw_cohort

ENCODER = "synthetic"
COLUMNS = ("patient_id", "slide_id", "time", "event", "cancer", "site")


def write_hospital(folder: Path, cancer: Cancer, *, seed: int) -> Iterator[str]:
    """Write `outcomes.csv` and `features/SLIDE.h5` of one cancer; yield the lines to show.

    Raises:
        UsageError: the folder has such files already.
    """
    for name in ("outcomes.csv", "features"):
        if (folder / name).exists():
            raise UsageError(folder / name, "is already there", "Name a new folder")
    patients = draw_cohort(cancer, seed=seed).patients
    (folder / "features").mkdir(parents=True)
    for slide, bag in (patients.bags or {}).items():
        write_slide_h5(folder / "features" / f"{slide}.h5", bag)
    with (folder / "outcomes.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows(row for patient in patients.rows for row in table_rows(patient))
    events = sum(row.event for row in patients.rows)
    yield f"{len(patients.rows)} synthetic patients of {cancer}, {events} events, in {folder}"
    yield f"features of width {DIM}: write `dim: {DIM}` into study.yaml"
    yield f"and as the encoder, there and in site.yaml: {ENCODER}"


def table_rows(patient: PatientOutcome) -> Iterator[tuple[object, ...]]:
    """Yield the rows of `outcomes.csv` of a patient, one a slide."""
    days, event = f"{patient.days:.17g}", int(patient.event)
    for slide in patient.slides:
        yield patient.patient_id, slide, days, event, patient.cancer, patient.hospital
