"""What a study's numbers say, as plain sentences for under the table."""

from __future__ import annotations

from statistics import fmean

from cropkt.report import values
from cropkt.report.schema import Results, TargetResult


def number(value: float, digits: int = 2) -> str:
    """Return a C-index or weight without the leading zero: `.65`, `1.00`."""
    text = f"{value:.{digits}f}"
    if text.strip("-0.") == "":
        text = text.removeprefix("-")  # no "-.00"
    return text.replace("0.", ".", 1) if text.removeprefix("-").startswith("0.") else text


def signed(value: float, digits: int = 2) -> str:
    """Return a gain with its sign, `+.04` or `-.03`; one that rounds to 0 has none."""
    text = number(value, digits)
    return text if text.startswith("-") or not text.strip("0.") else f"+{text}"


def difference(value: float, ends: tuple[float, float] | None = None, digits: int = 2) -> str:
    """Return a difference with its interval: `+.04 (-.01 to +.09)`.

    A third digit is shown where an end would read as .00, so that its sign is seen.
    """
    if ends is not None and any(0 < abs(end) < 0.5 * 10**-digits for end in ends):
        digits = 3
    text = signed(value, digits)
    return f"{text} ({signed(ends[0], digits)} to {signed(ends[1], digits)})" if ends else text


def summary_lines(results: Results) -> list[str]:
    """Return sentences on means, gains, what could not be estimated, and what failed.

    Means go over the cancers with at least `values.MIN_EVENTS` events in which every main arm
    is estimable, so that all arms are judged on the same cancers.
    """
    targets, headline = values.targets_of(results), values.headline(results)
    lines = [*_means(results, targets), *_gains(targets, headline), *_intervals(targets, headline)]
    lines += [*planted(results), *not_estimable(targets), *failed(results)]
    return lines if targets else ["No target was evaluated.", *lines]


def _means(results: Results, targets: dict[str, TargetResult]) -> list[str]:
    known = {c: t for c, t in targets.items() if values.enough_events(t)}
    if not known:
        return ["No cancer has 5 events, so no mean is given."] if targets else []
    arms = values.arm_names(results)
    main = [arm for arm in values.main_arms(results) if arm in arms]
    complete = [t for t in known.values() if main and _all_estimable(t, main)]
    lines = []
    if complete:
        means = ", ".join(f"{values.arm_title(a)} {_mean(complete, a)}" for a in main)
        lines.append(
            f"Mean C-index over {cancers(len(complete))} with at least "
            f"{values.MIN_EVENTS} events: {means}."
        )
    left_out = [c for c, t in known.items() if not main or not _all_estimable(t, main)]
    if left_out:
        lines.append(f"Left out of the mean, for want of an arm: {', '.join(left_out)}.")
    others = [arm for arm in arms if arm not in main]
    return lines + [line for arm in others for line in _further_arm(known, arm)]


def _further_arm(known: dict[str, TargetResult], arm: str) -> list[str]:
    both = [t for t in known.values() if values.gain(t, arm) is not None]
    if not both:
        return []
    return [
        (
            f"{values.arm_title(arm)}: mean C-index {_mean(both, arm)} against local "
            f"{_mean(both, 'local')}, over {cancers(len(both))}."
        )
    ]


def _gains(targets: dict[str, TargetResult], headline: str) -> list[str]:
    gains = {
        c: g
        for c, t in targets.items()
        if values.enough_events(t) and (g := values.gain(t, headline)) is not None
    }
    if not gains:
        return []
    above = sum(gain > 0 for gain in gains.values())
    below = sum(gain < 0 for gain in gains.values())
    line = (
        f"{values.arm_title(headline)} is above local in {above} and below it in {below} of "
        f"{cancers(len(gains))} with at least {values.MIN_EVENTS} events"
    )
    with_interval = [c for c in gains if values.gain_interval(targets[c], headline) is not None]
    if not with_interval:
        return [f"{line}; no interval of a gain is given, so none can be told from noise."]
    ups = [c for c in with_interval if values.beyond_noise(targets[c], headline) > 0]
    downs = [c for c in with_interval if values.beyond_noise(targets[c], headline) < 0]
    of = "" if len(with_interval) == len(gains) else f" of the {len(with_interval)} that have one"
    return [
        f"{line}.",
        (
            f"The interval of the gain lies above 0 in {named(ups)} "
            f"and below 0 in {named(downs)}{of}."
        ),
    ]


def _intervals(targets: dict[str, TargetResult], headline: str) -> list[str]:
    pairs = [
        (a, b)
        for t in targets.values()
        if (a := values.interval(t, "local")) and (b := values.interval(t, headline))
    ]
    if any(values.interval(t, arm) for t in targets.values() for arm in t.get("arms", {})):
        line = "Intervals in brackets are 95 % bootstrap intervals over patients"
        overlap = sum(a[0] <= b[1] and b[0] <= a[1] for a, b in pairs)
        if pairs:
            line += (
                f"; those of local and {values.arm_title(headline)} overlap in {overlap} of "
                f"{cancers(len(pairs))}"
            )
        return [f"{line}."]
    return []


def planted(results: Results) -> list[str]:
    """Return what the simulator planted, and whether the study found it."""
    truth = results.get("planted")
    if not truth:
        return []
    lines = []
    if "targets_routed_to_relatives" in truth and "of" in truth:
        lines.append(
            "Synthetic data: routing put more weight on the planted relatives than on "
            f"the rest for {truth['targets_routed_to_relatives']} of {truth['of']} "
            "targets."
        )
    best = [
        value
        for v in truth.get("best_c_index", {}).values()
        if (value := values.finite(v)) is not None
    ]
    if best:
        lines.append(
            f"Synthetic data: the planted risk itself would reach a mean C-index of "
            f"{number(fmean(best), 3)} over {cancers(len(best))}."
        )
    return lines


def not_estimable(targets: dict[str, TargetResult]) -> list[str]:
    """Return which arms are not estimable, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for cancer, target in targets.items():
        for arm, found in target.get("arms", {}).items():
            if values.finite(found.get("c_index")) is None:
                key = cancer, found.get("reason") or "no reason given"
                reasons.setdefault(key, []).append(values.arm_title(arm))
    return [
        f"Not estimable: {cancer} {', '.join(arms)} ({reason})."
        for (cancer, reason), arms in reasons.items()
    ]


def failed(results: Results) -> list[str]:
    """Return what failed, and why."""
    return [
        f"Failed: {row['row']} ({row.get('cause') or 'no cause recorded'})."
        for row in results.get("failed", [])
    ]


def _all_estimable(target: TargetResult, arms: list[str]) -> bool:
    return all(values.c_index(target, arm) is not None for arm in arms)


def _mean(targets: list[TargetResult], arm: str) -> str:
    return number(fmean(c for t in targets if (c := values.c_index(t, arm)) is not None), 3)


def cancers(count: int) -> str:
    """Return a number of cancers in words."""
    return "1 cancer" if count == 1 else f"{count} cancers"


def named(codes: list[str]) -> str:
    """Return how many cancers there are and which."""
    return f"{len(codes)} ({', '.join(codes)})" if codes else "none"


def p_value(value: float) -> str:
    """Return a p value as `p = .03`, the small ones as `p < .001`."""
    return "p < .001" if value < 0.001 else f"p = {number(value, 2 if value >= 0.095 else 3)}"
