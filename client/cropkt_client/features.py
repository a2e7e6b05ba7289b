"""What frozen experts made of this site's patients, kept on its disk: nothing is asked twice.

There is one file for an expert and the units in which it reads, named by a SHA-256 of both, with a
row for each patient: slide feature and risk, under a hash of the patient's slides. So a study with
one more expert, or a cohort with one more patient, computes only those. Files appear whole or not
at all, one that is damaged counts as absent, and the ones used longest ago go when all together
are too large. Nothing of this ever leaves the site.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cropkt.cohort.bags import Cohort
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.bank import Opinions, Units, consult_in
from cropkt.experts.device import device_of
from cropkt.files import write_atomically

MAX_BYTES = 2 << 30  # of all files together

log = logging.getLogger("cropkt.client")


@dataclass(frozen=True, slots=True)
class Row:
    """What one expert, in its units, says of one patient."""

    feature: NDArray[np.float32]  # (E,)
    risk: float


@dataclass(frozen=True, slots=True)
class SlideFeatures:
    """The files in one folder of the site's state."""

    folder: Path
    limit: int = MAX_BYTES

    def ask(self, experts: Abmil, cohort: Cohort, units: Sequence[Units | None]) -> list[Opinions]:
        """Return what `cropkt.experts.bank.consult_in` returns, computing only what is not here."""
        patients = _patient_keys(cohort)
        names = _names(experts, units)  # (U, S)
        known = {name: self._read(name, patients) for row in names for name in row}
        lacking = [
            f
            for f in range(experts.models)
            if any(len(known[row[f]]) < len(patients) for row in names)
        ]
        if lacking:
            new = sorted(
                i
                for i, patient in enumerate(patients)
                if any(patient not in known[row[f]] for row in names for f in lacking)
            )
            some = _rows(experts, lacking)
            asked = [_of(unit, lacking) for unit in units]
            for row, opinions in zip(
                names, consult_in(some, cohort.subset(new), asked), strict=True
            ):
                for at, f in enumerate(lacking):
                    for j, i in enumerate(new):
                        known[row[f]][patients[i]] = Row(
                            opinions.features[at, j].numpy(), float(opinions.risk[at, j])
                        )
                    self._write(row[f], known[row[f]])
            self._make_room()
        return [
            Opinions(
                risk=np.array([[known[name][p].risk for p in patients] for name in row]),
                features=torch.from_numpy(
                    np.stack([np.stack([known[name][p].feature for p in patients]) for name in row])
                ),
            )
            for row in names
        ]

    def wipe(self) -> None:
        """Remove all files."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _read(self, name: str, patients: Sequence[str]) -> dict[str, Row]:
        """Return the rows of these patients that are here."""
        path = self.folder / f"{name}.npz"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                keys, features, risk = (stored[key] for key in ("patients", "features", "risk"))
            os.utime(path)
        except FileNotFoundError:
            return {}
        except Exception as error:  # whatever zip and npy make of a damaged file
            log.warning("%s is damaged (%s); it is computed again", path, type(error).__name__)
            return {}
        found = {
            str(key): Row(feature, float(value))
            for key, feature, value in zip(keys, features, risk, strict=True)
        }
        return {patient: found[patient] for patient in patients if patient in found}

    def _write(self, name: str, rows: dict[str, Row]) -> None:
        contents: dict[str, Any] = {
            "patients": np.array(list(rows)),
            "features": np.stack([row.feature for row in rows.values()]),
            "risk": np.array([row.risk for row in rows.values()]),
        }
        try:
            write_atomically(self.folder / f"{name}.npz", lambda file: np.savez(file, **contents))
        except OSError as error:  # a full disk must not end the task
            log.warning("slide features cannot be kept: %s", error.strerror)

    def _make_room(self) -> None:
        """Remove what a write that was cut off left, and the files used longest ago."""
        for torn in self.folder.glob(".*.npz.*"):
            torn.unlink(missing_ok=True)
        files = sorted(self._files(), key=lambda path: path.stat().st_mtime_ns)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self.limit:
                break
            total -= path.stat().st_size
            path.unlink()

    def _files(self) -> list[Path]:
        return list(self.folder.glob("*.npz"))


def _names(experts: Abmil, units: Sequence[Units | None]) -> list[list[str]]:
    """Return a name for each expert in each of the units, (U, S)."""
    weights = flatten(experts).cpu().numpy()
    names = []
    for unit in units:
        if unit is None:
            mean, scale = experts.shift.cpu(), experts.scale.cpu()
        else:
            mean, deviation = unit
            mean = mean.cpu().expand(experts.models, -1)
            scale = (1 / deviation.cpu()).expand(experts.models, -1)
        row = []
        for f in range(experts.models):
            digest = hashlib.sha256(repr(experts.shape).encode())
            for part in (weights[f], mean[f].numpy(), scale[f].numpy()):
                digest.update(np.ascontiguousarray(part).tobytes())
            row.append(digest.hexdigest()[:40])
        names.append(row)
    return names


def _patient_keys(cohort: Cohort) -> list[str]:
    """Return a name for each patient's patches: another file, another name."""
    keys = []
    for patient, slides in zip(cohort.patient_ids, cohort.slides, strict=True):
        stamps = [(slide, cohort.source.stamp(slide)) for slide in slides]
        text = repr((cohort.cancer, patient, stamps))
        keys.append(hashlib.sha256(text.encode()).hexdigest()[:32])
    return keys


def _rows(experts: Abmil, models: list[int]) -> Abmil:
    """Return some of the experts, in the units of their own."""
    if models == list(range(experts.models)):
        return experts
    some = Abmil.from_flat(experts.shape, flatten(experts)[models]).requires_grad_(False)
    some = some.to(device_of(experts))
    some.standardise(experts.shift[models], 1 / experts.scale[models])
    return some


def _of(unit: Units | None, models: list[int]) -> Units | None:
    if unit is None or unit[0].ndim == 1:
        return unit
    return unit[0][models], unit[1][models]
