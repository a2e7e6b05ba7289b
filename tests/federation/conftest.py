"""A whole federation of real processes, through the commands that its people type."""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from cropkt.cancers import Cancer
from cropkt.cohort.pack import write_pack
from cropkt.config import ExpertShape, RouterConfig, StudyConfig, TrainingConfig
from cropkt.files import write_private
from cropkt_server.results import results
from cropkt_server.settings import Settings, save_settings
from cropkt_server.store import Task, read_tasks
from cropkt_server.study import Study
from cropkt_sim.engine import simulate

COMMANDS = {
    name: [sys.executable, "-c", f"from cropkt_{name}.cli import main; main()"]
    for name in ("server", "client")
}
RELAY = runpy.run_path(str(Path(__file__).with_name("relay.py")))
DIM = 6
CONFIG = StudyConfig(
    encoder="UNI2-h",
    folds=3,
    seed=7,
    shape=ExpertShape(dim=DIM, embed=8, attention=4),
    training=TrainingConfig(epochs=4, learning_rate=1e-2),
    router=RouterConfig(epochs=2, learning_rate=1e-3),
)
WAITS = """
import os, time
from cropkt_client import tasks

name, number = os.environ["WAITS"].split()
begin = getattr(tasks, name)


def waits(request, site):
    while getattr(request, "round", 0) == int(number) and not os.path.exists(os.environ["GO"]):
        time.sleep(0.1)
    return begin(request, site)


setattr(tasks, name, waits)
"""
UNAVAILABLE = 69  # exit code of a client that cannot reach its coordinator


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this room: it starts real processes, which Flower leaves untidy."""
    marks = (
        pytest.mark.federation,
        pytest.mark.filterwarnings("ignore::ResourceWarning"),
        pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    )
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for mark in marks:
                item.add_marker(mark)


class Federation:
    """A coordinator's folder, the hospitals' folders, and the processes that run.

    Args:
        folder: of everything.
        config: what the study asks; small enough for a test.
    """

    def __init__(self, folder: Path, config: StudyConfig = CONFIG) -> None:
        self.folder, self.config = folder, config
        self.study = folder / "study"
        self.processes: list[subprocess.Popen[str]] = []
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.host = f"127.0.0.1:{probe.getsockname()[1]}"

    def configure(self, **changes: Any) -> None:
        """Change what the study asks, before `init`."""
        self.config = replace(self.config, **changes)

    def add_site(
        self, name: str, *cancers: Cancer, seed: int = 0, patients: int = 48, **settings: Any
    ) -> Path:
        """Write a hospital whose first feature tells the risk; return its `site.yaml`."""
        folder = self.folder / "sites" / name
        rng = np.random.default_rng(seed)
        rows = ["patient_id,slide_id,time,event,cancer,site"]
        slides = []
        for cancer in cancers:
            activity = rng.normal(size=patients)
            ids = [f"{cancer}-{i:03d}" for i in range(patients)]
            bags = [rng.normal(size=(rng.integers(3, 9), DIM)) for _ in ids]
            for bag, level in zip(bags, activity, strict=True):
                bag[:, 0] += 1.5 * level
            slides += list(zip(ids, bags, strict=True))
            death = rng.exponential(1500 * np.exp(-activity))
            censored = rng.exponential(3000, patients)
            for i, patient in enumerate(ids):
                days, event = int(min(death[i], censored[i])) + 1, int(death[i] <= censored[i])
                rows.append(f"{patient},{patient},{days},{event},{cancer},H{i % 6}")
        folder.mkdir(parents=True)
        write_pack(folder / "pack", slides, dim=DIM, dtype=np.float32)
        (folder / "outcomes.csv").write_text("\n".join(rows) + "\n")
        values = {
            "site": name,
            "cancers": [str(cancer) for cancer in cancers],
            "outcomes": "outcomes.csv",
            "pack": "pack",
            "encoder": self.config.encoder,
            "release": {"approval": "auto"},
            **settings,
        }
        (folder / "site.yaml").write_text(yaml.safe_dump(values))
        return folder / "site.yaml"

    def site(self, name: str) -> Path:
        """Return a hospital's `site.yaml`."""
        return self.folder / "sites" / name / "site.yaml"

    def state(self, name: str) -> Path:
        """Return a hospital's state folder."""
        return self.site(name).parent / "state"

    def init(self, **settings: Any) -> None:
        """Make the coordinator's folder, and set what `study.yaml` says."""
        self.run("server", "init", str(self.study), "--study", "eye", "--host", self.host)
        path = self.study / "study.yaml"
        values = yaml.safe_load(path.read_text())
        values["study"] = TypeAdapter(StudyConfig).dump_python(self.config, mode="json")
        values |= {"listen": "127.0.0.1", **settings}
        write_private(path, yaml.safe_dump(values).encode())

    def invite(self, site: str, *cancers: Cancer, expires: str = "7d") -> str:
        """Return an invite."""
        named = [part for cancer in cancers for part in ("--cancer", str(cancer))]
        return self.run(
            *("server", "invite", str(self.study), "--site", site, *named, "--expires", expires)
        ).strip()

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start the coordinator."""
        start = ("server", "start", str(self.study), *arguments)
        return self.begin(*start, log="server.log", **options)

    def enrol(self, site: str, invite: str, env: dict[str, str] | None = None) -> None:
        """Enrol, as soon as the coordinator answers."""
        command = [*COMMANDS["client"], "enrol", invite, "--config", str(self.site(site))]
        for _ in range(60):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
            if done.returncode != UNAVAILABLE:
                break
            time.sleep(0.5)
        assert done.returncode == 0, done.stderr + self.logs()

    def serve(self, site: str, *cancers: Cancer, **options: Any) -> subprocess.Popen[str]:
        """Start a hospital's client."""
        named = [part for cancer in cancers for part in ("--cancer", str(cancer))]
        arguments = ["--site", site, *named, "--config", str(self.site(site))]
        return self.begin("client", *arguments, log=f"{site}.log", **options)

    def serve_all(
        self, sites: Mapping[str, Cancer], *arguments: str
    ) -> tuple[subprocess.Popen[str], dict[str, subprocess.Popen[str]]]:
        """Start the coordinator with `arguments`, and let every hospital enrol and serve."""
        invites = {site: self.invite(site, cancer) for site, cancer in sites.items()}
        coordinator = self.start(*arguments)
        for site, invite in invites.items():
            self.enrol(site, invite)
        return coordinator, {site: self.serve(site, cancer) for site, cancer in sites.items()}

    def run(self, side: str, *arguments: str, code: int = 0) -> str:
        """Run a command to its end; return what it printed."""
        done = subprocess.run(
            [*COMMANDS[side], *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def complaint(self, side: str, *arguments: str, code: int) -> str:
        """Run a command that cannot succeed; return its one line."""
        done = subprocess.run(
            [*COMMANDS[side], *arguments], capture_output=True, text=True, timeout=120
        )
        lines = done.stderr.splitlines()
        assert (done.returncode, len(lines)) == (code, 1), done.stderr
        return lines[0]

    def begin(
        self,
        side: str,
        *arguments: str,
        log: str,
        env: dict[str, str] | None = None,
        under: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        """Start a command that goes on, `under` another one if that is given."""
        command = [*under, *COMMANDS[side], *arguments]
        with (self.folder / log).open("a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, text=True, env=env)
        self.processes.append(process)
        return process

    def customised(self, code: str, **variables: str) -> dict[str, str]:
        """Return an environment in which Python runs `code` first, in child processes too."""
        folder = self.folder / "custom"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(code)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        return {**os.environ, **variables, "PYTHONPATH": path}

    def waiting(self, task: str, go: Path, *, number: int = 0) -> dict[str, str]:
        """Return an environment in which a function of `tasks` waits for a file before it begins.

        Args:
            task: its name.
            go: the file.
            number: of the round in which it waits.
        """
        return self.customised(WAITS, WAITS=f"{task} {number}", GO=str(go))

    def end(self) -> None:
        """Stop every process that still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            process.wait(60)

    def tasks(self) -> list[Task]:
        """Return the coordinator's rows."""
        return read_tasks(self.study)

    def until(self, true: Callable[[], object], *, seconds: float = 200.0) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.1)

    @staticmethod
    def without_costs(found: dict[str, Any]) -> dict[str, Any]:
        """Return results without the seconds and memory of every arm."""
        for target in found["targets"].values():
            for arm in target["arms"].values():
                arm.pop("cost", None)
        return found

    def results(self) -> dict[str, Any]:
        """Return what the coordinator's report says."""
        found = json.loads((self.study / "report" / "results.json").read_text())
        return self.without_costs(found)

    def simulated(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the results of the same study in the simulation, from the same hospitals.

        Call it before a client runs: it copies the hospitals' folders, state and all.
        """
        names = tuple(names)
        folder = self.folder / "simulation"
        for number, name in enumerate(names):
            shutil.copytree(self.site(name).parent, folder / "sites" / str(number))
        (folder / "study").mkdir()
        save_settings(Settings(name="eye", sites=names, study=self.config), folder / "study")
        simulate(
            server_app="cropkt_server.app:app",
            client_app="cropkt_client.app:app",
            nodes=len(names),
            run_config={
                "study": str(folder / "study"),
                "sites": str(folder / "sites"),
                "poll": 0.02,
            },
        )
        study = Study(folder / "study", self.config, names)
        found = json.loads(json.dumps(results(study)))
        study.store.close()
        return self.without_costs(found)

    def logs(self) -> str:
        """Return the end of every log."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))

    @classmethod
    def differences(cls, one: Any, other: Any, where: str = "") -> list[str]:
        """Return where two nested results differ by more than 1e-6."""
        if isinstance(one, dict) and isinstance(other, dict):
            keys = [f"{where}.{key}: missing" for key in set(one) ^ set(other)]
            return keys + [
                line
                for k in set(one) & set(other)
                for line in cls.differences(one[k], other[k], f"{where}.{k}")
            ]
        if isinstance(one, float) and isinstance(other, float):
            same = math.isclose(one, other, rel_tol=0, abs_tol=1e-6)
        else:
            same = one == other
        return [] if same else [f"{where}: {one} is not {other}"]


@pytest.fixture
def relay() -> Iterator[Any]:
    """Return a relay that stands for the network."""
    relay = RELAY["Relay"]()
    yield relay
    relay.close()


@pytest.fixture
def proxy() -> Iterator[Any]:
    """Return an HTTP proxy that notes whom it was asked for."""
    proxy = RELAY["Proxy"]()
    yield proxy
    proxy.close()


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    """Return a federation that nobody has set up yet."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several trainings share this machine
    federation = Federation(tmp_path)
    yield federation
    federation.end()
