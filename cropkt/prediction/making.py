"""Makes the released model: all that is needed to answer as the guard's final decision would.

Out of fold and final differ, and both are kept. The figures of a study judge each training
patient by models that did not see them (views 1 + f). A patient to come is answered by the models
of all patients (view 0), which nothing on site can judge; the units, the baseline and the cut
points are those of the out-of-fold risks, so an answer may sit a little off its percentile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cropkt
from cropkt.cohort.facts import SlideFacts
from cropkt.config import Arm
from cropkt.experts.abmil import flatten
from cropkt.experts.training import Plan, hash_seed, moments
from cropkt.prediction.kept import PERCENTILES, WHICH, About, OutOfFold, Source, Which, write
from cropkt.survival.baseline import DRAWS, Baseline
from cropkt.survival.bins import bin_ends
from cropkt.survival.metrics import Estimate
from cropkt.transfer.arms import Job, router_arm
from cropkt.transfer.guard import all_risks
from cropkt.transfer.scores import in_units


def release(
    path: Path,
    job: Job,
    *,
    site: str,
    sources: Sequence[Source],
    parents: Sequence[str] = (),
    scores: Mapping[Arm, Estimate],
    facts: SlideFacts,
) -> None:
    """Write the released model of a target.

    Args:
        path: of the file.
        job: the target with its experts, sources, router and the guard's answer.
        site: whose it is.
        sources: the experts of other cancers, in the order of `job.sources`.
        parents: hashes of the cards that the own expert is an average of.
        scores: of every arm, out of fold.
        facts: what the files of the training slides agree on.
    """
    target, study, guarded = job.target, job.study, job.guarded
    cohort, final = target.cohort, guarded.final
    excluded = [() if view == 0 else (view - 1,) for view in range(target.views)]
    own = flatten(target.own).cpu().numpy()[[target.plan.model(*folds) for folds in excluded]]
    baseline = Baseline.of(
        guarded.shown,
        cohort.days,
        cohort.event,
        bins=study.shape.bins,
        seed=hash_seed(study.seed, 8),
    )
    tensors: dict[str, NDArray[Any]] = {
        "units": guarded.units,
        "slope": baseline.slope,
        "hazard": baseline.hazard,
        "scale": np.array([baseline.centre, baseline.spread]),
        "percentiles": _percentiles(job),
        "prior": job.router.module.prior.cpu().numpy(),
    }
    tensors |= {f"own/{view}": row for view, row in enumerate(own)}
    tensors |= {
        f"router/{view}": row for view, row in enumerate(flatten(job.router.module).cpu().numpy())
    }
    tensors |= {f"source/{i}": row for i, row in enumerate(flatten(job.sources).cpu().numpy())}
    if study.training.standardise == "site":
        mean, deviation = moments(cohort, Plan(target.folds, tuple(excluded)))
        tensors |= {f"mean/{view}": row for view, row in enumerate(mean.numpy())}
        tensors |= {f"deviation/{view}": row for view, row in enumerate(deviation.numpy())}
    ends = bin_ends(study.shape.bins)
    arms: dict[Which, Arm] = {"released": "auto", "local": "local"}
    arms["router"] = router_arm(study.router)
    about = About(
        cropkt=cropkt.__version__,
        created=datetime.now(UTC).date().isoformat(),
        site=site,
        cancer=cohort.cancer,
        study=study,
        folds=target.views - 1,
        patients=len(cohort),
        events=int(cohort.event.sum()),
        followed=tuple(int((cohort.days >= end).sum()) for end in ends),
        candidate=final.candidate,
        share=float(np.clip(final.share, 0, 1)),
        gain=final.gain,
        weights=tuple(map(float, final.weights)),
        faults={str(sources[index].cancer): fault for index, fault in final.faults.items()},
        sources=tuple(sources),
        parents=tuple(parents),
        out_of_fold={
            which: OutOfFold(c_index=score.c_index, low=score.low, high=score.high)
            for which, arm in arms.items()
            if (score := scores.get(arm)) is not None and score.c_index is not None
        },
        encoder=facts.encoder or "",
        magnification=facts.magnification,
        patch_size=facts.patch_size,
        draws=DRAWS,
        tensors={},
    )
    write(path, about, tensors)


def final_risk(job: Job) -> NDArray[np.float64]:
    """Return what the guard's final decision says of the training patients, (n,).

    Each is judged by the own expert that left their fold out.
    """
    risks = all_risks(job.target.local_risk(), job.opinions[0].risk)
    risk: NDArray[np.float64] = job.guarded.final.weights @ in_units(risks, *job.guarded.units)
    return risk


def _percentiles(job: Job) -> NDArray[np.float64]:
    """Return the percentiles of the training patients' out-of-fold risk by each model."""
    risk: dict[Which, NDArray[np.float64]] = {
        "released": final_risk(job),
        "local": job.target.local_risk(),
        "router": job.routed[0].risk,
    }
    steps = np.linspace(0, 1, PERCENTILES)
    return np.stack([np.quantile(risk[which], steps) for which in WHICH])
