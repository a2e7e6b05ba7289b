"""The hospital's Flower app: receives a message, answers it, never says more than the contract.

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
    CropktError,
    DataError,
    MessageError,
    NotEstimableError,
    TrainingFailedError,
)
from cropkt.experts.device import resolve_device
from cropkt.messages import (
    REPLIES,
    Code,
    DescribeRequest,
    ExpertRequest,
    Failure,
    Message,
    ReleaseRequest,
    RouterRequest,
    TransferRequest,
)
from cropkt.wire import from_record, to_record
from cropkt_client import tasks
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


@app.evaluate("release")
def release(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer `evaluate.release`."""
    return _answer(message, context, ReleaseRequest, tasks.release)


def _answer(
    message: FlowerMessage,
    context: Context,
    kind: type[Request],
    task: Callable[[Request, Site], Message],
) -> FlowerMessage:
    """Return the stored or new answer, or a failure that carries a code and no text."""
    name, site = "unknown", None
    try:
        request = from_record(message.content, expected=(kind,))
        if not isinstance(request, kind):
            raise MessageError("message", f"expected {kind.__name__}")
        name = request.task
        site = _site(context)
        reply = site.answered(request, REPLIES)
        if reply is None:
            reply = task(request, site)
            site.keep_answer(request, reply)
    except Exception as error:  # whatever went wrong, its text stays here
        reply = _failure(name, site, error)
    return FlowerMessage(to_record(reply), reply_to=message)


def _failure(task: str, site: Site | None, error: Exception) -> Failure:
    """Log the error on this site and return what may be said of it elsewhere."""
    reference = secrets.token_hex(4)
    if isinstance(error, CropktError):  # our own texts hold no patient
        log.error("%s failed (reference %s): %s", task, reference, error)
    else:
        log.error("%s failed (reference %s)", task, reference)
        log_frames(error)
    return Failure(
        task=task,
        code=_code(error),
        site=site.config.site if site else None,
        reference=reference,
    )


def _code(error: Exception) -> Code:
    codes: tuple[tuple[type[Exception], Code], ...] = (
        (NotEstimableError, "not_estimable"),
        (DataError, "data"),
        (TrainingFailedError, "training_failed"),
        (MessageError, "bad_message"),
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
    node = context.node_config
    device = resolve_device(os.environ.get("CROPKT_DEVICE", "cpu"))
    if "config" in node:
        served = str(node.get("cancers", "")).split()
        return Site.load(Path(str(node["config"])), cancers=served, device=device)
    folder = Path(str(context.run_config["sites"])) / str(node["partition-id"])
    return Site.load(folder / "site.yaml", device=device)
