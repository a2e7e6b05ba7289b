"""The coordinator's one port, with real TLS on loopback, and what must not come through it.

Calls to Flower are made with Flower's own client classes, as a site or an attacker would.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import os
import secrets
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    ErrorCode,
)
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab as ProtoFab
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, verify_signature
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

import cropkt
from cropkt.bundle import bundle, bundle_hash
from cropkt.cancers import Cancer
from cropkt.errors import ConfigError
from cropkt_server.enrolment import Enrolment
from cropkt_server.pki import Keys, make_keys
from cropkt_server.public import FLEET_BODY, FLEET_CALLS, KEY_HEADER, SIGNATURE_HEADER
from cropkt_server.replay import WINDOW
from cropkt_server.roster import Roster
from cropkt_server.superlink import LATEST_BEAT, SuperLink, serving

# Of alembic, which Flower's database is opened with.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")
UVM = Cancer("UVM")
# The order of the group of P-384, FIPS 186-4, D.1.2.4.
P384 = int(48 * "f" + "c7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16)
OTHER_PATHS = (
    "/",
    "/docs",
    "/openapi.json",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/",
    "//v1/fleet/pull-messages",
    "/v1/fleet//pull-messages",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet%2fpull-messages",
    "/v1/%66leet/pull-messages",
    "/V1/FLEET/pull-messages",
    "/v1/fleet/pull-messages;x",
    "/v1/cropkt/hello/../../control/start-run",
    "/health/../v1/control/start-run",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet\\..\\control\\start-run",
    "https://127.0.0.1/v1/control/start-run",
)


class Coordinator:
    """A running coordinator, and how to reach it."""

    def __init__(self, folder: Path, superlink: SuperLink, port: int) -> None:
        self.folder, self.superlink, self.port = folder, superlink, port
        self.keys = Keys.of(folder)
        self.roster = Roster(folder)  # as the commands invite and revoke have one
        self.host = f"127.0.0.1:{port}"
        self.tls = ssl.create_default_context(cafile=str(self.keys.ca))
        self.clients: list[Any] = []
        self.web = httpx.Client(base_url=f"https://{self.host}", verify=self.tls, trust_env=False)

    def close(self) -> None:
        for client in (self.web, *self.clients):
            client.close()

    def invite(self, site: str) -> str:
        return (
            Enrolment(study="rare", host=self.host, keys=self.keys, roster=self.roster)
            .invite(site, [UVM], time.time() + 60)
            .token
        )

    def client(self, kind: type[Any], *interceptors: Any) -> Any:
        """Return one of Flower's clients, pointed at the public port."""
        client = kind.from_server_address(
            server_address=self.host,
            insecure=False,
            root_certificates=self.keys.ca.read_bytes(),
            interceptors=list(interceptors),
        )
        self.clients.append(client)
        return client


@pytest.fixture(scope="module")
def made_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(Keys.of(folder), ["127.0.0.1"], study="rare")
    return folder / "keys"


@pytest.fixture
def folder(tmp_path: Path, made_keys: Path) -> Path:
    (tmp_path / "keys").symlink_to(made_keys)
    return tmp_path


@contextmanager
def coordinating(folder: Path) -> Iterator[Coordinator]:
    with serving(folder, study="rare", host="127.0.0.1:1", listen="127.0.0.1", port=0) as superlink:
        assert superlink.port is not None
        coordinator = Coordinator(folder, superlink, superlink.port)
        try:
            yield coordinator
        finally:
            coordinator.roster.close()
    coordinator.close()  # after the server: sites do not say farewell either


@pytest.fixture
def coordinator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    monkeypatch.setenv("FLWR_HOME", str(folder / "flwr"))
    with coordinating(folder) as running:
        yield running


