"""Twenty kill -9 at random times, of every process of a study: what survives, and how soon.

Times, victims and sites are drawn from one seed; at least one kill each strikes a training of
experts, a training of routers and an evaluation.

What stands in the tables at the end, and in the bank byte for byte, is what a study gives that
nobody disturbed. What it took is measured: how long until the killed process' work went on, and
how much training was lost. The table goes to standard error, and into `recovery.txt`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cropkt.cancers import Cancer
from cropkt.messages import REPLIES, ExpertReply, load
from cropkt_client.log import LOG_NAME, read_status
from cropkt_server.store import Task

SITES = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM, "kidney-clinic": Cancer.KIPAN}
SEED, EACH = 20, 5  # of what is killed when; how often each of
VICTIMS = ("coordinator", "client", "supernode", "training")
WORKERS = ("client", "training")  # whose death ends the task at work
SURE = {"train.expert": "training", "train.router": "training", "evaluate.": "client"}
"""What is struck at least once, and by whose death; a kill of each is kept for it until then."""
DOWN = 2  # processes, at most, that are down at a time; one more where an evaluation is struck
LOST = 8.0  # seconds of training that a kill may cost on a busy machine; two on an idle one
BEGAN = re.compile(r"^(\S+ \S+) .*training (?:begins|resumes after epoch (\d+))$", re.MULTILINE)


@dataclass(kw_only=True)
class Kill:
    """One kill, and what became of the work."""

    victim: str
    site: str  # none for the coordinator
    when: float  # seconds since the study began
    task: str  # at work, as the client said
    log: int  # length of the site's log, in characters
    rows: list[Task]  # the coordinator's
    lost: float | None = None  # seconds of training
    epoch: int = 0  # of the checkpoint that was there
    recovered: float | None = None  # seconds


class Killer:
    """Kills and starts again the processes of a federation, and watches what they do.

    Args:
        federation: that runs.
        coordinator: its process.
        clients: their processes.
        over: seconds that the same study took undisturbed; the pauses between kills come to half
            of them on average, the kills themselves delay it.
    """

    def __init__(
        self,
        federation: Any,
        coordinator: subprocess.Popen[str],
        clients: dict[str, subprocess.Popen[str]],
        *,
        over: float,
    ) -> None:
        self.federation, self.coordinator, self.clients = federation, coordinator, clients
        self._longest = over / (EACH * len(VICTIMS))  # pause, in seconds
        self.kills: list[Kill] = []
        self.answers: dict[Path, tuple[int, int]] = {}
        self._random = random.Random(SEED)
        self._left = [victim for victim in VICTIMS for _ in range(EACH)]
        self._random.shuffle(self._left)
        self._began = time.monotonic()

    def run(self) -> None:
        """Kill until nobody is left to be killed and everybody's work has gone on."""
        due = self._due()
        while self._left or any(kill.recovered is None for kill in self.kills):
            over = f"over after {len(self.kills)} kills, before {self._wanted() or 'the others'}"
            assert self.coordinator.poll() is None, over
            time.sleep(0.05)
            self.watch()
            if self._hit("evaluate.") or (time.monotonic() > due and self._strike()):
                due = self._due()

    def struck(self, kind: str) -> bool:
        """Return whether a kill ended a task at work whose kind begins so."""
        return any(k.victim in WORKERS and k.task.startswith(kind) for k in self.kills)

    def watch(self) -> None:
        """See whose work has gone on, and that no answer is ever written again."""
        now = time.monotonic() - self._began
        for kill in self.kills:
            if kill.recovered is None and self._goes_on(kill):
                kill.recovered = now - kill.when
        for site in SITES:
            for path in (self.federation.state(site) / "answers").glob("*.npz"):
                found = path.stat()
                identity = (found.st_ino, found.st_mtime_ns)
                assert self.answers.setdefault(path, identity) == identity, "answered twice"

    def log(self, site: str) -> str:
        """Return a client's log."""
        path = self.federation.state(site) / LOG_NAME
        return path.read_text() if path.exists() else ""

    def table(self) -> str:
        """Return a line a kill."""
        lines = [f"seed {SEED}", "   at  victim       site           at work            lost  back"]
        for kill in self.kills:
            lost = "-" if kill.lost is None else f"{kill.lost:.1f}"
            named = f"{kill.victim:<12} {kill.site:<14} {kill.task or '-':<18}"
            lines.append(f"{kill.when:5.0f}  {named} {lost:>4} {kill.recovered or -1:5.1f}")
        for victim in VICTIMS:
            took = sorted(k.recovered or 0.0 for k in self.kills if k.victim == victim)
            lines.append(f"{victim}: median {np.median(took):.1f} s, longest {took[-1]:.1f} s")
        return "\n".join(lines) + "\n"

    def _due(self) -> float:
        """Return when to strike next."""
        return time.monotonic() + self._random.uniform(0, self._longest)

    def _wanted(self) -> list[str]:
        """Return what has to be struck yet."""
        return [kind for kind in SURE if not self.struck(kind)]

    def _hit(self, kind: str) -> bool:
        """Strike a task of a kind that has to be struck yet, if one is at work; return whether."""
        if self.struck(kind):
            return False
        sites = self._random.sample(list(SITES), len(SITES))
        return any(self._at_work(s).startswith(kind) and self._try(SURE[kind], s) for s in sites)

    def _strike(self) -> bool:
        """Kill the next victim that is there to be killed; return whether there was one."""
        if sum(kill.recovered is None for kill in self.kills) >= DOWN:
            return False
        kept = [SURE[kind] for kind in self._wanted()]
        if any(self._hit(kind) for kind in self._wanted()):
            return True
        for victim in dict.fromkeys(self._left):
            if self._left.count(victim) > kept.count(victim):
                alone = victim == "coordinator"
                sites = [""] if alone else self._random.sample(list(SITES), len(SITES))
                if any(self._try(victim, site) for site in sites):
                    return True
        return False

    def _try(self, victim: str, site: str) -> bool:
        """Kill a victim, unless what its last death left has not gone on; return whether."""
        hurt = ((kill.victim, kill.site) for kill in self.kills if kill.recovered is None)
        if (victim, site) in hurt or not self._kill(victim, site):
            return False
        self._left.remove(victim)
        return True

    def _at_work(self, site: str) -> str:
        """Return the task at work at a site, as its client says; nothing if there is none."""
        state = read_status(self.federation.state(site))
        return (state.task if state else None) or ""

    def _kill(self, victim: str, site: str) -> bool:
        rows = self.federation.tasks()
        if victim == "coordinator":
            self._note(victim, "", "", rows)
            self.coordinator.kill()
            self.coordinator.wait()
            self.coordinator = self.federation.start()
            return True
        task, client = self._at_work(site), self.clients[site]
        if victim == "client":
            self._note(victim, site, task, rows)
            client.kill()
            client.wait()
            self._measure_loss(self.kills[-1])
            self.clients[site] = self.federation.serve(site, SITES[site])
            return True
        module = {"supernode": "cropkt_client.supernode", "training": "cropkt_client.worker"}
        child = next((c for c in _children(client.pid) if _runs(c, module[victim])), None)
        if child is None:
            return False
        if victim == "training" and (not task.startswith("train.") or not self._spared(site)):
            return False
        self._note(victim, site, task, rows)
        child.kill()
        if victim == "training":
            self._measure_loss(self.kills[-1])
        return True

    def _note(self, victim: str, site: str, task: str, rows: list[Task]) -> None:
        when, length = time.monotonic() - self._began, len(self.log(site)) if site else 0
        self.kills.append(
            Kill(victim=victim, site=site, when=when, task=task, log=length, rows=rows)
        )

    def _spared(self, site: str) -> bool:
        """Return whether a task can bear one more death of its process: the third is its end."""
        return self.log(site).rpartition(": begins")[2].count("trying again") < 2

    def _measure_loss(self, kill: Kill) -> None:
        """Note from where a training that was killed goes on, and what was not kept of it."""
        killed = time.time()
        if not kill.task.startswith("train."):
            return
        time.sleep(0.3)  # the last lines of a child are on their way
        log = self.log(kill.site)
        current = max(log.rfind(mark, 0, kill.log) for mark in (": begins", "trying again"))
        began, kill.log = BEGAN.search(log, max(0, current)), len(log)
        if began is None:
            return
        kept = datetime.strptime(began[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
        checkpoint = self.federation.state(kill.site) / SITES[kill.site] / "training.npz"
        if checkpoint.exists():
            with np.load(checkpoint, allow_pickle=False) as stored:
                kill.epoch = json.loads(str(stored["about"]))["epoch"]
            kept = max(kept, checkpoint.stat().st_mtime)
        kill.lost = max(0.0, killed - kept)

    def _goes_on(self, kill: Kill) -> bool:
        """Return whether the work of what was killed has gone on."""
        if kill.victim == "coordinator":
            before = {row.id: (row.tries, row.state == "done") for row in kill.rows}
            rows = self.federation.tasks()
            return any((t.tries, t.state == "done") != before.get(t.id, (0, False)) for t in rows)
        log = self.log(kill.site)[kill.log :]
        if kill.victim == "training" or kill.lost is not None:
            return BEGAN.search(log) is not None
        if kill.task and kill.victim == "client":
            return ": begins" in log or self._answered(kill)
        return "SuperNode ID" in log

    def _answered(self, kill: Kill) -> bool:
        """Return whether the row that was at work is done: its answer was there already."""
        asked = {t.id for t in kill.rows if t.site == kill.site and t.state != "done"}
        return any(t.id in asked and t.state == "done" for t in self.federation.tasks())


@pytest.mark.timeout(1500)
def test_twenty_kills_cost_nothing_but_time(federation: Any, tmp_path: Path) -> None:
    training = replace(federation.config.training, minimum_updates=2000)
    router = replace(federation.config.router, minimum_updates=1500)
    undisturbed = type(federation)(tmp_path / "undisturbed")
    for each in (undisturbed, federation):
        each.configure(training=training, router=router)
        for seed, (site, cancer) in enumerate(SITES.items()):
            each.add_site(site, cancer, seed=seed)
        each.init(min_sites=len(SITES))
    began = time.monotonic()
    try:
        coordinator, _ = undisturbed.serve_all(SITES, "--linger", "0")
        assert coordinator.wait(400) == 0, undisturbed.logs()
    finally:
        undisturbed.end()

    took = time.monotonic() - began
    sys.stderr.write(f"undisturbed: {took:.0f} s\n")

    killer = Killer(federation, *federation.serve_all(SITES), over=took)
    federation.until(
        lambda: sum(task.state == "done" for task in federation.tasks()) >= len(SITES), seconds=400
    )
    killer.run()
    while killer.coordinator.poll() is None:
        killer.watch()
        time.sleep(0.05)
    assert killer.coordinator.returncode == 0, federation.logs()
    for client in killer.clients.values():
        assert client.wait(100) == 0, federation.logs()

    sys.stderr.write(killer.table())
    (tmp_path / "recovery.txt").write_text(killer.table())
    assert len(killer.kills) == EACH * len(VICTIMS)
    assert sum(kill.task.startswith("train.") for kill in killer.kills) >= EACH
    assert all(killer.struck(kind) for kind in SURE)
    assert _bank(federation) == _bank(undisturbed)
    assert len(_bank(federation)) == len(SITES)
    assert federation.results() == undisturbed.results()
    for site in SITES:
        _nothing_was_trained_twice(killer, site)


def _nothing_was_trained_twice(killer: Killer, site: str) -> None:
    """Each task was answered once; a killed training went on from its last checkpoint."""
    rows = [task for task in killer.federation.tasks() if task.site == site]
    answers = [path for path in killer.answers if site in path.parts]
    assert len(answers) == len(rows)
    starts = [int(epoch or 0) for _, epoch in BEGAN.findall(killer.log(site))]
    trainings = sum(task.kind in ("fit_expert", "fit_router") for task in rows)
    interrupted = [k for k in killer.kills if k.site == site and k.lost is not None]
    assert len(starts) == trainings + len(interrupted)
    assert sorted(starts) == sorted([0] * trainings + [kill.epoch for kill in interrupted])
    assert max((kill.lost or 0.0 for kill in interrupted), default=0.0) < LOST


def _bank(federation: Any) -> dict[str, str]:
    """Return the SHA-256 of the weights in every expert that was stored."""
    found = {}
    for path in (federation.study / "replies").glob("*.npz"):
        reply = load(path, expected=REPLIES)
        if isinstance(reply, ExpertReply):
            found[path.name] = hashlib.sha256(reply.weights.tobytes()).hexdigest()
    return found


def _runs(process: psutil.Process, module: str) -> bool:
    """Return whether a process, which may just have ended, runs a module."""
    try:
        return module in str(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []
