"""What is concluded over all targets."""

from __future__ import annotations

import numpy as np
import pytest

from cropkt.report.schema import TargetResult, TransferScore
from cropkt_server.comparison import across_targets, adjust, experts


def matrix(
    rng: np.random.Generator, *, cancers: int = 12, good: int = 0
) -> dict[str, dict[str, TransferScore]]:
    """Return a transfer matrix in which the first `good` sources are worth .1 everywhere."""
    names = [f"C{i}" for i in range(cancers)]
    return {
        target: {
            source: {
                "c_index": float(0.5 + 0.1 * (i < good) + 0.03 * rng.standard_normal()),
                "se": 0.03,
                "lead": float(0.1 * (i < good) + 0.03 * rng.standard_normal()),
                "lead_se": 0.03,
            }
            for i, source in enumerate(names)
        }
        for target in names
    }


def enough(names: object) -> dict[str, TargetResult]:
    return {str(name): {"events": 20, "arms": {}} for name in names}  # type: ignore[attr-defined]


def test_nothing_is_found_where_nothing_is() -> None:
    """Over many matrices of chance, the share of any discovery is about the level."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        transfer = matrix(rng)
        adjust(transfer, enough(transfer))
        found = [s.get("p_random_bh") for row in transfer.values() for s in row.values()]
        wrong += any(p is not None and p <= 0.05 for p in found)
    assert wrong / 200 <= 0.09


def test_what_is_there_is_found_with_few_false_discoveries() -> None:
    rng = np.random.default_rng(1)
    true = false = 0
    for _ in range(20):
        transfer = matrix(rng, good=4)
        adjust(transfer, enough(transfer))
        for target, row in transfer.items():
            for source, score in row.items():
                p = score.get("p_half_bh")
                if source != target and p is not None and p <= 0.05:
                    good = int(source[1:]) < 4
                    true, false = true + good, false + (not good)
    assert true > 20 * 4 * 11 * 0.5
    assert false / (true + false) <= 0.07


def test_targets_with_few_events_and_the_diagonal_are_no_test() -> None:
    transfer = matrix(np.random.default_rng(2), cancers=3)
    targets = enough(transfer)
    targets["C0"]["events"] = 4
    transfer["C1"]["C2"] = {"c_index": None}
    adjust(transfer, targets)
    assert "p_half" not in transfer["C0"]["C1"]
    assert "p_half" not in transfer["C1"]["C1"]
    assert transfer["C1"]["C2"]["p_half"] is None
    tested = [transfer["C1"]["C0"], transfer["C2"]["C0"], transfer["C2"]["C1"]]
    for score in tested:
        p, bh, holm = score["p_half"], score["p_half_bh"], score["p_half_holm"]
        assert p is not None
        assert bh is not None
        assert holm is not None
        assert p <= bh <= holm <= min(1, 3 * p)


def test_arms_are_compared_over_targets_with_enough_events() -> None:
    def target(events: int, gain: float) -> TargetResult:
        return {
            "events": events,
            "arms": {
                "local": {"c_index": 0.6, "gain": 0.0},
                "auto": {
                    "c_index": 0.6 + gain,
                    "gain": gain,
                    "gain_se": 0.02,
                    "against": {
                        "self_only": {"value": gain / 2, "se": 0.02, "low": -1.0, "high": 1.0}
                    },
                },
            },
        }

    targets = {"A": target(30, 0.04), "B": target(9, 0.04), "C": target(4, -0.5)}
    found = across_targets(targets)
    assert found["auto"]["local"]["targets"] == 2
    assert found["auto"]["local"]["mean"] == pytest.approx(0.04)
    assert found["auto"]["self_only"]["mean"] == pytest.approx(0.02)
    assert "random_init" not in found["auto"]
    assert "local" not in found


def test_harmful_experts_are_named() -> None:
    rng = np.random.default_rng(3)
    transfer = matrix(rng, cancers=20, good=2)
    for row in transfer.values():
        for source, shift in (("C7", -0.1),):
            row[source]["c_index"] = 0.5 + shift + 0.03 * rng.standard_normal()
        row["C8"]["c_index"] = 0.5
    targets = enough(transfer)
    for target in targets.values():
        target["voices"] = {
            source: {
                "weight": 0.1,
                "weight_sd": 0.0,
                "cost": 0.0,
                "silent": 3 * (source == "C8"),
                "contrary": 3 * (source == "C7"),
            }
            for source in transfer
        }
    found = experts(transfer, targets)
    assert found["C0"]["verdict"] == found["C1"]["verdict"] == "helps"
    assert found["C7"]["verdict"] == "contrary"
    assert found["C8"]["verdict"] == "silent"
    assert {found[f"C{i}"]["verdict"] for i in range(9, 20)} <= {"no use", "unclear", "helps"}
    assert sum(found[f"C{i}"]["verdict"] == "helps" for i in range(9, 20)) <= 2
    assert found["C0"]["targets"] == 19
