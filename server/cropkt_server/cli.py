"""`cropkt-server`: a coordinator sets a study up, invites hospitals, and runs it.

Exit codes: 0 done, of `start`: every row is done; 3 the study finished with failed or missing
rows, of `status`: it does not run; 130 and 143 interrupted, 64 a wrong option, 74 a disk that is
full, 78 configuration, 1 another error, of `doctor`: something will fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from click import Context
from typer.core import TyperCommand

from cropkt.console import Version, fail, one_line

if TYPE_CHECKING:
    from cropkt_server.settings import Settings

DEFAULT_PORT = 8443
LONGEST_STOP = 40.0  # seconds a coordinator may take to stop
LONGEST_BOARD = 60.0  # seconds a board may take to begin

Dir = Annotated[Path, typer.Argument(metavar="[DIR]", help="The study's folder.")]
Site = Annotated[str, typer.Option(help="A hospital's name in the roster.")]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]
HERE = Path(".")

BOARD_PORT = "8765"


class _OptionalPort(TyperCommand):
    """Lets `--board` stand alone; typer knows no option whose value may be left out."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Give it the usual port."""
        whole = [f"--board={BOARD_PORT}" if each == "--board" else each for each in args]
        return super().parse_args(ctx, whole)


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="""Set up a study, invite hospitals, run it.

    \b
    cropkt-server init study --study eye --host hub.example.org
    cropkt-server invite study --site lumc --cancer UVM
    cropkt-server doctor study
    cropkt-server start study
    cropkt-server status study
    """,
)


