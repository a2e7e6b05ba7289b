"""Slide files as TRIDENT, CLAM and the UNI2-h feature release write them.

- HDF5 (`.h5`, `.hdf5`): dataset `features` (N, D), (1, N, D) or (D,); `coords` (N, 2) if kept.
- `.pt`: a tensor, or a dict with `features` (and `coords`), loaded with `weights_only`.
- `.npy`: an array, loaded without pickle.

float16 and float32 stay as they are, bfloat16 widens and float64 narrows to float32; other types
are refused. A shape costs a header only.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cropkt.errors import SlideFileError

SUFFIXES = (".h5", ".hdf5", ".pt", ".npy")
"""Formats in the order of preference: HDF5 keeps positions too."""

_AGAIN = "Extract the slide again, or copy the file again"
_FLOATS = ("float16", "float32", "float64", "bfloat16")


def shape_of(path: Path) -> tuple[int, int]:
    """Return (patches, width) of a slide file.

    Raises:
        SlideFileError: unreadable, not floating point, or not a bag of patches.
    """
    with _opened(path) as (features, _):
        return _shape(features, path)


def dtype_of(path: Path) -> str:
    """Return the float type that features are read as; raises as `shape_of`."""
    with _opened(path) as (features, _):
        _shape(features, path)
        kind = str(features.dtype).removeprefix("torch.").lstrip("<>=")
        return "float16" if kind in ("float16", "f2") else "float32"


def features_of(path: Path) -> Tensor:
    """Return (N, D) features, float16 or float32; raises as `shape_of`."""
    with _opened(path) as (features, _):
        shape = _shape(features, path)
        return _tensor(features).reshape(shape).contiguous()


def coords_of(path: Path) -> Tensor | None:
    """Return (N, 2) int64 positions, or None if the file has none; raises as `shape_of`."""
    with _opened(path) as (features, coords):
        if coords is None:
            return None
        positions = _tensor(coords)
        if positions.ndim == 3 and positions.shape[0] == 1:
            positions = positions[0]
        patches = _shape(features, path)[0]
        if tuple(positions.shape) != (patches, 2):
            raise SlideFileError(
                path,
                f"`coords` has shape {tuple(positions.shape)} for {patches} patches",
                _AGAIN,
            )
        return positions.to(torch.int64)


def holds_only_coords(path: Path) -> bool:
    """Return whether a file is HDF5 with positions of patches and without features."""
    if path.suffix.lower() not in (".h5", ".hdf5"):
        return False
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            return "coords" in file and "features" not in file
    except (OSError, RuntimeError, KeyError):
        return False  # reading its features says what is wrong


def is_compressed(path: Path) -> bool:
    """Return whether each reading has to decompress the features, which HDF5 alone can hold so.

    Raises:
        SlideFileError: it cannot be read.
    """
    if path.suffix.lower() not in (".h5", ".hdf5"):
        return False
    with _open_h5(path) as (features, _):
        return features.compression is not None


def write_slide_h5(
    path: Path | str, features: NDArray[Any], coords: NDArray[Any] | None = None
) -> None:
    """Write a slide as contiguous HDF5: `features` (N, D) as given, `coords` (N, 2) as int64."""
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features)
        if coords is not None:
            file.create_dataset("coords", data=np.asarray(coords, dtype=np.int64))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Give `features` and `coords` (or None) as h5py datasets, tensors or mapped arrays."""
    opener = {".pt": _open_pt, ".npy": _open_npy}.get(path.suffix.lower(), _open_h5)
    with opener(path) as opened:
        yield opened


@contextmanager
def _open_h5(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            features, coords = file.get("features"), file.get("coords")
            if not isinstance(features, h5py.Dataset):
                raise SlideFileError(
                    path,
                    f"holds no dataset `features`, only {sorted(file)[:10]}",
                    "Give the folder of features, not that of patch positions",
                )
            yield features, coords if isinstance(coords, h5py.Dataset) else None
    except (OSError, RuntimeError, KeyError) as error:
        raise SlideFileError(path, "truncated, or not an HDF5 file", _AGAIN) from error


@contextmanager
def _open_pt(path: Path) -> Iterator[tuple[Any, Any]]:
    fix = "Save it again with torch.save(features, path), features a tensor (patches, width)"
    try:
        # Only the zip format can be mapped; files of PyTorch before 1.6 are read whole.
        loaded = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # a damaged pickle raises anything
        raise SlideFileError(
            path, "truncated, or holds more than tensors (a pickle is never run)", fix
        ) from error
    held = loaded if isinstance(loaded, dict) else {"features": loaded}
    features, coords = held.get("features"), held.get("coords")
    if not isinstance(features, Tensor) or features.layout is not torch.strided:
        raise SlideFileError(path, "is neither a tensor nor a dict with `features`", fix)
    yield features, coords if isinstance(coords, Tensor) else None


@contextmanager
def _open_npy(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SlideFileError(
            path, "truncated, or not a plain array (a pickle is never run)", _AGAIN
        ) from error
    if not isinstance(array, np.ndarray):
        raise SlideFileError(path, "is an archive, not an array", "Save it with numpy.save")
    yield array, None


def _shape(features: Any, path: Path) -> tuple[int, int]:
    """Return (N, D) of what is stored, without a leading 1; (D,) is one patch, (0,) is none."""
    kind = str(features.dtype).removeprefix("torch.").lstrip("<>=")
    kind = {"f2": "float16", "f4": "float32", "f8": "float64"}.get(kind, kind)
    if kind not in _FLOATS:
        raise SlideFileError(
            path, f"`features` holds {kind}, not floating point", "Give extracted features"
        )
    shape = tuple(int(length) for length in features.shape)
    if shape == (0,):
        return 0, 0
    squeezed = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    match squeezed:
        case (width,):
            return 1, width
        case (patches, width):
            return patches, width
        case _:
            raise SlideFileError(
                path,
                f"`features` has shape {shape}, expected (patches, width)",
                "Give patch features, one slide a file",
            )


def _tensor(stored: Any) -> Tensor:
    """Read into memory; float64 and bfloat16 become float32, other types stay."""
    if isinstance(stored, Tensor):
        wide = stored.dtype in (torch.float64, torch.bfloat16)
        return stored.detach().to(torch.float32) if wide else stored.detach()
    array = np.array(stored)  # a copy: the file closes
    with np.errstate(over="ignore"):  # an overflow is found as infinity where values are checked
        native = np.float32 if array.dtype.itemsize == 8 and array.dtype.kind == "f" else None
        array = array.astype(native or array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(array))
