"""Flower's SuperLink inside our process, with a door of our own.

A stock SuperLink serves three interfaces on one port: Fleet to the sites, Control and Runtime to
whoever comes. Here only Fleet is served, and only through `PublicDoor`. Control and Runtime have
no address at all: starting a run, registering a node and carrying the coordinator's messages are
calls of functions in this process, so there is no port to attack and no secret to keep.

Every private name of Flower that the coordinator uses is imported in this file, with the reason.
Written against flwr 1.41; tests/server/test_superlink*.py say what must hold in any other.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

from fastapi import Depends, FastAPI, HTTPException, Request
from flwr.app import Context, Message, RecordDict

# Who owns nodes and runs where there are no accounts; how long a silent session is believed to
# live, in heartbeats; the states of a run.
from flwr.common.constant import (
    HEARTBEAT_PATIENCE,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    Status,
    SubStatus,
)

# The requests in which a site begins a session, asks for its next message, and answers: checked
# for whose it claims to be, and noted.
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest

# The form in which answers are taken in.
from flwr.proto.runtime_pb2 import PullAppMessagesResponse

# A task as the Runtime handlers take it.
from flwr.proto.task_pb2 import Task

# Nodes, runs, messages and objects.
from flwr.server.superlink.linkstate import LinkState
from flwr.serverapp import Grid

# The one federation of the open-source build, and the kind of task that a ServerApp is.
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType

# Turns Flower's errors into HTTP answers, as its own SuperLink does.
from flwr.supercore.error import http_error_translator

# The bundle as Flower keeps it.
from flwr.supercore.fab import Fab

# The pieces of a message.
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

# Parses and serialises the bodies of Fleet calls.
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware

# Where pieces lie until they are fetched, and whether they have come.
from flwr.supercore.state.schema.objectstore_models import StoredObject

# Message() asks it in whose name it is made; global to the process.
from flwr.supercore.task_identity import TaskIdentity

# Open a LinkState in one SQLite file.
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories

# Splits messages into objects and puts them together again; we give it another transport.
from flwr.superlink.grid import HttpGrid

# Checks that the caller owns the node key that it shows.
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware

# The Fleet interface.
from flwr.superlink.routers.fleet.router import router as fleet_router

# The Runtime interface as plain functions.
from flwr.superlink.servicer.runtime import runtime_handlers
from sqlalchemy import Engine, event, func, select
from sqlalchemy.exc import DatabaseError
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from cropkt.bundle import VERSION, bundle, bundle_hash
from cropkt.config import StudyConfig
from cropkt.errors import ConfigError
from cropkt.files import disk_full, make_private
from cropkt_server import lock
from cropkt_server.asgi import App
from cropkt_server.bank import Bank
from cropkt_server.enrolment import Enrolment
from cropkt_server.pki import Keys, check_certificate
from cropkt_server.public import Listener, PublicDoor
from cropkt_server.roster import Roster
from cropkt_server.under_way import UnderWay

log = logging.getLogger("cropkt.server")

HEARTBEAT = 5.0  # seconds; Flower gives a run up after 60 without
CACHE = 4096  # KiB of Flower's database that a connection keeps in memory
BUSY = 25_000  # milliseconds that it waits to write; a SuperNode waits 30 s for an answer
SWEEP = 1.0  # seconds between looks for runs that Flower must give up
RESTARTS = 100  # of a run that Flower gave up, before we do
LATEST_BEAT = 25.0  # seconds; a SuperNode says every 17.5 to 22.5 that it lives

Main = Callable[[Grid, Context], None]


class SuperLink:
    """Nodes, runs and messages of one study folder, and the listener for its sites."""

    def __init__(self, folder: Path, roster: Roster) -> None:
        self._folder, self._roster = folder, roster
        path = folder / "flower.sqlite"
        # Made here first: SQLite would make it readable for others.
        make_private(path)
        _, self._factory = get_objectstore_linkstate_factories(str(path), get_federation_manager())
        try:
            self._state = self._factory.state()
        except DatabaseError as error:
            if disk_full(error):
                raise
            fix = "Move it away: it is made anew from the roster"
            raise ConfigError(path, f"cannot be used ({type(error).__name__})", fix) from None
        for database in self._databases():
            event.listen(database, "connect", _moderate)
            database.dispose()  # what is open was opened otherwise
        # Flower looks before every answer, by two writes that wait for all others.
        state = cast(Any, self._state)
        state._cleanup_expired_task_tokens = _every(SWEEP, state._cleanup_expired_task_tokens)
        self._listener: Listener | None = None
        self._closed = threading.Event()
        self._under_way = UnderWay()
        self._end_runs()
        self.reconcile()

    def register(self, node_key: str, name: str) -> int:
        """Make a node known by its PEM public key; return its id, the old one if it has one.

        Raises:
            ValueError: the key was cut off before.
        """
        key = node_key.encode()
        known = self._state.get_node_id_by_public_key(key)
        if known is not None:
            return known
        node_id = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=name)
        if node_id == 0:
            raise RuntimeError("Flower did not register the node")
        return node_id

    def deregister(self, node_id: int) -> None:
        """Cut a node off: what it sends is refused, what waits for it comes back as lost."""
        try:
            self._state.delete_node(NOOP_FLWR_AID, node_id)
        except ValueError:
            return  # it was not registered
        log.warning("node %d is cut off", node_id)

    def reconcile(self) -> None:
        """Make Flower know the nodes of all sites in the roster, and of no revoked one.

        A node that the roster does not name at all, left by a crash in the middle of an
        enrolment, stays: the door knows no such key, and its site may try again with it.
        """
        for site in self._roster.sites():
            if site.revoked_at is None:
                node_id = self.register(site.node_key, site.name)
                if node_id != site.node_id:
                    self._roster.moved(site.name, node_id)
            elif self._state.get_node_id_by_public_key(site.node_key.encode()) is not None:
                self.deregister(site.node_id)

    def serve(self, enrolment: Enrolment, *, host: str, port: int) -> int:
        """Listen for sites; return the port, which was chosen now if `port` is 0.

        Raises:
            ConfigError: the port is taken, or the address is not this machine's.
        """
        self._closed = enrolment.closed
        door = PublicDoor(self._fleet(), enrolment, self)
        self._listener = Listener(door, enrolment.keys, host=host, port=port)
        return self._listener.port

    @property
    def port(self) -> int | None:
        """The port on which sites are answered, while they are."""
        return None if self._listener is None else self._listener.port

    def say_closed(self) -> None:
        """Tell every site that asks from now on that the study is over."""
        self._closed.set()

    @property
    def says_closed(self) -> bool:
        """Whether sites are told that the study is over."""
        return self._closed.is_set()

    def stop(self) -> None:
        """Stop listening, and leave no thread and no file open."""
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
        for database in self._databases():
            database.dispose()  # Flower never closes its own

    def _databases(self) -> list[Engine]:
        """Return the two pools of connections to Flower's database: of its state, of objects."""
        return [cast(Any, part)._engine for part in (self._state, self._state.object_store)]

    def run_server_app(self, main: Main, run_config: Mapping[str, Any]) -> None:
        """Run a ServerApp in this thread, until it returns.

        Flower gives a run up when this machine slept or its clock jumped. `main` is then called
        again in a new run, so it must go on where it was.

        Args:
            main: the app, or any function of a grid and a context.
            run_config: what the context's `run_config` holds.

        Raises:
            Exception: whatever `main` raises.
        """
        for _ in range(RESTARTS):
            try:
                return self._run_once(main, run_config)
            except _RunGivenUpError:
                log.warning("Flower gave the run up (did this machine sleep?): a new one begins")
        raise _RunGivenUpError

    def _run_once(self, main: Main, run_config: Mapping[str, Any]) -> None:
        task = self._new_run()
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        context = Context(
            run_id=task.run_id,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=dict(run_config),
        )
        grid = _InProcessGrid(self._state, task, self._under_way)
        outcome, details = SubStatus.FAILED, ""
        try:
            with self._heartbeat(task):
                main(grid, context)
            outcome = SubStatus.COMPLETED
        except BaseException as error:
            details = type(error).__name__
            raise
        finally:
            self._state.finish_task(task.task_id, outcome, details)
            self._state.cleanup_run(task.run_id)  # messages and objects: the file can reuse them

    def _new_run(self) -> Task:
        """Return the task of a new run, claimed and running, as StartRun and AcquireTask do."""
        state = self._state
        state.store_fab(Fab(bundle_hash(), bundle(), {}))
        run_id = state.create_run(
            "cropkt/cropkt",
            VERSION,
            bundle_hash(),
            {},
            NOOP_FEDERATION_ID,
            None,
            NOOP_FLWR_AID,
            TaskType.SERVER_APP,
        )
        (run,) = state.get_run_info(run_ids=[run_id])
        task_id = run.primary_task_id
        if task_id is None or state.claim_task(task_id) is None or not state.activate_task(task_id):
            raise RuntimeError("Flower did not start the run")
        return Task(task_id=task_id, type=TaskType.SERVER_APP, run_id=run_id)

    def _end_runs(self) -> None:
        """Stop what a process that was killed left running, and free what it kept."""
        for run in self._state.get_run_info():
            if run.status.status != Status.FINISHED:
                log.info("run %d was under way when the last process ended", run.run_id)
                self._state.stop_run(run.run_id)
            self._state.cleanup_run(run.run_id)

    @contextmanager
    def _heartbeat(self, task: Task) -> Iterator[None]:
        """Keep the run alive and the nodes those of the roster, while `main` runs."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT):
                lock.beat(self._folder)
                try:
                    self._state.acknowledge_task_heartbeat(task.task_id)
                    self.reconcile()  # another process may have revoked a site
                except Exception as error:  # it may pass, and the next beat tries again
                    if disk_full(error):
                        log.error("no space is left on the disk of the coordinator's databases")
                    else:
                        log.exception("the coordinator's databases could not be written")

        thread = threading.Thread(target=beat, name="cropkt-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _fleet(self) -> App:
        """Return Flower's Fleet interface and nothing else of it, with node authentication."""
        app = FastAPI(
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
            middleware=[
                Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
                Middleware(ProtobufTranslationMiddleware),
                Middleware(NodeAuthMiddleware),
            ],
        )
        app.state.linkstate_factory = self._factory
        app.state.enable_supernode_auth = True
        checks = [Depends(_answers_for_itself), Depends(self._begins_anew), Depends(self._note)]
        app.include_router(fleet_router, dependencies=checks)
        return cast(App, app)

    async def _begins_anew(self, request: Request) -> None:
        """End a site's last session, which may have died without a farewell, if it begins another.

        Flower itself refuses the new session for up to a minute, and waits for ever for answers to
        what the old one took with it: that counts as lost now. A session that still says that it
        lives is left alone, and Flower refuses the other: two clients have the same key.
        """
        asked = getattr(request.state, "protobuf_request", None)
        if isinstance(asked, ActivateNodeRequest):
            await run_in_threadpool(self._begin_anew, asked)

    def _begin_anew(self, asked: ActivateNodeRequest) -> None:
        node_id = self._state.get_node_id_by_public_key(asked.public_key)
        if node_id is None:
            return
        (node,) = self._state.get_node_info(node_ids=[node_id])
        last_beat = node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval
        if time.time() - last_beat < LATEST_BEAT and node.online_until > time.time():
            return
        self._state.deactivate_node(node_id)
        lost = self._under_way.of(node_id)
        self._state.delete_messages(lost)
        log.info("node %d begins a new session; %d messages were lost", node_id, len(lost))

    async def _note(self, request: Request) -> None:
        """Note that a node asks for its next message, or begins to answer one."""
        asked = getattr(request.state, "protobuf_request", None)
        if isinstance(asked, PullMessagesRequest):
            self._under_way.asked(asked.node.node_id)
        elif isinstance(asked, PushMessagesRequest):
            for message, tree in zip(asked.messages_list, asked.message_object_trees, strict=False):
                pieces = [piece.object_id for piece in iterate_object_tree(tree)]
                answered = message.metadata.reply_to_message_id
                self._under_way.answered(answered, asked.node.node_id, pieces)


