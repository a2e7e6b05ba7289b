"""Folders of slide files, searched by slide id."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from cropkt.cohort.formats import (
    SUFFIXES,
    coords_of,
    dtype_of,
    features_of,
    holds_only_coords,
    is_compressed,
    shape_of,
    write_slide_h5,
)
from cropkt.cohort.names import SlideNames, bare_name
from cropkt.cohort.source import SlideSource
from cropkt.errors import BagShapeError, MissingSlideError, SlideFileError

__all__ = ["SlideFolders", "write_slide_h5"]


class SlideFolders(SlideSource):
    """All slide files (`.h5`, `.hdf5`, `.pt`, `.npy`) anywhere under the given folders.

    A single file may be given in place of a folder.

    A file is of the slide that its name without suffix and without `.svs` says; which slide an
    id means, with UUID or without, is told in `cropkt.cohort.names`.

    A slide may have one file of each format, as CLAM writes `h5_files` and `pt_files`: HDF5 is
    read first, then `.pt`, then `.npy`, and their shapes must agree. Two files of one format
    (`.h5` and `.hdf5` are one) are an error that names both, raised when the slide is asked for,
    as is a name without UUID that fits two slides. Files whose names begin with a dot are left
    out, and folders behind symbolic links are searched.

    Of a whole job of TRIDENT or CLAM, two kinds of files are left out: those in `patches` that hold
    positions and no features, and those in `slide_features_*` beside `features_*`, one vector each.
    """

    def __init__(self, folders: Path | str | Sequence[Path | str]) -> None:
        """List the files; opens none but those in folders named `patches`.

        Raises:
            MissingSlideError: a folder does not exist, or none holds a slide file.
        """
        several = [folders] if isinstance(folders, str | Path) else list(folders)
        self.folders = tuple(Path(folder) for folder in several)
        self._where = ", ".join(str(folder) for folder in self.folders)
        self._files: dict[str, list[Path]] = {}
        for path in _slide_files(self.folders):
            self._files.setdefault(bare_name(path.name[: -len(path.suffix)]), []).append(path)
        if not self._files:
            raise MissingSlideError(
                self._where,
                f"holds no slide file ({', '.join(SUFFIXES)})",
                "Give the folder into which features were extracted",
            )
        self._names = SlideNames(self._files)

    def __contains__(self, slide_id: object) -> bool:
        return isinstance(slide_id, str) and bool(self._names.matches(slide_id))

    def path(self, slide_id: str) -> Path:
        """Return the file that is read for this slide.

        Raises:
            MissingSlideError: there is none.
            SlideFileError: two files of one format, or a name that fits two slides.
        """
        return self._paths(slide_id)[0]

    def shape(self, slide_id: str) -> tuple[int, int]:
        """Return (patches, width), the same in each of the slide's files.

        Raises:
            BagShapeError: the files of the slide disagree.
        """
        first, *others = self._paths(slide_id)
        shape = shape_of(first)
        for other in others:
            if (found := shape_of(other)) != shape:
                raise BagShapeError(
                    other,
                    f"has shape {found}, but another file of the same slide has {shape}",
                    f"The other is {first}: remove the one that is out of date",
                )
        return shape

    def features(self, slide_id: str) -> Tensor:
        """Return (N, D) features in storage dtype, float64 narrowed to float32."""
        return features_of(self.path(slide_id))

    def dtype(self, slide_id: str) -> str:
        """Return float16 or float32, as features are read, from the header alone."""
        return dtype_of(self.path(slide_id))

    def compressed(self, slide_id: str) -> bool:
        """Return whether each reading has to decompress the file."""
        return is_compressed(self.path(slide_id))

    def stamp(self, slide_id: str) -> str:
        """Return the name, size and time of change of the file that is read."""
        path = self.path(slide_id)
        stat = path.stat()
        return f"{path.name} {stat.st_size} {stat.st_mtime_ns}"

    def coords(self, slide_id: str) -> Tensor | None:
        """Return (N, 2) int64 positions, or None if the file that is read has none."""
        return coords_of(self.path(slide_id))

    def slide_ids(self) -> tuple[str, ...]:
        """Return the names of all slides, sorted."""
        return tuple(sorted(self._files))

    def _paths(self, slide_id: str) -> list[Path]:
        """Return the slide's files, the one to read first."""
        names = self._names.matches(slide_id)
        if not names:
            raise MissingSlideError(
                self._where, "no file for a slide that was asked for", "Give the folder of it"
            )
        if len(names) > 1:
            raise SlideFileError(
                self._files[names[0]][0],
                "a name without UUID means this file and another",
                f"The other is {self._files[names[1]][0]}: write the UUID in the outcome table",
            )
        by_format: dict[str, Path] = {}
        for path in self._files[names[0]]:
            kind = path.suffix.lower().replace(".hdf5", ".h5")
            if kind in by_format:
                raise SlideFileError(
                    path,
                    "another file of this format is of the same slide",
                    f"The other is {by_format[kind]}: give the folder of one encoder's features, "
                    "or remove one",
                )
            by_format[kind] = path
        return [by_format[kind] for kind in SUFFIXES if kind in by_format]


def _slide_files(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield each slide file once, sorted within its folder, however folders overlap."""
    walked: set[str] = set()
    for root in folders:
        if root.is_file() and root.suffix.lower() in SUFFIXES:
            yield root
            continue
        if not root.is_dir():
            raise MissingSlideError(root, "no such folder", "Correct the path")
        for folder, below, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in walked:
                below.clear()
                continue
            walked.add(real)
            below.sort()
            if any(name.startswith("features_") for name in below):
                below[:] = [name for name in below if not name.startswith("slide_features_")]
            for name in sorted(names):
                path = Path(folder, name)
                if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                    continue
                if not (path.parent.name == "patches" and holds_only_coords(path)):
                    yield path
