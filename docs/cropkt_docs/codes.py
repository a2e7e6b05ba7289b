"""Exit codes and error codes, from the errors and the contract."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import pkgutil
import tokenize
from collections.abc import Iterator
from typing import get_args

import cropkt
import cropkt.messages
import cropkt_client
import cropkt_server
import cropkt_sim
from cropkt.console import FAULT
from cropkt.errors import CropktError
from cropkt.messages import Code
from cropkt_docs.fields import table
from cropkt_server.roster import Refusal

_HEAD = """\
# Exit codes and error codes

A command that fails prints one line: what is wrong, where, what to do about it, and the error's
name in brackets, which [troubleshooting](../troubleshooting.md) explains. Paste that line into an
issue: it names files, rows and counts, never a patient.

## Exit codes
"""
_ENDED = {
    0: "done; of `cropkt-server start` and `cropkt-sim run`: every row is done",
    1: "an error without a code of its own",
    2: "the command line cannot be read (an unknown option, a value out of range)",
    3: "the study finished, but rows failed or are missing; of `status`: it does not run",
    64: "the command line asks for something that cannot be",
    65: "data, a file or a ledger is not what it must be",
    69: "the coordinator cannot be reached, for now: repeat",
    70: "training failed, or a fault in cropkt: report it",
    74: "a disk is full, or the system refused to read or write",
    76: "versions or messages do not go together",
    77: "refused: not trusted, not allowed, or out of budget",
    78: "a value in `study.yaml`, `site.yaml` or a preset",
    130: "interrupted (Ctrl-C); the same command goes on",
    143: "stopped (SIGTERM); the same command goes on",
}


def errors() -> list[type[CropktError]]:
    """Return every deliberate error of every package, sorted by name."""
    for package in (cropkt, cropkt_server, cropkt_client, cropkt_sim):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("ray_engine"):  # Ray is an extra
                importlib.import_module(module.name)

    def below(kind: type[CropktError]) -> Iterator[type[CropktError]]:
        yield kind
        for one in kind.__subclasses__():
            yield from below(one)

    found = {
        kind.__name__: kind
        for kind in below(CropktError)
        if not kind.__module__.startswith("tests")
    }
    return [found[name] for name in sorted(found)]


def failure_codes() -> dict[str, str]:
    """Return the codes of failures that a hospital sends, with what the contract says of them."""
    source = inspect.getsource(cropkt.messages)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (literal,) = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "Code"
    ]
    lines = {
        node.value: node.lineno for node in ast.walk(literal) if isinstance(node, ast.Constant)
    }
    return {code: comments.get(lines[code], "") for code in get_args(Code)}


def refusals() -> tuple[str, ...]:
    """Return the reasons for which a coordinator refuses an enrolment."""
    return get_args(Refusal)


def page() -> str:
    """Return `exit-codes.md`."""
    known = {kind.exit_code for kind in errors()} | {FAULT}
    if missing := known - set(_ENDED):
        raise ValueError(f"exit codes without a meaning: {missing}")
    ended = [(f"`{code}`", text) for code, text in _ENDED.items()]
    named = [(_link(kind.__name__), f"`{kind.exit_code}`", _first_line(kind)) for kind in errors()]
    failed = [(_link(code), text) for code, text in failure_codes().items()]
    refused = [(_link(code),) for code in refusals()]
    parts = [
        _HEAD + "\n" + table(ended, "code", "meaning"),
        "\n## Errors\n",
        table(named, "name", "exit code", "meaning"),
        "\n## Failures that a hospital sends\n\nA code, never a text made from data; the text is in"
        " the hospital's own log, under the reference.\n",
        table(failed, "code", "meaning"),
        "\n## Refused enrolments\n",
        table(refused, "code"),
    ]
    return "\n".join(parts)


def _link(name: str) -> str:
    return f"[{name}](../troubleshooting.md#{name.lower()})"


def _first_line(kind: type[CropktError]) -> str:
    return (kind.__doc__ or "").strip().split("\n")[0]
