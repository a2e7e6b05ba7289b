from __future__ import annotations

import csv
import gzip
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cropkt.cancers import Cancer, cancer_of
from cropkt.cohort.outcomes import read_outcomes
from cropkt.errors import OutcomeTableError

PLAIN = "patient_id,slide_id,time,event,cancer,site"

# SCIENCE.md: patients/deaths/hospitals usable for DSS; it counts redacted patients, the reader not
USABLE = """ACC 89/29/5, BLCA 396/123/35, BRCA 1064/83/40, CESC 290/54/31, CHOL 42/18/9,
COADREAD 584/75/38, DLBC 47/4/7, GBMLGG 1057/558/46, HNSC 501/130/28, KIPAN 919/147/59,
LIHC 362/80/37, LUNG 919/202/66, MESO 65/43/12, OV 545/301/21, PAAD 177/79/27, PCPG 179/4/18,
PRAD 498/5/32, SARC 255/81/34, SKCM 448/188/25, STES 573/151/40, TGCT 134/3/15, THCA 500/7/22,
THYM 123/4/19, UCEC 544/60/31, UCS 54/31/10, UVM 80/21/6"""


def by_cancer(text: str) -> dict[Cancer, tuple[int, ...]]:
    pairs = (item.split() for item in text.split(","))
    return {Cancer(name): tuple(map(int, counts.split("/"))) for name, counts in pairs}


