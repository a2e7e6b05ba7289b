"""The sections on patients: few-shot curves, risk groups, calibration; and what each arm costs."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from cropkt.report import values
from cropkt.report.blocks import NOT_EVALUATED, Cell, Grid, Picture, Section, grid, plain
from cropkt.report.csv_files import auc_of
from cropkt.report.runs import Runs
from cropkt.report.schema import ArmResult, CostResult, Results, TargetResult
from cropkt.report.sentences import number, p_value
from cropkt.report.survival_plot import curves_of


def few_shot(runs: Runs) -> Section:
    """Return the C-index with few training patients."""
    targets = values.targets_of(runs.results)
    title = "With only a few patients"
    if not any(shots["arms"] for t in targets.values() for shots in t.get("few_shot", [])):
        note = "Not evaluated: training with 20, 50 or 100 patients was not part of this study."
        return Section("few-shot", title, (note,))
    texts = (
        "How good would each way be if the hospital had only so many patients to learn from? "
        "The same patients are judged every time; each draw learns from other ones.",
    )
    picture = Picture(
        "few_shot",
        "C-index against the number of training patients, one panel a cancer, one line an arm; "
        "the table has the means.",
    )
    return Section("few-shot", title, texts, picture=picture, grids=(_shots_grid(targets),))


def _shots_grid(targets: dict[str, TargetResult]) -> Grid:
    shots = {c: t["few_shot"] for c, t in targets.items() if t.get("few_shot")}
    arms = values.in_order(
        {a for several in shots.values() for one in several for a in one["arms"]}
    )
    rows = []
    for cancer, several in shots.items():
        for one in sorted(several, key=lambda s: (s["patients"] is None, s["patients"] or 0)):
            count = "all" if one["patients"] is None else str(one["patients"])
            rows.append([cancer, count, *(_draws(one["arms"].get(arm, [])) for arm in arms)])
    heads = ("cancer", "training patients", *map(values.arm_title, arms))
    return grid("Mean C-index over the draws, and their range", heads, rows)


def _draws(draws: list[float]) -> Cell | str:
    if not draws:
        return Cell("–", "dim")
    if len(draws) == 1:
        return number(draws[0])
    return f"{number(fmean(draws))} ({number(min(draws))} to {number(max(draws))})"


def risk_groups(runs: Runs) -> Section:
    """Return survival of the halves at low and at high risk, or why there are only p values."""
    results = runs.results
    targets, headline = values.targets_of(results), values.headline(results)
    title = "Risk groups"
    curves = any(curves_of(target, headline) for target in targets.values())
    tested = _arms_with(results, lambda arm: arm.get("log_rank"))
    texts = []
    if curves:
        texts.append(
            "Half of each cancer's patients have the higher predicted risk. Where the curves lie "
            "apart, the prediction tells the two halves apart; the log-rank test says how likely "
            "chance is to do as much. "
            + ("The curves are those of the first seed." if len(runs.each) > 1 else "")
        )
    elif tested:
        texts.append(
            "No survival curve can be drawn: event times never leave a hospital. So only the "
            "log-rank test between the halves at high and at low risk is shown."
        )
    if not tested:
        texts.append(
            "The log-rank test between the halves at high and at low risk was not evaluated."
        )
    picture = Picture(
        "survival", "Kaplan-Meier curves of the halves at low and at high risk, one panel a cancer."
    )
    grids = (_log_rank_grid(results, tested),) if tested else ()
    texts = [text.strip() for text in texts]
    return Section("risk", title, tuple(texts), picture=picture if curves else None, grids=grids)


def _log_rank_grid(results: Results, arms: list[str]) -> Grid:
    rows = [
        [cancer, *(_p_of(target, arm, lambda found: found.get("log_rank")) for arm in arms)]
        for cancer, target in values.targets_of(results).items()
    ]
    return grid(
        "Log-rank p value, half at high risk against half at low risk, one by one",
        ("cancer", *map(values.arm_title, arms)),
        rows,
    )


def _p_of(target: TargetResult, arm: str, key: Callable[[ArmResult], float | None]) -> Cell | str:
    found = values.arm_of(target, arm)
    p = values.finite(key(found)) if found is not None else None
    return Cell("–", "dim") if p is None else p_value(p)


def _arms_with(results: Results, *keys: Callable[[ArmResult], float | None]) -> list[str]:
    """Return local and the headline, each if some target has one of these measurements of it."""
    arms = [target.get("arms", {}) for target in values.targets_of(results).values()]
    return [
        name
        for name in ("local", values.headline(results))
        if any(
            values.finite(key(found[name])) is not None
            for found in arms
            if name in found
            for key in keys
        )
    ]


_ACCURACY: tuple[Callable[[ArmResult], float | None], ...] = (
    lambda arm: arm.get("brier"),
    lambda arm: arm.get("d_calibration"),
    lambda arm: arm.get("c_ipcw"),
    lambda arm: auc_of(arm)[0],
    lambda arm: auc_of(arm)[1],
    lambda arm: auc_of(arm)[2],
)


def calibration(runs: Runs) -> Section:
    """Return how true the predicted survival is, beside how well it ranks."""
    results = runs.results
    arms = _arms_with(results, *_ACCURACY)
    title = "Calibration, and ranking at fixed times"
    if not arms:
        note = f"{NOT_EVALUATED.capitalize()}: this study measured ranking (the C-index) only."
        return Section("calibration", title, (note,))
    texts = (
        "The C-index says nothing about whether a predicted survival of 70 % is true. The "
        "integrated Brier score does: lower is better, and .25 is what a coin gets. D-calibration "
        "asks whether predicted survival is spread as it should be: a p value below .05 says that "
        "it is not. IPCW C-index: corrected for how long patients were followed. AUC: how well "
        "those who died within 1, 3 or 5 years are told from those who lived longer.",
    )
    rows = []
    for cancer, target in values.targets_of(results).items():
        for arm in arms:
            found = values.arm_of(target, arm)
            if found is not None:
                rows.append([cancer, values.arm_title(arm), *_accuracy(found)])
    heads = ["cancer", "arm", "Brier", "D-calibration", "IPCW C-index"]
    heads += [f"AUC {years} y" for years in (1, 3, 5)]
    return Section(
        "calibration", title, texts, grids=(grid("Calibration and accuracy", heads, rows),)
    )


def _accuracy(arm: ArmResult) -> list[Cell | str]:
    p = values.finite(arm.get("d_calibration"))
    bad = p is not None and p < 0.05
    return [
        plain(values.finite(arm.get("brier")), 3),
        Cell("–", "dim") if p is None else Cell(p_value(p), "down" if bad else ""),
        plain(values.finite(arm.get("c_ipcw"))),
        *map(plain, auc_of(arm)),
    ]


def cost(runs: Runs) -> Section:
    """Return what each arm costs a target, mean over the targets that tell."""
    results = runs.results
    rows = []
    for arm in values.arm_names(results):
        costs = [
            found["cost"]
            for target in values.targets_of(results).values()
            if (found := values.arm_of(target, arm)) is not None and _told(found.get("cost"))
        ]
        if costs:
            rows.append([values.arm_title(arm), str(len(costs)), *_mean_costs(costs)])
    title = "What it costs a hospital"
    if not rows:
        return Section("cost", title, (f"{NOT_EVALUATED.capitalize()} in this study.",))
    heads = ("arm", "cancers", "seconds", "memory, MB", "GFLOP", "received, MB", "sent, MB")
    table = grid("Cost of each arm for one cancer, mean over the cancers", heads, rows)
    return Section("cost", title, grids=(table,))


def _told(cost: CostResult | None) -> bool:
    """Tell whether a cost was measured: a site that tells none sends zeros."""
    return cost is not None and any(cost.values())


def _mean_costs(costs: list[CostResult]) -> list[Cell | str]:
    columns: list[Callable[[CostResult], float | None]] = [
        lambda cost: cost.get("seconds"),
        lambda cost: cost.get("megabytes"),
        lambda cost: cost.get("gflop"),
        lambda cost: cost.get("received_megabytes"),
        lambda cost: cost.get("sent_megabytes"),
    ]
    cells: list[Cell | str] = []
    for column in columns:
        known = [value for cost in costs if (value := values.finite(column(cost))) is not None]
        cells.append(f"{fmean(known):,.1f}" if known else Cell("–", "dim"))
    return cells
