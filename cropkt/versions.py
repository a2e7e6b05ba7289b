"""Which releases go together, and whether what is installed is what cropkt asks for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def together(ours: str, theirs: str) -> bool:
    """Return whether two releases of a package go together: of one series, as 1.4.0 and 1.4.2."""
    return ours.split(".")[:2] == theirs.split(".")[:2]


def unfit(package: str) -> str:
    """Return why the installed release of a package is not one that cropkt asks for, or nothing."""
    try:
        here = version(package)
        asked = [Requirement(line) for line in requires("cropkt") or ()]
    except PackageNotFoundError as error:
        return f"{error.name} is not installed"
    for one in asked:
        if one.name == package and one.marker is None and here not in one.specifier:
            return f"{package} {here} is installed, cropkt asks for {one.specifier}"
    return ""
