"""Arms: the ways to predict at a target, and the controls that show what transfer is worth.

Every arm is judged out of fold: for fold f all that it learns or chooses comes from the other
folds. `ARMS` says of each what it needs, what it trains at the target and what leaves the site.
A gain counts as transfer only over the controls: `self_only`, the target's own vector rescaled
with no source at all, and `random_init`, the guard over untrained experts.

Shapes: n patients, K folds, S sources, T bins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cropkt.cohort.bags import Cohort, mean_pooled
from cropkt.config import Arm, RouterConfig, StudyConfig, published_router
from cropkt.experts.abmil import Abmil, flatten, parameter_count
from cropkt.experts.bank import Opinions, consult
from cropkt.experts.cost import BACKWARD, Memory, attention_flop, expert_flop
from cropkt.experts.device import device_of
from cropkt.experts.training import Plan, epochs, hash_seed, standardise_for, train_experts
from cropkt.survival.calibration import calibrated
from cropkt.survival.likelihood import log_survival
from cropkt.transfer.guard import Guarded, guarded
from cropkt.transfer.merging import PENALTIES, merged
from cropkt.transfer.router_training import RouterStack
from cropkt.transfer.scores import ZeroShot, equal_vote, held_out, zero_shot
from cropkt.transfer.target import Target

CONTROLS: tuple[Arm, ...] = ("self_only", "random_init")
"""What a gain has to be over to count as transfer."""
PERMUTED = 5  # experts trained on shuffled outcomes: each costs a training

Needs = Literal["nothing", "own expert", "M0", "experts", "model of all cancers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What one arm says of every patient, out of fold."""

    risk: NDArray[np.float64]  # (n,) higher dies earlier; two folds share no scale
    survival: NDArray[np.float64]  # (n, T) at the end of each yearly bin


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What an arm cost its target."""

    seconds: float  # beyond asking the experts once, which arms share
    megabytes: float | None  # peak memory above what was held before
    gflop: float
    received: float  # megabytes of weights that came to the site for it
    sent: float  # megabytes of weights that leave the site for it


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A target with all that its arms may use."""

    target: Target
    study: StudyConfig
    sources: Abmil  # S experts of other cancers
    opinions: Sequence[Opinions]  # of the sources, per view
    router: RouterStack  # the study's own, trained
    everyone: NDArray[np.float32] | None = None  # (1 + K, parameters) of the model of all cancers
    before: Mapping[Arm, float] = field(default_factory=dict)  # seconds spent on an arm earlier
    shared: bool = False  # other sites hold this cancer too, and average the routers

    @property
    def risks(self) -> list[NDArray[np.float64]]:
        """Return the sources' risk (S, n) per fold, in units learnt without it."""
        return [opinion.risk for opinion in self.opinions[1:]]

    @cached_property
    def guarded(self) -> Guarded:
        """The guard's answer over the sources."""
        return guard(self.target, self.opinions)

    @cached_property
    def zero_shot(self) -> ZeroShot:
        """The best source, or the vote, of each fold."""
        return zero_shot(self.target.pairs, self.target.folds, self.risks)

    @cached_property
    def routed(self) -> tuple[Prediction, NDArray[np.float64]]:
        """What the study's router says, and the weight of each expert for each patient."""
        return _routed(self.router)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One arm: what it is for, what it takes, and how it predicts."""

    needs: Needs
    trains: str  # at the target, in words
    sends: Literal["nothing", "own expert", "shared routers", "model of all cancers"]
    predict: Callable[[Job], Prediction]
    gflop: Callable[[Job], float]


def router_arm(config: RouterConfig) -> Arm:
    """Return as which arm the study's own router counts."""
    return "roupkt" if config == published_router(config) else "roupkt+"


def arms_of(study: StudyConfig) -> tuple[Arm, ...]:
    """Return the arms that a study compares, in the order of `ARMS`, `local` first."""
    router = router_arm(study.router)
    wanted = {"local", router, *study.arms} - ({"roupkt+"} if router == "roupkt" else set())
    return tuple(arm for arm in ARMS if arm in wanted)


def guard(
    target: Target,
    opinions: Sequence[Opinions],
    *,
    kept: NDArray[np.bool_] | None = None,
) -> Guarded:
    """Return the guard's answer for a target over sources with these opinions, per view."""
    cohort = target.cohort
    return guarded(
        target.pairs,
        cohort.days,
        cohort.event,
        target.folds,
        [target.local_risk(view) for view in range(target.views)],
        [opinion.risk for opinion in opinions],
        kept=kept,
    )


