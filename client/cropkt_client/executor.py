"""Runs the installed ClientApp for the tasks that the SuperNode hands out, and nothing else.

Flower's own executor unpacks the bundle that came over the wire first on `sys.path`, where it
could shadow any module. This one never unpacks a bundle: it acquires ClientApp tasks only,
compares the bundle's SHA-256 with the one bundle that this version of cropkt knows, and calls the
app that the hospital installed, in a child process.

All that the client side uses of Flower beyond `flwr.app` and `flwr.clientapp` is imported in this
file; it mirrors `flwr.supernode.runtime.run_clientapp` of 1.41.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import secrets
import threading
import time
from collections.abc import Callable

import httpx
from flwr.app import Context, Message

# The numbers of the errors that a reply can carry, and how a task may end: plain constants.
from flwr.common.constant import ErrorCode, SubStatus

# What the SuperNode's loopback API speaks.
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient

# `Message(...)` reads from this global which node and run the process works for.
from flwr.supercore.task_identity import TaskIdentity

# How a task's message comes as objects and a reply goes: 80 lines that are not ours to repeat.
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from cropkt.errors import CropktError, DiskFullError, MessageError
from cropkt.messages import REQUESTS, Code
from cropkt.wire import from_record
from cropkt_client.gate import FOREIGN, Gate
from cropkt_client.log import Status
from cropkt_client.worker import Worker, WorkerDiedError

APP = "cropkt_client.app:app"
TASK = "flwr-clientapp"  # the only kind of task this site ever takes
ATTEMPTS = 3  # a child that died may have been killed by hand: the next one resumes
POLL = 0.5  # seconds between looks at the SuperNode, which itself looks every 3
DISK_WAIT = 10.0  # seconds between attempts while a disk is full
REST = 600.0  # idle seconds after which the child gives its memory back

log = logging.getLogger("cropkt.client")


class Executor(threading.Thread):
    """Takes task after task from the SuperNode, in a thread.

    Args:
        address: says where the SuperNode's loopback API is now, or None while there is none.
        secret: what the SuperNode and its executor share.
        worker: calls `run_app` in a child process.
        bundle: SHA-256 of the only bundle to answer to.
        gate: of this site; its failures leave through it.
        status: where to report.
    """

    def __init__(
        self,
        *,
        address: Callable[[], str | None],
        secret: bytes,
        worker: Worker,
        bundle: str,
        gate: Gate,
        status: Status,
    ) -> None:
        super().__init__(name="executor", daemon=True)
        self._address, self._secret, self._worker = address, secret, worker
        self._bundle, self._gate, self._status = bundle, gate, status
        self._ending = threading.Event()
        self._busy = threading.Lock()  # held from asking for a task until it has ended
        self._acquirer: RuntimeHttpClient | None = None  # of the address below
        self._acquirer_address = ""

    def run(self) -> None:
        """Take tasks until `stop`."""
        idle_since = time.monotonic()
        while not self._ending.wait(POLL):
            with self._busy:
                if self._ending.is_set():
                    return
                try:
                    worked = self._take_one()
                except Exception as error:  # the loop must outlive whatever a task does
                    log.error("the executor stumbled (%s)", type(error).__name__)
                    worked = False
            if worked:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > REST:
                self._worker.rest()

    def stop_when_idle(self) -> bool:
        """Take no more tasks; return False while one is at work, so try again."""
        if not self._busy.acquire(blocking=False):
            return False
        self._ending.set()
        self._busy.release()
        return True

    def stop(self) -> None:
        """Stop now. A task at work is cut off; it comes again when this client does."""
        self._ending.set()
        self._worker.stop()
        if self.is_alive():
            self.join(15)
        if self._acquirer:
            self._acquirer.close()

    def _take_one(self) -> bool:
        """Do one task, if there is one."""
        address = self._address()
        if address is None:
            return False
        if self._acquirer is None or address != self._acquirer_address:
            if self._acquirer:
                self._acquirer.close()
            self._acquirer, self._acquirer_address = acquirer(address, self._secret), address
        try:
            answer = self._acquirer.AcquireTask(AcquireTaskRequest(supported_task_types=[TASK]))
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            log.debug("no SuperNode yet: %r", error)
            return False
        if not answer.HasField("task") or not answer.token:
            return False

        def moot() -> bool:
            return self._ending.is_set() or self._address() != address

        with task_client(address, answer.token, moot) as client:
            beats = Heartbeats(address, answer.token)
            beats.start()
            try:
                self._do(client)
            finally:
                beats.stop()
        return True

    def _do(self, client: RuntimeHttpClient) -> None:
        """Pull a task's message, answer it, push the answer."""
        message, context, _, fab = pull_task_input(client)
        kind, started = message.metadata.message_type, time.monotonic()
        self._status.working(kind)
        try:
            got = hashlib.sha256(fab.content).hexdigest()
            if got != self._bundle:
                text = f"refused a foreign bundle {got[:16]}; nothing of it was executed"
                log.error("%s: %s", kind, text)
                self._status.failed(text)
                refusal = self._gate.error(ErrorCode.INVALID_FAB, FOREIGN, to=message)
                self._deliver(client, refusal, context, SubStatus.FAILED)
                return
            log.info("%s: begins", kind)
            reply, context = self._answer(message, context)
            if self._ending.is_set():
                return
            if not self._gate.passed(reply):
                log.error("%s: the answer did not come through the gate, and stays here", kind)
                reply = self._failure(message, secrets.token_hex(4), died=False)
            self._deliver(client, reply, context, SubStatus.COMPLETED)
            log.info("%s: answered after %.1f s", kind, time.monotonic() - started)
        finally:
            self._status.idle()

    def _answer(self, message: Message, context: Context) -> tuple[Message, Context]:
        """Return what the app answers, or a failure in place of an answer."""
        identity = (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id)
        attempt = 1
        while True:
            try:
                answer: tuple[Message, Context] = self._worker.call(identity, message, context)
                return answer
            except DiskFullError as error:
                log.error("%s: %s The task goes on then", message.metadata.message_type, error)
                self._status.failed(str(error))
                self._ending.wait(DISK_WAIT)
                attempt -= 1  # nothing is wrong with the task
            except CropktError as error:
                died, reference = isinstance(error, WorkerDiedError), secrets.token_hex(4)
                last = not died or attempt == ATTEMPTS or self._ending.is_set()
                if not self._ending.is_set():
                    next_step = f"reference {reference}" if last else "trying again"
                    log.error("%s: %s (%s)", message.metadata.message_type, error, next_step)
                    self._status.failed(str(error))
                if last:
                    return self._failure(message, reference, died=died), context
            attempt += 1

    def _failure(self, message: Message, reference: str, *, died: bool) -> Message:
        """Return a reply that says only that the task failed here."""
        try:
            task = from_record(message.content, expected=REQUESTS).task
        except (MessageError, ValueError):  # Flower's, where a message has no content
            reason = f"reference {reference}"
            return self._gate.error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason, to=message)
        code: Code = "training_failed" if died else "internal"
        return self._gate.fail(task, code, to=message, reference=reference)

    def _deliver(
        self, client: RuntimeHttpClient, reply: Message, context: Context, outcome: str
    ) -> None:
        try:
            push_message(client, reply, context)
            push_task_output(client, context, outcome, "")
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            text = f"the answer could not be handed over ({type(error).__name__})"
            log.warning("%s; it is kept, and goes when the task comes again", text)
            self._status.failed(text)


