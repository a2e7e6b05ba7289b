"""What a page is made of: sections of sentences, tables and figures. The template sets them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from cropkt.report.sentences import number, signed

Tone = Literal["", "up", "down", "dim"]
NOT_EVALUATED, NOT_ESTIMABLE = "not evaluated", "n/e"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table."""

    text: str
    tone: Tone = ""
    note: str = ""  # small print beside it


@dataclass(frozen=True, slots=True)
class Grid:
    """One table; the first column heads its rows."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """One large number."""

    count: int
    label: str
    names: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure, by the name of its file."""

    name: str
    alt: str


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the page: tiles, paragraphs, a figure, tables, a list, in this order."""

    id: str
    title: str
    texts: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()
    picture: Picture | None = None
    grids: tuple[Grid, ...] = ()
    points: tuple[str, ...] = field(default=())


def grid(caption: str, heads: Iterable[str], rows: Iterable[Iterable[Cell | str]]) -> Grid:
    """Return a table of cells, some of them given as their text alone."""
    cells = (tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows)
    return Grid(caption, tuple(heads), tuple(cells))


def score(value: float | None, ends: tuple[float, float] | None = None, digits: int = 2) -> Cell:
    """Return a C-index with its interval, or that it is not estimable."""
    if value is None:
        return Cell(NOT_ESTIMABLE, "dim")
    text = number(value, digits)
    return Cell(
        f"{text} ({number(ends[0], digits)} to {number(ends[1], digits)})" if ends else text
    )


def spread(ends: tuple[float, float] | None, digits: int = 2) -> str:
    """Return the range over the seeds as small print, nothing for one seed."""
    return f"seeds: {signed(ends[0], digits)} to {signed(ends[1], digits)}" if ends else ""


def plain(value: float | None, digits: int = 2) -> Cell:
    """Return a number, or a dash where there is none."""
    return Cell("–", "dim") if value is None else Cell(number(value, digits))
