"""Reading numbers out of a results dictionary, where any of them may be missing.

A number that is absent, None or not finite comes back as None, never as a stand-in value.
"""

from __future__ import annotations

import math

from cropkt.report.schema import ArmResult, Results, TargetResult

MAIN_ARMS = ("local", "zero_shot", "roupkt")
MIN_EVENTS = 5
"""A C-index from fewer events is noise; means leave such cancers out."""

_ARM_TITLES = {"local": "local", "zero_shot": "zero-shot", "roupkt": "ROUPKT"}


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
    """Return every arm that some target has: the main ones first, then the others by name."""
    present = {arm for target in targets_of(results).values() for arm in target.get("arms", {})}
    return [a for a in MAIN_ARMS if a in present] + sorted(present.difference(MAIN_ARMS))


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


def gain(target: TargetResult, arm: str = "roupkt") -> float | None:
    """Return an arm's C-index minus the local one, or None unless both are estimable."""
    ours, local = c_index(target, arm), c_index(target, "local")
    return ours - local if ours is not None and local is not None else None


def gain_interval(target: TargetResult, arm: str = "roupkt") -> tuple[float, float] | None:
    """Return the paired 95 % interval of `gain`, or None unless the results give it.

    It is never derived from the intervals of the two arms: they share their patients, so the
    difference varies less than independent arms would.
    """
    found = arm_of(target, arm)
    if found is None or gain(target, arm) is None:
        return None
    return _pair(found.get("gain_low"), found.get("gain_high"))


def beyond_noise(target: TargetResult, arm: str = "roupkt") -> int:
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


def helpers(cancer: str, target: TargetResult, count: int = 3) -> list[tuple[str, float]] | None:
    """Return the sources that the router weighs most, without the target's own expert.

    Returns:
        At most `count` pairs of source and weight, the largest first, leaving out weights that
        read as .00; None if the study did not route this target.
    """
    routing = target.get("routing")
    if not routing:
        return None
    others = [(s, w) for s, w in routing.items() if s not in ("self", cancer) and w >= 0.005]
    return sorted(others, key=lambda pair: (-pair[1], pair[0]))[:count]


def usual_choice(target: TargetResult) -> tuple[str, int, int] | None:
    """Return the zero-shot source chosen most often, in how many folds, and of how many."""
    counts = target.get("zero_shot_choice")
    if not counts:
        return None
    name = min(counts, key=lambda source: (-counts[source], source))
    return name, counts[name], sum(counts.values())


def _pair(low: float | None, high: float | None) -> tuple[float, float] | None:
    low, high = finite(low), finite(high)
    return (low, high) if low is not None and high is not None else None
