"""Sites that answer by hand, for tests of the study without any site."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cropkt.cancers import Cancer
from cropkt.experts.artifact import m0_hash
from cropkt.experts.card import Card, models_of, public_text, sign, training_hash
from cropkt.experts.training import cross_fitted
from cropkt.messages import (
    ArmScore,
    CohortCount,
    DescribeReply,
    ExpertReply,
    ExpertRequest,
    Message,
    ReleaseReply,
    RouterReply,
    RouterRequest,
    Score,
    Signed,
    SourceScore,
    TransferReply,
    TransferRequest,
)
from cropkt_server.quarantine import Quarantine
from cropkt_server.store import Task
from cropkt_server.study import Study


class Sites:
    """Answers as sites would, with weights that tell who made them."""

    def __init__(self, holdings: Mapping[str, Sequence[Cancer]]) -> None:
        self.holdings = dict(holdings)

    def answer(self, task: Task, request: Message) -> Message:
        """Return the site's answer to one row."""
        if task.cancer is None:
            counts = [
                CohortCount(cancer=cancer, patients=100, events=10, dim=8)
                for cancer in self.holdings[task.site]
            ]
            return DescribeReply(task=request.task, site=task.site, cohorts=tuple(counts))
        cancer, mark = task.cancer, float(sum(task.site.encode()))
        if isinstance(request, ExpertRequest):
            return ExpertReply(
                task=task.id,
                cancer=cancer,
                patients=100,
                events=10,
                weights=np.full((7 if request.shared else 1, 4), mark, dtype=np.float32),
                score=Score(c_index=0.6, se=0.05),
                seconds=1.0,
            )
        if isinstance(request, TransferRequest):
            row = tuple(Score(c_index=0.6, se=0.02) for _ in request.sources)
            return TransferReply(
                task=task.id,
                cancer=cancer,
                scores=tuple(SourceScore(c_index=0.6, se=0.02) for _ in request.sources),
                training_scores=(row,) * 3,
                seconds=1.0,
            )
        if isinstance(request, RouterRequest):
            weights = np.full((4, 5), mark, dtype=np.float32) if request.shared else None
            return RouterReply(task=task.id, cancer=cancer, events=10, weights=weights, seconds=1.0)
        return ReleaseReply(
            task=task.id,
            cancer=cancer,
            patients=100,
            events=10,
            arms={"local": ArmScore()},
            routing={cancer: 1.0},
            zero_shot_choice={},
            seconds=1.0,
        )


@pytest.fixture
def all_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take in weights that are no model, in tests of what comes after admission."""
    monkeypatch.setattr(Quarantine, "takes", lambda *_: True)


def key_of(site: str) -> Ed25519PrivateKey:
    """Return the key of a site that a test made up."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(site.encode()).digest())


def signed(
    task: Task, reply: ExpertReply, request: ExpertRequest, *, key: Ed25519PrivateKey, **card: Any
) -> ExpertReply:
    """Return a site's reply with its card, signed as a hospital signs."""
    study = request.study
    values: dict[str, Any] = {
        "cancer": reply.cancer,
        "site": task.site,
        "round": request.round,
        "patients": reply.patients,
        "events": reply.events,
        "endpoint": study.endpoint,
        "encoder": study.encoder,
        "shape": study.shape,
        "models": models_of(reply.weights, cross_fitted(study.folds)[: len(reply.weights)]),
        "m0": m0_hash(study),
        "study": study.hash(),
        "training": training_hash(study),
        "parents": () if request.signed is None else (request.signed.hash,),
        "created": "2026-03-01",
        "signer": public_text(key),
    }
    text, signature = sign(Card(**{**values, **card}), key)
    return replace(reply, signed=Signed(card=text, signature=signature))


@pytest.fixture
def all_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sites that answer by hand sign their experts, with a key each."""
    record = Study.record

    def sign_and_record(self: Study, task: Task, reply: Message) -> None:
        if isinstance(reply, ExpertReply) and reply.signed is None:
            request = self.request(task)
            if isinstance(request, ExpertRequest):
                reply = signed(task, reply, request, key=key_of(task.site))
        record(self, task, reply)

    monkeypatch.setattr(Study, "record", sign_and_record)


@pytest.fixture
def signer() -> Callable[[str], Ed25519PrivateKey]:
    """Return what gives the key of a site that a test made up."""
    return key_of


@pytest.fixture
def sign_reply() -> Callable[..., ExpertReply]:
    """Return what signs a reply, with any key and card."""
    return signed


@pytest.fixture
def sites() -> Sites:
    """Four hospitals; a and d hold the same cancer."""
    uvm, skcm, kipan = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN
    return Sites({"a": [uvm], "b": [skcm], "c": [kipan], "d": [uvm]})
