"""`cropkt-client`: a hospital joins a study and serves it for weeks.

Exit codes: 0 the study is closed, 130 and 143 interrupted, 64 a wrong option, 69 the coordinator
cannot be reached, 74 a disk that is full, 76 versions that do not go together, 77 refused, 78
configuration; of `doctor`: 1 something will fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cropkt.console import Version, one_line
from cropkt_client import governance
from cropkt_client.governance import AsJson, Config

if TYPE_CHECKING:
    from cropkt_client.enrol import Enrolment
    from cropkt_client.log import State
    from cropkt_client.serve import Place

DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,2})?")
LONGEST_STOP = 40.0  # seconds a client may take to stop

_COLOURS = {
    "enrolled as": "bold",
    "running": "green",
    "connected": "green",
    "the study is closed": "green",
    "waiting for approval": "yellow",
    "no answer": "yellow",
    "not ": "red",
    "last error": "red",
}  # by how a line of `status` begins
_DEVICES = "auto, cuda[:i], cpu or mps  [default: auto]"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Serve a study until the coordinator closes it.

    \b
    cropkt-client enrol INVITE
    cropkt-client doctor
    cropkt-client --site lumc --cancer UVM --cancer SKCM
    cropkt-client --site lumc --cancer UVM --detach
    cropkt-client status
    cropkt-client release list
    cropkt-client ledger show
    cropkt-client predict --cancer UVM --slides FEATURES --out answers
    """,
)
app.add_typer(governance.release, name="release")
app.add_typer(governance.ledger, name="ledger")


@app.callback(invoke_without_command=True)
def client(
    context: typer.Context,
    site: Annotated[str, typer.Option(help="This hospital's name in the roster.")] = "",
    cancer: Annotated[
        list[str] | None,
        typer.Option(help="Cancer code, of those in site.yaml; repeat for several."),
    ] = None,
    config: Config = None,
    detach: Annotated[bool, typer.Option("--detach", help="Serve in the background.")] = False,
    device: Annotated[str, typer.Option(help=_DEVICES, show_default=False)] = "auto",
    version: Version = False,
) -> None:
    """Serve a study until the coordinator closes it."""
    context.obj = config or Path("site.yaml")
    if context.invoked_subcommand:
        return
    if not site and not cancer:
        typer.echo(context.get_help())
        raise typer.Exit(64)
    with one_line("cropkt-client"):
        place = _place(context.obj, site, cancer or [], device)
        if detach:
            _detach(place, sys.argv[1:])
            return
        from cropkt_client.serve import serve

        serve(place)


@app.command()
def enrol(
    context: typer.Context,
    invite: Annotated[str, typer.Argument(help="The invite, or a file that holds it.")],
    config: Config = None,
) -> None:
    """Make this site's keys here and redeem an invite."""
    from cropkt.invite import decode_invite
    from cropkt_client.enrol import join

    with one_line("cropkt-client"):
        path = Path(invite)
        named = len(invite) < 256 and path.is_file()
        read = decode_invite(path.read_text(errors="replace") if named else invite)
        for line in join(read, config or context.obj):
            typer.echo(line)


@app.command()
def pack(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The pack, beside site.yaml.")] = Path("pack"),
    config: Config = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only compare a pack's checksums.")
    ] = False,
    unpack: Annotated[
        Path | None, typer.Option(help="Write a pack's slides back into this folder, as HDF5.")
    ] = None,
) -> None:
    """Pack the slides of site.yaml into one matrix that reads faster; optional, reversible."""
    from cropkt_client.settings import read_settings

    with one_line("cropkt-client"):
        path = (config or context.obj).resolve()
        settings = read_settings(path)
        from cropkt.cohort.features import SlideFolders
        from cropkt.cohort.packing import pack_or_unpack

        slides = [path.parent / each for each in settings.slides]
        where = path.parent / folder
        for line in pack_or_unpack(
            where, lambda: SlideFolders(slides), verify=verify, unpack_to=unpack
        ):
            typer.echo(line)
        if not verify and unpack is None:
            typer.echo(f"to use it, write in {path.name}: pack: {folder}")


