"""The fields of a dataclass as a reader wants them: name, type and bounds, default, meaning."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types as bounds
import numpy as np
from pydantic import AfterValidator, StringConstraints
from pydantic.fields import FieldInfo

_NAMES: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    datetime: "date and time",
    NoneType: "null",
    np.ndarray: "float32 matrix",
}
_SIGNS = {bounds.Ge: "≥", bounds.Gt: ">", bounds.Le: "≤", bounds.Lt: "<"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One field."""

    name: str
    kind: str
    default: str  # "" if it has to be given
    meaning: str


def entries(kind: type[Any]) -> Iterator[Entry]:
    """Yield the fields of a dataclass in order; a comment after one is its meaning."""
    hints, said = get_type_hints(kind, include_extras=True), _comments(kind)
    for item in fields(kind):
        yield Entry(
            name=item.name,
            kind=in_words(hints[item.name]),
            default=_default(item),
            meaning=said.get(item.name, ""),
        )


def table(rows: Sequence[Sequence[str]], *header: str) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def in_words(hint: Any) -> str:
    """Return what a value has to be."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(in_words(inside[0]), inside[1:])
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, inside))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin is tuple:
        return f"list of: {in_words(inside[0])}"
    if origin is dict:
        return f"mapping from {in_words(inside[0])} to {in_words(inside[1])}"
    if isinstance(hint, type) and is_dataclass(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "cancer code"
    return _NAMES.get(origin or hint, str(hint))


def _bounded(name: str, extras: Sequence[Any]) -> str:
    """Return a type's name with its bounds."""
    parts: list[str] = []
    for extra in extras:
        for one in extra.metadata if isinstance(extra, FieldInfo) else (extra,):
            if isinstance(one, StringConstraints) and one.pattern:
                name = "text like `" + str(one.pattern).replace("|", "\\|") + "`"
            if isinstance(one, StringConstraints) and one.max_length:
                parts.append(f"at most {one.max_length:,} characters")
            if isinstance(one, bounds.MaxLen):
                parts.append(f"at most {one.max_length:,}")
            if isinstance(one, AfterValidator):
                name = "IP address"
            for kind, sign in _SIGNS.items():
                if isinstance(one, kind):
                    value = getattr(one, kind.__name__.lower())
                    parts.append(
                        f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}"
                    )
    return ", ".join([name, *parts])


def _default(item: Field[Any]) -> str:
    if item.default_factory is not MISSING:
        value = item.default_factory()
        return "its own defaults" if is_dataclass(value) else _shown(value)
    value = item.default
    if isinstance(value, FieldInfo):
        return ""
    return "" if value is MISSING else _shown(value)


def _shown(value: Any) -> str:
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return f"`{value}`" if str(value) else "empty"


def _comments(kind: type[Any]) -> dict[str, str]:
    """Return the comment at the end of each field's source, of base classes too."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (parsed,) = ast.parse(source).body
        for node in getattr(parsed, "body", ()):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                said = [comments[line] for line in lines if line in comments]
                found[node.target.id] = " ".join(said)
    return found


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("\\|", "|").replace("|", "\\|")
