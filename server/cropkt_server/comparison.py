"""What may be concluded over all targets: the transfer matrix, the arms, each expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cropkt.report.schema import AcrossResult, ExpertResult, TargetResult, TransferScore
from cropkt.report.values import enough_events
from cropkt.survival.across import across
from cropkt.survival.multiplicity import benjamini_hochberg, holm, two_sided

TRIFLE = 0.03  # of a C-index, which would help nobody
_BASELINES = ("local", "self_only", "random_init")
Transfer = Mapping[str, dict[str, TransferScore]]


def adjust(transfer: Transfer, targets: Mapping[str, TargetResult]) -> None:
    """Add p values to the pairs of the transfer matrix, adjusted over all that can be tested.

    A pair is tested where its target has enough events: its C-index against .5, and its lead over
    untrained experts against 0. The others keep None: not estimable.
    """
    scores = [
        score
        for target, row in transfer.items()
        if enough_events(targets[target])
        for source, score in row.items()
        if source != target
    ]
    half = two_sided(_column(scores, "c_index") - 0.5, _column(scores, "se"))
    random = two_sided(_column(scores, "lead"), _column(scores, "lead_se"))
    columns = {
        "p_half": half,
        "p_half_bh": benjamini_hochberg(half),
        "p_half_holm": holm(half),
        "p_random": random,
        "p_random_bh": benjamini_hochberg(random),
        "p_random_holm": holm(random),
    }
    for name, values in columns.items():
        for score, value in zip(scores, values, strict=True):
            score[name] = float(value) if np.isfinite(value) else None  # type: ignore[literal-required]


def across_targets(targets: Mapping[str, TargetResult]) -> dict[str, dict[str, AcrossResult]]:
    """Return each arm against `local` and the controls, over the targets with enough events."""
    found: dict[str, dict[str, AcrossResult]] = {}
    arms = {arm for target in targets.values() for arm in target.get("arms", {})}
    for arm in sorted(arms):
        for baseline in _BASELINES:
            pairs = np.array(list(_differences(targets, arm, baseline))).reshape(-1, 2)
            summary = across(pairs[:, 0], pairs[:, 1])
            if summary is not None:
                low, high = summary.interval
                found.setdefault(arm, {})[baseline] = {
                    "targets": summary.cohorts,
                    "mean": summary.mean,
                    "low": low,
                    "high": high,
                    "between": summary.between,
                    "wilcoxon": summary.wilcoxon,
                    "detectable": summary.detectable,
                }
    return found


def experts(transfer: Transfer, targets: Mapping[str, TargetResult]) -> dict[str, ExpertResult]:
    """Return what each expert is worth to the others, and whether it is harmful."""
    found: dict[str, ExpertResult] = {}
    for source in sorted({source for row in transfer.values() for source in row}):
        scores = [
            row[source]
            for target, row in transfer.items()
            if source in row and source != target and enough_events(targets[target])
        ]
        summary = across(_column(scores, "c_index"), _column(scores, "se"))
        if summary is None:
            continue
        low, high = summary.interval
        found[source] = {
            "targets": summary.cohorts,
            "c_index": summary.mean,
            "low": low,
            "high": high,
            "verdict": _verdict(source, targets, low, high),
        }
    return found


def _verdict(source: str, targets: Mapping[str, TargetResult], low: float, high: float) -> str:
    """Return an expert's worth in a word.

    "silent" if most guards found that it says the same of everybody, "contrary" if it is wrong
    over all targets together, "helps" if it is right, "no use" if it is at most a trifle better
    than chance, and "unclear" where that cannot be told.
    """
    heard = [t["voices"][source] for t in targets.values() if source in t.get("voices", {})]
    if heard and sum(voice["silent"] > 0 for voice in heard) > len(heard) / 2:
        return "silent"
    if high < 0.5:
        return "contrary"
    if low > 0.5:
        return "helps"
    return "no use" if high < 0.5 + TRIFLE else "unclear"


def _differences(
    targets: Mapping[str, TargetResult], arm: str, baseline: str
) -> Iterator[tuple[float, float]]:
    """Yield an arm's lead over a baseline and its error, of each target that knows both."""
    for target in targets.values():
        found = target.get("arms", {}).get(arm)
        if found is None or not enough_events(target) or arm == baseline:
            continue
        if baseline == "local":
            value, error = found.get("gain"), found.get("gain_se")
        else:
            lead = found.get("against", {}).get(baseline)
            value, error = (lead["value"], lead["se"]) if lead else (None, None)
        if value is not None and error is not None:
            yield value, error


def _column(
    scores: list[TransferScore], name: Literal["c_index", "se", "lead", "lead_se"]
) -> NDArray[np.float64]:
    return np.array([np.nan if (v := s.get(name)) is None else v for s in scores], dtype=float)
