"""What the network swallowed is found by what a node asks for next."""

from __future__ import annotations

import pytest

from cropkt_server.under_way import Pieces, UnderWay

NODE, OTHER = 1, 2


class Stored:
    """Pieces of answers that have come in, and who is online."""

    def __init__(self) -> None:
        self.pieces: set[str] = set()
        self.online = {NODE, OTHER}

    def judge(self, under_way: UnderWay, *messages: str) -> tuple[set[str], set[str]]:
        def whole(pieces: Pieces) -> bool:
            return self.pieces.issuperset(pieces)

        return under_way.judge(messages, whole=whole, online=lambda: self.online)


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def under_way() -> UnderWay:
    under_way = UnderWay()
    under_way.sent("a", NODE)
    under_way.sent("b", OTHER)
    return under_way


def test_a_message_that_is_worked_on_is_waited_for(under_way: UnderWay, stored: Stored) -> None:
    under_way.asked(NODE)  # takes it
    assert stored.judge(under_way, "a", "b") == (set(), set())


def test_who_asks_again_has_lost_the_message(under_way: UnderWay, stored: Stored) -> None:
    under_way.asked(NODE)
    under_way.asked(NODE)
    assert stored.judge(under_way, "a", "b") == ({"a"}, set())


def test_half_an_answer_is_waited_for_until_its_node_goes_on(
    under_way: UnderWay, stored: Stored
) -> None:
    under_way.asked(NODE)
    under_way.answered("a", NODE, ["tree", "weights"])
    stored.pieces.add("tree")
    assert stored.judge(under_way, "a") == (set(), {"a"})
    under_way.asked(NODE)
    assert stored.judge(under_way, "a") == ({"a"}, set())


def test_half_an_answer_of_a_node_that_is_gone_is_lost(under_way: UnderWay, stored: Stored) -> None:
    under_way.answered("a", NODE, ["weights"])
    stored.online.remove(NODE)
    assert stored.judge(under_way, "a") == ({"a"}, set())


def test_a_whole_answer_is_never_lost(under_way: UnderWay, stored: Stored) -> None:
    under_way.asked(NODE)
    under_way.asked(NODE)
    under_way.answered("a", NODE, ["weights"])
    stored.pieces.add("weights")
    for _ in range(3):
        under_way.asked(NODE)
    assert stored.judge(under_way, "a") == (set(), set())


def test_nobody_answers_for_another(under_way: UnderWay, stored: Stored) -> None:
    under_way.answered("b", NODE, ["weights"])
    assert stored.judge(under_way, "b") == (set(), set())
    assert (under_way.of(NODE), under_way.of(OTHER)) == ({"a"}, {"b"})


def test_what_was_taken_is_forgotten(under_way: UnderWay, stored: Stored) -> None:
    under_way.taken("a")
    assert under_way.of(NODE) == set()
    under_way.forget()
    assert under_way.of(OTHER) == set()
    assert stored.judge(under_way, "a", "b") == (set(), set())
