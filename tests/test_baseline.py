"""What cropkt is measured against comes to the same numbers, and to the published ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from cropkt.config import ExpertShape, RouterConfig, StudyConfig, TrainingConfig
from cropkt.experts.abmil import Abmil, initialise
from cropkt.experts.bank import consult
from cropkt.experts.private import PatientLoss
from cropkt.experts.training import Plan, hash_seed, train_experts
from cropkt.published import load_expert
from cropkt.survival.likelihood import discrete_nll
from cropkt.transfer.router_training import RouterStack
from cropkt.transfer.target import Target

FOLDS = np.arange(36) % 3


@pytest.fixture(scope="module")
def baseline() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "baseline.py"
    spec = importlib.util.spec_from_file_location("baseline", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(shape: ExpertShape, models: int) -> Abmil:
    module = Abmil(shape, models=models)
    initialise(module, torch.Generator().manual_seed(0))
    return module.requires_grad_(False)


def test_it_says_the_published_numbers(golden, baseline) -> None:
    expert = baseline.Expert.of(load_expert(golden.folder / "abmil.pth").abmil)
    said = []
    for i, bag in enumerate(golden.bags):
        feature, attention = expert.slide_feature(bag)
        assert torch.allclose(feature, golden.tensor("abmil_slide_features")[i], atol=1e-5)
        assert torch.allclose(attention, golden.tensor(f"abmil_attention_{i}"), atol=1e-5)
        said.append(expert(bag))
    logits = torch.stack(said)
    assert torch.allclose(logits, golden.tensor("abmil_logits"), atol=1e-5)
    time, event = golden.tensor("time_bin"), golden.tensor("event").bool()
    discrete_nll(logits, time, event, alpha=0.5).mean().backward()
    gradient = golden.tensor("grad/feat_proj.0.weight")
    assert torch.allclose(expert.project.weight.grad, gradient, atol=1e-5, rtol=1e-3)


def test_it_trains_the_experts_that_cropkt_trains(make_cohort, shape, baseline) -> None:
    cohort, plan = make_cohort(), Plan(FOLDS, ((), (0,), (2,)))
    config = TrainingConfig(epochs=3, batch=8, learning_rate=3e-3, dropout=0.0)
    initial = Abmil.initial(shape, seed=7, hazard=0.06, models=3)
    alone = [
        baseline.train_expert(cohort, learns, baseline.Expert.of(initial), config, seed=0)
        for learns in plan.learns()
    ]
    together = train_experts(cohort, plan, initial=initial, config=config, seed=0)
    for f, expert in enumerate(alone):
        ours = baseline.Expert.of(together, f)
        for (name, mine), theirs in zip(ours.named_parameters(), expert.parameters(), strict=True):
            if name != "score.bias":  # it cancels in the softmax
                assert torch.allclose(mine, theirs, atol=1e-5), name


def test_it_asks_the_bank_what_cropkt_asks(make_cohort, shape, baseline) -> None:
    cohort, experts = make_cohort(), draw(shape, 5)
    risk, features = baseline.zero_shot([baseline.Expert.of(experts, s) for s in range(5)], cohort)
    ours = consult(experts, cohort)
    assert ours.risk == pytest.approx(risk, rel=1e-5)
    assert np.allclose(ours.features.numpy(), features, rtol=1e-5, atol=1e-6)


def test_it_trains_the_router_that_cropkt_trains(make_cohort, shape, baseline) -> None:
    study = StudyConfig(
        folds=3,
        shape=shape,
        training=TrainingConfig(dropout=0.0),
        router=RouterConfig(epochs=2, batch=8, learning_rate=3e-3, top_k=2),
    )
    cohort, plan = make_cohort(), Plan.cross_fitted(FOLDS)
    target = Target.of(cohort, plan, draw(shape, len(plan.excluded)))
    sources = draw(shape, 3)
    stack = RouterStack(target, sources, target.consult(sources, study), study)
    before = [baseline.Router(stack.module, view) for view in range(4)]
    features = stack.features.clone()
    stack.train()
    view = 2
    learns = view - 1 != FOLDS
    theirs = baseline.train_router(
        cohort, learns, before[view], features[view], study, seed=hash_seed(study.seed, 3)
    )
    ours = baseline.Router(stack.module, view)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name != "expert.score.bias":
            assert torch.allclose(mine, other, atol=2e-5), name
    start = baseline.Router(
        RouterStack(target, sources, target.consult(sources, study), study).module, view
    )
    assert not torch.allclose(start.gate, ours.gate, atol=1e-4)


def test_it_clips_as_private_training_clips(make_cohort, shape, baseline) -> None:
    cohort, expert = make_cohort(), draw(shape, 1).requires_grad_(True)
    rows = PatientLoss(expert, alpha=0.5).gradients(cohort, np.arange(9))
    length = torch.stack([g.flatten(1).square().sum(1) for g in rows]).sum(0).sqrt()
    factor = (0.3 / (length + 1e-6)).clamp(max=1)
    theirs = baseline.clipped_sum(
        cohort, list(range(9)), baseline.Expert.of(expert), alpha=0.5, clip=0.3
    )
    sums = dict(zip((n for n, _ in expert.named_parameters()), rows, strict=True))
    mine = (sums["project"] * factor[:, None, None, None]).sum(0)[0]
    assert torch.allclose(mine, theirs[0], atol=1e-5)
