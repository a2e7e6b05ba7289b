"""Recognisable ids in the cohorts turn up nowhere beyond the hospital, whatever fails there."""

from __future__ import annotations

import base64
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cropkt.cancers import Cancer
from cropkt_client.ledger import Ledger

pytestmark = pytest.mark.timeout(600)
TAPPED = Path(__file__).with_name("tapped.py")
PATIENT, SLIDE, HOSPITAL, FOLDER = "QQPATIENT", "QQSLIDE", "QQHOSPITAL", "QQFOLDER"
DAYS = 123_456.75  # one patient's follow-up, which no message has a field for
HEALTHY = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM}
CRASHING, SPOILT = {"kidney-clinic": Cancer.KIPAN}, {"lung-clinic": Cancer.LUNG}
CRASH = f"""
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    '''Lets the training of this hospital fail as a library would: with the row in its text.'''

    def find_spec(self, name, path=None, target=None):
        if name != "cropkt_client.tasks":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            def crash(*args, **kwargs):
                raise KeyError("{PATIENT}-KIPAN-007 of {HOSPITAL}-1, {FOLDER}/{SLIDE}-007.npy")
            module.train_experts = crash

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def add_hospital(federation: Any, name: str, cancer: Cancer, *, seed: int, spoilt: bool) -> None:
    """Write a hospital all of whose ids can be recognised; one slide file is cut short."""
    folder = federation.folder / "sites" / name
    slides = folder / FOLDER
    slides.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    activity = rng.normal(size=48)
    rows = ["patient_id,slide_id,time,event,cancer,site"]
    for i, level in enumerate(activity):
        slide = f"{SLIDE}-{cancer}-{i:03d}"
        bag = rng.normal(size=(rng.integers(3, 9), 6)).astype(np.float32)
        bag[:, 0] += 1.5 * level
        np.save(slides / f"{slide}.npy", bag)
        days = DAYS if i == 0 else int(rng.exponential(1500 * np.exp(-level))) + 1
        patient = f"{PATIENT}-{cancer}-{i:03d}"
        rows.append(f"{patient},{slide},{days},{int(i % 3 != 0)},{cancer},{HOSPITAL}-{i % 6}")
    damaged = slides / f"{SLIDE}-{cancer}-005.npy"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    (folder / "outcomes.csv").write_text("\n".join(rows) + "\n")
    values = {
        "site": name,
        "cancers": [str(cancer)],
        "outcomes": "outcomes.csv",
        "slides": [FOLDER],
        "encoder": federation.config.encoder,
        "on_bad": "raise" if spoilt else "skip",
        "release": {"approval": "auto"},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(values))


def forms(secret: str | float) -> list[bytes]:
    """Return how a text or a number may stand in a file.

    A text as it is, as UTF-16, in hexadecimal, in base64 at any offset; a number as such a text,
    and as float32 and float64.
    """
    if isinstance(secret, float):
        packed = [struct.pack(form, secret) for form in ("<f", "<d")]
        return [*packed, *(raw.hex().encode() for raw in packed), *forms(f"{secret:.2f}")]
    text, raw = secret, secret.encode()
    coded = [base64.b64encode(b"x" * n + raw)[4 if n else 0 : -4] for n in range(3)]
    return [raw, raw.lower(), text.encode("utf-16-le"), raw.hex().encode(), *coded]


def files(*roots: Path) -> list[Path]:
    found = [path for root in roots for path in (root.rglob("*") if root.is_dir() else [root])]
    return [path for path in found if path.is_file()]


def leaks(paths: list[Path], *secrets: str | float) -> list[tuple[str, str | float]]:
    """Return which files hold which texts and numbers."""
    return [
        (path.name, secret)
        for path in paths
        for content in [path.read_bytes()]
        for secret in secrets
        if any(form in content for form in forms(secret))
    ]


@pytest.mark.parametrize("secret", ["QQPATIENT-UVM-001", DAYS])
def test_the_scan_finds_what_is_there(tmp_path: Path, secret: str | float) -> None:
    for number, form in enumerate(forms(secret)):
        (tmp_path / str(number)).write_bytes(b"before" + form + b"after")
        assert leaks([tmp_path / str(number)], secret) == [(str(number), secret)]
    (tmp_path / "none").write_bytes(b"before" + b"after")
    assert not leaks([tmp_path / "none"], secret)


def test_the_scan_finds_a_row_in_base64_and_a_time_among_others(tmp_path: Path) -> None:
    (tmp_path / "coded").write_bytes(base64.b64encode(b"a row: QQPATIENT-UVM-001, and more"))
    assert leaks([tmp_path / "coded"], "QQPATIENT-UVM-001")
    for kind in (np.float32, np.float64):
        np.save(tmp_path / "times.npy", np.array([1.0, DAYS, 700.0], dtype=kind))
        assert leaks([tmp_path / "times.npy"], DAYS)


def test_no_ids_leave(federation: Any, tmp_path: Path) -> None:
    sites = {**HEALTHY, **CRASHING, **SPOILT}
    for seed, (site, cancer) in enumerate(sites.items()):
        add_hospital(federation, site, cancer, seed=seed, spoilt=site in SPOILT)
    (tmp_path / "crash").mkdir()
    (tmp_path / "crash" / "sitecustomize.py").write_text(CRASH)
    crash = os.pathsep.join(filter(None, [str(tmp_path / "crash"), os.environ.get("PYTHONPATH")]))
    federation.init(min_sites=2)
    invites = {site: federation.invite(site, cancer) for site, cancer in sites.items()}
    tap = tmp_path / "tap"
    with (federation.folder / "server.log").open("a") as log:
        command = [sys.executable, str(TAPPED), str(tap), "start", str(federation.study)]
        coordinator = subprocess.Popen(command, stdout=log, stderr=log, text=True)
    federation.processes.append(coordinator)
    for site, invite in invites.items():
        federation.enrol(site, invite)
    for site, cancer in sites.items():
        extra = {"env": {**os.environ, "PYTHONPATH": crash}} if site in CRASHING else {}
        federation.serve(site, cancer, **extra)
    assert coordinator.wait(400) == 3, federation.logs()
    federation.end()

    failed = {row["row"]: row["cause"] for row in federation.results()["failed"]}
    assert set(failed) == {"fit_expert/kidney-clinic/KIPAN/0", "describe/lung-clinic"}
    assert failed["fit_expert/kidney-clinic/KIPAN/0"].startswith("internal (reference ")
    assert failed["describe/lung-clinic"].startswith("data (reference ")

    # All that reached the coordinator in plaintext, and all that it and its terminal keep.
    beyond = files(tap, federation.study, federation.folder / "server.log")
    assert {"bodies.bin", "study.sqlite", "flower.sqlite", "server.log"} <= {p.name for p in beyond}
    # The scan does read what came over the wire: each site's name, each kind of answer.
    came = [*sites, "query.describe", "train.expert", "evaluate.release"]
    assert leaks([tap / "bodies.bin"], *came) == [("bodies.bin", text) for text in came]
    secrets = [PATIENT, SLIDE, HOSPITAL, FOLDER, str(federation.folder / "sites")]
    assert leaks(beyond, *secrets, DAYS) == []
    assert not [path for path in beyond if any(secret in path.name for secret in secrets)]

    # Nor in what the hospitals log or hand to their governance. A slide file that must be mended
    # is named to those who can mend it, by where it lies.
    for site in sites:
        state = federation.state(site)
        kept = files(*state.glob("cropkt-client.log*"), federation.folder / f"{site}.log")
        kept += [state / "status.json", state / "ledger.sqlite"]
        named = (PATIENT, HOSPITAL) if site in SPOILT else (PATIENT, HOSPITAL, SLIDE)
        assert leaks(kept, *named, DAYS) == []
        federation.run("client", "ledger", "verify", "--config", str(federation.site(site)))
        assert Ledger(state).rows()
    log = (federation.state("kidney-clinic") / "cropkt-client.log").read_text()
    assert "KeyError raised in" in log
    assert failed["fit_expert/kidney-clinic/KIPAN/0"].split()[-1].rstrip(")") in log
