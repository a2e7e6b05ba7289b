from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cropkt.experts.abmil import Abmil, flatten
from cropkt.transfer.merging import MergedExperts, merged


def vectors(scene):
    study = scene.study
    initial = flatten(Abmil.initial(study.shape, seed=study.seed, hazard=study.initial_hazard))[0]
    return flatten(scene.sources), initial


def test_at_first_the_merged_models_are_the_own_experts(scene) -> None:
    sources, initial = vectors(scene)
    target = scene.target
    module = MergedExperts(target.own, sources, initial)
    bags = target.cohort.pack(np.arange(10))
    with torch.no_grad():
        assert torch.allclose(module.logits(bags), target.own.outputs(bags).logits, atol=1e-5)


def test_weights_make_the_sum_of_task_vectors(scene) -> None:
    sources, initial = vectors(scene)
    target = scene.target
    module = MergedExperts(target.own, sources, initial)
    with torch.no_grad():
        module.moved[:, 0], module.moved[:, 1] = -0.05, 0.05  # STEP: half own, half of source 0
    assert module.weights()[0].tolist() == pytest.approx([0.5, 0.5, 0, 0])
    own = flatten(target.own)
    expected = Abmil.from_flat(
        scene.study.shape, initial + 0.5 * (own - initial) + 0.5 * (sources[0] - initial)
    )
    bags = target.cohort.pack(np.arange(10))
    with torch.no_grad():
        features, _ = expected(bags)
        logits = features @ target.own.head.transpose(1, 2) + target.own.head_bias[:, None]
        assert torch.allclose(module.logits(bags), logits, atol=1e-5)


@pytest.mark.parametrize("alone", [True, False])
def test_the_fold_that_judges_takes_no_part(scene, alone: bool) -> None:
    """Other outcomes of fold 0 change nothing that its patients are told."""
    study, target = scene.study, scene.target
    sources = flatten(scene.sources).numpy()[: 0 if alone else 3]
    before = merged(target, sources, study)
    cohort, held = target.cohort, target.folds == 0
    event = np.where(held, ~cohort.event, cohort.event)
    other = replace(target, cohort=replace(cohort, event=event))
    after = merged(other, sources, study)
    assert after.risk[held] == pytest.approx(before.risk[held], abs=1e-6)
    assert not np.allclose(after.risk[~held], before.risk[~held])
    assert before.weights.shape == (3, 1 + len(sources))


def test_a_heavy_penalty_keeps_the_sources_out(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = flatten(scene.sources).numpy()

    def outside(penalty: float) -> float:
        monkeypatch.setattr("cropkt.transfer.merging.PENALTIES", (penalty,))
        return float(np.abs(merged(scene.target, sources, scene.study).weights[:, 1:]).sum())

    assert outside(1e4) < 0.2 * outside(1e-4)
