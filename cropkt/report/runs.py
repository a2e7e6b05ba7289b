"""The runs that a report is made from: one, or several seeds of one study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cropkt.errors import DataError, UsageError
from cropkt.report import values
from cropkt.report.check import problem_in
from cropkt.report.schema import Results
from cropkt.report.seeds import together

NAME = "results.json"


@dataclass(frozen=True, slots=True)
class Runs:
    """What to report: the numbers, and the runs whose means they are."""

    results: Results
    each: tuple[Results, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds that are known."""
        return [run["seed"] for run in self.each if "seed" in run]

    def gain_range(self, cancer: str, arm: str) -> tuple[float, float] | None:
        """Return the least and the largest gain of a target over several seeds."""
        targets = [values.targets_of(run).get(cancer, {}) for run in self.each]
        gains = [gain for target in targets if (gain := values.gain(target, arm)) is not None]
        return (min(gains), max(gains)) if len(gains) > 1 else None

    def across_range(self, arm: str, control: str) -> tuple[float, float] | None:
        """Return the least and the largest mean difference over several seeds."""
        found = [run.get("across", {}).get(arm, {}).get(control) for run in self.each]
        means = [one["mean"] for one in found if one is not None]
        return (min(means), max(means)) if len(means) > 1 else None


def one_run(results: Results) -> Runs:
    """Return a single run to report."""
    return Runs(results, (results,))


def read_runs(folders: Sequence[Path]) -> Runs:
    """Return what the `results.json` of one or several run folders say.

    Raises:
        UsageError: no such folder, no results in it, or runs of different studies.
        DataError: a file that does not hold the results of a study.
    """
    each = tuple(_read(folder) for folder in folders)
    if len(each) == 1:
        return one_run(each[0])
    for folder, run in zip(folders[1:], each[1:], strict=True):
        _check_same(folders[0], each[0], folder, run)
    seeds = [run.get("seed") for run in each]
    for index, seed in enumerate(seeds):
        if seed in seeds[:index]:
            raise UsageError(
                folders[index],
                f"its seed {seed} is that of {folders[seeds.index(seed)]} too",
                "Give every seed once: a run that is counted twice hides the range",
            )
    return Runs(together(each), each)


def _read(folder: Path) -> Results:
    path = folder / NAME
    if not folder.is_dir():
        raise UsageError(folder, "no such folder", "Give the folder of a run (--out of run)")
    try:
        found = json.loads(path.read_bytes(), parse_constant=_refuse)
    except FileNotFoundError:
        fix = "Give the folder of a run that has ended"
        raise UsageError(folder, f"holds no {NAME}", fix) from None
    except (ValueError, RecursionError):
        raise DataError(path, "is not JSON", "Run the study again to write it anew") from None
    if problem := problem_in(found):
        raise DataError(path, problem, "It is damaged, or not the results of a study")
    results: Results = found
    return results


def _refuse(constant: str) -> object:
    raise ValueError(constant)


def _check_same(first: Path, one: Results, second: Path, other: Results) -> None:
    """Refuse runs that differ in more than their seed."""
    fix = "Give runs of one study that differ in their seed only"
    for name, a, b in (
        ("data", one.get("data"), other.get("data")),
        ("endpoint", one.get("endpoint"), other.get("endpoint")),
        ("preset", one.get("preset"), other.get("preset")),
        ("folds", one.get("folds"), other.get("folds")),
    ):
        if a != b:
            raise UsageError(second, f"{name} is {b}, but {a} in {first}", fix)
    odd = sorted(set(one.get("targets", {})).symmetric_difference(other.get("targets", {})))
    if odd:
        raise UsageError(second, f"it and {first} do not share the targets {', '.join(odd)}", fix)
    ours, theirs = one.get("config", {}), other.get("config", {})
    keys = sorted(set(ours) | set(theirs))
    changed = [key for key in keys if key != "seed" and ours.get(key) != theirs.get(key)]
    if changed:
        raise UsageError(second, f"its setting {changed[0]} differs from that of {first}", fix)
