"""What `experts` and `revoke` say of the bank, from the study's files alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cropkt.messages import ExpertReply, Weights
from cropkt_server.bank import Bank, Banked
from cropkt_server.findings import Findings
from cropkt_server.settings import load_settings
from cropkt_server.store import Task

_SHOWN = 16  # characters of a hash


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertStatus:
    """One expert of the bank."""

    hash: str
    cancer: str
    site: str | None  # None: an average of `parents`
    round: int
    patients: int | None  # as its site tells
    events: int | None
    c_index: float | None  # out of fold, at its own site
    parents: tuple[str, ...]
    used_by: tuple[str, ...]  # routers, as "site (cancer)"
    revoked: bool
    card: dict[str, object]  # all that it says of itself


def read_experts(folder: Path, known: dict[str, float] | None = None) -> list[ExpertStatus]:
    """Return the experts of a study, in the order in which they came.

    Args:
        folder: the study's.
        known: C-indices by hash, for who asks again and again: what is there is not read, what is
            read is added. They lie beside the weights, in large files.

    Raises:
        ConfigError: there is no study.
    """
    known = {} if known is None else known
    with _findings(folder, read_only=True) as findings:
        experts = findings.store.bank.experts()
        for expert in experts:
            read = None if expert.signed.hash in known else _c_index(findings, expert)
            if read is not None:
                known[expert.signed.hash] = read
        bank = findings.store.bank
        return [_status(bank, expert, known.get(expert.signed.hash)) for expert in experts]


def export(folder: Path, to: Path) -> list[Path]:
    """Write every expert that is not revoked as one signed file; return their paths.

    Raises:
        ConfigError: there is no study.
    """
    from cropkt.experts.artifact import Artifact  # torch loads here

    with _findings(folder) as findings:
        return [
            Artifact(card=expert.card, weights=weights, signature=expert.signed.signature).save(to)
            for expert in findings.store.bank.experts()
            if expert.revoked_at is None and (weights := weights_of(findings, expert)) is not None
        ]


def routers(bank: Bank, experts: Iterable[Banked]) -> list[str]:
    """Return the routers, as "site (cancer)", that were trained with any of these experts."""
    found = []
    for task in bank.users(expert.signed.hash for expert in experts):
        kind, site, *rest = task.split("/")
        if kind == "fit_router":
            found.append(f"{site} ({rest[0]})")
    return list(dict.fromkeys(found))


def in_words(experts: Iterable[ExpertStatus]) -> Iterator[str]:
    """Yield a line an expert."""
    nobody = True
    for expert in experts:
        nobody = False
        who = expert.site or f"average of {len(expert.parents)}"
        line = f"{expert.hash[:_SHOWN]} {expert.cancer} of {who}, round {expert.round}"
        parts = [line, f"{'few' if expert.patients is None else expert.patients} patients"]
        if expert.c_index is not None:
            parts.append(f"C-index {expert.c_index:.3f}")
        if expert.used_by:
            parts.append(f"used by {', '.join(expert.used_by)}")
        if expert.revoked:
            parts.append("REVOKED")
        yield ", ".join(parts)
    if nobody:
        yield "no expert yet"


def revoked_in_words(bank: Bank, gone: list[Banked]) -> Iterator[str]:
    """Yield what `revoke` did: the expert, what was made from it, and who used any of them."""
    for number, expert in enumerate(gone):
        card, how = expert.card, "and, made from it," if number else "revoked"
        yield f"{how} {expert.signed.hash[:_SHOWN]} {card.cancer} of {card.site or 'several sites'}"
    used = routers(bank, gone)
    for name in used:
        yield f"used by the router of {name}"
    if not used:
        yield "no router used it"


@contextlib.contextmanager
def _findings(folder: Path, *, read_only: bool = False) -> Iterator[Findings]:
    findings = Findings(folder, load_settings(folder).study, read_only=read_only)
    try:
        yield findings
    finally:
        findings.store.close()


def _status(bank: Bank, expert: Banked, c_index: float | None) -> ExpertStatus:
    card = expert.card
    return ExpertStatus(
        hash=expert.signed.hash,
        cancer=str(card.cancer),
        site=card.site,
        round=card.round,
        patients=card.patients,
        events=card.events,
        c_index=c_index,
        parents=card.parents if card.site is None else (),
        used_by=tuple(routers(bank, [expert])),
        revoked=expert.revoked_at is not None,
        card=json.loads(expert.signed.card),
    )


def _reply(findings: Findings, expert: Banked) -> ExpertReply | None:
    """Return the reply that brought an expert; None for an average, and in quarantine."""
    if not expert.task:
        return None
    _, site, *_ = expert.task.split("/")
    task = Task(kind="fit_expert", site=site, cancer=expert.card.cancer, round=expert.card.round)
    if findings.store.state(task) != "done":
        return None
    reply = findings.answer(task, ExpertReply)
    return reply if reply.signed == expert.signed else None


def _c_index(findings: Findings, expert: Banked) -> float | None:
    reply = _reply(findings, expert)
    return None if reply is None else reply.score.c_index


def weights_of(findings: Findings, expert: Banked) -> Weights | None:
    """Return an expert's weights; None if they are not here, or not what the study uses."""
    from cropkt_server.questions import Questions

    if expert.task:
        reply = _reply(findings, expert)
        return None if reply is None else reply.weights
    questions, card = Questions(findings), expert.card
    if findings.averaged("fit_expert", card.cancer, card.round) is None:
        return None
    same = questions.signed(card.cancer, card.round) == expert.signed
    return questions.average("fit_expert", card.cancer, card.round) if same else None
