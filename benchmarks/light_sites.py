"""Sites that speak like hospitals and think nothing: for measuring a coordinator.

A light site holds the keys of an enrolled one and asks, fetches, confirms and answers over TLS
with the connection and the pauses of Flower's own SuperNode. Its answers are canned: of the
right shapes, random within bounds, the same for the same task. Many fit in one process.
"""

from __future__ import annotations

import hashlib
import random
import resource
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message as FlowerMessage
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supernode.fleet_http_connection import http_request_response

import cropkt
from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.errors import CropktError, UnavailableError
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.artifact import m0_hash
from cropkt.experts.card import Card, models_of, public_text, sign, training_hash
from cropkt.experts.training import cross_fitted
from cropkt.messages import (
    REQUESTS,
    ArmScore,
    CohortCount,
    DescribeReply,
    DescribeRequest,
    ExpertReply,
    ExpertRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    RouterReply,
    RouterRequest,
    Score,
    Signed,
    SourceScore,
    TransferReply,
    TransferRequest,
    Weights,
    pack,
)
from cropkt.wire import from_record, to_record
from cropkt_client.enrol import Keys
from cropkt_client.link import Coordinator

PAUSE = 3.0  # seconds between looks for a message, as in Flower's SuperNode
SESSIONS = 20  # of one site, before it gives up
PATIENTS, EVENTS = 100, 40
_COUNTING = threading.Lock()


@dataclass(frozen=True)
class LightSite:
    """One enrolled site."""

    name: str
    cancers: tuple[Cancer, ...]
    state: Path

    @cached_property
    def keys(self) -> Keys:
        """Its two keys."""
        return Keys.of(self.state)


@dataclass(slots=True)
class Traffic:
    """What the sites of this process received and sent, and what went wrong."""

    down: int = 0  # bytes of weights
    up: int = 0
    broken: list[str] = field(default_factory=list)  # sessions, each begun anew, and why
    cpu: float = 0.0  # seconds of this process

    def count(self, request: Message, reply: Message) -> None:
        """Add the weights of a question and its answer."""
        down, up = (sum(a.nbytes for a in pack(m)[1].values()) for m in (request, reply))
        with _COUNTING:
            self.down, self.up = self.down + down, self.up + up


def serve(sites: Iterable[LightSite], address: str, ca: bytes) -> Traffic:
    """Serve with all `sites` until the coordinator says that the study is over."""
    traffic, over, coordinator = Traffic(), threading.Event(), Coordinator(address, ca)
    _wait_for(coordinator)
    threads = [
        threading.Thread(target=_serve, args=(site, address, ca, traffic, over)) for site in sites
    ]
    for thread in threads:
        thread.start()
    while not over.wait(PAUSE) and any(thread.is_alive() for thread in threads):
        with suppress(CropktError):
            if coordinator.hello().closed:
                over.set()
    for thread in threads:
        thread.join()
    used = resource.getrusage(resource.RUSAGE_SELF)
    traffic.cpu = used.ru_utime + used.ru_stime
    return traffic


def _wait_for(coordinator: Coordinator) -> None:
    """Return when the coordinator answers."""
    while True:
        try:
            coordinator.hello()
            return
        except UnavailableError:
            time.sleep(0.5)


def _serve(
    site: LightSite, address: str, ca: bytes, traffic: Traffic, over: threading.Event
) -> None:
    over.wait(random.uniform(0, PAUSE))  # sites do not look in step
    for _ in range(SESSIONS):  # a hospital's client starts its SuperNode again, too
        try:
            _serve_once(site, address, ca, traffic, over)
        except (Exception, SystemExit) as error:  # Flower exits where it cannot connect
            traffic.broken.append(f"{site.name}: {type(error).__name__}: {error}"[:300])
            over.wait(PAUSE)
        else:
            return


def _serve_once(
    site: LightSite, address: str, ca: bytes, traffic: Traffic, over: threading.Event
) -> None:
    key = site.keys.node
    with http_request_response(
        address,
        insecure=False,
        root_certificates=ca,
        authentication_keys=(key, key.public_key()),
    ) as connection:
        while not over.is_set():
            if not _do_one(site, connection, traffic):
                over.wait(PAUSE)


