"""Synthetic patch bags of the 26 cancers, with a planted truth about who can help whom.

A few histological programs are directions in feature space. Every patient of every cancer has an
activity of each program: ~ N(0, 1) of the one that alone decides the cancer's risk, half as much
of the others. Cancers with the same deciding program are relatives: an expert of one serves the
other, and any other expert sees variation that means nothing there. For patient i of cancer c at
hospital h, patch j is

    x = noise + offset[c] + batch[h]                                            (most patches)
    x = noise + offset[c] + batch[h] + marker + sum_p activity[i, p] program[p]  (tumour patches)

so that attention can find the tumour patches by the marker, which is one for all cancers. Times
follow proportional hazards in the deciding activity (Weibull); everyone's follow-up is drawn
first, and the baseline hazard is set so that the cancer has exactly the deaths it has in TCGA.

Every cancer is drawn from its own random stream: a subset of cancers holds the same patients.
Shapes: n patients, P patches of all, K programs, D features.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cropkt.cancers import Cancer
from cropkt.cohort.outcomes import PatientOutcome
from cropkt.survival.metrics import concordance
from cropkt_sim.tcga import SIZES, Patients

Programs = Literal["default", "none"]
Floats = NDArray[np.float64]

DIM = 32
PROGRAMS: dict[str, tuple[Cancer, ...]] = {
    name: tuple(map(Cancer, codes.split()))
    for name, codes in {
        "squamous": "BLCA CESC HNSC LUNG THYM",
        "sarcomatoid": "ACC DLBC KIPAN MESO SARC THCA",
        "neural crest": "PCPG SKCM UVM",
        "hormonal": "BRCA OV PRAD TGCT UCEC UCS",
        "gastro-intestinal": "CHOL COADREAD LIHC PAAD STES",
        "glial": "GBMLGG",
    }.items()
}
"""Which program decides the risk in which cancers; GBMLGG alone has no relative."""
PROGRAM_OF: dict[Cancer, str] = {c: name for name, cancers in PROGRAMS.items() for c in cancers}

EFFECT = 1.2  # log hazard a unit of the deciding activity: C-index of the true risk about .78
ACTIVITY = 1.5  # length of the shift that a unit of activity makes; the noise has sd 1
IDLE = 0.5  # the same of programs that decide nothing in this cancer, as a share of ACTIVITY
MARKER = 1.5  # length of the tumour patches' common shift
TUMOUR = 0.35  # share of a patient's patches that are tumour
OFFSET = 0.25  # sd of each feature of a cancer's offset: its length is about 1.4
BATCH = 0.12  # sd of each feature of a hospital's batch effect
SHAPE = 1.2  # of the Weibull baseline
FOLLOW_UP = 4000.0  # days, the longest


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """What is true of the synthetic patients."""

    relatives: dict[str, list[str]]  # cancers of the same deciding program, without itself
    best_c_index: dict[str, float]  # of the true risk; .5 where features say nothing of it


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SyntheticCohort:
    """Patients of one cancer with the truth about them."""

    cancer: Cancer
    patients: Patients
    risk: Floats  # (n,) true log hazard, centred at 0


def draw_cohort(
    cancer: Cancer, *, seed: int, programs: Programs = "default", patches: int = 24
) -> SyntheticCohort:
    """Draw the patients of one cancer: as many patients, deaths and hospitals as in TCGA.

    Args:
        cancer: which.
        seed: of the whole simulation; two cancers of one seed share the programs' directions.
        programs: "none" draws the risk apart from the features, so that nothing can be learnt.
        patches: mean number a patient; the patients' numbers are lognormal, at least 8.
    """
    size = SIZES[cancer]
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1, sorted(Cancer).index(cancer)]))
    hospital = _hospitals(size.patients, size.hospitals, rng)
    activity = rng.normal(size=(size.patients, len(PROGRAMS)))  # (n, K)
    deciding = activity[:, list(PROGRAMS).index(PROGRAM_OF[cancer])]
    independent = rng.normal(size=size.patients)
    risk = EFFECT * (independent if programs == "none" else deciding.copy())
    days, event = _outcomes(risk, size.deaths, rng)
    activity[:, np.arange(len(PROGRAMS)) != list(PROGRAMS).index(PROGRAM_OF[cancer])] *= IDLE
    bags = _bags(activity, hospital, seed=seed, patches=patches, rng=rng)
    rows = tuple(
        PatientOutcome(
            patient_id=f"{cancer}-{i:04d}",
            days=float(days[i]),
            event=bool(event[i]),
            cancer=cancer,
            hospital=f"H{hospital[i] + 1:02d}",
            slides=(f"{cancer}-{i:04d}-S1",),
        )
        for i in range(size.patients)
    )
    by_slide = {row.slides[0]: bag for row, bag in zip(rows, bags, strict=True)}
    return SyntheticCohort(cancer=cancer, patients=Patients(rows=rows, bags=by_slide), risk=risk)


def settings() -> dict[str, object]:
    """Return every constant that decides what is drawn: other settings, other patients."""
    constants = (ACTIVITY, BATCH, DIM, EFFECT, FOLLOW_UP, IDLE, MARKER, OFFSET, SHAPE, TUMOUR)
    return {"constants": constants, "programs": PROGRAMS}


def relatives_of(cancer: Cancer, among: Sequence[Cancer]) -> list[str]:
    """Return the others whose risk the same program decides."""
    return [str(c) for c in among if c != cancer and PROGRAM_OF[c] == PROGRAM_OF[cancer]]


def best_c_index(cohort: SyntheticCohort) -> float:
    """Return the C-index of the true risk on the drawn outcomes."""
    rows = cohort.patients.rows
    days = np.array([row.days for row in rows])
    event = np.array([row.event for row in rows])
    return float(concordance(days, event, cohort.risk).c_index or 0.5)


class Truth:
    """Gathers what is true while cohorts are drawn, and writes it beside the data."""

    def __init__(self, cancers: Sequence[Cancer], programs: Programs) -> None:
        self.cancers = tuple(cancers)
        self.programs = programs
        self._risk: list[tuple[str, float]] = []
        self._best: dict[str, float] = {}

    def add(self, cohort: SyntheticCohort) -> None:
        """Take note of a cohort."""
        for row, risk in zip(cohort.patients.rows, cohort.risk, strict=True):
            self._risk.append((row.patient_id, round(float(risk), 6)))
        # Without programs the features say nothing, however well the true risk ranks.
        best = 0.5 if self.programs == "none" else best_c_index(cohort)
        self._best[str(cohort.cancer)] = round(best, 4)

    def planted(self) -> Planted:
        """Return the truth of all cohorts added so far."""
        relatives = {
            str(c): [] if self.programs == "none" else relatives_of(c, self.cancers)
            for c in self.cancers
        }
        return Planted(relatives=relatives, best_c_index=dict(self._best))

    def write(self, folder: Path) -> None:
        """Write `truth.json` and `truth_risk.csv`."""
        planted = self.planted()
        programs = {} if self.programs == "none" else {str(c): PROGRAM_OF[c] for c in self.cancers}
        text = json.dumps(
            {
                "programs": programs,
                "relatives": planted.relatives,
                "best_c_index": planted.best_c_index,
            },
            indent=2,
        )
        (folder / "truth.json").write_text(text + "\n", encoding="utf-8")
        with (folder / "truth_risk.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("patient_id", "risk"), *self._risk])


def read_planted(folder: Path) -> Planted:
    """Return the truth that `Truth.write` wrote."""
    held = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    return Planted(relatives=held["relatives"], best_c_index=held["best_c_index"])


def _hospitals(n: int, hospitals: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return each patient's hospital (n,): some large ones and a long tail, none empty."""
    share = 1 / np.arange(1, hospitals + 1) ** 1.1
    rest = rng.choice(hospitals, size=n - hospitals, p=share / share.sum())
    return rng.permutation(np.concatenate([np.arange(hospitals), rest]))


