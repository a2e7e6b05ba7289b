"""The tables of a study as CSV files.

A number that is not estimable, or was not evaluated, is empty; `results.json` tells them apart.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from cropkt.report import values
from cropkt.report.schema import ArmResult, Results, TransferScore

Row = list[str]
_SCORE_KEYS = ("p_half", "p_half_bh", "p_half_holm", "p_random", "p_random_bh", "p_random_holm")
_ARM_KEYS = ("se", "low", "high", "gain", "gain_se", "gain_low", "gain_high")
_FURTHER_KEYS = ("c_ipcw", "brier", "d_calibration", "log_rank")
_YEARS = (1, 3, 5)
_COST_KEYS = ("seconds", "megabytes", "gflop", "received_megabytes", "sent_megabytes")


def csv_files(results: Results) -> dict[str, bytes]:
    """Return every CSV file of a study by its name; those of optional parts only if not empty."""
    tables = {name: rows(results) for name, rows in _FILES.items()}
    return {n: _csv(rows) for n, rows in tables.items() if len(rows) > 1 or n not in _OPTIONAL}


def transfer_rows(results: Results) -> list[Row]:
    """Return who helps whom as a square matrix: rows are sources, columns are targets.

    The C-indices come first, in columns named after the target; their standard errors follow,
    in columns `<target>_se`. What is not estimable, or was not measured, is empty.
    """
    transfer = results.get("transfer", {})
    cancers = sorted({*transfer, *(source for scores in transfer.values() for source in scores)})
    rows: list[Row] = [["source", *cancers, *(f"{target}_se" for target in cancers)]]
    for source in cancers:
        scores = [transfer.get(target, {}).get(source) for target in cancers]
        rows.append(
            [source, *map(_score_cell, scores), *(_se_cell(score) for score in scores)],
        )
    return rows


def pair_rows(results: Results) -> list[Row]:
    """Return one row per ordered pair: its C-index, lead over untrained experts and p values."""
    rows: list[Row] = [["target", "source", "c_index", "se", "lead", "lead_se", *_SCORE_KEYS]]
    for target, scores in sorted(results.get("transfer", {}).items()):
        for source, score in sorted(scores.items()):
            further = [_of(score, key) for key in ("lead", "lead_se", *_SCORE_KEYS)]
            rows.append([target, source, _score_cell(score), _se_cell(score), *further])
    return rows


def per_cancer_rows(results: Results) -> list[Row]:
    """Return one row per target: its cohort, every arm with its interval, source and gain.

    `gain` is the C-index of the headline arm minus the local one; `gain_low` and `gain_high` are
    its paired 95 % interval where the results give it. `over_<control>` is the headline's lead
    over a control; `transfer` says whether its intervals are above 0 for both controls.
    """
    arms, headline = values.arm_names(results), values.headline(results)
    ends = [f"{arm}_{end}" for arm in arms for end in ("c_index", "low", "high")]
    gain = ["headline", "gain", "gain_low", "gain_high"]
    over = [f"over_{control}{end}" for control in values.CONTROLS for end in ("", "_low", "_high")]
    heads = ["cancer", "patients", "events", "sites", *ends, "best_source", *gain, *over]
    rows: list[Row] = [[*heads, "transfer", "auto_share"]]
    for cancer, target in values.targets_of(results).items():
        cohort = [target.get("patients"), target.get("events"), target.get("sites")]
        leads = [values.lead(target, headline, control) for control in values.CONTROLS]
        counts = values.over_controls(target, headline)
        auto = target.get("auto")
        rows.append(
            [
                cancer,
                *("" if count is None else str(count) for count in cohort),
                *(
                    cell
                    for arm in arms
                    for cell in (
                        number(values.c_index(target, arm)),
                        *map(number, values.interval(target, arm) or (None, None)),
                    )
                ),
                target.get("best_source") or "",
                headline,
                number(values.gain(target, headline)),
                *map(number, values.gain_interval(target, headline) or (None, None)),
                *(_of(found or {}, key) for found in leads for key in ("value", "low", "high")),
                "" if counts is None else ("yes" if counts else "no"),
                number(auto["share"] if auto else None),
            ]
        )
    return rows


def arm_rows(results: Results) -> list[Row]:
    """Return one row per target and arm, with everything that was measured of it."""
    targets = values.targets_of(results)
    controls = values.in_order(
        {
            control
            for target in targets.values()
            for arm in target.get("arms", {}).values()
            for control in arm.get("against", {})
        }
    )
    over = [f"over_{control}{end}" for control in controls for end in ("", "_low", "_high")]
    auc = [f"auc{year}" for year in _YEARS]
    heads = ["target", "arm", "c_index", *_ARM_KEYS, *over, *_FURTHER_KEYS, *auc, *_COST_KEYS]
    rows: list[Row] = [[*heads, "reason"]]
    for cancer, target in targets.items():
        for name in values.in_order(target.get("arms", {})):
            arm = target["arms"][name]
            rows.append(
                [
                    cancer,
                    name,
                    *(_of(arm, key) for key in ("c_index", *_ARM_KEYS)),
                    *(
                        _of(arm.get("against", {}).get(control, {}), key)
                        for control in controls
                        for key in ("value", "low", "high")
                    ),
                    *(_of(arm, key) for key in _FURTHER_KEYS),
                    *map(number, auc_of(arm)),
                    *(_of(arm.get("cost", {}), key) for key in _COST_KEYS),
                    arm.get("reason", ""),
                ]
            )
    return rows


def auc_of(arm: ArmResult) -> list[float | None]:
    """Return an arm's AUC after 1, 3 and 5 years, None for each that is missing."""
    given = arm.get("auc") or []
    return [values.finite(given[i]) if i < len(given) else None for i in range(len(_YEARS))]


