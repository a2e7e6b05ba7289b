"""The sections on who gained: in short, cancer by cancer, arm by arm, and against events."""

from __future__ import annotations

from statistics import fmean

from cropkt.report import values, verdicts
from cropkt.report.blocks import (
    NOT_EVALUATED,
    Cell,
    Grid,
    Picture,
    Section,
    Tile,
    Tone,
    grid,
    plain,
    score,
    spread,
)
from cropkt.report.names import NAMES, named_in_full
from cropkt.report.runs import Runs
from cropkt.report.schema import AcrossResult, Results, TargetResult
from cropkt.report.sentences import cancers, difference, named, p_value
from cropkt.report.verdicts import VERDICTS, Verdict

_TONES: dict[Verdict, Tone] = {"gained": "up", "lost": "down", "same": ""}
_CONTROL_RULE = (
    "A gain counts as transfer only where it is also over both controls: the cancer's own expert "
    "rescaled in the same way, and the same method over experts that never were trained. Each "
    "control could gain by averaging alone, with nothing learnt from other cancers."
)


def in_short(runs: Runs) -> Section:
    """Return how many cancers gained, by how much, and whether it is transfer."""
    results = runs.results
    targets, headline = values.targets_of(results), values.headline(results)
    if not targets:
        return Section("short", "In short", ("No target was evaluated.",))
    gained = verdicts.with_verdict(targets, headline, "gained")
    lost = verdicts.with_verdict(targets, headline, "lost")
    same = verdicts.with_verdict(targets, headline, "same")
    open_ = verdicts.with_verdict(
        targets, headline, "few", "unknown", "not_estimable", "not_evaluated"
    )
    tiles = (
        Tile(len(gained), VERDICTS["gained"], ", ".join(gained), "up"),
        Tile(len(same), VERDICTS["same"], ", ".join(same)),
        Tile(len(lost), VERDICTS["lost"], ", ".join(lost), "down"),
        Tile(len(open_), "cannot be told", ", ".join(open_), "dim"),
    )
    texts = [
        f"Each cancer's own model (local) is compared with the study's answer "
        f"({values.arm_title(headline)}) on the same patients, none of whom the models had seen. "
        f"{_answer(headline)} The C-index says how often the patient who died earlier had the "
        "higher predicted risk: .5 is a coin, 1 is always.",
        *_extreme(targets, headline, gained[:1], "Largest gain"),
        *_extreme(targets, headline, lost[-1:], "Largest loss"),
        _mean_gain(runs, headline),
        _transfer(targets, headline, gained),
    ]
    if failed := results.get("failed"):
        steps = "1 step" if len(failed) == 1 else f"{len(failed)} steps"
        texts.append(f"{steps} of the study failed: see what is missing.")
    return Section("short", "In short", tuple(texts), tiles)


def _answer(headline: str) -> str:
    if headline == "auto":
        return (
            "The answer hears experts of other cancers as far as they helped on the training "
            "patients, and is the local model where none did."
        )
    return "In the answer a router weighs the experts of other cancers for each patient."


def _extreme(
    targets: dict[str, TargetResult], headline: str, names: list[str], words: str
) -> list[str]:
    return [
        f"{words}: {named_in_full(name)}, "
        f"{difference(gain, values.gain_interval(targets[name], headline))}."
        for name in names
        if (gain := values.gain(targets[name], headline)) is not None
    ]


def _mean_gain(runs: Runs, headline: str) -> str:
    across = runs.results.get("across", {}).get(headline, {}).get("local")
    if across is not None:
        ends = spread(runs.across_range(headline, "local"), 3)
        return (
            f"Mean gain over {cancers(across['targets'])} with enough events: "
            f"{difference(across['mean'], (across['low'], across['high']), 3)}"
            f"{f' ({ends})' if ends else ''}. {_rank_test(across)} With this many patients a mean "
            f"gain of {difference(across['detectable'], digits=3)} would have been found four "
            "times in five."
        )
    gains = [
        gain
        for target in values.targets_of(runs.results).values()
        if values.enough_events(target) and (gain := values.gain(target, headline)) is not None
    ]
    if not gains:
        return "A mean gain was not evaluated."
    return (
        f"Mean gain over {cancers(len(gains))} with at least {values.MIN_EVENTS} events: "
        f"{difference(fmean(gains), digits=3)}; the results give no interval of this mean, so it "
        "is not to be told from chance."
    )


