"""The forms in which outcome tables are published, and which one a table is in.

The flag's meaning flips between forms (1 = event, or 1 = censored), so a table that fits no form,
or more than one, is refused and never guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from cropkt.errors import OutcomeTableError

DAYS_PER_MONTH = 30.4375
"""365.25 / 12."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Where a table keeps what, all column names in lower case."""

    name: str
    patient: str
    time: str
    flag: str
    slide: str | None = None
    cancer: str | None = None
    hospital: str | None = None
    censoring: bool = False  # the flag is 1 for a censored patient, not for an event
    months: bool = False
    note: str = ""
    cdr: bool = False  # gaps are expected, a row is a patient, the hospital is in the barcode

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns without which a table is not in this form."""
        # "type" marks TCGA-CDR; in the other forms the cancer is optional.
        named = (self.patient, self.slide, self.cancer if self.cdr else None, self.time, self.flag)
        return tuple(name for name in named if name)

    def sentence(self, endpoint: str) -> str:
        """Say which form was read, and what the flag was taken to mean."""
        unit = f"months x {DAYS_PER_MONTH}" if self.months else "days"
        meaning = "1 = CENSORED" if self.censoring else "1 = event"
        note = f"; {self.note}" if self.note else ""
        return f"{self.name}, {endpoint} ({meaning}), `{self.flag}`, `{self.time}` in {unit}{note}"


def form_of(columns: Collection[str], endpoint: str, path: Path) -> Form:
    """Return the one form that a table with these columns is in.

    Raises:
        OutcomeTableError: no form fits, or more than one.
    """
    forms = list(_forms(columns, endpoint.lower()))
    fitting = [form for form in forms if all(name in columns for name in form.needs)]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{form.name}: {', '.join(form.needs)}" for form in forms)
    if fitting:
        raise OutcomeTableError(
            path,
            f"columns {', '.join(columns)} match {len(fitting)} forms for {endpoint} "
            f"({'; '.join(f'{f.name}: {f.flag}' for f in fitting)})",
            f"Remove the columns of all but one. Forms known: {known}",
        )
    nearest = min(forms, key=lambda form: sum(name not in columns for name in form.needs))
    lacks = ", ".join(name for name in nearest.needs if name not in columns)
    raise OutcomeTableError(
        path,
        f"columns {', '.join(columns)} match no form for {endpoint}; "
        f"the nearest, {nearest.name}, lacks {lacks}",
        f"Rename or add columns. Forms known: {known}",
    )


def _forms(columns: Collection[str], endpoint: str) -> Iterator[Form]:
    """Yield all forms; where a form names its columns by endpoint, those of `endpoint`."""

    def optional(name: str) -> str | None:
        return name if name in columns else None

    yield Form(
        name="TCGA-CDR",
        patient="bcr_patient_barcode",
        time=f"{endpoint}.time",
        flag=endpoint,
        cancer="type",
        cdr=True,
    )
    unnamed = "the table does not name the endpoint"
    yield Form(
        name="plain",
        patient="patient_id",
        slide="slide_id",
        time="time",
        flag="event",
        cancer=optional("cancer"),
        hospital=optional("site"),
        note=unnamed,
    )
    yield Form(
        name="published CROPKT",
        patient="patient_id",
        slide="pathology_id",
        time="t",
        flag="e",
        cancer=optional("project"),
        hospital=optional("tss"),
        note=unnamed,
    )
    yield Form(
        name="PANTHER/MMP",
        patient="case_id",
        slide="slide_id",
        time=f"{endpoint}_survival_days",
        flag=f"{endpoint}_censorship",
        hospital=optional("tissue_source_site"),
        censoring=True,
    )
    yield _survpath(columns, endpoint)
    yield from _patho_bench(columns, endpoint)


def _survpath(columns: Collection[str], endpoint: str) -> Form:
    """Columns end in the endpoint. Without an ending they are OS, or the only ones there are."""
    ending = f"_{endpoint}"
    some_named = any(name.startswith(("survival_months_", "censorship_")) for name in columns)
    bare = f"survival_months{ending}" not in columns and (endpoint == "os" or not some_named)
    if bare:
        ending = ""
    return Form(
        name="SurvPath/PORPOISE",
        patient="case_id",
        slide="slide_id",
        time=f"survival_months{ending}",
        flag=f"censorship{ending}",
        hospital="site" if "site" in columns else None,
        censoring=True,
        months=True,
        note="the table does not name the endpoint" if bare else "",
    )


def _patho_bench(columns: Collection[str], endpoint: str) -> Iterator[Form]:
    """One form for each task whose name contains the endpoint, or one that is not there."""
    tasks = [
        name.removesuffix("_event")
        for name in columns
        if name.endswith("_event") and endpoint in name.removesuffix("_event")
    ]
    for task in tasks or [endpoint]:
        yield Form(
            name="Patho-Bench",
            patient="case_id",
            slide="slide_id",
            time=f"{task}_days",
            flag=f"{task}_event",
        )
