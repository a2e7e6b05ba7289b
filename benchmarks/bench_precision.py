"""Float32 or bfloat16, eager or compiled: what this machine does faster, and what it changes.

    python benchmarks/bench_precision.py [--outcomes tcga_cdr.csv] [--cancers KIPAN,LUNG]

Prints the ratio on which `cropkt.experts.measured` decides, the seconds of one update eager and
with torch.compile (which needs a C++ compiler), and the out-of-fold C-index of experts trained in
float32 and in bfloat16: of synthetic patients, or of an outcome table's clinical tokens.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import describe, medians

from cropkt.cancers import Cancer
from cropkt.cohort.bags import PackedBags
from cropkt.cohort.splits import stratified_folds
from cropkt.config import ExpertShape
from cropkt.experts.abmil import Abmil
from cropkt.experts.measured import PAYS, compute_type, faster
from cropkt.experts.training import Plan, train_experts
from cropkt.survival.metrics import Pairs, concordance_of
from cropkt.transfer.target import Target
from cropkt_client.site import Site
from cropkt_sim.presets import Data, study_for
from cropkt_sim.sites import prepare

CPU = torch.device("cpu")


def probe() -> None:
    """Print how much faster bfloat16 products are, and what follows."""
    wide, weight = torch.randn(256, 1536), torch.randn(512, 1536)
    narrow = wide.bfloat16(), weight.bfloat16()
    gain = faster(lambda: wide @ weight.t(), lambda: narrow[0] @ narrow[1].t(), CPU)
    chosen = compute_type(CPU, 1536, 512)
    print(f"bfloat16 products are {gain:.2f} times as fast (used from {PAYS}): {chosen}")


def compiled(repeats: int, patches: int) -> None:
    """Print the seconds of one update, eager and compiled."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        print("torch.compile: not measured, there is no C++ compiler")
        return
    expert = Abmil.initial(ExpertShape(), seed=0, hazard=0.06)
    bags = PackedBags.of([torch.randn(patches // 4, 1536).half() for _ in range(4)])

    def update(outputs) -> None:  # type: ignore[no-untyped-def]
        outputs(bags).logits.sum().backward()

    fast = torch.compile(expert.outputs)
    took = medians(
        {"eager": lambda: update(expert.outputs), "compiled": lambda: update(fast)},
        repeats=repeats,
    )
    gain = took["eager"] / took["compiled"]
    print(
        f"one update on {patches} patches: eager {took['eager']:.3f} s, "
        f"compiled {took['compiled']:.3f} s, gain {gain:.2f}"
    )


def c_indices(options: argparse.Namespace) -> None:
    """Print the C-index of both precisions, cancer by cancer."""
    data: Data = "clinical" if options.outcomes else "synthetic"
    cancers = tuple(map(Cancer, options.cancers.split(",")))
    print(f"\n| {data} | float32 | bfloat16 | difference |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(
            data=data,
            folder=Path(folder),
            cancers=cancers,
            seed=0,
            outcomes=options.outcomes,
            features=(),
            endpoint="DSS",
            by="cancers",
            on_bad="skip",
        )
        study = replace(study_for(data=data, preset="default", dim=prepared.dim), folds=3)
        for i in range(len(prepared.names)):
            site = Site.load(prepared.folder / str(i) / "site.yaml")
            cohort, _ = site.cohort(site.config.cancers[0], study)
            folds = stratified_folds(cohort.event, cohort.time_bins, folds=3, seed=0)
            plan, found = Plan.cross_fitted(folds), []
            for kind in (torch.float32, torch.bfloat16):
                experts = Abmil.initial(
                    study.shape, seed=0, hazard=study.initial_hazard, models=len(plan.excluded)
                )
                experts.compute = kind
                train_experts(cohort, plan, initial=experts, config=study.training, seed=0)
                risk = Target.of(cohort, plan, experts).local_risk()
                pairs = Pairs.of(cohort.days, cohort.event).inside(folds)
                found.append(concordance_of(pairs, risk).c_index or np.nan)
            cells = " | ".join(f"{value:.4f}" for value in (*found, found[1] - found[0]))
            print(f"| {cohort.cancer} | {cells} |", flush=True)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outcomes", type=Path)
    parser.add_argument("--cancers", default="KIPAN,LUNG,HNSC")
    parser.add_argument("--patches", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe() + "\n")
    probe()
    compiled(options.repeats, options.patches)
    c_indices(options)


if __name__ == "__main__":
    main()
