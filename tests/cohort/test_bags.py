from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cropkt.cancers import Cancer
from cropkt.cohort.bags import PackedBags, load_cohort
from cropkt.cohort.checks import all_finite
from cropkt.cohort.features import SlideFolders, write_slide_h5
from cropkt.cohort.outcomes import read_outcomes
from cropkt.cohort.pack import Pack, write_pack
from cropkt.errors import (
    BagShapeError,
    CohortError,
    DataError,
    MissingSlideError,
    NotEstimableError,
    SlideFileError,
)

PLAIN = "patient_id,slide_id,time,event,cancer,site"
ROWS = (
    "secret-b,s3,800,0,UVM,y",
    "secret-a,s2,100,1,UVM,x",
    "secret-a,s1,100,1,UVM,x",
    "secret-c,s4,20000,0,UVM,",
    "secret-d,s5,10,1,BRCA,x",
)


@pytest.fixture
def outcomes(table):
    return read_outcomes(table(PLAIN, *ROWS))


@pytest.fixture
def folder(slides) -> Path:
    return slides(s1=3, s2=2, s3=4, s4=1)


@pytest.fixture
def cohort(outcomes, folder):
    return load_cohort(outcomes, SlideFolders(folder), cancer=Cancer.UVM)[0]


def test_a_cohort_is_sorted_and_complete(cohort) -> None:
    assert cohort.patient_ids == ("secret-a", "secret-b", "secret-c")
    assert cohort.slides == (("s1", "s2"), ("s3",), ("s4",))
    assert cohort.hospital == ("x", "y", "")
    assert cohort.days.tolist() == [100, 800, 20000]
    assert cohort.event.tolist() == [True, False, False]
    assert cohort.time_bins.tolist() == [0, 2, 31]
    assert (cohort.cancer, cohort.endpoint, cohort.dim, len(cohort)) == (Cancer.UVM, "DSS", 4, 3)
    assert "secret" not in repr(cohort)


def test_a_bag_is_all_slides_of_the_patient(cohort, folder: Path) -> None:
    source = SlideFolders(folder)
    bag = cohort.bag(0)
    assert bag.dtype is torch.float16
    assert torch.equal(bag, torch.cat([source.features("s1"), source.features("s2")]))
    assert torch.equal(cohort.bag(1), source.features("s3"))


def test_pack_keeps_the_order_asked_for(cohort) -> None:
    packed = cohort.pack([2, 0])
    assert packed.count == 2
    assert packed.segment.tolist() == [0, 1, 1, 1, 1, 1]
    assert torch.equal(packed.patches, torch.cat([cohort.bag(2), cohort.bag(0)]))
    assert packed.patches.dtype is torch.float16


@pytest.mark.parametrize("chosen", [[2, 0], np.array([2, 0]), np.array([True, False, True])])
def test_subset(cohort, chosen) -> None:
    part = cohort.subset(chosen)
    order = [2, 0] if np.asarray(chosen).dtype != bool else [0, 2]
    assert part.patient_ids == tuple(cohort.patient_ids[i] for i in order)
    assert part.days.tolist() == cohort.days[order].tolist()
    assert part.event.tolist() == cohort.event[order].tolist()
    assert part.hospital == tuple(cohort.hospital[i] for i in order)
    assert torch.equal(part.bag(0), cohort.bag(order[0]))
    assert len(cohort.subset([])) == 0
    with pytest.raises(CohortError, match="mask of shape"):
        cohort.subset(np.array([True]))


def test_a_pack_gives_the_same_cohort(cohort, outcomes, folder: Path, tmp_path: Path) -> None:
    source = SlideFolders(folder)
    slides = ((name, source.features(name).numpy()) for name in source.slide_ids())
    write_pack(tmp_path / "pack", slides, dim=4, dtype="float16")
    other, dropped = load_cohort(outcomes, Pack(tmp_path / "pack"), cancer=Cancer.UVM, dim=4)
    assert dropped == ()
    for index in range(3):
        assert torch.equal(other.bag(index), cohort.bag(index))


