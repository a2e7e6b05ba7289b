"""A pack: the patches of many slides in one matrix on disk, for speed.

A pack is a folder of `patches.npy` (P, D) float16 or float32, `slides.csv` (slide_id, first,
patches, sha256: which rows are whose, and the checksum of their bytes), and, if positions were
kept, `coords.npy` (P, 2) int64. Opening one maps the matrix to check it; a bag is then read from
the file in one piece, so that a worker process inherits no map, and a file that shrinks under a
running job is an error and no crash.
"""

from __future__ import annotations

import csv
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from cropkt.cohort.names import SlideNames
from cropkt.cohort.source import SlideSource
from cropkt.errors import BagShapeError, MissingSlideError, SlideFileError

_COLUMNS = ("slide_id", "first", "patches", "sha256")
_AGAIN = "Write the pack again from the slide files"


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A C-ordered `.npy` matrix: what its header says, and where the rows begin."""

    path: Path
    dtype: np.dtype[Any]
    rows: int
    width: int
    offset: int

    @classmethod
    def open(cls, path: Path) -> _Matrix:
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise SlideFileError(path, "the pack lacks this file", _AGAIN) from error
        except (OSError, ValueError, EOFError) as error:
            raise SlideFileError(path, "truncated, or not a matrix", _AGAIN) from error
        if not isinstance(mapped, np.memmap) or mapped.ndim != 2 or not mapped.flags.c_contiguous:
            raise SlideFileError(path, "not a C-ordered matrix of two dimensions", _AGAIN)
        if mapped.offset + mapped.nbytes != path.stat().st_size:
            raise SlideFileError(path, "holds more bytes than its header says", _AGAIN)
        rows, width = mapped.shape
        return cls(path, mapped.dtype, rows, width, mapped.offset)

    def read(self, first: int, rows: int) -> NDArray[Any]:
        """Return (rows, width) from row `first` on."""
        row_bytes = self.width * self.dtype.itemsize
        try:
            flat = np.fromfile(
                self.path, self.dtype, rows * self.width, offset=self.offset + first * row_bytes
            )
        except OSError as error:
            raise SlideFileError(self.path, "cannot be read any more", _AGAIN) from error
        if flat.size != rows * self.width:
            raise SlideFileError(self.path, "shrank since the pack was opened", _AGAIN)
        return flat.reshape(rows, self.width)


class Pack(SlideSource):
    """The slides of a pack folder."""

    def __init__(self, folder: Path | str) -> None:
        """Open a pack and check that its files agree in size; `verify` checks the values.

        Raises:
            SlideFileError: a file is missing, truncated, or contradicts another.
        """
        self.folder = Path(folder)
        self._patches = _Matrix.open(self.folder / "patches.npy")
        if self._patches.dtype not in (np.float16, np.float32):
            raise SlideFileError(
                self._patches.path, f"holds {self._patches.dtype}, not float16 or float32", _AGAIN
            )
        coords = self.folder / "coords.npy"
        self._coords = _Matrix.open(coords) if coords.exists() else None
        if self._coords and (
            (self._coords.rows, self._coords.width) != (self._patches.rows, 2)
            or self._coords.dtype != np.int64
        ):
            raise SlideFileError(coords, "does not hold (patches, 2) int64", _AGAIN)
        self._rows = _read_index(self.folder / "slides.csv", self._patches.rows)
        self._names = SlideNames(self._rows)

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self._patches.width

    def __contains__(self, slide_id: object) -> bool:
        return isinstance(slide_id, str) and bool(self._names.matches(slide_id))

    def shape(self, slide_id: str) -> tuple[int, int]:
        """Return (patches, width)."""
        return self._find(slide_id)[1], self.dim

    def features(self, slide_id: str) -> Tensor:
        """Return (N, D) features in storage dtype."""
        first, patches, _ = self._find(slide_id)
        return torch.from_numpy(self._patches.read(first, patches))

    def stamp(self, slide_id: str) -> str:
        """Return the checksum of the slide's patches."""
        return self._find(slide_id)[2]

    def coords(self, slide_id: str) -> Tensor | None:
        """Return (N, 2) int64 positions, or None if the pack holds none."""
        first, patches, _ = self._find(slide_id)
        return torch.from_numpy(self._coords.read(first, patches)) if self._coords else None

    def slide_ids(self) -> tuple[str, ...]:
        """Return the ids of all slides, sorted."""
        return tuple(sorted(self._rows))

    def verify(self) -> None:
        """Read all patches and compare their checksums.

        Raises:
            SlideFileError: the patches of a row of `slides.csv` changed since they were written.
        """
        for number, (first, patches, digest) in enumerate(self._rows.values(), start=2):
            if hashlib.sha256(self._patches.read(first, patches).data).hexdigest() != digest:
                raise SlideFileError(
                    self._patches.path,
                    f"the patches of row {number} of slides.csv do not have their checksum",
                    _AGAIN,
                )

    def _find(self, slide_id: str) -> tuple[int, int, str]:
        names = self._names.matches(slide_id)
        if not names:
            raise MissingSlideError(
                self.folder, "the pack lacks a slide that was asked for", _AGAIN
            )
        if len(names) > 1:
            raise SlideFileError(
                self.folder,
                f"a name without UUID fits {len(names)} slides",
                "Write the slide's UUID in the outcome table",
            )
        return self._rows[names[0]]


