"""An update in parts is the update."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cropkt.config import ExpertShape, TrainingConfig
from cropkt.experts import abmil, measured, parts, pooling
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.checkpoint import Checkpoint
from cropkt.experts.parts import cut, together_pays
from cropkt.experts.training import Epoch, Plan, train_experts

CPU = torch.device("cpu")
FOLDS = np.arange(36) % 3
QUICK = TrainingConfig(epochs=2, batch=8, learning_rate=3e-3)
GIB = 1 << 30


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    models=st.integers(1, 7),
    masks=st.integers(0, 3),
    fits=st.integers(1, 3000),
    together=st.booleans(),
)
def test_every_model_meets_every_bag_once(lengths, models, masks, fits, together) -> None:
    each = 5
    found = cut(lengths, models=models, each=each, masks=masks, fits=fits, together=together)
    met = np.zeros((models, len(lengths)), dtype=int)
    for some, runs in found:
        for run in runs:
            met[some, run] += 1
            count, held = len(range(models)[some]), sum(lengths[run])
            assert count * held * each <= fits or (count == 1 and run.stop - run.start == 1)
            assert together or run.stop - run.start == 1
    assert (met == 1).all()
    whole = together and models * sum(lengths) * each <= fits
    assert (found[0][0] == pooling.ALL) == whole


def trained(cohort, shape, config, **outcomes) -> torch.Tensor:
    plan = Plan.cross_fitted(FOLDS)
    initial = Abmil.initial(shape, seed=7, hazard=0.06, models=len(plan.excluded))
    return flatten(train_experts(cohort, plan, initial=initial, config=config, seed=0, **outcomes))


def same(one: torch.Tensor, two: torch.Tensor, shape: ExpertShape) -> bool:
    """Return whether experts are equal, but for a weight that cancels in the softmax."""
    alike = []
    for rows in (one, two):
        module = Abmil.from_flat(shape, rows)
        module.score_bias.data.zero_()
        alike.append(flatten(module))
    return torch.allclose(*alike, atol=1e-5)


@pytest.mark.parametrize("fits", [1, 2_000, 20_000])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("together", [True, False])
def test_training_in_parts_gives_the_same_experts(
    make_cohort, shape, monkeypatch, fits, dropout, together
) -> None:
    cohort, config = make_cohort(), replace(QUICK, dropout=dropout)
    whole = trained(cohort, shape, config)
    for module in (parts, abmil):  # with little room a bag alone goes by blocks
        monkeypatch.setattr(module, "room", lambda _: fits)
    monkeypatch.setattr(pooling, "BLOCK", 50)
    monkeypatch.setattr(parts, "together_pays", lambda *_, **__: together)
    monkeypatch.setattr("cropkt.experts.training.together_pays", lambda *_, **__: together)
    again = trained(cohort, shape, config)
    assert same(whole, again, shape)
    assert not torch.allclose(whole[0], whole[1], atol=1e-4)


def test_outcomes_of_each_model_s_own_go_with_the_parts(make_cohort, shape, monkeypatch) -> None:
    cohort = make_cohort()
    dealt = np.stack([np.random.default_rng(f).permutation(36) for f in range(7)])
    own = {"outcomes": (cohort.time_bins[dealt], cohort.event[dealt])}
    whole = trained(cohort, shape, QUICK, **own)
    monkeypatch.setattr(parts, "room", lambda _: 2_000)
    assert same(whole, trained(cohort, shape, QUICK, **own), shape)


def test_small_updates_never_ask_the_clock(monkeypatch) -> None:
    def never(*_: object, **__: object) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(parts, "faster", never)
    monkeypatch.setattr(measured, "faster", never)
    assert together_pays(ExpertShape(), models=1, bags=16, patches=4, device=CPU)
    assert measured.compute_type(CPU, 64, 64) is torch.float32


@pytest.mark.parametrize(("gain", "together"), [(0.7, True), (1.05, True), (1.5, False)])
def test_the_faster_cut_is_measured_once_and_logged(monkeypatch, caplog, gain, together) -> None:
    asked = []

    def clock(one, other, device, *, repeats) -> float:
        one()
        other()
        asked.append(device)
        return gain

    monkeypatch.setattr(parts, "faster", clock)
    parts._measured.cache_clear()
    shape = ExpertShape(dim=8, embed=256, attention=4, bins=4)
    with caplog.at_level(logging.INFO):
        for patches in (600, 700, 1000):  # of about one size
            found = together_pays(shape, models=9, bags=16, patches=patches, device=CPU)
            assert found is together
    assert asked == [CPU]
    assert f"{gain:.2f} times as fast" in caplog.text
    parts._measured.cache_clear()


def test_a_resumed_training_goes_on_as_it_was_cut(
    tmp_path, make_cohort, shape, monkeypatch
) -> None:
    monkeypatch.setattr("cropkt.experts.checkpoint.PAUSE", 0.0)
    monkeypatch.setattr("cropkt.experts.training.together_pays", lambda *_, **__: False)
    cohort, plan = make_cohort(), Plan(FOLDS, ((), (0,)))

    def train(**kwargs) -> torch.Tensor:
        initial = Abmil.initial(shape, seed=7, models=2)
        return flatten(train_experts(cohort, plan, initial=initial, config=QUICK, seed=0, **kwargs))

    def stop(epoch: Epoch) -> None:
        raise KeyboardInterrupt

    def checkpoint() -> Checkpoint:
        return Checkpoint(tmp_path / "training.npz", key="k")

    never_stopped = train()
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=checkpoint(), on_epoch=stop)
    monkeypatch.setattr("cropkt.experts.training.together_pays", lambda *_, **__: True)
    assert torch.equal(train(checkpoint=checkpoint()), never_stopped)


@pytest.mark.parametrize(("gain", "kind"), [(0.2, torch.float32), (3.0, torch.bfloat16)])
def test_bfloat16_only_where_it_is_much_faster(monkeypatch, gain, kind) -> None:
    monkeypatch.setattr(measured, "faster", lambda *_, **__: gain)
    measured._faster_type.cache_clear()
    assert measured.compute_type(CPU, 1536, 512) is kind
    measured._faster_type.cache_clear()


def test_bfloat16_says_nearly_the_same(make_cohort, shape) -> None:
    cohort = make_cohort()
    experts = Abmil.initial(shape, seed=3, models=2).requires_grad_(False)
    exact = experts.outputs(cohort.pack(range(36))).features
    experts.compute = torch.bfloat16
    rough = experts.outputs(cohort.pack(range(36))).features
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert (exact - rough).norm() < 0.02 * exact.norm()


TRAINING = """
import numpy as np
from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort
from cropkt.config import ExpertShape, TrainingConfig
from cropkt.experts.abmil import Abmil
from cropkt.experts.training import Plan, train_experts