def test_tcga_cdr_is_the_published_table_without_redacted_patients(shared_data: Path) -> None:
    table = read_outcomes(shared_data / "tcga_cdr.csv")
    found = {
        cancer: (len(rows), sum(r.event for r in rows), len({r.hospital for r in rows}))
        for cancer in Cancer
        if (rows := table.of(cancer).rows)
    }
    redacted: Counter[Cancer] = Counter()
    redacted_deaths: Counter[Cancer] = Counter()
    with (shared_data / "tcga_cdr.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["Redaction"] and row["DSS"] and row["DSS.time"]:
                redacted[cancer_of(row["type"])] += 1
                redacted_deaths[cancer_of(row["type"])] += row["DSS"] == "1"
    assert redacted.total() == 55
    assert len(table) + redacted.total() == 10_445
    assert {
        cancer: (patients + redacted[cancer], deaths + redacted_deaths[cancer], hospitals)
        for cancer, (patients, deaths, hospitals) in found.items()
    } == by_cancer(USABLE)
    assert table.form == "TCGA-CDR, DSS (1 = event), `dss`, `dss.time` in days"
    assert table.dropped == (
        "513 patients left out: no event or time of DSS, or time not positive",
        "200 patients left out: of a study without slides",
        "57 patients left out: redacted",
    )


def test_published_labels_of_26_cancers(shared_data: Path) -> None:
    table = read_outcomes(shared_data / "tcga26_dss_slides.csv")
    assert len(table) == 9_182
    assert sum(row.event for row in table.rows) == 1_977
    assert sum(len(row.slides) for row in table.rows) == 11_200
    assert {row.cancer for row in table.rows} == set(Cancer)
    assert table.dropped == ()
    uvm = read_outcomes(shared_data / "tcga26_dss_slides.csv", cancers=[Cancer.UVM])
    assert uvm.rows == table.of(Cancer.UVM).rows
    assert len(uvm) == 80


CDR = "bcr_patient_barcode,type,OS,OS.time,DSS,DSS.time,Redaction"


def test_tcga_cdr_form(table) -> None:
    path = table(
        CDR,
        "TCGA-B-2,COAD,1,9,0,400,",
        "TCGA-NA-1,READ,1,9,1,100.0,",
        "TCGA-A-3,COAD,1,9,,400,",
        "TCGA-A-4,COAD,1,9,1,[Not Available],",
        "TCGA-A-5,COAD,1,9,1,0,",
        "TCGA-A-6,COAD,1,9,1,50,Redacted",
        "TCGA-A-7,LAML,1,9,1,50,",
        "TCGA-A-8,UVM,1,9,1,50,",
    )
    read = read_outcomes(path)
    assert [(r.patient_id, r.cancer, r.days, r.event, r.hospital, r.slides) for r in read.rows] == [
        ("TCGA-A-8", Cancer.UVM, 50, True, "A", ()),
        ("TCGA-B-2", Cancer.COADREAD, 400, False, "B", ()),
        ("TCGA-NA-1", Cancer.COADREAD, 100, True, "NA", ()),
    ]
    assert [line.split()[0] for line in read.dropped] == ["3", "1", "1"]
    assert len(read_outcomes(path, endpoint="os").rows) == 6
    only = read_outcomes(path, cancers=[Cancer.UVM])
    assert (len(only), only.dropped) == (1, ())


@pytest.mark.parametrize("bad", ["TCGA-A-1,UVM,1,9,1,fifty,", "TCGA-A-2,UVM,1,9,2,50,"])
def test_tcga_cdr_holds_gaps_but_no_nonsense(table, bad: str) -> None:
    path = table(CDR, "TCGA-A-9,UVM,1,9,1,50,", bad)
    with pytest.raises(OutcomeTableError, match="row 3: `dss"):
        read_outcomes(path)
    assert len(read_outcomes(path, on_bad="skip")) == 1


def test_tcga_cdr_has_a_row_for_each_patient(table) -> None:
    path = table(CDR, *["TCGA-A-1,UVM,1,9,1,50,"] * 2, "TCGA-A-2,UVM,1,9,1,50,")
    with pytest.raises(OutcomeTableError, match="row 3: a second row of the patient of row 2"):
        read_outcomes(path)
    assert len(read_outcomes(path, on_bad="skip")) == 1


FORMS = {
    "plain": ("patient_id,slide_id,time,event,cancer,site", "p,s1,365.25,1,UVM,NA"),
    "published CROPKT": ("patient_id,pathology_id,t,e,project,tss", "p,s1,365.25,1,TCGA-UVM,NA"),
    "PANTHER/MMP": (
        "case_id,slide_id,dss_survival_days,dss_censorship,os_survival_days,os_censorship,"
        "tissue_source_site",
        "p,s1,365.25,0,9,1,NA",
    ),
    "SurvPath/PORPOISE": (
        "case_id,slide_id,survival_months,censorship,survival_months_dss,censorship_dss,site",
        "p,s1,9,1,12,0,NA",
    ),
    "Patho-Bench": ("case_id,slide_id,DSS,DSS_event,DSS_days,fold_0", "p,s1,2,1,365.25,test"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_every_form_means_the_same_death(table, name: str, separator: str) -> None:
    path = table(*(line.replace(",", separator) for line in FORMS[name]))
    read = read_outcomes(path, cancers=[Cancer.UVM])
    (row,) = read.rows
    assert (row.patient_id, row.days, row.event, row.slides) == ("p", 365.25, True, ("s1",))
    assert row.cancer is Cancer.UVM
    assert row.hospital == ("" if name == "Patho-Bench" else "NA")
    assert read.form.startswith(f"{name}, DSS (1 = ")
    censoring = name in ("PANTHER/MMP", "SurvPath/PORPOISE")
    assert ("1 = CENSORED" in read.form) is censoring
    assert ("1 = event" in read.form) is not censoring


def test_the_endpoint_chooses_the_columns(table) -> None:
    mmp = read_outcomes(table(*FORMS["PANTHER/MMP"]), endpoint="OS").rows[0]
    assert (mmp.days, mmp.event) == (9, False)
    survpath = read_outcomes(table(*FORMS["SurvPath/PORPOISE"]), endpoint="OS").rows[0]
    assert (survpath.days, survpath.event) == (9 * 30.4375, False)
    with pytest.raises(OutcomeTableError, match="match no form for PFI"):
        read_outcomes(table(*FORMS["SurvPath/PORPOISE"]), endpoint="PFI")


def test_months_without_an_endpoint_are_taken_as_asked_and_said(table) -> None:
    read = read_outcomes(table("case_id,slide_id,survival_months,censorship", "p,s.svs,2,1"))
    assert read.rows[0].days == 60.875
    assert read.form == (
        "SurvPath/PORPOISE, DSS (1 = CENSORED), `censorship`, `survival_months` in months x "
        "30.4375; the table does not name the endpoint"
    )


def test_gzip_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(f"{PLAIN}\np,s,1,1,UVM,x\n".encode("utf-8-sig")))
    assert len(read_outcomes(path)) == 1


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("patient_id,slide_id,time", r"match no form for DSS; the nearest, plain, lacks event"),
        ("case_id,slide_id,label", r"columns case_id, slide_id, label match no form"),
        ("patient_id,slide_id,time,event,pathology_id,t,e", "match 2 forms for DSS .*plain: event"),
        (
            "case_id,slide_id,dss_survival_days,dss_censorship,survival_months,censorship",
            "match 2 forms .*PANTHER/MMP: dss_censorship; SurvPath/PORPOISE: censorship",
        ),
        ("case_id,slide_id,dss_a_event,dss_a_days,dss_b_event,dss_b_days", "match 2 forms"),
        ("patient_id,slide_id,time,event,event", r"columns \['event'\] appear twice"),
    ],
)
@pytest.mark.parametrize("on_bad", ["raise", "skip"])
def test_refuses_to_guess_the_form(table, header: str, says: str, on_bad) -> None:
    path = table(header, ",".join("1" * len(header.split(","))))
    with pytest.raises(OutcomeTableError, match=says) as caught:
        read_outcomes(path, on_bad=on_bad)
    assert str(path) in str(caught.value)


