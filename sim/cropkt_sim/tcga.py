"""The 26 cancers of TCGA as cohorts: how large each is, and which hospitals they are from.

The sizes are those of disease-specific survival in the TCGA Clinical Data Resource (Liu et al.,
doi:10.1016/j.cell.2018.02.052), of patients with a known event and a positive time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from cropkt.cancers import Cancer
from cropkt.cohort.outcomes import PatientOutcome, counted
from cropkt.cohort.splits import comparable_pairs
from cropkt.errors import CohortError

OTHER = "other"
"""Name of the site that pools a cancer's small hospitals."""
SMALLEST_OTHER = 10  # a pool of fewer patients could not be split into ten folds


@dataclass(frozen=True, slots=True)
class Size:
    """How large a cancer's cohort is."""

    patients: int
    deaths: int
    hospitals: int  # tissue source sites


SIZES: dict[Cancer, Size] = {
    Cancer.ACC: Size(89, 29, 5),
    Cancer.BLCA: Size(396, 123, 35),
    Cancer.BRCA: Size(1064, 83, 40),
    Cancer.CESC: Size(290, 54, 31),
    Cancer.CHOL: Size(42, 18, 9),
    Cancer.COADREAD: Size(584, 75, 38),
    Cancer.DLBC: Size(47, 4, 7),
    Cancer.GBMLGG: Size(1057, 558, 46),
    Cancer.HNSC: Size(501, 130, 28),
    Cancer.KIPAN: Size(919, 147, 59),
    Cancer.LIHC: Size(362, 80, 37),
    Cancer.LUNG: Size(919, 202, 66),
    Cancer.MESO: Size(65, 43, 12),
    Cancer.OV: Size(545, 301, 21),
    Cancer.PAAD: Size(177, 79, 27),
    Cancer.PCPG: Size(179, 4, 18),
    Cancer.PRAD: Size(498, 5, 32),
    Cancer.SARC: Size(255, 81, 34),
    Cancer.SKCM: Size(448, 188, 25),
    Cancer.STES: Size(573, 151, 40),
    Cancer.TGCT: Size(134, 3, 15),
    Cancer.THCA: Size(500, 7, 22),
    Cancer.THYM: Size(123, 4, 19),
    Cancer.UCEC: Size(544, 60, 31),
    Cancer.UCS: Size(54, 31, 10),
    Cancer.UVM: Size(80, 21, 6),
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Patients:
    """Patients of one cancer on their way to a site's folder."""

    rows: tuple[PatientOutcome, ...]
    bags: Mapping[str, NDArray[Any]] | None = None  # (N, D) by slide; None: they stay in files


def split_by_hospital(
    rows: Sequence[PatientOutcome], *, minimum: int = 20
) -> tuple[dict[str, tuple[PatientOutcome, ...]], tuple[str, ...]]:
    """Divide the patients of one cancer by hospital, and pool the small ones.

    A hospital of fewer than `minimum` patients, or without a comparable pair among them, goes
    into `OTHER`, as do patients without a hospital. Where the pool itself has no comparable pair
    or fewer than `SMALLEST_OTHER` patients, it joins the largest hospital.

    Returns:
        Patients by hospital code, sorted, in the order of `rows`; and one line for each pool
        that had to join a hospital.

    Raises:
        CohortError: no patient has a hospital.
    """
    if rows and not any(row.hospital for row in rows):
        raise CohortError(
            "hospitals",
            f"none of {len(rows)} {rows[0].cancer} patients has a hospital",
            "Add the column to the outcome table, or make one site a cancer",
        )
    by_hospital: dict[str, list[PatientOutcome]] = defaultdict(list)
    for row in rows:
        by_hospital[row.hospital].append(row)
    kept = {
        name
        for name, members in by_hospital.items()
        if name and len(members) >= minimum and has_comparable_pair(members)
    }
    pool = [row for row in rows if row.hospital not in kept]
    notes: list[str] = []
    home = OTHER
    if kept and pool and (len(pool) < SMALLEST_OTHER or not has_comparable_pair(pool)):
        home = max(sorted(kept), key=lambda name: len(by_hospital[name]))
        notes.append(
            f"{counted(len(pool), f'{rows[0].cancer} patient')} of small hospitals joined "
            f"{home}: too few for a site of their own"
        )
    site_of = {name: name if name in kept else home for name in by_hospital}
    sites: dict[str, list[PatientOutcome]] = defaultdict(list)
    for row in rows:
        sites[site_of[row.hospital]].append(row)
    return {name: tuple(sites[name]) for name in sorted(sites)}, tuple(notes)


def has_comparable_pair(rows: Sequence[PatientOutcome]) -> bool:
    """Return whether Harrell's C is defined for these patients."""
    return comparable_pairs([row.days for row in rows], [row.event for row in rows]) > 0
