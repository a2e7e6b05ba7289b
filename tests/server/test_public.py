"""The door takes few calls at a time to Flower, and gives long answers out in pieces."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cropkt.cancers import Cancer
from cropkt_client.enrol import Keys as SiteKeys
from cropkt_server.asgi import PIECE
from cropkt_server.enrolment import Enrolment, pem_of
from cropkt_server.pki import Keys, make_keys
from cropkt_server.public import AT_WORK, KEY_HEADER, SIGNATURE_HEADER, PublicDoor
from cropkt_server.roster import Roster, Traffic

Ask = Callable[[Any], Awaitable[list[dict[str, Any]]]]
WHOLE = {"type": "http.request", "body": b"question", "more_body": False}


class Fleet:
    """Stands for Flower: reads a request, waits until it may, answers."""

    def __init__(self, answer: bytes = b"answer") -> None:
        self.answer, self.may = answer, asyncio.Event()
        self.at_work = self.most = self.done = self.left = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        if event["type"] == "http.disconnect":
            self.left += 1
            return
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        await self.may.wait()
        self.at_work -= 1
        self.done += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.answer})


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Callable[[Fleet], Ask]]:
    """Return what puts a door before a fleet, and asks there as an enrolled site."""
    keys, roster = Keys.of(tmp_path), Roster(tmp_path)
    make_keys(keys, ["127.0.0.1"], study="eye")
    public = SiteKeys.of(tmp_path / "site").public()
    roster.enrol(
        token=roster.invite("lumc", [Cancer.UVM], 4e9),
        site="lumc",
        node_key=pem_of(public["node_key"]),
        signing_key=public["signing_key"],
        register=lambda key, name: 7,
    )
    headers_of_site = [(KEY_HEADER, base64.b64encode(pem_of(public["node_key"]).encode()))]
    numbers = itertools.count(1)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/fleet/pull-object",
        "raw_path": b"/v1/fleet/pull-object",
        "client": ("127.0.0.1", 1),
    }

    def before(fleet: Fleet) -> Ask:
        enrolment = Enrolment(study="eye", host="127.0.0.1:1", keys=keys, roster=roster)
        app = PublicDoor(fleet, enrolment, nodes=None)  # type: ignore[arg-type]

        async def ask(receive: Any) -> list[dict[str, Any]]:
            sent: list[dict[str, Any]] = []

            async def send(event: Any) -> None:
                sent.append(event)

            signature = base64.b64encode(encode_dss_signature(next(numbers), 1))
            headers = [*headers_of_site, (SIGNATURE_HEADER, signature)]
            await app({**scope, "headers": headers}, receive, send)
            return sent

        return ask

    yield before
    roster.close()


def site(*, leaves: asyncio.Event | None = None) -> Callable[[], Awaitable[dict[str, Any]]]:
    """Return the requests of a site, which leaves at an event or never."""
    events = [dict(WHOLE)]

    async def receive() -> dict[str, Any]:
        if events:
            return events.pop()
        await (leaves or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    return receive


def test_bytes_through_the_door_are_noted_by_site(
    door: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cropkt_server.public.SEEN_BYTES", 3 * PIECE)

    async def go() -> None:
        fleet = Fleet(answer=bytes(PIECE + 7))
        fleet.may.set()
        ask = door(fleet)
        for _ in range(4):  # the first is noted at once, before it went; the rest by their size
            await ask(site())

    asyncio.run(go())
    with contextlib.closing(Roster(tmp_path, read_only=True)) as roster:
        whole = len(WHOLE["body"])
        assert roster.traffic() == {"lumc": Traffic(received=3 * whole, sent=3 * (PIECE + 7))}


async def settled() -> None:
    """Let everything go on until it waits."""
    for _ in range(50):
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 7])
def test_a_long_answer_goes_in_pieces_and_arrives_whole(door: Any, size: int) -> None:
    async def go() -> None:
        fleet = Fleet(answer=bytes(i % 251 for i in range(size)))
        fleet.may.set()
        start, *bodies = await door(fleet)(site())
        assert start["status"] == 200
        assert b"".join(body["body"] for body in bodies) == fleet.answer
        assert max(len(body["body"]) for body in bodies) <= PIECE
        assert [body.get("more_body", False) for body in bodies] == [
            *[True] * (len(bodies) - 1),
            False,
        ]

    asyncio.run(go())


def test_few_calls_are_at_work_at_once_and_all_are_answered(door: Any) -> None:
    async def go() -> None:
        fleet = Fleet()
        ask = door(fleet)
        calls = [asyncio.ensure_future(ask(site())) for _ in range(5 * AT_WORK)]
        await settled()
        assert fleet.at_work == AT_WORK
        fleet.may.set()
        answers = await asyncio.gather(*calls)
        assert all(answer[-1]["body"] == b"answer" for answer in answers)
        assert fleet.most == AT_WORK

    asyncio.run(go())


def test_who_came_last_goes_first(door: Any) -> None:
    """Under more than it can do, the first has left when its turn comes, and asks again."""

    async def go() -> None:
        fleet, ends = Fleet(), list[int]()
        ask = door(fleet)

        async def named(number: int) -> None:
            await ask(site())
            ends.append(number)

        at_work = [asyncio.ensure_future(ask(site())) for _ in range(AT_WORK)]
        await settled()
        waiting = []
        for number in range(3 * AT_WORK):
            waiting.append(asyncio.ensure_future(named(number)))
            await settled()
        fleet.may.set()
        await asyncio.gather(*at_work, *waiting)
        assert min(ends[:AT_WORK]) == 2 * AT_WORK
        assert max(ends[-AT_WORK:]) == AT_WORK - 1

    asyncio.run(go())


def test_who_left_while_waiting_holds_nobody_up(door: Any) -> None:
    async def go() -> None:
        fleet, leaves = Fleet(), asyncio.Event()
        ask = door(fleet)
        at_work = [asyncio.ensure_future(ask(site())) for _ in range(AT_WORK)]
        await settled()
        impatient = [asyncio.ensure_future(ask(site(leaves=leaves))) for _ in range(9)]
        patient = asyncio.ensure_future(ask(site()))
        await settled()
        leaves.set()
        await asyncio.gather(*impatient)
        assert fleet.left == 9
        assert fleet.at_work == AT_WORK
        fleet.may.set()
        await asyncio.gather(*at_work, patient)
        assert fleet.done == AT_WORK + 1

    asyncio.run(go())
