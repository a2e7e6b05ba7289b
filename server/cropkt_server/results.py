"""What a study found, gathered from its replies into one dictionary (`results.json`)."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from math import sqrt

import numpy as np

from cropkt.cancers import Cancer
from cropkt.messages import ArmScore, ReleaseReply, Score, TransferReply
from cropkt.report.schema import ArmResult, FailedRow, Results, TargetResult, TransferScore
from cropkt_server.findings import shares, total
from cropkt_server.store import Task
from cropkt_server.study import Study

NORMAL_95 = 1.959964
_ARMS = ("local", "zero_shot", "roupkt")


def results(study: Study) -> Results:
    """Return everything that the study's replies say, the same for the same replies."""
    config = study.config
    targets = {cancer: _target(study, cancer, sites) for cancer, sites in study.holders().items()}
    return {
        "cropkt": version("cropkt"),
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "flwr": version("flwr"),
        },
        "seed": config.seed,
        "folds": config.folds,
        "endpoint": config.endpoint,
        "config_hash": config.hash(),
        "targets": {str(cancer): target for cancer, target in targets.items()},
        "transfer": {
            cancer: _transfer(study, cancer, targets[cancer]) for cancer in study.trained()
        },
        "failed": _failed(study),
    }


def _failed(study: Study) -> list[FailedRow]:
    """Return the rows that failed, and the rows that sites never came for."""
    rows: list[FailedRow] = [{"row": task.id, "cause": task.cause} for task in study.failures()]
    for site, cause in study.missing().items():
        rows.append({"row": f"describe/{site}", "cause": f"missing: {cause}"})
    return rows


def _target(study: Study, cancer: Cancer, sites: Sequence[str]) -> TargetResult:
    counts = [
        count
        for reply in study.descriptions().values()
        for count in reply.cohorts
        if count.cancer == cancer
    ]
    target: TargetResult = {
        "patients": total([count.patients for count in counts]),
        "events": total([count.events for count in counts]),
        "sites": len(sites),
        "arms": {},
    }
    replies = [study.answer(task, ReleaseReply) for task in study.done("evaluate", cancer)]
    if not replies:
        return target
    for arm in _ARMS:
        scores = [reply.arms[arm] for reply in replies if arm in reply.arms]
        target["arms"][arm] = _together(scores, replies[0].events, replies[0].reason)
    weight = shares([reply.events or 0 for reply in replies])
    routing: dict[str, float] = {}
    choice: Counter[str] = Counter()
    for share, reply in zip(weight, replies, strict=True):
        for source, value in reply.routing.items():
            name = "self" if source == cancer else str(source)
            routing[name] = routing.get(name, 0.0) + share * value
        choice.update({str(name): folds for name, folds in reply.zero_shot_choice.items()})
    target["routing"] = routing
    target["zero_shot_choice"] = dict(choice)
    target["best_source"] = _best_source(study, cancer)
    return target


def _together(scores: Sequence[ArmScore], events: int | None, reason: str) -> ArmResult:
    """Return one arm over the sites of a cancer: every comparable pair counts once."""
    known = [score for score in scores if score.c_index is not None]
    if not known:
        few = "few" if events is None else str(events)
        return {"c_index": None, "reason": reason or f"{few} deaths, no comparable pair"}
    if len(scores) == 1:
        only = scores[0]
        return {
            "c_index": only.c_index,
            "se": only.se,
            "low": only.low,
            "high": only.high,
            "pairs": only.pairs,
            "fold_mean": only.fold_mean,
            "pooled": only.pooled,
            "gain_low": only.gain_low,
            "gain_high": only.gain_high,
        }
    weight = shares([score.pairs for score in known])
    c_index = float(sum(w * (s.c_index or 0.0) for w, s in zip(weight, known, strict=True)))
    se = sqrt(sum((w * (s.se or 0.0)) ** 2 for w, s in zip(weight, known, strict=True)))
    joint: ArmResult = {
        "c_index": c_index,
        "se": se,
        "low": max(0.0, c_index - NORMAL_95 * se),
        "high": min(1.0, c_index + NORMAL_95 * se),
        "pairs": sum(score.pairs for score in known),
    }
    if all(score.gain_se is not None for score in known):
        gain = sum(w * (s.gain or 0.0) for w, s in zip(weight, known, strict=True))
        error = sqrt(sum((w * (s.gain_se or 0.0)) ** 2 for w, s in zip(weight, known, strict=True)))
        joint["gain_low"] = gain - NORMAL_95 * error
        joint["gain_high"] = gain + NORMAL_95 * error
    return joint


def _transfer(study: Study, cancer: Cancer, target: TargetResult) -> dict[str, TransferScore]:
    """Return each source's C-index on this target, over its sites by events.

    The diagonal is the target's own expert, out of fold.
    """
    found: dict[str, list[tuple[Score, int]]] = {}
    for task in study.done("score_sources", cancer):
        reply, events = study.answer(task, TransferReply), _events(study, task)
        for source, score in zip(study.asked(task), reply.scores, strict=True):
            found.setdefault(source, []).append((score, events))
    transfer = {str(source): _mean_score(scores) for source, scores in found.items()}
    if local := target.get("arms", {}).get("local"):
        transfer[cancer] = {"c_index": local["c_index"], "se": local.get("se")}
    return transfer


def _mean_score(scores: Sequence[tuple[Score, int]]) -> TransferScore:
    known = [(s.c_index, s.se or 0.0, n) for s, n in scores if s.c_index is not None]
    if not known:
        return {"c_index": None}
    weight = shares([n for _, _, n in known])
    return {
        "c_index": float(sum(w * c for w, (c, _, _) in zip(weight, known, strict=True))),
        "se": sqrt(sum((w * e) ** 2 for w, (_, e, _) in zip(weight, known, strict=True))),
    }


def _best_source(study: Study, cancer: Cancer) -> str | None:
    """Return the source with the best mean C-index on the training patients of the folds."""
    total: dict[str, list[float]] = {}
    for task in study.done("score_sources", cancer):
        for row in study.answer(task, TransferReply).training_scores:
            for source, score in zip(study.asked(task), row, strict=True):
                if score.c_index is not None:
                    total.setdefault(source, []).append(score.c_index)
    means = {source: float(np.mean(values)) for source, values in total.items()}
    return max(means, key=lambda source: means[source], default=None)


def _events(study: Study, task: Task) -> int:
    counts = study.descriptions()[task.site].cohorts
    return next(count.events or 0 for count in counts if count.cancer == task.cancer)
