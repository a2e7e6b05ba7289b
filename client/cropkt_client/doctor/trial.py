"""What a doctor tries in a process of its own: a real kernel, and some seconds of real training.

A broken driver or too little memory ends that process, and is a finding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort
from cropkt.cohort.source import SlideSource
from cropkt.config import StudyConfig
from cropkt.errors import ConfigError
from cropkt.experts.abmil import Abmil
from cropkt.experts.device import resolve_device
from cropkt.experts.training import Plan, epochs, train_experts, updates_per_epoch
from cropkt_client.site import Site, folds_of

SIDE = 512  # of the matrices that are multiplied
FIRST = 256  # patches of the first updates: few, so that no machine is stuck in them
GROWTH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What a device made of a matrix product."""

    device: str  # its name; empty where there is none of the name asked for
    problem: str = ""
    error: float = 0.0  # the largest difference from the CPU, in units of the largest value
    free: int | None = None  # bytes of a GPU's memory
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """One update of an expert's training."""

    patches: int
    seconds: float
    whole: bool = False  # as many patients as in the study, with all their patches


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Some updates of an expert's training, and what a whole training is made of."""

    device: str
    models: int  # trained side by side
    epochs: int
    updates: int  # an epoch
    patients: int
    patches: int  # of all patients
    tried: tuple[Update, ...]  # from small to large

    @property
    def seconds(self) -> float:
        """Seconds that the whole training would take.

        From updates as they are in the study, by patches; where none fitted into the trial, from
        the smallest and the largest: a constant for each update, and a share for each patch.
        """
        whole = [update for update in self.tried if update.whole]
        if whole or len(self.tried) == 1:
            some = whole or self.tried
            each = sum(one.seconds for one in some) / sum(one.patches for one in some)
            return self.epochs * self.patches * each
        small, large = self.tried[0], self.tried[-1]
        more = max(1, large.patches - small.patches)
        each = max(0.0, large.seconds - small.seconds) / more
        constant = max(0.0, small.seconds - each * small.patches)
        return self.epochs * (self.updates * constant + self.patches * each)

    @property
    def how(self) -> str:
        """Where `seconds` come from, in words."""
        whole = sum(update.whole for update in self.tried)
        spent = sum(update.seconds for update in self.tried)
        if whole:
            return (
                f"measured on {whole} whole updates in {spent:.1f} s, times all patches and epochs"
            )
        sizes = f"{self.tried[0].patches} to {self.tried[-1].patches} patches in {spent:.1f} s"
        return f"scaled up from smaller updates of {sizes}, times updates, patches and epochs"


def kernel(name: str) -> Kernel:
    """Multiply matrices on a device and on the CPU."""
    try:
        device = resolve_device(name)
    except ConfigError as error:
        return Kernel(device="", problem=error.problem)
    left, right = torch.randn(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    wanted = left.double() @ right.double()
    got = (left.to(device) @ right.to(device)).cpu().double()
    off = float((got - wanted).abs().max() / wanted.abs().max())
    free = total = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    return Kernel(device=_title(device), error=off, free=free, total=total)


def trial(config: Path, cancer: Cancer, study: StudyConfig, name: str, seconds: float) -> Trial:
    """Train an expert of this site for at most about `seconds`, and keep nothing of it.

    All models of nested cross-fitting are trained side by side, as in the study, on the site's own
    bags. The first updates see the first patches of one bag; each later one may be `GROWTH` times
    as large as the last, up to the study's batch, if the time left allows it.
    """
    device = resolve_device(name)
    site = Site.load(config, device=device)
    site = replace(site, config=replace(site.config, on_bad="skip"))
    cohort, _ = site.cohort(cancer, study)
    plan = Plan.cross_fitted(folds_of(cohort, study))
    experts = Abmil.initial(
        study.shape, models=len(plan.excluded), seed=study.seed, hazard=study.initial_hazard
    ).to(device)
    sizes = np.array([cohort.patches(i) for i in range(len(cohort))])
    one = np.array([0])
    _update(cohort, plan, experts, study, one, FIRST)  # wakes device and disk
    end = time.monotonic() + seconds
    tried = [_update(cohort, plan, experts, study, one, FIRST)]
    order, at = np.random.default_rng(study.seed).permutation(len(cohort)), 0
    while at < len(order) and (left := end - time.monotonic()) > tried[-1].seconds:
        # No more than the time left allows, were all of the last update's time its patches'.
        room = int(tried[-1].patches * min(GROWTH, left / tried[-1].seconds))
        batch = order[at : at + study.training.batch]
        fits = int((np.cumsum(sizes[batch]) <= room).sum())
        chosen = batch[: max(1, fits)]
        limit = None if fits else max(1, room // len(cohort.slides[chosen[0]]))
        update = _update(cohort, plan, experts, study, chosen, limit)
        tried.append(replace(update, whole=limit is None and len(chosen) == len(batch)))
        at += len(chosen)
    return Trial(
        device=_title(device),
        models=len(plan.excluded),
        epochs=epochs(len(cohort), study.training),
        updates=updates_per_epoch(len(cohort), study.training),
        patients=len(cohort),
        patches=int(sizes.sum()),
        tried=tuple(tried),
    )


def run(what: str, *arguments: object) -> Kernel | Trial:
    """Call `kernel` or `trial`: a worker knows one function."""
    tried: dict[str, Callable[..., Kernel | Trial]] = {"kernel": kernel, "trial": trial}
    return tried[what](*arguments)


def _update(
    cohort: Cohort,
    plan: Plan,
    experts: Abmil,
    study: StudyConfig,
    chosen: NDArray[np.int64],
    limit: int | None,
) -> Update:
    """Make one update from these patients, of at most `limit` patches a slide."""
    some = replace(cohort.subset(chosen), source=_Beginnings(cohort.source, limit))
    once = replace(
        study.training,
        epochs=1,
        minimum_updates=0,
        warmup_epochs=0,
        batch=len(chosen),
        drop_last=False,
        standardise="none",
    )
    these = Plan(plan.folds[chosen], plan.excluded)
    began = time.monotonic()
    train_experts(some, these, initial=experts, config=once, seed=study.seed)
    return Update(sum(some.patches(i) for i in range(len(some))), time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class _Beginnings(SlideSource):
    """The first patches of each slide."""

    source: SlideSource
    limit: int | None

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self.source

    def shape(self, slide_id: str) -> tuple[int, int]:
        patches, width = self.source.shape(slide_id)
        return patches if self.limit is None else min(patches, self.limit), width

    def features(self, slide_id: str) -> Tensor:
        return self.source.features(slide_id)[: self.limit]

    def stamp(self, slide_id: str) -> str:
        return f"{self.source.stamp(slide_id)} up to {self.limit}"

    def coords(self, slide_id: str) -> Tensor | None:
        return None

    def slide_ids(self) -> Iterable[str]:
        return self.source.slide_ids()


def _title(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
