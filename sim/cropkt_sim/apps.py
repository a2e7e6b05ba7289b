"""Find an app by its name, and let one site's app answer one message.

Both engines go through `answer`, so that a site behaves the same on either: the state of a site
changes only where its app succeeded, and of an exception only the name leaves the site.
"""

from __future__ import annotations

import copy
import importlib
import logging
import sys
from functools import cache
from importlib.util import find_spec
from typing import TypeVar

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from cropkt.errors import UsageError
from cropkt_sim.flower_internals import ErrorCode, identify_process

App = TypeVar("App")

_log = logging.getLogger(__name__)


def check_reference(reference: str) -> None:
    """Check that "module:attribute" names a module that can be found, without importing it.

    Raises:
        UsageError: it has another form, or there is no such module.
    """
    module, colon, attribute = reference.partition(":")
    if not (module and colon and attribute):
        raise UsageError(reference, "not an app", "Write it as package.module:attribute")
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    if not found:
        raise UsageError(reference, f"there is no module {module}", "Install it or set PYTHONPATH")


@cache
def load_app(reference: str, kind: type[App]) -> App:
    """Import the app that "module:attribute" names, once per process.

    Raises:
        UsageError: the module holds no such app. Errors of the import itself pass through.
    """
    name, _, attribute = reference.partition(":")
    app = getattr(importlib.import_module(name), attribute, None)
    if not isinstance(app, kind):
        raise UsageError(reference, f"not a {kind.__name__}", "Name the app object itself")
    return app


def answer(client_app: str, message: Message, context: Context) -> RecordDict | Error:
    """Let a site's app answer a message.

    Args:
        client_app: reference of the app, imported on first use.
        message: to the site.
        context: of the site. Its state is replaced where the app succeeds; the app gets copies
            of the rest.

    Returns:
        The content of the reply, or the error that it carries: the name of the exception's type,
        and never its text, which may hold a path or a patient. That goes to the site's log.
    """
    site = context.node_config.get("partition-id")
    try:
        app: ClientApp = load_app(client_app, ClientApp)
    except Exception as error:
        _log.exception("site %s cannot load %s", site, client_app)
        return Error(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, type(error).__name__)
    limit_threads()
    identify_process(run_id=context.run_id, node_id=context.node_id)
    own = Context(
        run_id=context.run_id,
        node_id=context.node_id,
        node_config=dict(context.node_config),
        state=copy.deepcopy(context.state),
        run_config=dict(context.run_config),
    )
    try:
        reply = app(message, own)
        outcome: RecordDict | Error = reply.error if reply.has_error() else reply.content
    except Exception as error:
        _log.exception("site %s failed at %s", site, message.metadata.message_type)
        return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__)
    context.state = own.state
    return outcome


def limit_threads() -> None:
    """Hold torch to one thread, where the app has imported it.

    Sums depend on how they are split among threads: with one, results do not depend on the
    machine. The variables that `simulate` sets do the same for a later import.
    """
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
