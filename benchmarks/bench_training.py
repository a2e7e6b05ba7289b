"""Patches a second of training one cancer's experts: one model alone, and all models of five folds.

    python benchmarks/bench_training.py [--patients 160] [--patches 500] [--repeats 5]

Features are random and in a pack on disk, 1536 wide as UNI2-h writes them; widths of the published
expert.
Figures are medians over the repeats, interleaved, on one thread; `gain` is models trained a second
side by side over one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import random_cohort

from cropkt.cohort.bags import Cohort
from cropkt.config import ExpertShape, TrainingConfig
from cropkt.experts.abmil import Abmil
from cropkt.experts.training import Plan, train_experts


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
    size = {"patients": options.patients, "patches": options.patches, "dim": shape.dim}
    with tempfile.TemporaryDirectory() as folder:
        compare(random_cohort(Path(folder), **size), shape, options.repeats)


def compare(people: Cohort, shape: ExpertShape, repeats: int) -> None:
    """Time both ways, and print."""
    folds = np.arange(len(people)) % 5
    single, stacked = Plan(folds, ((),)), Plan(folds, ((), *((fold,) for fold in range(5))))
    seconds(people.subset(np.arange(16)), Plan(folds[:16], ((),)), shape)  # warm up
    alone, together = [], []
    for _ in range(repeats):
        alone.append(seconds(people, single, shape))
        together.append(seconds(people, stacked, shape))
    total = sum(people.patches(i) for i in range(len(people)))
    one, six = statistics.median(alone), statistics.median(together)
    print(f"one expert       {total / one:10,.0f} patches/s   (median of {repeats})")
    print(
        f"six side by side {total / six:10,.0f} patches/s   {6 * total / six:,.0f} model-patches/s"
    )
    print(f"gain of side by side over one after the other: {6 * one / six:.2f}")


if __name__ == "__main__":
    main()
