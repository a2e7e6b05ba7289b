"""Tables of a study: two CSV files, and the summary that the terminal shows.

A C-index reads `.65 (.52-.77)`; `n/e` is one that the patients cannot determine, `-` one that
the study did not evaluate. CSV files leave both empty; `results.json` tells them apart.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from cropkt.files import replace_file
from cropkt.report import values
from cropkt.report.schema import Results, TargetResult, TransferScore
from cropkt.report.sentences import number, signed, summary_lines

__all__ = ["summary_lines", "summary_table", "write_per_cancer_csv", "write_transfer_csv"]

_MISSING = "-"
_NOT_ESTIMABLE = "n/e"
_INTERVAL = len("(.51-1.00)")
_HELPER = len("COADREAD .29,")


def write_transfer_csv(results: Results, path: Path) -> None:
    """Write who helps whom as a square matrix: rows are sources, columns are targets.

    The C-indices come first, in columns named after the target; their standard errors follow,
    in columns `<target>_se`. What is not estimable, or was not measured, is empty.
    """
    transfer = results.get("transfer", {})
    cancers = sorted({*transfer, *(source for scores in transfer.values() for source in scores)})
    rows: list[list[str]] = [["source", *cancers, *(f"{target}_se" for target in cancers)]]
    for source in cancers:
        scores = [transfer.get(target, {}).get(source) for target in cancers]
        rows.append(
            [source, *map(_score_cell, scores), *(_se_cell(score) for score in scores)],
        )
    _write_csv(rows, path)


def write_per_cancer_csv(results: Results, path: Path) -> None:
    """Write one row per target: its cohort, every arm with its interval, source and gain.

    `gain` is the C-index of ROUPKT minus the local one; `gain_low` and `gain_high` are its
    paired 95 % interval where the results give it.
    """
    arms = values.arm_names(results)
    ends = [f"{arm}_{end}" for arm in arms for end in ("c_index", "low", "high")]
    gain = ["gain", "gain_low", "gain_high"]
    rows: list[list[str]] = [["cancer", "patients", "events", "sites", *ends, "best_source", *gain]]
    for cancer, target in values.targets_of(results).items():
        cohort = [target.get("patients"), target.get("events"), target.get("sites")]
        rows.append(
            [
                cancer,
                *("" if count is None else str(count) for count in cohort),
                *(cell for arm in arms for cell in _arm_cells(target, arm)),
                target.get("best_source") or "",
                _csv_number(values.gain(target)),
                *map(_csv_number, values.gain_interval(target) or (None, None)),
            ]
        )
    _write_csv(rows, path)


def summary_table(results: Results) -> Table:
    """Return the table that a terminal shows: one row per target cancer.

    Gains are coloured, but also signed and starred, so they read without colour too.
    """
    targets = values.targets_of(results)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title=_title(results),
        caption_justify="left",
    )
    # On a narrow terminal an interval moves below its C-index, and helpers stack up.
    table.add_column("cancer", no_wrap=True)
    for heading in ("patients", _events_word(results)):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("local", "zero-shot, usual choice", "ROUPKT"):
        table.add_column(heading, min_width=_INTERVAL)
    table.add_column("gain", justify="right", no_wrap=True)
    table.add_column("who helps", min_width=_HELPER)
    for cancer, target in targets.items():
        table.add_row(*_summary_row(cancer, target))
    table.caption = Text(_footnote(targets.values()), style="dim")
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


def _summary_row(cancer: str, target: TargetResult) -> list[Text]:
    counts = [target.get("patients"), target.get("events")]
    return [
        Text(cancer),
        *(Text(_MISSING if count is None else str(count)) for count in counts),
        _arm_text(target, "local"),
        _zero_shot_text(target),
        _arm_text(target, "roupkt"),
        _gain_text(target),
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


def _gain_text(target: TargetResult) -> Text:
    gain = values.gain(target)
    if gain is None:
        both = all(values.arm_of(target, arm) is not None for arm in ("local", "roupkt"))
        return Text(f"{_NOT_ESTIMABLE if both else _MISSING} ", style="dim")
    sure = values.beyond_noise(target)
    text = f"{signed(gain)}{'*' if sure else ' '}"
    colour = "green" if gain > 0 else "red"
    if signed(gain) == ".00":
        colour = "dim"
    return Text(text, style=f"bold {colour}" if sure else colour)


def _helpers_text(cancer: str, target: TargetResult) -> Text:
    found = values.helpers(cancer, target)
    if found is None:
        return Text(_MISSING, style="dim")
    return Text(", ".join(f"{source} {number(weight)}" for source, weight in found) or "nobody")


def _footnote(targets: Iterable[TargetResult]) -> str:
    every = list(targets)
    notes = ["gain: ROUPKT minus local"]
    arms = [values.arm_of(target, arm) for target in every for arm in values.MAIN_ARMS]
    if any(arm is not None and values.finite(arm.get("c_index")) is None for arm in arms):
        notes.append("n/e: not estimable from these patients")
    if any(arm is None for arm in arms):
        notes.append("-: not evaluated")
    if any(values.beyond_noise(target) for target in every):
        notes.append(f"*: the interval of the gain excludes 0 ({values.MIN_EVENTS} events or more)")
    return "; ".join(notes)


def _score_cell(score: TransferScore | None) -> str:
    return _csv_number(score.get("c_index")) if score is not None else ""


def _se_cell(score: TransferScore | None) -> str:
    # A standard error of a C-index that does not exist would only mislead.
    return _csv_number(score.get("se")) if score is not None and _score_cell(score) else ""


def _arm_cells(target: TargetResult, arm: str) -> tuple[str, str, str]:
    low, high = values.interval(target, arm) or (None, None)
    return _csv_number(values.c_index(target, arm)), _csv_number(low), _csv_number(high)


def _csv_number(value: float | None) -> str:
    known = values.finite(value)
    return "" if known is None else f"{known:.6f}"


def _write_csv(rows: Iterable[Sequence[str]], path: Path) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    replace_file(path, text.getvalue().encode())
