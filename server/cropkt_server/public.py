"""The one door to the network: what may be asked through it, and by whom.

An ASGI application in front of Flower's. A request passes if its method and path are exactly in
the table below, as they came over the wire: nothing is decoded, joined or normalised first, so
no spelling of another path can slip through. Calls to Flower must carry the key of a site that
the roster knows and that is not revoked, and a signature that did not come before; whether it was
made with that key, Flower checks next.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool

from cropkt.errors import ConfigError
from cropkt.files import disk_full
from cropkt_server.asgi import App, Event, Receive, Scope, Send, Turn, Turns, in_pieces
from cropkt_server.enrolment import Allowance, Enrolment, Nodes
from cropkt_server.pki import Keys
from cropkt_server.replay import Seen
from cropkt_server.roster import EnrolmentRefusedError, Traffic

log = logging.getLogger("cropkt.server")

# Not register-node and unregister-node: nodes come and go with the roster only.
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
FLEET_BODY = 8 << 20  # bytes; Flower sends objects in pieces of at most 5 MiB
OBJECT_CALLS = (b"/v1/fleet/push-object", b"/v1/fleet/pull-object")
AT_WORK = 4  # such calls at work at once: each holds its object several times
ENROL_BODY = 16 << 10
KEY_HEADER = b"flwr-public-key"  # base64 of the node key's PEM
SIGNATURE_HEADER = b"flwr-signature"  # base64
ENROL_ATTEMPTS = (10, 60.0)  # in so many seconds, from one address
STOP_WITHIN = 5  # seconds that calls under way get to finish
SEEN_EVERY = 60.0  # seconds between notes in the roster that a site was heard of
SEEN_BYTES = 1 << 20  # to and fro, after which it is noted earlier

_STATUS = {"malformed": 400, "version": 409, "site": 403, "later": 429}  # else 403


class PublicDoor:
    """Answers cropkt's own routes, lets enrolled sites through to Flower, and nothing else."""

    def __init__(self, fleet: App, enrolment: Enrolment, nodes: Nodes) -> None:
        self._fleet, self._enrolment, self._nodes = fleet, enrolment, nodes
        self._roster = enrolment.roster
        self._ca = enrolment.keys.ca.read_bytes()
        self._attempts, self._knocks = Allowance(*ENROL_ATTEMPTS), Allowance(*ENROL_ATTEMPTS)
        self._log_lines = Allowance(1, 60.0)
        self._heard: dict[str, float] = {}
        self._traffic: dict[str, Traffic] = {}  # not in the roster yet
        self._turns, self._seen = Turns(AT_WORK), Seen()
        self._routes: dict[tuple[str, bytes], App] = {
            ("GET", b"/health"): self._health,
            ("GET", b"/v1/cropkt/ca"): self._certificate,
            ("GET", b"/v1/cropkt/hello"): self._hello,
            ("POST", b"/v1/cropkt/enrol"): self._enrol,
            ("POST", b"/v1/cropkt/knock"): self._knock,
        }
        for call in FLEET_CALLS:
            self._routes["POST", f"/v1/fleet/{call}".encode()] = self._to_flower

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            route = self._routes.get((scope["method"], scope.get("raw_path", b"")))
            if route is None:
                self._note(scope, f"no such route: {scope['method']} {scope['path'][:80]!r}")
                await _json(send, 404, {"code": "unknown", "message": "No such route."})
            else:
                await self._answered(route, scope, receive, send)

    async def _answered(self, route: App, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await route(scope, receive, send)
        except Exception as error:
            if not disk_full(error):
                raise
            self._note(scope, "no space is left on this machine's disk")
            await _json(send, 503, {"code": "later", "message": "The disk is full: try later."})

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _json(send, 200, {"status": "ok"})

    async def _certificate(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _answer(send, 200, self._ca, b"application/x-pem-file")

    async def _hello(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _json(send, 200, self._enrolment.hello())

    async def _enrol(self, scope: Scope, receive: Receive, send: Send) -> None:
        def accept(body: bytes) -> dict[str, Any]:
            return self._enrolment.accept(body, self._nodes)

        await self._judged("enrolment", accept, self._attempts, scope, receive, send)

    async def _knock(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._judged("knock", self._enrolment.known, self._knocks, scope, receive, send)

    async def _judged(
        self,
        what: str,
        judge: Callable[[bytes], dict[str, Any]],
        allowed: Allowance,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Send what `judge` makes of the body, or why it refuses."""
        try:
            if not allowed.take(_address(scope)):
                raise EnrolmentRefusedError("later", "Too many attempts: wait a minute.")
            body = await _body(receive, ENROL_BODY)
            if body is None:
                raise EnrolmentRefusedError("malformed", f"At most {ENROL_BODY} bytes are read.")
            # SQLite and Flower's database wait for the disk: not in the event loop.
            answer = await run_in_threadpool(judge, body)
        except EnrolmentRefusedError as refusal:
            self._note(scope, f"{what}: {refusal}")
            status = _STATUS.get(refusal.code, 403)
            await _json(send, status, {"code": refusal.code, "message": refusal.message})
        else:
            await _json(send, 200, answer)

    async def _to_flower(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _node_key(scope)
        found = None if key is None else self._roster.site_of_key(key)
        if found is None or found[1]:
            whose = "a key that nobody enrolled" if found is None else f"{found[0]} is revoked"
            self._note(scope, whose)
            # 401 makes a SuperNode end; 403 would mean to it that the run is over.
            await _json(send, 401, {"detail": "This node may not take part."})
            return
        if _declared(scope) > FLEET_BODY:
            self._note(scope, f"{found[0]}: a body of {_declared(scope)} bytes")
            await _json(send, 413, {"detail": f"At most {FLEET_BODY} bytes are read."})
            return
        site, signature = found[0], _decoded(scope, SIGNATURE_HEADER)
        if not self._seen.first(key or "", signature):
            self._note(scope, f"{site}: a signature that came before, or none")
            await _json(send, 401, {"detail": "Every request is signed anew."})
            return
        await self._heard_of(site)
        size, sent, turn = 0, 0, Turn(self._turns)

        async def limited() -> Event:
            """Pass the body on, but not beyond the limit, and not once the site is revoked."""
            nonlocal size
            event = await receive()
            size += len(event.get("body", b""))
            if size > FLEET_BODY or self._roster.site_of_key(key or "") != (site, False):
                self._note(scope, f"{site}: cut off after {size} bytes")
                return {"type": "http.disconnect"}
            whole = event["type"] == "http.request" and not event.get("more_body", False)
            if whole and scope["raw_path"] in OBJECT_CALLS:
                return await turn.begin(event, receive)
            return event

        async def answering(event: Event) -> None:
            nonlocal sent
            turn.end()
            if event.get("status") == 401:
                self._seen.forget(key or "", signature)
            sent += len(event.get("body", b""))
            await in_pieces(send, event)

        try:
            await self._fleet(scope, limited, answering)
        finally:
            turn.end()
            before = self._traffic.get(site, Traffic())
            self._traffic[site] = Traffic(before.received + size, before.sent + sent)

    async def _heard_of(self, site: str) -> None:
        now, traffic = time.monotonic(), self._traffic.get(site, Traffic())
        much = traffic.received + traffic.sent >= SEEN_BYTES
        if much or now - self._heard.get(site, -SEEN_EVERY) >= SEEN_EVERY:
            self._heard[site] = now
            self._traffic.pop(site, None)
            await run_in_threadpool(self._roster.seen, site, traffic)

    def _note(self, scope: Scope, what: str) -> None:
        """Log a refusal with its cause, the same one at most once a minute."""
        line = f"refused {_address(scope)}: {what}"
        if self._log_lines.take(line):
            log.warning("%s", line)


class Listener:
    """An application on one TLS port, served by a thread of its own until `stop`.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """

    def __init__(self, app: App, keys: Keys, *, host: str, port: int) -> None:
        self._socket = listening(host, port)
        self.port = int(self._socket.getsockname()[1])
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            loop="asyncio",  # the same parts on every machine, whatever else is installed
            http="h11",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,  # an address is what the connection says
            ssl_certfile=str(keys.server),
            ssl_keyfile=str(keys.server_key),
            timeout_graceful_shutdown=STOP_WITHIN,
        )
        self._server = _Server(config)
        # Outside the main thread uvicorn leaves the process's signal handlers alone.
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="cropkt-public", daemon=True
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                self._socket.close()
                raise ConfigError(f"{host}:{port}", "the listener did not start", "See the log")
            time.sleep(0.01)

    def stop(self) -> None:
        """Let calls under way finish, then end the thread."""
        self._server.should_exit = True
        self._thread.join(3 * STOP_WITHIN)
        self._socket.close()


class _Server(uvicorn.Server):
    """Ends without waiting for a farewell that an idle client never sends."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let calls under way finish; cut idle connections now and the rest when time is up."""
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                _abort(connection)
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            _abort(connection)
        await asyncio.sleep(0.05)  # the event loop closes them


def _abort(connection: object) -> None:
    """Close a connection without TLS's farewell."""
    transport = getattr(connection, "transport", None)
    if transport is not None:
        transport.abort()


def listening(host: str, port: int) -> socket.socket:
    """Return a listening socket, or say in one line why there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        why = error.strerror or type(error).__name__
        fix = "Choose another port, or stop what uses it"
        raise ConfigError(f"{host}:{port}", f"cannot listen there ({why})", fix) from None
    return listener


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown address"


def _declared(scope: Scope) -> int:
    """Return the length that the request declares; 0 if none."""
    values = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(values[0]) if values and values[0].isdigit() else 0


def _node_key(scope: Scope) -> str | None:
    """Return the PEM in the request's key header, if there is exactly one."""
    with suppress(UnicodeDecodeError):
        return _decoded(scope, KEY_HEADER).decode("ascii") or None
    return None


def _decoded(scope: Scope, header: bytes) -> bytes:
    """Return the bytes in a request's header, or none if it is not there exactly once."""
    values = [value for name, value in scope["headers"] if name == header]
    with suppress(binascii.Error):
        return base64.b64decode(values[0], validate=True) if len(values) == 1 else b""
    return b""


async def _body(receive: Receive, limit: int) -> bytes | None:
    """Return the request's body, or None if it is longer than `limit` or breaks off."""
    content, more = b"", True
    while more:
        event = await receive()
        if event["type"] != "http.request":
            return None
        content += event.get("body", b"")
        if len(content) > limit:
            return None
        more = event.get("more_body", False)
    return content


async def _json(send: Send, status: int, values: dict[str, Any]) -> None:
    await _answer(send, status, json.dumps(values).encode(), b"application/json")


async def _answer(send: Send, status: int, body: bytes, kind: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    if status >= 400:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
