"""The CSV files: what stands in which cell, and that nothing stands in for a gap."""

from __future__ import annotations

import io

import pandas as pd
import pytest

from cropkt.report.csv_files import csv_files
from cropkt.report.schema import Results


def read(results: Results, name: str, index: str | list[str]) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(csv_files(results)[name]), index_col=index)


def test_transfer_is_square_and_has_sources_as_rows(results: Results) -> None:
    table = read(results, "transfer.csv", "source")
    assert table.shape == (26, 52)
    assert list(table.columns[:26]) == list(table.index)
    assert list(table.columns[26:]) == [f"{cancer}_se" for cancer in table.index]
    score = results["transfer"]["UVM"]["SKCM"]
    assert table.loc["SKCM", "UVM"] == pytest.approx(score["c_index"], abs=1e-6)
    assert table.loc["SKCM", "UVM_se"] == pytest.approx(score["se"], abs=1e-6)
    assert table["TGCT"].isna().all()
    assert table["TGCT_se"].isna().all()
    assert table.loc["TGCT"].drop(["TGCT", "TGCT_se"]).notna().all()


def test_transfer_stays_square_when_sources_and_targets_differ() -> None:
    results: Results = {
        "transfer": {"UVM": {"SKCM": {"c_index": 0.6}, "OV": {"c_index": None, "se": 0.1}}}
    }
    assert csv_files(results)["transfer.csv"].decode() == (
        "source,OV,SKCM,UVM,OV_se,SKCM_se,UVM_se\nOV,,,,,,\nSKCM,,,0.600000,,,\nUVM,,,,,,\n"
    )


def test_a_study_without_anything_has_headers_only() -> None:
    files = csv_files({})
    assert files["transfer.csv"] == b"source\n"
    assert set(files) == {"transfer.csv", "pairs.csv", "per_cancer.csv", "arms.csv"}
    assert all(content.count(b"\n") == 1 for content in files.values())


def test_pairs_hold_leads_and_every_p_value(full: Results) -> None:
    table = read(full, "pairs.csv", ["target", "source"])
    assert len(table) == 26 * 26
    score = full["transfer"]["UVM"]["SKCM"]
    row = table.loc["UVM", "SKCM"]
    for key in ("c_index", "lead", "p_half", "p_random_bh", "p_random_holm"):
        assert row[key] == pytest.approx(score[key], rel=1e-3, abs=1e-6)
    assert table.loc["TGCT"].isna().all(axis=None)


def test_per_cancer_has_every_arm_the_gain_and_the_controls(full: Results) -> None:
    table = read(full, "per_cancer.csv", "cancer")
    arms = full["targets"]["UVM"]["arms"]
    uvm = table.loc["UVM"]
    assert (uvm["patients"], uvm["events"], uvm["sites"]) == (80, 21, 6)
    for arm, found in arms.items():
        assert uvm[f"{arm}_c_index"] == pytest.approx(found["c_index"], abs=1e-6)
    assert uvm["headline"] == "auto"
    assert uvm["gain"] == pytest.approx(uvm["auto_c_index"] - uvm["local_c_index"], abs=2e-6)
    assert uvm["gain_low"] == pytest.approx(arms["auto"]["gain_low"], abs=1e-6)
    over = arms["auto"]["against"]["random_init"]
    assert uvm["over_random_init_low"] == pytest.approx(over["low"], abs=1e-6)
    assert uvm["transfer"] == "yes"
    assert uvm["auto_share"] == pytest.approx(full["targets"]["UVM"]["auto"]["share"], abs=1e-6)
    assert pd.isna(table.loc["TGCT", "gain"])
    assert pd.isna(table.loc["TGCT", "local_c_index"])


def test_an_older_study_leaves_the_new_columns_empty(results: Results) -> None:
    table = read(results, "per_cancer.csv", "cancer")
    assert set(table["headline"]) == {"roupkt"}
    assert table["gain"].notna().sum() == 25
    assert table[["transfer", "over_self_only", "auto_share"]].isna().all(axis=None)


def test_arms_are_one_row_a_target_and_arm(full: Results) -> None:
    table = read(full, "arms.csv", ["target", "arm"])
    assert len(table) == 26 * 15
    found = full["targets"]["UVM"]["arms"]["auto"]
    row = table.loc["UVM", "auto"]
    assert row["gain_high"] == pytest.approx(found["gain_high"], abs=1e-6)
    assert row["over_self_only"] == pytest.approx(found["against"]["self_only"]["value"], abs=1e-6)
    assert row["auc3"] == pytest.approx(found["auc"][1], abs=1e-6)
    assert pd.isna(row["auc1"])
    assert pd.isna(row["megabytes"])
    assert row["received_megabytes"] == 120
    assert row["log_rank"] == pytest.approx(found["log_rank"], rel=1e-3, abs=1e-6)
    assert table.loc[("TGCT", "auto"), "reason"] == "3 deaths, 11 comparable pairs"


def test_few_shot_is_one_row_a_draw_and_voices_one_an_expert(full: Results) -> None:
    shots = read(full, "few_shot.csv", ["target", "patients", "arm"])
    assert len(shots) == 5 * (3 * 5 + 1) * 3
    assert list(shots.loc[[("UVM", "all", "auto")], "draw"]) == [1]
    assert list(shots.loc[("UVM", "20", "auto"), "draw"]) == [1, 2, 3, 4, 5]
    voices = read(full, "voices.csv", ["target", "source"])
    assert len(voices) == 26 * 26
    assert voices.loc["UVM"]["weight"].sum() == pytest.approx(1, abs=1e-4)


def test_a_tiny_p_value_is_not_zero_and_a_formula_is_text(few: Results) -> None:
    few["targets"]["=1+1"] = few["targets"].pop("CHOL")
    few["transfer"]["UVM"]["UVM"]["p_half"] = 1e-12
    files = csv_files(few)
    assert b"1.000e-12" in files["pairs.csv"]
    assert b"\n'=1+1," in files["per_cancer.csv"]
