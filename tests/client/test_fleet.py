"""The SuperNode's calls: which failures are final, how long it waits, whose time it signs."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import httpx
from datetime import timedelta
from cropkt_client.fleet import settle
from flwr.supercore.date import now
settle(600.0)
from flwr.supernode import fleet_http_connection, node_auth_http_interceptor
invoker = fleet_http_connection.make_simple_http_retry_invoker()
cut = httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred")
assert not invoker.should_giveup(cut)
assert not invoker.should_giveup(httpx.ReadTimeout("no answer"))
untrusted = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
assert invoker.should_giveup(untrusted)
request = httpx.Request("POST", "https://hub.example.org")
for status, final in ((503, False), (400, True)):
    error = httpx.HTTPStatusError("", request=request, response=httpx.Response(status))
    assert invoker.should_giveup(error) is final
behind = now() - node_auth_http_interceptor.now()
assert abs(behind - timedelta(seconds=600)) < timedelta(seconds=5)

from flwr.proto.message_pb2 import PushObjectRequest
waits = []
def send(self, request, **options):
    waits.append(request.extensions["timeout"])
    return httpx.Response(200, request=request)
httpx.Client.send = send
client = fleet_http_connection.FleetHttpClient.from_server_address("hub:1", True, None, [])
client.PushObject(PushObjectRequest(object_content=b"small"))
client.PushObject(PushObjectRequest(object_content=bytes(3_000_000)))
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
client.SendNodeHeartbeat(SendNodeHeartbeatRequest())
assert [round(wait["read"]) for wait in waits] == [30, 130, 5], waits
"""

RUN_ENDS = """
from cropkt.bundle import bundle
from cropkt_client.fleet import settle
settle(0.0)
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import Status
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _pull_and_store_message

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
message = Message(RecordDict({"message": ConfigRecord({"json": "{}"})}), 5, "query.describe")
message.metadata.__dict__["_message_id"] = message.object_id
factory = ObjectStoreFactory()
state = NodeStateFactory(factory).state()
state.set_node_id(5)

def ended(object_id):
    raise RunNotRunningException  # as a call that HTTP 403 answers

taken = _pull_and_store_message(
    state=state,
    object_store=factory.store(),
    node_config={},
    receive=lambda: (remove_content_from_message(message), get_object_tree(message)),
    get_run=Run.create_empty,
    get_fab=lambda name, run: Fab("", bundle(), {}),
    pull_object=lambda run, object_id: ended(object_id),
    confirm_message_received=lambda run, object_id: None,
    trusted_entities=None,
)
assert taken is None
(task,) = state.get_tasks()
assert task.status.status == Status.FINISHED, task  # the executor finds nothing to wait for
assert not state.get_messages_legacy(is_reply=False)
"""


def test_a_message_whose_run_ends_while_it_is_taken_is_cleared_away() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_ENDS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_replaced_names_do_what_they_should() -> None:
    """Runs in a process of its own: what is replaced stays replaced."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