def _do_one(site: LightSite, connection: Any, traffic: Traffic) -> bool:
    """Answer one message, if there is one, in the steps of a SuperNode and its executor."""
    _, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection
    received = receive()
    if received is None:
        return False
    head, tree = received
    run_id, message_id = head.metadata.run_id, head.metadata.message_id
    get_fab(get_run(run_id).fab_hash, run_id)
    contents = pull_objects(
        [node.object_id for node in iterate_object_tree(tree)], partial(pull_object, run_id)
    )
    confirm(run_id, message_id)
    asked: Any = inflate_object_from_contents(message_id, contents)
    asked.metadata.__dict__["_message_id"] = message_id
    request = from_record(asked.content, expected=REQUESTS)
    reply = answer(site, request)
    traffic.count(request, reply)
    message = FlowerMessage(to_record(reply), reply_to=asked)
    del asked, request, reply
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        wanted, session = send(message, get_object_tree(message), 0.0)
        push_objects(
            get_all_nested_objects(message),
            partial(push_object, run_id, session),
            object_ids_to_push=wanted,
        )
    return True


def answer(site: LightSite, request: Message) -> Message:
    """Return the canned answer to a task."""
    return _ANSWERS[type(request)](site, request)


def _describe(site: LightSite, request: DescribeRequest) -> DescribeReply:
    return DescribeReply(
        task=request.task,
        site=site.name,
        cohorts=tuple(
            CohortCount(
                cancer=cancer, patients=PATIENTS, events=EVENTS, dim=request.study.shape.dim
            )
            for cancer in site.cancers
        ),
        versions={"cropkt": cropkt.__version__},
    )


def _expert(site: LightSite, request: ExpertRequest) -> ExpertReply:
    study = request.study
    excluded = cross_fitted(study.folds)[: None if request.shared else 1]
    m0 = initial(study)
    weights = m0 + _small(request.task, len(excluded), len(m0))
    card = Card(
        cancer=request.cancer,
        site=site.name,
        round=request.round,
        patients=PATIENTS,
        events=EVENTS,
        endpoint=study.endpoint,
        encoder=study.encoder,
        shape=study.shape,
        models=models_of(weights, excluded),
        m0=m0_hash(study),
        study=study.hash(),
        training=training_hash(study),
        parents=() if request.signed is None else (request.signed.hash,),
        created="2026-01-01",
        signer=public_text(site.keys.signing),
    )
    text, signature = sign(card, site.keys.signing)
    return ExpertReply(
        task=request.task,
        cancer=request.cancer,
        patients=PATIENTS,
        events=EVENTS,
        weights=weights,
        score=Score(c_index=0.6, se=0.05),
        seconds=0.0,
        signed=Signed(card=text, signature=signature),
    )


def _transfer(site: LightSite, request: TransferRequest) -> TransferReply:
    if len(request.weights) != len(request.sources):
        raise ValueError("as many experts as sources are needed")
    scores = tuple(Score(c_index=0.55, se=0.05) for _ in request.sources)
    return TransferReply(
        task=request.task,
        cancer=request.cancer,
        scores=tuple(SourceScore(c_index=0.55, se=0.05) for _ in request.sources),
        training_scores=(scores,) * request.study.folds,
        seconds=0.0,
    )


def _router(site: LightSite, request: RouterRequest) -> RouterReply:
    weights = None
    if request.shared:
        shape, heads = request.study.shape, request.study.router.warm_start
        width = shape.router_parameters(experts=1 + len(request.sources), own_heads=heads)
        weights = _small(request.task, 1 + request.study.folds, width)
    return RouterReply(
        task=request.task,
        cancer=request.cancer,
        events=EVENTS,
        weights=weights,
        seconds=0.0,
    )


def _release(site: LightSite, request: ReleaseRequest) -> ReleaseReply:
    score = ArmScore(c_index=0.6, se=0.05, low=0.5, high=0.7, pairs=1000, gain=0.0, gain_se=0.01)
    return ReleaseReply(
        task=request.task,
        cancer=request.cancer,
        patients=PATIENTS,
        events=EVENTS,
        arms={"local": score, "zero_shot": score, "roupkt+": score},
        routing={request.cancer: 1.0},
        zero_shot_choice={"vote": request.study.folds},
        seconds=0.0,
    )


_ANSWERS: dict[type[Message], Callable[[LightSite, Any], Message]] = {
    DescribeRequest: _describe,
    ExpertRequest: _expert,
    TransferRequest: _transfer,
    RouterRequest: _router,
    ReleaseRequest: _release,
}


def _small(task: str, rows: int, columns: int) -> Weights:
    """Return (rows, columns) random values that a training may add, the same for the same task."""
    seed = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    return 0.003 * rng.standard_normal((rows, columns), dtype=np.float32)


@lru_cache
def initial(study: StudyConfig) -> Weights:
    """Return M0, (parameters,)."""
    m0 = Abmil.initial(study.shape, seed=study.seed, hazard=study.initial_hazard)
    weights: Weights = flatten(m0)[0].numpy()
    return weights
