"""What a store of slides can do; a folder of slide files and a pack are two of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


class SlideSource(Protocol):
    """Patches of slides, read from disk at each call and kept nowhere.

    A source is small and picklable, so a worker process gets its own. Every method that takes a
    slide id accepts it as an outcome table writes it (see `cropkt.cohort.names`), and raises
    `MissingSlideError` if the slide is not here and `SlideFileError` if it cannot be read.
    """

    def __contains__(self, slide_id: object) -> bool:
        """Return whether some file answers to this id, without opening it."""
        ...

    def shape(self, slide_id: str) -> tuple[int, int]:
        """Return (patches, width) from the header alone."""
        ...

    def features(self, slide_id: str) -> Tensor:
        """Return (N, D) features, float16 or float32 as stored."""
        ...

    def stamp(self, slide_id: str) -> str:
        """Return what changes when the slide's features do, found without reading them."""
        ...

    def coords(self, slide_id: str) -> Tensor | None:
        """Return (N, 2) int64 patch positions in pixels, or None if they were not kept."""
        ...

    def slide_ids(self) -> Iterable[str]:
        """Return the ids of all slides, sorted."""
        ...
