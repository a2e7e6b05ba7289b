"""What networks do to a study: they are lost, fall silent, are slow, break again and again."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cropkt.cancers import Cancer
from cropkt.config import ExpertShape, TrainingConfig
from cropkt.messages import REPLIES, ExpertReply, load
from cropkt_client.log import LOG_NAME

pytestmark = pytest.mark.timeout(600)
SITES = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM}
LONG = TrainingConfig(epochs=60, learning_rate=1e-3)  # some seconds of training
LARGE = ExpertShape(dim=6, embed=640, attention=400)  # 2.1 MB of weights an expert
SHORT = TrainingConfig(epochs=2, minimum_updates=0, learning_rate=1e-3)
KINDS = (
    *("query.describe", "train.expert", "evaluate.transfer", "train.router"),
    "evaluate.release",
)
HEAVY = ("Sending: train.expert", "Receiving: evaluate.transfer", "Receiving: train.router")
LOST = 120.0  # seconds
SILENT = 20.0  # seconds
MEGABIT = 1e6 / 8  # bytes a second: 17 s an expert
NOTICED = 45.0  # seconds in which a silent connection is given up: 30 without a byte, and a wait


def prepare(federation: Any, relay: Any, **changes: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Set a study up behind the relay; return its results and experts if nobody disturbs it."""
    federation.configure(**changes)
    for seed, (site, cancer) in enumerate(SITES.items()):
        federation.add_site(site, cancer, seed=seed)
    expected = federation.simulated(SITES)
    federation.host = relay.host
    federation.init(min_sites=len(SITES), port=relay.target)
    return expected, experts(federation.folder / "simulation" / "study")


def weights(study: Path) -> dict[str, bytes]:
    """Return the weights of every expert that a coordinator keeps."""
    found = {}
    for path in sorted((study / "replies").glob("fit_expert~*.npz")):
        reply = load(path, expected=REPLIES)
        assert isinstance(reply, ExpertReply)
        found[path.name] = reply.weights.tobytes()
    return found


def experts(study: Path) -> dict[str, str]:
    """Return a hash of each of them."""
    return {name: hashlib.sha256(held).hexdigest() for name, held in weights(study).items()}


def crossed(log: str, step: str) -> float:
    """Return for how many seconds a message crossed the network, by the log of a SuperNode."""
    found = re.search(
        rf"^(\S+ \S+) .*{step} (?:.*\n)*?(\S+ \S+) .*(?:Sent|Received) successfully$", log, re.M
    )
    assert found is not None, step
    began, ended = (datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f") for at in found.groups())
    return (ended - began).total_seconds()


def all_train(federation: Any) -> bool:
    logs = [(federation.folder / f"{site}.log").read_text() for site in SITES]
    return all("train.expert: begins" in log for log in logs)


def say(text: str) -> None:
    sys.stderr.write(f"\n{text}\n")


def test_a_network_lost_for_two_minutes_costs_two_minutes(federation: Any, relay: Any) -> None:
    expected, undisturbed = prepare(federation, relay, training=LONG)
    coordinator, _ = federation.serve_all(SITES, "--linger", "0")
    federation.until(lambda: all_train(federation))
    assert not experts(federation.study), "the training is too short to be cut off in it"
    relay.lose()
    time.sleep(LOST)
    back = time.monotonic()
    relay.restore()
    federation.until(lambda: experts(federation.study) == undisturbed)
    experts_there = time.monotonic() - back
    assert coordinator.wait(120) == 0, federation.logs()
    say(
        f"network lost for {LOST:.0f} s in training: both experts are there "
        f"{experts_there:.0f} s after its end, the study is finished after "
        f"{time.monotonic() - back:.0f} s"
    )
    assert not federation.differences(federation.results(), expected)


def test_a_silent_connection_is_given_up(federation: Any, relay: Any) -> None:
    expected, undisturbed = prepare(federation, relay, training=LONG)
    coordinator, clients = federation.serve_all(SITES, "--linger", "0")
    federation.until(lambda: all_train(federation))
    fell = time.monotonic()
    relay.fall_silent()
    time.sleep(SILENT)
    relay.speak()
    federation.until(lambda: relay.opened[-1] > fell + SILENT)
    noticed = relay.opened[-1] - fell
    assert coordinator.wait(300) == 0, federation.logs()
    say(
        f"silent for {SILENT:.0f} s, and its connections for ever: a new connection after "
        f"{noticed:.0f} s, the study is finished after {time.monotonic() - fell:.0f} s"
    )
    assert noticed < NOTICED
    assert experts(federation.study) == undisturbed
    assert not federation.differences(federation.results(), expected)
    assert all(client.poll() is None for client in clients.values())


def test_a_slow_link_is_enough(federation: Any, relay: Any) -> None:
    expected, undisturbed = prepare(federation, relay, shape=LARGE, training=SHORT)
    relay.rate = MEGABIT
    began = time.monotonic()
    coordinator, _ = federation.serve_all(SITES, "--linger", "0")
    assert coordinator.wait(400) == 0, federation.logs()
    seconds = time.monotonic() - began
    say(
        f"1 Mbit/s each way: the study is finished after {seconds:.0f} s, with "
        f"{relay.up / 1e6:.1f} MB up and {relay.down / 1e6:.1f} MB down"
    )
    assert experts(federation.study) == undisturbed
    assert not federation.differences(federation.results(), expected)
    held = sum(map(len, weights(federation.study).values()))  # bytes
    assert held / MEGABIT > 30  # seconds: at once they take longer than Flower waits
    # All crosses once; of what goes down, each expert is scored at the other site, and routed.
    assert held < relay.up < 1.5 * held
    assert 2 * held < relay.down < 2.5 * held
    assert {task.tries for task in federation.tasks()} == {1}
    assert "message lost" not in (federation.folder / "server.log").read_text()
    for site in SITES:
        log = (federation.folder / f"{site}.log").read_text()
        assert [log.count(f"{kind}: begins") for kind in KINDS] == [1] * len(KINDS)
        assert "connection process ended" not in log
        log = (federation.state(site) / LOG_NAME).read_text()
        for step in HEAVY:
            assert crossed(log, step) > held / len(SITES) / MEGABIT


def test_a_network_that_keeps_breaking_loses_nothing(federation: Any, relay: Any) -> None:
    expected, undisturbed = prepare(federation, relay)
    coordinator, clients = federation.serve_all(SITES, "--linger", "0")
    began = time.monotonic()
    relay.cut = 0.05
    assert coordinator.wait(300) == 0, federation.logs()
    say(
        f"{relay.cuts} of {len(relay.opened)} connections broke: the study is finished after "
        f"{time.monotonic() - began:.0f} s"
    )
    assert relay.cuts > 5
    assert experts(federation.study) == undisturbed
    assert not federation.differences(federation.results(), expected)
    assert all(client.poll() is None for client in clients.values())
