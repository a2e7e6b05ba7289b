"""Patients as bags of patches: a patient's bag is all patches of all their slides.

Features stay on disk in the type they were stored in; a bag is read when asked for.
Shapes: n patients, N patches of one bag, P patches of several, D feature width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cropkt.cancers import Cancer
from cropkt.cohort.checks import OnBad, SlideCheck, slides_by_name
from cropkt.cohort.outcomes import OutcomeTable, counted
from cropkt.cohort.source import SlideSource
from cropkt.cohort.splits import comparable_pairs
from cropkt.errors import BagShapeError, CohortError, MissingSlideError, NotEstimableError
from cropkt.survival.bins import time_bins

LARGE = 1 << 22  # values from which on slides are not held twice to be joined

__all__ = ["Cohort", "PackedBags", "SlideSource", "load_cohort", "mean_pooled"]

UNNAMED = "no slide's name begins with their id"
"""Why patients of a table without slide column are left out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBags:
    """Several bags end to end, so that one pass serves them all without padding."""

    patches: Tensor  # (P, D), storage dtype
    segment: Tensor  # (P,) int64, which bag each patch is of
    count: int

    @classmethod
    def of(cls, bags: Sequence[Tensor]) -> PackedBags:
        """Pack bags (N_i, D); bags of different float types get the wider type.

        Raises:
            CohortError: there is no bag.
            BagShapeError: a bag is empty, or bags differ in width.
        """
        return cls.joined([[bag] for bag in bags])

    @classmethod
    def joined(cls, bags: Sequence[Sequence[Tensor]]) -> PackedBags:
        """Pack bags that come in pieces, such as the slides of a patient, copying once."""
        pieces = [piece for bag in bags for piece in bag]
        if not pieces:
            raise CohortError("bags", "there is no bag to pack", "Ask for at least one patient")
        if any(piece.ndim != 2 for piece in pieces) or len({p.shape[1] for p in pieces}) > 1:
            shapes = sorted({tuple(piece.shape) for piece in pieces})
            raise BagShapeError(
                "bags", f"bags of shapes {shapes} do not pack", "All must be (patches, width)"
            )
        lengths = torch.tensor([sum(piece.shape[0] for piece in bag) for bag in bags])
        if not bool((lengths > 0).all()):
            raise BagShapeError("bags", "a bag is empty", "Leave such patients out")
        segment = torch.repeat_interleave(torch.arange(len(bags)), lengths)
        patches = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return cls(patches=patches, segment=segment.to(patches.device), count=len(bags))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Cohort:
    """Patients of one cancer with their outcomes and slides, sorted by patient id."""

    cancer: Cancer
    endpoint: str
    dim: int
    patient_ids: tuple[str, ...]
    days: NDArray[np.float64]  # (n,) of death or last follow-up
    event: NDArray[np.bool_]  # (n,) True for a death
    hospital: tuple[str, ...]  # tissue source site, "" if unknown
    slides: tuple[tuple[str, ...], ...]
    source: SlideSource

    def __post_init__(self) -> None:
        n = len(self.patient_ids)
        lengths = (len(self.days), len(self.event), len(self.hospital), len(self.slides))
        if any(length != n for length in lengths):
            raise CohortError("cohort", f"columns of {n} and {lengths} patients do not match")

    def __len__(self) -> int:
        return len(self.patient_ids)

    def __repr__(self) -> str:
        # Never the ids: this ends up in logs and tracebacks.
        return (
            f"Cohort({self.cancer}, {self.endpoint}, {len(self)} patients, "
            f"{int(self.event.sum())} events, {self.dim} features)"
        )

    @property
    def time_bins(self) -> NDArray[np.int64]:
        """Bin of each patient's time, (n,)."""
        return time_bins(self.days)

    def bag(self, index: int) -> Tensor:
        """Return the patient's patches (N, D) in storage dtype, read from disk now.

        Raises:
            SlideFileError, MissingSlideError: a file changed since the cohort was loaded.
        """
        pieces = self._pieces(index)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def patches(self, index: int) -> int:
        """Return how many patches the patient's bag holds, from the headers alone."""
        return sum(self.source.shape(slide_id)[0] for slide_id in self.slides[index])

    def pack(self, indices: Sequence[int] | NDArray[np.integer]) -> PackedBags:
        """Return the bags of these patients, in this order, as one matrix."""
        total = sum(self.patches(int(index)) for index in indices)
        if total * self.dim < LARGE:
            return PackedBags.joined([self._pieces(int(index)) for index in indices])
        return self._filled([int(index) for index in indices], total)

    def subset(self, indices: Sequence[int] | NDArray[np.integer] | NDArray[np.bool_]) -> Cohort:
        """Return these patients only, in this order. A boolean mask (n,) works too."""
        chosen = np.asarray(indices)
        if chosen.dtype == np.bool_:
            if chosen.shape != (len(self),):
                raise CohortError(
                    "cohort", f"a mask of shape {chosen.shape} does not fit {len(self)} patients"
                )
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64)
        return replace(
            self,
            patient_ids=tuple(self.patient_ids[i] for i in chosen),
            days=self.days[chosen],
            event=self.event[chosen],
            hospital=tuple(self.hospital[i] for i in chosen),
            slides=tuple(self.slides[i] for i in chosen),
        )

    def _filled(self, indices: Sequence[int], total: int) -> PackedBags:
        """Return the bags as one matrix, with one slide at a time in memory beside it."""
        patches: Tensor | None = None
        lengths, end = [], 0
        for index in indices:
            start = end
            for slide_id in self.slides[index]:
                (piece,) = self._checked([self.source.features(slide_id)])
                if patches is None:
                    patches = piece.new_empty(total, self.dim)
                elif piece.dtype != patches.dtype:
                    wider = torch.promote_types(piece.dtype, patches.dtype)
                    patches = patches.to(wider)
                if end + len(piece) > total:
                    raise self._changed(piece)
                patches[end : end + len(piece)] = piece
                end += len(piece)
            lengths.append(end - start)
        if patches is None or end != total or 0 in lengths:
            raise self._changed(torch.empty(0, self.dim))
        segment = torch.repeat_interleave(torch.arange(len(indices)), torch.tensor(lengths))
        return PackedBags(patches=patches, segment=segment.to(patches.device), count=len(indices))

    def _pieces(self, index: int) -> list[Tensor]:
        return self._checked([self.source.features(slide_id) for slide_id in self.slides[index]])

    def _checked(self, pieces: list[Tensor]) -> list[Tensor]:
        for piece in pieces:
            if piece.ndim != 2 or piece.shape[1] != self.dim:
                raise self._changed(piece)
        return pieces

    def _changed(self, piece: Tensor) -> BagShapeError:
        return BagShapeError(
            "cohort",
            f"a slide has shape {tuple(piece.shape)}, expected (patches, {self.dim})",
            "Its file changed since the cohort was loaded: load it again",
        )


