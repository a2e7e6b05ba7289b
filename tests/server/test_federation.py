"""A whole federation of real processes, through the commands that its people type."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from cropkt.cancers import Cancer
from cropkt.cohort.pack import write_pack
from cropkt.config import ExpertShape, RouterConfig, StudyConfig, TrainingConfig
from cropkt_server.results import results
from cropkt_server.settings import Settings, save_settings
from cropkt_server.store import read_tasks
from cropkt_server.study import Study
from cropkt_sim.engine import simulate

pytestmark = [
    pytest.mark.federation,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
COMMANDS = {
    name: [sys.executable, "-c", f"from cropkt_{name}.cli import main; main()"]
    for name in ("server", "client")
}
CANCERS = (Cancer.UVM, Cancer.SKCM, Cancer.KIPAN)
DIM = 6
CONFIG = StudyConfig(
    folds=3,
    seed=7,
    shape=ExpertShape(dim=DIM, embed=8, attention=4),
    training=TrainingConfig(epochs=4, learning_rate=1e-2),
    router=RouterConfig(epochs=2, learning_rate=1e-3),
)


def write_site(folder: Path, cancer: Cancer, *, seed: int, patients: int = 48) -> None:
    """Write a hospital whose first feature tells the risk."""
    rng = np.random.default_rng(seed)
    activity = rng.normal(size=patients)
    ids = [f"{cancer}-{i:03d}" for i in range(patients)]
    bags = [rng.normal(size=(rng.integers(3, 9), DIM)) for _ in ids]
    for bag, level in zip(bags, activity, strict=True):
        bag[:, 0] += 1.5 * level
    write_pack(folder / "pack", zip(ids, bags, strict=True), dim=DIM, dtype=np.float32)
    death, censored = rng.exponential(1500 * np.exp(-activity)), rng.exponential(3000, patients)
    rows = ["patient_id,slide_id,time,event,cancer,site"]
    for i, name in enumerate(ids):
        days, event = int(min(death[i], censored[i])) + 1, int(death[i] <= censored[i])
        rows.append(f"{name},{name},{days},{event},{cancer},H{i % 6}")
    (folder / "outcomes.csv").write_text("\n".join(rows) + "\n")
    config = {"site": f"site-{cancer}", "cancers": [str(cancer)], "outcomes": "outcomes.csv"}
    (folder / "site.yaml").write_text(yaml.safe_dump({**config, "pack": "pack"}))


class Federation:
    """A coordinator's folder, the hospitals' folders, and the processes that run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.study = folder / "study"
        self.processes: list[subprocess.Popen[str]] = []
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.host = f"127.0.0.1:{probe.getsockname()[1]}"

    def run(self, side: str, *arguments: str, code: int = 0) -> str:
        """Run a command to its end; return what it printed."""
        done = subprocess.run(
            [*COMMANDS[side], *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def begin(self, side: str, *arguments: str, log: str) -> subprocess.Popen[str]:
        """Start a command that goes on."""
        with (self.folder / log).open("a") as output:
            process = subprocess.Popen(
                [*COMMANDS[side], *arguments], stdout=output, stderr=output, text=True
            )
        self.processes.append(process)
        return process

    def site(self, cancer: Cancer) -> Path:
        return self.folder / str(cancer) / "site.yaml"

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    federation = Federation(tmp_path)
    yield federation
    for process in federation.processes:
        if process.poll() is None:
            process.terminate()
    for process in federation.processes:
        process.wait(60)


def simulated(folder: Path, sites: Path) -> dict[str, Any]:
    """Return the results of the same study in the simulation."""
    names = tuple(f"site-{cancer}" for cancer in CANCERS)
    folder.mkdir()
    save_settings(Settings(name="eye", sites=names, study=CONFIG), folder)
    simulate(
        server_app="cropkt_server.app:app",
        client_app="cropkt_client.app:app",
        nodes=len(CANCERS),
        run_config={"study": str(folder), "sites": str(sites), "poll": 0.02},
    )
    study = Study(folder, CONFIG, names)
    found = json.loads(json.dumps(results(study)))
    study.store.close()
    return dict(found)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return where two nested results differ by more than 1e-6."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [f"{where}.{key}: missing" for key in set(one) ^ set(other)]
        return keys + [
            line
            for k in set(one) & set(other)
            for line in differences(one[k], other[k], f"{where}.{k}")
        ]
    if isinstance(one, float) and isinstance(other, float):
        same = math.isclose(one, other, rel_tol=0, abs_tol=1e-6)
    else:
        same = one == other
    return [] if same else [f"{where}: {one} is not {other}"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed", "coordinator killed"])
def test_three_hospitals_get_what_the_simulation_gets(federation: Federation, kill: bool) -> None:
    for seed, cancer in enumerate(CANCERS):
        (federation.folder / str(cancer)).mkdir()
        write_site(federation.folder / str(cancer), cancer, seed=seed)
        shutil.copytree(
            federation.folder / str(cancer), federation.folder / "simulated" / str(seed)
        )
    expected = simulated(federation.folder / "sim-study", federation.folder / "simulated")

    study = str(federation.study)
    federation.run("server", "init", study, "--study", "eye", "--host", federation.host)
    path = federation.study / "study.yaml"
    values = yaml.safe_load(path.read_text())
    values["study"] = TypeAdapter(StudyConfig).dump_python(CONFIG, mode="json")
    path.write_text(yaml.safe_dump({**values, "listen": "127.0.0.1", "min_sites": 3}))
    invites = {
        cancer: federation.run(
            "server", "invite", study, "--site", f"site-{cancer}", "--cancer", cancer
        ).strip()
        for cancer in CANCERS
    }
    coordinator = federation.begin("server", "start", study, log="server.log")
    for cancer, invite in invites.items():
        _enrol(federation, cancer, invite)
    clients = {
        cancer: federation.begin(
            *("client", "--site", f"site-{cancer}", "--cancer", cancer),
            *("--config", str(federation.site(cancer))),
            log=f"{cancer}.log",
        )
        for cancer in CANCERS
    }
    if kill:
        _until_an_expert_is_there(federation)
        coordinator.kill()
        coordinator.wait()
        coordinator = federation.begin("server", "start", study, log="server.log")
    assert coordinator.wait(400) == 0, federation.logs()
    for client in clients.values():
        assert client.wait(100) == 0, federation.logs()

    found = json.loads((federation.study / "report" / "results.json").read_text())
    assert found["failed"] == []
    assert not differences(found, expected)
    told = json.loads(federation.run("server", "status", study, "--json"))
    assert told["state"] == "finished"
    assert {site["site"]: site["done"] for site in told["sites"]} == {
        f"site-{cancer}": 5 for cancer in CANCERS
    }
    federation.run("server", "start", study, "--linger", "0")  # over: says so again


def _until_an_expert_is_there(federation: Federation) -> None:
    end = time.monotonic() + 200
    while not any(
        task.kind == "fit_expert" and task.state == "done" for task in read_tasks(federation.study)
    ):
        assert time.monotonic() < end, federation.logs()
        time.sleep(0.1)


def _enrol(federation: Federation, cancer: Cancer, invite: str) -> None:
    """Enrol, as soon as the coordinator answers."""
    command = [*COMMANDS["client"], "enrol", invite, "--config", str(federation.site(cancer))]
    for _ in range(30):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode != 69:  # unavailable
            break
    assert done.returncode == 0, done.stderr + federation.logs()
