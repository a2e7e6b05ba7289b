"""Several seeds of one study as one results dictionary.

A number is the mean over the seeds where every seed has it, and not estimable otherwise. The ends
of an interval are means too: seeds share their patients, so more seeds do not make an interval
narrower. p values become twice their median, at most 1, which holds however they depend on one
another (Meinshausen, Meier and Buehlmann, doi:10.1198/jasa.2009.tm08647). Folds and planted
relatives are counted together; survival curves are those of the first seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import cast

from cropkt.report.schema import FailedRow, Results, ShotsResult, VoiceResult

P_VALUES = frozenset(
    (
        "p_half",
        "p_half_bh",
        "p_half_holm",
        "p_random",
        "p_random_bh",
        "p_random_holm",
        "d_calibration",
        "log_rank",
        "wilcoxon",
    )
)
_COUNTED = frozenset(("silent", "contrary", "targets_routed_to_relatives", "of"))
_COUNTS = frozenset(("zero_shot_choice", "candidates"))
_WEIGHTS = frozenset(("routing", *_COUNTS))
_FIRST = frozenset(("kaplan_meier", "relatives", "config", "seed"))


def together(runs: Sequence[Results]) -> Results:
    """Return the results of several seeds of one study as one."""
    merged = cast(Results, _merge("", list(runs)))
    merged.pop("seed", None)  # there is no mean of them
    rows: list[FailedRow] = []
    for run in runs:
        seed = f"seed {run['seed']}: " if "seed" in run else ""
        rows += [row | {"row": f"{seed}{row['row']}"} for row in run.get("failed", [])]
    merged["failed"] = rows
    return merged


def _merge(name: str, found: list[object]) -> object:
    """Return several values of one key as one."""
    first = found[0]
    if name in _FIRST:
        return first
    if any(value is None for value in found):
        return None
    if isinstance(first, dict):
        return _merge_records(name, cast(list[dict[str, object]], found))
    if isinstance(first, list):
        return _merge_lists(name, cast(list[list[object]], found))
    if isinstance(first, int | float):
        return _merge_numbers(name, cast(list[float], found))
    texts = list(dict.fromkeys(map(str, found)))
    if len(texts) > 1 and name == "verdict":
        return "unclear"
    return " / ".join(texts)


def _merge_records(name: str, found: list[dict[str, object]]) -> dict[str, object]:
    if name == "voices":
        return dict(_merge_voices(cast(list[dict[str, VoiceResult]], found)))
    if name in _WEIGHTS:  # a name that is not there weighs nothing
        names = sorted({key for record in found for key in record})
        filled = [[record.get(key, 0) for record in found] for key in names]
        counted = "of" if name in _COUNTS else ""
        return {key: _merge(counted, several) for key, several in zip(names, filled, strict=True)}
    keys = [key for key in found[0] if all(key in record for record in found)]
    merged = {key: _merge(key, [record[key] for record in found]) for key in keys}
    reasons = [record["reason"] for record in found if "reason" in record]
    if reasons:  # of one seed: what is not estimable there has no mean
        merged["reason"] = reasons[0]
    return merged


def _merge_voices(found: list[dict[str, VoiceResult]]) -> dict[str, VoiceResult]:
    nothing: VoiceResult = {
        "weight": 0.0,
        "weight_sd": 0.0,
        "cost": None,
        "silent": 0,
        "contrary": 0,
    }
    names = sorted({source for voices in found for source in voices})
    return {
        name: cast(VoiceResult, _merge("voice", [voices.get(name, nothing) for voices in found]))
        for name in names
    }


def _merge_lists(name: str, found: list[list[object]]) -> list[object]:
    if name == "failed":
        return []
    if name == "few_shot":
        return list(_merge_shots(cast(list[list[ShotsResult]], found)))
    length = min(map(len, found))
    return [_merge(name, [several[i] for several in found]) for i in range(length)]


def _merge_shots(found: list[list[ShotsResult]]) -> list[ShotsResult]:
    """Put the draws of every seed beside one another."""
    merged: dict[int | None, dict[str, list[float]]] = {}
    for shots in (shot for several in found for shot in several):
        arms = merged.setdefault(shots["patients"], {})
        for arm, draws in shots["arms"].items():
            arms.setdefault(arm, []).extend(draws)
    return [{"patients": patients, "arms": arms} for patients, arms in merged.items()]


def _merge_numbers(name: str, found: list[float]) -> float:
    if name in _COUNTED:
        return sum(found)
    if name in P_VALUES:
        return found[0] if len(found) == 1 else min(1.0, 2 * median(found))
    return found[0] if len(set(found)) == 1 else fmean(found)
