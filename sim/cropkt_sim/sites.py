"""One folder per simulated site, exactly as a hospital would have it.

    <out>/sites/manifest.json      what the folders were made from
    <out>/sites/truth.json, truth_risk.csv    synthetic data only
    <out>/sites/<i>/site.yaml, outcomes.csv, pack/

Sites are numbered by cancer, then by name; number i is Flower's partition i. The whole folder
appears at once, and a second run with the same inputs finds it there.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import DTypeLike

from cropkt.cancers import Cancer
from cropkt.cohort.features import SlideFolders
from cropkt.cohort.outcomes import PatientOutcome, counted
from cropkt.cohort.pack import write_pack
from cropkt.errors import CohortError, NotEstimableError, OutcomeTableError, UsageError
from cropkt_client.settings import ASKED
from cropkt_sim import clinical, synthetic
from cropkt_sim.clinical import read_clinical
from cropkt_sim.practice import COLUMNS, table_rows
from cropkt_sim.slides import file_stamp, read_slides, slide_stamps
from cropkt_sim.synthetic import Planted, Programs, Truth, draw_cohort, read_planted
from cropkt_sim.tcga import Patients, has_comparable_pair, split_by_hospital

DataKind = Literal["synthetic", "clinical", "features"]
SitesBy = Literal["cancers", "hospitals"]
OnBad = Literal["raise", "skip"]

_LAYOUT = 2  # raise it when the same inputs give other files
_RELEASE = {  # nobody's patients: all numbers leave as they are
    "approval": "auto",
    "messages": [*ASKED, "train.fedavg"],
    "minimum_patients": 0,
    "minimum_events": 0,
    "round_counts_to": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Sites that are ready to start."""

    folder: Path  # <out>/sites
    names: tuple[str, ...]  # of the sites, in the order of partitions
    cancers: tuple[Cancer, ...]
    dim: int  # feature width
    planted: Planted | None  # what is true of synthetic patients
    notes: tuple[str, ...]  # what was read, left out and pooled: plain lines for the terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class _Input:
    """What a kind of data gives: patients cancer by cancer."""

    cancers: tuple[Cancer, ...]
    load: Callable[[Cancer], Patients]
    dim: int
    dtype: DTypeLike = np.float32
    slides: tuple[Path, ...] = ()  # where the features stay; packed if none
    truth: Truth | None = None
    notes: tuple[str, ...] = ()


def prepare(
    *,
    data: DataKind,
    folder: Path,
    cancers: tuple[Cancer, ...] | None,
    seed: int,
    outcomes: Path | None,
    features: tuple[Path, ...],
    endpoint: str,
    by: SitesBy,
    on_bad: OnBad,
    programs: Programs = "default",
    patches: int = 24,
    epsilon: float | None = None,
) -> Prepared:
    """Write the folders of all sites, or find those of an earlier run with the same inputs.

    Args:
        data: where patients come from.
        folder: gets the folder `sites`.
        cancers: whom to take; all that there are by default.
        seed: of synthetic data.
        outcomes: table of outcomes, for clinical data and features.
        features: folders of slide files.
        endpoint: OS, DSS, PFI or DFI.
        by: one site a cancer, or one a hospital, small hospitals pooled.
        on_bad: raise at the first bad input, or leave it out and say so.
        programs: what synthetic data has planted.
        patches: of a synthetic patient, on average.
        epsilon: what each site may spend on the one expert that it gives; None: no privacy.

    Raises:
        UsageError: options that do not go together, or `sites` was made from other inputs.
        DataError: a bad table or slide. Nothing is written then.
    """
    chosen = None if cancers is None else tuple(sorted(set(cancers)))
    privacy = None if epsilon is None else {"epsilon": epsilon, "per_release": epsilon}
    inputs: dict[str, Any] = {"layout": _LAYOUT, "data": data, "cancers": chosen, "by": by}
    inputs |= {} if privacy is None else {"privacy": privacy}
    read: Callable[[], _Input]
    if data == "synthetic":
        if outcomes is not None or features:
            raise UsageError(
                "--data synthetic", "draws its own patients", "Drop --outcomes and --features"
            )
        inputs |= {"seed": seed, "programs": programs, "patches": patches}
        inputs["settings"] = synthetic.settings()
        read = partial(_synthetic, chosen, seed=seed, programs=programs, patches=patches)
    else:
        table = _table(data, outcomes)
        inputs |= {"endpoint": endpoint, "on_bad": on_bad, "outcomes": file_stamp(table)}
        if data == "clinical":
            if features:
                raise UsageError("--data clinical", "has no slides", "Drop --features")
            read = partial(_clinical, table, endpoint=endpoint, cancers=chosen, on_bad=on_bad)
        else:
            if not features:
                raise UsageError("--data features", "needs --features", "Give slide folders")
            source = SlideFolders(features)
            inputs["features"] = slide_stamps(source)
            read = partial(
                _features, table, source, endpoint=endpoint, cancers=chosen, on_bad=on_bad
            )
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    sites = folder.resolve() / "sites"
    if sites.exists():
        return _earlier(sites, digest)
    settings = {"on_bad": on_bad} if privacy is None else {"on_bad": on_bad, "privacy": privacy}
    return _write(read(), sites, by, settings, digest)


