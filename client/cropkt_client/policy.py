"""What a hospital's policy lets leave: pure functions of a question, its answer and `release`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from typing import Any, cast

import numpy as np

from cropkt.cancers import Cancer
from cropkt.errors import ArtifactError, MessageError, RefusedError
from cropkt.experts.card import Card, check_models, read_card
from cropkt.messages import (
    REPLIES,
    ArmScore,
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    Failure,
    FedAvgReply,
    FedAvgRequest,
    Fewest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    Score,
    SourceScore,
    TransferReply,
    TransferRequest,
    pack,
    unpack,
)
from cropkt_client.held import Question
from cropkt_client.settings import Asked, ReleasePolicy

WHERE = "site.yaml: release"
WITHHELD = "withheld for privacy"
SUPPRESSED = "suppressed by the site"
Paid = Callable[[Card], bool]  # whether a private site's budget has the payment for an expert
_ANSWERS = {kind.kind: kind for kind in REPLIES if kind is not Failure}
_QUESTIONS = (
    DescribeRequest,
    ExpertRequest,
    TransferRequest,
    RouterRequest,
    FedAvgRequest,
    ReleaseRequest,
)
_FAULT = "Either it was made before the site became private, or its task is faulty: report that"
# What a private site's answers may say. Whatever else the contract comes to hold stays empty.
_SAID = frozenset({"task", "protocol", "cancer", "patients", "events"})
_SAID_BY: Mapping[type[Message], frozenset[str]] = {
    DescribeReply: frozenset({"site", "cohorts", "versions"}),
    ExpertReply: frozenset({"weights", "signed"}),  # which `_check_paid` judges
}


class SuppressedError(RefusedError):
    """Too few patients or events stand behind an answer."""


class AuditRefusedError(RefusedError):
    """Membership is told too well from an expert, or that could not be measured."""


class PrivateError(RefusedError):
    """A private site's answer holds more than counts and an expert that its budget paid for."""


def question(request: Message) -> Question:
    """Return what a request asks.

    Raises:
        MessageError: it is no question about this site.
    """
    if not isinstance(request, _QUESTIONS):
        raise MessageError(type(request).__name__, "asks nothing that has an answer")
    models, parameters = _models(request)
    return Question(
        kind=cast(Asked, request.kind),
        task=request.task,
        purpose=request.study.purpose,
        cancer=getattr(request, "cancer", None),
        models=models,
        parameters=parameters,
    )


def _models(request: Message) -> tuple[int, int]:
    """Return how many models a request asks for, and the number of weights of each."""
    if isinstance(request, ExpertRequest):
        models = request.study.models if request.shared else 1
        return models, request.study.shape.parameters
    if isinstance(request, FedAvgRequest):
        return 1 + request.study.folds, request.study.shape.parameters
    if isinstance(request, RouterRequest) and request.shared:
        heads = request.study.router.warm_start
        shape, experts = request.study.shape, 1 + len(request.sources)
        return 1 + request.study.folds, shape.router_parameters(experts=experts, own_heads=heads)
    return 0, 0


def admit(policy: ReleasePolicy | None, asked: Question) -> ReleasePolicy:
    """Let a question pass whose answer may leave; return the policy that says so.

    Raises:
        RefusedError: the policy is missing, or does not name its kind, purpose or cancer.
    """
    if policy is None:
        fix = "Decide what may leave, and write it under release: in site.yaml"
        raise RefusedError(WHERE, "is not there, so nothing leaves", fix)
    if asked.kind not in policy.messages:
        raise RefusedError(WHERE, f"messages does not name {asked.kind}")
    if asked.purpose not in policy.purposes:
        raise RefusedError(WHERE, f"purposes does not name {asked.purpose}")
    if asked.cancer is not None and not _allows(policy, asked.cancer):
        raise RefusedError(WHERE, f"cancers does not name {asked.cancer}")
    return policy


def within(
    policy: ReleasePolicy, answer: Message, asked: Question, *, site: str, paid: Paid | None = None
) -> tuple[Message, str]:
    """Return what of an answer may leave, and in words what was checked.

    Counts come back rounded, or None below the minimum. Scores of fewer than the minimum are None;
    models that learnt from fewer do not leave.

    Args:
        policy: of the site.
        answer: from the site's task.
        asked: its question.
        site: name of the site.
        paid: whether its budget has paid for an expert. None: the site is not private.

    Raises:
        MessageError: it is not an answer to this question within the contract.
        PrivateError: the site is private, and it holds more than such a site gives away.
        AuditRefusedError: membership is told too well from the expert.
        RefusedError: it is larger than the policy allows.
        SuppressedError: it holds a model that learnt from fewer than the minimum.
    """
    answer, checks = _in_form(policy, answer, asked, site)
    answer, fewest = _apart(answer)
    if paid is not None:
        checks.append(private(answer, paid))
    checks += _models_in(answer, asked)
    checks.append(f"counts rounded to {policy.round_counts_to}")
    if isinstance(answer, DescribeReply):
        counts = tuple(
            _rounded(count, policy) for count in answer.cohorts if _allows(policy, count.cancer)
        )
        checks.append(f"none below {_bounds(policy)}")
        return replace(answer, cohorts=counts), "; ".join(checks)
    if isinstance(answer, ExpertReply):
        card = None if answer.signed is None else read_card(answer.signed.card)
        if card is not None:
            _check_card(card, answer, policy)
            checks.append("its signed card tells no more")
        checks += _audited(card, policy)
    elif getattr(answer, "weights", None) is not None:
        checks += _audited(None, policy)  # no card and no audit: not where there is a limit
    answer, check = _of_enough(policy, answer, fewest)
    checks.append(check)
    return _rounded(answer, policy), "; ".join(checks)


