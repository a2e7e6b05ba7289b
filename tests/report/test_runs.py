"""Reading runs and putting several seeds together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from cropkt.errors import CropktError, DataError, UsageError
from cropkt.report import values
from cropkt.report.check import problem_in
from cropkt.report.runs import read_runs
from cropkt.report.schema import Results
from cropkt.report.seeds import together
from cropkt.report.write import canonical_json


def saved(results: Results, folder: Path) -> Path:
    folder.mkdir()
    (folder / "results.json").write_bytes(canonical_json(results))
    return folder


@pytest.fixture
def two(seeded: Callable[[int], Results], tmp_path: Path) -> list[Path]:
    return [saved(seeded(seed), tmp_path / f"seed-{seed}") for seed in (0, 1)]


def test_one_run_is_what_its_file_says(few: Results, tmp_path: Path) -> None:
    runs = read_runs([saved(few, tmp_path / "run")])
    assert runs.results == few
    assert runs.seeds == [0]
    assert runs.gain_range("UVM", "auto") is None


def test_several_seeds_are_means_with_their_range(two: list[Path]) -> None:
    runs = read_runs(two)
    gains = [values.gain(run["targets"]["UVM"], "auto") for run in runs.each]
    assert None not in gains
    assert gains[0] != gains[1]
    mean = values.gain(runs.results["targets"]["UVM"], "auto")
    assert mean == pytest.approx(sum(gains) / 2)
    assert runs.gain_range("UVM", "auto") == (min(gains), max(gains))
    assert runs.gain_range("TGCT", "auto") is None
    assert runs.seeds == [0, 1]
    assert "seed" not in runs.results
    assert [row["row"] for row in runs.results["failed"]] == [
        "seed 0: UVM/fit_router",
        "seed 1: UVM/fit_router",
    ]


def test_seeds_are_put_together_by_the_meaning_of_a_number() -> None:
    def run(p: float, weight: float, draw: float, verdict: str) -> Results:
        voice = {"weight": weight, "weight_sd": 0.1, "cost": None, "silent": 1, "contrary": 0}
        return {
            "targets": {
                "UVM": {
                    "events": 21,
                    "arms": {"auto": {"c_index": 0.6, "log_rank": p}},
                    "routing": {"self": 1 - weight, "SKCM": weight} if weight else {"self": 1.0},
                    "voices": {"SKCM": voice} if weight else {},  # type: ignore[dict-item]
                    "few_shot": [{"patients": 20, "arms": {"local": [draw]}}],
                    "zero_shot_choice": {"SKCM": 5},
                }
            },
            "experts": {
                "UVM": {"targets": 2, "c_index": 0.6, "low": 0.5, "high": 0.7, "verdict": verdict}
            },
        }

    merged = together([run(0.01, 0.4, 0.6, "helps"), run(0.03, 0.0, 0.7, "no use")])
    uvm = merged["targets"]["UVM"]
    assert uvm["events"] == 21
    assert uvm["arms"]["auto"]["log_rank"] == pytest.approx(0.04)  # twice the median
    assert uvm["routing"] == {"self": pytest.approx(0.8), "SKCM": pytest.approx(0.2)}
    assert uvm["voices"]["SKCM"]["weight"] == pytest.approx(0.2)
    assert uvm["voices"]["SKCM"]["silent"] == 1
    assert uvm["few_shot"] == [{"patients": 20, "arms": {"local": [0.6, 0.7]}}]
    assert uvm["zero_shot_choice"] == {"SKCM": 10}
    assert merged["experts"]["UVM"]["verdict"] == "unclear"


def test_what_one_seed_cannot_estimate_has_no_mean(seeded: Callable[[int], Results]) -> None:
    few, other = seeded(0), seeded(1)
    other["targets"]["UVM"]["arms"]["auto"] = {"c_index": None, "reason": "no pair"}
    merged = together([few, other])
    assert merged["targets"]["UVM"]["arms"]["auto"] == {"c_index": None, "reason": "no pair"}
    assert values.gain(merged["targets"]["UVM"], "auto") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "clinical"}, "data is clinical, but synthetic in"),
        ({"endpoint": "OS"}, "endpoint is OS, but DSS in"),
        ({"folds": 3}, "folds is 3, but 5 in"),
        ({"config": {"seed": 1, "rounds": 9}}, "its setting"),
        ({"seed": 0}, "its seed 0 is that of"),
        ({"targets": {}}, "do not share the targets CHOL, TGCT, UVM"),
    ],
)
def test_runs_of_different_studies_are_refused(
    two: list[Path], change: dict[str, object], words: str
) -> None:
    other = json.loads((two[1] / "results.json").read_text()) | change
    (two[1] / "results.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match=words) as caught:
        read_runs(two)
    assert str(two[1]) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, UsageError, "holds no results.json"),
        (b"{", DataError, "is not JSON"),
        (b"\xff\xfe", DataError, "is not JSON"),
        (b'{"seed": NaN}', DataError, "is not JSON"),
        (b"[" * 100_000, DataError, "is not JSON"),
        (b"[]", DataError, "the whole is not an object"),
        (b'{"targets": {"UVM": 3}}', DataError, "targets.UVM is not an object"),
        (
            b'{"targets": {"UVM": {"arms": {"local": {"c_index": "high"}}}}}',
            DataError,
            "targets.UVM.arms.local.c_index is not a number",
        ),
        (b'{"targets": {"UVM": {"arms": {"local": {}}}}}', DataError, "c_index is missing"),
        (b'{"targets": {"UVM": {"few_shot": [{"patients": 3}]}}}', DataError, "few_shot.0.arms"),
        (b'{"seed": true}', DataError, "seed is not a number"),
    ],
)
def test_a_broken_run_is_one_error(
    tmp_path: Path, content: bytes | None, error: type[CropktError], words: str
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(error, match=words):
        read_runs([tmp_path])


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])


def test_every_form_of_results_that_the_schema_knows_passes(full: Results) -> None:
    assert problem_in(json.loads(canonical_json(full))) is None
    assert problem_in({"of a later version": math.pi, "planted": None}) is None
