"""How the stock SuperNode speaks to the coordinator over bad networks and with a wrong clock.

Four names of Flower are replaced, in the SuperNode's own process and before it starts. What they
are, and what happens without it:

- who decides which failures are final. Flower takes any failure with `tls` or `ssl` in its text
  for a certificate that is not trusted, and gives up: a connection that is cut in the middle of
  its handshake, as firewalls and bad links do, would end a SuperNode.
- how long an answer is waited for. Flower gives every call half a minute; on a slow link most of a
  piece of weights still lies in the buffers then, and it would be sent again, for ever.
- the time in the signature of a request. The coordinator takes it if it is at most five seconds
  ahead of its own clock and five minutes behind; beyond that it answers with HTTP 401.
- what ends the taking of a message. If the run ends meanwhile, because the coordinator was
  restarted, Flower forgets to clear away what it has of the message: the executor would wait for
  the rest, for two hours, before it turned to the next one.

Written against flwr 1.41; tests/federation/test_network.py and test_disk_and_clock.py hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar

import httpx
from flwr.supercore.retry import RetryInvoker
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import (
    fleet_http_connection,
    node_auth_http_interceptor,
    start_client_internal,
)
from flwr.supernode.fleet_http_client import FleetHttpClient

WAIT = 30.0  # seconds for an answer, Flower's own, and
SLOWEST = 30_000.0  # bytes of the request a second on top; Flower drops what takes 180 s a piece

Reply = TypeVar("Reply")


def settle(ahead: float) -> None:
    """Replace the names, for a clock that is `ahead` seconds ahead of the coordinator's."""
    replaced: dict[tuple[Any, str], Callable[[Any], Any]] = {
        (fleet_http_connection, "make_simple_http_retry_invoker"): _patient,
        (fleet_http_connection, "FleetHttpClient"): lambda _: _Unhurried,
        (start_client_internal, "pull_objects"): _ended,
        (node_auth_http_interceptor, "now"): lambda now: _agreed(now, timedelta(seconds=ahead)),
    }
    for (module, name), replace in replaced.items():
        setattr(module, name, replace(getattr(module, name)))


def _patient(make: Callable[[], RetryInvoker]) -> Callable[[], RetryInvoker]:
    """Return `make`, but its invokers repeat whatever failed but for an untrusted certificate."""

    def made() -> RetryInvoker:
        invoker = make()
        judge = invoker.should_giveup

        def final(error: Exception) -> bool:
            if isinstance(error, httpx.TransportError):
                return "CERTIFICATE_VERIFY_FAILED" in str(error)
            return judge is not None and judge(error)

        invoker.should_giveup = final
        return invoker

    return made


def _ended(pull: Callable[..., dict[str, bytes]]) -> Callable[..., dict[str, bytes]]:
    """Return `pull`, but the end of the run is an error like others, after which all is cleared."""

    def pulled(*arguments: Any, **options: Any) -> dict[str, bytes]:
        try:
            return pull(*arguments, **options)
        except RunNotRunningException:
            raise ConnectionAbortedError("the run is over") from None

    return pulled


class _Unhurried(FleetHttpClient):
    """Waits longer for the answer to a larger request."""

    def _unary_unary(
        self,
        *,
        path: str,
        rpc_method: str,
        request: Any,  # a protobuf message
        response_type: type[Reply],
        timeout: float | None = None,
    ) -> Reply:
        if timeout is None:
            timeout = WAIT + request.ByteSize() / SLOWEST
        return super()._unary_unary(
            path=path,
            rpc_method=rpc_method,
            request=request,
            response_type=response_type,
            timeout=timeout,
        )


def _agreed(now: Callable[[], datetime], ahead: timedelta) -> Callable[[], datetime]:
    """Return a clock that shows what the coordinator's shows."""
    return lambda: now() - ahead