@app.callback()
def server(version: Version = False) -> None:
    """Set up a study, invite hospitals, run it."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    study: Annotated[str, typer.Option(help="The study's name.")],
    host: Annotated[str, typer.Option(help="HOST[:PORT] as the hospitals reach this machine.")],
    encoder: Annotated[str, typer.Option(help="That made all sites' features, as agreed.")] = "",
) -> None:
    """Make a study: study.yaml, certificates, keys and databases."""
    from pydantic import TypeAdapter, ValidationError

    from cropkt.errors import ConfigError, UsageError
    from cropkt.files import write_private
    from cropkt_server.pki import Keys, make_keys
    from cropkt_server.roster import Roster
    from cropkt_server.settings import Settings
    from cropkt_server.store import Store
    from cropkt_server.template import template

    with one_line("cropkt-server"):
        if not host.rpartition("]")[2].count(":"):
            host = f"{host}:{DEFAULT_PORT}"
        try:
            settings = TypeAdapter(Settings).validate_python(
                {"name": study, "host": host, "study": {"encoder": encoder}}
            )
        except ValidationError as error:
            given = {"name": ("--study", study), "host": ("--host", host)}
            option, value = given.get(str(error.errors()[0]["loc"][0]), ("--encoder", encoder))
            fix = "Write NAME:PORT, or a name of letters, digits, dots and dashes"
            raise UsageError(option, f"{value!r} is not possible", fix) from None
        if (folder / "study.yaml").exists():
            raise ConfigError(folder / "study.yaml", "is already there", "Use another folder")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        make_keys(Keys.of(folder), [_hostname(host)], study=settings.name)
        Roster(folder).close()
        Store(folder).close()
        write_private(folder / "study.yaml", template(settings).encode())
        typer.echo(f"made study {study} in {folder}: look through {folder / 'study.yaml'}, then")
        typer.echo(f"cropkt-server invite {folder} --site NAME --cancer CODE")


@app.command()
def invite(
    site: Site,
    cancer: Annotated[list[str], typer.Option(help="Cancer code; repeat for several.")],
    folder: Dir = HERE,
    expires: Annotated[str, typer.Option(help="Valid for so long: 12h, 7d, 2w.")] = "7d",
) -> None:
    """Print a one-time invite for a hospital; an earlier unused one is void."""
    from pydantic import TypeAdapter, ValidationError

    from cropkt.cancers import cancer_of
    from cropkt.errors import ConfigError, DataError, UsageError
    from cropkt.invite import encode_invite
    from cropkt.messages import SiteName
    from cropkt_server import actions
    from cropkt_server.enrolment import Enrolment
    from cropkt_server.pki import Keys
    from cropkt_server.roster import Roster
    from cropkt_server.settings import seconds_in

    with one_line("cropkt-server"):
        settings, host = _deployed(folder)
        try:
            TypeAdapter(SiteName).validate_python(site)
            cancers = [cancer_of(code) for code in cancer]
        except DataError as error:
            raise UsageError("--cancer", error.problem, error.fix) from None
        except ValidationError:
            fix = "Use letters, digits, dots and dashes"
            raise UsageError("--site", f"{site!r} is no name for a site", fix) from None
        until = time.time() + seconds_in(expires, "--expires")
        with actions.opened_store(folder) as store:
            if store.closed:
                fix = "Make a new study, or reopen this one with cropkt-server retry"
                raise ConfigError(folder, "this study is finished", fix)
        with contextlib.closing(Roster(folder)) as roster:
            keys = Keys.of(folder)
            door = Enrolment(study=settings.name, host=host, keys=keys, roster=roster)
            line = encode_invite(door.invite(site, cancers, until))
        typer.echo(line)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(until))
        typer.echo(f"for {site}, until {when}, once: send it over a safe channel", err=True)


@app.command()
def roster(folder: Dir = HERE, as_json: AsJson = False) -> None:
    """List the hospitals that were invited, enrolled or revoked."""
    from dataclasses import asdict

    from cropkt_server.status import read_status
    from cropkt_server.words import roster_lines

    with one_line("cropkt-server"):
        status = read_status(folder)
    if as_json:
        typer.echo(json.dumps([asdict(site) for site in status.sites], sort_keys=True))
    else:
        for line in roster_lines(status):
            typer.echo(line)


@app.command()
def experts(
    folder: Dir = HERE,
    as_json: AsJson = False,
    export: Annotated[Path | None, typer.Option(help="Write them as signed files there.")] = None,
) -> None:
    """List the experts of the bank, and the routers that use them."""
    from dataclasses import asdict

    from cropkt_server import catalogue

    with one_line("cropkt-server"):
        found = catalogue.read_experts(folder)
        paths = catalogue.export(folder, export) if export else []
    if as_json:
        typer.echo(json.dumps([asdict(expert) for expert in found], sort_keys=True))
        return
    for line in catalogue.in_words(found):
        typer.echo(line)
    for path in paths:
        typer.echo(f"wrote {path}")


@app.command()
def revoke(
    folder: Dir = HERE,
    site: Annotated[str, typer.Option(help="A hospital's name in the roster.")] = "",
    expert: Annotated[str, typer.Option(help="An expert's hash, or its beginning.")] = "",
) -> None:
    """Cut a hospital off, at once (what it gave before stays), or take an expert back."""
    from cropkt.errors import UsageError
    from cropkt_server import actions

    with one_line("cropkt-server"):
        if bool(site) == bool(expert):
            raise UsageError("revoke", "takes one thing", "Give --site or --expert")
        if expert:
            _say(actions.revoke_expert(folder, expert))
        else:
            _say(actions.revoke_site(folder, site))


@app.command(
    help="""Check keys, port, disk, databases, bank and sites; exit code 1 if something will fail.

    \b
    cropkt-server doctor study
    cropkt-server doctor study --json
    """
)
def doctor(folder: Dir = HERE, as_json: AsJson = False) -> None:
    """Check keys, port, disk, databases, bank and sites."""
    from cropkt.checkup import show
    from cropkt_server.doctor import examine

    with one_line("cropkt-server"):
        code = show(examine(folder), as_json=as_json)
    raise typer.Exit(code)


@app.command(cls=_OptionalPort)
def start(
    folder: Dir = HERE,
    detach: Annotated[bool, typer.Option("--detach/--follow", help="In the background.")] = False,
    linger: Annotated[
        float, typer.Option(min=0, help="Seconds to tell the sites that the study is over.")
    ] = 90.0,
    board: Annotated[
        int | None,
        typer.Option(metavar="[=PORT]", max=65_535, min=0, help="Show the live board, too."),
    ] = None,
) -> None:
    """Run the study until it is finished; run again, it goes on where it was."""
    from cropkt_server.readiness import telling_why

    with one_line("cropkt-server"), telling_why():
        _deployed(folder)
        if detach:
            _detach(folder, linger, board)
            return
        from cropkt_server.runtime import start

        start(folder, linger=linger, board=board)


@app.command()
def board(
    folder: Dir = HERE,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 chooses one.")] = int(BOARD_PORT),
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Show the study live on a page of this machine, whether it runs or not; it prints where."""
    with one_line("cropkt-server"):
        from cropkt_server.board.process import serve  # torch loads here

        serve(folder, host=host, port=port, with_parent=with_parent)


@app.command()
def stop(folder: Dir = HERE) -> None:
    """Stop the coordinator; the next start goes on where it was."""
    from cropkt.errors import UsageError
    from cropkt_server.lock import running

    with one_line("cropkt-server"):
        _deployed(folder)
        pid = running(folder)
        if pid is None:
            typer.echo("not running")
            return
        os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + LONGEST_STOP
        while running(folder) == pid:
            if time.monotonic() > until:
                raise UsageError(f"process {pid}", "does not stop", f"End it: kill -9 {pid}")
            time.sleep(0.1)
        typer.echo("stopped")


