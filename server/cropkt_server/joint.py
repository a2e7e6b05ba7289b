"""One answer of several sites that hold the same cancer: every comparable pair counts once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from typing import TypeVar

from cropkt.cancers import Cancer
from cropkt.messages import ArmScore, Cost, ReleaseReply, SourceScore, Voice
from cropkt.report.schema import (
    ArmResult,
    AutoResult,
    CostResult,
    DifferenceResult,
    ShotsResult,
    TransferScore,
    VoiceResult,
)
from cropkt.survival.accuracy import YEARS
from cropkt.survival.across import NORMAL_95
from cropkt_server.findings import shares

Part = TypeVar("Part")


def arm(scores: Sequence[ArmScore], events: int | None, reason: str) -> ArmResult:
    """Return one arm over the sites of a cancer."""
    known = [score for score in scores if score.c_index is not None]
    if not known:
        few = "few" if events is None else str(events)
        return {"c_index": None, "reason": reason or f"{few} deaths, no comparable pair"}
    weight = shares([score.pairs for score in known])
    joint: ArmResult = {
        "c_index": _mean(known, weight, lambda s: s.c_index),
        "se": _error(known, weight, lambda s: s.se),
        "pairs": sum(score.pairs for score in known),
        "gain": _mean(known, weight, lambda s: s.gain),
        "gain_se": _error(known, weight, lambda s: s.gain_se),
        "against": _against(known, weight),
        "c_ipcw": _mean(known, weight, lambda s: s.c_ipcw),
        "brier": _mean(known, weight, lambda s: s.brier),
        "auc": [_mean(known, weight, partial(_auc, year)) for year in range(len(YEARS))],
        "cost": _cost([score.cost for score in known if score.cost is not None]),
    }
    if len(known) == 1:
        only = known[0]
        # Bootstrap intervals and tests of a site cannot be put together with another's.
        joint |= {
            "low": only.low,
            "high": only.high,
            "fold_mean": only.fold_mean,
            "pooled": only.pooled,
            "gain_low": only.gain_low,
            "gain_high": only.gain_high,
            "d_calibration": only.d_calibration,
            "log_rank": only.log_rank,
        }
        return joint
    c_index, se = joint["c_index"], joint.get("se")
    if c_index is not None and se is not None:
        joint["low"] = max(0.0, c_index - NORMAL_95 * se)
        joint["high"] = min(1.0, c_index + NORMAL_95 * se)
    gain, error = joint.get("gain"), joint.get("gain_se")
    if gain is not None and error is not None:
        joint["gain_low"], joint["gain_high"] = gain - NORMAL_95 * error, gain + NORMAL_95 * error
    return joint


def routing(replies: Sequence[ReleaseReply], cancer: Cancer) -> dict[str, float]:
    """Return the mean weight of each expert in the sites' routers."""
    found: dict[str, float] = {}
    for share, reply in zip(_by_events(replies), replies, strict=True):
        for source, value in reply.routing.items():
            name = _name(source, cancer)
            found[name] = found.get(name, 0.0) + share * value
    return found


def auto(replies: Sequence[ReleaseReply]) -> AutoResult | None:
    """Return what the sites' guards decided; None if none told."""
    told = [
        (share, reply.verdict)
        for share, reply in zip(_by_events(replies), replies, strict=True)
        if reply.verdict is not None
    ]
    if not told:
        return None
    candidates: Counter[str] = Counter()
    for _, verdict in told:
        candidates.update({str(name): folds for name, folds in verdict.candidates.items()})
    whole = sum(share for share, _ in told) or 1.0
    return {
        "share": sum(share * verdict.share for share, verdict in told) / whole,
        "candidates": dict(candidates),
        "gain": sum(share * verdict.gain for share, verdict in told) / whole,
    }


