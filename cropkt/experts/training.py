"""Training F experts side by side from one read of the data.

Every model sees the same order of patients; a patient's loss counts only for the models that may
learn from it. So the K fold models, the models that leave two folds out and the model of all
patients cost one pass, and each equals the model trained alone with the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, cos, pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cropkt.cohort.bags import Cohort, PackedBags
from cropkt.cohort.feed import packed
from cropkt.config import OptimiserConfig, TrainingConfig
from cropkt.errors import TrainingFailedError
from cropkt.experts.abmil import Abmil
from cropkt.experts.checkpoint import Checkpoint, Training
from cropkt.experts.device import device_of, moved
from cropkt.experts.parts import losses_in_parts, together_pays
from cropkt.survival.likelihood import discrete_nll

Step = Callable[[NDArray[np.int64], PackedBags], Iterable[Tensor]]

ROWS = 4096  # patches that are widened to double precision at once


@dataclass(frozen=True, slots=True)
class Plan:
    """The models of one cohort: who may learn from whom."""

    folds: NDArray[np.int64]  # (n,) fold of each patient
    excluded: tuple[tuple[int, ...], ...]  # (F) the folds that each model leaves out
    kept: NDArray[np.bool_] | None = None  # (n,) who may be learnt from; None: everybody

    @classmethod
    def cross_fitted(cls, folds: NDArray[np.int64], kept: NDArray[np.bool_] | None = None) -> Plan:
        """Return the models of nested cross-fitting: all, all but f, all but f and g."""
        return cls(folds, cross_fitted(int(folds.max()) + 1), kept)

    @classmethod
    def one_a_fold(cls, folds: NDArray[np.int64], *, whole: bool = False) -> Plan:
        """Return K models, each of which leaves its fold out, after one of all if `whole`."""
        single: tuple[tuple[int, ...], ...] = tuple((f,) for f in range(int(folds.max()) + 1))
        return cls(folds, ((), *single) if whole else single)

    def model(self, *excluded: int) -> int:
        """Return the index of the model that leaves out exactly these folds."""
        return self.excluded.index(tuple(sorted(set(excluded))))

    def learns(self) -> NDArray[np.bool_]:
        """Return (F, n): True where the model may learn from the patient."""
        learns = np.stack([~np.isin(self.folds, left_out) for left_out in self.excluded])
        return learns if self.kept is None else learns & self.kept

    def fewest(self, event: NDArray[np.bool_], *, without: int = 1) -> tuple[int, int]:
        """Return the fewest patients, and the fewest events, that a model may learn from.

        Args:
            event: (n,) True for a death.
            without: only models that leave out at most so many folds.
        """
        learns = self.learns()[[len(left_out) <= without for left_out in self.excluded]]
        return int(learns.sum(1).min()), int((learns & event).sum(1).min())


def cross_fitted(folds: int) -> tuple[tuple[int, ...], ...]:
    """Return the folds that each of the models of nested cross-fitting leaves out."""
    single = tuple((f,) for f in range(folds))
    double = tuple((f, g) for f in range(folds) for g in range(f + 1, folds))
    return ((), *single, *double)


def batches(
    patients: int, config: OptimiserConfig, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield the patients of one epoch in shuffled groups of about `config.batch`."""
    order = rng.permutation(patients)
    if config.drop_last and patients >= config.batch:
        order = order[: patients // config.batch * config.batch]
    yield from np.array_split(order, updates_per_epoch(patients, config))


def cosine_with_warmup(step: int, *, total: int, warmup: int) -> float:
    """Return the learning-rate factor of `step` in [0, total): linear rise, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step - warmup) / max(1, total - warmup)))


def updates_per_epoch(patients: int, config: OptimiserConfig) -> int:
    """Return how many groups `batches` yields."""
    whole = patients // config.batch
    return max(1, whole if config.drop_last else round(patients / config.batch))


def epochs(patients: int, config: OptimiserConfig) -> int:
    """Return how many epochs a training takes."""
    return max(config.epochs, ceil(config.minimum_updates / updates_per_epoch(patients, config)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """An epoch of training that has ended."""

    number: int  # from 1
    of: int
    loss: float  # mean over its updates, summed over the models


def fit(
    module: nn.Module,
    step: Step,
    cohort: Cohort,
    *,
    kept: NDArray[np.int64] | None = None,
    config: OptimiserConfig,
    seed: int,
    on_epoch: Callable[[Epoch], None] | None = None,
    generators: Sequence[torch.Generator] = (),
    checkpoint: Checkpoint | None = None,
) -> None:
    """Minimise the summed loss of all models on groups of patients.

    Args:
        module: what is trained, in place, where it lies.
        step: yields the parts of the loss of some patients, whose bags it is given.
        cohort: the patients.
        kept: those who may be learnt from; None for all.
        config: of the optimiser.
        seed: of the order of patients.
        on_epoch: is told of each epoch that ended.
        generators: those that `step` draws from; a checkpoint keeps their state.
        checkpoint: where to resume from, and to keep where the training stands.

    Raises:
        TrainingFailedError: the loss is no longer finite.
    """
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    device = device_of(module)
    kept = np.arange(len(cohort)) if kept is None else kept
    updates, last = updates_per_epoch(len(kept), config), epochs(len(kept), config)
    total, warmup = last * updates, config.warmup_epochs * updates
    rng = np.random.default_rng(seed)
    training = Training(module=module, optimizer=optimizer, rng=rng, generators=generators)
    done = checkpoint.resume(training) if checkpoint else 0
    for epoch in range(done, last):
        groups = [kept[group] for group in batches(len(kept), config, rng)]
        seen = torch.zeros((), device=device)
        for at, (chosen, bags) in enumerate(packed(cohort, groups), start=epoch * updates):
            factor = cosine_with_warmup(at, total=total, warmup=warmup)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=device)
            for part in step(chosen, moved(bags, device)):
                part.backward()  # type: ignore[no-untyped-call]
                loss += part.detach()
            optimizer.step()
            seen += loss
        if not torch.isfinite(loss):
            raise TrainingFailedError(
                "training",
                f"the loss is {loss.item()} after epoch {epoch + 1}",
                "Lower training.learning_rate, or check the features for extreme values",
            )
        if checkpoint:
            checkpoint.save(training, epoch + 1)
        if on_epoch:
            on_epoch(Epoch(number=epoch + 1, of=last, loss=float(seen) / len(groups)))


def train_experts(
    cohort: Cohort,
    plan: Plan,
    *,
    initial: Abmil,
    config: TrainingConfig,
    seed: int,
    on_epoch: Callable[[Epoch], None] | None = None,
    checkpoint: Checkpoint | None = None,
    outcomes: tuple[NDArray[np.int64], NDArray[np.bool_]] | None = None,
) -> Abmil:
    """Train the F models of `plan` in place, from the weights in `initial`, and return them.

    It runs where `initial` lies. `outcomes` are bins and events (F, n) of each model's own, in
    place of the cohort's. Where the plan keeps few patients, updates are made of those alone.

    Raises:
        TrainingFailedError: the loss is no longer finite.
    """
    initial.requires_grad_(True)
    device = device_of(initial)
    learns = torch.from_numpy(plan.learns()).to(device)  # (F, n)
    of_bins, of_event = outcomes or (cohort.time_bins, cohort.event)
    bins = torch.from_numpy(of_bins).to(device).expand_as(learns)  # (F, n)
    event = torch.from_numpy(of_event).to(device).expand_as(learns)
    generators = [
        torch.Generator().manual_seed(hash_seed(seed, *left_out)) for left_out in plan.excluded
    ]
    standardise_for(initial, cohort, plan, config)

    kept = np.arange(len(cohort)) if plan.kept is None else np.flatnonzero(plan.kept)

    def choose() -> bool:
        middle = int(np.median([cohort.patches(int(i)) for i in kept]))
        batch = min(config.batch, len(kept))
        return together_pays(
            initial.shape, models=initial.models, bags=batch, patches=middle, device=device
        )

    together = checkpoint.settled("together", choose) if checkpoint else choose()

    def step(chosen: NDArray[np.int64], bags: PackedBags) -> Iterator[Tensor]:
        mine = learns[:, chosen]  # (F, B)

        def loss(logits: Tensor, models: slice, run: slice) -> Tensor:
            losses = discrete_nll(
                logits,
                bins[models, chosen[run]],
                event[models, chosen[run]],
                alpha=config.alpha,
                loss=config.loss,
            )  # (f, b)
            return masked_mean(losses, mine[models, run], of=mine[models].sum(1))

        return losses_in_parts(
            *(initial, bags, loss),
            dropout=config.dropout,
            generators=generators,
            together=together,
        )

    fit(
        initial,
        step,
        cohort,
        kept=kept,
        config=config,
        seed=seed,
        on_epoch=on_epoch,
        generators=generators,
        checkpoint=checkpoint,
    )
    return initial.requires_grad_(False)


def standardise_for(experts: Abmil, cohort: Cohort, plan: Plan, config: TrainingConfig) -> Abmil:
    """Let each expert read features in units of the patients it may learn from; return them."""
    if config.standardise == "site":
        experts.standardise(*moments(cohort, plan))
    return experts


def masked_mean(losses: Tensor, mask: Tensor, *, of: Tensor | None = None) -> Tensor:
    """Return the sum over models of the mean loss of each model's own patients; both (F, B).

    `of` (F,) is how many they are, where these are but some of them.
    """
    count = mask.sum(1) if of is None else of
    return ((losses * mask).sum(1) / count.clamp(min=1)).sum()


def hash_seed(seed: int, *parts: int) -> int:
    """Return a seed for one part of a seeded whole, the same in every process."""
    return int(np.random.SeedSequence([seed, len(parts), *parts]).generate_state(1)[0])


def moments(cohort: Cohort, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (F, D) of the patches each model may learn from."""
    sums = torch.zeros(3, len(cohort), cohort.dim, dtype=torch.float64)
    for i in range(len(cohort)):
        for some in torch.split(cohort.bag(i), ROWS):
            patches = some.double()
            sums[0, i] += len(patches)
            sums[1, i] += patches.sum(0).cpu()
            sums[2, i] += patches.square_().sum(0).cpu()
    count, total, squares = torch.from_numpy(plan.learns()).double() @ sums
    count = count.clamp(min=1)  # a model may learn from nobody: of two folds, both left out
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    constant = deviation < 1e-6 * (1 + mean.abs())  # scaling a constant would blow up noise
    return mean.float(), deviation.masked_fill(constant, 1.0).float()
