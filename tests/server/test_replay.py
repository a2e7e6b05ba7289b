"""A signature counts once, as long as Flower takes it; nobody else's flood makes it forgotten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cropkt_server import replay
from cropkt_server.replay import WINDOW, Seen


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def first(clock: Clock) -> Callable[..., bool]:
    seen = Seen(clock=clock)
    return lambda r, s=1, key="a": seen.first(key, encode_dss_signature(r, s))


def test_it_counts_once_whatever_its_second_half(first: Callable[..., bool]) -> None:
    assert first(5)
    assert not first(5)
    assert not first(5, 2)
    assert first(6)
    assert first(5, key="b")


def test_it_is_remembered_for_the_window(first: Callable[..., bool], clock: Clock) -> None:
    assert first(5)
    clock.now = WINDOW - 0.1
    assert first(6)
    assert not first(5)
    clock.now = WINDOW
    assert first(5)
    assert not first(6)


def test_memory_is_bounded_by_key(
    first: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST", 3)
    assert first(1, key="honest")
    assert all(first(r) for r in range(1, 6))
    assert not first(5)
    assert not first(1, key="honest")
    assert first(1)  # the oldest of the key that sent so many


def test_what_is_no_signature_never_counts() -> None:
    assert not Seen().first("a", b"")
    assert not Seen().first("a", b"nonsense")


def test_what_was_let_go_counts_again() -> None:
    seen, signature = Seen(), encode_dss_signature(5, 1)
    assert seen.first("a", signature)
    seen.forget("a", signature)
    assert seen.first("a", signature)
