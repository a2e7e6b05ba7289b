"""Which stored slide a name in an outcome table means.

Slide names travel with and without `.svs`, and TCGA names with and without the UUID at their
end (`TCGA-BT-A3PH-01Z-00-DX1.<UUID>`). The rule, in this order:

1. `.svs` at the end never matters.
2. A stored slide of exactly this name is the one.
3. A name without UUID means the stored slide that adds one, if only one does.
4. A name with UUID means the stored slide of the name without one. Another UUID never matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_UUID = re.compile(r"\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.IGNORECASE)


def bare_name(slide_id: str) -> str:
    """Return the slide id without surrounding blanks and without `.svs`."""
    name = slide_id.strip()
    return name[:-4] if name[-4:].lower() == ".svs" else name


def without_uuid(name: str) -> str:
    """Return a bare name without the UUID at its end."""
    return _UUID.sub("", name)


class SlideNames:
    """Answers which of the stored names an id means."""

    def __init__(self, stored: Iterable[str]) -> None:
        self._stored = frozenset(stored)
        self._longer: dict[str, list[str]] = {}
        for name in sorted(self._stored):
            short = without_uuid(name)
            if short != name:
                self._longer.setdefault(short, []).append(name)

    def matches(self, slide_id: str) -> tuple[str, ...]:
        """Return the stored names that `slide_id` can mean: none, one, or several if ambiguous."""
        name = bare_name(slide_id)
        if name in self._stored:
            return (name,)
        short = without_uuid(name)
        if short == name:
            return tuple(self._longer.get(name, ()))
        return (short,) if short in self._stored else ()
