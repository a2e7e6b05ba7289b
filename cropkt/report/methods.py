"""The sections on how it was done, with what, and what it cannot show."""

from __future__ import annotations

from collections.abc import Iterator

from cropkt.report import significance, values
from cropkt.report.blocks import Grid, Section, grid
from cropkt.report.runs import Runs
from cropkt.report.schema import Results
from cropkt.report.sentences import failed, not_estimable, planted

_ENDPOINTS = {
    "OS": "overall survival (OS: death from any cause)",
    "DSS": "disease-specific survival (DSS: death from this cancer)",
    "PFI": "progression-free interval (PFI: progression or death from this cancer)",
    "DFI": "disease-free interval (DFI: return of the disease)",
}
_DATA = {
    "synthetic": "made-up patients (synthetic data)",
    "clinical": "clinical covariates of real patients, without slides",
    "features": "features of real slides",
}


def methods(runs: Runs) -> Section:
    """Return the methods paragraph, and what is needed to repeat the study."""
    text = " ".join(_methods(runs))
    return Section("methods", "Methods", (text,), grids=(_provenance(runs),))


def _methods(runs: Runs) -> Iterator[str]:
    results = runs.results
    yield _cohort(results)
    yield _folds(results)
    yield _training(results)
    yield (
        "Every arm predicts each patient out of fold; what it learns or chooses (sources, weights, "
        "how far to trust them) comes from the other folds. C-index: Harrell's, over comparable "
        "pairs of patients in one fold. Intervals are 95 % intervals from resampled patients; "
        "those of a difference are paired. Where several sites hold one cancer, their numbers are "
        "put together by pairs, with normal intervals."
    )
    if _adjusted(results):
        yield (
            "p values of the transfer matrix are two-sided and adjusted, after Benjamini-Hochberg "
            f"and after Holm, over all pairs whose target has at least {values.MIN_EVENTS} events."
        )
    if results.get("across"):
        yield (
            "Means over cancers: random effects after DerSimonian and Laird; signed ranks after "
            "Wilcoxon."
        )
    if len(runs.each) > 1:
        yield (
            f"The numbers are means over {len(runs.each)} seeds, and so are the ends of the "
            "intervals: seeds share their patients, so more of them do not narrow an interval. "
            "Beside headline numbers stands their range over the seeds. p values of several seeds "
            "are twice their median. A number that one seed could not estimate is n/e."
        )
    yield _software(runs)


def _adjusted(results: Results) -> bool:
    """Tell whether pairs of the transfer matrix were tested and adjusted for their number."""
    transfer = results.get("transfer", {})
    return significance.strictest(transfer) != "two_se"


def _cohort(results: Results) -> str:
    targets = values.targets_of(results).values()
    data = results.get("data", "")
    who = _DATA.get(data, data or "the sites' own patients")
    totals = [
        sum(count for target in targets if (count := target.get("patients")) is not None),
        sum(count for target in targets if (count := target.get("events")) is not None),
    ]
    endpoint = results.get("endpoint", "")
    what = _ENDPOINTS.get(endpoint, endpoint or "not told")
    return (
        f"The study used {who}: {len(targets)} target cancers with {totals[0]:,} patients and "
        f"{totals[1]:,} events, as far as sites tell. Endpoint: {what}."
    )


def _folds(results: Results) -> str:
    folds = f"{results['folds']}-fold cross-validation" if "folds" in results else "Folds"
    split = split_of(results)
    if split == "hospital":
        return f"{folds} by hospital: no hospital lies in both training and test patients."
    if split == "stratified":
        return (
            f"{folds} by patient, events in proportion: patients of one hospital may lie in both "
            "training and test patients."
        )
    return f"{folds}; how the folds were made is not in the results."


def split_of(results: Results) -> str | None:
    """Return how the folds were made, None if the results do not tell."""
    split = results.get("config", {}).get("split")
    return split if isinstance(split, str) else None


def _training(results: Results) -> str:
    config = results.get("config", {})
    facts = [
        words.format(value)
        for path, words in (
            ("training.epochs", "{} epochs"),
            ("training.learning_rate", "learning rate {}"),
            ("training.batch", "{} patients an update"),
            ("shape.bins", "{} bins of 365 days"),
        )
        if (value := _setting(config, path)) is not None
    ]
    told = f" ({', '.join(facts)})" if facts else ""
    return (
        "Each cancer's expert is an attention network over a patient's feature vectors that "
        f"predicts discrete-time survival{told}; all experts start from the same weights."
    )


