"""The hospital's Flower app: receives a message, answers it, never says more than the contract.

The same app runs in a hospital and in the simulation; where the site's configuration lies comes
from the node (`config`) or, in a simulation, from the run (`sites` and the node's number).
"""

from __future__ import annotations

import hashlib
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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
        site = Site.load(_config_path(context))
        reply = site.answered(request, REPLIES)
        if reply is None:
            reply = task(request, site)
            site.keep_answer(request, reply)
    except Exception as error:  # whatever went wrong, its text stays here
        reply = _failure(name, site, error)
    return FlowerMessage(to_record(reply), reply_to=message)


def _failure(task: str, site: Site | None, error: Exception) -> Failure:
    """Log the error on this site and return what may be said of it elsewhere."""
    reference = hashlib.sha256(traceback.format_exc().encode()).hexdigest()[:8]
    if isinstance(error, CropktError):
        log.error("%s failed (reference %s): %s", task, reference, error)
    else:
        log.exception("%s failed (reference %s)", task, reference)
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
    return next((code for kind, code in codes if isinstance(error, kind)), "internal")


def _config_path(context: Context) -> Path:
    config: Any = context.node_config.get("config")
    if config is not None:
        return Path(str(config))
    return (
        Path(str(context.run_config["sites"]))
        / str(context.node_config["partition-id"])
        / "site.yaml"
    )