def predictions(job: Job, arms: Iterable[Arm]) -> dict[Arm, tuple[Prediction, Spent]]:
    """Return what each arm says, and what it cost.

    An arm that needs the model of all cancers is left out where there is none.
    """
    found: dict[Arm, tuple[Prediction, Spent]] = {}
    for arm in arms:
        kind = ARMS[arm]
        if kind.needs == "model of all cancers" and job.everyone is None:
            continue
        memory, started = Memory(device_of(job.sources)), time.monotonic()
        prediction = kind.predict(job)
        seconds = time.monotonic() - started + job.before.get(arm, 0.0)
        found[arm] = (
            prediction,
            Spent(
                seconds=seconds,
                megabytes=memory.peak_megabytes(),
                gflop=kind.gflop(job) / 1e9,
                received=_received(kind, job),
                sent=_sent(kind, job),
            ),
        )
    return found


def _local(job: Job) -> Prediction:
    target = job.target
    logits = target.own.predict(target.opinions.features.to(device_of(target.own)))
    return _of_models(target, logits.cpu(), target.own_model(0))


def _finetune(job: Job) -> Prediction:
    """Train on from the source that is best on the training patients of each fold."""
    target, flat = job.target, flatten(job.sources)
    scores = target.source_scores(list(job.opinions))[1:]
    best = [int(np.argmax([_or_half(score.c_index) for score in row])) for row in scores]
    return _trained_on(job, target.cohort, flat[best])


def _mean_pool(job: Job) -> Prediction:
    """Train an expert without attention: each bag is the mean of its patches."""
    shape, study = job.study.shape, job.study
    m0 = Abmil.initial(shape, seed=study.seed, hazard=study.initial_hazard)
    rows = flatten(m0).expand(job.target.views - 1, -1)
    return _trained_on(job, mean_pooled(job.target.cohort), rows)


def _fedavg(job: Job) -> Prediction:
    """Judge each fold by the model of all cancers that saw no patient of it."""
    assert job.everyone is not None
    target = job.target
    plan = Plan.one_a_fold(target.folds)
    models = Abmil.from_flat(job.study.shape, torch.tensor(job.everyone[1:]))
    models = models.to(device_of(job.sources)).requires_grad_(False)
    return _judged(target, standardise_for(models, target.cohort, plan, job.study.training))


def _fedavg_tuned(job: Job) -> Prediction:
    assert job.everyone is not None
    return _trained_on(job, job.target.cohort, torch.tensor(job.everyone[1:]))


def _trained_on(job: Job, cohort: Cohort, rows: Tensor) -> Prediction:
    """Train one model a fold from rows of weights (K, parameters), as experts are trained."""
    study, plan = job.study, Plan.one_a_fold(job.target.folds)
    models = Abmil.from_flat(study.shape, rows.cpu()).to(device_of(job.sources))
    models = train_experts(cohort, plan, initial=models, config=study.training, seed=study.seed)
    return _judged(replace(job.target, cohort=cohort), models)


def _judged(target: Target, models: Abmil) -> Prediction:
    """Return what K models say, each of the patients of its own fold."""
    features = consult(models, target.cohort).features.to(device_of(models))
    return _of_models(target, models.predict(features).cpu(), target.folds)


def _zero_shot(job: Job) -> Prediction:
    return _of_answers(job, job.zero_shot.answers)


def _vote(job: Job) -> Prediction:
    return _of_answers(job, equal_vote(job.target.folds, job.risks))


def _stack(job: Job) -> Prediction:
    return _of_answers(job, job.guarded.answers["stack"])


def _auto(job: Job) -> Prediction:
    return _of_answers(job, job.guarded.answers["auto"])


def _roupkt(job: Job) -> Prediction:
    """Return the published router's answer: the study's own, or one trained beside it."""
    if router_arm(job.study.router) == "roupkt":
        return job.routed[0]
    study = replace(job.study, router=published_router(job.study.router))
    stack = RouterStack(job.target, job.sources, list(job.opinions), study)
    stack.train()
    return _routed(stack)[0]


def _roupkt_plus(job: Job) -> Prediction:
    return job.routed[0]


def _merge(job: Job) -> Prediction:
    return _merged(job, flatten(job.sources).cpu().numpy())