@app.command()
def status(context: typer.Context, config: Config = None, as_json: AsJson = False) -> None:
    """Say whether this site is enrolled, runs and is connected; exit code 3 if it does not run."""
    from cropkt.errors import ConfigError
    from cropkt_client.enrol import Enrolment
    from cropkt_client.held import Shelf
    from cropkt_client.log import read_status
    from cropkt_client.serve import running
    from cropkt_client.settings import state_folder

    with one_line("cropkt-client"):
        state, enrolment = state_folder(config or context.obj), None
        with contextlib.suppress(ConfigError):
            enrolment = Enrolment.load(state)
        pid, told = running(state), read_status(state)
        held = sum(one.decision == "waiting" for one in Shelf(state).all())
    if told and pid and pid != told.pid:
        told = None  # an earlier client's: this one has reported nothing yet
    if as_json:
        whole = {"enrolled": enrolment is not None, "running": pid is not None, "pid": pid}
        whole["held"] = held
        typer.echo(json.dumps({**(asdict(told) if told else {}), **whole}, sort_keys=True))
    else:
        lines = list(_in_words(enrolment, pid, told))
        if held:
            lines.append(f"waiting for approval: {held}; see cropkt-client release list")
        _show(lines)
    raise typer.Exit(0 if pid else 3)


