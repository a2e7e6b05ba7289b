"""Which releases go together: those of one series, as 1.4.0 and 1.4.2."""

from __future__ import annotations


def together(ours: str, theirs: str) -> bool:
    """Return whether two releases of a package go together."""
    return ours.split(".")[:2] == theirs.split(".")[:2]
