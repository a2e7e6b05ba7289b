"""What the doctor says of a hospital's data: real tables and slide files, one fault at a time."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from torch import Tensor

from cropkt.cancers import Cancer
from cropkt.checkup import Finding, part, show
from cropkt.cohort.features import SlideFolders, write_slide_h5
from cropkt.cohort.pack import write_pack
from cropkt.config import ExpertShape, StudyConfig
from cropkt_client.doctor import machine, reading
from cropkt_client.doctor.cohort import Cohorts
from cropkt_client.doctor.folds import other_splits
from cropkt_client.site import Site, folds_of

SECRET = "SECRET"  # every id and file name begins with it
PATIENTS, DIM = 36, 5
TIMES = re.compile(r"\b9[01]\d{3}\b")  # what the days of every patient look like
STUDY = StudyConfig(encoder="UNI2-h", endpoint="OS", folds=3, shape=ExpertShape(dim=DIM))
HEADER = "patient_id,slide_id,time,event"


@dataclass
class Hospital:
    """A hospital on disk; every third patient has two slides."""

    folder: Path
    rows: list[list[str]] = field(default_factory=list)  # patient, slide, time, event
    settings: dict[str, Any] = field(default_factory=dict)
    lines: str = ""  # of the last check-up

    @property
    def config(self) -> Path:
        return self.folder / "site.yaml"

    def slide(self, row: int) -> Path:
        return self.folder / "slides" / f"{self.rows[row][1]}.h5"

    def write(self, *, header: str = HEADER) -> None:
        lines = [header] if header else []
        lines += [",".join(row) for row in self.rows]
        (self.folder / "outcomes.csv").write_text("\n".join(lines) + "\n")
        self.config.write_text(yaml.safe_dump(self.settings))

    def checked(self, *, study: StudyConfig | None = STUDY, code: int) -> dict[str, Finding]:
        """Return the first finding of each check; all of them show no patient and name a fix."""
        checks = Cohorts(self.config, study, full=True).checks
        kept = list(part("data", checks))
        self.lines, found = "\n".join(finding.line for finding in kept), {}
        for finding in reversed(kept):
            found[finding.check] = finding
            assert SECRET not in finding.line
            assert not TIMES.search(finding.line)
            assert bool(finding.fix) == (finding.word in ("warn", "fail"))
        assert show(kept, as_json=True) == code, kept
        return found


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    rng = np.random.default_rng(0)
    (tmp_path / "slides").mkdir()
    here = Hospital(tmp_path)
    for i in range(PATIENTS):
        for j in range(1 + (i % 3 == 0)):
            patient = f"{SECRET}-{i:02d}"
            time, event = str(90_000 + 31 * i), str(int(i % 4 != 3))
            here.rows.append([patient, f"{patient}-{j}", time, event])
            features = rng.normal(size=(rng.integers(4, 9), DIM)).astype(np.float16)
            write_slide_h5(here.slide(-1), features)
    here.settings = {
        "site": "lumc",
        "cancers": ["UVM"],
        "outcomes": "outcomes.csv",
        "slides": ["slides"],
        "encoder": "UNI2-h",
        "release": {"approval": "auto"},
    }
    here.write()
    return here


def only(found: dict[str, Finding], check: str, word: str) -> Finding:
    """Return the finding of a check, which is the only one that is not ok."""
    assert [name for name, one in found.items() if one.word not in ("ok", "skipped")] == [check]
    assert found[check].word == word
    return found[check]


def test_all_is_well(hospital: Hospital) -> None:
    found = hospital.checked(code=0)
    assert found.pop("made alike").found == "no file says its encoder or magnification"
    assert {finding.word for finding in found.values()} == {"ok"}, found
    assert "plain, OS (1 = event), `event`, `time` in days" in found["outcomes"].found
    assert "36 with outcome and slides, events: 27; 12 have" in found["patients of UVM"].found
    assert found["events of UVM"].found == f"by fold: {', '.join(['fewer than 10'] * 3)}"
    assert "whole in one of 3 folds, 12 with several slides" in found["both sides of UVM"].found
    assert found["values"].found == "all finite; 48 of 48 slides read"
    total = sum(h5py.File(hospital.slide(i))["features"].shape[0] for i in range(48))
    assert found["size"].found.startswith(f"{total} patches, 0.00 GB in memory")


def test_the_study_is_guessed_from_the_table_where_nobody_told_it(hospital: Hospital) -> None:
    found = hospital.checked(study=None, code=0)
    assert found["study"].word == "skipped"
    assert "judged by OS" in found["study"].found
    assert "features are 5 wide" in found["width"].found
    assert "nobody told the study's yet" in found["encoder"].found


@pytest.mark.parametrize("theirs", ["CONCH", ""])
def test_another_encoder(hospital: Hospital, theirs: str) -> None:
    found = hospital.checked(study=replace(STUDY, encoder=theirs), code=1)
    finding = only(found, "encoder", "fail")
    assert f"UNI2-h is named, the study's is {theirs or 'none'}" in finding.found


def test_no_encoder(hospital: Hospital) -> None:
    hospital.settings["encoder"] = ""
    hospital.write()
    assert "no client starts" in only(hospital.checked(code=1), "encoder", "fail").fix


@pytest.mark.parametrize(
    ("others", "settings", "word", "says"),
    [
        ({}, {}, "ok", "encoder (said by 48) and magnification (48) of 48 files agree"),
        ({"encoder": "univ2"}, {}, "ok", "encoder (said by 48)"),
        ({"encoder": f"{SECRET}-conch"}, {}, "warn", "2 encoders (slides: 36, 12)"),
        ({"target_magnification": 40}, {}, "warn", "2 magnifications (slides: 20x: 36, 40x: 12)"),
        ({}, {"magnification": 20}, "ok", "agree"),
        ({}, {"magnification": 40}, "warn", "site.yaml says 40x, the files 20x"),
    ],
)
def test_slides_that_were_made_in_two_ways(
    hospital: Hospital, others: dict[str, Any], settings: dict[str, Any], word: str, says: str
) -> None:
    hospital.settings |= settings
    hospital.write()
    for row in range(48):
        said = {"encoder": "UNI2-h", "target_magnification": 20} | (others if row < 12 else {})
        with h5py.File(hospital.slide(row), "a") as file:
            file.attrs.update(said)
    found = hospital.checked(code=0)
    assert found["made alike"].word == word
    assert says in found["made alike"].found


def test_a_pack_that_does_not_say_how_it_was_made(hospital: Hospital) -> None:
    source = SlideFolders(hospital.folder / "slides")
    slides = ((name, source.features(name).numpy()) for name in source.slide_ids())
    write_pack(hospital.folder / "pack", slides, dim=DIM, dtype=np.float16)
    hospital.settings |= {"slides": [], "pack": "pack"}
    hospital.write()
    assert "a pack does not keep" in hospital.checked(code=0)["made alike"].found


def test_no_slide_can_be_read(hospital: Hospital) -> None:
    for path in (hospital.folder / "slides").iterdir():
        path.write_bytes(b"nothing")
    found = hospital.checked(code=1)
    assert found["width"].found == "no slide can be read"
    assert "log" not in found["width"].fix  # nothing is written there


def test_another_width(hospital: Hospital) -> None:
    found = hospital.checked(study=replace(STUDY, shape=ExpertShape()), code=1)
    assert found["width"].found == "features are 5 wide, the study's 1536"
    assert "study's encoder" in found["width"].fix


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"slides": ["slides", "SECRET-folder"]}, "number 2 does not exist"),
        ({"slides": [], "pack": "SECRET-pack"}, "the pack cannot be opened"),
        ({"slides": ["empty"]}, "holds no slide file"),
    ],
)
def test_slides_that_are_not_there(hospital: Hospital, settings: dict[str, Any], says: str) -> None:
    (hospital.folder / "empty").mkdir()
    hospital.settings |= settings
    hospital.write()
    found = hospital.checked(code=1)
    assert says in only(found, "slides", "fail").found
    assert found["patients"].found == "the slides cannot be read"


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("", "its columns are in no known form"),  # the first patient is taken as the header
        ("patient_id,slide_id,time", "the table cannot be read"),
        ("patient_id,slide_id,time,time", "the table cannot be read"),
        ("patient_id,slide_id,time,died", "its columns are in no known form"),
    ],
)
def test_a_table_that_cannot_be_read(hospital: Hospital, header: str, says: str) -> None:
    hospital.write(header=header)
    found = hospital.checked(code=1)
    assert says in only(found, "outcomes", "fail").found
    assert found["patients"].found == "the outcomes cannot be read"


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        (2, "-91001", "time not positive"),
        (3, "SECRET", "event not 0 or 1"),
        (0, "", "no patient id"),
    ],
)
@pytest.mark.parametrize(("on_bad", "word"), [("raise", "fail"), ("skip", "warn")])
def test_a_row_that_is_not_usable(
    hospital: Hospital, column: int, value: str, says: str, on_bad: str, word: str
) -> None:
    hospital.rows[7][column] = value
    hospital.settings["on_bad"] = on_bad
    hospital.write()
    found = hospital.checked(code=int(word == "fail"))
    assert found["outcome rows"].word == word
    assert says in found["outcome rows"].found
    assert ("row 9 of the table" in found["outcome rows"].found) == (word == "fail")


@pytest.mark.parametrize(("on_bad", "word"), [("raise", "fail"), ("skip", "warn")])
def test_an_outcome_without_slide(hospital: Hospital, on_bad: str, word: str) -> None:
    hospital.slide(2).unlink()  # the only one of its patient
    hospital.settings["on_bad"] = on_bad
    hospital.write()
    hospital.checked(code=int(word == "fail"))
    for says in ("1 slide left out: no file for this slide", "1 patient left out: no usable slide"):
        assert f"{word:<7} data: patients of UVM: {says}" in hospital.lines


def test_a_slide_without_outcome(hospital: Hospital) -> None:
    write_slide_h5(hospital.folder / "slides" / f"{SECRET}-alone.h5", np.ones((3, DIM), "f2"))
    found = hospital.checked(code=0)
    assert only(found, "slides without outcome", "warn").found == "1 of 49 are not used"


def test_one_patient_under_two_ids(hospital: Hospital) -> None:
    hospital.rows[1][0] = hospital.rows[1][0].lower()  # the second slide of the first patient
    hospital.write()
    found = hospital.checked(code=0)
    assert "1 ids are written in several ways" in only(found, "patients twice", "warn").found


def test_one_slide_of_two_patients_under_two_names(hospital: Hospital) -> None:
    hospital.rows.append([f"{SECRET}-99", f"{hospital.rows[2][1]}.svs", "90500", "1"])
    hospital.write()
    found = hospital.checked(code=1)
    assert "1 slides are of two patients" in found["both sides of UVM"].found
    assert "trained on and tested" in found["both sides of UVM"].fix


def test_the_same_slide_in_two_files(hospital: Hospital) -> None:
    hospital.slide(5).write_bytes(hospital.slide(2).read_bytes())
    found = hospital.checked(code=1)
    assert "1 slides have the same content as one of another patient" in (
        only(found, "same slide twice", "fail").found
    )
    hospital.slide(5).write_bytes(hospital.slide(4).read_bytes())  # both of one patient
    assert only(hospital.checked(code=0), "same slide twice", "warn").fix.startswith("Remove")


@pytest.mark.parametrize(
    ("value", "dtype", "check", "word", "says"),
    [
        (np.nan, "f2", "values", "fail", "1 NaN"),
        (np.inf, "f4", "values", "fail", "1 infinite"),
        (np.inf, "f2", "float16 overflow", "fail", "1 slides hold infinity in float16"),
        (7e4, "f4", "float16 overflow", "warn", "1 slides hold values over 65504"),
    ],
)
def test_values_that_are_no_features(
    hospital: Hospital, value: float, dtype: str, check: str, word: str, says: str
) -> None:
    features = np.ones((4, DIM), dtype)
    features[2, 1] = value
    write_slide_h5(hospital.slide(3), features)
    found = hospital.checked(code=int(word == "fail"))
    assert says in only(found, check, word).found
    assert re.search("float32|again", found[check].fix)


def test_a_slide_that_is_no_slide(hospital: Hospital) -> None:
    hospital.slide(2).write_bytes(b"nothing")
    found = hospital.checked(code=1)
    assert "left out: truncated, or not an HDF5 file" in hospital.lines
    assert found["values"].word == "ok"  # of those that are left


def test_few_events(hospital: Hospital) -> None:
    died = {f"{SECRET}-{i:02d}" for i in range(0, 36, 10)}
    for row in hospital.rows:
        row[3] = str(int(row[0] in died))
    hospital.write()
    found = hospital.checked(code=0)
    assert found["events of UVM"].word == "warn"
    assert found["events of UVM"].found == f"by fold: {', '.join(['fewer than 10'] * 3)}"
    assert found["patients of UVM"].found.startswith("36 with outcome and slides, events: fewer")
    assert found["release of UVM"].word == "warn"
    assert "patients: 36, events: fewer than 10" in found["release of UVM"].found


def test_the_counts_of_every_fold(hospital: Hospital) -> None:
    hospital.settings["release"] = {"minimum_patients": 0, "minimum_events": 0}
    hospital.write()
    found = hospital.checked(code=0)
    site = Site.load(hospital.config)
    cohort, _ = site.cohort(Cancer.UVM, STUDY)
    folds = folds_of(cohort, STUDY)
    inside = [(cohort.days[folds == n], cohort.event[folds == n]) for n in range(3)]
    events = ", ".join(str(int(event.sum())) for _, event in inside)
    pairs = ", ".join(
        str(sum(e and t < other for t, e in zip(days, event, strict=True) for other in days))
        for days, event in inside  # no two times are equal
    )
    assert found["events of UVM"].found == f"by fold: {events}"
    assert found["pairs of UVM"].found == f"comparable by fold: {pairs}"


def test_a_fold_without_a_comparable_pair_is_told(hospital: Hospital) -> None:
    died = {f"{SECRET}-{i:02d}" for i in (3, 20)}
    for row in hospital.rows:
        row[3] = str(int(row[0] in died))
    hospital.write()
    finding = hospital.checked(code=0)["pairs of UVM"]  # the study judges the other folds
    assert finding.word == "warn"
    assert "1 fold without any: its patients are not judged" in finding.found


def test_folds_without_a_comparable_pair(hospital: Hospital) -> None:
    for row in hospital.rows:
        row[3] = str(int(row[0] in (f"{SECRET}-34", f"{SECRET}-35")))
    hospital.write()
    found = hospital.checked(study=replace(STUDY, folds=10), code=1)
    assert found["pairs of UVM"].found == "no fold has a comparable pair"


def test_too_few_patients_for_the_folds(hospital: Hospital) -> None:
    del hospital.rows[5:]
    hospital.write()
    found = hospital.checked(study=replace(STUDY, folds=10), code=1)
    assert "do not fill 10 folds" in found["events of UVM"].found


@pytest.mark.parametrize(
    ("release", "says", "fix"),
    [
        (None, "nothing leaves this site", "Decide `release`"),
        ({"minimum_patients": 37}, "patients: fewer than 37, events: 27", "Lower the minima"),
        ({"minimum_patients": 25}, "not without a fold: no fold's score or model", "Lower the"),
        ({"purposes": ["care"]}, "a study for research is answered nothing", "release.purposes"),
        ({"cancers": []}, "nothing of this cancer leaves", "release.cancers"),
    ],
)
def test_what_may_leave(hospital: Hospital, release: Any, says: str, fix: str) -> None:
    hospital.settings["release"] = release
    hospital.write()
    finding = only(hospital.checked(code=0), "release of UVM", "warn")
    assert says in finding.found
    assert fix in finding.fix


def test_more_than_fits_into_memory(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory", lambda: (1000, 2000))
    finding = only(hospital.checked(code=0), "size", "warn")
    assert "every epoch reads from disk" in finding.found


@pytest.mark.parametrize(
    ("forgets", "how"), [(True, "from the disk"), (False, "perhaps from memory")]
)
def test_slides_on_a_slow_disk(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, forgets: bool, how: str
) -> None:
    write_slide_h5(hospital.slide(0), np.ones((1_200_000, DIM), dtype=np.float16))
    at_once = SlideFolders.features

    def slowly(source: SlideFolders, slide: str) -> Tensor:
        features = at_once(source, slide)
        time.sleep(features.nbytes / 20e6)
        return features

    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(SlideFolders, "features", slowly)
    monkeypatch.setattr(reading, "COLD", 48)
    if not forgets:
        monkeypatch.setattr("os.posix_fadvise", refuse)
    finding = only(hospital.checked(code=0), "read speed", "warn")
    speed, unit = finding.found.split(maxsplit=1)
    assert int(speed) <= 20
    assert unit == f"MB/s, {how}"
    assert "local disk" in finding.fix


@pytest.mark.parametrize(
    ("size", "seconds", "word", "says"),
    [
        (98e6, 2.0, "warn", "49 MB/s, perhaps from memory"),
        (102e6, 2.0, "ok", "51 MB/s, perhaps from memory"),
        (9e6, 9.0, "ok", "too little to measure (9.0 MB)"),
        (0, 0.0, "skipped", "no slide could be read"),
    ],
)
def test_a_speed_in_words(size: float, seconds: float, word: str, says: str) -> None:
    finding = reading._speed(reading._Seen(size=int(size), seconds=seconds))
    assert (finding.word, finding.found) == (word, says)


def test_compressed_slides(hospital: Hospital) -> None:
    features = np.random.default_rng(1).normal(size=(20_000, DIM)).astype("f4")
    with h5py.File(hospital.slide(4), "w") as file:
        file.create_dataset("features", data=features, compression="gzip", chunks=(64, DIM))
    finding = only(hospital.checked(code=0), "compression", "warn")
    said = re.fullmatch(
        r"1 of 48 slides are compressed; without, they are read (\d+) times as fast", finding.found
    )
    assert said
    assert int(said[1]) > 1
    assert "pack" in finding.fix
    assert not list((hospital.folder).glob(".doctor-*"))


def test_by_name_where_the_table_has_no_slides(hospital: Hospital) -> None:
    lines = ["bcr_patient_barcode,type,OS,OS.time"]
    lines += [f"{row[0]},UVM,{row[3]},{row[2]}" for row in hospital.rows if row[1].endswith("-0")]
    lines += [f"{SECRET}-98,UVM,1,90700", f"{SECRET}-97,UVM,1,[Not Available]"]
    (hospital.folder / "outcomes.csv").write_text("\n".join(lines) + "\n")
    found = hospital.checked(code=0)  # on_bad: raise does not stop at either
    assert found["outcome rows"].word == "warn"
    assert "1 patient left out: no slide's name begins with their id" in hospital.lines
    assert found["slides without outcome"].word == "ok"


def test_only_a_part_is_read_where_time_is_short(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cropkt_client.doctor.reading.BUDGET", -1.0)
    checks = Cohorts(hospital.config, STUDY, full=False).checks
    found = {finding.check: finding for finding in checks()}
    assert found["values"].found == "all finite; 0 of 48 slides read (the rest with --full)"
    assert found["size"].word == "skipped"


def test_the_cancers_that_can_be_trained_are_known_afterwards(hospital: Hospital) -> None:
    looked = Cohorts(hospital.config, STUDY, full=False)
    list(looked.checks())
    assert looked.usable == {Cancer.UVM: PATIENTS}


@pytest.mark.parametrize(
    ("files", "word", "says"),
    [
        ((("a,b", "c"), ("b,c", "a")), "ok", "2 files: nobody is trained on and tested in one"),
        ((("a,b", "c"), ("a,c", "a")), "fail", "file 2: 1 patients are both trained on and tested"),
        ((("a,b", "c"), ("a,b", "c")), "fail", "a patient is tested in two files"),
    ],
)
def test_splits_of_other_work_are_looked_through(
    tmp_path: Path, files: tuple[tuple[str, str], ...], word: str, says: str
) -> None:
    paths = [tmp_path / f"{SECRET}-{number}.csv" for number in range(len(files))]
    for path, (train, test) in zip(paths, files, strict=True):
        rows = zip_longest(train.split(","), test.split(","), fillvalue="")
        path.write_text("\n".join(["train,test", *(f"{a},{b}" for a, b in rows)]))
    finding = other_splits(paths)
    assert finding.word == word
    assert says in finding.line
    assert SECRET not in finding.line
    for headless in (f"{SECRET},{SECRET}\n", f"{SECRET},{SECRET}b\n{SECRET},{SECRET}c\n"):
        paths[0].write_text(headless)
        finding = other_splits(paths)
        assert SECRET not in finding.line
        assert finding.word == "fail"
        assert finding.found.startswith("file 1: ")


def test_the_splits_of_patho_bench_are_looked_through(tmp_path: Path) -> None:
    path = tmp_path / f"{SECRET}.tsv"
    rows = [f"{SECRET}{i}\t{'train' if i else 'test'}\ttest" for i in range(2)]
    path.write_text("\n".join(["case_id\tfold_0\tfold_1", *rows]))
    finding = other_splits([path])
    assert finding.word == "fail"
    assert "file 1: 1 patients are tested in fold_1 and in fold_0" in finding.line
    assert SECRET not in finding.line
    path.write_text(path.read_text().replace("test\ttest", "test\ttrain"))
    assert "1 file: nobody is trained on and tested" in other_splits([path]).line
