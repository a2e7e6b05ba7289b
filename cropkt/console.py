"""How every command ends when something is wrong: one line, one exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import typer

from cropkt.errors import CropktError


@contextlib.contextmanager
def one_line(command: str) -> Iterator[None]:
    """Turn what goes wrong in the block into one line of `command` and an exit code."""
    try:
        yield
    except CropktError as error:
        fail(command, str(error), error.exit_code)
    except OSError as error:
        where = error.filename or "this machine"
        fail(command, f"{where}: {error.strerror or type(error).__name__}.", 74)
    except KeyboardInterrupt:
        fail(command, "interrupted; run the same command to go on", 130)


def fail(command: str, text: str, code: int) -> NoReturn:
    """Print one line to standard error and exit."""
    typer.secho(f"{command}: {' '.join(text.split())}", fg="red", err=True)
    raise typer.Exit(code) from None
