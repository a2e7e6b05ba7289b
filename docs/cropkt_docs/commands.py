"""The command line, from the commands themselves."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
from typer.main import get_command

import cropkt_client.cli
import cropkt_server.cli
import cropkt_sim.cli
from cropkt_docs.fields import table

_APPS: dict[str, Any] = {
    "cropkt-server": cropkt_server.cli.app,
    "cropkt-client": cropkt_client.cli.app,
    "cropkt-sim": cropkt_sim.cli.app,
}
_HEAD = """\
# Commands

Every command says the same with `--help`. What their exit codes mean:
[exit-codes.md](exit-codes.md).
"""


def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield a command and all below it, with their whole names."""
    yield name, command
    for below, one in sorted(getattr(command, "commands", {}).items()):
        yield from walk(f"{name} {below}", one)


def all_commands() -> Iterator[tuple[str, Any]]:
    """Yield every command of the three programs."""
    for name, app in _APPS.items():
        yield from walk(name, get_command(app))


def refuse_unknown(line: str) -> None:
    """Let the programs read a line of shell that names one of them, and run nothing.

    Raises:
        click.UsageError: there is no such command or option, or a value is none of its kind.
    """
    lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(takewhile(lambda word: not set(word) <= set("|&;<>()"), lexer))
    begins = [at for at, word in enumerate(words) if Path(word).name in _APPS]
    if not begins or begins[0] == len(words) - 1:
        return  # without words it may be a unit of systemd or an image
    name, *rest = words[begins[0] :]
    command: Any = get_command(_APPS[Path(name).name])
    context = click.Context(command, info_name=name)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        _, command, rest = command.resolve_command(context, rest)
    command.make_context(name, rest)


def page() -> str:
    """Return `commands.md`."""
    return "\n".join([_HEAD, *(_section(name, command) for name, command in all_commands())])


def _section(name: str, command: Any) -> str:
    context = click.Context(command, info_name=name)
    level = "##" if " " not in name else "###"
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    parts = [f"{level} {name}\n", f"```text\n{usage}\n```\n", _prose(command.help or "")]
    shown = [one for one in command.params if not getattr(one, "hidden", False)]
    if rows := [_row(parameter, context) for parameter in shown]:
        parts.append(table(rows, "", "default", "meaning") + "\n")
    if command.epilog:
        parts.append(_prose(command.epilog))
    return "\n".join(part for part in parts if part)


def _row(parameter: Any, context: Any) -> tuple[str, str, str]:
    if parameter.param_type_name == "argument":
        name = f"`{parameter.make_metavar(ctx=context)}`"
    else:
        value = "" if parameter.is_flag else f" {parameter.make_metavar(ctx=context)}"
        name = f"`{', '.join(parameter.opts + parameter.secondary_opts)}{value}`"
    default = "" if parameter.default in (None, "", (), []) else f"`{parameter.default}`"
    if parameter.required:
        default = "has to be given"
    elif getattr(parameter, "is_flag", False):
        default = ""
    return name, default, parameter.help or ""


def _prose(text: str) -> str:
    """Return help text as Markdown: a paragraph that begins with a backspace keeps its lines."""
    out = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        kept = paragraph.startswith("\b\n") or "\b" in paragraph.split("\n")[0]
        lines = [line.strip() if not kept else line.rstrip() for line in paragraph.split("\n")]
        lines = [line for line in lines if line.strip("\b ")]
        out.append("```text\n" + "\n".join(lines) + "\n```" if kept else " ".join(lines))
    return "\n\n".join(out) + "\n" if text else ""