class _Means:
    """Slides of one patch each: the mean over all patches of a patient, read once."""

    def __init__(self, cohort: Cohort) -> None:
        self._means = {
            str(i): cohort.bag(i).float().mean(0, keepdim=True) for i in range(len(cohort))
        }

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self._means

    def shape(self, slide_id: str) -> tuple[int, int]:
        patches, width = self._means[slide_id].shape
        return patches, width

    def features(self, slide_id: str) -> Tensor:
        return self._means[slide_id]

    def stamp(self, slide_id: str) -> str:
        return ""  # an object's own data, which nothing outlives

    def coords(self, slide_id: str) -> Tensor | None:
        return None

    def slide_ids(self) -> Iterable[str]:
        return sorted(self._means)


def mean_pooled(cohort: Cohort) -> Cohort:
    """Return the same patients with one patch each: the mean of theirs."""
    slides = tuple((str(i),) for i in range(len(cohort)))
    return replace(cohort, slides=slides, source=_Means(cohort))


def load_cohort(
    outcomes: OutcomeTable,
    source: SlideSource,
    *,
    cancer: Cancer,
    dim: int | None = None,
    on_bad: OnBad = "raise",
    check_values: bool = True,
) -> tuple[Cohort, tuple[str, ...]]:
    """Join outcomes and slides, and check every slide once.

    Patients, and the slides of each, are sorted by id. All headers are checked first, so a
    missing slide or a wrong width shows before the long read of all values. With "skip", a bad
    slide is left out, and a patient once no slide is left. A table without slide column takes
    slides by name; patients whom no slide names are then left out in both modes, because the
    table promised none.

    Args:
        outcomes: as `read_outcomes` gives it; a table without a cancer column is taken as one
            of this cancer.
        source: where the slides lie.
        cancer: whose patients to take.
        dim: width of the features; the first slide's by default.
        on_bad: "raise" at the first bad slide, or "skip" and count.
        check_values: read every slide for NaN and infinity; False only where that was done.

    Returns:
        The cohort, and one plain line for each reason patients or slides were left out.

    Raises:
        MissingSlideError, SlideFileError, BagShapeError: a bad slide, naming file or row.
        CohortError: no patient is left.
        NotEstimableError: no pair of patients is comparable.
    """
    table = outcomes.of(cancer)
    patients = [
        patient.with_slides(sorted(patient.numbered_slides()))
        for patient in sorted(table.rows, key=lambda patient: patient.patient_id)
    ]
    dropped: list[str] = []
    if not any(patient.slides for patient in patients):
        patients = [p for p in slides_by_name(patients, source) if p.slides]
        if unnamed := len(table.rows) - len(patients):
            dropped.append(f"{counted(unnamed, 'patient')} left out: {UNNAMED}")
        if table.rows and not patients:
            raise MissingSlideError(
                table.where,
                f"no slide's name begins with the id of one of {unnamed} {cancer} patients",
                "Give the folder of this cancer's slides, or a table with a slide column",
            )
    check = SlideCheck(source=source, where=table.where, dim=dim, on_bad=on_bad, reasons=Counter())
    patients = check.headers(patients)
    if check_values:
        patients = check.values(patients)
    for reason, count in sorted(check.reasons.items()):
        dropped.append(f"{counted(count, 'slide')} left out: {reason}")
    if check.lost:
        dropped.append(f"{counted(check.lost, 'patient')} left out: no usable slide")
    if not patients or check.dim is None:
        raise CohortError(
            table.where,
            f"no {cancer} patient with outcome and slides is left ({'; '.join(dropped) or 'none'})",
            "Check the cancer code, the table and the slide folders",
        )
    cohort = Cohort(
        cancer=cancer,
        endpoint=table.endpoint,
        dim=check.dim,
        patient_ids=tuple(patient.patient_id for patient in patients),
        days=np.array([patient.days for patient in patients], dtype=np.float64),
        event=np.array([patient.event for patient in patients], dtype=np.bool_),
        hospital=tuple(patient.hospital for patient in patients),
        slides=tuple(patient.slides for patient in patients),
        source=source,
    )
    if comparable_pairs(cohort.days, cohort.event) == 0:
        raise NotEstimableError(
            table.where,
            f"no pair of the {len(cohort)} {cancer} patients ({int(cohort.event.sum())} events) "
            "is comparable",
            "At least one death with a longer observed patient is needed",
        )
    return cohort, tuple(dropped)
