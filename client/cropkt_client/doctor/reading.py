"""What reading the slides shows: bad values, the same slide twice, size, speed, compression."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cropkt.checkup import Finding, fail, ok, skipped, warn
from cropkt.cohort.bags import Cohort
from cropkt.cohort.checks import all_finite
from cropkt.cohort.features import SlideFolders
from cropkt.cohort.formats import features_of, is_compressed
from cropkt.cohort.source import SlideSource
from cropkt.errors import DataError
from cropkt_client.doctor import machine

BUDGET = 60.0  # seconds of reading, where not every slide is asked for
COLD = 16  # slides that the system is asked to forget before they are read
PACKED = 4  # compressed slides that are timed again without compression
SLOW = 50e6  # bytes a second
HALF = 65_504.0  # the largest value in float16
MB, GB = 1e6, 1e9

_AGAIN = "Extract these slides again"


@dataclass(slots=True)
class _Seen:
    """What was seen in the slides read so far."""

    slides: int = 0
    unreadable: int = 0
    nan: int = 0
    infinite: int = 0
    overflowed: int = 0  # infinite, in float16
    beyond_half: int = 0  # of another type, with values that float16 cannot hold
    patches: int = 0
    size: int = 0  # bytes
    seconds: float = 0.0
    cold_bytes: int = 0
    cold_seconds: float = 0.0
    owners: dict[bytes, list[tuple[str, int]]] = field(default_factory=dict)  # by content
    compressed: list[Path] = field(default_factory=list)


class Reading:
    """Reads slides of all cohorts, in random order, once."""

    def __init__(
        self, cohorts: Sequence[Cohort], source: SlideSource, state: Path, *, full: bool
    ) -> None:
        self._cohorts, self._source, self._state, self._full = cohorts, source, state, full

    def checks(self) -> Iterator[Finding]:
        """Yield a finding a check."""
        slides = [
            (cohort.cancer, patient, slide)
            for cohort in self._cohorts
            for patient, mine in enumerate(cohort.slides)
            for slide in mine
        ]
        order = np.random.default_rng(0).permutation(len(slides))
        seen, end = _Seen(), time.monotonic() + BUDGET
        for number in order:
            if not self._full and time.monotonic() > end:
                break
            cancer, patient, slide = slides[number]
            self._look(seen, slide, (cancer, patient))
        part = f"{seen.slides} of {len(slides)} slides read"
        if seen.slides < len(slides):
            part = f"{part} (the rest with --full)"
        yield _values(seen, part)
        yield _overflow(seen)
        yield _twice(seen, part)
        patches = sum(c.patches(i) for c in self._cohorts for i in range(len(c)))
        yield _size(seen, patches)
        yield _speed(seen)
        yield self._compression(seen)

    def _look(self, seen: _Seen, slide: str, owner: tuple[str, int]) -> None:
        seen.slides += 1
        path = self._source.path(slide) if isinstance(self._source, SlideFolders) else None
        cold = path is not None and seen.slides <= COLD and _forget(path)
        began = time.perf_counter()
        try:
            features = self._source.features(slide)
        except DataError:
            seen.unreadable += 1
            return
        seconds = time.perf_counter() - began
        size = features.numel() * features.element_size()
        seen.patches, seen.size = seen.patches + len(features), seen.size + size
        seen.seconds += seconds
        if cold:
            seen.cold_bytes, seen.cold_seconds = seen.cold_bytes + size, seen.cold_seconds + seconds
        _judge(seen, features)
        digest = hashlib.blake2b(features.numpy().data, digest_size=16).digest()
        seen.owners.setdefault(digest, []).append(owner)
        if path is not None and is_compressed(path):
            seen.compressed.append(path)

    def _compression(self, seen: _Seen) -> Finding:
        check = "compression"
        if not isinstance(self._source, SlideFolders):
            return ok(check, "a pack is read as it lies")
        if not seen.compressed:
            return ok(check, "no slide is compressed")
        gain = _gain(seen.compressed[:PACKED], self._state)
        faster = "" if gain is None else f"; without, they are read {gain:.0f} times as fast"
        problem = f"{len(seen.compressed)} of {seen.slides} slides are compressed{faster}"
        fix = "Write them uncompressed and contiguous, or into a pack (cropkt.cohort.pack)"
        return warn(check, problem, fix)


def _judge(seen: _Seen, features: Tensor) -> None:
    """Count what is wrong with the values of one slide."""
    if all_finite(features):
        if features.dtype != torch.float16 and features.numel():
            low, high = torch.aminmax(features)
            seen.beyond_half += max(-low.item(), high.item()) > HALF
    elif bool(torch.isnan(features).any()):
        seen.nan += 1
    elif features.dtype == torch.float16:
        seen.overflowed += 1
    else:
        seen.infinite += 1


def _values(seen: _Seen, part: str) -> Finding:
    bad = {"unreadable": seen.unreadable, "NaN": seen.nan, "infinite": seen.infinite}
    if told := ", ".join(f"{count} {what}" for what, count in bad.items() if count):
        return fail("values", f"{told}; {part}", _AGAIN)
    return ok("values", f"all finite; {part}")


def _overflow(seen: _Seen) -> Finding:
    check = "float16 overflow"
    if seen.overflowed:
        problem = f"{seen.overflowed} slides hold infinity in float16"
        return fail(check, problem, "Extract them again, and store float32")
    if seen.beyond_half:
        problem = f"{seen.beyond_half} slides hold values over {HALF:.0f}"
        return warn(check, problem, "Keep them in float32: float16 would make them infinite")
    return ok(check, "no value is beyond float16")


def _twice(seen: _Seen, part: str) -> Finding:
    """Judge slides of the same content: of two patients, they would be on both sides of a fold."""
    check = "same slide twice"
    groups = [owners for owners in seen.owners.values() if len(owners) > 1]
    if across := sum(len(set(owners)) > 1 for owners in groups):
        problem = f"{across} slides have the same content as one of another patient; {part}"
        return fail(check, problem, "Give each its own: a copy is trained on and tested")
    if groups:
        problem = f"{len(groups)} slides of a patient have the same content; {part}"
        return warn(check, problem, "Remove the copies: they count twice")
    return ok(check, f"no two have the same content; {part}")


def _size(seen: _Seen, patches: int) -> Finding:
    check = "size"
    if not seen.patches:
        return skipped(check, "no slide could be read")
    size = seen.size / seen.patches * patches
    text, known = f"{patches} patches, {size / GB:.2f} GB in memory", machine.memory()
    if known is None:
        return ok(check, text)
    available, _ = known
    text = f"{text}, {available / GB:.1f} GB available"
    if size > available:
        speed = seen.size / max(seen.seconds, 1e-9)
        problem = f"{text}: every epoch reads from disk, about {size / speed / 60:.0f} min"
        return warn(check, problem, "Store float16, use a faster disk, or more memory")
    return ok(check, text)


def _speed(seen: _Seen) -> Finding:
    check = "read speed"
    if not seen.size:
        return skipped(check, "no slide could be read")
    if seen.cold_bytes:
        size, seconds, how = seen.cold_bytes, seen.cold_seconds, "from the disk"
    else:
        size, seconds, how = seen.size, seen.seconds, "perhaps from memory"
    speed = size / max(seconds, 1e-9)
    text = f"{speed / MB:.0f} MB/s, {how}"
    if size < 10 * MB:
        return ok(check, f"too little to measure ({size / MB:.1f} MB)")
    if speed < SLOW:
        return warn(check, text, "Copy the slides to a local disk")
    return ok(check, text)


def _forget(path: Path) -> bool:
    """Ask the system to drop a file from its memory, so that the disk is measured."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except (OSError, AttributeError):  # not this file system, or not this system
        return False
    finally:
        os.close(descriptor)
    return True


def _gain(paths: Sequence[Path], state: Path) -> float | None:
    """Return how many times as fast slides are read uncompressed, both from memory."""
    packed = plain = 0.0
    folder = next(one for one in (state, *state.parents) if one.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
            for path in paths:
                features = features_of(path).numpy()
                copy = Path(scratch, "copy.npy")
                np.save(copy, features)
                packed, plain = packed + _seconds(path), plain + _seconds(copy)
    except (OSError, DataError):
        return None
    return packed / plain if plain else None


def _seconds(path: Path) -> float:
    """Return the seconds that reading a slide takes."""
    began = time.perf_counter()
    features_of(path)
    return time.perf_counter() - began