class Slides:  # one bag of 10,000 patches: a part holds no more
    def shape(self, slide_id):
        return 10_000 if slide_id == "3" else 500, 1536
    def features(self, slide_id):
        return torch.ones(self.shape(slide_id), dtype=torch.half)

n = 5
cohort = Cohort(
    cancer=Cancer.UVM, endpoint="DSS", dim=1536, patient_ids=tuple(map(str, range(n))),
    days=np.arange(n) * 300.0 + 1, event=np.arange(n) % 2 == 0, hospital=("",) * n,
    slides=tuple((str(i),) for i in range(n)), source=Slides(),
)
# As many numbers a patch as the published expert holds, for a thirtieth of its arithmetic.
shape = ExpertShape(embed=16, attention=576, bins=8)
plan = Plan.{plan}(np.arange(n) % 5)
start()
experts = Abmil.initial(shape, seed=0, hazard=.06, models=len(plan.excluded))
train_experts(cohort, plan, initial=experts, config=TrainingConfig(epochs=1, batch=n), seed=0)
stop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["cross_fitted", "one_a_fold"])
def test_training_on_large_bags_stays_small(peak_of, plan) -> None:
    assert pooling.values_of_patch(16, 576, 16) > pooling.values_of_patch(512, 384, 16)
    weights = 16 * 4 * 1_200_000 * 5  # 16 published models: weights, gradients, AdamW, slack
    more_bags = 2 * 15 * 10_000 * 1536 * 2  # 16 bags an update, one update read ahead
    drawing = 4 * 16 * 10_000 * 384  # of one model's dropout
    assert peak_of(TRAINING.format(plan=plan)) + weights + more_bags + drawing < 4 * GIB
