"""The files of a report: complete, canonical, and never half written."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import pytest

from cropkt.errors import DataError
from cropkt.files import replace_file
from cropkt.report.schema import Results
from cropkt.report.write import write_report

NAMES = ["results.json", "transfer.csv", "pairs.csv", "per_cancer.csv", "arms.csv"]
NAMES += ["transfer.png", "gain.png"]


def test_equal_results_give_equal_files_and_no_draft(results: Results, tmp_path: Path) -> None:
    shuffled: Results = copy.deepcopy(results)
    shuffled["targets"] = dict(reversed(shuffled["targets"].items()))
    shuffled["transfer"] = dict(reversed(shuffled["transfer"].items()))
    first = write_report(results, tmp_path / "new" / "a")
    second = write_report(shuffled, tmp_path / "new" / "b")
    assert [path.name for path in first] == NAMES
    assert sorted(p.name for p in (tmp_path / "new" / "a").iterdir()) == sorted(NAMES)
    assert json.loads(first[0].read_text()) == results
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_json_is_canonical(tmp_path: Path) -> None:
    path = write_report({"seed": 1, "data": "synthétique"}, tmp_path)[0]
    assert path.read_bytes() == '{\n "data": "synthétique",\n "seed": 1\n}\n'.encode()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_is_refused_by_name_before_anything_is_written(
    results: Results, tmp_path: Path, bad: float
) -> None:
    results["targets"]["UVM"]["arms"]["local"]["se"] = bad
    with pytest.raises(DataError, match=r"targets\.UVM\.arms\.local\.se is not a finite number"):
        write_report(results, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.csv"
    replace_file(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_every_kind_of_gap_still_makes_a_report(results: Results, tmp_path: Path) -> None:
    uvm = results["targets"]["UVM"]
    gaps: list[Results] = [
        {},
        {"targets": {}},
        {"targets": {"UVM": {}}, "transfer": {"UVM": {}}},
        {"targets": {"UVM": uvm}},
        {"targets": {"UVM": uvm}, "transfer": {"UVM": {"UVM": {"c_index": 0.65}}}},
        {"targets": {"UVM": uvm | {"events": 0}}},
        {"targets": {"UVM": uvm | {"events": None, "routing": None, "best_source": None}}},
        {"targets": {"UVM": {"events": 21, "arms": {"roupkt": {"c_index": 0.7}}}}},
        {"targets": {"XYZ": uvm}, "transfer": {"XYZ": {"UVM": {"c_index": None}}}, "planted": None},
        {"transfer": {"A": {"B": {"c_index": 0.1}}}, "planted": {"relatives": {"NO": ["A"]}}},
    ]
    for index, gap in enumerate(gaps):
        paths = write_report(gap, tmp_path / str(index))
        assert all(path.stat().st_size for path in paths)