@contextmanager
def serving(
    folder: Path,
    *,
    study: str,
    host: str,
    listen: str = "0.0.0.0",
    port: int | None = None,
    config: StudyConfig | None = None,
) -> Iterator[SuperLink]:
    """Bring a study folder's coordinator up, and down again.

    Args:
        folder: holds the keys and the databases.
        study: its name.
        host: "name:port", as the sites reach it.
        listen: the address of this machine to listen on.
        port: the port to listen on, if not the one in `host`; 0 chooses one.
        config: what the sites are asked to do, for those that ask how they stand.

    Raises:
        ConfigError: a certificate, an address, a port or a database that cannot be used.
    """
    name, _, public_port = host.rpartition(":")
    keys = Keys.of(folder)
    check_certificate(keys, [name.strip("[]")])
    with closing(Roster(folder)) as roster, closing(Bank(folder)) as bank:
        superlink = SuperLink(folder, roster)
        enrolment = Enrolment(
            study=study,
            host=host,
            keys=keys,
            roster=roster,
            revoked=bank.revoked,
            config=config,
        )
        try:
            superlink.serve(enrolment, host=listen, port=int(public_port) if port is None else port)
            yield superlink
        finally:
            superlink.stop()


def _moderate(connection: sqlite3.Connection, record: object) -> None:
    """Let a connection remember little and wait long for its turn.

    Flower gives each of thirty connections 64 MB and maps 256 MB, and fails after five seconds.
    """
    connection.execute(f"PRAGMA cache_size = -{CACHE}")
    connection.execute("PRAGMA mmap_size = 0")
    connection.execute(f"PRAGMA busy_timeout = {BUSY}")


