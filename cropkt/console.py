"""What all commands share: `--version`, and one line and one exit code for what is wrong."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer
import typer.core
from click import ClickException

import cropkt
from cropkt.errors import CropktError, DiskFullError
from cropkt.files import disk_full

# Importing rich would double what --help takes, and put a backslash before each [default: ...].
typer.core.HAS_RICH = False

TRACEBACK = "CROPKT_TRACEBACK"  # if set, an error that nobody thought of keeps its own text
FAULT = 70  # exit code of one


@contextlib.contextmanager
def one_line(command: str) -> Iterator[None]:
    """Turn what goes wrong in the block into one line of `command` and an exit code."""
    try:
        yield
    except CropktError as error:
        fail(command, f"{error} [{type(error).__name__}]", error.exit_code)
    except (typer.Exit, typer.Abort, ClickException):
        raise  # how a command ends that has said all itself
    except KeyboardInterrupt:
        fail(command, "interrupted; run the same command to go on", 130)
    except Exception as error:
        where = getattr(error, "filename", None) or "this machine"
        if disk_full(error):
            full = DiskFullError(where, "no space is left on a disk", "Free some, and try again")
            fail(command, f"{full} [DiskFullError]", full.exit_code)
        if isinstance(error, OSError):
            fail(command, f"{where}: {error.strerror or type(error).__name__}. [OSError]", 74)
        if os.environ.get(TRACEBACK):
            raise
        fail(command, _fault(error), FAULT)


def _fault(error: Exception) -> str:
    """Return what to report of an error that nobody thought of, without its text."""
    frames = traceback.extract_tb(error.__traceback__)
    way = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)
    about = f"cropkt {cropkt.__version__}, Python {platform.python_version()}, {sys.platform}"
    return (
        f"a fault in cropkt: {type(error).__name__} at {way} ({about}). Report this line; the "
        f"error's own text may name a patient and is left out: {TRACEBACK}=1 shows it here. [Fault]"
    )


def show_version(asked: bool) -> None:
    """Print which release this is and on which Flower it runs, and exit, if that was asked."""
    if asked:
        from importlib.metadata import version

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
