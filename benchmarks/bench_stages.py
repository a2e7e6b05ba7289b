"""Each stage of a study: the straightforward formulation, cropkt, and the floor of this machine.

    python benchmarks/bench_stages.py [--patients 6] [--patches 300] [--experts 26] [--repeats 5]

Features are random, float16, in a pack on disk; widths are the published ones. The baseline
(`baseline.py`) trains and asks one model on one bag at a time and reads every bag again in each
pass; training is one epoch. The floor is the operations over the measured peak of a float32
product, or the bytes of one read over the measured bandwidth, whichever takes longer. Figures are
medians of interleaved repeats on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from baseline import Expert, Router, clipped_sum, train_expert, train_router, zero_shot
from machine import (
    Work,
    describe,
    disk_bandwidth,
    gemm_peak,
    medians,
    memory_bandwidth,
    random_cohort,
)

from cropkt.config import ExpertShape, RouterConfig, StudyConfig, TrainingConfig
from cropkt.experts.abmil import Abmil, initialise
from cropkt.experts.bank import consult
from cropkt.experts.cost import expert_flop
from cropkt.experts.private import PatientLoss
from cropkt.experts.training import Plan, hash_seed, train_experts
from cropkt.transfer.router_training import RouterStack
from cropkt.transfer.target import Target

FOLDS = 5
Stage = tuple[str, Work, Work, float, int]  # name, baseline, cropkt, operations, reads of the data


def training_flop(shape: ExpertShape, patches: int) -> float:
    """Return the least operations of one update: the first layer needs no gradient of its input."""
    return 2.0 * patches * (2 * shape.dim * shape.embed + 6 * shape.embed * shape.attention)


def stages(options: argparse.Namespace, folder: Path, shape: ExpertShape) -> Iterator[Stage]:
    """Yield each stage."""
    people = random_cohort(
        folder, patients=options.patients, patches=options.patches, dim=shape.dim
    )
    patches = options.patients * options.patches
    folds = np.arange(options.patients) % FOLDS
    study = StudyConfig(
        shape=shape,
        training=TrainingConfig(epochs=1, warmup_epochs=0),
        router=RouterConfig(epochs=1, warmup_epochs=0),
    )

    def fresh(models: int) -> Abmil:
        return Abmil.initial(shape, seed=0, hazard=0.06, models=models)

    def one_by_one(plan: Plan) -> None:
        for learns in plan.learns():
            train_expert(people, learns, Expert.of(fresh(1)), study.training, seed=0)

    def together(plan: Plan) -> None:
        models = fresh(len(plan.excluded))
        train_experts(people, plan, initial=models, config=study.training, seed=0)

    one, five = Plan(folds, ((),)), Plan.one_a_fold(folds)
    flop = training_flop(shape, patches)
    yield "train one expert", lambda: one_by_one(one), lambda: together(one), flop, 1
    share = (FOLDS - 1) / FOLDS  # a fold's own patients teach its model nothing
    floor = FOLDS * share * flop
    yield "train five folds", lambda: one_by_one(five), lambda: together(five), floor, 1

    bank = Abmil(shape, models=options.experts)
    initialise(bank, torch.Generator().manual_seed(1))
    bank.requires_grad_(False)
    alone = [Expert.of(bank, s) for s in range(options.experts)]
    asking = options.experts * expert_flop(shape, patches, options.patients)
    yield (
        f"zero-shot of {options.experts} experts",
        lambda: zero_shot(alone, people),
        lambda: consult(bank, people),
        asking,
        1,
    )
    yield from _router(options, people, bank, study, flop)
    expert = fresh(1).requires_grad_(True)
    everybody = list(range(options.patients))
    yield (
        "DP: clipped gradients",
        lambda: clipped_sum(people, everybody, Expert.of(expert), alpha=0.5, clip=0.3),
        lambda: PatientLoss(expert, alpha=0.5).gradients(people, np.arange(options.patients)),
        flop,
        1,
    )
    patient = people.subset([0])
    yield (
        f"one patient, {options.experts} experts",
        lambda: zero_shot(alone, patient),
        lambda: consult(bank, patient),
        asking / options.patients,
        1,
    )


def _router(options, people, bank, study, flop) -> Iterator[Stage]:  # type: ignore[no-untyped-def]
    """Yield the training of a target's six routers over the bank, whose features are known."""
    plan = Plan.cross_fitted(np.arange(options.patients) % FOLDS)
    own = Abmil.initial(study.shape, seed=0, hazard=0.06, models=len(plan.excluded))
    target = Target.of(people, plan, own.requires_grad_(False))
    opinions = target.consult(bank, study)
    views = 1 + FOLDS

    def stack() -> RouterStack:
        return RouterStack(target, bank, opinions, study)

    def one_by_one() -> None:
        start = stack()
        for view in range(views):
            learns = np.arange(options.patients) % FOLDS != view - 1
            router, features = Router(start.module, view), start.features[view]
            train_router(people, learns, router, features, study, seed=hash_seed(0, 3))

    adapters = 6.0 * options.patients * study.router.top_k * study.shape.embed**2
    yield (
        f"router over {options.experts} experts",
        one_by_one,
        lambda: stack().train(),
        (1 + (FOLDS - 1) ** 2 / FOLDS) * flop + views * adapters,
        1,
    )


def main() -> None:
    """Run and print a table for RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=6)
    parser.add_argument("--patches", type=int, default=300)
    parser.add_argument("--experts", type=int, default=26)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--embed", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = ExpertShape(embed=options.embed)
    peak, memory = gemm_peak(), memory_bandwidth()
    print(f"{describe()}; {options.patients} patients of {options.patches} patches, one epoch\n")
    print("| stage | baseline, s | cropkt, s | gain | floor, s | cropkt over floor |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        size = options.patients * options.patches * shape.dim * 2
        for name, plain, ours, flop, reads in stages(options, Path(folder), shape):
            took = medians({"baseline": plain, "cropkt": ours}, repeats=options.repeats)
            one, two, peak = took["baseline"], took["cropkt"], max(peak, gemm_peak())
            floor = max(flop / peak, reads * size / memory)
            cells = f"{one:.2f} | {two:.2f} | {one / two:.2f} | {floor:.2f} | {two / floor:.1f}"
            print(f"| {name} | {cells} |", flush=True)
        disk = disk_bandwidth(Path(folder) / "pack" / "patches.npy")
    print(
        f"\nPeaks: {peak / 1e9:.1f} GFLOP/s, {memory / 1e9:.1f} GB/s of memory, "
        f"{disk / 1e9:.1f} GB/s of files in the system's cache."
    )


if __name__ == "__main__":
    main()