def _rank_test(across: AcrossResult) -> str:
    p = values.finite(across["wilcoxon"])
    return "" if p is None else f"Signed-rank test over the cancers: {p_value(p)}."


def _transfer(targets: dict[str, TargetResult], headline: str, gained: list[str]) -> str:
    compared = [c for c, t in targets.items() if values.over_controls(t, headline) is not None]
    if not compared:
        return f"{_CONTROL_RULE} Whether the gains are transfer was not evaluated in this study."
    if not gained:
        return f"{_CONTROL_RULE} No single cancer's gain is beyond chance here."
    yes = [name for name in gained if values.over_controls(targets[name], headline)]
    return f"{_CONTROL_RULE} Of the {len(gained)} that gained, this is shown for {named(yes)}."


def gained(runs: Runs) -> Section:
    """Return the gain of every cancer, with its interval, controls and helpers."""
    results = runs.results
    targets, headline = values.targets_of(results), values.headline(results)
    title = "Who gained, and by how much"
    if not targets:
        return Section("gained", title, (f"{NOT_EVALUATED.capitalize()}.",))
    ranked = verdicts.ranked(targets, headline)
    arm = values.arm_title(headline)
    heads = ["cancer", f"gain: {arm} minus local", "so", "patients", "events", "local", arm]
    controls = [
        control
        for control in values.CONTROLS
        if any(values.lead(target, headline, control) for target in targets.values())
    ]
    heads += ["transfer", *(f"over {values.arm_title(c)}" for c in controls), "who helps"]
    table = grid(
        "C-index and gain of each cancer, with 95 % intervals, largest gain first",
        heads,
        (_gain_row(runs, cancer, targets[cancer], headline, controls) for cancer in ranked),
    )
    texts = (
        "Gained: the whole 95 % interval of the gain lies above 0. Lost: the whole interval lies "
        "below 0. Otherwise there is no difference that these patients could show, which is not "
        "the same as no difference. n/e: not estimable, as too few patients died to compare any; "
        f"below {values.MIN_EVENTS} events every number is noise.",
        "Gains are differences on the same patients, so their intervals are narrower than those "
        "of the two C-indices suggest. Cancers are judged one by one here: of twenty without any "
        "true difference, one would be expected to look like a gain or a loss.",
    )
    picture = Picture(
        "gained",
        f"Forest plot of the gain of {arm} over local in each cancer, with 95 % intervals; "
        "the table below has the same numbers.",
    )
    return Section("gained", title, texts, picture=picture, grids=(table,))


def _gain_row(
    runs: Runs, cancer: str, target: TargetResult, headline: str, controls: list[str]
) -> list[Cell | str]:
    found, gain = verdicts.verdict(target, headline), values.gain(target, headline)
    counts = [target.get("patients"), target.get("events")]
    helpers = values.helpers(cancer, target)
    heard = ", ".join(f"{source} {100 * weight:.0f} %" for source, weight in helpers or ())
    return [
        Cell(cancer, note=NAMES.get(cancer, "")),
        Cell("–", "dim")
        if gain is None
        else Cell(
            difference(gain, values.gain_interval(target, headline)),
            _TONES.get(found, "dim"),
            spread(runs.gain_range(cancer, headline)),
        ),
        Cell(VERDICTS[found], _TONES.get(found, "dim")),
        *(Cell("not told", "dim") if count is None else str(count) for count in counts),
        _arm_cell(target, "local"),
        _arm_cell(target, headline),
        verdicts.transferred(target, headline),
        *(_lead_cell(target, headline, control) for control in controls),
        NOT_EVALUATED if helpers is None else heard or "nobody",
    ]


def _arm_cell(target: TargetResult, arm: str) -> Cell:
    if values.arm_of(target, arm) is None:
        return Cell(NOT_EVALUATED, "dim")
    return score(values.c_index(target, arm), values.interval(target, arm))


def _lead_cell(target: TargetResult, arm: str, control: str) -> Cell:
    found = values.lead(target, arm, control)
    if found is None:
        return Cell("–", "dim")
    tone: Tone = "up" if found["low"] > 0 else "down" if found["high"] < 0 else ""
    return Cell(difference(found["value"], (found["low"], found["high"])), tone)


