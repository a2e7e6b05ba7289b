"""An answer in words that need no knowledge of models: what somebody approves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from cropkt.experts.card import AuditSummary, read_card
from cropkt.messages import (
    ArmScore,
    CohortCount,
    ExpertReply,
    Message,
    RouterReply,
    Score,
    Shots,
    Signed,
    SourceScore,
    TransferReply,
    Verdict,
    Voice,
    Weights,
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
    """Yield every kind of thing in an answer; its fields without words are a fault."""
    for item in fields(answer):
        if item.name not in _ENVELOPE:
            yield from _WORDS[item.name](getattr(answer, item.name), answer)


def _counts(patients: int | None, events: int | None) -> str:
    """Return rounded counts; a suppressed one is only said to be small."""
    few = "fewer than the minimum"
    told = [few if count is None else f"about {count}" for count in (patients, events)]
    return f"counts: {told[0]} patients, {told[1]} events"


def _cohorts(cohorts: Iterable[CohortCount], _: Message) -> Iterator[str]:
    for count in cohorts:
        counts = _counts(count.patients, count.events)
        yield f"{count.cancer}: {counts}; features {count.dim} wide"


def _weights(weights: Weights | None, answer: Message) -> Iterator[str]:
    if weights is None:
        yield "that a router was trained; it stays here"
    elif isinstance(answer, ExpertReply):
        yield f"{_models(weights.shape, 'expert')}, trained on these patients"
    elif isinstance(answer, RouterReply):
        yield f"{_models(weights.shape, 'router')}, trained on these patients"
    else:
        yield f"{_models(weights.shape, 'model')} of all cancers, trained on these patients"


def _signed(signed: Signed | None, _: Message) -> Iterator[str]:
    if signed is None:
        return
    card = read_card(signed.card)
    licence = f" and its licence, {card.licence}" if card.licence else ""
    yield f"its card, signed with this site's key: how it was trained, no more counts{licence}"
    if card.audit is not None:
        yield _audit(card.audit)


def _audit(audit: AuditSummary) -> str:
    few = ""
    if audit.tpr_at_1_percent is not None:
        few = (
            f"; at one false alarm in a hundred it recognises {audit.tpr_at_1_percent:.0%} of them"
        )
    return (
        f"its membership audit: AUROC {audit.auroc:.2f} ({audit.low:.2f} to {audit.high:.2f}), "
        f"where .5 is a coin toss{few}. A leak below {audit.detectable:.2f} could have stayed "
        "unseen. This bounds what these attacks find; it is not a promise that no other attack "
        "finds more"
    )


def _scores(scores: tuple[SourceScore, ...], answer: Message) -> Iterator[str]:
    assert isinstance(answer, TransferReply)
    yield f"scores of {len(scores)} experts of other cancers on these patients"
    rows = 1 + len(answer.training_scores)
    yield f"each over all patients and without each fold: {rows * len(scores)} scores"
    if any(score.lead is not None for score in scores):
        yield "how far each is ahead of untrained experts"


def _arms(arms: Mapping[str, ArmScore], _: Message) -> Iterator[str]:
    for arm, score in arms.items():
        told = [
            words
            for name, words in _OF_ARM.items()
            if getattr(score, name) not in (None, 0, (), {})
        ]
        yield f"{arm}: {_score(score)}" + (f"; also {', '.join(told)}" if told else "")


def _routing(routing: Mapping[str, float], _: Message) -> Iterator[str]:
    yield f"how much {len(routing)} experts are heard, on average over the patients"


def _choice(choice: Mapping[str, int], _: Message) -> Iterator[str]:
    if choice:
        yield f"in how many folds each of {len(choice)} sources was the best one"


def _reason(reason: str, _: Message) -> Iterator[str]:
    if reason:
        yield f"why there is no more: {reason}"


def _verdict(verdict: Verdict | None, _: Message) -> Iterator[str]:
    if verdict is not None:
        yield (
            f"how far other cancers are trusted here: {verdict.share:.2f} of 1, for an expected "
            f"gain of {verdict.gain:+.3f}, and in how many folds each way to mix them was taken"
        )


def _voices(voices: Mapping[str, Voice], _: Message) -> Iterator[str]:
    if voices:
        yield (
            f"the part of each of {len(voices)} experts in the answer, how it varies over the "
            "folds, what the answer loses without it, and in how many folds it was left out"
        )


def _few_shot(rows: Iterable[Shots], _: Message) -> Iterator[str]:
    for shots in rows:
        yield f"C-indices of {len(shots.arms)} arms with {shots.patients} patients to learn from"


def _models(shape: tuple[int, ...], name: str) -> str:
    models, numbers = shape
    return f"{models} {name}{'' if models == 1 else 's'} of {numbers:,} numbers"


def _score(score: Score) -> str:
    if score.c_index is None:
        return "no C-index"
    error = "" if score.se is None else f" (standard error {score.se:.3f})"
    return f"C-index {score.c_index:.3f}{error}"


_ENVELOPE = frozenset(
    {"task", "protocol", "cancer", "events", "training_scores", "versions", "fewest"}
)
"""Fields told beside others: in the head, with the patients or scores; `fewest` is taken out."""
_OF_ARM = {
    "low": "its 95 % interval",
    "pairs": "the number of comparable pairs, in tens",
    "fold_mean": "the mean of the folds",
    "pooled": "over all pairs",
    "gain": "its gain over the own expert with interval",
    "against": "its lead over controls",
    "c_ipcw": "the IPCW C-index",
    "brier": "the integrated Brier score",
    "auc": "the AUC after 1, 3 and 5 years",
    "d_calibration": "the p value of its calibration",
    "log_rank": "the p value between its risk groups",
    "cost": "what it cost in seconds, memory and bytes",
}
_WORDS: dict[str, Callable[[Any, Any], Iterable[str]]] = {
    "site": lambda site, _: [f"this site's name ({site}) and versions of its software"],
    "cohorts": _cohorts,
    "patients": lambda patients, answer: [_counts(patients, answer.events)],
    "weights": _weights,
    "score": lambda score, _: [f"how well it does out of fold: {_score(score)}"],
    "signed": _signed,
    "scores": _scores,
    "arms": _arms,
    "routing": _routing,
    "zero_shot_choice": _choice,
    "reason": _reason,
    "verdict": _verdict,
    "voices": _voices,
    "few_shot": _few_shot,
    "seconds": lambda *_: ["how many seconds the work took"],
}
