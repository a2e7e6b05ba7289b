"""The terminal table and the sentences under it."""

from __future__ import annotations

import copy
import math

import pytest
from rich.console import Console
from rich.text import Text

from cropkt.report.schema import ArmResult, Results, TargetResult
from cropkt.report.sentences import difference, number, p_value, signed
from cropkt.report.tables import summary_lines, summary_table


def shown(results: Results, width: int = 140) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(summary_table(results))
    return capture.get()


def row_of(results: Results, cancer: str) -> str:
    return next(line for line in shown(results).splitlines() if line.startswith(cancer))


def small(**targets: TargetResult) -> Results:
    return {"endpoint": "DSS", "targets": dict(targets)}


def target(events: int | None = 21, **arms: ArmResult) -> TargetResult:
    return {"patients": 80, "events": events, "sites": 1, "arms": dict(arms)}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.653, ".65"), (1.0, "1.00"), (0.0, ".00"), (-0.031, "-.03"), (-0.001, ".00"), (-1, "-1.00")],
)
def test_numbers_lose_their_leading_zero(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "+.04"), (-0.04, "-.04"), (0.001, ".00"), (-0.001, ".00"), (1, "+1.00")],
)
def test_gains_carry_their_sign(value: float, text: str) -> None:
    assert signed(value) == text


def test_a_row_of_the_table_reads_as_promised() -> None:
    uvm = target(
        local={"c_index": 0.65, "low": 0.52, "high": 0.77},
        zero_shot={"c_index": 0.6, "low": 0.5, "high": 0.7},
        roupkt={"c_index": 0.694, "low": 0.6, "high": 0.8, "gain_low": 0.01, "gain_high": 0.08},
    )
    uvm["routing"] = {"self": 0.41, "SKCM": 0.3, "UVM": 0.1, "OV": 0.05, "ACC": 0.05, "UCS": 0.04}
    uvm["zero_shot_choice"] = {"SKCM": 1, "vote": 4}
    assert row_of(small(UVM=uvm), "UVM").split() == [
        "UVM", "80/21", ".65", "(.52-.77)", ".60", "(.50-.70)", "vote", "4/5", ".69",
        "(.60-.80)", "+.04*", "SKCM", ".30,", "ACC", ".05,", "OV", ".05",
    ]  # fmt: skip


def test_not_estimable_and_not_evaluated_read_differently() -> None:
    none: ArmResult = {"c_index": None, "reason": "2 deaths, 11 comparable pairs"}
    results = small(
        DLBC=target(2, local=none, roupkt=none), PCPG=target(None, local={"c_index": 0.6})
    )
    assert row_of(results, "DLBC").split() == ["DLBC", "80/2", "n/e", "-", "n/e", "n/e", "-"]
    assert row_of(results, "PCPG").split() == ["PCPG", "80/-", ".60", "-", "-", "-", "-"]
    assert "n/e: not estimable" in shown(results)
    assert "-: not evaluated" in " ".join(shown(results).split())
    lines = summary_lines(results)
    assert "Not estimable: DLBC local, ROUPKT (2 deaths, 11 comparable pairs)." in lines
    assert "No cancer has 5 events, so no mean is given." in lines


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_no_number_ever_stands_in_for_a_missing_one(bad: float | None) -> None:
    results = small(UVM=target(local={"c_index": 0.65}, roupkt={"c_index": bad}))
    assert ".50" not in shown(results)
    assert "nan" not in shown(results)
    assert row_of(results, "UVM").split() == ["UVM", "80/21", ".65", "-", "n/e", "n/e", "-"]


def test_a_router_that_keeps_to_itself_is_said_to_have_no_helper() -> None:
    uvm = target(local={"c_index": 0.65})
    uvm["routing"] = {"self": 0.998, "SKCM": 0.002}
    assert row_of(small(UVM=uvm), "UVM").split()[-1] == "nobody"