def against_events(runs: Runs) -> Section:
    """Return the gain against the number of events."""
    results = runs.results
    headline, title = values.headline(results), "Gain against events"
    known = [
        t
        for t in values.targets_of(results).values()
        if (t.get("events") or 0) > 0 and values.gain(t, headline) is not None
    ]
    if not known:
        return Section("events", title, (f"{NOT_EVALUATED.capitalize()}: no gain to show.",))
    texts = (
        "The fewer patients died, the less a cancer can learn from its own, and the more it may "
        "gain; and the wider is its interval. Few events and a wide interval belong together: a "
        "large gain at the left is weak evidence.",
    )
    alt = "Gain over local against the number of events of each cancer, on a logarithmic axis."
    return Section("events", title, texts, picture=Picture("gain", alt))


def arms(runs: Runs) -> Section:
    """Return how the arms compare over all cancers, and the C-index of each in each cancer."""
    results = runs.results
    names, across = values.arm_names(results), results.get("across", {})
    title = "All ways to predict, compared"
    if not names:
        return Section("arms", title, (f"{NOT_EVALUATED.capitalize()}.",))
    told = [(values.arm_title(arm), _WHAT[arm]) for arm in names if arm in _WHAT]
    texts = []
    grids = [
        _every_c_index(results, names),
        grid("What the arms are", ("arm", "what it is"), told),
    ]
    picture = None
    if across:
        texts.append(
            "Means over cancers are random-effects means: a cancer with many events counts more, "
            "but none outweighs all others. The last column is the smallest mean gain that would "
            "have been found with 80 % power. These comparisons are not adjusted for their number."
        )
        grids.insert(0, _across_grid(runs, names))
        picture = Picture(
            "arms", "Forest plot of each arm's mean difference from local over the cancers."
        )
    else:
        texts.append("A comparison over all cancers together was not evaluated in this study.")
    return Section("arms", title, tuple(texts), picture=picture, grids=tuple(grids))


_WHAT = {
    "local": "the cancer's own expert",
    "finetune": "the best source's expert, trained on with the cancer's own patients",
    "zero_shot": "experts of other cancers as they are, chosen on the training patients",
    "vote": "all experts of other cancers, with equal weight",
    "roupkt": "the router as published (ROUPKT)",
    "roupkt+": "the same router with cropkt's repairs",
    "merge": "experts' weights merged into one model (STEPH)",
    "stack": "one weight for each expert",
    "fedavg": "one model for all cancers",
    "fedavg_tuned": "that model, trained on with the cancer's own patients",
    "auto": "the guarded answer, which goes back to local where nothing helps",
    "random_init": "a control, the guarded answer over experts that never were trained",
    "permuted": "a control, over experts trained on shuffled outcomes",
    "mean_pool": "a control, an expert of the mean patch",
    "self_only": "a control, the own expert rescaled",
}


def _across_grid(runs: Runs, names: list[str]) -> Grid:
    across = runs.results.get("across", {})
    heads = ["arm", "cancers", "minus local", "signed-rank test", "between cancers (SD)"]
    heads += [f"minus {values.arm_title(control)}" for control in values.CONTROLS]
    rows = []
    for arm in names:
        found = across.get(arm, {})
        if not found:
            continue
        local = found.get("local")
        p = values.finite(local["wilcoxon"]) if local else None
        rows.append(
            [
                values.arm_title(arm),
                str(max(one["targets"] for one in found.values())),
                _mean_cell(runs, arm, "local"),
                Cell("–", "dim") if p is None else p_value(p),
                plain(local["between"] if local else None, 3),
                *(_mean_cell(runs, arm, control) for control in values.CONTROLS),
                plain(local["detectable"] if local else None, 3),
            ]
        )
    caption = "Mean difference in C-index over the cancers, with 95 % intervals"
    return grid(caption, [*heads, "detectable"], rows)


def _mean_cell(runs: Runs, arm: str, baseline: str) -> Cell:
    found = runs.results.get("across", {}).get(arm, {}).get(baseline)
    if found is None:
        return Cell("–", "dim")
    tone: Tone = "up" if found["low"] > 0 else "down" if found["high"] < 0 else ""
    ends = runs.across_range(arm, baseline)
    return Cell(difference(found["mean"], (found["low"], found["high"]), 3), tone, spread(ends, 3))


def _every_c_index(results: Results, names: list[str]) -> Grid:
    rows = [
        [Cell(cancer), *(_arm_cell(target, arm) for arm in names)]
        for cancer, target in values.targets_of(results).items()
    ]
    heads = ["cancer", *(values.arm_title(arm) for arm in names)]
    return grid("C-index of every arm in every cancer, with 95 % intervals", heads, rows)