class Site:
    """The network side of a hospital, by hand."""

    def __init__(self, coordinator: Coordinator, name: str = "A", *, enrol: bool = True) -> None:
        self.coordinator, self.name = coordinator, name
        self.key = ec.generate_private_key(ec.SECP384R1())
        public = self.key.public_key()
        self.request = {
            "token": coordinator.invite(name),
            "site": name,
            "node_key": public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
            "signing_key": base64.b64encode(
                ed25519.Ed25519PrivateKey.generate().public_key().public_bytes_raw()
            ).decode(),
            "cropkt": cropkt.__version__,
            "protocol": 1,
            "flwr": version("flwr"),
        }
        self.fleet: FleetHttpClient = coordinator.client(
            FleetHttpClient, NodeAuthHttpInterceptor(self.key, public)
        )
        self.node = ProtoNode()
        if enrol:
            assert self.enrol().status_code == 200

    def enrol(self) -> httpx.Response:
        return self.coordinator.web.post("/v1/cropkt/enrol", json=self.request)

    def activate(self) -> ProtoNode:
        pem = public_key_to_bytes(self.key.public_key())
        answer = self.fleet.ActivateNode(ActivateNodeRequest(public_key=pem, heartbeat_interval=30))
        self.node = ProtoNode(node_id=answer.node_id)
        return self.node

    def receive(self, within: float = 10) -> Message:
        """Return the next message with its content, as a SuperNode puts it together."""
        until = time.monotonic() + within
        while not (
            answer := self.fleet.PullMessages(PullMessagesRequest(node=self.node))
        ).messages_list:
            assert time.monotonic() < until, "no message came"
            time.sleep(0.05)
        message = message_from_proto(answer.messages_list[0])
        contents: dict[str, bytes] = {}
        for tree in iterate_object_tree(answer.message_object_trees[0]):
            got = PullObjectRequest(
                node=self.node, run_id=message.metadata.run_id, object_id=tree.object_id
            )
            while not (piece := self.fleet.PullObject(got)).object_available:
                time.sleep(0.05)
            contents[tree.object_id] = piece.object_content
        whole = inflate_object_from_contents(message.metadata.message_id, contents)
        assert isinstance(whole, Message)
        whole.metadata.__dict__["_message_id"] = message.metadata.message_id
        return whole

    def reply(self, message: Message, content: RecordDict, *, sender: int | None = None) -> None:
        reply = Message(content, reply_to=message)
        # A site is another process and has its own identity; this one is the coordinator's too.
        reply.metadata.__dict__["_src_node_id"] = sender or self.node.node_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        answer = self.fleet.PushMessages(
            PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[1.0],
            )
        )
        for object_id in answer.objects_to_push:
            self.fleet.PushObject(
                PushObjectRequest(
                    node=self.node,
                    run_id=message.metadata.run_id,
                    session_id=answer.session_id,
                    object_id=object_id,
                    object_content=objects[object_id].deflate(),
                )
            )


