"""A real training is killed with SIGKILL, resumes, and ends with the same weights, bit for bit."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.experts import checkpoint
from cropkt.messages import ExpertRequest, RouterRequest, save
from cropkt_client import tasks
from cropkt_client.site import Site

UVM = Cancer.UVM
CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from cropkt.experts import checkpoint
from cropkt.messages import REQUESTS, ExpertRequest, load
from cropkt_client import tasks
from cropkt_client.site import Site

torch.set_num_threads(1)
checkpoint.PAUSE, checkpoint.SHARE = 0.0, 1.0
config, request, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def hook(epoch):
    if epoch.number == last:
        os.kill(os.getpid(), signal.SIGKILL)

Site.on_epoch = lambda site, request: hook
request = load(request, expected=REQUESTS)
task = tasks.fit_expert if isinstance(request, ExpertRequest) else tasks.fit_router
task(request, Site.load(config))
"""


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1.0)


@pytest.fixture
def two_sites(make_site: Callable[..., Site], tmp_path: Path) -> tuple[Site, Site]:
    """The same hospital twice."""
    first = make_site()
    first.folder.rename(tmp_path / "first")
    return Site.load(tmp_path / "first" / "site.yaml"), make_site()


def kill(site: Site, request: ExpertRequest | RouterRequest, *, after: int) -> None:
    """Let a child train until the epoch `after` has ended, and kill it there."""
    file = site.folder / "request.npz"
    save(request, file)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(site.folder / "site.yaml"), str(file), str(after)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


@pytest.mark.parametrize("standardise", ["none", "site"])
def test_a_killed_training_ends_with_the_same_weights(
    two_sites: tuple[Site, Site],
    make_site: Callable[..., Site],
    study: StudyConfig,
    standardise: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = replace(study.training, standardise=standardise)  # type: ignore[arg-type]
    study = replace(study, training=training, router=replace(study.router, epochs=9))
    whole, killed = two_sites
    caplog.set_level(logging.INFO)
    request = ExpertRequest(task="t", study=study, cancer=UVM)
    wanted = tasks.fit_expert(request, whole)
    for epoch in (4, 11):
        kill(killed, request, after=epoch)
    caplog.clear()
    got = tasks.fit_expert(request, killed)
    assert "resumes after epoch 11" in caplog.text
    assert got.weights.tobytes() == wanted.weights.tobytes()
    assert same(whole, killed, "UVM/experts")
    for site, reply in ((whole, wanted), (killed, got)):
        site.keep_answer(request, reply)
        assert not list((site.state / "UVM").glob("*training.npz*"))

    others = (Cancer.KIPAN, Cancer.SKCM)
    given = [
        tasks.fit_expert(ExpertRequest(task="t", study=study, cancer=cancer), make_site(cancer))
        for cancer in others
    ]
    routing = RouterRequest(
        task="t",
        study=study,
        cancer=UVM,
        sources=others,
        weights=np.concatenate([reply.weights for reply in given]),
        signed=tuple(reply.signed for reply in given if reply.signed),
    )
    tasks.fit_router(routing, whole)
    kill(killed, routing, after=5)
    caplog.clear()
    tasks.fit_router(routing, killed)
    assert "resumes after epoch 5" in caplog.text
    assert same(whole, killed, "UVM/routers")


def same(first: Site, second: Site, name: str) -> bool:
    a, b = first.kept(name), second.kept(name)
    return a is not None and b is not None and a["weights"].tobytes() == b["weights"].tobytes()


def test_other_patients_begin_anew(
    make_site: Callable[..., Site], study: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    request = ExpertRequest(task="t", study=study, cancer=UVM)
    tasks.fit_expert(request, site)
    table = site.folder / "outcomes.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-1]) + "\n")  # a patient withdrew consent
    caplog.clear()
    tasks.fit_expert(request, site)
    assert "training.npz is of another training; it begins anew" in caplog.text
