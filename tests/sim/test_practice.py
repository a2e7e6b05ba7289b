"""A practice hospital is what a real one would have: its own files, read as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from cropkt.cancers import Cancer
from cropkt.cohort.bags import load_cohort
from cropkt.cohort.features import SlideFolders
from cropkt.cohort.outcomes import read_outcomes
from cropkt.errors import UsageError
from cropkt_sim.practice import write_hospital
from cropkt_sim.synthetic import DIM


def test_its_files_are_read_as_a_hospitals(tmp_path: Path) -> None:
    told = list(write_hospital(tmp_path / "leiden", Cancer.UVM, seed=0))
    assert "80 synthetic patients of UVM, 21 events" in told[0]
    table = read_outcomes(tmp_path / "leiden" / "outcomes.csv", endpoint="DSS")
    source = SlideFolders(tmp_path / "leiden" / "features")
    cohort, dropped = load_cohort(table, source, cancer=Cancer.UVM, dim=DIM, on_bad="raise")
    assert (len(cohort.patient_ids), int(cohort.event.sum()), dropped) == (80, 21, ())


def test_what_is_there_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "outcomes.csv").write_text("mine")
    with pytest.raises(UsageError, match="is already there"):
        list(write_hospital(tmp_path, Cancer.UVM, seed=0))
    assert not (tmp_path / "features").exists()
