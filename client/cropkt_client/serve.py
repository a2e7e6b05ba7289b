"""The process that serves a study, for weeks: one at a time for each state folder.

It keeps a SuperNode connected and an executor at work, and asks the coordinator for a hello now
and then: to know whether it answers, and when the study is closed. Where the coordinator lets the
SuperNode in no more, it is asked, with this site's signature, whether it cut the site off: if so,
serving ends, also in the middle of a task.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cropkt import lock
from cropkt.bundle import bundle_hash
from cropkt.cancers import Cancer
from cropkt.errors import (
    ConfigError,
    CropktError,
    RevokedSiteError,
    UnavailableError,
    UsageError,
    VersionMismatchError,
)
from cropkt_client.enrol import Enrolment, Keys
from cropkt_client.link import MAX_SKEW, Coordinator, Hello, check_versions, skew
from cropkt_client.log import Status, open_log
from cropkt_client.supernode import SuperNode, settle_environment
from cropkt_client.trust import note_revoked
from cropkt_client.worker import Worker

if TYPE_CHECKING:
    from cropkt_client.executor import Executor

_LOCK = "client.lock"

TICK, POLL, POLL_LOST = 0.5, 60.0, 10.0  # seconds: a look around, a hello, a hello while cut off

log = logging.getLogger("cropkt.client")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a client needs to know before it serves."""

    config: Path  # absolute path of site.yaml
    state: Path
    cancers: tuple[Cancer, ...]  # those of site.yaml that are served now
    device: str  # auto, cuda[:i], cpu or mps
    enrolment: Enrolment
    coordinator: Coordinator


def serve(place: Place) -> None:
    """Serve until the study is closed.

    Raises:
        CropktError: this site cannot serve; says why.
        KeyboardInterrupt: it was interrupted; SystemExit(143) for SIGTERM.
    """
    with locked(place.state), _terminable():
        open_log(place.state, terminal=True)
        settle_environment(place.state)
        status = Status(place.state, site=place.enrolment.site, study=place.enrolment.study)
        try:
            check_device(place.device)
            hello = _first_hello(place, status)
            if not hello.closed:
                _serve(place, status, ahead=skew(hello))
        except CropktError as error:
            log.error("%s", error)
            status.failed(str(error))
            raise
        status.closed()
        log.info("the study is closed")


def _serve(place: Place, status: Status, *, ahead: float) -> None:
    from cropkt_client.executor import Executor  # Flower loads here, in a settled environment
    from cropkt_client.gate import Gate

    node = SuperNode(
        host=place.enrolment.host,
        state=place.state,
        node_config={"config": str(place.config), "cancers": " ".join(place.cancers)},
        report=status.failed,
        barred=lambda: _ask_whether_cut_off(place, node.ahead),
    )
    node.ahead = ahead
    executor = Executor(
        address=lambda: node.address,
        secret=node.secret,
        worker=Worker("cropkt_client.executor:run_app", {"CROPKT_DEVICE": place.device}),
        bundle=bundle_hash(),
        gate=Gate(site=place.enrolment.site, state=place.state),  # lets out failures only
        status=status,
    )
    try:
        executor.start()
        _watch(place, status, node, executor)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # ending must not be cut off half-way
        executor.stop()
        node.stop()


def check_device(name: str) -> None:
    """Ask torch, in a process of its own, whether it finds a device that was named.

    Raises:
        UsageError: it does not.
    """
    if name in ("auto", "cpu"):
        return
    worker = Worker("cropkt.experts.device:problem_with_device")
    try:
        problem = worker.call(name)
    finally:
        worker.stop()
    if problem:
        raise UsageError("--device", problem, "Name another, or auto, or check the GPU driver")


def _first_hello(place: Place, status: Status) -> Hello:
    """Return the coordinator's hello, however long it takes to answer."""
    while True:
        try:
            hello = place.coordinator.hello()
            break
        except UnavailableError as error:
            if status.state.error != str(error):
                log.warning("%s Trying on", error)
            status.failed(str(error))
            time.sleep(POLL_LOST)
    check(hello, place.enrolment)
    note_revoked(place.state, hello.revoked)
    status.connected(True)
    log.info("%s serves study %s at %s", *(status.state.site, hello.study, place.enrolment.host))
    ahead = skew(hello)
    if abs(ahead) > MAX_SKEW:
        text = f"this clock is {ahead:+.0f} s from the coordinator's; set both by NTP"
        log.warning("%s", text)
        status.failed(text)
    return hello


def check(hello: Hello, enrolment: Enrolment) -> None:
    """Compare a hello with what this site has installed and joined.

    Raises:
        VersionMismatchError: the versions do not go together.
        ConfigError: it is another study's coordinator.
    """
    check_versions(hello)
    if hello.study != enrolment.study:
        problem = f"this is the coordinator of study {hello.study}, not of {enrolment.study}"
        raise ConfigError(enrolment.host, problem, "Enrol with an invite to that study")


def _watch(place: Place, status: Status, node: SuperNode, executor: Executor) -> None:
    """Keep the SuperNode running until the study is closed and no task is at work."""
    due, over, why = time.monotonic() + POLL, False, None
    while not (over and executor.stop_when_idle()):
        node.tend()
        time.sleep(TICK)
        if over or time.monotonic() < due:
            continue
        try:
            hello = place.coordinator.hello()
            node.ahead = skew(hello)
            if status.connected(True):
                log.info("the coordinator answers again")
            over = hello.closed
            check(hello, place.enrolment)
            note_revoked(place.state, hello.revoked)
        except (VersionMismatchError, ConfigError) as error:
            over, why = True, error  # what is at work may still be answered
        except CropktError as error:
            if status.connected(False):
                log.warning("%s Trying on", error)
            status.failed(str(error))
        due = time.monotonic() + (POLL if status.state.connected else POLL_LOST)
    if why is not None:
        raise why


def _ask_whether_cut_off(place: Place, ahead: float) -> None:
    """Ask the coordinator how this site stands; any other answer than that it is revoked may pass.

    Args:
        place: of this site.
        ahead: seconds by which this clock is ahead of the coordinator's.

    Raises:
        RevokedSiteError: the coordinator cut this site off.
    """
    try:
        keys = Keys.of(place.state)
        place.coordinator.knock(place.enrolment.knock(keys, at=time.time() - ahead))
    except RevokedSiteError:
        raise
    except CropktError as error:  # a clock has been set, a roster came from a backup, it is away
        log.warning("%s Trying on", error)


def locked(state: Path) -> AbstractContextManager[None]:
    """Hold a state folder, for one client at a time.

    Raises:
        UsageError: on entry, if another client holds it.
    """
    return lock.locked(
        state / _LOCK, holder="another client", fix="Stop it with cropkt-client stop"
    )


def running(state: Path) -> int | None:
    """Return the process id of the client that holds a state folder, or None."""
    return lock.running(state / _LOCK)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, with exit code 143."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
