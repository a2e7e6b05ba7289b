"""Patches a second of training one cancer's experts: one model alone, and all models of five folds.

    python benchmarks/bench_training.py [--patients 160] [--patches 500] [--repeats 5]

Features are random and in memory, 1536 wide as UNI2-h writes them; widths of the published expert.
Figures are medians over the repeats, interleaved, on one thread; `gain` is models trained a second
side by side over one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort
from cropkt.cohort.source import SlideSource
from cropkt.config import ExpertShape, TrainingConfig
from cropkt.experts.abmil import Abmil
from cropkt.experts.training import Plan, train_experts


class Memory(SlideSource):
    """Slides in memory."""

    def __init__(self, bags: dict[str, torch.Tensor]) -> None:
        self.bags = bags

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self.bags

    def shape(self, slide_id: str) -> tuple[int, int]:
        """Return (patches, width)."""
        patches, width = self.bags[slide_id].shape
        return patches, width

    def features(self, slide_id: str) -> torch.Tensor:
        """Return the patches."""
        return self.bags[slide_id]

    def stamp(self, slide_id: str) -> str:
        """Return nothing: they never change."""
        return ""

    def coords(self, slide_id: str) -> None:
        """There are none."""

    def slide_ids(self) -> tuple[str, ...]:
        """Return all ids."""
        return tuple(self.bags)


def cohort(patients: int, patches: int, dim: int) -> Cohort:
    """Return random patients."""
    rng = np.random.default_rng(0)
    ids = tuple(f"P{i:04d}" for i in range(patients))
    generator = torch.Generator().manual_seed(0)
    bags = {i: torch.randn(patches, dim, generator=generator).half() for i in ids}
    return Cohort(
        cancer=Cancer.UVM,
        endpoint="DSS",
        dim=dim,
        patient_ids=ids,
        days=rng.integers(1, 4000, patients).astype(np.float64),
        event=rng.random(patients) < 0.3,
        hospital=("",) * patients,
        slides=tuple((i,) for i in ids),
        source=Memory(bags),
    )


def seconds(people: Cohort, plan: Plan, shape: ExpertShape) -> float:
    """Return how long one epoch takes."""
    models = len(plan.excluded)
    experts = Abmil.initial(shape, seed=0, hazard=0.06, models=models)
    started = time.perf_counter()
    train_experts(people, plan, initial=experts, config=TrainingConfig(epochs=1), seed=0)
    return time.perf_counter() - started


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=160)
    parser.add_argument("--patches", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = ExpertShape()
    people = cohort(options.patients, options.patches, shape.dim)
    folds = np.arange(options.patients) % 5
    single, stacked = Plan(folds, ((),)), Plan(folds, ((), *((fold,) for fold in range(5))))
    seconds(people.subset(np.arange(16)), Plan(folds[:16], ((),)), shape)  # warm up
    alone, together = [], []
    for _ in range(options.repeats):
        alone.append(seconds(people, single, shape))
        together.append(seconds(people, stacked, shape))
    total = options.patients * options.patches
    one, six = statistics.median(alone), statistics.median(together)
    print(f"one expert       {total / one:10,.0f} patches/s   (median of {options.repeats})")
    print(
        f"six side by side {total / six:10,.0f} patches/s   {6 * total / six:,.0f} model-patches/s"
    )
    print(f"gain of side by side over one after the other: {6 * one / six:.2f}")


if __name__ == "__main__":
    main()