def test_travels_to_a_worker(cohort) -> None:
    assert torch.equal(pickle.loads(pickle.dumps(cohort)).bag(0), cohort.bag(0))


def test_slides_of_two_types_are_read_as_the_wider(cohort, folder: Path) -> None:
    write_slide_h5(folder / "s2.h5", np.ones((2, 4), "float32"))
    assert cohort.bag(0).dtype is torch.float32


def test_a_file_that_changed_since(cohort, folder: Path) -> None:
    write_slide_h5(folder / "s3.h5", np.ones((2, 5), "float16"))
    with pytest.raises(BagShapeError, match="changed since the cohort was loaded"):
        cohort.bag(1)


def nan(path: Path, value: float = np.nan) -> None:
    features = np.ones((3, 4), "float16")
    features[1, 2] = value
    write_slide_h5(path, features)


BAD_SLIDES = {
    "missing": (Path.unlink, MissingSlideError, r"outcomes.csv row 2: no file for this slide"),
    "empty": (
        lambda p: write_slide_h5(p, np.ones((0, 4), "float16")),
        SlideFileError,
        "row 2: the slide's bag is empty",
    ),
    "empty vector": (
        lambda p: write_slide_h5(p, np.ones(0, "float16")),
        SlideFileError,
        "row 2: the slide's bag is empty",
    ),
    "width": (
        lambda p: write_slide_h5(p, np.ones((2, 5), "float16")),
        BagShapeError,
        r"row 2: features have shape \(2, 5\), expected \(patches, 4\)",
    ),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:99]), SlideFileError, "s3.h5: truncated"),
    "nan": (nan, SlideFileError, "row 2: the slide's features hold NaN or infinite"),
    "inf": (lambda p: nan(p, -np.inf), SlideFileError, "row 2: the slide's features hold NaN or"),
}


@pytest.mark.parametrize("case", BAD_SLIDES)
def test_a_bad_slide_raises_or_is_left_out(outcomes, folder: Path, case: str) -> None:
    spoil, error, says = BAD_SLIDES[case]
    spoil(folder / "s3.h5")
    if case == "missing":
        assert not (folder / "s3.h5").exists()
    source = SlideFolders(folder)
    with pytest.raises(error, match=says) as caught:
        load_cohort(outcomes, source, cancer=Cancer.UVM)
    assert "secret" not in str(caught.value)

    cohort, dropped = load_cohort(outcomes, source, cancer=Cancer.UVM, on_bad="skip")
    assert cohort.patient_ids == ("secret-a", "secret-c")
    assert len(dropped) == 2
    assert dropped[0].startswith("1 slide left out: ")
    assert dropped[1] == "1 patient left out: no usable slide"
    assert "secret" not in " ".join(dropped)


def test_overflow_of_half_precision_is_found(outcomes, folder: Path) -> None:
    with np.errstate(over="ignore"):
        write_slide_h5(folder / "s3.h5", np.full((2, 4), 1e5).astype("float16"))
    with pytest.raises(SlideFileError, match="NaN or infinite"):
        load_cohort(outcomes, SlideFolders(folder), cancer=Cancer.UVM)
    load_cohort(outcomes, SlideFolders(folder), cancer=Cancer.UVM, check_values=False)


def test_double_that_overflows_single_is_found(outcomes, folder: Path) -> None:
    write_slide_h5(folder / "s3.h5", np.full((2, 4), 1e300))
    with pytest.raises(SlideFileError, match="NaN or infinite"):
        load_cohort(outcomes, SlideFolders(folder), cancer=Cancer.UVM)


def test_left_out_lines_name_no_file(outcomes, folder: Path) -> None:
    (folder / "again").mkdir()
    write_slide_h5(folder / "again" / "s3.h5", np.ones((2, 4)))
    source = SlideFolders(folder)
    with pytest.raises(SlideFileError, match=r"s3\.h5: another file .*s3\.h5"):
        load_cohort(outcomes, source, cancer=Cancer.UVM)
    _, dropped = load_cohort(outcomes, source, cancer=Cancer.UVM, on_bad="skip")
    assert dropped[0] == "1 slide left out: another file of this format is of the same slide"


