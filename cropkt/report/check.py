"""Whether what a file holds has the form of `schema.Results`."""

from __future__ import annotations

import types
from typing import Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from cropkt.report.schema import Results


def problem_in(value: object) -> str | None:
    """Return what is wrong with a results dictionary and where, None if nothing is.

    Keys that the schema does not know are left alone: a later version may write them.
    """
    return _problem(value, Results, "")


def _problem(value: object, hint: Any, where: str) -> str | None:
    if is_typeddict(hint):
        return _of_record(value, hint, where)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        found = [_problem(value, one, where) for one in inner]
        return None if None in found else found[0]
    if origin is dict:
        if not isinstance(value, dict):
            return _not(where, "an object")
        parts = ((f"{where}.{key}", part, inner[1]) for key, part in value.items())
        return _first(parts)
    if origin is list:
        if not isinstance(value, list):
            return _not(where, "a list")
        return _first((f"{where}.{index}", part, inner[0]) for index, part in enumerate(value))
    return _of_simple(value, hint, where)


def _of_record(value: object, hint: Any, where: str) -> str | None:
    if not isinstance(value, dict):
        return _not(where, "an object")
    # Python's own __required_keys__ does not see NotRequired in annotations that are texts.
    hints = get_type_hints(hint, include_extras=True)
    for key, one in hints.items():
        optional = get_origin(one) is NotRequired
        if key not in value and hint.__total__ and not optional:
            return f"{where}.{key}".strip(".") + " is missing"
        hints[key] = get_args(one)[0] if optional else one
    return _first((f"{where}.{key}", value[key], hints[key]) for key in value if key in hints)


def _of_simple(value: object, hint: Any, where: str) -> str | None:
    if hint is object:
        return None
    if hint in (int, float):
        number = isinstance(value, int if hint is int else int | float)
        return None if number and not isinstance(value, bool) else _not(where, "a number")
    if hint is str:
        return None if isinstance(value, str) else _not(where, "a text")
    return None if value is None else _not(where, "null")


def _first(parts: Any) -> str | None:
    problems = (_problem(value, hint, where) for where, value, hint in parts)
    return next((problem for problem in problems if problem is not None), None)


def _not(where: str, wanted: str) -> str:
    return f"{where.strip('.') or 'the whole'} is not {wanted}"
