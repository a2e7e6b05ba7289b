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