def _every(seconds: float, act: Callable[[], None]) -> Callable[[], None]:
    """Return a function that acts when it is called, but not again before so many seconds."""
    last, turn = -seconds, threading.Lock()

    def call() -> None:
        nonlocal last
        now = time.monotonic()
        with turn:
            if now - last < seconds:
                return
            last = now
        act()

    return call


class _RunGivenUpError(RuntimeError):
    """Flower ended the run while the ServerApp was at work."""


class _Runtime:
    """Flower's Runtime interface as calls of its functions: what `HttpGrid` needs of a client."""

    def __init__(self, state: LinkState, task: Task) -> None:
        self._state, self._task = state, task
        self._answers: deque[tuple[Any, Any]] = deque()  # taken from the state, not yet returned

    def _alive(self) -> None:
        status = self._state.get_run_status({self._task.run_id})[self._task.run_id]
        if status.status != Status.RUNNING:
            raise _RunGivenUpError

    def GetNodes(self, request: Any) -> Any:
        """Return the nodes that are online."""
        self._alive()
        return runtime_handlers.get_nodes(request, self._state, self._task)

    def PushMessages(self, request: Any) -> Any:
        """Take messages for nodes."""
        self._alive()
        return runtime_handlers.push_messages(request, self._state, self._task)

    def PullMessages(self, request: Any) -> Any:
        """Return one answer, if there is one: those of all sites at once would fill the memory."""
        self._alive()
        if not self._answers:
            found = runtime_handlers.pull_messages(request, self._state, self._task)
            pairs = zip(found.messages_list, found.message_object_trees, strict=True)
            self._answers.extend(pairs)
        if not self._answers:
            return PullAppMessagesResponse()
        answer, tree = self._answers.popleft()
        return PullAppMessagesResponse(messages_list=[answer], message_object_trees=[tree])

    def PushObject(self, request: Any) -> Any:
        """Take a piece of a message."""
        return runtime_handlers.push_object(request, self._state, self._task)

    def PullObject(self, request: Any) -> Any:
        """Return a piece of an answer."""
        return runtime_handlers.pull_object(request, self._state, self._task)

    def ConfirmMessageReceived(self, request: Any) -> Any:
        """Forget an answer that was taken."""
        return runtime_handlers.confirm_message_received(request, self._state, self._task)

    def close(self) -> None:
        """Nothing is open."""


