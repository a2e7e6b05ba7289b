"""Slides into a pack and back, and what is said of compressed ones."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cropkt.cohort import packing
from cropkt.cohort.features import SlideFolders, write_slide_h5
from cropkt.cohort.feed import settled
from cropkt.cohort.pack import Pack
from cropkt.cohort.packing import pack_slides, unpack
from cropkt.errors import DiskFullError, SlideFileError
from cropkt_sim.cli import app

RNG = np.random.default_rng(0)
SIZES = {"a": 5, "b": 1, "c": 9}


def write(folder: Path, dtype: str, *, coords: bool = True, compression: str | None = None) -> Path:
    folder.mkdir()
    for name, size in SIZES.items():
        features = RNG.normal(size=(size, 4)).astype(dtype)
        where = RNG.integers(0, 9999, (size, 2)) if coords else None
        if compression is None:
            write_slide_h5(folder / f"{name}.h5", features, where)
            continue
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=features, compression=compression)
    return folder


def same(one: SlideFolders | Pack, two: SlideFolders | Pack) -> bool:
    for name in SIZES:
        mine, theirs = one.coords(name), two.coords(name)
        assert (mine is None) == (theirs is None)
        if mine is not None and not torch.equal(mine, theirs):
            return False
        features = two.features(name)
        if one.features(name).dtype != features.dtype or not torch.equal(
            one.features(name), features
        ):
            return False
    return True


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("coords", [True, False])
def test_there_and_back_again(tmp_path: Path, dtype, coords) -> None:
    slides = SlideFolders(write(tmp_path / "slides", dtype, coords=coords))
    packed = pack_slides(slides, tmp_path / "pack")
    assert (packed.slides, packed.patches, packed.dtype) == (3, 15, dtype)
    assert same(slides, Pack(tmp_path / "pack"))
    assert unpack(Pack(tmp_path / "pack"), tmp_path / "back") == packed
    assert same(slides, SlideFolders(tmp_path / "back"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "pack", "slides"]


def test_mixed_types_are_packed_without_rounding(tmp_path: Path) -> None:
    folder = write(tmp_path / "slides", "float16")
    exact = RNG.normal(size=(3, 4)).astype("float32")
    write_slide_h5(folder / "b.h5", exact, np.zeros((3, 2)))
    assert pack_slides(SlideFolders(folder), tmp_path / "pack").dtype == "float32"
    np.testing.assert_array_equal(Pack(tmp_path / "pack").features("b").numpy(), exact)


def test_damage_does_not_unpack(tmp_path: Path) -> None:
    pack_slides(SlideFolders(write(tmp_path / "slides", "float32")), tmp_path / "pack")
    path = tmp_path / "pack" / "patches.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(SlideFileError, match="do not have their checksum"):
        unpack(Pack(tmp_path / "pack"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match="a pack needs"):
        pack_slides(SlideFolders(write(tmp_path / "slides", "float32")), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_compressed_slides_are_read_and_a_hint_is_given(
    tmp_path: Path, make_cohort, caplog
) -> None:
    cohort = make_cohort(patients=3, dim=4)
    folder = write(tmp_path / "slides", "float16", compression="gzip")
    for compressed, source in ((True, SlideFolders(folder)), (False, None)):
        if source is None:
            pack_slides(SlideFolders(folder), tmp_path / "pack")
            source = Pack(tmp_path / "pack")
        mine = replace(cohort, slides=(("a",), ("b",), ("c",)), source=source)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            there, _ = settled(mine, torch.device("cpu"))
        assert ("cropkt-client pack" in caplog.text) == compressed
        assert torch.equal(there.bag(2), SlideFolders(folder).features("c"))


def test_the_command_packs_verifies_and_unpacks(tmp_path: Path) -> None:
    slides, run = write(tmp_path / "slides", "float16"), CliRunner().invoke
    pack, back = str(tmp_path / "pack"), str(tmp_path / "back")
    done = run(app, ["pack", pack, "--features", str(slides)])
    assert done.exit_code == 0, done.output
    assert "3 slides, 15 patches" in done.output
    assert "have their checksums" in run(app, ["pack", pack, "--verify"]).output
    assert run(app, ["pack", pack, "--unpack", back]).exit_code == 0
    assert same(SlideFolders(slides), SlideFolders(back))
    assert run(app, ["pack", pack, "--features", str(slides)]).exit_code == 65