def _software(runs: Runs) -> str:
    results = runs.results
    versions = results.get("versions", {})
    made = [f"cropkt {results['cropkt']}"] if "cropkt" in results else ["cropkt"]
    made += [f"{name} {versions[name]}" for name in sorted(versions)]
    facts = [f"Made with {', '.join(made)}"]
    if runs.seeds:
        word = "seed" if len(runs.seeds) == 1 else "seeds"
        facts.append(f"{word} {', '.join(map(str, runs.seeds))}")
    if hashes := _hashes(runs):
        facts.append(f"configuration {', '.join(hashes)}")
    return f"{'; '.join(facts)}."


def _hashes(runs: Runs) -> list[str]:
    """Return the configuration hash of each run; a seed is part of it."""
    found = (run["config_hash"] for run in runs.each if "config_hash" in run)
    return list(dict.fromkeys(found))


def _setting(config: dict[str, object], path: str) -> object:
    found: object = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _provenance(runs: Runs) -> Grid:
    results = runs.results
    seeds = ", ".join(map(str, runs.seeds)) or "not in the results"
    versions = results.get("versions", {})
    rows = [
        ["cropkt", results.get("cropkt", "not in the results")],
        *([name, versions[name]] for name in sorted(versions)),
        ["data", results.get("data", "not in the results")],
        ["preset", results.get("preset", "not in the results")],
        ["seed" if len(runs.seeds) == 1 else "seeds", seeds],
        ["configuration hash", ", ".join(_hashes(runs)) or "not in the results"],
        *([f"setting: {name}", value] for name, value in _settings(results.get("config", {}))),
    ]
    return grid("What is needed to repeat this study", ("what", "value"), rows)


def _settings(config: dict[str, object], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting by its dotted name, but for the seed."""
    for name, value in sorted(config.items()):
        if isinstance(value, dict):
            yield from _settings(value, f"{before}{name}.")
        elif before or name != "seed":
            parts = value if isinstance(value, list | tuple) else [value]
            yield f"{before}{name}", ", ".join("none" if p is None else str(p) for p in parts)


def limits(runs: Runs) -> Section:
    """Return what the study cannot show."""
    return Section("limits", "Limits", points=tuple(_limits(runs)))


def _limits(runs: Runs) -> Iterator[str]:
    results = runs.results
    yield (
        "Research software. It is not a medical device, was not validated for any clinical use, "
        "and must not guide the care of a patient."
    )
    if results.get("data") == "synthetic":
        yield "The patients are made up. The numbers test the software and say nothing of a cancer."
    yield (
        "The C-index judges ranking only: who is at higher risk than whom. It does not say that a "
        "predicted probability is true, nor that knowing it would help a patient."
    )
    yield _few(results)
    yield (
        "Folds inside one cohort are no external validation: training and test patients come from "
        "the same source, were selected alike and followed alike."
    )
    yield _split_limit(results)
    yield _many(results)
    if len(runs.each) == 1:
        yield (
            "One seed. Folds and training depend on chance too, and the intervals hold only the "
            "chance of which patients there were; another seed may move every number."
        )
    else:
        yield (
            "Several seeds show how much folds and training move the numbers. They are not more "
            "patients."
        )
    yield "Counts that a site suppresses or rounds are shown as it gave them."


def _few(results: Results) -> str:
    told = {
        cancer: events
        for cancer, target in values.targets_of(results).items()
        if (events := target.get("events")) is not None
    }
    if not told:
        return "How many events stand behind each cancer is not in the results."
    listed = ", ".join(
        f"{cancer} {told[cancer]}" for cancer in sorted(told, key=lambda c: (told[c], c))
    )
    return (
        "A cancer's numbers are no better than its events, whatever its patients: with fewer than "
        f"{values.MIN_EVENTS} they are noise, with 20 an interval is wide. Events here: {listed}."
    )


def _split_limit(results: Results) -> str:
    split = split_of(results)
    if split == "hospital":
        return (
            "Folds are by hospital, so a model cannot profit from recognising one; the few "
            "hospitals of a rare cancer make its folds uneven."
        )
    if split == "stratified":
        return (
            "Folds are by patient, not by hospital: a model may recognise a hospital by stain or "
            "scanner and look better than it would elsewhere."
        )
    return "The results do not tell whether one hospital may lie in both training and test."


def _many(results: Results) -> str:
    if _adjusted(results):
        adjusted = (
            "Pairs of the transfer matrix are adjusted for their number after Benjamini-Hochberg "
            "and Holm."
        )
    else:
        adjusted = "Nothing here is adjusted for the number of comparisons."
    return (
        f"Many comparisons are made. {adjusted} Gains of single cancers, arms, log-rank and "
        "D-calibration are judged one by one, so about one in twenty is a false alarm."
    )


def gaps(runs: Runs) -> Section:
    """Return what is not estimable, what failed, and what was planted."""
    results = runs.results
    points = [*not_estimable(values.targets_of(results)), *failed(results), *planted(results)]
    texts = () if points else ("Every step was done and every number could be estimated.",)
    return Section("gaps", "What is missing", texts, points=tuple(points))