@app.command()
def status(folder: Dir = HERE, as_json: AsJson = False) -> None:
    """Say how far the study is; exit code 3 if it neither runs nor has done everything."""
    from dataclasses import asdict

    from rich.console import Console

    from cropkt_server.status import read_status
    from cropkt_server.words import in_words, show

    with one_line("cropkt-server"):
        read = read_status(folder)
    console = Console(highlight=False)
    if as_json:
        typer.echo(json.dumps(asdict(read), sort_keys=True))
    elif console.is_terminal:
        show(read, console)
    else:
        _say(in_words(read))
    raise typer.Exit(0 if read.good else 3)


@app.command()
def report(
    folder: Dir = HERE,
    out: Annotated[Path | None, typer.Option(help="A folder; the study's report/ if none.")] = None,
) -> None:
    """Write one HTML page for clinicians of what the study found so far."""
    with one_line("cropkt-server"):
        from cropkt_server.report import write  # torch and matplotlib load here

        typer.echo(write(folder, out))


@app.command()
def pause(folder: Dir = HERE) -> None:
    """Send nothing new; what is under way is still taken in."""
    from cropkt_server import actions

    with one_line("cropkt-server"):
        _say(actions.pause(folder))


@app.command()
def resume(folder: Dir = HERE) -> None:
    """Go on after a pause."""
    from cropkt_server import actions

    with one_line("cropkt-server"):
        _say(actions.resume(folder))


@app.command()
def retry(
    folder: Dir = HERE,
    site: Annotated[str | None, typer.Option(help="Only this hospital's rows.")] = None,
    row: Annotated[str | None, typer.Option(help="Only this row, as status names it.")] = None,
) -> None:
    """Make failed rows due again; a study that was finished is open again."""
    from cropkt_server import actions

    with one_line("cropkt-server"):
        _say(actions.retry(folder, site=site, row=row))


@app.command()
def admit(
    site: Site,
    cancer: Annotated[str, typer.Option(help="Of the model.")],
    folder: Dir = HERE,
) -> None:
    """Take a model that lies in quarantine after all, when its site sends it again."""
    from cropkt.cancers import cancer_of
    from cropkt_server import actions

    with one_line("cropkt-server"), actions.opened_store(folder) as store:
        again = store.admit(site, cancer_of(cancer))
        if again:
            _say(actions.reopened(store, again))
        else:
            typer.echo(f"no model of {site} for {cancer} lies in quarantine")


@app.command()
def renew(folder: Dir = HERE) -> None:
    """Make a new server certificate; the hospitals need not notice."""
    from cropkt_server.lock import running
    from cropkt_server.pki import Keys, renew

    with one_line("cropkt-server"):
        _, host = _deployed(folder)
        renew(Keys.of(folder), [_hostname(host)])
        again = "; stop and start the study to use it" if running(folder) else ""
        typer.echo(f"made a new certificate for {_hostname(host)}{again}")


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


def _hostname(host: str) -> str:
    return host.rpartition(":")[0].strip("[]")


def _deployed(folder: Path) -> tuple[Settings, str]:
    """Return a deployed study's settings and "name:port", or say what is wrong with them."""
    from cropkt_server.runtime import deployed_host
    from cropkt_server.settings import load_settings

    settings = load_settings(folder)
    return settings, deployed_host(settings, folder)


def _detach(folder: Path, linger: float, board: int | None) -> None:
    """Start the same in the background; return when it listens, or say why it does not."""
    from cropkt.errors import UsageError
    from cropkt_server.lock import running
    from cropkt_server.readiness import readiness
    from cropkt_server.runtime import LOG_NAME

    if (pid := running(folder)) is not None:
        problem = f"a coordinator (process {pid}) runs this study"
        raise UsageError(folder, problem, "Stop it with cropkt-server stop")
    nothing, log = subprocess.DEVNULL, folder / LOG_NAME
    code = "from cropkt_server.cli import main; main()"
    options = ["--linger", str(linger)] + ([] if board is None else [f"--board={board}"])
    with readiness() as listening:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", code, "start", str(folder), *options],
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            env={**os.environ, **listening.environment},
            start_new_session=True,  # closing the terminal must not end it
        )
        why_not = listening.wait(child)
    if why_not is not None:
        ended = child.wait()
        fail("cropkt-server", why_not or f"it ended with code {ended}; see {log}", ended)
    typer.echo(f"running in the background: process {child.pid}, log {log}")
    if board is not None:
        typer.echo(f"the board: {_board_url(folder, child) or f'did not come up; see {log}'}")


def _board_url(folder: Path, coordinator: subprocess.Popen[bytes]) -> str:
    """Return the address of the board that a coordinator has just begun; none if it has not."""
    from cropkt_server.board.process import URL_NAME

    path, until = folder / URL_NAME, time.monotonic() + LONGEST_BOARD
    while time.monotonic() < until and coordinator.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            return path.read_text().strip()
        time.sleep(0.1)
    return ""


def main() -> None:
    """Entry point of the `cropkt-server` command."""
    app()
