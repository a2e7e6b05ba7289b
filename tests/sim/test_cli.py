"""`cropkt-sim run` as a user runs it: real processes, real files, both engines."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cropkt.report.schema import Results
from cropkt_sim.study import planted_result
from cropkt_sim.synthetic import Planted

CDR = Path(__file__).parents[3] / "shared" / "data" / "tcga_cdr.csv"
SMALL = ("--preset", "demo", "--cancers", "UVM,UCS,CHOL")


def cropkt_sim(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from cropkt_sim.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "COLUMNS": "120"},
    )


def results(out: Path) -> dict[str, Any]:
    """Return what a run found, without what it cost."""
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert found.pop("seconds")["total"] > 0
    for target in found["targets"].values():
        for arm in target["arms"].values():
            assert arm.pop("cost")["seconds"] >= 0
    return found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One small synthetic run; the folder and what it printed."""
    out = tmp_path_factory.mktemp("local") / "run"
    done = cropkt_sim("run", *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_writes_its_report_and_prints_the_table(local: tuple[Path, str]) -> None:
    out, printed = local
    found = results(out)
    assert set(found["targets"]) == {"UVM", "UCS", "CHOL"}
    uvm = found["targets"]["UVM"]
    assert (uvm["patients"], uvm["events"]) == (80, 21)
    assert set(uvm["arms"]) == {
        *("local", "zero_shot", "vote", "roupkt+", "stack", "auto"),
        *("random_init", "mean_pool", "self_only"),
    }
    curves = uvm["kaplan_meier"]["auto"]
    assert curves["low"]["patients"] + curves["high"]["patients"] == 80
    assert curves["low"]["survival"][0] == curves["high"]["survival"][0] == 1
    for arm in uvm["arms"].values():
        assert arm["low"] <= arm["c_index"] <= arm["high"]
    assert sum(uvm["routing"].values()) == pytest.approx(1)
    assert found["planted"]["relatives"] == {"UVM": [], "UCS": [], "CHOL": []}
    assert not found["failed"]
    with (out / "per_cancer.csv").open() as file:
        assert [row["cancer"] for row in csv.DictReader(file)] == ["CHOL", "UCS", "UVM"]
    for name in ("transfer.csv", "transfer.png", "gain.png"):
        assert (out / name).stat().st_size > 100
    assert "UVM" in printed
    assert str(out) in printed
    assert "evaluate: 3 done" in printed  # plain lines where there is no terminal


def test_the_same_seed_gives_the_same_numbers(local: tuple[Path, str], tmp_path: Path) -> None:
    done = cropkt_sim("run", *SMALL, "--out", tmp_path / "again", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "again") == results(local[0])


def test_a_finished_run_is_told_again_without_training(local: tuple[Path, str]) -> None:
    before = results(local[0])
    done = cropkt_sim("run", *SMALL, "--out", local[0])
    assert done.returncode == 0, done.stderr
    assert results(local[0]) == before


def test_other_settings_in_the_same_folder_are_refused(local: tuple[Path, str]) -> None:
    done = cropkt_sim("run", *SMALL, "--folds", "4", "--out", local[0])
    assert done.returncode == 78
    assert "folds was 3" in done.stderr


def test_few_patients_and_one_model_of_all_are_compared_where_asked_for(tmp_path: Path) -> None:
    extra = ("--shots", "20,1000,all", "--fedavg-rounds", "1")
    done = cropkt_sim("run", *SMALL, *extra, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    uvm = results(tmp_path / "run")["targets"]["UVM"]
    assert {"fedavg", "fedavg_tuned"} <= set(uvm["arms"])
    few, everybody = uvm["few_shot"]
    assert (few["patients"], everybody["patients"]) == (20, None)
    assert len(few["arms"]["auto"]) == 5
    assert everybody["arms"]["auto"] == [uvm["arms"]["auto"]["c_index"]]
    assert "fit fedavg: 3 done" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is an optional extra")
def test_both_engines_give_the_same_results(local: tuple[Path, str], tmp_path: Path) -> None:
    done = cropkt_sim("run", *SMALL, "--engine", "ray", "--out", tmp_path / "ray")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "ray") == results(local[0])


@pytest.mark.slow
@pytest.mark.skipif(not CDR.exists(), reason="the TCGA-CDR table lies in ../shared/data only")
def test_real_patients_at_their_real_hospitals(tmp_path: Path) -> None:
    done = cropkt_sim(
        *("run", "--data", "clinical", "--outcomes", CDR, "--cancers", "UVM,ACC"),
        *("--sites", "hospitals", "--folds", "3", "--out", tmp_path / "run"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path / "run")
    assert found["targets"]["UVM"]["patients"] == 80
    assert found["targets"]["UVM"]["sites"] > 1
    assert found["targets"]["UVM"]["arms"]["auto"]["c_index"] is not None


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--cancers", "UVM,XYZ"), 65, "unknown code 'XYZ'"),
        (("--cancers", "UVM"), 64, "at least two cancers"),
        (("--data", "clinical"), 64, "--outcomes"),
        (("--data", "clinical", "--outcomes", "/nowhere.csv"), 65, "/nowhere.csv"),
        (("--folds", "1"), 2, "--folds"),
        (("--shots", "few"), 64, "--shots"),
    ],
)
def test_bad_requests_get_one_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, text: str
) -> None:
    out = tmp_path / "run"
    done = cropkt_sim("run", *arguments, "--out", out)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_routing_counts_as_found_when_relatives_outweigh_the_rest() -> None:
    found: Results = {
        "targets": {
            "UVM": {"routing": {"self": 0.5, "SKCM": 0.3, "LUNG": 0.2}},
            "SKCM": {"routing": {"self": 0.1, "UVM": 0.4, "LUNG": 0.5}},
            "LUNG": {"routing": {"self": 1.0}},
        }
    }
    planted = Planted(
        relatives={"UVM": ["SKCM"], "SKCM": ["UVM"], "LUNG": []}, best_c_index={"UVM": 0.8}
    )
    told = planted_result(found, planted)
    assert (told["targets_routed_to_relatives"], told["of"]) == (1, 2)


def test_help_is_there_without_torch() -> None:
    script = (
        "import sys; import cropkt_sim.cli; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'flwr', 'pandas', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    assert "--outcomes" in cropkt_sim("run", "--help").stdout