@contextmanager
def server_app(coordinator: Coordinator, main: Callable[[Grid, Context], None]) -> Iterator[None]:
    """Run a ServerApp in a thread beside the test; raise here what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            coordinator.superlink.run_server_app(main, {"study": "here"})
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(30)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


def refused_with(status: int, call: Callable[[], Any]) -> None:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        call()
    assert caught.value.response.status_code == status


def runs(folder: Path) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(folder / "flower.sqlite")) as database:
        return database.execute("SELECT fab_hash FROM run").fetchall()


# --- routes


def test_public_routes(coordinator: Coordinator) -> None:
    pem = coordinator.web.get("/v1/cropkt/ca")
    assert pem.content == coordinator.keys.ca.read_bytes()
    hello = coordinator.web.get("/v1/cropkt/hello").json()
    assert abs(hello.pop("time") - time.time()) < 5
    assert hello == {
        "study": "rare",
        "closed": False,
        "cropkt": cropkt.__version__,
        "protocol": 1,
        "flwr": version("flwr"),
        "bundle": bundle_hash(),
        "revoked": [],
    }
    coordinator.superlink.say_closed()
    assert coordinator.web.get("/v1/cropkt/hello").json()["closed"] is True
    assert coordinator.web.get("/health").status_code == 200


def test_the_door_knows_flowers_calls() -> None:
    theirs = {route.path.removeprefix("/v1/fleet/") for route in fleet_router.routes}  # type: ignore[attr-defined]
    assert theirs == {*FLEET_CALLS, "register-node", "unregister-node"}
    assert KEY_HEADER.decode() == FLEET_HTTP_PUBLIC_KEY_HEADER
    assert SIGNATURE_HEADER.decode() == FLEET_HTTP_SIGNATURE_HEADER


def test_every_other_path_is_not_there(coordinator: Coordinator, site: Site) -> None:
    # As bytes: an HTTP client would tidy the path up before it sends it.
    for path in OTHER_PATHS:
        for method in ("GET", "POST", "HEAD", "OPTIONS"):
            answer = raw(coordinator, method, path, {"content-type": "application/x-protobuf"})
            assert answer.split(b" ")[1] in (b"404", b"400"), (method, path)
    assert runs(coordinator.folder) == []


@pytest.fixture
def site(coordinator: Coordinator) -> Site:
    return Site(coordinator)


def raw(coordinator: Coordinator, method: str, path: str, headers: dict[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"host: {coordinator.host}", "content-length: 0"]
    lines += ["connection: close", *(f"{name}: {value}" for name, value in headers.items())]
    with (
        socket.create_connection(("127.0.0.1", coordinator.port), timeout=5) as plain,
        coordinator.tls.wrap_socket(plain, server_hostname="127.0.0.1") as stream,
    ):
        stream.sendall("\r\n".join([*lines, "", ""]).encode())
        return stream.recv(4096)


def test_websockets_are_refused(coordinator: Coordinator) -> None:
    upgrade = {
        "upgrade": "websocket",
        "sec-websocket-key": base64.b64encode(b"0" * 16).decode(),
        "sec-websocket-version": "13",
    }
    answer = raw(coordinator, "GET", "/v1/fleet/pull-messages", upgrade)
    assert b" 101 " not in answer.split(b"\r\n")[0]


def test_plain_http_is_not_spoken(coordinator: Coordinator) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{coordinator.host}/health", trust_env=False)


def test_another_authority_is_not_trusted(coordinator: Coordinator, tmp_path: Path) -> None:
    other = Keys.of(tmp_path / "other")
    make_keys(other, ["127.0.0.1"], study="rare")
    tls = ssl.create_default_context(cafile=str(other.ca))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://{coordinator.host}/health", verify=tls, trust_env=False)
    with pytest.raises(httpx.ConnectError, match="not valid for"):
        httpx.get(
            f"https://localhost:{coordinator.port}/health", verify=coordinator.tls, trust_env=False
        )


def test_only_the_public_port_listens(coordinator: Coordinator) -> None:
    mine = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [c.laddr.port for c in mine] == [coordinator.port]


# --- enrolment


def test_enrolment(coordinator: Coordinator) -> None:
    site = Site(coordinator)
    again = site.enrol()  # the answer may have been lost
    assert again.status_code == 200
    assert again.json()["site"] == "A"
    thief = Site(coordinator, "B", enrol=False)
    thief.request |= {"token": site.request["token"], "site": "A"}
    assert (thief.enrol().status_code, thief.enrol().json()["code"]) == (403, "used")
    assert [member.name for member in coordinator.roster.sites()] == ["A"]
    assert coordinator.roster.site_of(site.activate().node_id) == "A"


def test_a_long_body_is_not_read(coordinator: Coordinator) -> None:
    answer = coordinator.web.post("/v1/cropkt/enrol", content=b"x" * (17 << 10))
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


def test_enrolment_is_limited_by_address(coordinator: Coordinator) -> None:
    codes = [coordinator.web.post("/v1/cropkt/enrol", content=b"{}").status_code for _ in range(11)]
    assert codes == 10 * [400] + [429]


# --- the three attacks of a stock SuperLink


@pytest.fixture
def refusals(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what gives the causes that the door has logged."""
    caplog.set_level(logging.WARNING, logger="cropkt.server")
    return lambda: [
        line.removeprefix("refused 127.0.0.1: ")
        for line in caplog.messages
        if line.startswith("refused ")
    ]


def no_route(*calls: str) -> list[str]:
    return [f"no such route: POST '/v1/{call}'" for call in calls]


def test_attack_1_no_run_starts_from_outside(
    coordinator: Coordinator, refusals: Callable[[], list[str]]
) -> None:
    control = coordinator.client(ControlHttpClient)
    fab = ProtoFab(hash_str=bundle_hash(), content=bundle())
    refused_with(404, lambda: control.StartRun(StartRunRequest(fab=fab)))
    refused_with(404, lambda: control.ListNodes(ListNodesRequest()))
    assert runs(coordinator.folder) == []
    assert refusals() == no_route("control/start-run", "control/list-nodes")


