"""Which slides of which patients can be used, and why the others cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cropkt.cohort.outcomes import PatientOutcome
from cropkt.cohort.source import SlideSource
from cropkt.errors import (
    BagShapeError,
    CohortError,
    DataError,
    MissingSlideError,
    SlideFileError,
)

OnBad = Literal["raise", "skip"]
"""Raise at the first bad input, or leave the patient or slide out and count it."""


def all_finite(features: Tensor) -> bool:
    """Return whether no value is NaN or infinite, in one pass and without a temporary."""
    if features.numel() == 0:
        return True
    low, high = torch.aminmax(features)  # NaN wins both
    return math.isfinite(low.item()) and math.isfinite(high.item())


@dataclass(slots=True, kw_only=True)
class SlideCheck:
    """Checks slides one at a time; counts what it leaves out.

    The error of a slide names its file or its row, whichever exists; the counted reasons name
    neither.
    """

    source: SlideSource
    where: str
    dim: int | None
    on_bad: OnBad
    reasons: Counter[str]
    lost: int = 0

    def headers(self, patients: Sequence[PatientOutcome]) -> list[PatientOutcome]:
        """Return the patients with the slides that exist, are not empty and have the width.

        Raises:
            MissingSlideError, SlideFileError, BagShapeError: if `on_bad` is "raise".
        """
        return list(self._keep(patients, self._check_header))

    def values(self, patients: Sequence[PatientOutcome]) -> list[PatientOutcome]:
        """Return the patients with the slides whose values are all finite, reading each once.

        Raises:
            SlideFileError: if `on_bad` is "raise".
        """
        return list(self._keep(patients, self._check_values))

    def _keep(
        self, patients: Sequence[PatientOutcome], check: Callable[[str, str], None]
    ) -> Iterator[PatientOutcome]:
        for patient in patients:
            kept: list[tuple[str, int]] = []
            for slide_id, row in patient.numbered_slides():
                try:
                    check(slide_id, f"{self.where} row {row}" if row else self.where)
                except DataError as error:
                    if self.on_bad == "raise":
                        raise
                    self.reasons[error.problem] += 1
                else:
                    kept.append((slide_id, row))
            if kept:
                yield patient.with_slides(kept)
            else:
                self.lost += 1

    def _check_header(self, slide_id: str, row: str) -> None:
        if slide_id not in self.source:
            raise MissingSlideError(
                row,
                "no file for this slide",
                "Give the folder that holds it, remove the row, or skip bad slides",
            )
        patches, width = self.source.shape(slide_id)
        if patches == 0:
            raise SlideFileError(
                row, "the slide's bag is empty", "Extract it again, or remove the row"
            )
        if self.dim is None:
            self.dim = width
        if width != self.dim:
            raise BagShapeError(
                row,
                f"features have shape ({patches}, {width}), expected (patches, {self.dim})"
                if self.on_bad == "raise"
                else f"features are {width} wide, expected {self.dim}",
                "Extract all slides with the agreed encoder, or correct the width",
            )

    def _check_values(self, slide_id: str, row: str) -> None:
        if not all_finite(self.source.features(slide_id)):
            raise SlideFileError(
                row,
                "the slide's features hold NaN or infinite values",
                "Extract it again (values over 65504 overflow float16: store float32)",
            )


def slides_by_name(patients: Sequence[PatientOutcome], source: SlideSource) -> list[PatientOutcome]:
    """Give each patient the slides whose names begin with the patient's id.

    For tables without a slide column, such as TCGA-CDR. The id must end where a `-`, `_`, `.` or
    blank of the slide's name follows, or be the whole name; the longest id that fits wins. A
    patient without slides gets none.
    """
    found: dict[str, list[tuple[str, int]]] = {patient.patient_id: [] for patient in patients}
    if len(found) != len(patients):
        raise CohortError("cohort", "a patient has two rows", "Read the table again")
    for slide_id in source.slide_ids():
        cuts = [n for n, letter in enumerate(slide_id) if letter in "-_. "]
        for cut in (len(slide_id), *reversed(cuts)):
            if slide_id[:cut] in found:
                found[slide_id[:cut]].append((slide_id, 0))
                break
    return [patient.with_slides(found[patient.patient_id]) for patient in patients]
