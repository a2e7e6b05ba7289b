"""What a study found, gathered from its replies into one dictionary (`results.json`)."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

import numpy as np

from cropkt.cancers import Cancer
from cropkt.messages import ReleaseReply, SourceScore, TransferReply
from cropkt.report.schema import FailedRow, Results, TargetResult, TransferScore
from cropkt.transfer.arms import ARMS
from cropkt_server import joint
from cropkt_server.comparison import across_targets, adjust, experts
from cropkt_server.findings import total
from cropkt_server.store import Task
from cropkt_server.study import Study


def results(study: Study) -> Results:
    """Return everything that the study's replies say, the same for the same replies."""
    config = study.config
    targets = {
        str(cancer): _target(study, cancer, sites) for cancer, sites in study.holders().items()
    }
    transfer: dict[str, dict[str, TransferScore]] = {
        str(cancer): _transfer(study, cancer, targets[cancer]) for cancer in study.trained()
    }
    adjust(transfer, targets)
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
        "config": asdict(config),
        "targets": targets,
        "transfer": transfer,
        "across": across_targets(targets),
        "experts": experts(transfer, targets),
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
    for arm in ARMS:
        scores = [reply.arms[arm] for reply in replies if arm in reply.arms]
        if scores:
            target["arms"][arm] = joint.arm(scores, replies[0].events, replies[0].reason)
    choice: Counter[str] = Counter()
    for reply in replies:
        choice.update({str(name): folds for name, folds in reply.zero_shot_choice.items()})
    target["routing"] = joint.routing(replies, cancer)
    target["zero_shot_choice"] = dict(choice)
    target["best_source"] = _best_source(study, cancer)
    if (decided := joint.auto(replies)) is not None:
        target["auto"] = decided
        target["voices"] = joint.voices(replies, cancer)
    if shots := joint.few_shot(replies):
        everybody = {a: [r["c_index"]] for a, r in target["arms"].items() if r["c_index"]}
        compared = {arm for row in shots for arm in row["arms"]}
        whole = {arm: values for arm, values in everybody.items() if arm in compared}
        target["few_shot"] = [*shots, {"patients": None, "arms": whole}]
    return target


def _transfer(study: Study, cancer: Cancer, target: TargetResult) -> dict[str, TransferScore]:
    """Return each source's C-index on this target, over its sites by events.

    The diagonal is the target's own expert, out of fold.
    """
    found: dict[str, list[tuple[SourceScore, int]]] = {}
    for task in study.done("score_sources", cancer):
        reply, events = study.answer(task, TransferReply), _events(study, task)
        for source, score in zip(study.asked(task), reply.scores, strict=True):
            found.setdefault(source, []).append((score, events))
    transfer = {str(source): joint.transfer(scores) for source, scores in found.items()}
    if local := target.get("arms", {}).get("local"):
        transfer[cancer] = {"c_index": local["c_index"], "se": local.get("se")}
    return transfer


def _best_source(study: Study, cancer: Cancer) -> str | None:
    """Return the source with the best mean C-index on the training patients of the folds."""
    found: dict[str, list[float]] = {}
    for task in study.done("score_sources", cancer):
        for row in study.answer(task, TransferReply).training_scores:
            for source, score in zip(study.asked(task), row, strict=True):
                if score.c_index is not None:
                    found.setdefault(source, []).append(score.c_index)
    means = {source: float(np.mean(values)) for source, values in found.items()}
    return max(means, key=lambda source: means[source], default=None)


def _events(study: Study, task: Task) -> int:
    counts = study.descriptions()[task.site].cohorts
    return next(count.events or 0 for count in counts if count.cancer == task.cancer)
