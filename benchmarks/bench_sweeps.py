"""How the cost of asking experts grows: with experts, with the bag, with patients.

    python benchmarks/bench_sweeps.py [--published] [--most-patches 10000] [--most-patients 500]

Prints seconds and the exponent of size that fits them best on log-log axes (1 is linear), and draws
bench-out/sweeps.png. Narrow models by default, so that it takes about a minute; `--published`
takes the published widths, `--most-patches 50000 --most-patients 5000` the published sizes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from machine import describe, random_cohort

from cropkt.config import ExpertShape
from cropkt.experts.abmil import Abmil
from cropkt.experts.bank import consult

NARROW = ExpertShape(dim=384, embed=64, attention=48, bins=32)


def seconds(
    shape: ExpertShape, repeats: int, *, experts: int, patients: int, patches: int
) -> float:
    """Return the median time of asking experts about patients."""
    bank = Abmil.initial(shape, seed=0, models=experts).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        people = random_cohort(Path(folder), patients=patients, patches=patches, dim=shape.dim)
        took = []
        for _ in range(repeats):
            started = time.perf_counter()
            consult(bank, people)
            took.append(time.perf_counter() - started)
    return statistics.median(took)


def exponent(sizes: list[int], took: list[float]) -> float:
    """Return the slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(took), 1)[0])


def main() -> None:
    """Run, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", action="store_true", help="published widths")
    parser.add_argument("--most-patches", type=int, default=10_000)
    parser.add_argument("--most-patients", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = ExpertShape() if options.published else NARROW
    sweeps: dict[str, tuple[list[int], Callable[[int], dict[str, int]]]] = {
        "experts": (
            [1, 5, 26, 100],
            lambda size: {"experts": size, "patients": 4, "patches": 500},
        ),
        "patches a bag": (
            [s for s in (1_000, 2_500, 10_000, 50_000) if s <= options.most_patches],
            lambda size: {"experts": 5, "patients": 1, "patches": size},
        ),
        "patients": (
            [s for s in (50, 150, 500, 1_500, 5_000) if s <= options.most_patients],
            lambda size: {"experts": 5, "patients": size, "patches": 40},
        ),
    }
    widths = f"{shape.dim} features, {shape.embed} and {shape.attention} wide"
    print(f"{describe()}; {widths}\n")
    print("| what grows | sizes | seconds | exponent |")
    print("|---|---|---|---|")
    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4))
    for name, (sizes, arguments) in sweeps.items():
        took = [seconds(shape, options.repeats, **arguments(size)) for size in sizes]
        slope = exponent(sizes, took)
        shown = " ".join(f"{second:.3f}" for second in took)
        print(f"| {name} | {' '.join(map(str, sizes))} | {shown} | {slope:.2f} |", flush=True)
        axes.loglog(sizes, took, "o-", label=f"{name}: {slope:.2f}")
    axes.set_xlabel("size")
    axes.set_ylabel("seconds")
    axes.legend(title="exponent")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "sweeps.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
