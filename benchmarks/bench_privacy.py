"""What differential privacy costs: C-index at several epsilons, and seconds of training.

    python benchmarks/bench_privacy.py [--data synthetic] [--seeds 3]
    python benchmarks/bench_privacy.py --data clinical --outcomes tcga_cdr.csv

Every cancer is a site. `local` is the expert that a site would give away, trained on the other
folds and judged on the held-out one; `zero-shot` and `routed` use the experts that the other sites
give away, the router over them staying at home with the site's own expert, which has no noise.
Epsilon is that of one expert, at delta 1e-5. Figures are medians over the seeds, of folds,
noise and synthetic patients; the table is appended to benchmarks/RESULTS.md with --append.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort
from cropkt.cohort.splits import stratified_folds
from cropkt.config import StudyConfig
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.accountant import Mechanism, calibrated
from cropkt.experts.bank import consult
from cropkt.experts.private import schedule, train_private
from cropkt.experts.training import Plan, train_experts
from cropkt.survival.metrics import out_of_fold
from cropkt.transfer.router_training import RouterStack
from cropkt.transfer.scores import held_out, zero_shot
from cropkt.transfer.target import Target
from cropkt_client.settings import Privacy
from cropkt_client.site import Site
from cropkt_sim.presets import study_for
from cropkt_sim.sites import prepare

EPSILONS = (1.0, 3.0, 8.0, 16.0, None)
CANCERS = {"clinical": "KIPAN,LUNG,HNSC,UVM", "synthetic": "LUNG,HNSC,SKCM,UVM"}
ARMS = ("local", "zero-shot", "routed")
DELTA = 1e-5


@cache
def mechanism_for(epsilon: float, patients: int) -> Mechanism:
    """Return the mechanism of a cohort whose size is told as `patients`."""
    rate, steps = schedule(patients)
    return calibrated(epsilon=epsilon, delta=DELTA, sample_rate=rate, steps=steps)


class Bench:
    """One data set and seed."""

    def __init__(self, options: argparse.Namespace, seed: int, folder: Path) -> None:
        prepared = prepare(
            data=options.data,
            folder=folder,
            cancers=tuple(map(Cancer, (options.cancers or CANCERS[options.data]).split(","))),
            seed=seed,
            outcomes=options.outcomes,
            features=(),
            endpoint="DSS",
            by="cancers",
            on_bad="skip",
        )
        study = study_for(data=options.data, preset="default", dim=prepared.dim)
        self.study = replace(study, folds=3, seed=seed)
        self.targets: dict[Cancer, Target] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        for i in range(len(prepared.names)):
            site = Site.load(prepared.folder / str(i) / "site.yaml")
            cohort, _ = site.cohort(site.config.cancers[0], self.study)
            self.targets[cohort.cancer] = self._target(cohort)

    def _target(self, cohort: Cohort) -> Target:
        folds = stratified_folds(cohort.event, cohort.time_bins, folds=3, seed=self.study.seed)
        plan = Plan.cross_fitted(folds)
        started = time.perf_counter()
        self._without_noise(cohort, Plan(folds, ((),)))
        self.seconds["one expert"].append(time.perf_counter() - started)
        return Target.of(cohort, plan, self._without_noise(cohort, plan))

    def _without_noise(self, cohort: Cohort, plan: Plan) -> Abmil:
        m0 = initial(self.study, models=len(plan.excluded))
        config = self.study.training
        return train_experts(cohort, plan, initial=m0, config=config, seed=self.study.seed)

    def _private(self, cohort: Cohort, epsilon: float) -> Abmil:
        known = max(5, round(len(cohort) / 5) * 5)
        mechanism = mechanism_for(epsilon, known)
        started = time.perf_counter()
        expert = train_private(
            cohort,
            initial=initial(self.study),
            config=self.study.training,
            mechanism=mechanism,
            clip=Privacy(epsilon=epsilon).clip,
            lot=mechanism.sample_rate * known,
        )
        self.seconds["one private expert"].append(time.perf_counter() - started)
        return expert

    def c_indices(self, epsilon: float | None) -> dict[tuple[Cancer, str], float]:
        """Return the C-index of every arm of every target."""
        bank, local = {}, {}
        for cancer, target in self.targets.items():
            if epsilon is None:
                bank[cancer] = flatten(target.own)[target.plan.model()]
                local[cancer] = target.local_risk()
            else:
                bank[cancer] = flatten(self._private(target.cohort, epsilon))[0]
                local[cancer] = self._held_out(target, epsilon)
        found: dict[tuple[Cancer, str], float] = {}
        for cancer, target in self.targets.items():
            others = torch.stack([bank[c] for c in self.targets if c != cancer])
            sources = Abmil.from_flat(self.study.shape, others).requires_grad_(False)
            opinions = target.consult(sources, self.study)
            stack = RouterStack(target, sources, opinions, self.study)
            stack.train()
            vote = zero_shot(target.pairs, target.folds, [o.risk for o in opinions[1:]])
            shot, (survival, _) = held_out(vote.answers, target.folds), stack.predict()
            risks = dict(zip(ARMS, (local[cancer], shot, -survival.sum(1)), strict=True))
            cohort = target.cohort
            arms = out_of_fold(cohort.days, cohort.event, target.folds, risks, seed=0)
            found |= {(cancer, arm): arms[arm].c_index or np.nan for arm in ARMS}
        return found

    def _held_out(self, target: Target, epsilon: float) -> NDArray[np.float64]:
        risk = np.empty(len(target.cohort))
        for fold in range(3):
            mine = target.folds == fold
            expert = self._private(target.cohort.subset(~mine), epsilon)
            risk[mine] = consult(expert, target.cohort.subset(mine)).risk[0]
        return risk


def initial(study: StudyConfig, *, models: int = 1) -> Abmil:
    """Return M0."""
    return Abmil.initial(study.shape, seed=study.seed, hazard=study.initial_hazard, models=models)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=CANCERS, default="synthetic")
    parser.add_argument("--outcomes", type=Path)
    parser.add_argument("--cancers", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--append", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[float | None, Cancer, str], list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    sizes: dict[Cancer, tuple[int, int]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(options, seed, Path(folder))
            for epsilon in EPSILONS:
                here = bench.c_indices(epsilon)
                for (cancer, arm), c_index in here.items():
                    found[epsilon, cancer, arm].append(c_index)
                of_arms = [[c for (_, of), c in here.items() if of == arm] for arm in ARMS]
                print(f"seed {seed}, {_name(epsilon)}: {_cell(of_arms, mean=True)}", flush=True)
            for what, values in bench.seconds.items():
                seconds[what] += values
            for cancer, target in bench.targets.items():
                sizes[cancer] = (len(target.cohort), int(target.cohort.event.sum()))
    lines = [
        f"## `bench_privacy.py --data {options.data}`: C-index, medians of {options.seeds} seeds, "
        "3 folds, local / zero-shot / routed",
        "",
        "| cancer | patients, deaths | " + " | ".join(map(_name, EPSILONS)) + " |",
        "|---" * (2 + len(EPSILONS)) + "|",
    ]
    for cancer, (patients, deaths) in sizes.items():
        cells = [_cell([found[e, cancer, arm] for arm in ARMS]) for e in EPSILONS]
        lines.append(f"| {cancer} | {patients}, {deaths} | " + " | ".join(cells) + " |")
    means = [
        _cell([[statistics.median(found[e, c, arm]) for c in sizes] for arm in ARMS], mean=True)
        for e in EPSILONS
    ]
    lines += ["| mean | | " + " | ".join(means) + " |", ""]
    one, noisy = (statistics.median(seconds[w]) for w in ("one expert", "one private expert"))
    lines.append(
        f"One expert without noise took {one:.1f} s, a private one {noisy:.1f} s (medians; the "
        "mechanism's calibration is not counted)."
    )
    print("\n".join(lines))
    if options.append:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines) + "\n")


def _name(epsilon: float | None) -> str:
    return "no noise" if epsilon is None else f"epsilon {epsilon:g}"


def _cell(values: list[list[float]], *, mean: bool = False) -> str:
    middle = statistics.fmean if mean else statistics.median
    return " / ".join(f"{middle(v):.2f}".removeprefix("0") for v in values)


if __name__ == "__main__":
    main()