GOOD = ("secret-a,s1,10,1,UVM,x", "secret-a,s2,10,1,UVM,x", "secret-b,s3,20,0,BRCA,y")

BAD_ROWS = {
    "time not a number": ("secret-c,s4,soon,1,UVM,x", "row 5: `time` is 'soon', not a number"),
    "time empty": ("secret-c,s4,,1,UVM,x", "row 5: `time` is '', not a number"),
    "time nan": ("secret-c,s4,nan,1,UVM,x", "row 5: `time` is 'nan', not a number"),
    "time zero": ("secret-c,s4,0,1,UVM,x", "row 5: `time` is 0, not positive"),
    "time negative": ("secret-c,s4,-3,1,UVM,x", "row 5: `time` is -3, not positive"),
    "event 2": ("secret-c,s4,3,2,UVM,x", "row 5: `event` is '2', not 0 or 1"),
    "event word": ("secret-c,s4,3,dead,UVM,x", "row 5: `event` is 'dead', not 0 or 1"),
    "cancer": ("secret-c,s4,3,1,XYZ,x", "row 5: unknown code 'XYZ'"),
    "no patient": (",s4,3,1,UVM,x", "row 5: no `patient_id`"),
    "no slide": ("secret-c,,3,1,UVM,x", "row 5: no `slide_id`"),
    "other time": ("secret-a,s4,11,1,UVM,x", "row 5: time, event or hospital differ from row 2"),
    "other event": ("secret-a,s4,10,0,UVM,x", "row 5: time, event or hospital differ from row 2"),
    "two cancers": ("secret-a,s4,10,1,BRCA,x", "row 5: the patient is BRCA here and UVM before"),
    "slide twice": ("secret-a,s2,10,1,UVM,x", "row 5: the slide is listed before"),
    "slide of two": ("secret-c,s1,10,1,UVM,x", "row 5: the slide is also that of the patient of"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_raises_or_drops_its_patient(table, case: str) -> None:
    row, says = BAD_ROWS[case]
    path = table(PLAIN, *GOOD, row)
    with pytest.raises(OutcomeTableError, match=says) as caught:
        read_outcomes(path)
    assert "secret" not in str(caught.value)

    read = read_outcomes(path, on_bad="skip")
    kept = [r.patient_id for r in read.rows]
    assert kept == (
        ["secret-b"] if "secret-a" in row or ",s1," in row else ["secret-a", "secret-b"]
    )
    assert sum(int(line.split()[0]) for line in read.dropped) == (2 if ",s1," in row else 1)
    assert "secret" not in " ".join(read.dropped) + repr(read) + repr(read.rows)


def test_rows_of_other_cancers_are_not_checked(table) -> None:
    path = table(PLAIN, *GOOD, "c,s4,soon,1,BRCA,x")
    assert len(read_outcomes(path, cancers=[Cancer.UVM])) == 1


def test_merged_studies_are_one_cancer(table) -> None:
    path = table(PLAIN, "a,s1,10,1,COAD,x", "a,s2,10,1,READ,x")
    assert read_outcomes(path).rows[0].cancer is Cancer.COADREAD


@pytest.mark.parametrize("on_bad", ["raise", "skip"])
def test_nothing_left_is_an_error(table, tmp_path: Path, on_bad) -> None:
    with pytest.raises(OutcomeTableError, match="the table is empty"):
        read_outcomes(table(PLAIN), on_bad=on_bad)
    (tmp_path / "none.csv").write_text("")
    with pytest.raises(OutcomeTableError, match="the table is empty"):
        read_outcomes(tmp_path / "none.csv", on_bad=on_bad)
    with pytest.raises(OutcomeTableError, match="no patient with a usable DSS is left"):
        read_outcomes(table(PLAIN, *GOOD), cancers=[Cancer.ACC], on_bad=on_bad)
    with pytest.raises(OutcomeTableError, match="no such file"):
        read_outcomes(tmp_path / "absent.csv", on_bad=on_bad)


def test_everyone_skipped_is_an_error(table) -> None:
    with pytest.raises(OutcomeTableError, match=r"is left \(1 patient left out: time not pos"):
        read_outcomes(table(PLAIN, "a,s,0,1,UVM,x"), on_bad="skip")


def test_not_a_text_table(tmp_path: Path, table) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xff\xfe\x00binary\x80")
    with pytest.raises(OutcomeTableError, match="not a readable text table"):
        read_outcomes(path)
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(PLAIN.encode() * 99)[:40])
    with pytest.raises(OutcomeTableError, match="not a readable text table"):
        read_outcomes(path)
    with pytest.raises(OutcomeTableError, match="row 3: 7 cells under 6 columns"):
        read_outcomes(table(PLAIN, GOOD[0], GOOD[1] + ",more"))


def test_a_table_without_cancer_column_is_of_one_cancer(table) -> None:
    path = table("patient_id,slide_id,time,event", "a,s,1,1")
    assert read_outcomes(path).rows[0].cancer is None
    assert read_outcomes(path).of(Cancer.ACC).rows[0].cancer is Cancer.ACC
    with pytest.raises(OutcomeTableError, match="no cancer column, and 2 cancers are asked for"):
        read_outcomes(path, cancers=[Cancer.ACC, Cancer.UVM])


@settings(deadline=None, max_examples=30)
@given(
    patients=st.dictionaries(
        st.text("abcXYZ019-_", min_size=1, max_size=8),
        st.tuples(st.integers(1, 20_000), st.booleans(), st.sampled_from(list(Cancer))),
        min_size=1,
        max_size=8,
    ),
    order=st.randoms(use_true_random=False),
)
def test_what_was_written_is_read_in_any_order(patients, order, tmp_path_factory) -> None:
    rows = [
        f"{name},{name}.{n},{days},{int(died)},{cancer},x"
        for name, (days, died, cancer) in patients.items()
        for n in range(2)
    ]
    order.shuffle(rows)
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_text("\n".join([PLAIN, *rows]))
    read = read_outcomes(path)
    assert {r.patient_id: (r.days, r.event, r.cancer) for r in read.rows} == patients
    assert [r.patient_id for r in read.rows] == sorted(patients)
    assert all(set(r.slides) == {f"{r.patient_id}.0", f"{r.patient_id}.1"} for r in read.rows)