def private(answer: Message, paid: Paid) -> str:
    """Check that a private site's answer tells nothing but counts and a paid expert.

    Returns:
        in words what was checked.

    Raises:
        PrivateError: it tells more, whatever the task that made it thought.
    """
    kind = type(answer)
    said = _SAID | _SAID_BY.get(kind, frozenset())
    for item in fields(answer):
        value = getattr(answer, item.name)
        why = item.name == "reason" and value in (WITHHELD, SUPPRESSED)
        if not (item.name in said or why or _silent(value, _default(item))):
            problem = f"the {item.name} of a {kind.__name__} would leave a private site"
            raise PrivateError("site.yaml: privacy", problem, _FAULT)
    if not isinstance(answer, ExpertReply):
        return "private: counts only"
    card = _check_paid(answer, paid)
    return f"private: its expert's epsilon of {card.epsilon:.3g} is paid"


def _check_paid(answer: ExpertReply, paid: Paid) -> Card:
    """Return the card of the one expert that a private site gives away.

    Raises:
        PrivateError: it is not signed as one that its cohort's budget has paid for.
    """
    where, fix = "site.yaml: privacy", _FAULT
    if answer.signed is None:
        raise PrivateError(where, "an expert without a card would leave a private site", fix)
    card = read_card(answer.signed.card)
    if card.epsilon is None or card.delta is None or not paid(card):
        raise PrivateError(where, "its budget has not paid for the expert that would leave", fix)
    if card.audit is not None:
        raise PrivateError(where, "the audit on its expert's card would leave", fix)
    try:
        check_models(card, answer.weights, [()], cancer=answer.cancer)
    except ArtifactError as error:
        problem = f"its expert is not the one that was paid for: {error.problem}"
        raise PrivateError(where, problem, fix) from None
    return card


def _silent(value: Any, default: Any = 0) -> bool:
    """Return whether a value says nothing: it is empty, or what the contract has by default."""
    if value is None or isinstance(value, np.ndarray):
        return value is None
    if is_dataclass(value):
        return all(_silent(getattr(value, item.name), _default(item)) for item in fields(value))
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return all(map(_silent, value))
    return bool(value == default)


def _default(item: Field[Any]) -> Any:
    """Return a field's default, 0 if it has none."""
    if item.default_factory is not MISSING:
        return item.default_factory()
    return 0 if item.default is MISSING else item.default


def _in_form(
    policy: ReleasePolicy, answer: Message, asked: Question, site: str
) -> tuple[Message, list[str]]:
    """Return an answer taken apart and put together as if a stranger had sent it."""
    kind = _ANSWERS[asked.kind]
    text, arrays = pack(answer)
    answer = unpack(text, arrays, expected=(kind,))
    about = (answer.task, getattr(answer, "cancer", None), getattr(answer, "site", site))
    if about != (asked.task, asked.cancer, site):
        raise MessageError(kind.__name__, "is not the answer to its question")
    size = len(text) + sum(array.nbytes for array in arrays.values())
    if size > policy.max_megabytes * 1_000_000:
        problem = f"max_megabytes is {policy.max_megabytes}, and the answer has {size} bytes"
        raise RefusedError(WHERE, problem)
    checks = [f"fields, types and bounds of {kind.__name__}", f"purpose {asked.purpose}"]
    if asked.cancer is not None:
        checks.append(of_cancer(asked.cancer))
    return answer, checks


def _apart(answer: Any) -> tuple[Any, Fewest | None]:
    """Return an answer without what only the gate may know, and that.

    Raises:
        MessageError: a task that trains or scores by folds did not say it.
    """
    if not isinstance(answer, ExpertReply | TransferReply | RouterReply | FedAvgReply):
        return answer, None
    if answer.fewest is None:
        raise MessageError(type(answer).__name__, "does not say how few patients it rests on")
    return replace(answer, fewest=None), answer.fewest


def _models_in(answer: Message, asked: Question) -> Iterator[str]:
    """Yield in words which models an answer holds.

    Raises:
        MessageError: it holds others than were asked for.
    """
    arrays = [getattr(answer, item.name) for item in fields(answer)]
    for array in (one for one in arrays if isinstance(one, np.ndarray)):
        if array.shape != (asked.models, asked.parameters):
            asked_for = f"{asked.models} of {asked.parameters} weights were asked for"
            problem = f"holds {len(array)} models of {array.shape[1]} weights where {asked_for}"
            raise MessageError(type(answer).__name__, problem)
        yield f"{len(array)} x {array.shape[1]} float32, finite"


