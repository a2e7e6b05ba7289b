"""`cropkt-client predict` on a small hospital: answers, refusals, files that stay private."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cropkt.cancers import Cancer
from cropkt.config import StudyConfig
from cropkt.experts.card import hash_of
from cropkt.messages import ExpertRequest, ReleaseRequest, RouterRequest
from cropkt.prediction.kept import Kept
from cropkt_client import tasks
from cropkt_client.cli import app
from cropkt_client.site import Site
from cropkt_client.trust import note_revoked

UVM, SKCM, KIPAN = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN
DIM = 6
SECRET = "SECRETPATIENT"


@pytest.fixture(scope="module")
def hospital(
    tmp_path_factory: pytest.TempPathFactory,
    study_of_small: StudyConfig,
    write: Callable[..., Path],
) -> Site:
    """Return a hospital to which a study has released a model."""
    root, study = tmp_path_factory.mktemp("hospitals"), replace(study_of_small, arms=("auto",))
    sites = {}
    for seed, cancer in enumerate((UVM, KIPAN, SKCM)):
        (root / cancer).mkdir()
        sites[cancer] = Site.load(
            write(root / cancer, cancer, seed=seed, encoder="UNI2-h", magnification=20)
        )
    replies = {
        cancer: tasks.fit_expert(ExpertRequest(task="t", study=study, cancer=cancer), site)
        for cancer, site in sites.items()
    }
    others, mine = (KIPAN, SKCM), sites[UVM]
    request = RouterRequest(
        task="t",
        study=study,
        cancer=UVM,
        sources=others,
        weights=np.concatenate([replies[cancer].weights for cancer in others]),
        signed=tuple(replies[cancer].signed for cancer in others),
    )
    tasks.fit_router(request, mine)
    tasks.release(ReleaseRequest(task="t", study=study, cancer=UVM), mine)
    return mine


def slide(
    path: Path,
    *,
    width: int = DIM,
    coords: bool = True,
    patches: int = 20,
    seed: int = 0,
    **about: Any,
) -> Path:
    """Write a slide as TRIDENT does: 20 patches of 512 pixels on a grid."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = rng.normal(size=(patches, width)).astype("float32")
        if coords:
            grid = np.stack([np.arange(patches) % 5, np.arange(patches) // 5], 1) * 512
            file["coords"] = grid
            file["coords"].attrs.update(about)
    return path


def run(site: Site, *arguments: object, expect: int = 0) -> str:
    """Run predict on the hospital and return what it prints."""
    config = site.folder / "site.yaml"
    whole = ["predict", "--cancer", "UVM", "--config", config, "--device", "cpu", *arguments]
    result = CliRunner().invoke(app, [str(argument) for argument in whole])
    assert result.exit_code == expect, result.output
    return result.output


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_one_patient_of_two_slides(hospital: Site, tmp_path: Path) -> None:
    for number in range(2):
        slide(tmp_path / f"in/s{number}.h5", seed=number, patch_size_level0=512)
    said = run(hospital, "--slides", tmp_path / "in", "--out", tmp_path / "out", "--json")
    assert json.loads(said) == {
        "patients": 1,
        "slides": 2,
        "patches": 40,
        "in_training": 0,
        "heat_maps": 2,
        "without_coords": 0,
        "out": str(tmp_path / "out"),
    }
    (row,) = rows(tmp_path / "out/predictions.csv")
    assert row["group"] in ("low", "high")
    assert row["in_training"] == "no"
    for year in (1, 3, 5):
        low, value, high = (float(row[f"survival_{year}y{x}"]) for x in ("_low", "", "_high"))
        assert 0 <= low <= value <= high <= 1
    experts = rows(tmp_path / "out/experts.csv")
    assert sum(float(one["weight"]) for one in experts) == pytest.approx(1, abs=1e-5)
    assert {one["expert"] for one in experts} <= {UVM, KIPAN, SKCM}
    told = json.loads((tmp_path / "out/predictions.json").read_text())
    assert told["notice"] == "Research software, not a medical device."
    assert "95 % interval over bootstrap samples" in told["interval"]
    attention = rows(tmp_path / "out/patient/attention.csv")
    assert len(attention) == 40 * (1 + len(experts))
    answer = [float(one["attention"]) for one in attention if one["expert"] == "answer"]
    assert sum(answer) == pytest.approx(1, abs=1e-4)


def test_the_page_says_what_it_is_and_loads_nothing(hospital: Site, tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    slide(tmp_path / "in/s.h5", patch_size_level0=512)
    out = tmp_path / "out"
    run(hospital, "--slides", tmp_path / "in", "--out", out, "--patient", name)
    (page,) = out.glob("*/page.html")
    text = page.read_text()
    assert text.count("Research software, not a medical device.") >= 2
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "url(http" not in text
    assert "95 % interval" in text


def test_what_is_written_is_private_and_nothing_is_said_of_patients(
    hospital: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    slide(tmp_path / f"in/{SECRET}-1.h5", patch_size_level0=512)
    said = run(hospital, "--slides", tmp_path / "in", "--out", tmp_path / "out")
    assert said.startswith("1 patient, 1 slide, 20 patches")
    assert SECRET not in said + caplog.text
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_training_patients_get_what_the_guard_finally_says(hospital: Site, tmp_path: Path) -> None:
    run(
        *(hospital, "--slides", hospital.folder / "pack", "--out", tmp_path / "out"),
        *("--table", hospital.folder / "outcomes.csv"),
    )
    found = rows(tmp_path / "out/predictions.csv")
    assert {row["in_training"] for row in found} == {"yes"}
    kept = hospital.kept("UVM/predictions")
    assert kept is not None
    assert [row["patient"] for row in found] == list(kept["patients"])
    assert [float(row["risk"]) for row in found] == pytest.approx(kept["risk_final"], abs=1e-5)
    assert sum(row["group"] == "high" for row in found) == len(found) / 2
    run(
        *(hospital, "--slides", hospital.folder / "pack", "--out", tmp_path / "local"),
        *("--table", hospital.folder / "outcomes.csv", "--model", "local"),
    )
    local = [float(row["risk"]) for row in rows(tmp_path / "local/predictions.csv")]
    assert local == pytest.approx(kept["risk_local"], abs=1e-5)


def test_a_table_without_outcomes_names_patients_and_slides(hospital: Site, tmp_path: Path) -> None:
    for number in range(3):
        slide(tmp_path / f"in/s{number}.h5", seed=number)
    table = tmp_path / "patients.csv"
    table.write_text("patient_id,slide_id\nb,s2\na,s0\na,s1\n")
    inputs = ("--slides", tmp_path / "in", "--table", table)
    run(hospital, *inputs, "--out", tmp_path / "out")
    found = rows(tmp_path / "out/predictions.csv")
    assert [(row["patient"], row["slides"]) for row in found] == [("a", "2"), ("b", "1")]
    table.write_text("patient_id\ns0\ns1\n")
    run(hospital, *inputs, "--out", tmp_path / "by-name")
    assert len(rows(tmp_path / "by-name/predictions.csv")) == 2
    for text, words in (
        ("patient_id,slide_id\na,s9\n", "no file for a slide"),
        ("patient_id,slide_id\na,s0\nb,s0\n", "lists a slide twice"),
        ("patient_id\nsomebody\n", "1 patients have no slide"),
        ("name\na\n", "has no column patient_id"),
    ):
        table.write_text(text)
        said = run(hospital, *inputs, "--out", tmp_path / "never", expect=65)
        assert words in said
        assert not (tmp_path / "never").exists()


def test_many_slides_need_a_word_on_whose_they_are(hospital: Site, tmp_path: Path) -> None:
    for number in range(21):
        slide(tmp_path / f"in/s{number}.h5", patches=2, coords=False)
    inputs = (hospital, "--slides", tmp_path / "in", "--out", tmp_path / "out")
    assert "without saying whose" in run(*inputs, expect=64)
    run(*inputs, "--patient", "anna")
    assert "no heat map can be drawn" in (tmp_path / "out/anna/page.html").read_text()
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(
    ("about", "folder", "words"),
    [
        ({"target_magnification": 40}, "in", "its patches are at 40x, the model's 20x"),
        ({}, "40x_256px_0px_overlap/features_uni_v2", "at 40x"),
        ({"encoder": "virchow2"}, "in", "are of encoder virchow2, the model reads UNI2-h"),
        ({}, "20x_256px_0px_overlap/features_conch_v15", "of encoder conch_v15"),
        ({"width": 7}, "in", "features are 7 wide, the model reads 6"),
        ({"patches": 0}, "in", "bag is empty"),
    ],
)
def test_other_slides_are_refused(
    hospital: Site, tmp_path: Path, about: dict[str, Any], folder: str, words: str
) -> None:
    slide(tmp_path / folder / "s.h5", **about)
    said = run(*(hospital, "--slides", tmp_path / folder, "--out", tmp_path / "out"), expect=65)
    assert words in said
    assert not (tmp_path / "out").exists()


def test_slides_of_the_same_making_are_taken(hospital: Site, tmp_path: Path) -> None:
    folder = tmp_path / "20x_256px_0px_overlap/features_uni_v2"
    path = slide(folder / "s.h5", target_magnification=20, patch_size=256, patch_size_level0=512)
    run(hospital, "--slides", path, "--out", tmp_path / "out")


def test_a_site_without_released_model_says_what_to_do(
    hospital: Site, write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Site.load(write(tmp_path / "other", UVM, seed=0))
    path = slide(tmp_path / "s.h5")
    said = run(other, "--slides", path, "--out", tmp_path / "out", expect=78)
    assert "no model of UVM has been released here yet" in said
    assert "cropkt-client status" in said


def test_an_expert_revoked_since_is_not_heard(hospital: Site, tmp_path: Path) -> None:
    about = Kept.open(hospital.released(UVM)).about
    path = slide(tmp_path / "s.h5")
    loud = about.sources[int(np.argmax(about.weights[1:]))]
    revoked = hospital.state / "revoked.json"
    try:
        note_revoked(hospital.state, [hash_of(loud.card.encode())])
        said = run(hospital, "--slides", path, "--out", tmp_path / "out", expect=65)
        assert f"expert {loud.cancer}" in said
        assert "revoked" in said
        run(hospital, "--slides", path, "--out", tmp_path / "out", "--model", "local")
    finally:
        revoked.unlink()


def test_a_map_lies_over_the_thumbnail(hospital: Site, tmp_path: Path) -> None:
    path = slide(tmp_path / "s.h5", patch_size_level0=512)
    picture = tmp_path / "thumb.png"
    Image.new("RGB", (100, 80), (200, 30, 30)).save(picture)
    inputs = (hospital, "--slides", path, "--out", tmp_path / "out", "--thumbnail", picture)
    assert "--level0-size" in run(*inputs, expect=64)
    run(*inputs, "--level0-size", 5120, 4096)
    with Image.open(tmp_path / "out/s/s.png") as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24) or []}
    assert (200, 30, 30) in colours  # of the thumbnail, where there is no patch


def test_geojson_is_what_qupath_reads(hospital: Site, tmp_path: Path) -> None:
    path = slide(tmp_path / "s.h5")
    run(hospital, "--slides", path, "--out", tmp_path / "out", "--patch-size", 500)
    whole = json.loads((tmp_path / "out/s/s.geojson").read_text())
    assert whole["type"] == "FeatureCollection"
    assert len(whole["features"]) == 20
    for number, feature in enumerate(whole["features"]):
        assert set(feature) == {"type", "geometry", "properties"}
        assert feature["properties"]["objectType"] == "tile"
        (ring,) = feature["geometry"]["coordinates"]
        assert feature["geometry"]["type"] == "Polygon"
        assert len(ring) == 5
        assert ring[0] == ring[-1] == [number % 5 * 512, number // 5 * 512]
        assert ring[2] == [number % 5 * 512 + 500, number // 5 * 512 + 500]
    means = [f["properties"]["measurements"]["attention"] for f in whole["features"]]
    assert np.mean(means) == pytest.approx(1, abs=1e-4)
    assert "attention UVM (own)" in whole["features"][0]["properties"]["measurements"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "best"], 64, "unknown 'best'"),
        (["--device", "tpu"], 64, "unknown 'tpu'"),
        (["--cancer", "SKCM"], 78, "its cancers are UVM, not SKCM"),
        (["--cancer", "XYZ"], 65, "unknown code"),
        (["--slides", "nowhere"], 65, "no such folder"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_line(
    hospital: Site, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    path = slide(tmp_path / "s.h5")
    said = run(hospital, "--slides", path, "--out", tmp_path / "out", *arguments, expect=code)
    assert words in said
    assert len(said.strip().splitlines()) == 1
