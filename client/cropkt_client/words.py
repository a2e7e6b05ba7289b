"""An answer in words that need no knowledge of models: what somebody approves."""

from __future__ import annotations

import time
from collections.abc import Iterator

from cropkt.experts.card import AuditSummary, read_card
from cropkt.messages import (
    DescribeReply,
    ExpertReply,
    FedAvgReply,
    Message,
    ReleaseReply,
    RouterReply,
    Score,
    TransferReply,
)
from cropkt_client.held import Held


def in_words(held: Held, answer: Message) -> Iterator[str]:
    """Yield what a held answer is, what in it would leave, how large it is and what was checked."""
    asked = held.question
    about = f", {asked.cancer}" if asked.cancer else ""
    yield f"{held.id}: the answer to {asked.kind}{about} ({asked.task})"
    yield f"to the coordinator of {held.study}, for {asked.purpose}; its key {held.recipient[:16]}"
    yield "It would leave this hospital:"
    for line in _contents(answer):
        yield f"  - {line}"
    yield f"It has {size(held.bytes)}; SHA-256 {held.sha256}"
    yield "Checked:"
    for line in held.checked.split("; "):
        yield f"  - {line}"
    yield "No patient, slide, patch, feature, attention map, event time or path is in it."
    yield state(held)


def state(held: Held) -> str:
    """Return in words what was decided of an answer."""
    if held.decision == "waiting":
        return f"It waits since {when(held.since)}."
    return f"It was {held.decision} by {held.by}, {when(held.at)}."


def when(at: float | None) -> str:
    """Return a time of this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def size(count: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count} bytes"


def _contents(answer: Message) -> Iterator[str]:
    """Yield every kind of thing in an answer."""
    if isinstance(answer, DescribeReply):
        yield f"this site's name ({answer.site}) and versions of its software"
        yield f"the name of its encoder ({answer.encoder or 'none given'})"
        for count in answer.cohorts:
            yield f"{count.cancer}: {_counts(count.patients, count.events)}"
        return
    yield _counts(getattr(answer, "patients", None), getattr(answer, "events", None))
    if isinstance(answer, ExpertReply):
        yield f"{_models(answer.weights.shape, 'expert')}, trained on these patients"
        yield f"how well it does out of fold: {_score(answer.score)}"
        if answer.signed:
            yield "its card, signed with this site's key: how it was trained, no more counts"
            yield from _audit(read_card(answer.signed.card).audit)
    elif isinstance(answer, RouterReply):
        if answer.weights is None:
            yield "that a router was trained; it stays here"
        else:
            yield f"{_models(answer.weights.shape, 'router')}, trained on these patients"
    elif isinstance(answer, FedAvgReply):
        yield f"{_models(answer.weights.shape, 'model')} of all cancers, trained on these patients"
    elif isinstance(answer, TransferReply):
        rows = 1 + len(answer.training_scores)
        yield f"scores of {len(answer.scores)} experts of other cancers on these patients"
        yield f"each over all patients and without each fold: {rows * len(answer.scores)} scores"
    elif isinstance(answer, ReleaseReply):
        for arm, score in answer.arms.items():
            yield f"{arm}: {_score(score)}"
        yield f"how much {len(answer.routing)} experts are heard, on average over the patients"
        if answer.verdict is not None:
            yield f"how far other cancers are trusted here: {answer.verdict.share:.2f} of 1"
        for shots in answer.few_shot:
            few = f"with {shots.patients} patients to learn from"
            yield f"C-indices of {len(shots.arms)} arms {few}"
    yield "how many seconds the work took"


def _counts(patients: int | None, events: int | None) -> str:
    """Return rounded counts; a suppressed one is only said to be small."""
    few = "fewer than the minimum"
    told = [few if count is None else f"about {count}" for count in (patients, events)]
    return f"counts: {told[0]} patients, {told[1]} events"


def _audit(audit: AuditSummary | None) -> Iterator[str]:
    if audit is not None:
        yield (
            f"its membership audit: AUROC {audit.auroc:.2f} ({audit.low:.2f} to {audit.high:.2f}), "
            "where .5 is a coin toss"
        )


def _models(shape: tuple[int, ...], name: str) -> str:
    models, numbers = shape
    return f"{models} {name}{'' if models == 1 else 's'} of {numbers:,} numbers"


def _score(score: Score) -> str:
    if score.c_index is None:
        return "no C-index"
    error = "" if score.se is None else f" (standard error {score.se:.3f})"
    return f"C-index {score.c_index:.3f}{error}"