def test_sources_that_weigh_alike_are_not_named() -> None:
    def voiced(*weights: float) -> TargetResult:
        uvm = target(local={"c_index": 0.6})
        uvm["voices"] = {
            f"C{i}": {"weight": w, "weight_sd": 0.0, "cost": None, "silent": 0, "contrary": 0}
            for i, w in enumerate(weights)
        }
        return uvm

    alike = row_of(small(UVM=voiced(0.1, 0.1, 0.11, 0.12)), "UVM")
    assert alike.rstrip().endswith("all alike: .43")
    one_stands_out = row_of(small(UVM=voiced(0.3, 0.1, 0.1, 0.1)), "UVM")
    assert "C0 .30" in one_stands_out
    assert "alike" not in one_stands_out


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_number_is_cut_off_on_a_narrow_terminal(results: Results, width: int) -> None:
    text = shown(results, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for part in ("(.52-.79)", "COADREAD", "+.06*", "n/e"):
        assert part in text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_guarded_answer_fits_a_narrow_terminal_too(full: Results, width: int) -> None:
    text = shown(full, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for part in ("n/deaths", "1064/83", "ROUPKT+", "auto", "gain: auto minus local"):
        assert part in text


def test_the_headline_is_the_guarded_answer_if_there_is_one(full: Results) -> None:
    lines = summary_lines(full)
    assert lines[0].startswith("Mean C-index over 22 cancers with at least 5 events: local ")
    assert any(line.startswith("auto is above local in") for line in lines)
    uvm = target(local={"c_index": 0.6}, roupkt={"c_index": 0.7}, auto={"c_index": 0.65})
    uvm["routing"] = {"self": 0.5, "SKCM": 0.5}
    uvm["voices"] = {
        "OV": {"weight": 0.25, "weight_sd": 0.1, "cost": None, "silent": 0, "contrary": 0}
    }
    row = row_of(small(UVM=uvm), "UVM").split()
    assert row == ["UVM", "80/21", ".60", "-", ".70", ".65", "+.05", "OV", ".25"]
    uvm["arms"]["roupkt+"] = {"c_index": 0.8}
    assert ".80" in row_of(small(UVM=uvm), "UVM")
    del uvm["arms"]["auto"]
    assert "+.20" in row_of(small(UVM=uvm), "UVM")


@pytest.mark.parametrize(
    ("value", "ends", "text"),
    [
        (0.04, (0.012, 0.068), "+.04 (+.01 to +.07)"),
        (-0.013, (-0.03, -0.002), "-.013 (-.030 to -.002)"),
        (0.04, None, "+.04"),
        (0.0, (0.0, 0.0), ".00 (.00 to .00)"),
    ],
)
def test_the_sign_of_an_end_is_never_rounded_away(
    value: float, ends: tuple[float, float] | None, text: str
) -> None:
    assert difference(value, ends) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0002, "p < .001"), (0.0312, "p = .031"), (0.0499, "p = .050"), (0.5, "p = .50")],
)
def test_p_values(value: float, text: str) -> None:
    assert p_value(value) == text


def test_gains_are_coloured_and_signed() -> None:
    up = target(local={"c_index": 0.6}, roupkt={"c_index": 0.7})
    down = target(local={"c_index": 0.7}, roupkt={"c_index": 0.6})
    columns = summary_table(small(A=up, B=down)).columns
    cells = [c for c in next(c for c in columns if c.header == "gain").cells if isinstance(c, Text)]
    assert [(c.plain.strip(), c.style) for c in cells] == [("+.10", "green"), ("-.10", "red")]


def test_words_follow_the_endpoint(results: Results) -> None:
    assert "deaths" in shown(results)
    results["endpoint"] = "PFI"
    assert "deaths" not in shown(results)
    assert "events" in shown(results)


def test_means_judge_all_arms_on_the_same_cancers() -> None:
    results = small(
        A=target(local={"c_index": 0.6}, roupkt={"c_index": 0.7}),
        B=target(local={"c_index": 0.8}, roupkt={"c_index": None}),
        C=target(4, local={"c_index": 0.1}, roupkt={"c_index": 0.1}),
        D=target(local={"c_index": 0.7}, roupkt={"c_index": 0.6}, stack={"c_index": 0.9}),
    )
    lines = summary_lines(results)
    assert lines[:3] == [
        "Mean C-index over 2 cancers with at least 5 events: local .650, ROUPKT .650.",
        "Left out of the mean, for want of an arm: B.",
        "stack: mean C-index .900 against local .700, over 1 cancer.",
    ]


def test_gains_beyond_noise_are_claimed_only_from_intervals(results: Results) -> None:
    bare = small(
        A=target(
            local={"c_index": 0.6, "low": 0.59, "high": 0.61},
            roupkt={"c_index": 0.9, "low": 0.89, "high": 0.91},
        ),
    )
    text = " ".join(summary_lines(bare))
    assert "no interval of a gain is given, so none can be told from noise" in text
    assert "overlap in 0 of 1 cancer" in text
    assert "*" not in row_of(bare, "A")
    bare["targets"]["A"]["arms"]["roupkt"] |= {"gain_low": 0.2, "gain_high": 0.4}
    assert "The interval of the gain lies above 0 in 1 (A) and below 0 in none." in summary_lines(
        bare
    )
    bare["targets"]["A"]["events"] = 4
    assert "*" not in row_of(bare, "A")


def test_planted_relatives_and_failures_are_named(results: Results) -> None:
    lines = summary_lines(results)
    assert (
        "Synthetic data: routing put more weight on the planted relatives than on the rest for "
        "23 of 26 targets." in lines
    )
    assert "Failed: UVM/fit_router (site lost)." in lines
    del results["planted"]
    assert not any("Synthetic" in line for line in summary_lines(results))


def test_an_empty_study_says_so() -> None:
    assert summary_lines({}) == ["No target was evaluated."]
    failed: Results = {"failed": [{"row": "UVM/describe"}]}
    assert summary_lines(failed)[-1] == "Failed: UVM/describe (no cause recorded)."
    assert "cancer" in shown({})


def test_markup_in_a_name_is_text() -> None:
    uvm = target(local={"c_index": 0.6})
    uvm["routing"] = {"[red]X[/red]": 0.5}
    assert "[red]X[/red] .50" in shown(small(UVM=uvm))


def test_results_are_not_changed(results: Results) -> None:
    before = copy.deepcopy(results)
    summary_lines(results)
    shown(results)
    assert results == before
