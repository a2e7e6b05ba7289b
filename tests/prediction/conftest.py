"""A target with everything that a study gives it, and the model that is released from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort
from cropkt.cohort.facts import SlideFacts
from cropkt.cohort.splits import stratified_folds
from cropkt.config import PUBLISHED, ExpertShape, RouterConfig, StudyConfig, TrainingConfig
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.training import Plan, standardise_for, train_experts
from cropkt.prediction.kept import Source
from cropkt.prediction.making import release
from cropkt.prediction.model import ReleasedModel
from cropkt.survival.metrics import out_of_fold
from cropkt.transfer.arms import Job, predictions
from cropkt.transfer.router_training import RouterStack
from cropkt.transfer.target import Target

SOURCES = (Cancer.SKCM, Cancer.KIPAN, Cancer.LUNG)


@dataclass(frozen=True)
class Case:
    """A finished study at one target."""

    job: Job
    path: Path

    @property
    def cohort(self) -> Cohort:
        return self.job.target.cohort

    def model(self) -> ReleasedModel:
        return ReleasedModel.load(self.path)


def study_of(variant: str) -> StudyConfig:
    study = StudyConfig(
        folds=3,
        shape=ExpertShape(dim=6, embed=8, attention=4),
        training=TrainingConfig(epochs=4, minimum_updates=60, learning_rate=1e-2),
        router=RouterConfig(epochs=2, learning_rate=1e-2, top_k=2),
    )
    if variant == "standardised":
        return replace(study, training=replace(study.training, standardise="site"))
    if variant == "published":
        return replace(study, router=replace(PUBLISHED.router, epochs=2, top_k=2))
    return study


def _experts(cohort: Cohort, plan: Plan, study: StudyConfig) -> Abmil:
    m0 = Abmil.initial(study.shape, seed=0, hazard=0.06, models=len(plan.excluded))
    return train_experts(cohort, plan, initial=m0, config=study.training, seed=0)


@pytest.fixture(scope="session")
def make_case(
    make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    """Return a maker of cases: plain, standardised, or with the published router."""
    made: dict[str, Case] = {}

    def make(variant: str = "plain") -> Case:
        if variant in made:
            return made[variant]
        study, cohort = study_of(variant), make_cohort(patients=60)
        folds = stratified_folds(cohort.event, cohort.time_bins, folds=3, seed=0)
        plan = Plan.cross_fitted(folds)
        own = standardise_for(_experts(cohort, plan, study), cohort, plan, study.training)
        target = Target.of(cohort, plan, own)
        rows = []
        for seed in range(len(SOURCES)):
            other = make_cohort(patients=80, seed=10 + seed)
            rows.append(flatten(_experts(other, Plan(np.zeros(80, dtype=np.int64), ((),)), study)))
        sources = Abmil.from_flat(study.shape, torch.cat(rows)).requires_grad_(False)
        opinions = target.consult(sources, study)
        stack = RouterStack(target, sources, opinions, study)
        stack.train()
        job = Job(target=target, study=study, sources=sources, opinions=opinions, router=stack)
        said = predictions(job, ["local", "auto"])
        risks = {arm: one.risk for arm, (one, _) in said.items()}
        scores = out_of_fold(cohort.days, cohort.event, folds, risks, seed=0)
        path = tmp_path_factory.mktemp(variant) / "released.safetensors"
        release(
            path,
            job,
            site="leiden",
            sources=[Source(cancer=name, card="{}", signature="00") for name in SOURCES],
            scores=scores,
            facts=SlideFacts(encoder="UNI2-h", magnification=20),
        )
        made[variant] = Case(job=job, path=path)
        return made[variant]

    return make
