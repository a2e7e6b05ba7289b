"""DP-SGD over patients: what one patient can change, and that no attack sees more than claimed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from cropkt.cohort.bags import Cohort
from cropkt.config import ExpertShape, TrainingConfig
from cropkt.errors import ConfigError
from cropkt.experts import checkpoint as checkpoints
from cropkt.experts import private
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.accountant import Mechanism, epsilon_of
from cropkt.experts.bank import consult
from cropkt.experts.checkpoint import Checkpoint
from cropkt.experts.private import NoisySum, PatientLoss, SecretStream, schedule, train_private
from cropkt.survival.likelihood import discrete_nll
from cropkt.survival.metrics import concordance

MakeCohort = Callable[..., Cohort]
KEY = bytes(range(32))
CLIP = 0.3
CONFIG = TrainingConfig(learning_rate=1e-3)
SMALL = Mechanism(noise_multiplier=1.0, sample_rate=0.5, steps=6)


def expert(shape: ExpertShape) -> Abmil:
    """Return an expert whose every weight has a gradient: M0's head would be zero."""
    return Abmil.initial(shape, seed=3).requires_grad_(True)


def noisy_sum(loss: PatientLoss, *, clip: float = CLIP, noise: float = 0.0) -> NoisySum:
    return NoisySum(
        torch.optim.SGD(loss.parameters(), lr=1.0),
        mechanism=Mechanism(noise_multiplier=noise, sample_rate=1.0, steps=1),
        clip=clip,
        lot=10.0,
        stream=SecretStream(KEY),
    )


def sum_of(cohort: Cohort, shape: ExpertShape, *, clip: float = CLIP) -> Tensor:
    """Return the sum of all patients' clipped gradients, before noise."""
    loss = PatientLoss(expert(shape), alpha=0.5)
    noisy = noisy_sum(loss, clip=clip)
    noisy.add(loss.gradients(cohort, np.arange(len(cohort))))
    return torch.cat([p.summed_grad.flatten() for p in noisy.params]).double()


def train(
    cohort: Cohort,
    shape: ExpertShape,
    mechanism: Mechanism = SMALL,
    *,
    initial: Abmil | None = None,
    stream: SecretStream | None = None,
    config: TrainingConfig = CONFIG,
    checkpoint: Checkpoint | None = None,
) -> Abmil:
    return train_private(
        cohort,
        initial=initial or Abmil.initial(shape, seed=7, hazard=0.06),
        config=config,
        mechanism=mechanism,
        clip=CLIP,
        lot=20.0,
        stream=stream,
        checkpoint=checkpoint,
    )


def test_gradients_are_those_of_each_patient_alone(
    make_cohort: MakeCohort, shape: ExpertShape
) -> None:
    cohort, module = make_cohort(patients=9), expert(shape)
    together = PatientLoss(module, alpha=0.5).gradients(cohort, np.arange(9))
    for i in range(9):
        bins = torch.from_numpy(cohort.time_bins[[i]])
        logits = module.outputs(cohort.pack([i])).logits
        nll = discrete_nll(logits, bins, torch.from_numpy(cohort.event[[i]]), alpha=0.5).sum()
        alone = torch.autograd.grad(nll, list(module.parameters()))
        for one, many in zip(alone, together, strict=True):
            assert torch.allclose(one, many[i], atol=1e-6)


@pytest.mark.parametrize("value", [7.0, 1e4, 1e20, 3e38, float("inf"), float("nan")])
def test_one_patient_moves_the_sum_by_no_more_than_the_clip(
    make_cohort: MakeCohort, shape: ExpertShape, value: float
) -> None:
    cohort = make_cohort(patients=12)
    others = cohort.subset(np.arange(12) != 5)
    without, free = sum_of(others, shape), sum_of(others, shape, clip=1e9)
    assert 0 < (sum_of(cohort, shape) - without).norm() <= CLIP * 1.0001
    for slide in cohort.slides[5]:
        cohort.source.features(slide)[:] = value
    moved = (sum_of(cohort, shape) - without).norm()
    assert moved <= CLIP * 1.0001
    if value == 7.0:  # the clip, and nothing else, is what bounds it
        assert (sum_of(cohort, shape, clip=1e9) - free).norm() > 2 * CLIP


