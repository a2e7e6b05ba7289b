"""Slide files into a pack and back."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cropkt.cohort.features import SlideFolders
from cropkt.cohort.formats import write_slide_h5
from cropkt.cohort.pack import Pack, write_pack
from cropkt.errors import DiskFullError, SlideFileError

SLACK = 1.02  # of the room that a pack needs: index, headers, positions


@dataclass(frozen=True, slots=True)
class Packed:
    """What was packed or unpacked."""

    slides: int
    patches: int
    bytes: int  # of features
    dtype: str
    coords: bool  # whether positions were kept

    def in_words(self) -> str:
        """Return one line."""
        where = "with" if self.coords else "without"
        return (
            f"{self.slides} slides, {self.patches} patches, {self.bytes / 1e9:.2f} GB of "
            f"{self.dtype} features, {where} positions"
        )


def pack_slides(source: SlideFolders, folder: Path) -> Packed:
    """Write all slides of a source into a pack that has no folder yet.

    Features are float16 if every file's are, else float32, so that nothing is rounded. Positions
    are kept if every file has them.

    Raises:
        DiskFullError: there is not enough room for it.
        SlideFileError, BagShapeError: a slide cannot be packed; nothing is left behind.
    """
    ids = source.slide_ids()
    kinds = {source.dtype(slide_id) for slide_id in ids}
    dtype = np.dtype(np.float16 if kinds == {"float16"} else np.float32)
    dim = source.shape(ids[0])[1]
    patches = sum(source.shape(slide_id)[0] for slide_id in ids)
    size = patches * dim * dtype.itemsize
    free = shutil.disk_usage(folder.parent).free
    if size * SLACK > free:
        problem = f"a pack needs {size * SLACK / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
        raise DiskFullError(folder.parent, problem, "Free some, or choose another disk")
    coords = all(source.coords(slide_id) is not None for slide_id in ids)

    def where(slide_id: str) -> NDArray[Any]:
        found = source.coords(slide_id)
        if found is None:
            raise SlideFileError(source.path(slide_id), "its positions are gone", "Pack again")
        return found.numpy()

    def slides() -> Iterator[tuple[str, NDArray[Any]]]:
        for slide_id in ids:
            yield slide_id, source.features(slide_id).numpy()

    write_pack(folder, slides(), dim=dim, dtype=dtype, coords=where if coords else None)
    return Packed(len(ids), patches, size, str(dtype), coords)


def unpack(pack: Pack, folder: Path) -> Packed:
    """Write the slides of a pack as HDF5 files into a folder that is not there yet.

    Raises:
        SlideFileError: the folder exists, or a checksum is wrong; nothing is left behind.
    """
    if folder.exists():
        raise SlideFileError(folder, "exists already", "Choose another name, or remove it")
    pack.verify()
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    patches = size = 0
    kinds, positions = set[str](), True
    try:
        for slide_id in pack.slide_ids():
            features, coords = pack.features(slide_id).numpy(), pack.coords(slide_id)
            write_slide_h5(
                partial / f"{slide_id}.h5", features, None if coords is None else coords.numpy()
            )
            patches, size = patches + len(features), size + features.nbytes
            kinds.add(str(features.dtype))
            positions = coords is not None
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Packed(len(pack.slide_ids()), patches, size, kinds.pop(), positions)


def pack_or_unpack(
    folder: Path,
    source: Callable[[], SlideFolders],
    *,
    verify: bool = False,
    unpack_to: Path | None = None,
) -> Iterator[str]:
    """Do what a `pack` command asks, and yield what to say of it.

    Args:
        folder: of the pack.
        source: gives the slides to pack; not asked where a pack is read.
        verify: compare the checksums of the pack that is there.
        unpack_to: write its slides into this folder.

    Raises:
        DataError, DiskFullError: as `pack_slides`, `unpack` and `Pack`.
    """
    if unpack_to is not None:
        yield f"{unpack_to}: {unpack(Pack(folder), unpack_to).in_words()}"
    elif verify:
        pack = Pack(folder)
        pack.verify()
        yield f"{folder}: {len(pack.slide_ids())} slides have their checksums"
    else:
        yield f"{folder}: {pack_slides(source(), folder).in_words()}"
