"""Many experts over a cohort: each bag is read once, in groups that bound the memory.

The first layers of all experts are one wide product; a bag too large for that goes by blocks
(`cropkt.experts.pooling`).

Shapes: S experts, n patients, E embedding, T bins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cropkt.cohort.bags import Cohort
from cropkt.cohort.feed import packed
from cropkt.experts.abmil import Abmil
from cropkt.experts.device import device_of, moved
from cropkt.survival.likelihood import risk

MAX_HIDDEN = 1 << 26  # float32 values of one group's hidden layer, 256 MiB


Units = tuple[Tensor, Tensor]  # mean and deviation of the input


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinions:
    """What S frozen experts say of n patients."""

    risk: NDArray[np.float64]  # (S, n) higher dies earlier
    features: Tensor  # (S, n, E) slide features


def consult(experts: Abmil, cohort: Cohort) -> Opinions:
    """Return, on the CPU, risk and slide feature of every expert for every patient."""
    return consult_in(experts, cohort, [None])[0]


@torch.inference_mode()
def consult_in(experts: Abmil, cohort: Cohort, units: Sequence[Units | None]) -> list[Opinions]:
    """Return what the experts say of every patient in each of several units of the input.

    Each bag is read once for all of them.

    Args:
        experts: S experts.
        cohort: the patients.
        units: mean and deviation to standardise by, (D,) or (S, D); None leaves the experts' own.
    """
    width = experts.models * experts.shape.embed
    device = device_of(experts)
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in units]
    some = list(groups(cohort, patches=max(1, MAX_HIDDEN // width)))
    for _, read in packed(cohort, some):
        bags = moved(read, device)
        for unit, (risks, features) in zip(units, found, strict=True):
            with contextlib.nullcontext() if unit is None else experts.standardised(*unit):
                out = experts.outputs(bags)
            risks.append(risk(out.logits.cpu()))
            features.append(out.features.cpu())
    return [
        Opinions(risk=torch.cat(risks, 1).numpy(), features=torch.cat(features, 1).clone())
        for risks, features in found
    ]


def groups(cohort: Cohort, *, patches: int, patients: int = 64) -> Iterator[NDArray[np.int64]]:
    """Yield consecutive patients whose bags together hold at most `patches`, at least one."""
    start, total = 0, 0
    for i in range(len(cohort)):
        size = cohort.patches(i)
        if i > start and (total + size > patches or i - start >= patients):
            yield np.arange(start, i)
            start, total = i, 0
        total += size
    yield np.arange(start, len(cohort))