def _self_only(job: Job) -> Prediction:
    return _merged(job, np.empty((0, flatten(job.sources).shape[1]), dtype=np.float32))


def _merged(job: Job, sources: NDArray[np.float32]) -> Prediction:
    found = merged(job.target, sources, job.study)
    return Prediction(risk=found.risk, survival=found.survival)


def _random_init(job: Job) -> Prediction:
    """Return the guard's answer over as many experts that never were trained."""
    count = job.sources.models
    return _guarded_over(job, untrained(job.study, count).to(device_of(job.sources)))


def _permuted(job: Job) -> Prediction:
    """Return the guard's answer over experts trained here, on outcomes dealt out anew."""
    cohort, study = job.target.cohort, job.study
    count = min(PERMUTED, job.sources.models)
    rng = np.random.default_rng(hash_seed(study.seed, 6))
    dealt = np.stack([rng.permutation(len(cohort)) for _ in range(count)])
    m0 = Abmil.initial(study.shape, seed=study.seed, hazard=study.initial_hazard, models=count)
    experts = train_experts(
        cohort,
        Plan(job.target.folds, ((),) * count),
        initial=m0.to(device_of(job.sources)),
        config=study.training,
        seed=study.seed,
        outcomes=(cohort.time_bins[dealt], cohort.event[dealt]),
    )
    return _guarded_over(job, experts)


def untrained(study: StudyConfig, count: int) -> Abmil:
    """Return experts as torch draws them, each another draw."""
    rows = [
        flatten(Abmil.initial(study.shape, seed=hash_seed(study.seed, 7, draw)))
        for draw in range(count)
    ]
    return Abmil.from_flat(study.shape, torch.cat(rows)).requires_grad_(False)


def _guarded_over(job: Job, experts: Abmil) -> Prediction:
    opinions = job.target.consult(experts, job.study)
    return _of_answers(job, guard(job.target, opinions).answers["auto"])


def _of_answers(job: Job, answers: NDArray[np.float64]) -> Prediction:
    """Return risk, and survival by a calibration inside the training folds, of answers (K, n)."""
    cohort, folds = job.target.cohort, job.target.folds
    return Prediction(
        risk=held_out(answers, folds),
        survival=calibrated(cohort.days, cohort.event, folds, answers, bins=job.study.shape.bins),
    )


def _of_models(target: Target, logits: Tensor, model: NDArray[np.int64]) -> Prediction:
    """Return what hazard logits (F, n, T) say, each patient being judged by one model (n,)."""
    at = torch.from_numpy(model), torch.arange(len(target.cohort))
    survival = log_survival(logits[at].double()).exp()
    return Prediction(risk=-survival.sum(-1).numpy(), survival=survival.numpy())


def _routed(stack: RouterStack) -> tuple[Prediction, NDArray[np.float64]]:
    survival, weights = stack.predict()
    return Prediction(risk=-survival.sum(-1), survival=survival), weights


def _or_half(c_index: float | None) -> float:
    return 0.5 if c_index is None else c_index


def _patches(cohort: Cohort) -> int:
    return sum(cohort.patches(i) for i in range(len(cohort)))


def _forward(job: Job, models: int) -> float:
    """Return the operations of some experts' forward pass over the cohort."""
    cohort = job.target.cohort
    return models * expert_flop(job.study.shape, _patches(cohort), len(cohort))


def _training(job: Job, models: int) -> float:
    """Return the operations of training some experts and asking them once."""
    rounds = epochs(len(job.target.cohort), job.study.training)
    return _forward(job, models) * (rounds * (1 + BACKWARD) + 1)


def _routing(job: Job) -> float:
    """Return the operations of training a target's routers; experts were asked before."""
    shape, cohort = job.study.shape, job.target.cohort
    network = attention_flop(shape, _patches(cohort))
    adapters = 2.0 * len(cohort) * (1 + job.sources.models) * shape.embed**2
    rounds = epochs(len(cohort), job.study.router)
    own = job.target.views * (network + adapters) * (rounds * (1 + BACKWARD) + 1)
    return own + _forward(job, job.sources.models)