def version(policy: ReleasePolicy) -> str:
    """Return a short hash of a policy: another hash, another policy."""
    return hashlib.sha256(json.dumps(asdict(policy), sort_keys=True).encode()).hexdigest()[:16]


def of_cancer(cancer: Cancer) -> str:
    """Return what is written down as checked of an answer about a cohort."""
    return f"cancer {cancer}"


def rounded(count: int | None, minimum: int, to: int) -> int | None:
    """Return a count to the nearest multiple of `to`; None if it is below the minimum."""
    return None if count is None or count < minimum else (count + to // 2) // to * to


def _rounded(counts: Any, policy: ReleasePolicy) -> Any:
    """Return a message, or a count of it, with patients and events rounded or suppressed."""
    step = policy.round_counts_to
    return replace(
        counts,
        patients=rounded(counts.patients, policy.minimum_patients, step),
        events=rounded(counts.events, policy.minimum_events, step),
    )


def _check_card(card: Card, answer: ExpertReply, policy: ReleasePolicy) -> None:
    """Refuse a card that tells more of a cohort than the answer may.

    Raises:
        RefusedError: one of its counts is not rounded as the policy says.
    """
    allowed, step = _rounded(answer, policy), policy.round_counts_to
    told = [(card.patients, allowed.patients), (card.events, allowed.events)]
    if card.audit is not None:
        audited = card.audit.patients
        told.append((audited, rounded(audited, policy.minimum_patients, step)))
    if any(count not in (None, may) for count, may in told):
        problem = "the counts on the expert's signed card are not rounded as it says"
        raise RefusedError(WHERE, problem, "Set it back to what it was when the expert was signed")


def _audited(card: Card | None, policy: ReleasePolicy) -> list[str]:
    """Return in words what the membership audit showed.

    Raises:
        AuditRefusedError: the policy has a limit, and the expert is above it or was not audited.
    """
    if policy.audit is None:
        return []
    if card is not None and card.epsilon is not None:
        return ["not audited: trained with differential privacy"]
    limit, fix = policy.audit.max_auroc_upper, "Train it less, or with privacy: in site.yaml"
    if card is None or card.audit is None:
        raise AuditRefusedError(f"{WHERE}.audit", "its leak could not be measured", fix)
    if card.audit.high > limit:
        problem = f"membership is told with an AUROC of up to {card.audit.high}, allowed {limit}"
        raise AuditRefusedError(f"{WHERE}.audit", problem, fix)
    return [f"membership audit: AUROC at most {card.audit.high}, allowed {limit}"]


def _of_enough(
    policy: ReleasePolicy, answer: Message, fewest: Fewest | None
) -> tuple[Message, str]:
    """Return an answer without the scores that too few stand behind, and in words what was found.

    Args:
        policy: of the site.
        answer: about a cohort.
        fewest: the smallest set of its patients that a model, or a fold's score, rests on.

    Raises:
        SuppressedError: too few stand behind a model, or behind the training that it reports.
    """
    bounds = _bounds(policy)
    enough = _enough(answer, policy)
    each = enough and (fewest is None or _enough(fewest, policy))
    if not enough and isinstance(answer, ExpertReply | RouterReply | FedAvgReply):
        raise SuppressedError(answer.task, f"its cohort has not {bounds}")
    if not each and getattr(answer, "weights", None) is not None:
        raise SuppressedError(answer.task, f"not every model learnt from {bounds}")
    if not enough:
        return _without_scores(answer), f"not {bounds}: scores suppressed"
    if not each and isinstance(answer, TransferReply):
        text = f"at least {bounds}, but not without a fold: scores of folds suppressed"
        return _without_fold_scores(answer), text
    return answer, f"at least {bounds}"


def _bounds(policy: ReleasePolicy) -> str:
    return f"{policy.minimum_patients} patients and {policy.minimum_events} events"


def _enough(answer: Any, policy: ReleasePolicy) -> bool:
    """Return whether an answer says that enough patients and events stand behind it."""
    return (
        answer.patients is not None
        and answer.events is not None
        and answer.patients >= policy.minimum_patients
        and answer.events >= policy.minimum_events
    )


def _without_fold_scores(answer: TransferReply) -> TransferReply:
    rows = tuple(tuple(Score() for _ in row) for row in answer.training_scores)
    return replace(answer, training_scores=rows)


def _without_scores(answer: Message) -> Message:
    if isinstance(answer, TransferReply):
        nothing = tuple(SourceScore() for _ in answer.scores)
        return replace(_without_fold_scores(answer), scores=nothing)
    if isinstance(answer, ReleaseReply):
        return replace(
            answer,
            arms={arm: ArmScore() for arm in answer.arms},
            routing={},
            zero_shot_choice={},
            verdict=None,
            voices={},
            few_shot=(),
            reason=SUPPRESSED,
        )
    raise MessageError(type(answer).__name__, "has scores that the gate cannot leave out")


def _allows(policy: ReleasePolicy, cancer: Cancer) -> bool:
    return policy.cancers is None or cancer in policy.cancers
