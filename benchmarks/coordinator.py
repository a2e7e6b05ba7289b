"""A real coordinator process for benchmarks: its sites, its cost, the bytes on its wire."""

from __future__ import annotations

import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil
import yaml
from light_sites import LightSite
from pydantic import TypeAdapter

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.messages import REPLIES, load
from cropkt_client.enrol import Keys
from cropkt_server.enrolment import pem_of
from cropkt_server.roster import Roster

SERVER = [sys.executable, "-c", "from cropkt_server.cli import main; main()"]
LOOK = 0.1  # seconds between looks at the process
_NODES = count(1)
_TRACE = """
CREATE TABLE trace (id TEXT, state TEXT, at REAL);
CREATE TRIGGER traced AFTER UPDATE OF state ON task BEGIN
    INSERT INTO trace VALUES (NEW.id, NEW.state, (julianday('now') - 2440587.5) * 86400.0);
END;
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the tasks of a traced study took, in seconds."""

    span: float  # from the first task sent to the last reply stored
    latency: dict[str, float]  # by task: from the last time it was sent until its reply was stored
    seconds: dict[str, float]  # by task: of the site's work alone, as the site measured it
    repeated: int  # times that a task was sent again

    @classmethod
    def of(cls, folder: Path) -> Timing:
        """Return the timing of the study in `folder`."""
        with closing(sqlite3.connect(folder / "study.sqlite")) as database:
            rows = database.execute("SELECT id, state, at FROM trace ORDER BY rowid").fetchall()
        sent, latency, seconds = dict[str, float](), dict[str, float](), dict[str, float]()
        for task, state, at in rows:
            if state == "sent":
                sent[task] = at
            elif state == "done":
                # In a simulation a site says who it is, before there is a row that could be sent.
                latency[task] = at - sent.get(task, at)
                reply = load(folder / "replies" / f"{task.replace('/', '~')}.npz", expected=REPLIES)
                seconds[task] = float(getattr(reply, "seconds", 0.0))
        again = [state for _, state, _ in rows].count("sent") - len(sent)
        return cls(rows[-1][2] - rows[0][2], latency, seconds, again)

    def by_kind(self) -> dict[str, list[str]]:
        """Return the tasks of each kind."""
        found: dict[str, list[str]] = {}
        for task in self.latency:
            found.setdefault(task.partition("/")[0], []).append(task)
        return found


@dataclass(frozen=True, slots=True)
class Cost:
    """What a study cost its coordinator."""

    wall: float  # seconds, from the start of the process to its end
    cpu: float  # seconds of all its processes
    peak: int  # bytes: the largest resident size of one process, as the kernel kept it
    tree: int  # bytes: the largest resident size of all its processes together, sampled
    code: int  # exit code


class Coordinator:
    """A study folder, and the process that runs it.

    Args:
        folder: a new folder.
        config: what the study asks.
        settings: more of `study.yaml`.
    """

    def __init__(self, folder: Path, config: StudyConfig, **settings: object) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.run("init", str(folder), "--study", "bench", "--host", self.address)
        path = folder / "study.yaml"
        values = yaml.safe_load(path.read_text())
        values["study"] = TypeAdapter(StudyConfig).dump_python(config, mode="json")
        path.write_text(yaml.safe_dump({**values, "listen": "127.0.0.1", **settings}))
        trace(folder)

    @property
    def ca(self) -> bytes:
        """The PEM of the study's certificate authority."""
        return (self.folder / "keys" / "ca.pem").read_bytes()

    def enrol(self, name: str, cancers: Iterable[Cancer]) -> LightSite:
        """Write a new site into the roster, as its enrolment over the network would.

        That takes ten enrolments a minute from one address, which a hundred sites of one machine
        would wait for.
        """
        cancers = tuple(cancers)
        state = self.folder.parent / "sites" / name
        keys = Keys.of(state)
        roster = Roster(self.folder)
        try:
            public = keys.public()
            roster.enrol(
                token=roster.invite(name, cancers, time.time() + 3600),
                site=name,
                node_key=pem_of(public["node_key"]),
                signing_key=public["signing_key"],
                register=lambda key, site: next(_NODES),  # Flower's number replaces it at start
            )
        finally:
            roster.close()
        return LightSite(name, cancers, state)

    def run(self, *arguments: str) -> str:
        """Run a command of the coordinator to its end; return what it printed."""
        return subprocess.run(
            [*SERVER, *arguments], check=True, capture_output=True, text=True
        ).stdout

    def start(self) -> None:
        """Start the process, and watch it until it ends."""
        self._began = time.monotonic()
        with (self.folder.parent / "coordinator.log").open("a") as log:
            self._process = subprocess.Popen(
                [*SERVER, "start", str(self.folder)], stdout=log, stderr=log
            )
        self._cpu, self._peak, self._tree = 0.0, 0, 0
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def cost(self) -> Cost:
        """Wait for the end of the study; return what it cost."""
        code = self._process.wait()
        self._watcher.join()
        return Cost(self._ended - self._began, self._cpu, self._peak, self._tree, code)

    def stop(self) -> None:
        """End the process, if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self._watcher.join()

    def _watch(self) -> None:
        process = psutil.Process(self._process.pid)
        used: dict[int, float] = {}
        while self._process.poll() is None:
            with suppress(psutil.Error, OSError, IndexError):  # it has just ended
                everyone = [process, *process.children(recursive=True)]
                for one in everyone:
                    times = one.cpu_times()
                    used[one.pid] = times.user + times.system
                self._tree = max(self._tree, sum(one.memory_info().rss for one in everyone))
                self._peak = max(self._peak, *(high_water(one.pid) for one in everyone))
            self._cpu = sum(used.values())
            time.sleep(LOOK)
        self._ended = time.monotonic()


class Relay:
    """A TCP relay on loopback that counts the bytes it passes on, each way.

    Args:
        port: of the coordinator.
    """

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.up = self.down = 0  # bytes of TCP payload, to and from the coordinator
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                site, _ = self._listener.accept()
                try:
                    hub = socket.create_connection(self._target)
                except OSError:
                    site.close()
                    continue
                for one, other, way in ((site, hub, "up"), (hub, site, "down")):
                    threading.Thread(target=self._pass, args=(one, other, way), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, way: str) -> None:
        buffer = memoryview(bytearray(1 << 18))
        with suppress(OSError):
            while size := one.recv_into(buffer):
                other.sendall(buffer[:size])
                with self._lock:
                    setattr(self, way, getattr(self, way) + size)
        with suppress(OSError):
            other.shutdown(socket.SHUT_WR)


def trace(study: Path) -> None:
    """Let a study's database note when each row changed its state."""
    with closing(sqlite3.connect(study / "study.sqlite")) as database:
        database.executescript(_TRACE)


def high_water(pid: int) -> int:
    """Return the largest resident size that a process ever had, in bytes (VmHWM)."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(text.partition("VmHWM:")[2].split()[0])


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def median_p95(values: list[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile."""
    return statistics.median(values), sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def load_average() -> str:
    """Return the machine's load over one, five and fifteen minutes."""
    return " ".join(f"{value:.1f}" for value in os.getloadavg())
