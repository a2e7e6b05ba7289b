"""A target with trained own experts, sources, and what they say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from cropkt.cohort.bags import Cohort
from cropkt.config import PUBLISHED, ExpertShape, RouterConfig, StudyConfig, TrainingConfig
from cropkt.experts.abmil import Abmil, flatten, initialise
from cropkt.experts.bank import Opinions
from cropkt.experts.training import Plan, standardise_for, train_experts
from cropkt.transfer.target import Target

FOLDS = np.arange(36) % 3


@dataclass(frozen=True)
class Scene:
    """Everything that stands before a router is trained."""

    study: StudyConfig
    target: Target
    sources: Abmil
    opinions: list[Opinions]


@pytest.fixture(scope="session")
def study() -> StudyConfig:
    return StudyConfig(
        folds=3,
        shape=ExpertShape(dim=6, embed=8, attention=4),
        training=TrainingConfig(epochs=12, batch=8, learning_rate=1e-2),
        router=RouterConfig(epochs=3, batch=8, learning_rate=3e-3, top_k=2),
    )


@pytest.fixture(scope="session")
def published(study: StudyConfig) -> StudyConfig:
    quick = {"epochs": 3, "learning_rate": 3e-3, "batch": 8}
    return replace(
        PUBLISHED,
        folds=3,
        shape=study.shape,
        training=replace(PUBLISHED.training, **quick),
        router=replace(PUBLISHED.router, top_k=2, **quick),
    )


@pytest.fixture(scope="session")
def sources(shape: ExpertShape, make_cohort, study) -> Abmil:
    """Return one expert that learnt the same from other patients between two untrained ones."""
    module = Abmil(shape, models=3)
    initialise(module, torch.Generator().manual_seed(5))
    elsewhere = make_cohort(patients=60, seed=11, effect=2.0)
    knows = train_experts(
        elsewhere,
        Plan(np.zeros(60, dtype=np.int64), ((),)),
        initial=Abmil.initial(shape, seed=1, hazard=0.06),
        config=study.training,
        seed=0,
    )
    rows = flatten(module)
    rows[1] = flatten(knows)[0]
    return Abmil.from_flat(shape, rows).requires_grad_(False)


@pytest.fixture(scope="session")
def make_scene(make_cohort, sources) -> Callable[..., Scene]:
    def make(study: StudyConfig, cohort: Cohort | None = None) -> Scene:
        cohort, plan = cohort or make_cohort(effect=2.0), Plan.cross_fitted(FOLDS)
        initial = Abmil.initial(
            study.shape, seed=1, hazard=study.initial_hazard, models=len(plan.excluded)
        )
        own = train_experts(cohort, plan, initial=initial, config=study.training, seed=0)
        target = Target.of(cohort, plan, standardise_for(own, cohort, plan, study.training))
        return Scene(study, target, sources, target.consult(sources, study))

    return make


@pytest.fixture(scope="session")
def scene(make_scene, study) -> Scene:
    return make_scene(study)
