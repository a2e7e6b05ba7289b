"""Whether a target gained, and whether that gain counts as transfer."""

from __future__ import annotations

from typing import Literal

from cropkt.report import values
from cropkt.report.schema import TargetResult

Verdict = Literal["gained", "same", "lost", "few", "unknown", "not_estimable", "not_evaluated"]

VERDICTS: dict[Verdict, str] = {
    "gained": "gained",
    "same": "no difference that these patients could show",
    "lost": "lost",
    "few": f"too few events to tell (fewer than {values.MIN_EVENTS})",
    "unknown": "not to be told: the results give no interval",
    "not_estimable": "not estimable",
    "not_evaluated": "not evaluated",
}


def verdict(target: TargetResult, arm: str) -> Verdict:
    """Return whether an arm's gain over local is beyond what chance could do to these patients."""
    if values.gain(target, arm) is None:
        both = all(values.arm_of(target, name) is not None for name in ("local", arm))
        return "not_estimable" if both else "not_evaluated"
    if not values.enough_events(target):
        return "few"
    if values.gain_interval(target, arm) is None:
        return "unknown"
    sign = values.beyond_noise(target, arm)
    return "gained" if sign > 0 else "lost" if sign < 0 else "same"


def with_verdict(targets: dict[str, TargetResult], arm: str, *wanted: Verdict) -> list[str]:
    """Return the targets of some verdicts, those that gained most first."""
    return [name for name in ranked(targets, arm) if verdict(targets[name], arm) in wanted]


def ranked(targets: dict[str, TargetResult], arm: str) -> list[str]:
    """Return the targets that gained most first; those whose gain cannot be told come last."""

    def place(name: str) -> tuple[bool, bool, float, str]:
        gain = values.gain(targets[name], arm)
        return (gain is None, verdict(targets[name], arm) == "few", -(gain or 0.0), name)

    return sorted(targets, key=place)


def transferred(target: TargetResult, arm: str) -> str:
    """Return in a word or two whether a gain is transfer; a dash where there was no gain."""
    over = values.over_controls(target, arm)
    if over is None:
        return "not evaluated"
    if verdict(target, arm) != "gained":
        return "–"
    return "yes" if over else "not shown"
