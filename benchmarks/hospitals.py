"""Real hospitals that train, in a federation of processes and in the simulation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml
from coordinator import Coordinator, Timing, trace

from cropkt.cancers import Cancer
from cropkt.cohort.pack import write_pack
from cropkt.config import StudyConfig
from cropkt_server.settings import Settings, save_settings
from cropkt_server.store import Store
from cropkt_sim.engine import simulate

ENCODER = "synthetic"
CLIENT = [sys.executable, "-c", "from cropkt_client.cli import main; main()"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def write_hospital(
    folder: Path, cancer: Cancer, *, dim: int, patients: int, patches: int, seed: int
) -> Path:
    """Write a hospital's data, whose first feature tells the risk; return its `site.yaml`."""
    rng = np.random.default_rng(seed)
    level = rng.normal(size=patients)
    ids = [f"{cancer}-{i:03d}" for i in range(patients)]
    bags = rng.normal(size=(patients, patches, dim)).astype(np.float32)
    bags[:, :, 0] += level[:, None]
    death, censored = rng.exponential(1500 * np.exp(-level)), rng.exponential(3000, patients)
    rows = ["patient_id,slide_id,time,event,cancer,site"]
    for patient, dies, leaves in zip(ids, death, censored, strict=True):
        days = int(min(dies, leaves)) + 1
        rows.append(f"{patient},{patient},{days},{int(dies <= leaves)},{cancer},H")
    folder.mkdir(parents=True)
    write_pack(folder / "pack", zip(ids, bags, strict=True), dim=dim, dtype=np.float32)
    (folder / "outcomes.csv").write_text("\n".join(rows) + "\n")
    settings = {
        "site": folder.name,
        "cancers": [str(cancer)],
        "outcomes": "outcomes.csv",
        "pack": "pack",
        "encoder": ENCODER,
        "release": {"approval": "auto"},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(settings))
    return folder / "site.yaml"


def federated(folder: Path, config: StudyConfig, sites: Mapping[str, Cancer]) -> Timing:
    """Run the study with a coordinator and `cropkt-client` processes, one thread each."""
    coordinator = Coordinator(folder / "study", config, min_sites=len(sites))
    invites = {
        site: coordinator.run("invite", str(coordinator.folder), "--site", site, "--cancer", cancer)
        for site, cancer in sites.items()
    }
    coordinator.start()
    environment, clients = {**os.environ, **ONE_THREAD}, list[subprocess.Popen[bytes]]()
    try:
        for site, invite in invites.items():
            where = ("--config", str(folder / "sites" / site / "site.yaml"))
            while subprocess.run([*CLIENT, "enrol", invite.strip(), *where]).returncode == 69:
                time.sleep(1.0)  # the coordinator does not answer yet
            serve = [*CLIENT, "--site", site, "--cancer", sites[site], *where]
            clients.append(subprocess.Popen(serve, env=environment))
        cost = coordinator.cost()
        for client in clients:
            client.wait()
        if cost.code:
            raise SystemExit(f"the coordinator ended with {cost.code}; see {folder}")
    finally:
        coordinator.stop()
        for client in clients:
            if client.poll() is None:
                client.terminate()
                client.wait()
    return Timing.of(coordinator.folder)


def simulated(folder: Path, config: StudyConfig, sites: Mapping[str, Cancer]) -> Timing:
    """Run the same tasks as calls in one process a site, one thread each: training, bare."""
    for number, site in enumerate(sites):
        shutil.copytree(folder / "sites" / site, folder / "bare" / str(number))
    study = folder / "bare-study"
    Store(study).close()
    trace(study)
    save_settings(Settings(name="bench", sites=tuple(sites), study=config), study)
    simulate(
        server_app="cropkt_server.app:app",
        client_app="cropkt_client.app:app",
        nodes=len(sites),
        run_config={"study": str(study), "sites": str(folder / "bare"), "poll": 0.02},
        workers=len(sites),
    )
    return Timing.of(study)