def test_a_patient_keeps_the_good_slides(outcomes, folder: Path) -> None:
    nan(folder / "s1.h5")
    cohort, dropped = load_cohort(outcomes, SlideFolders(folder), cancer=Cancer.UVM, on_bad="skip")
    assert cohort.slides[0] == ("s2",)
    assert dropped == ("1 slide left out: the slide's features hold NaN or infinite values",)


@pytest.mark.parametrize("on_bad", ["raise", "skip"])
def test_the_agreed_width_holds(outcomes, folder: Path, on_bad) -> None:
    error = BagShapeError if on_bad == "raise" else CohortError
    with pytest.raises(error, match=r"expected (\(patches, )?1536"):
        load_cohort(outcomes, SlideFolders(folder), cancer=Cancer.UVM, dim=1536, on_bad=on_bad)


@pytest.mark.parametrize("on_bad", ["raise", "skip"])
def test_cohorts_that_cannot_be(outcomes, table, folder: Path, on_bad) -> None:
    source = SlideFolders(folder)
    with pytest.raises(CohortError, match="no ACC patient with outcome and slides is left"):
        load_cohort(outcomes, source, cancer=Cancer.ACC, on_bad=on_bad)
    censored = read_outcomes(table(PLAIN, "a,s1,9,0,UVM,x", "b,s2,8,0,UVM,x"))
    with pytest.raises(NotEstimableError, match=r"no pair of the 2 UVM patients \(0 events\)"):
        load_cohort(censored, source, cancer=Cancer.UVM, on_bad=on_bad)


def test_a_table_without_slides_takes_them_by_name(table, slides) -> None:
    header = "bcr_patient_barcode,type,DSS,DSS.time"
    path = table(
        header, "TCGA-A-1,UVM,1,50", "TCGA-A-12,UVM,0,80", "TCGA-A-3,UVM,0,90", "TCGA-A-1-2,UVM,1,9"
    )
    folder = slides(
        **{"TCGA-A-1-01Z-DX1": 2, "TCGA-A-1-01Z-DX2": 3, "TCGA-A-12": 1, "TCGA-A-1-2-DX": 1}
    )
    cohort, dropped = load_cohort(read_outcomes(path), SlideFolders(folder), cancer=Cancer.UVM)
    assert cohort.slides == (
        ("TCGA-A-1-01Z-DX1", "TCGA-A-1-01Z-DX2"),
        ("TCGA-A-1-2-DX",),
        ("TCGA-A-12",),
    )
    assert dropped == ("1 patient left out: no slide's name begins with their id",)
    lone = read_outcomes(table(header, "TCGA-B-1,UVM,1,50"))
    with pytest.raises(MissingSlideError, match="begins with the id of one of 1 UVM patients"):
        load_cohort(lone, SlideFolders(folder), cancer=Cancer.UVM)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_packing_loses_nothing(sizes: list[int]) -> None:
    bags = [torch.randn(n, 3) for n in sizes]
    packed = PackedBags.of(bags)
    assert packed.count == len(bags)
    assert packed.segment.dtype is torch.int64
    for index, bag in enumerate(bags):
        assert torch.equal(packed.patches[packed.segment == index], bag)


@pytest.mark.parametrize(
    ("bags", "says"),
    [
        ([], "no bag to pack"),
        ([torch.ones(2, 3), torch.ones(2, 4)], r"shapes \[\(2, 3\), \(2, 4\)\]"),
        ([torch.ones(3)], r"shapes \[\(3,\)\]"),
        ([torch.ones(2, 3), torch.ones(0, 3)], "a bag is empty"),
    ],
)
def test_bags_that_do_not_pack(bags, says: str) -> None:
    with pytest.raises(DataError, match=says):
        PackedBags.of(bags)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=16, allow_nan=True, allow_infinity=True), max_size=8),
    st.sampled_from([torch.float16, torch.float32]),
)
def test_finite_by_definition(values: list[float], dtype: torch.dtype) -> None:
    features = torch.tensor(values, dtype=dtype)
    assert all_finite(features) == bool(torch.isfinite(features).all())
