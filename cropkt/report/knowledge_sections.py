"""The sections on whose knowledge helps whom: the transfer matrix, and who is heard."""

from __future__ import annotations

from cropkt.report import significance, values
from cropkt.report.blocks import Cell, Grid, Picture, Section, Tone, grid, score
from cropkt.report.runs import Runs
from cropkt.report.schema import Results, TargetResult, TransferScore, VoiceResult
from cropkt.report.sentences import difference, number, p_value
from cropkt.report.significance import Test, Transfer

_PAIRS = 40  # significant pairs that the page lists; pairs.csv has all
_VERDICTS: dict[str, tuple[str, Tone]] = {
    "helps": ("helps others", "up"),
    "unclear": ("cannot be told", ""),
    "no use": ("no use to others", "dim"),
    "contrary": ("misleads others", "down"),
    "silent": ("says the same of everybody", "dim"),
}


def transfer(runs: Runs) -> Section:
    """Return the transfer matrix and how much of it is more than chance."""
    matrix = runs.results.get("transfer", {})
    title = "Who could help whom: the transfer matrix"
    if not any(matrix.values()):
        return Section("transfer", title, ("Not evaluated: no expert was tried on another.",))
    texts = [
        "Each expert is tried, as it is, on the patients of every other cancer. Columns are the "
        "patients, rows the experts. A single pair rests on few deaths, and there are many pairs: "
        "some look good by chance alone.",
        *_counts(matrix),
    ]
    picture = Picture(
        "transfer", "Heat map of the C-index of each expert on each cancer; pairs.csv has it all."
    )
    grids = (_pair_grid(matrix),) if _better(matrix, "p_random_bh") else ()
    return Section("transfer", title, tuple(texts), picture=picture, grids=grids)


def _counts(matrix: Transfer) -> list[str]:
    tests: tuple[tuple[Test, Test, str], ...] = (
        ("p_half_bh", "p_half_holm", "chance (.5)"),
        ("p_random_bh", "p_random_holm", "untrained experts on the same patients"),
    )
    lines = []
    for loose, strict, than in tests:
        tested = len(significance.tested(matrix, loose))
        if not tested:
            continue
        raw: Test = "p_half" if loose == "p_half_bh" else "p_random"
        better, worse = len(_better(matrix, loose)), len(_worse(matrix, loose))
        lines.append(
            f"Against {than}, of {tested} pairs that could be tested: better at p < .05 one by "
            f"one {len(_better(matrix, raw))}; after Benjamini-Hochberg (false discoveries at "
            f"most 5 %) {better}; after Holm (no false one with 95 % confidence) "
            f"{len(_better(matrix, strict))}. Worse after Benjamini-Hochberg: {worse}."
        )
    if lines:
        return lines
    pairs = [s for t, row in matrix.items() for source, s in row.items() if source != t]
    clear = sum(significance.significant(score, "two_se") for score in pairs)
    return [
        f"{clear} of {len(pairs)} pairs lie more than 1.96 standard errors from .5. The results "
        "hold no test that is adjusted for the number of pairs, so single pairs prove nothing."
    ]


def _effect(score: TransferScore, test: Test) -> float:
    if test.startswith("p_random"):
        return values.finite(score.get("lead")) or 0.0
    return (values.finite(score.get("c_index")) or 0.5) - 0.5


def _better(matrix: Transfer, test: Test) -> list[tuple[str, str]]:
    pairs = significance.found(matrix, test)
    return [
        (source, target) for source, target in pairs if _effect(matrix[target][source], test) > 0
    ]


def _worse(matrix: Transfer, test: Test) -> list[tuple[str, str]]:
    pairs = significance.found(matrix, test)
    return [
        (source, target) for source, target in pairs if _effect(matrix[target][source], test) < 0
    ]


