"""Shows a running study from its table: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from cropkt_server.status import read_status
from cropkt_server.store import STAGES, Task, read_tasks

LOOK = 1.0  # seconds between looks at the table


@contextmanager
def shown(
    folder: Path, console: Console, *, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Show the study in `folder` while the block runs.

    Args:
        folder: the study's.
        console: for bars, if it is a terminal.
        say: takes the lines if it is none, instead of the console.
    """
    stop = threading.Event()

    def show() -> None:
        if console.is_terminal:
            _bars(folder, console, stop)
        else:
            _lines(folder, say or partial(console.print, highlight=False, soft_wrap=True), stop)

    thread = threading.Thread(target=show, name="cropkt-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _bars(folder: Path, console: Console, stop: threading.Event) -> None:
    """A bar a stage, and a bar a site that is not finished."""
    stages, sites = _progress(), _progress()
    bar_of: dict[str, TaskID] = {}
    with Live(Group(stages, sites), console=console, refresh_per_second=8, transient=True):
        while True:
            last = stop.wait(LOOK)
            tasks = read_tasks(folder)
            for stage in STAGES:
                _update(stages, bar_of, stage, [t for t in tasks if t.kind == stage])
            for site in sorted({task.site for task in tasks}):
                of_site = [task for task in tasks if task.site == site]
                now = next((task.kind for task in of_site if task.state == "sent"), "")
                _update(sites, bar_of, site, of_site, now=now, whole=len(STAGES) - 1)
            if last:
                return


def _update(
    progress: Progress,
    bar_of: dict[str, TaskID],
    name: str,
    tasks: list[Task],
    *,
    now: str = "",
    whole: int = 0,
) -> None:
    if not tasks:
        return
    if name not in bar_of:
        bar_of[name] = progress.add_task(name, total=len(tasks), now="")
    settled = sum(task.settled for task in tasks)
    total = max(whole, len(tasks))
    progress.update(bar_of[name], completed=settled, total=total, now=now.replace("_", " "))


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )


def _lines(folder: Path, say: Callable[[str], None], stop: threading.Event) -> None:
    """A line when a stage is complete, and one for every failure."""
    told: set[str] = set()
    while True:
        last = stop.wait(LOOK)
        tasks = read_tasks(folder)
        for task in tasks:
            if task.state == "failed" and task.id not in told:
                told.add(task.id)
                say(f"{task.id} failed: {task.cause}")
            if task.state == "held" and f"held {task.id}" not in told:
                told.add(f"held {task.id}")
                say(f"{task.id} waits for approval at the site")
        settled = all(task.settled for task in tasks)
        if settled and not last and (waits := read_status(folder).waits) and waits not in told:
            told.add(waits)
            say(f"The study waits for more sites: {waits}")
        states = Counter((task.kind, task.settled) for task in tasks)
        for index, stage in enumerate(STAGES):
            complete = states[stage, True] and not states[stage, False]
            over = last or any(task.kind in STAGES[index + 1 :] for task in tasks)
            if complete and over and stage not in told:
                told.add(stage)
                say(f"{stage.replace('_', ' ')}: {states[stage, True]} done")
        if last:
            return
