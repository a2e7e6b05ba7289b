"""Real patients of TCGA-CDR as bags of four tokens."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cropkt.cancers import Cancer
from cropkt.cohort.outcomes import read_outcomes
from cropkt.cohort.pack import Pack
from cropkt.errors import OutcomeTableError
from cropkt_sim.clinical import DIM, Covariates, parse_stage, read_clinical
from cropkt_sim.sites import prepare

CDR = Path(__file__).resolve().parents[3] / "shared" / "data" / "tcga_cdr.csv"
needs_cdr = pytest.mark.skipif(not CDR.exists(), reason=f"{CDR} is absent: the real outcomes")
NAN = math.nan


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("Stage I", 1),
        ("Stage IIA", 2),
        ("Stage IIB", 2 + 1 / 6),
        ("Stage IIIC2", 3 + 1 / 3),
        ("Stage IB1", 1 + 1 / 6),
        ("IIa", 2),
        ("IVb", 4 + 1 / 6),
        ("Stage IVC", 4 + 1 / 3),
        ("Stage 0", 0),
        ("IS", 0),
        ("Stage IS", 0),
        ("I/II NOS", NAN),
        ("Stage X", NAN),
        ("[Not Available]", NAN),
        ("", NAN),
        ("VI", NAN),
    ],
)
def test_stages(text: str, stage: float) -> None:
    assert parse_stage(text) == pytest.approx(stage, nan_ok=True)


def test_tokens_of_a_known_patient() -> None:
    x = Covariates(age=90, male=0, stage=2 + 1 / 6, grade=3).tokens()
    want = np.zeros((4, DIM))
    want[0, [0, 5, 6, 7]] = 1, 2, 2, 1
    want[1, [1, 8]] = 1, -1
    want[2, [2, 9, 11]] = 1, (2 + 1 / 6 - 2.5) / 1.2, 1
    want[3, [3, 14, 17]] = 1, 0.7, 1
    assert x.dtype == np.float32
    assert x == pytest.approx(want, abs=1e-6)


def test_tokens_of_a_young_man_and_of_nobody_known() -> None:
    x = Covariates(age=45, male=1, stage=NAN, grade=NAN).tokens()
    assert x[0, [4, 5, 6, 7]].tolist() == [0, -1, 0, 0]
    assert x[1, 8] == 1
    unknown = Covariates(age=NAN, male=NAN, stage=NAN, grade=NAN).tokens()
    want = np.zeros((4, DIM))
    want[range(4), range(4)] = 1
    want[:, 4] = 1
    assert (unknown == want).all()


@needs_cdr
def test_the_real_table_has_the_patients_of_its_outcomes() -> None:
    found = read_clinical(CDR, endpoint="DSS", cancers=None)
    outcomes = read_outcomes(CDR)
    assert tuple(found.patients) == tuple(Cancer)
    counts = {cancer: len(patients.rows) for cancer, patients in found.patients.items()}
    assert counts == Counter(row.cancer for row in outcomes.rows)
    assert sum(counts.values()) == 10_390  # 10,445 less those redacted
    assert any("57 patients left out: redacted" in note for note in found.notes)
    for patients in found.patients.values():
        assert patients.bags is not None
        bags = np.stack(list(patients.bags.values()))
        assert bags.shape == (len(patients.rows), 4, DIM)
        assert np.isfinite(bags).all()


@needs_cdr
def test_patients_of_the_real_table_by_hand() -> None:
    found = read_clinical(CDR, endpoint="DSS", cancers=[Cancer.ACC])
    bags = found.patients[Cancer.ACC].bags
    assert bags is not None
    # TCGA-OR-A5J1: 58 years, male, Stage II, no grade. TCGA-OR-A5J2: 44, female, Stage IV.
    first, second = bags["TCGA-OR-A5J1"], bags["TCGA-OR-A5J2"]
    assert first[0, 5:8] == pytest.approx([-2 / 15, 0, 0])
    assert first[1, 8] == 1
    assert first[2, 9:14] == pytest.approx([-0.5 / 1.2, 0, 1, 0, 0])
    assert first[3].tolist() == [0, 0, 0, 1, 1, *[0] * 14]
    assert second[0, 5] == pytest.approx(-16 / 15)
    assert second[1, 8] == -1
    assert second[2, 9:14] == pytest.approx([1.5 / 1.2, 0, 0, 0, 1])


@needs_cdr
def test_sites_of_the_real_table(tmp_path: Path) -> None:
    prepared = prepare(
        data="clinical",
        folder=tmp_path,
        cancers=None,
        seed=0,
        outcomes=CDR,
        features=(),
        endpoint="DSS",
        by="cancers",
        on_bad="raise",
    )
    assert prepared.names == tuple(Cancer)
    assert (prepared.dim, prepared.planted) == (DIM, None)
    uvm = prepared.folder / str(list(Cancer).index(Cancer.UVM))
    want = read_outcomes(CDR, cancers=[Cancer.UVM])
    got = read_outcomes(uvm / "outcomes.csv")
    assert [(r.patient_id, r.days, r.event, r.hospital) for r in got.rows] == [
        (r.patient_id, r.days, r.event, r.hospital) for r in want.rows
    ]
    assert Pack(uvm / "pack").shape(got.rows[0].slides[0]) == (4, DIM)


def test_a_table_without_covariates_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "cdr.csv"
    table.write_text("bcr_patient_barcode,type,DSS,DSS.time\nTCGA-V4-A9E5,UVM,1,10\n")
    with pytest.raises(OutcomeTableError, match="lacks columns age_at_initial"):
        read_clinical(table, endpoint="DSS", cancers=None)
