"""Patches on their way: the same bags, whatever the way."""

from __future__ import annotations

import logging
import pickle
import threading
import time

import numpy as np
import pytest
import torch

from cropkt.cohort import feed
from cropkt.cohort.feed import Held, packed, place_of, settled

CPU = torch.device("cpu")
GROUPS = [np.array([3, 1]), np.array([0]), np.array([2, 5, 4])]


@pytest.mark.parametrize("ahead", [0, 1 << 30])
@pytest.mark.parametrize("held", [True, False])
def test_groups_come_in_order_with_their_bags(make_cohort, monkeypatch, ahead, held) -> None:
    monkeypatch.setattr(feed, "AHEAD", ahead)
    cohort = make_cohort(patients=6)
    monkeypatch.setattr(feed, "free_memory", lambda: 1e12 if held else 0.0)
    settled_cohort, place = settled(cohort, CPU)
    assert place == ("host" if held else "streamed")
    for (group, bags), expected in zip(packed(settled_cohort, GROUPS), GROUPS, strict=True):
        assert group is expected
        whole = cohort.pack(group)
        assert torch.equal(bags.patches, whole.patches)
        assert torch.equal(bags.segment, whole.segment)


def test_at_most_one_group_is_read_ahead(make_cohort) -> None:
    cohort = make_cohort(patients=12)
    read, seen, plain = [], [], cohort.source.features

    def count(slide_id: str) -> torch.Tensor:
        read.append(slide_id[:4])
        return plain(slide_id)

    cohort.source.features = count
    groups = [np.array([i]) for i in range(12)]
    for at, _ in enumerate(packed(cohort, groups)):
        time.sleep(0.02)  # so that the reader could run away
        seen.append(at)
        assert len(set(read)) <= at + 2
    assert len(seen) == 12


def test_a_reader_ends_with_its_caller(make_cohort) -> None:
    before = threading.active_count()
    for _ in packed(make_cohort(), GROUPS):
        break
    assert threading.active_count() == before


def test_an_error_of_reading_ahead_reaches_the_caller(make_cohort) -> None:
    cohort = make_cohort(patients=6)
    del cohort.source.slides["s005-0"]
    with pytest.raises(KeyError):
        list(packed(cohort, GROUPS))


def test_what_is_held_is_read_once_and_does_not_travel(make_cohort) -> None:
    cohort = make_cohort(patients=6)
    read, plain = [], cohort.source.features
    held = Held(cohort.source, CPU)
    cohort.source.features = lambda slide_id: read.append(slide_id) or plain(slide_id)
    one, two = held.features("s001-0"), held.features("s001-0")
    assert one is two
    assert read == ["s001-0"]
    assert held.shape("s001-0") == tuple(one.shape)
    assert "s001-0" in held
    del cohort.source.features
    assert pickle.loads(pickle.dumps(held))._kept == {}


def test_where_a_cohort_lies_is_said_once(make_cohort, monkeypatch, caplog) -> None:
    monkeypatch.setattr(feed, "free_memory", lambda: 100.0)
    assert place_of(10, CPU) == "host"
    assert place_of(1000, CPU) == "streamed"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 1000))
    assert place_of(300, torch.device("cuda:0")) == "device"
    assert place_of(500, torch.device("cuda:0")) == "streamed"
    with caplog.at_level(logging.INFO):
        settled(make_cohort(patients=6), CPU)
    (line,) = caplog.messages
    assert "stay on the disk, and are read again in each pass" in line


def test_free_memory_is_some_of_the_machine_s() -> None:
    assert 0 < feed.free_memory() < 1 << 50