class _InProcessGrid(HttpGrid):
    """Flower's grid without HTTP: no token to steal, no listener to find."""

    def __init__(self, state: LinkState, task: Task, under_way: UnderWay) -> None:
        super().__init__(token="none: nothing is sent")
        self._client = cast(Any, _Runtime(state, task))
        self._state, self._under_way = state, under_way
        under_way.forget()
        (run,) = state.get_run_info(run_ids=[task.run_id])
        self.set_run(run)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids, an empty one for each that was not taken."""
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message, message_id in zip(messages, ids, strict=True):
            if message_id:
                self._under_way.sent(message_id, message.metadata.dst_node_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that are there, and an error for each message that was lost.

        Flower itself would wait here for the rest of an answer that is still coming in, and keep
        all other sites waiting.
        """
        ids = set(message_ids)
        lost, coming = self._under_way.judge(ids, whole=self._whole, online=self.get_node_ids)
        if lost:
            self._state.delete_messages(lost)  # asked for them now, Flower says that they are lost
        answers = list(super().pull_messages(ids - coming))
        for answer in answers:
            self._under_way.taken(answer.metadata.reply_to_message_id)
        return answers

    def _whole(self, pieces: tuple[str, ...]) -> bool:
        """Return whether all pieces of an answer are there."""
        came = StoredObject.object_id.in_(pieces) & (StoredObject.is_available == 1)
        with cast(Any, self._state.object_store).session() as session:
            count = session.scalar(select(func.count()).select_from(StoredObject).where(came))
        return bool(count == len(set(pieces)))


async def _answers_for_itself(request: Request) -> None:
    """Refuse an answer in another node's name, which Flower itself would take."""
    asked = getattr(request.state, "protobuf_request", None)
    if isinstance(asked, PushMessagesRequest) and any(
        message.metadata.src_node_id != asked.node.node_id for message in asked.messages_list
    ):
        log.warning("refused node %d: an answer in another's name", asked.node.node_id)
        raise HTTPException(status_code=401, detail="This answer is not yours to give.")