def test_attack_2_no_node_registers_from_outside(
    coordinator: Coordinator, refusals: Callable[[], list[str]]
) -> None:
    foreign = Site(coordinator, enrol=False)
    pem = public_key_to_bytes(foreign.key.public_key())
    control = coordinator.client(ControlHttpClient)
    refused_with(404, lambda: control.RegisterNode(RegisterNodeRequest(public_key=pem)))
    register = RegisterNodeFleetRequest(public_key=pem)
    refused_with(404, lambda: foreign.fleet.RegisterNode(register))
    member = Site(coordinator, "B")  # nor by a member's hand
    refused_with(404, lambda: member.fleet.RegisterNode(register))
    refused_with(401, foreign.activate)
    assert refusals() == [
        *no_route("control/register-node", "fleet/register-node"),  # the same one once a minute
        "a key that nobody enrolled",
    ]


def test_attack_3_the_server_apps_task_cannot_be_taken(
    coordinator: Coordinator, refusals: Callable[[], list[str]]
) -> None:
    done = threading.Event()

    def wait(grid: Grid, context: Context) -> None:
        done.wait(20)

    with server_app(coordinator, wait):
        runtime = coordinator.client(RuntimeHttpClient)
        request = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
        refused_with(404, lambda: runtime.AcquireTask(request))
        done.set()
    assert refusals() == no_route("runtime/acquire-task")


# --- nodes


