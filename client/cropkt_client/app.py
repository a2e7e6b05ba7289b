"""The hospital's Flower app: receives a message, answers it through the gate and in no other way.

The same app runs in a hospital and in the simulation; where the site's configuration lies comes
from the node (`config`, and the `cancers` served) or, in a simulation, from the run (`sites` and
the node's number).
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from cropkt.errors import (
    ArtifactError,
    BudgetError,
    CropktError,
    DataError,
    MessageError,
    NotEstimableError,
    RefusedError,
    TrainingFailedError,
)
from cropkt.experts.device import resolve_device
from cropkt.files import disk_full
from cropkt.messages import (
    REPLIES,
    Code,
    DescribeRequest,
    ExpertRequest,
    FedAvgRequest,
    HeldRequest,
    Message,
    ReleaseRequest,
    RouterRequest,
    TransferRequest,
)
from cropkt.wire import from_record
from cropkt_client import tasks
from cropkt_client.budget import spent_on
from cropkt_client.gate import Gate
from cropkt_client.site import Site
from cropkt_client.worker import log_frames

log = logging.getLogger("cropkt.client")
app = ClientApp()
Request = TypeVar("Request", bound=Message)


@app.query("describe")
def describe(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer `query.describe`."""
    return _answer(message, context, DescribeRequest, tasks.describe)


@app.train("expert")
def expert(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer `train.expert`."""
    return _answer(message, context, ExpertRequest, tasks.fit_expert)


@app.evaluate("transfer")
def transfer(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer `evaluate.transfer`."""
    return _answer(message, context, TransferRequest, tasks.score_sources)


@app.train("router")
def router(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer `train.router`."""
    return _answer(message, context, RouterRequest, tasks.fit_router)


@app.train("fedavg")
def fedavg(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer `train.fedavg`."""
    return _answer(message, context, FedAvgRequest, tasks.fit_fedavg)


@app.evaluate("release")
def release(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer `evaluate.release`."""
    return _answer(message, context, ReleaseRequest, tasks.release)


@app.query("held")
def held(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer `query.held`."""
    gate = _gate(context)
    try:
        request = _request(message, HeldRequest)
    except Exception as error:
        return _failure("unknown", gate, error, message)
    return gate.again(request, to=message)


def _answer(
    message: FlowerMessage,
    context: Context,
    kind: type[Request],
    task: Callable[[Request, Site], Message],
) -> FlowerMessage:
    """Return what the gate makes of the stored or new answer, or of an error's code."""
    gate, name = _gate(context), "unknown"
    try:
        request = _request(message, kind)
        name = request.task
        gate.admit(request)
        site = _site(context)
        answer = site.answered(request, REPLIES)
        if answer is None:
            answer = task(request, site)
            site.keep_answer(request, answer)
    except Exception as error:  # whatever went wrong, its text stays here
        if disk_full(error):
            raise  # nothing is wrong with the task: it comes again when there is space
        return _failure(name, gate, error, message)
    return gate.release(answer, request, to=message)


def _request(message: FlowerMessage, kind: type[Request]) -> Request:
    request = from_record(message.content, expected=(kind,))
    if not isinstance(request, kind):
        raise MessageError("message", f"expected {kind.__name__}")
    return request


def _failure(task: str, gate: Gate, error: Exception, message: FlowerMessage) -> FlowerMessage:
    """Log the error on this site, and let out what may be said of it elsewhere."""
    reference = secrets.token_hex(4)
    if isinstance(error, CropktError):  # our own texts hold no patient
        log.error("%s failed (reference %s): %s", task, reference, error)
    else:
        log.error("%s failed (reference %s)", task, reference)
        log_frames(error)
    return gate.fail(task, _code(error), to=message, reference=reference)


def _code(error: Exception) -> Code:
    codes: tuple[tuple[type[Exception], Code], ...] = (
        (NotEstimableError, "not_estimable"),
        (ArtifactError, "refused"),
        (DataError, "data"),
        (TrainingFailedError, "training_failed"),
        (MessageError, "bad_message"),
        (BudgetError, "budget"),
        (RefusedError, "policy"),
    )
    if _out_of_memory(error):
        return "training_failed"
    return next((code for kind, code in codes if isinstance(error, kind)), "internal")


def _out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out; torch says so on the CPU and on Apple by its text alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text
    )


def _site(context: Context) -> Site:
    """Return the site that this process works for, with the cancers that it serves now.

    A client names a device. The simulation, whose processes share one machine, stays on the CPU.
    """
    device = resolve_device(os.environ.get("CROPKT_DEVICE", "cpu"))
    served = str(context.node_config.get("cancers", "")).split()
    return Site.load(_config(context), cancers=served, device=device)


def _gate(context: Context) -> Gate:
    """Return the only way out of this site."""
    config = _config(context)
    return Gate.of(config, spent=spent_on(config))


def _config(context: Context) -> Path:
    """Return where the `site.yaml` of this node lies."""
    node = context.node_config
    if "config" in node:
        return Path(str(node["config"]))
    return Path(str(context.run_config["sites"])) / str(node["partition-id"]) / "site.yaml"