def test_a_step_is_the_clipped_sum_and_noise_over_the_lot(
    make_cohort: MakeCohort, shape: ExpertShape
) -> None:
    cohort, loss = make_cohort(patients=12), PatientLoss(expert(shape), alpha=0.5)
    before, noisy = flatten(loss.expert)[0].double(), noisy_sum(loss, noise=2.0)
    for some in (np.arange(5), np.arange(5, 12)):  # in groups or at once
        noisy.add(loss.gradients(cohort, some))
    noisy.finish()
    stream = SecretStream(KEY)
    noise = np.concatenate([stream.normal(p.numel()) for p in loss.parameters()])
    want = (sum_of(cohort, shape) + 2.0 * CLIP * torch.from_numpy(noise)) / 10
    assert torch.allclose(before - flatten(loss.expert)[0].double(), want, atol=1e-6)


def test_the_expert_is_a_function_of_noised_sums_alone(
    make_cohort: MakeCohort,
    rewritten: Callable[..., Cohort],
    shape: ExpertShape,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once the clipped sums are the same, nothing of other patients is left in the weights."""
    cohort = make_cohort(patients=40)
    other = rewritten(cohort, np.ones(40, dtype=bool), outcomes=True, patches=True)
    weights = [flatten(train(c, shape, stream=SecretStream(KEY))) for c in (cohort, other)]
    assert not torch.equal(*weights)

    def same_sums(self: NoisySum) -> None:
        for parameter in self.params:
            parameter.summed_grad = torch.ones_like(parameter)

    monkeypatch.setattr(NoisySum, "clip_and_accumulate", same_sums)
    weights = [flatten(train(c, shape, stream=SecretStream(KEY))) for c in (cohort, other)]
    assert torch.equal(*weights)


def test_steps_in_which_nobody_takes_part_are_noise(
    make_cohort: MakeCohort, shape: ExpertShape
) -> None:
    empty = replace(SMALL, sample_rate=1e-12)
    cohorts = make_cohort(patients=5), make_cohort(patients=5, seed=1)
    one, two = (flatten(train(c, shape, empty, stream=SecretStream(KEY))) for c in cohorts)
    assert torch.equal(one, two)
    assert not torch.equal(one, flatten(Abmil.initial(shape, seed=7, hazard=0.06)))


def test_no_two_private_trainings_are_equal(make_cohort: MakeCohort, shape: ExpertShape) -> None:
    """The study's seed must not give the noise away."""
    cohort = make_cohort(patients=8)
    assert not torch.equal(*(flatten(train(cohort, shape)) for _ in range(2)))


def test_groups_bound_the_memory_and_change_nothing(
    make_cohort: MakeCohort, shape: ExpertShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, sizes = make_cohort(patients=30), list[int]()
    real = PatientLoss.gradients

    def counting(self: PatientLoss, people: Cohort, some: NDArray[np.int64]) -> list[Tensor]:
        sizes.append(len(some))
        return real(self, people, some)

    monkeypatch.setattr(PatientLoss, "gradients", counting)
    at_once = flatten(train(cohort, shape, stream=SecretStream(KEY)))
    fewest = len(sizes)
    monkeypatch.setattr(private, "MAX_VALUES", 3000)
    sizes.clear()
    grouped = flatten(train(cohort, shape, stream=SecretStream(KEY)))
    assert torch.allclose(grouped, at_once, atol=1e-5)
    assert fewest <= SMALL.steps < 2 * SMALL.steps < len(sizes)
    assert max(sizes) < 10


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (replace(CONFIG, loss="clamped"), "clamped cannot be trained privately"),
        (replace(CONFIG, standardise="site"), "depend on all patients"),
    ],
)
def test_what_couples_patients_is_refused(
    make_cohort: MakeCohort, shape: ExpertShape, config: TrainingConfig, what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        train(make_cohort(), shape, config=config)


def test_schedule() -> None:
    assert schedule(640)[0] == pytest.approx(private.LOT / 640)
    assert schedule(10) == (1.0, private.STEPS)


def test_a_private_expert_learns(make_cohort: MakeCohort, shape: ExpertShape) -> None:
    cohort = make_cohort(patients=200, effect=2.0)
    mechanism = Mechanism(noise_multiplier=1.0, sample_rate=0.2, steps=40)
    trained = train(cohort.subset(np.arange(120)), shape, mechanism, stream=SecretStream(KEY))
    others = cohort.subset(np.arange(120, 200))
    found = concordance(others.days, others.event, consult(trained, others).risk[0])
    assert (found.c_index or 0) > 0.75


class KilledError(RuntimeError):
    """Stands for the end of a process."""


class Mortal(SecretStream):
    """A stream that ends its training in the middle of a step."""

    def __init__(self, draws: int) -> None:
        super().__init__()
        self.draws = draws

    def normal(self, size: int) -> NDArray[np.float64]:
        self.draws -= 1
        if self.draws < 0:
            raise KilledError
        return super().normal(size)


def test_a_killed_training_goes_on_with_other_noise(
    make_cohort: MakeCohort,
    shape: ExpertShape,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "PAUSE", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", 1.0)
    path, cohort = tmp_path / "private.npz", make_cohort(patients=8)
    tensors = len(list(expert(shape).parameters()))
    with pytest.raises(KilledError):
        train(cohort, shape, stream=Mortal(3 * tensors + 2), checkpoint=Checkpoint(path, key="k"))
    with np.load(path, allow_pickle=False) as stored:
        about = json.loads(str(stored["about"]))
        kept = {name for name in stored.files if name != "about"}
    assert about == {"key": "k", "epoch": 3, "rng": None}
    assert all(name.startswith(("module/", "optimizer/")) for name in kept)
    stopped, ends = path.read_bytes(), list[Tensor]()
    for _ in range(2):
        path.write_bytes(stopped)
        stream = Mortal((SMALL.steps - 3) * tensors)  # enough for the steps left, and no more
        kept_here = Checkpoint(path, key="k")
        ends.append(flatten(train(cohort, shape, stream=stream, checkpoint=kept_here)))
        assert stream.draws == 0
    assert not torch.equal(*ends)


def test_the_secret_stream_is_random_and_its_key_is_all_of_it() -> None:
    one, two = SecretStream(KEY), SecretStream(KEY)
    assert np.array_equal(one.normal(5), two.normal(5))
    assert np.array_equal(one.uniform(3), two.uniform(3))
    assert not np.array_equal(SecretStream().uniform(3), SecretStream().uniform(3))
    normal, uniform = SecretStream(KEY).normal(200_001), SecretStream(KEY[::-1]).uniform(200_000)
    assert normal.shape == (200_001,)
    assert stats.kstest(normal, "norm").pvalue > 0.01
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(normal[:100_000], normal[100_001:])[0, 1]) < 0.01


# An attack by one who knows M0 and all other patients: a canary alone has one of the features, so
# nobody else's gradient, and without noise no other weight, moves where it does.


def canary_scores(
    cohort: Cohort, shape: ExpertShape, mechanism: Mechanism, *, runs: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how far training moved along the canary's gradient, (runs,) without and with it."""
    for i, slides in enumerate(cohort.slides):
        for slide in slides:
            cohort.source.features(slide)[:, -1] = 0.0 if i else 50.0
    start = Abmil.initial(shape, seed=7).requires_grad_(True)
    gradient = PatientLoss(start, alpha=0.5).gradients(cohort, np.arange(1))
    direction = gradient[0][0, 0, :, -1].double()  # of the projection's weights of that feature
    scores = np.empty((2, runs))
    for member, people in enumerate((cohort.subset(np.arange(1, len(cohort))), cohort)):
        for run in range(runs):
            trained = train(
                people,
                shape,
                mechanism,
                initial=Abmil.initial(shape, seed=7),
                stream=SecretStream((member + 2 * run).to_bytes(32, "big")),
            )
            moved = (start.project - trained.project).detach()[0, :, -1].double()
            scores[member, run] = float(moved @ direction)
    return scores[0], scores[1]


def epsilon_seen(
    without: NDArray[np.float64], with_: NDArray[np.float64], *, delta: float
) -> float:
    """Return a lower bound of epsilon at 95 % confidence, from Clopper and Pearson.

    The threshold is chosen on one half of the runs and judged on the other.
    """

    def bound(out: NDArray[np.float64], in_: NDArray[np.float64], threshold: float) -> float:
        false, true = int((out >= threshold).sum()), int((in_ >= threshold).sum())
        at_most = stats.beta.ppf(0.975, false + 1, max(len(out) - false, 1e-9))
        at_least = stats.beta.ppf(0.025, true, len(in_) - true + 1) if true else 0.0
        return log(max(at_least - delta, 1e-9) / at_most)

    half = len(without) // 2
    best = max(
        np.concatenate([without[:half], with_[:half]]),
        key=lambda threshold: bound(without[:half], with_[:half], threshold),
    )
    return bound(without[half:], with_[half:], best)


def test_canaries_show_no_more_than_the_claimed_epsilon(
    make_cohort: MakeCohort, shape: ExpertShape
) -> None:
    mechanism = Mechanism(noise_multiplier=6.0, sample_rate=0.8, steps=2)
    claimed, cohort = epsilon_of([mechanism], delta=1e-5), make_cohort(patients=6)
    assert epsilon_seen(*canary_scores(cohort, shape, mechanism, runs=50), delta=1e-5) <= claimed
    bare = replace(mechanism, noise_multiplier=0.0)
    assert epsilon_seen(*canary_scores(cohort, shape, bare, runs=50), delta=1e-5) > claimed


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1.0, 0.5])
def test_many_canaries_show_something_but_not_more(
    make_cohort: MakeCohort, shape: ExpertShape, noise: float
) -> None:
    mechanism = Mechanism(noise_multiplier=noise, sample_rate=0.8, steps=2)
    claimed = epsilon_of([mechanism], delta=1e-5)
    scores = canary_scores(make_cohort(patients=6), shape, mechanism, runs=400)
    assert 0 < epsilon_seen(*scores, delta=1e-5) <= claimed