def few_shot_rows(results: Results) -> list[Row]:
    """Return one row per target, number of training patients, arm and draw."""
    rows: list[Row] = [["target", "patients", "arm", "draw", "c_index"]]
    for cancer, target in values.targets_of(results).items():
        for shots in target.get("few_shot", []):
            patients = "all" if shots["patients"] is None else str(shots["patients"])
            for arm in values.in_order(shots["arms"]):
                for draw, c_index in enumerate(shots["arms"][arm], start=1):
                    rows.append([cancer, patients, arm, str(draw), number(c_index)])
    return rows


def voice_rows(results: Results) -> list[Row]:
    """Return one row per target and expert that its guarded answer heard."""
    rows: list[Row] = [["target", "source", "weight", "weight_sd", "cost", "silent", "contrary"]]
    for cancer, target in values.targets_of(results).items():
        for source, voice in sorted(target.get("voices", {}).items()):
            numbers = [_of(voice, key) for key in ("weight", "weight_sd", "cost")]
            rows.append([cancer, source, *numbers, str(voice["silent"]), str(voice["contrary"])])
    return rows


def number(value: float | None) -> str:
    """Return a number with six digits after the point, nothing for none."""
    known = values.finite(value)
    return "" if known is None else f"{known:.6f}"


def _of(record: object, key: str) -> str:
    found = record.get(key) if isinstance(record, dict) else None
    # A p value of 1e-9 must not read as 0.
    if isinstance(found, float) and 0 < abs(found) < 1e-4:
        return f"{found:.3e}"
    return number(found) if isinstance(found, int | float) else ""


def _score_cell(score: TransferScore | None) -> str:
    return number(score.get("c_index")) if score is not None else ""


def _se_cell(score: TransferScore | None) -> str:
    # A standard error of a C-index that does not exist would only mislead.
    return number(score.get("se")) if score is not None and _score_cell(score) else ""


def _csv(rows: Iterable[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([*map(_plain, row)] for row in rows)
    return text.getvalue().encode()


def _plain(cell: str) -> str:
    """Return a cell that a spreadsheet does not take for a formula."""
    return f"'{cell}" if cell[:1] in "=+@" and cell else cell


_FILES: dict[str, Callable[[Results], list[Row]]] = {
    "transfer.csv": transfer_rows,
    "pairs.csv": pair_rows,
    "per_cancer.csv": per_cancer_rows,
    "arms.csv": arm_rows,
    "few_shot.csv": few_shot_rows,
    "voices.csv": voice_rows,
}
_OPTIONAL = ("few_shot.csv", "voices.csv")
