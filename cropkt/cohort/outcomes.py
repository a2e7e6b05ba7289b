"""Outcome tables: when each patient died or was last seen, and which slides are theirs.

A table is read as text, its form is recognised by its columns (`cropkt.cohort.forms`), and
`OutcomeTable.form` says which was read and what the flag meant. Times leave here in days.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cropkt.cancers import Cancer, cancer_of
from cropkt.cohort.forms import DAYS_PER_MONTH, Form, form_of
from cropkt.cohort.tables import read_table
from cropkt.errors import DataError, OutcomeTableError


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientOutcome:
    """One patient's outcome. The repr leaves out who it is."""

    patient_id: str = field(repr=False)
    days: float
    event: bool  # True for a death
    cancer: Cancer | None = None  # None if the table has no cancer column
    hospital: str = ""  # tissue source site, "" if unknown
    slides: tuple[str, ...] = field(default=(), repr=False)
    slide_rows: tuple[int, ...] = ()  # row of each slide in the table, where known

    def with_slides(self, numbered: Sequence[tuple[str, int]]) -> PatientOutcome:
        """Return the patient with these (slide id, row or 0) instead."""
        return replace(
            self,
            slides=tuple(slide_id for slide_id, _ in numbered),
            slide_rows=tuple(row for _, row in numbered),
        )

    def numbered_slides(self) -> list[tuple[str, int]]:
        """Return (slide id, row), with row 0 where it is not known."""
        rows = self.slide_rows or (0,) * len(self.slides)
        return list(zip(self.slides, rows, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class OutcomeTable:
    """Patients with a usable outcome, sorted by patient id."""

    form: str  # which form was read, and what its flag meant
    endpoint: str
    rows: tuple[PatientOutcome, ...]
    dropped: tuple[str, ...] = ()  # a line for each reason patients were left out
    where: str = "outcome table"

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"OutcomeTable({self.form}, {len(self)} patients)"

    def of(self, cancer: Cancer) -> OutcomeTable:
        """Return the patients of one cancer; all of them if the table has no cancer column."""
        rows = (replace(row, cancer=cancer) if row.cancer is None else row for row in self.rows)
        return replace(self, rows=tuple(row for row in rows if row.cancer is cancer))


def read_outcomes(
    path: Path | str,
    *,
    endpoint: str = "DSS",
    cancers: Collection[Cancer] | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
) -> OutcomeTable:
    """Read a table of outcomes, one row a slide, or one row a patient for TCGA-CDR.

    Args:
        path: CSV or TSV, may end in `.gz`.
        endpoint: OS, DSS, DFI, PFI, or part of a task's name.
        cancers: whom to keep; rows of others are not checked further. All by default.
        on_bad: "raise" at the first bad row, or "skip" its patient and count.

    Raises:
        OutcomeTableError: the form is unknown or ambiguous, the table is empty, nobody is left,
            or a row is bad: no patient id, time not a positive number, event not 0 or 1, unknown
            cancer, two rows that disagree on a patient, a slide twice.
    """
    path = Path(path)
    if not endpoint.strip():
        raise OutcomeTableError(path, "no endpoint was asked for", "Use OS, DSS, DFI or PFI")
    table = read_table(path)
    form = form_of(table.columns, endpoint.strip(), path)
    wanted = frozenset(Cancer if cancers is None else cancers)
    if form.cancer is None and cancers is not None and len(wanted) != 1:
        raise OutcomeTableError(
            path,
            f"the table has no cancer column, and {len(wanted)} cancers are asked for",
            "Add the column, or read it for one cancer",
        )
    assumed = next(iter(wanted)) if form.cancer is None and cancers is not None else None
    reader = _Rows(path=path, form=form, on_bad=on_bad, wanted=wanted, assumed=assumed)
    for number, cells in table.rows:
        reader.add(number, cells)
    endpoint = endpoint.strip().upper()
    rows = reader.patients()
    dropped = reader.dropped(endpoint)
    if not rows:
        raise OutcomeTableError(
            path,
            f"no patient with a usable {endpoint} is left ({'; '.join(dropped) or 'none found'})",
            "Check the endpoint and the cancers asked for",
        )
    return OutcomeTable(
        form=form.sentence(endpoint), endpoint=endpoint, rows=rows, dropped=dropped, where=str(path)
    )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 patient", "2 patients"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(slots=True, kw_only=True)
class _Rows:
    """Gathers the rows of a table by patient, and the patients that fall out."""

    path: Path
    form: Form
    on_bad: Literal["raise", "skip"]
    wanted: frozenset[Cancer]
    assumed: Cancer | None
    kept: dict[str, PatientOutcome] = field(default_factory=dict)
    first_row: dict[str, int] = field(default_factory=dict)
    cancer_of_patient: dict[str, Cancer] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)  # of a slide
    bad: dict[str, str] = field(default_factory=dict)  # patient to reason
    gaps: dict[str, set[str]] = field(default_factory=dict)  # expected ones, reason to patients

    def add(self, number: int, cells: dict[str, str]) -> None:
        """Take one row, or note why its patient falls out."""
        patient_id = cells[self.form.patient]
        try:
            self._add(number, patient_id, cells)
        except DataError as error:
            if self.on_bad == "raise":
                raise OutcomeTableError(
                    f"{self.path} row {number}", error.problem, error.fix
                ) from error
            self.bad.setdefault(patient_id or f"row {number}", error.where)

    def patients(self) -> tuple[PatientOutcome, ...]:
        """Return those without a bad row, sorted by id."""
        return tuple(self.kept[name] for name in sorted(self.kept) if name not in self.bad)

    def dropped(self, endpoint: str) -> tuple[str, ...]:
        """Return a line for each reason, with the number of patients."""
        lines = [
            f"{counted(len(patients), 'patient')} left out: {reason.format(endpoint=endpoint)}"
            for reason, patients in sorted(self.gaps.items())
        ]
        reasons = list(self.bad.values())
        return (
            *lines,
            *(
                f"{counted(reasons.count(r), 'patient')} left out: {r}"
                for r in sorted(set(reasons))
            ),
        )

    def _add(self, number: int, patient_id: str, cells: dict[str, str]) -> None:
        # In the errors of this method `where` is the reason that skipped patients count under.
        form = self.form
        if not patient_id:
            raise DataError("no patient id", f"no `{form.patient}`", "Fill it in")
        cancer = self._cancer(patient_id, cells)
        if cancer is not None and cancer not in self.wanted:
            return
        if form.cdr and (cancer is None or self._is_gap(patient_id, cells)):
            return
        days, event = self._days(cells[form.time]), self._event(cells[form.flag])
        hospital = cells[form.hospital] if form.hospital else ""
        if form.cdr:
            hospital = [*patient_id.split("-"), ""][1]
        row = PatientOutcome(
            patient_id=patient_id, days=days, event=event, cancer=cancer, hospital=hospital
        )
        before = self.kept.get(patient_id)
        earlier = self.first_row.setdefault(patient_id, number)
        if before is None:
            self.kept[patient_id] = row
        elif form.cdr:
            raise DataError(
                "two rows", f"a second row of the patient of row {earlier}", "Keep one of them"
            )
        elif replace(before, slides=(), slide_rows=()) != row:
            raise DataError(
                "rows that disagree",
                f"time, event or hospital differ from row {earlier} of the same patient",
                "Make the patient's rows agree",
            )
        if form.slide:
            self._add_slide(number, patient_id, cells[form.slide])

    def _add_slide(self, number: int, patient_id: str, slide_id: str) -> None:
        if not slide_id:
            raise DataError("no slide id", f"no `{self.form.slide}`", "Fill it in")
        owner = self.owner.setdefault(slide_id, patient_id)
        patient = self.kept[patient_id]
        if owner != patient_id:
            reason = "a slide of two patients"
            self.bad.setdefault(owner, reason)
            raise DataError(
                reason,
                f"the slide is also that of the patient of row {self.first_row[owner]}",
                "A slide belongs to one patient",
            )
        if slide_id in patient.slides:
            raise DataError(
                "a slide listed twice", "the slide is listed before", "Keep one of the rows"
            )
        self.kept[patient_id] = patient.with_slides(
            [*patient.numbered_slides(), (slide_id, number)]
        )

    def _cancer(self, patient_id: str, cells: dict[str, str]) -> Cancer | None:
        if self.form.cancer is None:
            return self.assumed
        try:
            cancer = cancer_of(cells[self.form.cancer])
        except DataError as error:
            if self.form.cdr:  # holds studies that no expert is for, such as LAML
                if self.wanted == frozenset(Cancer):
                    self._gap("of a study without slides", patient_id)
                return None
            raise DataError("unknown cancer", error.problem, error.fix) from error
        if self.cancer_of_patient.setdefault(patient_id, cancer) is not cancer:
            raise DataError(
                "two cancers",
                f"the patient is {cancer} here and {self.cancer_of_patient[patient_id]} before",
                "Keep the cancer that the slides are of",
            )
        return cancer

    def _gap(self, reason: str, patient_id: str) -> None:
        self.gaps.setdefault(reason, set()).add(patient_id)

    def _is_gap(self, patient_id: str, cells: dict[str, str]) -> bool:
        """Return whether TCGA-CDR itself says that there is no usable outcome here."""
        if cells.get("redaction", "").lower() == "redacted":
            self._gap("redacted", patient_id)
            return True
        time, flag = cells[self.form.time], cells[self.form.flag]
        absent = any(not cell or cell[0] in "[#" for cell in (time, flag))
        if absent or (_is_number(time) and float(time) <= 0):
            self._gap("no event or time of {endpoint}, or time not positive", patient_id)
            return True
        return False

    def _days(self, text: str) -> float:
        name = self.form.time
        if not _is_number(text):
            raise DataError(
                "time not a number", f"`{name}` is {text!r}, not a number", "Correct or remove it"
            )
        time = float(text)
        if time <= 0:
            raise DataError(
                "time not positive", f"`{name}` is {text}, not positive", "Correct or remove it"
            )
        return time * DAYS_PER_MONTH if self.form.months else time

    def _event(self, text: str) -> bool:
        if not _is_number(text) or float(text) not in (0.0, 1.0):
            raise DataError(
                "event not 0 or 1", f"`{self.form.flag}` is {text!r}, not 0 or 1", "Correct it"
            )
        return (float(text) == 1.0) is not self.form.censoring


def _is_number(text: str) -> bool:
    try:
        return "_" not in text and math.isfinite(float(text))
    except ValueError:
        return False