def _pair_grid(matrix: Transfer) -> Grid:
    """Return the pairs that beat untrained experts, the largest lead first."""
    pairs = _better(matrix, "p_random_bh")
    pairs.sort(key=lambda pair: (-_effect(matrix[pair[1]][pair[0]], "p_random_bh"), pair))
    rows = []
    for source, target in pairs[:_PAIRS]:
        found = matrix[target][source]
        lead, se = values.finite(found.get("lead")), values.finite(found.get("lead_se"))
        ends = (lead - 1.96 * se, lead + 1.96 * se) if lead is not None and se is not None else None
        rows.append(
            [
                f"{source} helps {target}",
                score(values.finite(found.get("c_index"))),
                Cell("–", "dim") if lead is None else difference(lead, ends),
                *(
                    _p_cell(found.get(name))
                    for name in ("p_random", "p_random_bh", "p_random_holm")
                ),
            ]
        )
    more = f", the first {_PAIRS} of {len(pairs)}" if len(pairs) > _PAIRS else ""
    return grid(
        f"Pairs better than untrained experts after Benjamini-Hochberg{more}",
        ("pair", "C-index", "over untrained experts", "one by one", "Benjamini-Hochberg", "Holm"),
        rows,
    )


def _p_cell(value: object) -> Cell | str:
    p = values.finite(value) if isinstance(value, int | float) else None
    return Cell("–", "dim") if p is None else p_value(p)


def heard(runs: Runs) -> Section:
    """Return what each answer is made of, and what each expert is worth to the others."""
    results = runs.results
    targets = values.targets_of(results)
    title = "Whose knowledge each answer uses"
    weighed = {c: t for c, t in targets.items() if values.weights_of(t)}
    grids = []
    if any(target.get("voices") for target in weighed.values()):
        grids.append(_voice_grid(weighed))
    if results.get("experts"):
        grids.append(_expert_grid(results))
    if not weighed:
        note = "Not evaluated: the experts were not weighed for any cancer."
        return Section("heard", title, (note,), grids=tuple(grids))
    texts = [
        "A bar shows how much of a cancer's answer comes from each expert. Weight is not benefit: "
        "an expert that only agrees with the others can weigh much and add nothing.",
    ]
    if any(target.get("voices") for target in weighed.values()):
        texts.append(
            "Without it: what the answer's C-index loses on the training patients when that "
            "expert is left out. An expert that says the same of everybody is silent; one that "
            "is significantly wrong is contrary, and is not heard in that fold."
        )
    picture = Picture("routing", "Stacked bars: the share of each expert in each cancer's answer.")
    return Section("heard", title, tuple(texts), picture=picture, grids=tuple(grids))


def _voice_grid(targets: dict[str, TargetResult]) -> Grid:
    rows = []
    for cancer, target in targets.items():
        voices = target.get("voices", {})
        others = {source: v for source, v in voices.items() if source not in ("self", cancer)}
        auto = target.get("auto")
        ranked = sorted(others, key=lambda source: (-others[source]["weight"], source))
        loud = [source for source in ranked if others[source]["weight"] >= 0.005][:3]
        rows.append(
            [
                cancer,
                Cell("–", "dim") if auto is None else f"{100 * auto['share']:.0f} %",
                ", ".join(_voice(source, others[source]) for source in loud) or "nobody",
                _names(others, "silent"),
                _names(others, "contrary"),
            ]
        )
    heads = ("cancer", "from other cancers", "loudest, and loss without it", "silent", "contrary")
    return grid("Experts of other cancers in each guarded answer", heads, rows)


def _voice(source: str, voice: VoiceResult) -> str:
    text = f"{source} {100 * voice['weight']:.0f} % ± {100 * voice['weight_sd']:.0f}"
    cost = values.finite(voice["cost"])
    return text if cost is None else f"{text} ({number(cost, 3)})"


def _names(voices: dict[str, VoiceResult], what: str) -> Cell | str:
    found = sorted(
        source
        for source, voice in voices.items()
        if (voice["silent"] if what == "silent" else voice["contrary"]) > 0
    )
    if not found:
        return Cell("none", "dim")
    return f"{len(found)} of {len(voices)}" if len(found) > 6 else ", ".join(found)


def _expert_grid(results: Results) -> Grid:
    experts = results.get("experts", {})
    rows: list[list[Cell | str]] = []
    for source in sorted(experts, key=lambda name: (-experts[name]["c_index"], name)):
        expert = experts[source]
        words, tone = _VERDICTS.get(expert["verdict"], (expert["verdict"], ""))
        ends = expert["low"], expert["high"]
        mean = score(expert["c_index"], ends, 3)
        rows.append([source, str(expert["targets"]), mean, Cell(words, tone)])
    heads = ("expert of", "tried on cancers", "mean C-index there", "so it")
    return grid("What each expert is worth to the other cancers, with 95 % intervals", heads, rows)
