"""A small hospital on disk: 48 patients whose first feature tells their risk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from cropkt.cancers import Cancer
from cropkt.cohort.pack import write_pack
from cropkt.config import ExpertShape, RouterConfig, StudyConfig, TrainingConfig
from cropkt_client.site import Site

DIM = 6
SECRET = "SECRETPATIENT"  # every id on this site begins with it


def write_site(
    folder: Path, cancer: Cancer, *, seed: int, patients: int = 48, **further: object
) -> Path:
    """Write outcomes, a pack and a `site.yaml`; return the latter."""
    rng = np.random.default_rng(seed)
    activity = rng.normal(size=patients)
    ids = [f"{SECRET}-{cancer}-{i:03d}" for i in range(patients)]
    bags = [rng.normal(size=(rng.integers(3, 9), DIM)) for _ in ids]
    for bag, level in zip(bags, activity, strict=True):
        bag[:, 0] += 1.5 * level
    write_pack(folder / "pack", zip(ids, bags, strict=True), dim=DIM, dtype=np.float32)
    death = rng.exponential(1500 * np.exp(-activity))
    censored = rng.exponential(3000, size=patients)
    rows = ["patient_id,slide_id,time,event,cancer,site"]
    for i, name in enumerate(ids):
        time = int(min(death[i], censored[i])) + 1
        rows.append(f"{name},{name},{time},{int(death[i] <= censored[i])},{cancer},H{i % 6}")
    (folder / "outcomes.csv").write_text("\n".join(rows) + "\n")
    path = folder / "site.yaml"
    config = {
        "site": f"site-{cancer}",
        "cancers": [str(cancer)],
        "outcomes": "outcomes.csv",
        "pack": "pack",
        "release": {"approval": "auto"},
        **further,
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """Return `write_site`, which gives `site.yaml` further keys too."""
    return write_site


@pytest.fixture(scope="session")
def study_of_small() -> StudyConfig:
    return StudyConfig(
        folds=3,
        shape=ExpertShape(dim=DIM, embed=8, attention=4),
        training=TrainingConfig(epochs=6, minimum_updates=90, learning_rate=1e-2),
        router=RouterConfig(epochs=2, learning_rate=1e-3),
    )


@pytest.fixture
def study(study_of_small: StudyConfig) -> StudyConfig:
    return study_of_small


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., Site]:
    def make(cancer: Cancer = Cancer.UVM, seed: int = 0) -> Site:
        folder = tmp_path / str(cancer)
        folder.mkdir()
        return Site.load(write_site(folder, cancer, seed=seed))

    return make


@pytest.fixture
def standardised(study: StudyConfig) -> StudyConfig:
    return replace(study, training=replace(study.training, standardise="site"))
