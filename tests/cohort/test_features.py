from __future__ import annotations

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from cropkt.cohort.features import SlideFolders, write_slide_h5
from cropkt.errors import BagShapeError, MissingSlideError, SlideFileError

X = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
UUID = "600C7D8C-F04C-4125-AF14-B1E76DC01A1E"
OTHER = "11111111-f04c-4125-af14-b1e76dc01a1e"


def h5(path: Path, features: np.ndarray, coords: np.ndarray | None = None) -> None:
    with h5py.File(path, "w") as file:
        file["features"] = features
        if coords is not None:
            file["coords"] = coords


WRITERS = {
    "trident": lambda p: h5(p / "s.h5", X, np.arange(10).reshape(5, 2)),
    "clam": lambda p: h5(p / "s.h5", X, np.arange(10, dtype="int32").reshape(5, 2)),
    "uni2-h release": lambda p: h5(p / "s.h5", X[None], np.arange(10).reshape(1, 5, 2)),
    "hdf5": lambda p: h5(p / "s.hdf5", X),
    "big endian": lambda p: h5(p / "s.h5", X.astype(">f4")),
    "double": lambda p: h5(p / "s.h5", X.astype("float64")),
    "ours": lambda p: write_slide_h5(p / "s.h5", X, np.arange(10).reshape(5, 2)),
    "pt": lambda p: torch.save(torch.from_numpy(X), p / "s.pt"),
    "pt dict": lambda p: torch.save({"features": torch.from_numpy(X)[None]}, p / "s.pt"),
    "pt with coords": lambda p: torch.save(
        {"features": torch.from_numpy(X), "coords": torch.arange(10).reshape(5, 2)}, p / "s.pt"
    ),
    "pt old": lambda p: torch.save(
        torch.from_numpy(X), p / "s.pt", _use_new_zipfile_serialization=False
    ),
    "pt with gradient": lambda p: torch.save(torch.from_numpy(X).requires_grad_(), p / "s.pt"),
    "npy": lambda p: np.save(p / "s.npy", X),
    "npy in columns": lambda p: np.save(p / "s.npy", np.asfortranarray(X)),
    "npy big endian": lambda p: np.save(p / "s.npy", X.astype(">f4")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats_in_the_wild(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    source = SlideFolders(tmp_path)
    assert source.shape("s") == (5, 4)
    features = source.features("s")
    assert features.dtype is torch.float32
    assert features.is_contiguous()
    assert not features.requires_grad
    np.testing.assert_array_equal(features.numpy(), X)
    coords = source.coords("s")
    if name in ("trident", "clam", "uni2-h release", "ours", "pt with coords"):
        assert coords is not None
        assert coords.dtype is torch.int64
        assert coords.tolist() == np.arange(10).reshape(5, 2).tolist()
    else:
        assert coords is None


@pytest.mark.parametrize("suffix", ["h5", "pt", "npy"])
def test_half_precision_stays(tmp_path: Path, suffix: str) -> None:
    half = X.astype("float16")
    if suffix == "h5":
        write_slide_h5(tmp_path / "s.h5", half)
    elif suffix == "pt":
        torch.save(torch.from_numpy(half), tmp_path / "s.pt")
    else:
        np.save(tmp_path / "s.npy", half)
    features = SlideFolders(tmp_path).features("s")
    assert features.dtype is torch.float16
    np.testing.assert_array_equal(features.numpy(), half)


def test_bfloat16_widens(tmp_path: Path) -> None:
    torch.save(torch.ones(2, 3, dtype=torch.bfloat16), tmp_path / "s.pt")
    assert SlideFolders(tmp_path).features("s").dtype is torch.float32


def test_a_slide_vector_is_one_patch_and_an_empty_one_none(tmp_path: Path) -> None:
    h5(tmp_path / "vector.h5", X[0])
    h5(tmp_path / "none.h5", np.zeros(0, "float32"))
    h5(tmp_path / "empty.h5", np.zeros((0, 4), "float32"))
    h5(tmp_path / "empty3.h5", np.zeros((1, 0, 4), "float32"))
    source = SlideFolders(tmp_path)
    assert source.shape("vector") == (1, 4)
    assert source.features("vector").shape == (1, 4)
    assert source.shape("none") == (0, 0)
    assert source.features("none").shape == (0, 0)
    assert source.shape("empty") == source.shape("empty3") == (0, 4)
    assert source.features("empty").shape == (0, 4)


def save_truncated(path: Path, write) -> None:
    write(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


BIG = np.zeros((500, 8), "float32")

BROKEN = {
    "truncated h5": ("s.h5", lambda p: save_truncated(p, lambda q: h5(q, BIG)), "not an HDF5"),
    "text as h5": ("s.h5", lambda p: p.write_text("no"), "not an HDF5"),
    "h5 of positions": ("s.h5", lambda p: h5py.File(p, "w").close(), "no dataset `features`"),
    "h5 of integers": ("s.h5", lambda p: h5(p, np.zeros((2, 3), "int32")), "holds int32, not f"),
    "h5 of images": ("s.h5", lambda p: h5(p, np.zeros((2, 3, 4), "float32")), r"shape \(2, 3, 4\)"),
    "h5 scalar": ("s.h5", lambda p: h5(p, np.float32(3)), r"shape \(\), expected"),
    "truncated pt": (
        "s.pt",
        lambda p: save_truncated(p, lambda q: torch.save(torch.from_numpy(BIG), q)),
        "truncated, or holds more than tensors",
    ),
    "pickle as pt": ("s.pt", lambda p: p.write_bytes(pickle.dumps(Path("x"))), "a pickle is never"),
    "empty pt": ("s.pt", lambda p: p.write_bytes(b""), "truncated"),
    "pt of an object": ("s.pt", lambda p: torch.save({"features": Path("x")}, p), "never run"),
    "pt list": ("s.pt", lambda p: torch.save([1, 2], p), "neither a tensor nor a dict"),
    "pt other key": ("s.pt", lambda p: torch.save({"x": torch.ones(1)}, p), "nor a dict with"),
    "pt sparse": ("s.pt", lambda p: torch.save(torch.eye(2).to_sparse(), p), "neither a tensor"),
    "truncated npy": ("s.npy", lambda p: save_truncated(p, lambda q: np.save(q, BIG)), "truncated"),
    "npy objects": ("s.npy", lambda p: np.save(p, np.array([{}])), "a pickle is never run"),
    "pickle as npy": ("s.npy", lambda p: p.write_bytes(pickle.dumps(X)), "a pickle is never run"),
    "empty npy": ("s.npy", lambda p: p.write_bytes(b""), "truncated"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_error_with_a_fix(tmp_path: Path, case: str) -> None:
    name, write, says = BROKEN[case]
    write(tmp_path / name)
    source = SlideFolders(tmp_path)
    for ask in (source.shape, source.features):
        with pytest.raises(SlideFileError, match=says) as caught:
            ask("s")
        assert caught.value.where == str(tmp_path / name)
        assert caught.value.fix


def test_an_archive_named_npy(tmp_path: Path) -> None:
    with (tmp_path / "s.npy").open("wb") as file:
        np.savez(file, x=X)
    with pytest.raises(SlideFileError, match="is an archive"):
        SlideFolders(tmp_path).shape("s")


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    torch.save(Bomb(), tmp_path / "s.pt")
    (tmp_path / "t.npy").write_bytes(pickle.dumps(Bomb()))
    source = SlideFolders(tmp_path)
    for slide in ("s", "t"):
        with pytest.raises(SlideFileError):
            source.features(slide)
    assert not (tmp_path / "boom").exists()


def test_coords_of_another_length(tmp_path: Path) -> None:
    h5(tmp_path / "s.h5", X, np.zeros((3, 2), "int64"))
    with pytest.raises(SlideFileError, match=r"`coords` has shape \(3, 2\) for 5 patches"):
        SlideFolders(tmp_path).coords("s")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_slide_h5(folder / name, X)


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        ("s.h5", "s", True),
        ("s.h5", "s.svs", True),
        ("s.svs.h5", "s", True),
        ("s.svs.h5", "s.SVS", True),
        (f"s.{UUID}.h5", "s", True),
        (f"s.{UUID}.h5", "s.svs", True),
        (f"s.{UUID}.h5", f"s.{UUID}.svs", True),
        ("s.h5", f"s.{UUID}", True),
        ("s.h5", f"s.{UUID}.svs", True),
        (f"s.{UUID}.h5", f"s.{OTHER}", False),
        ("s.h5", "t", False),
        ("s.h5", "s.1", False),
    ],
)
def test_names(tmp_path: Path, stored: str, asked: str, found: bool) -> None:
    touch(tmp_path, f"TCGA-UVM/deep/{stored}")
    source = SlideFolders(str(tmp_path))
    assert (asked in source) is found
    if found:
        assert source.path(asked) == tmp_path / "TCGA-UVM" / "deep" / stored
    else:
        with pytest.raises(MissingSlideError, match="no file for a slide"):
            source.features(asked)


def test_a_name_that_fits_two_slides(tmp_path: Path) -> None:
    touch(tmp_path, f"s.{UUID}.h5", f"s.{OTHER}.h5")
    source = SlideFolders(tmp_path)
    assert source.shape(f"s.{UUID}") == (5, 4)
    with pytest.raises(SlideFileError, match=f"{OTHER}.*{UUID}|{UUID}.*{OTHER}"):
        source.shape("s")
    touch(tmp_path, "s.h5")
    assert SlideFolders(tmp_path).path("s") == tmp_path / "s.h5"


def test_the_same_slide_twice(tmp_path: Path) -> None:
    touch(tmp_path, "a/s.h5", "b/s.hdf5", "b/t.h5")
    source = SlideFolders([tmp_path / "a", tmp_path / "b"])
    assert source.shape("t") == (5, 4)
    with pytest.raises(SlideFileError, match=r"b/s.hdf5: another file of this format .*a/s.h5"):
        source.features("s")


def test_one_file_of_each_format_is_one_slide(tmp_path: Path) -> None:
    touch(tmp_path, "h5_files/s.h5")
    (tmp_path / "pt_files").mkdir()
    torch.save(torch.from_numpy(X), tmp_path / "pt_files" / "s.pt")
    source = SlideFolders(tmp_path)
    assert source.slide_ids() == ("s",)
    assert source.shape("s") == (5, 4)
    assert source.path("s").suffix == ".h5"
    torch.save(torch.from_numpy(X)[:3], tmp_path / "pt_files" / "s.pt")
    with pytest.raises(BagShapeError, match=r"s.pt: has shape \(3, 4\), but .*The other is .*s.h5"):
        source.shape("s")


def test_a_whole_job_of_trident(tmp_path: Path) -> None:
    job = tmp_path / "job" / "20x_256px_0px_overlap"
    for folder in ("patches", "visualization", "features_uni_v2", "slide_features_titan"):
        (job / folder).mkdir(parents=True)
    coords = np.arange(10).reshape(5, 2)
    for name in ("S1", f"S2.{UUID}"):
        with h5py.File(job / "patches" / f"{name}_patches.h5", "w") as file:
            file["coords"] = coords
            file["coords"].attrs["patch_size"] = 256
        h5(job / "features_uni_v2" / f"{name}.h5", X, coords)
        h5(job / "slide_features_titan" / f"{name}.h5", X[0], coords)
        (job / "visualization" / f"{name}.jpg").touch()
    for given in (tmp_path / "job", job, job / "features_uni_v2"):
        source = SlideFolders(given)
        assert source.slide_ids() == ("S1", f"S2.{UUID}")
        assert source.path("S1") == job / "features_uni_v2" / "S1.h5"
        assert source.shape("S2") == (5, 4)
    assert SlideFolders(job / "slide_features_titan").shape("S1") == (1, 4)  # asked for by name
    with pytest.raises(MissingSlideError, match="into which features were extracted"):
        SlideFolders(job / "patches")


def test_positions_that_clam_keeps_under_the_slides_own_name(tmp_path: Path) -> None:
    touch(tmp_path, "h5_files/s.h5", "patches/t.h5")
    with h5py.File(tmp_path / "patches" / "s.h5", "w") as file:
        file["coords"] = np.arange(10).reshape(5, 2)
    (tmp_path / "patches" / "u.h5").write_bytes(b"broken")
    source = SlideFolders(tmp_path)
    assert source.slide_ids() == ("s", "t", "u")  # features in such a folder are features
    assert source.shape("s") == (5, 4)
    with pytest.raises(SlideFileError, match="truncated"):
        source.shape("u")


def test_walks_overlapping_folders_and_links_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/x/s.h5", "real/x/._s.h5", "root/t.h5")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    source = SlideFolders([tmp_path / "root", tmp_path / "real", tmp_path / "real" / "x"])
    assert source.slide_ids() == ("s", "t")
    assert source.shape("s") == (5, 4)


def test_folders_without_slides(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("x")
    with pytest.raises(MissingSlideError, match="holds no slide file"):
        SlideFolders(tmp_path)
    with pytest.raises(MissingSlideError, match="no such folder"):
        SlideFolders([tmp_path / "absent"])


def test_travels_to_a_worker(tmp_path: Path) -> None:
    touch(tmp_path, "s.h5")
    assert pickle.loads(pickle.dumps(SlideFolders(tmp_path))).shape("s") == (5, 4)


def test_real_patch_bags(shared_data: Path) -> None:
    source = SlideFolders(shared_data / "real_patch_bags")
    assert len(source.slide_ids()) == 3
    for slide in source.slide_ids():
        patches, width = source.shape(slide)
        assert width == 259
        assert 616 <= patches <= 1199
        assert source.features(slide).shape == (patches, width)