def _outcomes(
    risk: Floats, deaths: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return whole days (n,) > 0 and whether each is a death, exactly `deaths` of them."""
    follow_up = FOLLOW_UP * rng.uniform(0.1, 1, risk.size) ** 1.5
    unscaled = (rng.exponential(size=risk.size) / np.exp(risk)) ** (1 / SHAPE)
    # With baseline scale s a patient's death at s * unscaled is seen if s <= follow_up / unscaled.
    seen_below = np.sort(follow_up / unscaled)[::-1]
    scale = (seen_below[deaths - 1] + seen_below[deaths]) / 2
    death = scale * unscaled
    event = death <= follow_up
    return np.ceil(np.minimum(death, follow_up)).astype(np.int64), event


def _bags(
    activity: Floats,
    hospital: NDArray[np.int64],
    *,
    seed: int,
    patches: int,
    rng: np.random.Generator,
) -> list[NDArray[np.float16]]:
    """Return each patient's patches (N, D)."""
    program, marker = _directions(seed)
    n = len(activity)
    spread = 0.4
    drawn = patches * rng.lognormal(-(spread**2) / 2, spread, n)
    counts: NDArray[np.int64] = np.maximum(8, np.round(drawn)).astype(np.int64)  # (n,)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    patient = np.repeat(np.arange(n), counts)  # (P,)
    tumour = rng.random(patient.size) < TUMOUR
    tumour[first] = tumour[first + 1] = True  # no patient is without tumour
    offset = rng.normal(scale=OFFSET, size=DIM)
    batch = rng.normal(scale=BATCH, size=(hospital.max() + 1, DIM))
    shift = marker + activity @ program  # (n, D)
    x = rng.standard_normal(size=(patient.size, DIM), dtype=np.float32)
    x += (offset + batch[hospital]).astype(np.float32)[patient]
    x[tumour] += shift.astype(np.float32)[patient[tumour]]
    return np.split(x.astype(np.float16), first[1:])


def _directions(seed: int) -> tuple[Floats, Floats]:
    """Return the programs (K, D) and the tumour marker (D,), orthogonal to one another."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    basis = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0].T
    return ACTIVITY * basis[: len(PROGRAMS)], MARKER * basis[len(PROGRAMS)]