@app.command(
    help="""Check connection, machine and data; exit code 1 if something will fail.

    What is shown holds counts, and no id, file name or time of a patient.

    \b
    cropkt-client doctor
    cropkt-client doctor --config site.yaml --probe 60 --json
    """
)
def doctor(
    context: typer.Context,
    config: Config = None,
    as_json: AsJson = False,
    probe: Annotated[
        float, typer.Option(min=1, max=3600, help="Seconds for a trial of training.")
    ] = 20.0,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Try no training.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Read every slide, not only for a minute.")
    ] = False,
    splits: Annotated[
        list[Path] | None,
        typer.Option(help="Split file of other work on these patients; repeat for each fold."),
    ] = None,
    device: Annotated[str, typer.Option(help=_DEVICES, show_default=False)] = "auto",
) -> None:
    """Check connection, machine and data."""
    from cropkt.checkup import show
    from cropkt_client.doctor import examine

    with one_line("cropkt-client"):
        _check_device_name(device)
        seconds = 0.0 if no_probe else probe
        path = config or context.obj
        findings = examine(path, device=device, probe=seconds, full=full, splits=splits or ())
        code = show(findings, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def stop(context: typer.Context, config: Config = None) -> None:
    """Stop the client; a task at work is cut off and comes again when it runs again."""
    from cropkt.errors import UsageError
    from cropkt_client.serve import running
    from cropkt_client.settings import state_folder

    with one_line("cropkt-client"):
        state = state_folder(config or context.obj)
        pid = running(state)
        if pid is None:
            typer.echo("not running")
            return
        os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + LONGEST_STOP
        while running(state) == pid:
            if time.monotonic() > until:
                raise UsageError(f"process {pid}", "does not stop", f"End it: kill -9 {pid}")
            time.sleep(0.1)
        typer.echo("stopped")


@app.command()
def signers(context: typer.Context, config: Config = None, as_json: AsJson = False) -> None:
    """List whose experts this site uses, with fingerprints to compare by telephone."""
    from cropkt_client.settings import read_settings
    from cropkt_client.trust import Trust

    with one_line("cropkt-client"):
        path = (config or context.obj).resolve()
        settings = read_settings(path)
        known = Trust(settings, path.parent / settings.state).known()
    if as_json:
        typer.echo(json.dumps(known, sort_keys=True))
        return
    for name, fingerprint in known.items():
        this = "  (this site)" if name == settings.site else ""
        typer.echo(f"{fingerprint}  {name}{this}")


@app.command()
def predict(
    context: typer.Context,
    cancer: Annotated[str, typer.Option(help="Whose model answers.")],
    slides: Annotated[
        list[Path], typer.Option(help="Slide feature file, or a folder of them; repeat.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for tables, pages and maps; stays on site.")],
    table: Annotated[
        Path | None, typer.Option(help="CSV of patient_id and slide_id; left out: one patient.")
    ] = None,
    patient: Annotated[str, typer.Option(help="Name of the one patient, without --table.")] = "",
    model: Annotated[str, typer.Option(help="released (the guard's), local or router.")] = (
        "released"
    ),
    thumbnail: Annotated[
        Path | None, typer.Option(help="Picture of the slide, or a folder of <slide>.png.")
    ] = None,
    level0_size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="WIDTH HEIGHT", help="Of the slide's finest level, pixels."),
    ] = None,
    patch_size: Annotated[
        float | None, typer.Option(min=1, help="Of a patch, pixels of the finest level.")
    ] = None,
    device: Annotated[str, typer.Option(help=_DEVICES, show_default=False)] = "auto",
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Answer for patients with the model that was released here: risk, curve, experts, maps.

    Research software, not a medical device. Nothing leaves this hospital.
    """
    from cropkt.errors import UsageError

    with one_line("cropkt-client"):
        if not DEVICE.fullmatch(device):
            raise UsageError("--device", f"unknown {device!r}", "Use auto, cuda[:i], cpu or mps")
        from cropkt.cancers import cancer_of
        from cropkt.experts.device import resolve_device
        from cropkt.prediction.kept import WHICH
        from cropkt_client import predict as prediction
        from cropkt_client.site import Site

        which = next((one for one in WHICH if one == model), None)
        if which is None:
            raise UsageError("--model", f"unknown {model!r}", "Use released, local or router")
        site = Site.load(config or context.obj, device=resolve_device(device))
        request = prediction.Request(
            cancer=cancer_of(cancer),
            slides=tuple(slides),
            out=out,
            table=table,
            patient=patient,
            model=which,
            patch_size=patch_size,
            thumbnail=thumbnail,
            level0_size=level0_size,
        )
        done = prediction.predict(site, request)
        for line in [prediction.as_json(done)] if as_json else done.lines():
            typer.echo(line)


def _place(config: Path, site: str, cancers: Sequence[str], device: str) -> Place:
    """Return where to serve from, if the command line agrees with what this site joined."""
    from cropkt.cancers import cancer_of
    from cropkt.errors import ConfigError, DataError, UsageError
    from cropkt_client.enrol import Enrolment
    from cropkt_client.link import Coordinator
    from cropkt_client.serve import Place
    from cropkt_client.settings import read_settings

    _check_device_name(device)
    try:
        asked = tuple(sorted({cancer_of(code) for code in cancers}))
    except DataError as error:
        raise UsageError("--cancer", error.problem, error.fix) from None
    config = config.resolve()
    here = read_settings(config)
    state = (config.parent / here.state).resolve()
    enrolment = Enrolment.load(state)
    if not site or not asked:
        missing = "--cancer" if site else "--site"
        line = " ".join(["--site", enrolment.site, *(f"--cancer {c}" for c in enrolment.cancers)])
        raise UsageError(missing, "is missing", f"This site joined as: cropkt-client {line}")
    if not here.encoder:
        fix = "Write the name of the encoder as agreed in the study"
        raise ConfigError(config, "encoder: is empty", fix)
    for where, name in ((config, here.site), (state / "enrolment.json", enrolment.site)):
        if name != site:
            raise ConfigError(where, f"its site is {name}, not {site}", f"Give --site {name}")
    if extra := set(asked) - set(here.cancers):
        problem = f"its cancers are {_list(here.cancers)}; {_list(extra)} is not among them"
        raise ConfigError(config, problem, "Add it to its cancers, with its slides and outcomes")
    if extra := set(asked) - set(enrolment.cancers):
        problem = (
            f"this site is not enrolled for {_list(extra)}, only for {_list(enrolment.cancers)}"
        )
        raise ConfigError(config, problem, "Ask the coordinator for an invite with all its cancers")
    try:
        coordinator = Coordinator(enrolment.host, (state / "ca.pem").read_bytes())
    except (OSError, ValueError):
        raise ConfigError(state / "ca.pem", "missing or damaged", "Enrol again") from None
    return Place(
        config=config,
        state=state,
        cancers=asked,
        device=device,
        enrolment=enrolment,
        coordinator=coordinator,
    )


def _check_device_name(device: str) -> None:
    from cropkt.errors import UsageError

    if not DEVICE.fullmatch(device):
        raise UsageError("--device", f"unknown device {device!r}", "Use auto, cuda[:i], cpu or mps")


def _list(cancers: Iterable[str]) -> str:
    return " ".join(sorted(cancers))


def _detach(place: Place, arguments: list[str]) -> None:
    """Start this same command in the background, and say whether it came up."""
    from cropkt.errors import UnavailableError, UsageError
    from cropkt_client.log import LOG_NAME
    from cropkt_client.serve import check, running

    if (pid := running(place.state)) is not None:
        problem = f"another client (process {pid}) works with this state folder"
        raise UsageError(place.state, problem, "Stop it with cropkt-client stop")
    try:  # what stands in the way is said here, where somebody reads it
        check(place.coordinator.hello(), place.enrolment)
    except UnavailableError as error:
        typer.secho(f"cropkt-client: {error} It will keep trying", fg="yellow", err=True)
    command = ["from cropkt_client.cli import main; main()"]
    command += [argument for argument in arguments if argument != "--detach"]
    nothing = subprocess.DEVNULL
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", *command],
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
        start_new_session=True,  # closing the terminal must not end it
    )
    log = place.state / LOG_NAME
    while running(place.state) != child.pid:
        if (code := child.poll()) is not None:
            typer.secho(f"cropkt-client: it ended with code {code}; see {log}", fg="red", err=True)
            raise typer.Exit(code)
        time.sleep(0.1)
    typer.echo(f"serving in the background: process {child.pid}, log {log}")


def _in_words(enrolled: Enrolment | None, pid: int | None, told: State | None) -> Iterator[str]:
    """Yield the lines of `status`."""
    if enrolled is None:
        yield "not enrolled"
    else:
        cancers = _list(enrolled.cancers)
        yield f"enrolled as {enrolled.site} ({cancers}) in {enrolled.study} at {enrolled.host}"
    if pid is None:
        yield "the study is closed" if told and told.closed else "not running"
    else:
        yield f"running, process {pid}" + (f", since {_ago(told.since)}" if told else "")
    if pid and told:
        word = "connected" if told.connected else "no answer from the coordinator"
        yield f"{word} since {_ago(told.connected_since)}"
        if told.task:
            yield f"at work on {told.task} since {_ago(told.task_since)}"
        else:
            yield f"no task at work, {told.tasks_done} done"
    if told and told.error:
        yield f"last error, {_ago(told.error_at)}: {told.error}"


def _show(lines: Iterable[str]) -> None:
    """Print the lines of `status`, on a terminal in colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in lines:
        colour = next((colour for start, colour in _COLOURS.items() if line.startswith(start)), "")
        console.print(Text(line, colour), soft_wrap=True)


def _ago(when: float | None) -> str:
    when = when or time.time()
    minutes = int(max(0.0, time.time() - when) // 60)
    span = f"{minutes // 1440} d {minutes // 60 % 24} h {minutes % 60} min"
    while span.startswith("0 ") and " " in span[2:].strip() and not span.startswith("0 min"):
        span = span.split(" ", 2)[2]
    return f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(when))} ({span})"


def main() -> None:
    """Entry point of the `cropkt-client` command."""
    app()