def write_pack(
    folder: Path | str,
    slides: Iterable[tuple[str, NDArray[Any]]],
    *,
    dim: int,
    dtype: DTypeLike,
    coords: Callable[[str], NDArray[Any]] | None = None,
) -> None:
    """Write a pack, holding one slide at a time; it appears under its name once complete.

    Args:
        folder: must not exist; its parent must.
        slides: (slide id, (N, D) features), each id once.
        dim: width D of the features.
        dtype: float16 or float32.
        coords: gives the (N, 2) positions of a slide, to keep them too.

    Raises:
        SlideFileError: the folder exists, the dtype is another, a slide is there twice or is
            empty, holds NaN or infinity or values that overflow `dtype`, or there is none.
        BagShapeError: a slide of another width.
    """
    folder, kind = Path(folder), np.dtype(dtype)
    if kind not in (np.float16, np.float32):
        raise SlideFileError(folder, f"a pack cannot hold {kind}", "Use float16 or float32")
    if folder.exists():
        raise SlideFileError(folder, "exists already", "Choose another name, or remove it")
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        with (partial / "patches.npy").open("wb") as patches:
            index = _stream(patches, slides, folder, dim, kind)
        with (partial / "slides.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, *index])
            _flush(file.fileno(), file.flush)
        if coords is not None:
            with (partial / "coords.npy").open("wb") as positions:
                _stream_coords(positions, coords, index, folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _stream(
    file: BinaryIO,
    slides: Iterable[tuple[str, NDArray[Any]]],
    folder: Path,
    dim: int,
    dtype: np.dtype[Any],
) -> list[tuple[str, int, int, str]]:
    """Write the matrix, and return the rows of `slides.csv`."""
    start = _write_header(file, 0, dim, dtype)
    index: dict[str, tuple[str, int, int, str]] = {}
    total = 0
    for number, (slide_id, features) in enumerate(slides, start=1):
        where = f"{folder}, slide number {number}"
        if slide_id in index:
            raise SlideFileError(where, "the slide is given twice", "Give each slide once")
        if features.ndim != 2 or features.shape[1] != dim:
            raise BagShapeError(
                where,
                f"features have shape {features.shape}, expected (patches, {dim})",
                "Extract all slides with the agreed encoder",
            )
        if not len(features):
            raise SlideFileError(where, "the slide's bag is empty", "Leave it out")
        with np.errstate(over="ignore"):  # an overflow is the infinity that is refused below
            rows = np.ascontiguousarray(features, dtype=dtype)
        if not np.isfinite(rows).all():
            raise SlideFileError(
                where,
                f"features are NaN, infinite, or too large for {dtype}",
                "Extract the slide again, or write float32",
            )
        file.write(rows.data)
        digest = hashlib.sha256(rows.data).hexdigest()
        index[slide_id] = (slide_id, total, len(rows), digest)
        total += len(rows)
    if not index:
        raise SlideFileError(folder, "there is no slide to pack", "Give at least one")
    _finish(file, start, total, dim, dtype)
    return list(index.values())


def _stream_coords(
    file: BinaryIO,
    coords: Callable[[str], NDArray[Any]],
    index: list[tuple[str, int, int, str]],
    folder: Path,
) -> None:
    dtype = np.dtype(np.int64)
    start = _write_header(file, 0, 2, dtype)
    for number, (slide_id, _, patches, _) in enumerate(index, start=1):
        rows = np.ascontiguousarray(coords(slide_id), dtype=dtype)
        if rows.shape != (patches, 2):
            raise SlideFileError(
                f"{folder}, slide number {number}",
                f"coords have shape {rows.shape}, expected ({patches}, 2)",
                "Extract the slide again, or pack without coords",
            )
        file.write(rows.data)
    _finish(file, start, sum(row[2] for row in index), 2, dtype)


def _write_header(file: BinaryIO, rows: int, width: int, dtype: np.dtype[Any]) -> int:
    """Write a header, whose length numpy makes independent of `rows`; return where rows begin."""
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _finish(file: BinaryIO, start: int, rows: int, width: int, dtype: np.dtype[Any]) -> None:
    """Put the number of rows, known only now, into the header."""
    file.seek(0)
    if _write_header(file, rows, width, dtype) != start:
        raise SlideFileError(file.name, "numpy wrote a header of another length", "Report this")
    _flush(file.fileno(), file.flush)


def _flush(descriptor: int, flush: Callable[[], object]) -> None:
    flush()
    os.fsync(descriptor)


def _read_index(path: Path, total: int) -> dict[str, tuple[int, int, str]]:
    """Return (first, patches, sha256) of each slide, checked to cover all rows once, in order."""
    rows: dict[str, tuple[int, int, str]] = {}
    end = 0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *records = list(csv.reader(file)) or [[]]
        if tuple(header) != _COLUMNS:
            raise SlideFileError(path, f"columns are {header}, not {list(_COLUMNS)}", _AGAIN)
        for slide_id, first, patches, digest in records:
            if slide_id in rows or int(first) != end or int(patches) < 1:
                raise SlideFileError(
                    f"{path} row {len(rows) + 2}", "contradicts the rows before it", _AGAIN
                )
            rows[slide_id] = (end, int(patches), digest)
            end += int(patches)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SlideFileError(path, "missing, or not CSV", _AGAIN) from error
    except SlideFileError:
        raise
    except ValueError as error:
        raise SlideFileError(f"{path} row {len(rows) + 2}", "is damaged", _AGAIN) from error
    if end != total:
        raise SlideFileError(path, f"names {end} patches, but patches.npy holds {total}", _AGAIN)
    return rows
