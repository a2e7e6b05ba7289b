"""Real features on disk, as hospitals have them: nothing is copied, everything is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort, load_cohort
from cropkt.cohort.features import SlideFolders
from cropkt.cohort.outcomes import OutcomeTable, PatientOutcome, counted, read_outcomes
from cropkt.errors import CohortError, DataError, NotEstimableError
from cropkt_sim.tcga import Patients


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SlideTable:
    """Patients with usable slides, by cancer, and what is to be told of them."""

    patients: dict[Cancer, Patients]
    dim: int
    notes: tuple[str, ...]


def read_slides(
    outcomes: Path,
    source: SlideFolders,
    *,
    endpoint: str,
    cancers: Sequence[Cancer] | None,
    on_bad: Literal["raise", "skip"] = "raise",
) -> SlideTable:
    """Join an outcome table and folders of slide files, and check every slide once.

    Args:
        outcomes: any form that `read_outcomes` knows.
        source: the slide files.
        endpoint: OS, DSS, PFI or DFI.
        cancers: whom to take; those in the table by default.
        on_bad: raise at the first bad row, slide or cancer, or leave it out and say so.

    Raises:
        DataError: a row or a slide is bad, widths differ, a cancer has no patient or no
            comparable pair, or, when skipping, no cancer is left.
    """
    # Naming all 26 refuses a table that does not say whose cancer is whose.
    table = read_outcomes(
        outcomes, endpoint=endpoint, cancers=cancers or tuple(Cancer), on_bad=on_bad
    )
    chosen = sorted(cancers or {row.cancer for row in table.rows if row.cancer is not None})
    patients: dict[Cancer, Patients] = {}
    notes: list[str] = [f"{outcomes}: {table.form}", *table.dropped]
    dim: int | None = None
    for cancer in chosen:
        try:
            cohort, dropped = load_cohort(table, source, cancer=cancer, dim=dim, on_bad=on_bad)
        except (CohortError, NotEstimableError) as error:
            if on_bad == "raise":
                raise
            notes.append(f"{cancer} left out: {error.problem}")
            continue
        dim = cohort.dim
        patients[cancer] = Patients(rows=_rows(cohort, table))
        notes += [f"{cancer}: {line}" for line in dropped]
    if dim is None:
        raise CohortError(outcomes, f"no cancer is left ({'; '.join(notes[1:])})", "Correct them")
    rows = [row for held in patients.values() for row in held.rows]
    notes.append(
        f"{counted(len(rows), 'patient')} of {counted(len(patients), 'cancer')}, "
        f"{sum(row.event for row in rows)} events, "
        f"{counted(sum(len(row.slides) for row in rows), 'slide')} of {dim} features"
    )
    return SlideTable(patients=patients, dim=dim, notes=tuple(notes))


def slide_stamps(source: SlideFolders) -> list[tuple[str, int, int]]:
    """Return (path, bytes, time of change) of every slide's file, sorted."""
    stamps = []
    for slide_id in source.slide_ids():
        try:
            path = source.path(slide_id)
        except DataError:  # named twice: an error only where an outcome table asks for it
            continue
        stamps.append(file_stamp(path))
    return sorted(stamps)


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Return (path, bytes, time of change) of a file: the same stamp, the same content."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _rows(cohort: Cohort, table: OutcomeTable) -> tuple[PatientOutcome, ...]:
    """Return the patients of a cohort with the slides that passed."""
    outcome = {row.patient_id: row for row in table.rows}
    return tuple(
        outcome[patient_id].with_slides([(slide, 0) for slide in slides])
        for patient_id, slides in zip(cohort.patient_ids, cohort.slides, strict=True)
    )