class Heartbeats:
    """Tells the SuperNode that a task is alive, in a thread, until stopped."""

    def __init__(self, address: str, token: str) -> None:
        self._client = task_client(address, token)
        self._sender = HeartbeatSender(self._beat)
        self._lost = False

    def start(self) -> None:
        """Begin."""
        self._sender.start()

    def stop(self) -> None:
        """End; returns when the last heartbeat is through."""
        if self._sender.is_running:
            self._sender.stop()
        self._client.close()

    def _beat(self) -> bool:
        try:
            known = self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
        except (httpx.TransportError, httpx.HTTPStatusError):
            known = False
        if not known and not self._lost:
            # Flower's own heartbeat would send SIGINT to this process here.
            log.warning("the SuperNode no longer knows the task; it goes on, its answer is kept")
        self._lost = not known
        return True


def acquirer(address: str, secret: bytes) -> RuntimeHttpClient:
    """Return a client that may acquire tasks."""
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # loopback; the secret signs each request
        root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
            ),
        ],
    )


def task_client(
    address: str, token: str, moot: Callable[[], bool] | None = None
) -> RuntimeHttpClient:
    """Return a client for one acquired task, which repeats failed calls until that is moot."""
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(token),
        ],
        retry_invoker=_patience(moot) if moot else None,
    )


def _patience(moot: Callable[[], bool]) -> RetryInvoker:
    """Return an invoker that raises after a minute, or when going on is moot.

    Flower's own sends SIGINT to the whole process on HTTP 401, which is what a restarted
    SuperNode answers to a token it does not know.
    """
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(max_delay=5),
        recoverable_exceptions=(httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=60.0,
        should_giveup=lambda error: (
            moot()
            or (
                isinstance(error, httpx.HTTPStatusError)
                and error.response.status_code not in (502, 503, 504)
            )
        ),
    )


def run_app(
    identity: tuple[int, int, int], message: Message, context: Context
) -> tuple[Message, Context]:
    """Call the installed ClientApp; runs in the child process."""
    logging.getLogger("flwr").handlers.clear()  # its own console handler: each line once is enough
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = identity
    module, name = APP.split(":")
    app = getattr(importlib.import_module(module), name)
    return app(message=message, context=context), context
