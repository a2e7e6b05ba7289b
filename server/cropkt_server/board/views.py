"""What each part of the board shows, as values for its template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cropkt.report import values as read
from cropkt.report.names import NAMES
from cropkt_server.board.observer import Observer
from cropkt_server.store import STAGES, Task
from cropkt_server.words import (
    no_answer,
    row_words,
    site_words,
    stage_lines,
    state_of,
    traffic_words,
    when,
)

CAN_PAUSE = ("running", "silent", "paused", "stopped")
SHADES = 8  # of a cell, to each side of .5
STEEP = 0.25  # of a C-index beyond .5, where the shade is full
STATES = {"done": "done", "sent": "at site", "due": "to do", "held": "held", "failed": "failed"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One field of a table."""

    text: str
    tone: str = ""
    note: str = ""


def head(observer: Observer) -> dict[str, Any]:
    """The study in one line, what stands in its way, and how far it is."""
    status = observer.status()
    sites = status.sites
    rows = [sum(counts.values()) for counts in status.stages.values()]
    done = sum(counts["done"] for counts in status.stages.values())
    enrolled = [site for site in sites if site.state in ("enrolled", "simulated")]
    tiles = [
        Cell(f"{len(enrolled)} of {len(sites)}", note="sites enrolled"),
        Cell(str(sum(site.online for site in sites)), note="online now"),
        Cell(str(sum(bool(site.contributed) for site in sites)), note="gave an expert"),
        Cell(f"{done} of {sum(rows)}", note="rows done"),
        Cell(str(len(status.failed)), "down" if status.failed else "", "rows failed"),
        Cell(traffic_words(status.received, status.sent) or "not counted", "words", "bytes"),
    ]
    if sites and sites[0].state == "simulated":
        del tiles[1]  # nobody can say
    return {
        "status": status,
        "says": state_of(status),
        "no_answer": no_answer(status),
        "held": len(status.held),
        "missing": status.missing,
        "tiles": tiles,
        "stages": [
            (stage, line, status.stages[stage.replace(" ", "_")])
            for stage, line in stage_lines(status)
        ],
        "can_pause": status.host is not None and status.state in CAN_PAUSE,
        "paused": status.state == "paused",
    }


def sites(observer: Observer) -> dict[str, Any]:
    """A row a site, and its failures."""
    status = observer.status()
    return {
        "sites": [(site, site_words(site)) for site in status.sites],
        "missing": status.missing,
        "deployed": status.host is not None,
    }


def tasks(observer: Observer) -> dict[str, Any]:
    """A row a site and cancer, a column a stage; failures and what is held below."""
    found = observer.tasks()
    kinds = [kind for kind in STAGES if any(task.kind == kind for task in found)]
    pairs: dict[tuple[str, str], dict[str, Task]] = {}
    described = {task.site: task for task in found if task.kind == "describe"}
    for task in found:
        if task.cancer:  # the last round of a kind stands
            pairs.setdefault((task.site, str(task.cancer)), {})[task.kind] = task
    for site in described:
        if all(site != name for name, _ in pairs):
            pairs[site, ""] = {}
    for (site, _), of in pairs.items():
        if site in described:
            of["describe"] = described[site]
    rows = [
        (site, cancer, [_state(of.get(kind)) for kind in kinds])
        for (site, cancer), of in sorted(pairs.items())
    ]
    return {
        "kinds": [kind.replace("_", " ") for kind in kinds],
        "rows": rows,
        "failed": [(t, row_words(t.id), when(t.changed)) for t in found if t.state == "failed"],
        "held": [(row_words(t.id), when(t.changed)) for t in found if t.state == "held"],
        "deployed": observer.status().host is not None,
    }


def experts(observer: Observer) -> dict[str, Any]:
    """The bank: a row an expert, with its card."""
    verdicts = observer.results().get("experts", {})
    return {
        "experts": observer.experts(),
        "verdicts": {cancer: found["verdict"] for cancer, found in verdicts.items()},
        "names": NAMES,
        "deployed": observer.status().host is not None,
    }


