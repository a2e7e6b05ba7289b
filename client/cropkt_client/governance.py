"""`cropkt-client release` and `cropkt-client ledger`: what somebody approves, and what has left.

Exit codes: 0, 64 no such answer, 65 the ledger is not whole, 78 configuration.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cropkt.console import fail, one_line

if TYPE_CHECKING:
    from cropkt_client.held import Decision, Held, Shelf

NOT_WHOLE = 65

Config = Annotated[Path | None, typer.Option(help="This site's settings  [default: site.yaml]")]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]
Ids = Annotated[list[str], typer.Argument(help="As `release list` shows them.", show_default=False)]
By = Annotated[str, typer.Option(help="Who decided, beside the user who types this.")]

release = typer.Typer(
    rich_markup_mode=None, help="Look at the answers that wait for approval, and decide."
)
ledger = typer.Typer(rich_markup_mode=None, help="Show, verify and export what left this hospital.")


@release.command("list")
def list_(
    context: typer.Context,
    config: Config = None,
    everything: Annotated[bool, typer.Option("--all", help="Decided ones, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the answers that wait for approval."""
    with one_line("cropkt-client"):
        from cropkt_client.words import size, state

        held = [h for h in _shelf(context, config).all() if everything or h.decision == "waiting"]
        if as_json:
            typer.echo(json.dumps([{"id": h.id, **asdict(h)} for h in held], sort_keys=True))
            return
        for one in held:
            typer.echo(f"{one.id}  {one.question.task}  {size(one.bytes)}  {state(one)}")
        if not held:
            typer.echo("nothing waits for approval")


@release.command()
def show(context: typer.Context, ids: Ids, config: Config = None) -> None:
    """Say in plain words what would leave, how large it is and what was checked."""
    with one_line("cropkt-client"):
        from cropkt_client.words import in_words

        shelf = _shelf(context, config)
        for name in ids:
            one = shelf.named(name)
            for line in in_words(one, shelf.answer(one)):
                typer.echo(line)


@release.command()
def approve(
    context: typer.Context,
    ids: Annotated[
        list[str] | None, typer.Argument(help="As `release list` shows them.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that wait now.")] = False,
    by: By = "",
    config: Config = None,
) -> None:
    """Let answers leave; also those that were refused before."""
    from cropkt.errors import UsageError

    with one_line("cropkt-client"):
        shelf = _shelf(context, config)
        chosen = [shelf.named(name) for name in ids or []]
        if everything:
            chosen += [one for one in shelf.all() if one.decision == "waiting"]
        elif not chosen:
            raise UsageError("release approve", "which?", "Give an id, or --all")
        _decide(shelf, chosen, "approved", by)


@release.command()
def refuse(context: typer.Context, ids: Ids, by: By = "", config: Config = None) -> None:
    """Keep answers here for good; their rows fail at the coordinator."""
    with one_line("cropkt-client"):
        shelf = _shelf(context, config)
        _decide(shelf, [shelf.named(name) for name in ids], "refused", by)


@ledger.command("show")
def show_ledger(
    context: typer.Context,
    last: Annotated[int, typer.Option(min=1, help="So many rows.")] = 20,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show what left last."""
    with one_line("cropkt-client"):
        from cropkt_client.ledger import Ledger
        from cropkt_client.words import size

        rows = Ledger(_state(context, config)).rows()[-last:]
        if as_json:
            typer.echo(json.dumps([asdict(row) for row in rows], sort_keys=True))
            return
        for row in rows:
            spent = "" if row.epsilon is None else f", epsilon {row.epsilon:.2f} so far"
            what = f"{row.message} ({row.task})" if row.task else row.message
            typer.echo(
                f"{row.number}  {row.time}  {what}  {size(row.bytes)}  {row.approved}{spent}"
            )
        if not rows:
            typer.echo("nothing has left")


@ledger.command()
def verify(context: typer.Context, config: Config = None, as_json: AsJson = False) -> None:
    """Check every row, its place and its signature; exit code 65 if the ledger is not whole."""
    with one_line("cropkt-client"):
        from cropkt_client.ledger import Ledger, public_key

        state = _state(context, config)
        kept = Ledger(state)
        problems = kept.problems(public_key(state))
        if as_json:
            typer.echo(json.dumps({"whole": not problems, "problems": problems}))
        elif not problems:
            typer.echo(f"whole: {len(kept.rows())} rows, all in place and signed by this site")
        for problem in problems if not as_json else ():
            typer.echo(problem)
        if problems:
            fail("cropkt-client", f"{state / 'ledger.sqlite'}: it is not whole", NOT_WHOLE)


@ledger.command()
def export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A new file: .csv, or .html to read and print.")],
    config: Config = None,
) -> None:
    """Write the ledger and whether it is whole into one file."""
    with one_line("cropkt-client"):
        from cropkt_client.ledger_page import write

        write(_config(context, config), file)
        typer.echo(f"wrote {file}")


def _decide(shelf: Shelf, chosen: list[Held], decision: Decision, by: str) -> None:
    from cropkt.errors import UsageError

    if len(by) > 80 or not by.isprintable():
        raise UsageError("--by", "is not a name", "Give at most 80 plain characters")
    for one in chosen:
        shelf.decide(one, decision, by=by)
        typer.echo(f"{one.id} {decision}: {one.question.task}")


def _config(context: typer.Context, config: Path | None) -> Path:
    chosen: Path = config or context.obj
    return chosen


def _state(context: typer.Context, config: Path | None) -> Path:
    from cropkt_client.settings import state_folder

    return state_folder(_config(context, config))


def _shelf(context: typer.Context, config: Path | None) -> Shelf:
    from cropkt_client.held import Shelf

    return Shelf(_state(context, config))
