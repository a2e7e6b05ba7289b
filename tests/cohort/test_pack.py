from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cropkt.cohort.pack import Pack, write_pack
from cropkt.errors import BagShapeError, MissingSlideError, SlideFileError

RNG = np.random.default_rng(0)
SLIDES = {
    name: RNG.normal(size=(n, 3)).astype("float32") for name, n in (("b", 2), ("a", 1), ("c", 5))
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pack(tmp_path / "pack", SLIDES.items(), dim=3, dtype="float32")
    return tmp_path / "pack"


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    dim=st.integers(1, 5),
    dtype=st.sampled_from(["float16", "float32"]),
    with_coords=st.booleans(),
)
def test_what_was_packed_is_read(sizes, dim, dtype, with_coords, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("p") / "pack"
    slides = {f"s{i}": RNG.normal(size=(n, dim)).astype(dtype) for i, n in enumerate(sizes)}
    coords = {name: RNG.integers(0, 9999, (len(x), 2)) for name, x in slides.items()}
    where = coords.__getitem__ if with_coords else None
    write_pack(folder, iter(slides.items()), dim=dim, dtype=dtype, coords=where)
    pack = Pack(folder)
    pack.verify()
    assert pack.slide_ids() == tuple(slides)
    for name, features in slides.items():
        read = pack.features(name)
        assert pack.shape(name) == tuple(read.shape)
        assert read.dtype is getattr(torch, dtype)
        np.testing.assert_array_equal(read.numpy(), features)
        found = pack.coords(name)
        if with_coords:
            np.testing.assert_array_equal(found.numpy(), coords[name])
        else:
            assert found is None
    np.testing.assert_array_equal(
        np.load(folder / "patches.npy"), np.concatenate(list(slides.values()))
    )


def test_a_bag_is_the_callers_own(folder: Path) -> None:
    before = Pack(folder).features("a").clone()
    Pack(folder).features("a").zero_()
    assert torch.equal(Pack(folder).features("a"), before)


def test_travels_to_a_worker_without_its_data(folder: Path) -> None:
    sent = pickle.dumps(Pack(folder))
    assert len(sent) < 5_000
    assert torch.equal(pickle.loads(sent).features("c"), Pack(folder).features("c"))


def test_names_with_and_without_ending(folder: Path) -> None:
    pack = Pack(folder)
    assert "a.svs" in pack
    assert "z" not in pack
    assert 3 not in pack
    assert pack.shape("a.svs") == (1, 3)
    with pytest.raises(MissingSlideError, match="the pack lacks a slide"):
        pack.features("z")


def bag(*shape: int, fill: float = 1.0) -> np.ndarray:
    return np.full(shape, fill, dtype="float32")


@pytest.mark.parametrize(
    ("slides", "error", "says"),
    [
        ([("a", bag(1, 3)), ("a", bag(1, 3))], SlideFileError, "slide number 2: the slide is giv"),
        ([("a", bag(1, 3)), ("b", bag(2, 4))], BagShapeError, r"number 2: features have shape \(2"),
        ([("a", bag(3))], BagShapeError, r"shape \(3,\), expected \(patches, 3\)"),
        ([("a", bag(0, 3))], SlideFileError, "bag is empty"),
        ([("a", bag(1, 3, fill=np.nan))], SlideFileError, "NaN, infinite, or too large for float"),
        ([("a", bag(1, 3, fill=7e4))], SlideFileError, "too large for float16"),
        ([], SlideFileError, "no slide to pack"),
    ],
)
def test_bad_slides_leave_nothing_behind(tmp_path: Path, slides, error, says) -> None:
    with pytest.raises(error, match=says):
        write_pack(tmp_path / "pack", iter(slides), dim=3, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_reader_leaves_nothing_behind(tmp_path: Path) -> None:
    def slides():
        yield "a", bag(2, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pack(tmp_path / "pack", slides(), dim=3, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_coords_of_another_length(tmp_path: Path) -> None:
    with pytest.raises(SlideFileError, match=r"coords have shape \(9, 2\), expected \(2, 2\)"):
        write_pack(
            tmp_path / "pack",
            [("a", bag(2, 3))],
            dim=3,
            dtype="float16",
            coords=lambda _: np.zeros((9, 2)),
        )
    assert list(tmp_path.iterdir()) == []


def test_never_overwrites(folder: Path) -> None:
    with pytest.raises(SlideFileError, match="exists already"):
        write_pack(folder, SLIDES.items(), dim=3, dtype="float32")
    with pytest.raises(SlideFileError, match="cannot hold float64"):
        write_pack(folder.parent / "other", SLIDES.items(), dim=3, dtype="float64")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[:-1])
    elif how == "long":
        path.write_bytes(data + b"\0")
    elif how == "empty":
        path.write_bytes(b"")
    else:
        old, new = how.split(">")
        assert old.encode() in data
        path.write_bytes(data.replace(old.encode(), new.encode(), 1))


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("patches.npy", "gone", "the pack lacks this file"),
        ("patches.npy", "short", "truncated"),
        ("patches.npy", "empty", "truncated"),
        ("patches.npy", "long", "more bytes than its header says"),
        ("patches.npy", "(8, 3)>(24,) ", "not a C-ordered matrix"),
        ("patches.npy", "<f4><i4", "truncated|not float16 or float32"),
        ("slides.csv", "gone", "missing, or not CSV"),
        ("slides.csv", "empty", "columns are"),
        ("slides.csv", "first>start", "columns are"),
        ("slides.csv", "a,2,1>a,2,2", "row 4: contradicts"),
        ("slides.csv", "a,2,1>a,2,x", "row 3: is damaged"),
        ("slides.csv", "a,2,1>b,2,1", "row 3: contradicts"),
        ("slides.csv", "c,3,5>c,3,4", "names 7 patches, but patches.npy holds 8"),
    ],
)
def test_damaged_packs_do_not_open(folder: Path, name: str, how: str, says: str) -> None:
    if how == "<f4><i4":
        np.save(folder / name, np.zeros((8, 3), dtype="int32"))
    else:
        damage(folder / name, how)
    with pytest.raises(SlideFileError, match=says):
        Pack(folder)


def test_verify_finds_a_flipped_byte(folder: Path) -> None:
    path = folder / "patches.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SlideFileError, match=r"patches of row 4 of slides\.csv"):
        Pack(folder).verify()


def test_a_file_that_shrinks_under_a_job(folder: Path) -> None:
    pack = Pack(folder)
    damage(folder / "patches.npy", "short")
    assert pack.features("b").shape == (2, 3)
    with pytest.raises(SlideFileError, match="shrank since the pack was opened"):
        pack.features("c")
