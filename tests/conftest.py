"""Patients in memory, and the published implementation's numbers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort
from cropkt.config import ExpertShape

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


class MemorySlides:
    """A SlideSource whose slides are tensors."""

    def __init__(self, slides: dict[str, Tensor]) -> None:
        self.slides = slides

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self.slides

    def shape(self, slide_id: str) -> tuple[int, int]:
        rows, width = self.slides[slide_id].shape
        return rows, width

    def features(self, slide_id: str) -> Tensor:
        return self.slides[slide_id]

    def stamp(self, slide_id: str) -> str:
        return str(self.slides[slide_id].double().sum().item())

    def coords(self, slide_id: str) -> Tensor | None:
        return None

    def slide_ids(self) -> Iterable[str]:
        return sorted(self.slides)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small tensors lose more to waiting than they gain


@pytest.fixture(scope="session")
def shape() -> ExpertShape:
    return ExpertShape(dim=6, embed=8, attention=4)


@pytest.fixture(scope="session")
def make_cohort() -> Callable[..., Cohort]:
    """Return a maker of cohorts whose first feature tells the risk; every third has two slides."""

    def make(*, patients: int = 36, dim: int = 6, seed: int = 0, effect: float = 1.0) -> Cohort:
        rng = np.random.default_rng(seed)
        level = rng.normal(size=patients)
        slides: dict[str, Tensor] = {}
        names: list[tuple[str, ...]] = []
        for i in range(patients):
            mine = tuple(f"s{i:03d}-{j}" for j in range(1 + (i % 3 == 0)))
            for name in mine:
                bag = rng.normal(size=(int(rng.integers(1, 7)), dim))
                bag[:, 0] += 2 * level[i]
                slides[name] = torch.tensor(bag, dtype=torch.float32)
            names.append(mine)
        death = rng.exponential(1500 * np.exp(-2 * effect * level))
        censored = rng.exponential(4000, size=patients)
        return Cohort(
            cancer=Cancer.UVM,
            endpoint="DSS",
            dim=dim,
            patient_ids=tuple(f"p{i:03d}" for i in range(patients)),
            days=np.ceil(np.minimum(death, censored)) + 1,
            event=death <= censored,
            hospital=("",) * patients,
            slides=tuple(names),
            source=MemorySlides(slides),
        )

    return make


@pytest.fixture(scope="session")
def rewritten() -> Callable[..., Cohort]:
    """Return a function that gives some patients other outcomes or other patches."""

    def rewrite(
        cohort: Cohort, who: np.ndarray, *, outcomes: bool = False, patches: bool = False
    ) -> Cohort:
        rng = np.random.default_rng(99)
        days, event, slides = cohort.days.copy(), cohort.event.copy(), {}
        if outcomes:
            days[who] = rng.integers(1, 9000, size=who.sum())
            event[who] = ~event[who]
        for i, mine in enumerate(cohort.slides):
            for name in mine:
                bag = cohort.source.features(name)
                slides[name] = bag.flip(1) * 3 + 1 if patches and who[i] else bag
        return replace(cohort, days=days, event=event, source=MemorySlides(slides))

    return rewrite


@dataclass(frozen=True)
class Golden:
    """Inputs and outputs of the published implementation, from `shared/golden`."""

    folder: Path
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def bags(self) -> list[Tensor]:
        return [self.tensor(f"bag_{i}") for i in range(len(self.facts["bag_sizes"]))]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


@pytest.fixture(scope="session")
def golden() -> Golden:
    if not (GOLDEN / "golden.npz").exists():
        pytest.skip(f"the published numbers are not at {GOLDEN}")
    with np.load(GOLDEN / "golden.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return Golden(GOLDEN, json.loads((GOLDEN / "golden.json").read_text()), arrays)


# A shell starts its background jobs with SIGINT ignored, and children inherit that; tests that
# interrupt a child need what a terminal gives.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def board_study(tmp_path: Path) -> Path:
    """Return the folder of a deployed study under way, as far as its board needs it.

    lumc and amc gave an expert each, and lumc is evaluated; a site whose name is a script failed;
    nobody has come from leiden.
    """
    import hashlib
    import time
    from contextlib import closing

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cropkt.config import StudyConfig
    from cropkt.experts.artifact import m0_hash
    from cropkt.experts.card import Card, models_of, public_text, sign, training_hash
    from cropkt.experts.training import cross_fitted
    from cropkt.messages import (
        ArmScore,
        CohortCount,
        DescribeReply,
        ExpertReply,
        ReleaseReply,
        Score,
        Signed,
        SourceScore,
        TransferReply,
    )
    from cropkt_server.roster import Roster, Traffic
    from cropkt_server.settings import Settings, save_settings
    from cropkt_server.store import Store, Task

    folder, study, odd = tmp_path / "study", StudyConfig(folds=3), "<script>alert(1)</script>"
    folder.mkdir()
    uvm, skcm = Cancer.UVM, Cancer.SKCM
    save_settings(Settings(name="eye", host="hub.example.org:8443", study=study), folder)

    def expert(site: str, cancer: Cancer, mark: float) -> tuple[ExpertReply, Task]:
        task = Task(kind="fit_expert", site=site, cancer=cancer)
        key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(site.encode()).digest())
        weights = np.full((1, 4), mark, dtype=np.float32)
        card = Card(
            cancer=cancer,
            site=site,
            round=0,
            patients=100,
            events=20,
            endpoint=study.endpoint,
            encoder=study.encoder,
            shape=study.shape,
            models=models_of(weights, cross_fitted(study.folds)[:1]),
            m0=m0_hash(study),
            study=study.hash(),
            training=training_hash(study),
            parents=(),
            created="2026-03-01",
            signer=public_text(key),
        )
        text, signature = sign(card, key)
        reply = ExpertReply(
            task=task.id,
            cancer=cancer,
            patients=100,
            events=20,
            weights=weights,
            score=Score(c_index=0.7, se=0.05),
            signed=Signed(card=text, signature=signature),
            seconds=1.0,
        )
        return reply, task

    with closing(Roster(folder)) as roster:
        for number, (site, cancer) in enumerate((("lumc", uvm), ("amc", skcm), (odd, uvm))):
            roster.enrol(
                token=roster.invite(site, [cancer], 4e9),
                site=site,
                node_key=f"key {number}",
                signing_key="x",
                register=lambda key, name: len(name),
            )
        roster.seen("lumc", Traffic(received=3_000_000, sent=12_000_000))
        roster.invite("leiden", [uvm], time.time() + 3600)
    with closing(Store(folder)) as store:
        for site, cancer in (("lumc", uvm), ("amc", skcm)):
            described = Task(kind="describe", site=site)
            count = CohortCount(cancer=cancer, patients=100, events=20, dim=8)
            reply, task = expert(site, cancer, 1.0 if cancer == uvm else 2.0)
            assert reply.signed is not None
            store.add([described, task])
            store.keep(described, DescribeReply(task=described.id, site=site, cohorts=(count,)))
            store.done(described)
            store.keep(task, reply)
            store.bank.add(reply.signed, task=task.id)
            store.done(task)
        failed = Task(kind="describe", site=odd)
        scored = Task(kind="score_sources", site="lumc", cancer=uvm)
        judged = Task(kind="evaluate", site="lumc", cancer=uvm)
        scoring = Task(kind="score_sources", site="amc", cancer=skcm)
        store.add([failed, scored, scoring, judged])
        store.failed(failed, "crashed <b>there</b> (reference 8f2ac1)")
        (foreign,) = [e for e in store.bank.experts() if e.card.cancer == skcm]
        store.bank.use(scored.id, {skcm: foreign.signed.hash})
        store.keep(
            scored,
            TransferReply(
                task=scored.id,
                cancer=uvm,
                scores=(SourceScore(c_index=0.61, se=0.02),),
                training_scores=((Score(c_index=0.6, se=0.02),),) * 3,
                seconds=1.0,
            ),
        )
        store.done(scored)
        arm = ArmScore(c_index=0.7, se=0.05)
        store.keep(
            judged,
            ReleaseReply(
                task=judged.id,
                cancer=uvm,
                patients=100,
                events=20,
                arms={"local": arm, "auto": replace(arm, c_index=0.74)},
                routing={uvm: 0.8, skcm: 0.2},
                zero_shot_choice={},
                seconds=1.0,
            ),
        )
        store.done(judged)
        store.sent(scoring)
    (folder / "server.log").write_text("2026-03-01 INFO study eye listens on <0.0.0.0>\n")
    return folder