def _merging(job: Job, vectors: int, penalties: int) -> float:
    """Return the operations of training merged models: as experts, and one product a step."""
    rounds = epochs(len(job.target.cohort), job.study.router)
    models = job.target.own.models
    product = 2.0 * models * vectors * parameter_count(job.target.own)
    steps = rounds * max(1, len(job.target.cohort) // job.study.router.batch)
    return penalties * (
        _forward(job, models) * (rounds * (1 + BACKWARD) + 1) + product * steps * (1 + BACKWARD)
    )


def _received(kind: Kind, job: Job) -> float:
    one = parameter_count(job.sources) * 4 / 1e6
    count: Mapping[Needs, int] = {
        "nothing": 0,
        "own expert": 0,
        "M0": 1,
        "experts": job.sources.models,
        "model of all cancers": job.target.views,
    }
    return one * count[kind.needs]


def _sent(kind: Kind, job: Job) -> float:
    expert, views = parameter_count(job.sources) * 4 / 1e6, job.target.views
    return {
        "nothing": 0.0,
        "own expert": expert,
        "shared routers": job.shared * parameter_count(job.router.module) * views * 4 / 1e6,
        "model of all cancers": expert * views,
    }[kind.sends]


ARMS: dict[Arm, Kind] = {
    "local": Kind(
        needs="M0",
        trains="its own cross-fitted experts",
        sends="own expert",
        predict=_local,
        gflop=lambda job: _training(job, job.target.own.models),
    ),
    "finetune": Kind(
        needs="experts",
        trains="on from the best source of each fold",
        sends="nothing",
        predict=_finetune,
        gflop=lambda job: _training(job, job.target.views - 1),
    ),
    "zero_shot": Kind(
        needs="experts",
        trains="nothing",
        sends="nothing",
        predict=_zero_shot,
        gflop=lambda job: _forward(job, job.sources.models),
    ),
    "vote": Kind(
        needs="experts",
        trains="nothing",
        sends="nothing",
        predict=_vote,
        gflop=lambda job: _forward(job, job.sources.models),
    ),
    "roupkt": Kind(
        needs="experts",
        trains="a router, adapters and one head, as published",
        sends="nothing",
        predict=_roupkt,
        gflop=_routing,
    ),
    "roupkt+": Kind(
        needs="experts",
        trains="a router, adapters and heads, with the repairs",
        sends="shared routers",
        predict=_roupkt_plus,
        gflop=_routing,
    ),
    "merge": Kind(
        needs="experts",
        trains="one weight a task vector, and a head",
        sends="nothing",
        predict=_merge,
        gflop=lambda job: _merging(job, 1 + job.sources.models, len(PENALTIES)),
    ),
    "stack": Kind(
        needs="experts",
        trains="one weight an expert",
        sends="nothing",
        predict=_stack,
        gflop=lambda job: _forward(job, job.sources.models),
    ),
    "fedavg": Kind(
        needs="model of all cancers",
        trains="its part of every round",
        sends="model of all cancers",
        predict=_fedavg,
        gflop=lambda job: _training(job, job.target.views) * job.study.fedavg_rounds,
    ),
    "fedavg_tuned": Kind(
        needs="model of all cancers",
        trains="on from the model of all cancers",
        sends="nothing",
        predict=_fedavg_tuned,
        gflop=lambda job: _training(job, job.target.views - 1),
    ),
    "auto": Kind(
        needs="experts",
        trains="one weight an expert, and how far to leave local",
        sends="nothing",
        predict=_auto,
        gflop=lambda job: _forward(job, job.sources.models),
    ),
    "random_init": Kind(
        needs="nothing",
        trains="as auto",
        sends="nothing",
        predict=_random_init,
        gflop=lambda job: _forward(job, job.sources.models),
    ),
    "permuted": Kind(
        needs="nothing",
        trains=f"{PERMUTED} experts on shuffled outcomes, then as auto",
        sends="nothing",
        predict=_permuted,
        gflop=lambda job: _training(job, min(PERMUTED, job.sources.models)),
    ),
    "mean_pool": Kind(
        needs="M0",
        trains="an expert on the mean of the patches",
        sends="nothing",
        predict=_mean_pool,
        gflop=lambda job: (
            (job.target.views - 1)
            * expert_flop(job.study.shape, len(job.target.cohort), len(job.target.cohort))
            * (epochs(len(job.target.cohort), job.study.training) * (1 + BACKWARD) + 1)
        ),
    ),
    "self_only": Kind(
        needs="M0",
        trains="one weight of its own task vector, and a head",
        sends="nothing",
        predict=_self_only,
        gflop=lambda job: _merging(job, 1, 1),
    ),
}