def _synthetic(
    cancers: Sequence[Cancer] | None, *, seed: int, programs: Programs, patches: int
) -> _Input:
    chosen = tuple(sorted(cancers or Cancer))
    truth = Truth(chosen, programs)

    def load(cancer: Cancer) -> Patients:
        cohort = draw_cohort(cancer, seed=seed, programs=programs, patches=patches)
        truth.add(cohort)
        return cohort.patients

    planted = "no program planted" if programs == "none" else "shared programs planted"
    notes = (f"Synthetic patients of {counted(len(chosen), 'cancer')}, seed {seed}: {planted}",)
    return _Input(
        cancers=chosen,
        load=load,
        dim=synthetic.DIM,
        dtype=np.float16,
        truth=truth,
        notes=notes,
    )


def _clinical(
    table: Path, *, endpoint: str, cancers: Sequence[Cancer] | None, on_bad: OnBad
) -> _Input:
    found = read_clinical(table, endpoint=endpoint, cancers=cancers, on_bad=on_bad)
    patients, notes = found.patients, list(found.notes)
    for cancer in cancers or patients:
        rows = patients[cancer].rows if cancer in patients else ()
        if has_comparable_pair(rows):
            continue
        problem = f"no pair of {counted(len(rows), f'{cancer} patient')} is comparable"
        if on_bad == "raise":
            fix = "Leave the cancer out with --cancers, use another endpoint, or skip bad input"
            raise NotEstimableError(table, problem, fix)
        notes.append(f"{cancer} left out: {problem}")
        patients = {c: held for c, held in patients.items() if c != cancer}
    if not patients:
        raise CohortError(table, f"no cancer is left ({'; '.join(notes)})", "Name other cancers")
    return _Input(
        cancers=tuple(patients), load=patients.__getitem__, dim=clinical.DIM, notes=tuple(notes)
    )


def _features(
    table: Path,
    source: SlideFolders,
    *,
    endpoint: str,
    cancers: Sequence[Cancer] | None,
    on_bad: OnBad,
) -> _Input:
    found = read_slides(table, source, endpoint=endpoint, cancers=cancers, on_bad=on_bad)
    return _Input(
        cancers=tuple(found.patients),
        load=found.patients.__getitem__,
        dim=found.dim,
        slides=tuple(folder.resolve() for folder in source.folders),
        notes=found.notes,
    )


def _table(data: DataKind, outcomes: Path | None) -> Path:
    if outcomes is None:
        raise UsageError(f"--data {data}", "needs --outcomes", "Give the table of outcomes")
    if not outcomes.is_file():
        raise OutcomeTableError(outcomes, "no such file", "Give the path of the table")
    return outcomes


