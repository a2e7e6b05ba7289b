"""The summary of a study that a terminal shows.

A C-index reads `.65 (.52-.77)`; `n/e` is one that the patients cannot determine, `-` one that
the study did not evaluate.
"""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from cropkt.report import values
from cropkt.report.schema import Results, TargetResult
from cropkt.report.sentences import number, signed, summary_lines

__all__ = ["summary_lines", "summary_table"]

_MISSING = "-"
_NOT_ESTIMABLE = "n/e"
_INTERVAL = len("(.51-1.00)")
_HELPER = len("COADREAD .29,")


def summary_table(results: Results) -> Table:
    """Return the table that a terminal shows: one row per target cancer.

    Gains are coloured, but also signed and starred, so they read without colour too.
    """
    targets, main = values.targets_of(results), values.main_arms(results)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title=_title(results),
        caption_justify="left",
    )
    # On a narrow terminal an interval moves below its C-index, and helpers stack up.
    table.add_column("cancer", no_wrap=True)
    table.add_column(f"n/{_events_word(results)}", justify="right", no_wrap=True)
    for arm in main:
        choice = ", usual choice" if arm == "zero_shot" else ""
        table.add_column(f"{values.arm_title(arm)}{choice}", min_width=_INTERVAL)
    table.add_column("gain", justify="right", no_wrap=True)
    table.add_column("who helps", min_width=_HELPER)
    for cancer, target in targets.items():
        table.add_row(*_summary_row(cancer, target, main))
    table.caption = Text(_footnote(list(targets.values()), main), style="dim")
    return table


def _title(results: Results) -> Text:
    facts = [f"C-index of {results.get('endpoint', 'survival')} per target cancer"]
    if "data" in results:
        facts.append(f"{results['data']} data")
    if "folds" in results:
        facts.append(f"{results['folds']} folds")
    return Text(", ".join(facts), style="bold")


def _events_word(results: Results) -> str:
    # Progression and disease-free endpoints count more than deaths.
    return "deaths" if results.get("endpoint") in ("DSS", "OS") else "events"


def _summary_row(cancer: str, target: TargetResult, main: list[str]) -> list[Text]:
    counts = [target.get("patients"), target.get("events")]
    return [
        Text(cancer),
        Text("/".join(_MISSING if count is None else str(count) for count in counts)),
        *(
            _zero_shot_text(target) if arm == "zero_shot" else _arm_text(target, arm)
            for arm in main
        ),
        _gain_text(target, main[-1]),
        _helpers_text(cancer, target),
    ]


def _arm_text(target: TargetResult, arm: str) -> Text:
    c_index = values.c_index(target, arm)
    if c_index is None:
        known = values.arm_of(target, arm) is not None
        return Text(_NOT_ESTIMABLE if known else _MISSING, style="dim")
    ends = values.interval(target, arm)
    return Text(
        f"{number(c_index)} ({number(ends[0])}-{number(ends[1])})" if ends else number(c_index)
    )


def _zero_shot_text(target: TargetResult) -> Text:
    """Return the C-index and, aligned on a wide terminal, the source chosen most often."""
    text = _arm_text(target, "zero_shot")
    choice = values.usual_choice(target)
    if choice is None or values.c_index(target, "zero_shot") is None:
        return text
    name, folds, of = choice
    return text.append(" " * max(1, len(".65 (.51-1.00) ") - len(text)) + f"{name} {folds}/{of}")


def _gain_text(target: TargetResult, headline: str) -> Text:
    gain = values.gain(target, headline)
    if gain is None:
        both = all(values.arm_of(target, arm) is not None for arm in ("local", headline))
        return Text(f"{_NOT_ESTIMABLE if both else _MISSING} ", style="dim")
    sure = values.beyond_noise(target, headline)
    text = f"{signed(gain)}{'*' if sure else ' '}"
    colour = "green" if gain > 0 else "red"
    if signed(gain) == ".00":
        colour = "dim"
    return Text(text, style=f"bold {colour}" if sure else colour)


def _helpers_text(cancer: str, target: TargetResult) -> Text:
    found = values.helpers(cancer, target)
    if found is None:
        return Text(_MISSING, style="dim")
    if (together := values.heard_alike(cancer, target)) is not None:
        return Text(f"all alike: {number(together)}")
    return Text(", ".join(f"{source} {number(weight)}" for source, weight in found) or "nobody")


def _footnote(targets: list[TargetResult], main: list[str]) -> str:
    headline = main[-1]
    notes = [f"gain: {values.arm_title(headline)} minus local"]
    arms = [values.arm_of(target, arm) for target in targets for arm in main]
    if any(arm is not None and values.finite(arm.get("c_index")) is None for arm in arms):
        notes.append("n/e: not estimable from these patients")
    if any(arm is None for arm in arms):
        notes.append("-: not evaluated")
    if any(values.beyond_noise(target, headline) for target in targets):
        notes.append(f"*: the interval of the gain excludes 0 ({values.MIN_EVENTS} events or more)")
    return "; ".join(notes)