def transfer(observer: Observer) -> dict[str, Any]:
    """The matrix: a row a target, a column a source, as far as it is known."""
    found = observer.results()
    matrix = found.get("transfer", {})
    known = {source for row in matrix.values() for source in row}
    held = {str(task.cancer) for task in observer.tasks() if task.kind == "fit_expert"}
    cancers = sorted(known | set(matrix) | held)
    rows = [(t, [_score(matrix.get(t, {}).get(s), own=s == t) for s in cancers]) for t in cancers]
    scored = sum(cell.text != "" for _, cells in rows for cell in cells)
    return {
        "cancers": cancers,
        "rows": rows,
        "scored": scored,
        "whole": len(cancers) ** 2,
        "names": NAMES,
    }


def gains(observer: Observer) -> dict[str, Any]:
    """Each target's own C-index, the guarded answer's, the gain, and whom it hears."""
    found = observer.results()
    arm = read.headline(found)
    rows = []
    for cancer, target in read.targets_of(found).items():
        ends = read.gain_interval(target, arm)
        sign = read.beyond_noise(target, arm)
        gain = read.gain(target, arm)
        heard = read.helpers(cancer, target)
        rows.append(
            (
                cancer,
                [
                    Cell(
                        _count(target.get("patients")),
                        note=f"{_count(target.get('events'))} events",
                    ),
                    Cell(_number(read.c_index(target, "local"))),
                    Cell(_number(read.c_index(target, arm))),
                    Cell(
                        "" if gain is None else f"{gain:+.3f}".replace("-", "−"),
                        {1: "nowrap up", -1: "nowrap down"}.get(sign, "nowrap"),
                        ""
                        if ends is None
                        else f"{ends[0]:+.3f} to {ends[1]:+.3f}".replace("-", "−"),
                    ),
                    Cell(", ".join(f"{s} {w:.2f}" for s, w in heard) if heard else ""),
                ],
            )
        )
    across = found.get("across", {}).get(arm, {}).get("local")
    return {"arm": read.arm_title(arm), "rows": rows, "across": across, "names": NAMES}


def log(observer: Observer) -> dict[str, Any]:
    """The end of the coordinator's log."""
    return {"lines": observer.log()}


PARTS: dict[str, tuple[str, Callable[[Observer], dict[str, Any]], int]] = {
    "head": ("Study", head, 3),
    "sites": ("Sites", sites, 3),
    "tasks": ("Tasks", tasks, 3),
    "experts": ("Expert bank", experts, 6),
    "transfer": ("Transfer matrix", transfer, 6),
    "gains": ("Routing and gains so far", gains, 6),
    "log": ("Log", log, 5),
}
"""Name -> title, what it shows, seconds between two looks."""


def asks(observer: Observer, action: str, what: str) -> tuple[str, str, str]:
    """Return title, consequences and button of the question before an action."""
    if action == "pause":
        text = "Nothing new is sent to any site. What is under way is still taken in."
        return "Pause the study?", text, "Pause"
    if action == "resume":
        return "Resume the study?", "What is due is sent again.", "Resume"
    if action == "retry":
        text = f"{what} is due again with all its tries. A finished study is open again."
        return "Retry this task?", text, "Retry"
    if action == "revoke-site":
        text = f"{what} is cut off at once, in mid-task too. What it gave before stays."
        text += " It needs a new invite to come back."
        return f"Revoke the site {what}?", text, "Revoke site"
    expert = next((one for one in observer.experts() if one.hash == what), None)
    used = ", ".join(expert.used_by) if expert and expert.used_by else "no router so far"
    who = f"{expert.cancer} of {expert.site or 'several sites'}" if expert else what
    text = "No site is sent it again, nor anything made from it. It cannot be undone."
    return f"Revoke the expert {who}?", f"{text} Used by: {used}.", "Revoke expert"


def _state(task: Task | None) -> Cell:
    if task is None:
        return Cell("")
    note = f"round {task.round}" if task.round else ""
    if task.state in ("sent", "due") and task.tries > 1:
        note = f"try {task.tries}"
    return Cell(STATES[task.state], task.state, note)


def _score(score: Any, *, own: bool) -> Cell:
    value = read.finite(score.get("c_index")) if score else None
    if value is None:
        return Cell("", "own" if own else "")
    step = min(SHADES, round(abs(value - 0.5) / STEEP * SHADES))
    tone = "" if step == 0 else f"{'more' if value > 0.5 else 'less'}{step}"
    return Cell(f"{value:.2f}".removeprefix("0"), f"own {tone}" if own else tone)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "few" if value is None else str(value)
