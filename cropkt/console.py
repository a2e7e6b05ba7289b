"""What all commands share: `--version`, and one line and one exit code for what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, NoReturn

import typer
import typer.core

from cropkt.errors import CropktError, DiskFullError
from cropkt.files import disk_full

# Importing rich would double what --help takes, and put a backslash before each [default: ...].
typer.core.HAS_RICH = False


@contextlib.contextmanager
def one_line(command: str) -> Iterator[None]:
    """Turn what goes wrong in the block into one line of `command` and an exit code."""
    try:
        yield
    except CropktError as error:
        fail(command, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(command, "interrupted; run the same command to go on", 130)
    except Exception as error:
        where = getattr(error, "filename", None) or "this machine"
        if disk_full(error):
            full = DiskFullError(where, "no space is left on a disk", "Free some, and try again")
            fail(command, str(full), full.exit_code)
        if not isinstance(error, OSError):
            raise
        fail(command, f"{where}: {error.strerror or type(error).__name__}.", 74)


def show_version(asked: bool) -> None:
    """Print which release this is and on which Flower it runs, and exit, if that was asked."""
    if asked:
        from importlib.metadata import version

        import cropkt

        typer.echo(f"cropkt {cropkt.__version__}, Flower {version('flwr')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=show_version, is_eager=True, help="Which release this is."),
]
"""The option `--version` of every command."""


def fail(command: str, text: str, code: int) -> NoReturn:
    """Print one line to standard error and exit."""
    typer.secho(f"{command}: {' '.join(text.split())}", fg="red", err=True)
    raise typer.Exit(code) from None