def _earlier(sites: Path, digest: str) -> Prepared:
    """Return what an earlier run wrote from the same inputs."""
    try:
        held = json.loads((sites / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        held = {}
    if held.get("inputs") != digest:
        # Its sites may have trained for hours: never replaced unasked.
        raise UsageError(
            sites, "was made from other inputs", "Give another --out, or remove that folder"
        )
    return Prepared(
        folder=sites,
        names=tuple(held["names"]),
        cancers=tuple(map(Cancer, held["cancers"])),
        dim=held["dim"],
        planted=read_planted(sites) if (sites / "truth.json").exists() else None,
        notes=tuple(held["notes"]),
    )


def _write(
    found: _Input, sites: Path, by: SitesBy, settings: dict[str, Any], digest: str
) -> Prepared:
    """Write all sites beside the place where they then appear."""
    new_folders = [path for path in (sites.parent, *sites.parent.parents) if not path.exists()]
    part = sites.with_name(f".sites.{secrets.token_hex(4)}.partial")
    try:
        part.mkdir(parents=True)
        names: list[str] = []
        notes = list(found.notes)
        for cancer in found.cancers:
            patients = found.load(cancer)
            for name, rows in _sites(cancer, patients, by, notes):
                _write_site(part / str(len(names)), name, rows, patients, found, settings)
                names.append(name)
        if by == "hospitals":
            notes.append(f"{counted(len(names), 'site')}, small hospitals of a cancer pooled")
        if found.truth is not None:
            found.truth.write(part)
        manifest = {
            "inputs": digest,
            "names": names,
            "cancers": [str(cancer) for cancer in found.cancers],
            "dim": found.dim,
            "notes": notes,
        }
        (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        part.rename(sites)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for path in new_folders:
            with suppress(OSError):  # somebody else uses it by now
                path.rmdir()
        raise
    return _earlier(sites, digest)


def _sites(
    cancer: Cancer, patients: Patients, by: SitesBy, notes: list[str]
) -> Iterator[tuple[str, Sequence[PatientOutcome]]]:
    """Yield the name and the patients of each of a cancer's sites, sorted by name."""
    if by == "cancers":
        yield str(cancer), patients.rows
        return
    by_hospital, pooled = split_by_hospital(patients.rows)
    notes += pooled
    if len(by_hospital) == 1:
        yield str(cancer), patients.rows
        return
    named: dict[str, Sequence[PatientOutcome]] = {}
    for hospital, rows in by_hospital.items():
        name = site_name(cancer, hospital)
        while name in named:  # two spellings that differ in a sign only
            name += "-2"
        named[name] = rows
    yield from sorted(named.items())


def site_name(cancer: Cancer, hospital: str) -> str:
    """Return a name that a roster accepts: letters, digits, `.`, `_` and `-`, at most 64."""
    return f"{cancer}-{re.sub(r'[^A-Za-z0-9._-]+', '-', hospital)}"[:60]


def _write_site(
    folder: Path,
    name: str,
    rows: Sequence[PatientOutcome],
    patients: Patients,
    found: _Input,
    settings: dict[str, Any],
) -> None:
    """Write what a hospital has; its features too, unless they lie in files already."""
    folder.mkdir()
    (cancer,) = {row.cancer for row in rows}
    config: dict[str, Any] = {
        "site": name,
        "cancers": [str(cancer)],
        "outcomes": "outcomes.csv",
        "state": "state",
        "release": _RELEASE,
        **settings,
    }
    if patients.bags is None:
        config["slides"] = [str(path) for path in found.slides]
    else:
        config["pack"] = "pack"
        bags = patients.bags
        slides = ((slide, bags[slide]) for row in rows for slide in row.slides)
        write_pack(folder / "pack", slides, dim=found.dim, dtype=found.dtype)
    (folder / "site.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with (folder / "outcomes.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows(values for row in rows for values in table_rows(row))
