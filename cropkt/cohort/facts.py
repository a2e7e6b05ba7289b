"""What a slide file says of how it was made: encoder, magnification, size of a patch.

TRIDENT writes `patch_size`, `patch_size_level0`, `target_magnification`, `level0_width` and
`level0_height` beside `coords`, and puts the files under `20x_256px_0px_overlap/features_uni_v2`.
CLAM writes `patch_size`, `patch_level` and `downsample`. An attribute `encoder`, on the file or on
`features`, counts before the folder's name. What is not said is None, and is nobody's fault.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cropkt.cohort.features import SlideFolders
from cropkt.cohort.source import SlideSource
from cropkt.errors import SlideMismatchError

_SAME = {"univ1": "uni", "univ2": "uni2h", "uni2": "uni2h", "conchv1": "conch"}
_FOLDER = re.compile(r"^(\d+(?:\.\d+)?)x_(\d+)px_\d+px_overlap")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideFacts:
    """How a slide's features were made, as far as is known."""

    encoder: str | None = None
    magnification: float | None = None  # at which patches were cut
    patch_size: float | None = None  # pixels, at that magnification
    patch_size_level0: float | None = None  # pixels of the whole slide's finest level
    width: int | None = None  # of the finest level, pixels
    height: int | None = None


def facts_of(source: SlideSource, slide_id: str) -> SlideFacts:
    """Return what the file of a slide says; nothing for a source that is not of single files.

    Raises:
        MissingSlideError, SlideFileError: as the source does.
    """
    if not isinstance(source, SlideFolders):
        return SlideFacts()
    return facts_of_file(source.path(slide_id))


def facts_of_file(path: Path) -> SlideFacts:
    """Return what a slide file and the folders it lies in say."""
    on_file: dict[str, Any] = {}
    if path.suffix.lower() in (".h5", ".hdf5"):
        try:
            with h5py.File(path, "r", locking="best-effort") as file:
                for part in (file, file.get("features"), file.get("coords")):
                    on_file |= {} if part is None else dict(part.attrs)
        except (OSError, RuntimeError, KeyError):
            on_file = {}  # reading its features says what is wrong
    encoder, magnification, patch_size = _of_folders(path)
    said = _number(on_file, "target_magnification")
    level0 = _number(on_file, "patch_size_level0")
    size = _number(on_file, "patch_size")
    if level0 is None and size is not None and "downsample" in on_file:  # CLAM
        downsample = _number(on_file, "downsample")
        level0 = None if downsample is None else size * downsample
    width, height = _number(on_file, "level0_width"), _number(on_file, "level0_height")
    named = on_file.get("encoder", on_file.get("patch_encoder"))
    named = named.decode(errors="replace") if isinstance(named, bytes) else named
    return SlideFacts(
        encoder=str(named) if isinstance(named, str) and named else encoder,
        magnification=magnification if said is None else said,
        patch_size=(size if said is not None else None) or patch_size,
        patch_size_level0=level0,
        width=None if width is None else int(width),
        height=None if height is None else int(height),
    )


def common(several: Iterable[SlideFacts]) -> SlideFacts:
    """Return what all that say anything agree on; None where two differ, or none says it."""
    listed = list(several)
    agreed = {}
    for field in fields(SlideFacts):
        said = {value for one in listed if (value := getattr(one, field.name)) is not None}
        if field.name == "encoder" and len({_plain(name) for name in said}) == 1:
            said = {min(said)}
        agreed[field.name] = said.pop() if len(said) == 1 else None
    return SlideFacts(**agreed)


def tallies(several: Iterable[SlideFacts]) -> tuple[Counter[str], Counter[float]]:
    """Return how many slides say which encoder, and which magnification; spellings are one."""
    listed = list(several)
    return (
        Counter(_plain(one.encoder) for one in listed if one.encoder),
        Counter(one.magnification for one in listed if one.magnification),
    )


def refuse_other(said: SlideFacts, expected: SlideFacts, where: str) -> None:
    """Check that a slide was made as a model expects; what either does not say is not compared.

    Raises:
        SlideMismatchError: another encoder, magnification or size of patches; says which.
    """
    fix = "Extract this slide as the model's training slides were"
    if said.encoder and expected.encoder and _plain(said.encoder) != _plain(expected.encoder):
        problem = f"its features are of encoder {said.encoder}, the model reads {expected.encoder}"
        raise SlideMismatchError(where, problem, fix)
    if _differ(said.magnification, expected.magnification):
        problem = (
            f"its patches are at {said.magnification:g}x, the model's {expected.magnification:g}x"
        )
        raise SlideMismatchError(where, problem, fix)
    if _differ(said.patch_size, expected.patch_size):
        problem = (
            f"its patches are {said.patch_size:g} pixels wide, the model's {expected.patch_size:g}"
        )
        raise SlideMismatchError(where, problem, fix)


def unchecked(said: SlideFacts, expected: SlideFacts) -> tuple[str, ...]:
    """Return which of encoder and magnification `refuse_other` has nothing to compare with."""
    names = ("encoder", "magnification")
    return tuple(n for n in names if not (getattr(said, n) and getattr(expected, n)))


def _of_folders(path: Path) -> tuple[str | None, float | None, float | None]:
    """Return encoder, magnification and patch size as TRIDENT's folders name them."""
    encoder = magnification = patch_size = None
    for folder in path.parent.parts[-3:]:
        if folder.startswith("features_"):
            encoder = folder.removeprefix("features_") or None
        if match := _FOLDER.match(folder):
            magnification, patch_size = float(match[1]), float(match[2])
    return encoder, magnification, patch_size


def _number(on_file: Mapping[str, Any], name: str) -> float | None:
    """Return a positive number among the attributes; of a pair, such as CLAM's, the first."""
    try:
        value = float(np.ravel(on_file[name])[0])
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return value if np.isfinite(value) and value > 0 else None


def _plain(encoder: str) -> str:
    name = re.sub(r"[^a-z0-9]", "", encoder.lower())
    return _SAME.get(name, name)


def _differ(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and abs(one - other) > 0.01 * other