def test_a_node_that_never_enrolled_is_refused(
    coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Site(coordinator, enrol=False)
    with caplog.at_level(logging.WARNING, logger="cropkt.server"):
        refused_with(401, stranger.activate)
        pull = PullMessagesRequest(node=ProtoNode(node_id=1))
        refused_with(401, lambda: stranger.fleet.PullMessages(pull))
    assert "refused 127.0.0.1: a key that nobody enrolled" in caplog.text


def test_a_members_key_must_be_owned(coordinator: Coordinator, site: Site) -> None:
    thief = ec.generate_private_key(ec.SECP384R1())
    fleet = coordinator.client(
        FleetHttpClient, NodeAuthHttpInterceptor(thief, site.key.public_key())
    )
    site.activate()
    refused_with(401, lambda: fleet.PullMessages(PullMessagesRequest(node=site.node)))


def test_a_member_cannot_take_anothers_messages(coordinator: Coordinator, site: Site) -> None:
    other = Site(coordinator, "B")
    site.activate()
    other.activate()
    refused_with(401, lambda: other.fleet.PullMessages(PullMessagesRequest(node=site.node)))


def signed(site: Site) -> dict[str, str]:
    """Return the headers of a request that a site signs."""
    request = httpx.Request("POST", "https://coordinator")
    context = ProtobufRequestContext("", RegisterNodeRequest(), request)
    NodeAuthHttpInterceptor(site.key, site.key.public_key()).intercept(
        context, lambda _: httpx.Response(200)
    )
    names = (KEY_HEADER.decode(), SIGNATURE_HEADER.decode(), TIMESTAMP_HEADER)
    return {name: request.headers[name] for name in names} | {"content-type": PROTOBUF_MEDIA_TYPE}


def test_a_request_that_comes_again_is_refused(
    coordinator: Coordinator, site: Site, refusals: Callable[[], list[str]]
) -> None:
    node, headers = site.activate(), signed(site)

    def post(call: str = "pull-messages", **changed: str) -> int:
        message = PullMessagesRequest(node=node).SerializeToString()
        path = f"/v1/fleet/{call}"
        return coordinator.web.post(path, content=message, headers=headers | changed).status_code

    assert refusals() == []
    assert post() == 200
    assert post() == 401
    assert refusals() == ["A: a signature that came before, or none"]
    assert post("push-messages") == 401  # nor for anything else
    r, s = decode_dss_signature(base64.b64decode(headers[SIGNATURE_HEADER.decode()]))
    twin = encode_dss_signature(r, P384 - s)
    assert verify_signature(site.key.public_key(), headers[TIMESTAMP_HEADER].encode(), twin)
    assert post(**{SIGNATURE_HEADER.decode(): base64.b64encode(twin).decode()}) == 401
    headers = signed(site)
    assert post(**{SIGNATURE_HEADER.decode(): "AAAA"}) == 401
    assert post() == 200


def test_requests_signed_in_the_same_instant_are_two(
    coordinator: Coordinator, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, now = site.activate(), datetime.now(UTC)
    monkeypatch.setattr("flwr.supernode.node_auth_http_interceptor.now", lambda: now)
    for _ in range(3):
        site.fleet.PullMessages(PullMessagesRequest(node=node))


def test_flower_takes_no_signature_for_longer_than_it_is_remembered() -> None:
    assert TIMESTAMP_TOLERANCE + 2 * SYSTEM_TIME_TOLERANCE == WINDOW


def test_a_body_beyond_the_limit_is_not_read(coordinator: Coordinator, site: Site) -> None:
    node = site.activate()
    large = PushObjectRequest(node=node, object_id="x", object_content=b"0" * FLEET_BODY)
    refused_with(413, lambda: site.fleet.PushObject(large))
    # and in pieces without a declared length, cut off on the way
    connection = http.client.HTTPSConnection("127.0.0.1", coordinator.port, context=coordinator.tls)
    headers = signed(site)
    pieces = (b"0" * (1 << 20) for _ in range(12))
    try:
        connection.request("POST", "/v1/fleet/push-object", pieces, headers, encode_chunked=True)
        assert connection.getresponse().status >= 400
    except (ConnectionError, http.client.HTTPException, ssl.SSLError):
        pass
    finally:
        connection.close()
    assert coordinator.web.get("/health").status_code == 200


# --- a run


def test_a_message_goes_out_and_its_answer_comes_back(coordinator: Coordinator, site: Site) -> None:
    node, got = site.activate(), list[Message]()
    weights = np.arange(3 << 20, dtype=np.float32)  # 12 MiB: three pieces

    def main(grid: Grid, context: Context) -> None:
        assert dict(context.run_config) == {"study": "here"}
        assert list(grid.get_node_ids()) == [node.node_id]
        content = RecordDict({"weights": ArrayRecord({"w": Array(weights)})})
        (sent,) = grid.push_messages([Message(content, node.node_id, "train.expert")])
        until = time.monotonic() + 20
        while not got and time.monotonic() < until:
            got.extend(grid.pull_messages([sent]))
            time.sleep(0.05)

    with server_app(coordinator, main):
        message = site.receive()
        assert message.metadata.message_type == "train.expert"
        received = message.content.array_records["weights"]["w"].numpy()
        np.testing.assert_array_equal(received, weights)
        site.reply(message, RecordDict({"config": ConfigRecord({"json": "{}"})}))
    (answer,) = got
    assert answer.metadata.src_node_id == node.node_id
    assert answer.content.config_records["config"]["json"] == "{}"
    assert runs(coordinator.folder) == [(bundle_hash(),)]


def test_nobody_answers_for_another(coordinator: Coordinator, site: Site) -> None:
    liar, done = Site(coordinator, "B"), threading.Event()
    node, other = site.activate(), liar.activate()
    answers: list[Message] = []

    def main(grid: Grid, context: Context) -> None:
        message = Message(RecordDict(), node.node_id, "query.describe")
        (sent,) = grid.push_messages([message])
        done.wait(20)
        answers.extend(grid.pull_messages([sent]))

    with server_app(coordinator, main):
        message = site.receive()
        refused_with(401, lambda: liar.reply(message, RecordDict(), sender=node.node_id))
        refused_with(401, lambda: liar.reply(message, RecordDict(), sender=12345))
        liar.reply(message, RecordDict(), sender=other.node_id)  # Flower drops it: not asked
        done.set()
    assert answers == []


def test_revoked_in_the_middle_of_a_task(
    coordinator: Coordinator, site: Site, refusals: Callable[[], list[str]]
) -> None:
    node, revoked, answers = site.activate(), threading.Event(), list[Message]()

    def main(grid: Grid, context: Context) -> None:
        message = Message(RecordDict(), node.node_id, "query.describe")
        (sent,) = grid.push_messages([message])
        revoked.wait(20)
        coordinator.superlink.reconcile()  # the heartbeat does, every few seconds
        assert list(grid.get_node_ids()) == []
        answers.extend(grid.pull_messages([sent]))

    with server_app(coordinator, main):
        message = site.receive()
        coordinator.roster.revoke("A")  # another process: the command
        refused_with(401, lambda: site.reply(message, RecordDict()))
        refused_with(401, site.activate)
        revoked.set()
    assert all(answer.has_error() for answer in answers)
    assert coordinator.roster.site_of(node.node_id) is None
    assert refusals() == ["A is revoked"]
    assert site.enrol().json()["code"] == "revoked"


def _silent(folder: Path, seconds: float) -> None:
    """Let every node be silent since so long."""
    with closing(sqlite3.connect(folder / "flower.sqlite")) as database:
        database.execute("UPDATE node SET online_until = ?", (time.time() + 60 - seconds,))
        database.commit()


@pytest.mark.parametrize("farewell", [True, False], ids=["left and came back", "was killed"])
def test_a_new_session_does_not_wait_for_the_end_of_the_last_one(
    coordinator: Coordinator, site: Site, farewell: bool
) -> None:
    node, taken, again = site.activate(), threading.Event(), threading.Event()
    answers: list[Message] = []

    def main(grid: Grid, context: Context) -> None:
        (sent,) = grid.push_messages([Message(RecordDict(), node.node_id, "query.describe")])
        taken.wait(20)
        assert list(grid.pull_messages([sent])) == []
        again.wait(20)
        assert list(grid.get_node_ids()) == [node.node_id]
        answers.extend(grid.pull_messages([sent]))

    with server_app(coordinator, main):
        site.receive()
        taken.set()
        if farewell:
            site.fleet.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
        else:
            _silent(coordinator.folder, LATEST_BEAT + 1)
        site.activate()
        again.set()
    assert [answer.error.code for answer in answers] == [ErrorCode.MESSAGE_UNAVAILABLE]


def test_a_session_that_lives_is_not_taken_over(coordinator: Coordinator, site: Site) -> None:
    node, refused, answers = site.activate(), threading.Event(), list[Message]()

    def main(grid: Grid, context: Context) -> None:
        (sent,) = grid.push_messages([Message(RecordDict(), node.node_id, "query.describe")])
        refused.wait(20)
        until = time.monotonic() + 20
        while not answers and time.monotonic() < until:
            answers.extend(grid.pull_messages([sent]))
            time.sleep(0.05)

    with server_app(coordinator, main):
        message = site.receive()
        _silent(coordinator.folder, LATEST_BEAT - 2)
        with pytest.raises(httpx.HTTPStatusError) as caught:
            site.activate()  # another client with the same key
        assert "2004" in caught.value.response.text
        refused.set()
        site.reply(message, RecordDict())
    assert [answer.has_error() for answer in answers] == [False]


def test_raises_what_the_app_raises(coordinator: Coordinator) -> None:
    def main(grid: Grid, context: Context) -> None:
        raise ConfigError("study.yaml", "is wrong")

    with pytest.raises(ConfigError, match=r"study\.yaml: is wrong"):
        coordinator.superlink.run_server_app(main, {})
    entered = []
    coordinator.superlink.run_server_app(lambda grid, context: entered.append(1), {})
    assert entered == [1]


def test_goes_on_when_flower_gives_the_run_up(coordinator: Coordinator) -> None:
    entered = []

    def main(grid: Grid, context: Context) -> None:
        entered.append(context.run_id)
        if len(entered) == 1:
            with closing(sqlite3.connect(coordinator.folder / "flower.sqlite")) as database:
                database.execute("UPDATE task SET active_until = '2000-01-01 00:00:00.000000'")
                database.commit()
            for _ in range(100):  # Flower looks once a second
                grid.get_node_ids()
                time.sleep(0.1)

    coordinator.superlink.run_server_app(main, {})
    assert len(set(entered)) == 2


# --- the process


def test_a_restart_keeps_nodes_and_ends_the_old_run(folder: Path) -> None:
    with coordinating(folder) as first:
        site = Site(first)
        node = site.activate()
        first.superlink._new_run()  # and then the process is killed
    with coordinating(folder) as second:
        site.coordinator = second
        site.fleet = second.client(
            FleetHttpClient, NodeAuthHttpInterceptor(site.key, site.key.public_key())
        )
        # The old session may hold for a minute, but the node is who it was.
        site.fleet.PullMessages(PullMessagesRequest(node=node))
        assert second.roster.site_of(node.node_id) == "A"
        second.superlink.run_server_app(lambda grid, context: None, {})
    with closing(sqlite3.connect(folder / "flower.sqlite")) as database:
        rows = database.execute("SELECT sub_status FROM task ORDER BY pending_at").fetchall()
    assert rows == [("stopped",), ("completed",)]


def test_a_lost_flower_database_is_made_anew(folder: Path) -> None:
    with coordinating(folder) as first:
        Site(first)
        (before,) = first.roster.sites()
    for file in folder.glob("flower.sqlite*"):
        file.unlink()
    with coordinating(folder) as second:
        (after,) = second.roster.sites()
    assert after.node_id != before.node_id
    assert after.node_key == before.node_key


def test_stops_cleanly(folder: Path) -> None:
    before = set(threading.enumerate())
    with coordinating(folder) as running:
        Site(running).activate()
        port = running.port
    assert set(threading.enumerate()) <= before
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def test_a_busy_port_is_one_line(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"127.0.0.1:{port}: cannot listen there"),
            serving(folder, study="rare", host=f"127.0.0.1:{port}", listen="127.0.0.1"),
        ):
            pass


def test_an_unusable_database_is_one_line(folder: Path) -> None:
    (folder / "flower.sqlite").write_text("not a database at all" * 100)
    with pytest.raises(ConfigError, match=r"flower\.sqlite: cannot be used"), coordinating(folder):
        pass


def test_files_are_for_the_owner_alone(coordinator: Coordinator, site: Site) -> None:
    files = [path for path in coordinator.folder.iterdir() if path.name.startswith("flower")]
    assert files
    for path in files:
        assert path.stat().st_mode & 0o077 == 0
    assert json.loads(coordinator.web.get("/health").text) == {"status": "ok"}


# --- Flower's own SuperNode, as a process


@contextmanager
def supernode(site: Site, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a stock SuperNode with the site's key, without anything that would run an app."""
    home = folder / f"home-{site.name}"
    home.mkdir()
    key = home / "node.key"
    key.write_bytes(site.key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    key.chmod(0o600)
    secret = home / "secret"
    secret.write_bytes(secrets.token_bytes(32))
    secret.chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("flower-supernode"))]
    options = {
        "--superlink": site.coordinator.host,
        "--root-certificates": site.coordinator.keys.ca,
        "--auth-supernode-private-key": key,
        "--isolation": "process",
        "--superexec-auth-secret-file": secret,
        "--host": "127.0.0.1",
        "--port": port,
    }
    for pair in options.items():
        command += map(str, pair)
    quiet = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    with open(home / "out", "wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | quiet, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


@pytest.mark.federation
def test_a_stock_supernode_joins_and_a_revoked_one_ends(
    coordinator: Coordinator, site: Site, refusals: Callable[[], list[str]]
) -> None:
    node_id = coordinator.roster.sites()[0].node_id
    seen: list[int] = []

    def main(grid: Grid, context: Context) -> None:
        until = time.monotonic() + 60
        while node_id not in seen and time.monotonic() < until:
            seen.extend(grid.get_node_ids())
            time.sleep(0.2)

    with supernode(site, coordinator.folder) as process:
        coordinator.superlink.run_server_app(main, {})
        assert seen == [node_id]
        assert process.poll() is None
        assert coordinator.roster.sites()[0].last_seen is not None
        coordinator.roster.revoke("A")
        process.wait(60)  # at its next call
    assert refusals() == ["A is revoked"]


@pytest.mark.federation
def test_a_stock_supernode_with_a_foreign_key_ends(coordinator: Coordinator) -> None:
    foreign = Site(coordinator, enrol=False)
    with supernode(foreign, coordinator.folder) as process:
        process.wait(60)
    assert runs(coordinator.folder) == []
    with closing(sqlite3.connect(coordinator.folder / "flower.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM node").fetchone() == (0,)