def voices(replies: Sequence[ReleaseReply], cancer: Cancer) -> dict[str, VoiceResult]:
    """Return each expert's part in the sites' guarded answers, the own one as "self"."""
    heard: dict[str, list[tuple[float, Voice]]] = {}
    for share, reply in zip(_by_events(replies), replies, strict=True):
        for source, voice in reply.voices.items():
            heard.setdefault(_name(source, cancer), []).append((share, voice))
    found: dict[str, VoiceResult] = {}
    for name, parts in heard.items():
        weight, parts_of = [share for share, _ in parts], [voice for _, voice in parts]
        found[name] = {
            "weight": sum(w * v.weight for w, v in parts),
            "weight_sd": sqrt(sum(w * v.weight_sd**2 for w, v in parts)),
            "cost": _mean(parts_of, shares(weight), lambda v: v.cost),
            "silent": sum(voice.silent for voice in parts_of),
            "contrary": sum(voice.contrary for voice in parts_of),
        }
    return found


def few_shot(replies: Sequence[ReleaseReply]) -> list[ShotsResult]:
    """Return what few training patients gave, every site's draws beside each other."""
    found: dict[int | None, dict[str, list[float]]] = {}
    for reply in replies:
        for shots in reply.few_shot:
            arms = found.setdefault(shots.patients, {})
            for name, values in shots.arms.items():
                arms.setdefault(name, []).extend(values)
    return [{"patients": patients, "arms": arms} for patients, arms in found.items()]


def transfer(scores: Sequence[tuple[SourceScore, int]]) -> TransferScore:
    """Return one source's score over sites, by their events."""
    known = [(score, events) for score, events in scores if score.c_index is not None]
    if not known:
        return {"c_index": None}
    weight, parts = shares([events for _, events in known]), [score for score, _ in known]
    return {
        "c_index": _mean(parts, weight, lambda s: s.c_index),
        "se": _error(parts, weight, lambda s: s.se),
        "lead": _mean(parts, weight, lambda s: s.lead),
        "lead_se": _error(parts, weight, lambda s: s.lead_se),
    }


def _mean(
    parts: Sequence[Part], weight: Sequence[float], of: Callable[[Part], float | None]
) -> float | None:
    """Return a weighted mean over the sites that know a figure; None if none does."""
    known = [
        (w, value) for w, part in zip(weight, parts, strict=True) if (value := of(part)) is not None
    ]
    whole = sum(w for w, _ in known)
    return sum(w * value for w, value in known) / whole if known and whole else None


def _auc(year: int, score: ArmScore) -> float | None:
    return score.auc[year] if year < len(score.auc) else None


def _error(
    parts: Sequence[Part], weight: Sequence[float], of: Callable[[Part], float | None]
) -> float | None:
    """Return the standard error of a weighted mean; None unless every site knows its own."""
    errors = [of(part) for part in parts]
    known = [(w, error) for w, error in zip(weight, errors, strict=True) if error is not None]
    return sqrt(sum((w * e) ** 2 for w, e in known)) if len(known) == len(errors) else None


def _against(scores: Sequence[ArmScore], weight: Sequence[float]) -> dict[str, DifferenceResult]:
    """Return the leads over controls that every site could tell."""
    found: dict[str, DifferenceResult] = {}
    for control in set.intersection(*(set(score.against) for score in scores)):
        parts = [score.against[control] for score in scores]
        if len(parts) == 1:
            only = parts[0]
            found[control] = {
                "value": only.value,
                "se": only.se,
                "low": only.low,
                "high": only.high,
            }
            continue
        value = sum(w * part.value for w, part in zip(weight, parts, strict=True))
        se = sqrt(sum((w * part.se) ** 2 for w, part in zip(weight, parts, strict=True)))
        found[control] = {
            "value": value,
            "se": se,
            "low": value - NORMAL_95 * se,
            "high": value + NORMAL_95 * se,
        }
    return found


def _cost(costs: Sequence[Cost]) -> CostResult:
    peaks = [cost.megabytes for cost in costs if cost.megabytes is not None]
    return {
        "seconds": sum(cost.seconds for cost in costs),
        "megabytes": max(peaks, default=None),
        "gflop": sum(cost.gflop for cost in costs),
        "received_megabytes": sum(cost.received for cost in costs),
        "sent_megabytes": sum(cost.sent for cost in costs),
    }


def _by_events(replies: Sequence[ReleaseReply]) -> list[float]:
    return shares([reply.events or 0 for reply in replies])


def _name(source: Cancer, cancer: Cancer) -> str:
    return "self" if source == cancer else str(source)