def crowd_scores(
    cohort: Cohort, mechanism: Mechanism, *, canaries: int, runs: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the scores of many canaries at once, of those that did not take part and that did.

    Each has a feature of its own, and a coin decides in every run whether it takes part. Of one
    step, what is seen of one canary does not depend on the others.
    """
    for i, slides in enumerate(cohort.slides):
        for slide in slides:
            cohort.source.features(slide)[:, -canaries:] = 0.0
            if i < canaries:
                cohort.source.features(slide)[:, -1 - i] = 50.0
    shape = ExpertShape(dim=cohort.dim, embed=64, attention=4)
    start = Abmil.initial(shape, seed=7).requires_grad_(True)
    gradient = PatientLoss(start, alpha=0.5).gradients(cohort, np.arange(canaries))[0]
    own = np.arange(canaries)
    directions = gradient[own, 0, :, -1 - own].double()  # (canaries, embed)
    directions /= directions.norm(dim=1, keepdim=True)
    rng, scores = np.random.default_rng(0), list[NDArray[np.float64]]()
    members = rng.random((runs, canaries)) < 0.5
    for run, some in enumerate(members):
        who = np.concatenate([some, np.ones(len(cohort) - canaries, dtype=bool)])
        trained = train(
            cohort.subset(who),
            shape,
            mechanism,
            initial=Abmil.initial(shape, seed=7),
            stream=SecretStream(run.to_bytes(32, "big")),
            config=replace(CONFIG, weight_decay=0.0),
        )
        moved = (start.project - trained.project).detach()[0, :, -1 - own].double().T
        scores.append((moved * directions).sum(1).numpy())
    found = np.stack(scores)  # (runs, canaries)
    return found[~members], found[members]


@pytest.mark.slow
def test_a_crowd_of_canaries_shows_no_more_than_claimed_and_much_more_without_noise(
    make_cohort: MakeCohort,
) -> None:
    """The bound of Jagielski et al., arXiv 2006.07709, from some two thousand trials of a kind."""
    mechanism = Mechanism(noise_multiplier=1.5, sample_rate=0.8, steps=1)
    claimed, cohort = epsilon_of([mechanism], delta=1e-5), make_cohort(patients=36, dim=34)

    def seen(noise: float) -> float:
        trained = replace(mechanism, noise_multiplier=noise)
        scores = crowd_scores(cohort, trained, canaries=32, runs=128)
        size = min(map(len, scores))
        return epsilon_seen(*(side[:size] for side in scores), delta=1e-5)

    assert 0 < seen(1.5) <= claimed
    # The same attack, where there is something to find:
    assert seen(0.0) > claimed
    assert seen(1.5 / 8) > claimed
