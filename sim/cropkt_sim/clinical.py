"""Real patients without slides: TCGA-CDR covariates as bags of four tokens.

A patient is a bag of four patches of width 19, float32: one token each for age, sex, stage and
grade. All experts of the simulation then apply unchanged, and real outcomes decide what transfers.

| column | age token | sex token | stage token | grade token |
|---|---|---|---|---|
| 0-3 | 1 0 0 0 | 0 1 0 0 | 0 0 1 0 | 0 0 0 1 |
| 4 | 1 if missing | 1 if missing | 1 if missing | 1 if missing |
| 5-7 | z = (age - 60) / 15, max(z, 0), max(z - 1, 0) | | | |
| 8 | | +1 male, -1 female | | |
| 9 | | | (stage - 2.5) / 1.2 | |
| 10-13 | | | stage I, II, III, IV | |
| 14 | | | | grade - 2.3 |
| 15-18 | | | | grade 1, 2, 3, 4 |

Everything else is 0, and so are the values of a missing covariate. Stage is the pathologic one,
or the clinical one where that is unknown: I to IV count 1 to 4, B adds 1/6 and C 1/3 to it,
`0` and `IS` are 0. Grade is G1 to G4; low grade counts as 1 and high grade as 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cropkt.cancers import Cancer
from cropkt.cohort.outcomes import counted, read_outcomes
from cropkt.cohort.tables import read_table
from cropkt.errors import OutcomeTableError
from cropkt_sim.tcga import Patients

DIM = 19
_AGE, _SEX, _STAGE, _GRADE = range(4)  # tokens, and their columns of the kind
_MISSING = 4
_ID = "bcr_patient_barcode"
_COLUMNS = {
    "age": "age_at_initial_pathologic_diagnosis",
    "sex": "gender",
    "pathologic stage": "ajcc_pathologic_tumor_stage",
    "clinical stage": "clinical_stage",
    "grade": "histological_grade",
}
_STAGE_FORM = re.compile(r"(?:STAGE )?(0|IS|IV|I{1,3})(A|B|C)?[0-9]?")
_NUMERALS = {"0": 0.0, "IS": 0.0, "I": 1.0, "II": 2.0, "III": 3.0, "IV": 4.0}
_LETTERS = {"": 0.0, "A": 0.0, "B": 1 / 6, "C": 1 / 3}
_GRADES = {"G1": 1.0, "G2": 2.0, "G3": 3.0, "G4": 4.0, "LOW GRADE": 1.0, "HIGH GRADE": 3.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Covariates:
    """What is known of a patient at diagnosis; nan where it is not."""

    age: float  # years
    male: float  # 1 or 0
    stage: float  # 0 to 4 1/3
    grade: float  # 1 to 4

    @classmethod
    def of(cls, cells: dict[str, str]) -> Covariates:
        """Read a row of the table; what is not understood is missing."""
        stage = parse_stage(cells[_COLUMNS["pathologic stage"]])
        if math.isnan(stage):
            stage = parse_stage(cells[_COLUMNS["clinical stage"]])
        return cls(
            age=_years(cells[_COLUMNS["age"]]),
            male={"MALE": 1.0, "FEMALE": 0.0}.get(cells[_COLUMNS["sex"]].upper(), math.nan),
            stage=stage,
            grade=_GRADES.get(cells[_COLUMNS["grade"]].upper(), math.nan),
        )

    def tokens(self) -> NDArray[np.float32]:
        """Return the bag (4, 19) that the module describes."""
        x = np.zeros((4, DIM), dtype=np.float32)
        x[range(4), range(4)] = 1
        x[:, _MISSING] = [math.isnan(v) for v in (self.age, self.male, self.stage, self.grade)]
        if not x[_AGE, _MISSING]:
            z = (self.age - 60) / 15
            x[_AGE, 5:8] = z, max(z, 0), max(z - 1, 0)
        if not x[_SEX, _MISSING]:
            x[_SEX, 8] = 2 * self.male - 1
        if not x[_STAGE, _MISSING]:
            x[_STAGE, 9] = (self.stage - 2.5) / 1.2
            x[_STAGE, 10:14] = np.arange(1, 5) == math.floor(self.stage)
        if not x[_GRADE, _MISSING]:
            x[_GRADE, 14] = self.grade - 2.3
            x[_GRADE, 15:19] = np.arange(1, 5) == self.grade
        return x


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ClinicalTable:
    """All patients of a table, by cancer, and what is to be told of them."""

    patients: dict[Cancer, Patients]
    notes: tuple[str, ...]


def read_clinical(
    path: Path,
    *,
    endpoint: str,
    cancers: Collection[Cancer] | None,
    on_bad: Literal["raise", "skip"] = "raise",
) -> ClinicalTable:
    """Read outcomes and covariates of the TCGA Clinical Data Resource.

    Args:
        path: the table, CSV or TSV.
        endpoint: OS, DSS, PFI or DFI.
        cancers: whom to keep; all 26 by default.
        on_bad: raise at a bad row, or leave the patient out and count.

    Raises:
        OutcomeTableError: a row is bad, or the table is not TCGA-CDR with its covariates.
    """
    outcomes = read_outcomes(path, endpoint=endpoint, cancers=cancers, on_bad=on_bad)
    table = read_table(path)
    if lacking := [name for name in (_ID, *_COLUMNS.values()) if name not in table.columns]:
        raise OutcomeTableError(
            path, f"lacks columns {', '.join(lacking)}", "Give the TCGA-CDR table with all columns"
        )
    wanted = {row.patient_id for row in outcomes.rows}
    covariates: dict[str, Covariates] = {}
    for _, cells in table.rows:
        if cells[_ID] in wanted:
            covariates.setdefault(cells[_ID], Covariates.of(cells))
    patients: dict[Cancer, Patients] = {}
    for cancer in sorted({row.cancer for row in outcomes.rows if row.cancer is not None}):
        rows = tuple(  # the tokens stand for a patient's only slide
            row.with_slides([(row.patient_id, 0)]) for row in outcomes.of(cancer).rows
        )
        bags = {row.patient_id: covariates[row.patient_id].tokens() for row in rows}
        patients[cancer] = Patients(rows=rows, bags=bags)
    missing = {
        "age": sum(math.isnan(c.age) for c in covariates.values()),
        "sex": sum(math.isnan(c.male) for c in covariates.values()),
        "stage": sum(math.isnan(c.stage) for c in covariates.values()),
        "grade": sum(math.isnan(c.grade) for c in covariates.values()),
    }
    notes = (
        f"{path}: {outcomes.form}",
        f"{counted(len(outcomes), 'patient')} of {counted(len(patients), 'cancer')}, "
        f"{sum(row.event for row in outcomes.rows)} events",
        *outcomes.dropped,
        "Not known: " + ", ".join(f"{name} of {count}" for name, count in missing.items()),
    )
    return ClinicalTable(patients=patients, notes=notes)


def parse_stage(text: str) -> float:
    """Return the stage as a number from 0 to 4 1/3, nan if it is not one stage."""
    found = _STAGE_FORM.fullmatch(text.strip().upper())
    return _NUMERALS[found[1]] + _LETTERS[found[2] or ""] if found else math.nan


def _years(text: str) -> float:
    try:
        years = float(text)
    except ValueError:
        return math.nan
    return years if 0 <= years <= 120 else math.nan
