"""Reading numbers out of a results dictionary, where any of them may be missing.

A number that is absent, None or not finite comes back as None, never as a stand-in value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from cropkt.report.schema import ArmResult, DifferenceResult, Results, TargetResult

HEADLINES = ("auto", "roupkt+", "roupkt")
"""Arms that a study answers with: its headline is the first of these that it has."""
CONTROLS = ("self_only", "random_init")
"""A gain counts as transfer only where it is over both of these."""
STANDS_OUT = 1.5  # times the mean weight of the sources
MIN_EVENTS = 5
"""A C-index from fewer events is noise; means leave such cancers out."""

_ARM_TITLES = {
    "local": "local",
    "finetune": "fine-tuned",
    "zero_shot": "zero-shot",
    "vote": "vote",
    "roupkt": "ROUPKT",
    "roupkt+": "ROUPKT+",
    "merge": "merge",
    "stack": "stack",
    "fedavg": "FedAvg",
    "fedavg_tuned": "FedAvg, tuned",
    "auto": "auto",
    "random_init": "untrained experts",
    "permuted": "permuted labels",
    "mean_pool": "mean pooling",
    "self_only": "own expert, rescaled",
}  # in the order in which tables show them


def arm_title(arm: str) -> str:
    """Return the name of an arm as a reader sees it."""
    return _ARM_TITLES.get(arm, arm.replace("_", " "))


def finite(value: float | None) -> float | None:
    """Return a number as it is, and None for None, NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None


def targets_of(results: Results) -> dict[str, TargetResult]:
    """Return the targets of a study in alphabetical order; empty if it reached none."""
    return dict(sorted(results.get("targets", {}).items()))


def arm_names(results: Results) -> list[str]:
    """Return every arm that some target has: known ones in a fixed order, then others by name."""
    present = {arm for target in targets_of(results).values() for arm in target.get("arms", {})}
    return [a for a in _ARM_TITLES if a in present] + sorted(present.difference(_ARM_TITLES))


def in_order(arms: Iterable[str]) -> list[str]:
    """Return arms in the order in which tables show them; unknown ones last, by name."""
    known = list(_ARM_TITLES)
    return sorted(arms, key=lambda a: (known.index(a) if a in known else len(known), a))


def headline(results: Results) -> str:
    """Return the arm that the study answers with; `auto` if it has none of them."""
    present = arm_names(results)
    return next((arm for arm in HEADLINES if arm in present), HEADLINES[0])


def main_arms(results: Results) -> list[str]:
    """Return the arms that a summary shows: local, zero-shot, one router, the headline.

    The first three are there even where the study lacks them.
    """
    router = "roupkt+" if "roupkt+" in arm_names(results) else "roupkt"
    return list(dict.fromkeys(("local", "zero_shot", router, headline(results))))


def arm_of(target: TargetResult, arm: str) -> ArmResult | None:
    """Return an arm of a target, or None if the study did not evaluate it."""
    return target.get("arms", {}).get(arm)


def c_index(target: TargetResult, arm: str) -> float | None:
    """Return an arm's C-index, or None if it is missing or not estimable."""
    found = arm_of(target, arm)
    return finite(found.get("c_index")) if found is not None else None


def interval(target: TargetResult, arm: str) -> tuple[float, float] | None:
    """Return the 95 % interval of an arm's C-index, or None unless both ends are given."""
    found = arm_of(target, arm)
    return _pair(found.get("low"), found.get("high")) if found is not None else None


def gain(target: TargetResult, arm: str) -> float | None:
    """Return an arm's C-index minus the local one, or None unless both are estimable."""
    ours, local = c_index(target, arm), c_index(target, "local")
    return ours - local if ours is not None and local is not None else None


def gain_interval(target: TargetResult, arm: str) -> tuple[float, float] | None:
    """Return the paired 95 % interval of `gain`, or None unless the results give it.

    It is never derived from the intervals of the two arms: they share their patients, so the
    difference varies less than independent arms would.
    """
    found = arm_of(target, arm)
    if found is None or gain(target, arm) is None:
        return None
    return _pair(found.get("gain_low"), found.get("gain_high"))


def beyond_noise(target: TargetResult, arm: str) -> int:
    """Return 1 or -1 if the interval of the gain lies above or below 0, else 0.

    With fewer than `MIN_EVENTS` events it is 0: resampling so few deaths gives no interval that
    could be trusted.
    """
    ends = gain_interval(target, arm)
    if ends is None or not enough_events(target):
        return 0
    return int(ends[0] > 0) - int(ends[1] < 0)


def enough_events(target: TargetResult) -> bool:
    """Tell whether a target is known to have `MIN_EVENTS` events."""
    return (target.get("events") or 0) >= MIN_EVENTS


def weights_of(target: TargetResult) -> dict[str, float] | None:
    """Return what each expert weighs in the answer, the target's own under "self".

    The voices of the guarded answer if the results have them, else the router's weights; None
    if they have neither.
    """
    if voices := target.get("voices"):
        return {source: voice["weight"] for source, voice in voices.items()}
    return target.get("routing") or None


def helpers(cancer: str, target: TargetResult, count: int = 3) -> list[tuple[str, float]] | None:
    """Return the sources that weigh most, without the target's own expert.

    Returns:
        At most `count` pairs of source and weight, the largest first, leaving out weights that
        read as .00; None if the study did not weigh experts for this target.
    """
    weights = weights_of(target)
    if weights is None:
        return None
    others = [(s, w) for s, w in weights.items() if s not in ("self", cancer) and w >= 0.005]
    return sorted(others, key=lambda pair: (-pair[1], pair[0]))[:count]


def heard_alike(cancer: str, target: TargetResult) -> float | None:
    """Return the weight of all sources together where none stands out, else None.

    None stands out if the heaviest weighs less than `STANDS_OUT` times their mean.
    """
    weights = weights_of(target) or {}
    others = [w for s, w in weights.items() if s not in ("self", cancer) and w > 0]
    if len(others) < 4 or max(others) >= STANDS_OUT * sum(others) / len(others):
        return None
    return sum(others)


def usual_choice(target: TargetResult) -> tuple[str, int, int] | None:
    """Return the zero-shot source chosen most often, in how many folds, and of how many."""
    counts = target.get("zero_shot_choice")
    if not counts:
        return None
    name = min(counts, key=lambda source: (-counts[source], source))
    return name, counts[name], sum(counts.values())


def lead(target: TargetResult, arm: str, control: str) -> DifferenceResult | None:
    """Return an arm's C-index minus a control's, or None if it was not compared or not finite."""
    result = arm_of(target, arm)
    found = result.get("against", {}).get(control) if result is not None else None
    if found is None or None in map(finite, (found["value"], found["low"], found["high"])):
        return None
    return found


def over_controls(target: TargetResult, arm: str) -> bool | None:
    """Tell whether an arm's leads over both controls have intervals above 0.

    Returns:
        None if it was not compared with both of `CONTROLS`.
    """
    leads = [lead(target, arm, control) for control in CONTROLS]
    known = [found for found in leads if found is not None]
    return all(found["low"] > 0 for found in known) if len(known) == len(leads) else None


def _pair(low: float | None, high: float | None) -> tuple[float, float] | None:
    low, high = finite(low), finite(high)
    return (low, high) if low is not None and high is not None else None
