"""Which cells of the transfer matrix are more than chance, and in which sense."""

from __future__ import annotations

from typing import Literal

from cropkt.report import values
from cropkt.report.schema import TransferScore

Test = Literal[
    "p_half", "p_half_bh", "p_half_holm", "p_random", "p_random_bh", "p_random_holm", "two_se"
]
Transfer = dict[str, dict[str, TransferScore]]

LEVEL = 0.05
IN_WORDS: dict[Test, str] = {
    "p_random_bh": "differs from untrained experts, p < .05 after Benjamini-Hochberg",
    "p_half_bh": "differs from .5, p < .05 after Benjamini-Hochberg",
    "two_se": "more than 1.96 standard errors from .5, not corrected for the number of pairs",
}
"""What a figure says of the cells that it marks, by the answers of `strictest`."""


def strictest(transfer: Transfer) -> Test:
    """Return the comparison that marks a cell: with untrained experts if there is one."""
    tests: tuple[Test, ...] = ("p_random_bh", "p_half_bh")
    return next((test for test in tests if tested(transfer, test)), "two_se")


def tested(transfer: Transfer, test: Test) -> list[tuple[str, str]]:
    """Return the pairs of source and another target that a comparison was made for."""
    return [
        (source, target)
        for target, scores in sorted(transfer.items())
        for source, score in sorted(scores.items())
        if source != target and _p_value(score, test) is not None
    ]


def found(transfer: Transfer, test: Test) -> list[tuple[str, str]]:
    """Return the pairs of source and target that are significant."""
    return [
        (source, target)
        for source, target in tested(transfer, test)
        if significant(transfer[target][source], test)
    ]


def significant(score: TransferScore, test: Test) -> bool:
    """Tell whether a score is significant at 5 %, in the sense of a comparison."""
    if test == "two_se":
        c_index, se = values.finite(score.get("c_index")), values.finite(score.get("se"))
        return c_index is not None and se is not None and abs(c_index - 0.5) > 1.96 * se
    p_value = _p_value(score, test)
    return p_value is not None and p_value < LEVEL


def _p_value(score: TransferScore, test: Test) -> float | None:
    return None if test == "two_se" else values.finite(score.get(test))
