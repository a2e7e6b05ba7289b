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
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from cropkt.cancers import Cancer
from cropkt.cohort.facts import SlideFacts
from cropkt.cohort.pack import Pack
from cropkt.config import StudyConfig
from cropkt.experts.card import hash_of
from cropkt.messages import ExpertRequest, ReleaseRequest, RouterRequest
from cropkt.prediction.answer import Answer
from cropkt.prediction.kept import Kept
from cropkt.prediction.model import ReleasedModel
from cropkt.report.canvas import png
from cropkt_client import predict as module
from cropkt_client import tasks
from cropkt_client.cli import app
from cropkt_client.site import Site
from cropkt_client.trust import note_revoked

UVM, SKCM, KIPAN = Cancer.UVM, Cancer.SKCM, Cancer.KIPAN
DIM = 6
SECRET = "SECRETPATIENT"
TRIDENT = "20x_256px_0px_overlap/features_uni_v2"
MADE = {"target_magnification": 20, "patch_size": 256, "patch_size_level0": 512}


@pytest.fixture(scope="module")
def hospital(
    tmp_path_factory: pytest.TempPathFactory,
    study_of_small: StudyConfig,
    write: Callable[..., Path],
) -> Site:
    """Return a hospital to which a study has released a model."""
    root, study = (
        tmp_path_factory.mktemp("hospitals"),
        replace(study_of_small, arms=("auto",), encoder="UNI2-h-20x"),
    )
    sites = {}
    for seed, cancer in enumerate((UVM, KIPAN, SKCM)):
        (root / cancer).mkdir()
        data = {"pack": None, "slides": [TRIDENT]} if cancer == UVM else {}
        path = write(root / cancer, cancer, seed=seed, encoder=study.encoder, **data)
        sites[cancer] = Site.load(path)
    unpack(root / UVM)
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


def unpack(folder: Path) -> None:
    """Write the slides of a pack as TRIDENT does, under other names than their patients'."""
    packed, table = Pack(folder / "pack"), folder / "outcomes.csv"
    header, *lines = table.read_text().splitlines()
    for number, line in enumerate(lines):
        patient, name, *rest = line.split(",")
        lines[number] = ",".join([patient, f"slide-{number:03d}", *rest])
        features = packed.features(name).numpy()
        slide(folder / TRIDENT / f"slide-{number:03d}.h5", features=features, **MADE)
    table.write_text("\n".join([header, *lines]) + "\n")


def slide(
    path: Path,
    *,
    width: int = DIM,
    coords: bool = True,
    patches: int = 20,
    seed: int = 0,
    features: np.ndarray | None = None,
    **about: Any,
) -> Path:
    """Write a slide as TRIDENT does: 20 patches of 512 pixels on a grid."""
    if features is None:
        features = np.random.default_rng(seed).normal(size=(patches, width)).astype("float32")
    patches = len(features)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = features
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
    inputs = ("--slides", hospital.folder / TRIDENT, "--table", hospital.folder / "outcomes.csv")
    run(hospital, *inputs, "--out", tmp_path / "out")
    found = rows(tmp_path / "out/predictions.csv")
    assert {row["in_training"] for row in found} == {"yes"}
    kept = hospital.kept("UVM/predictions")
    assert kept is not None
    assert [row["patient"] for row in found] == list(kept["patients"])
    assert [float(row["risk"]) for row in found] == pytest.approx(kept["risk_final"], abs=1e-5)
    assert sum(row["group"] == "high" for row in found) == len(found) / 2
    run(hospital, *inputs, "--out", tmp_path / "local", "--model", "local")
    local = [float(row["risk"]) for row in rows(tmp_path / "local/predictions.csv")]
    assert local == pytest.approx(kept["risk_local"], abs=1e-5)


@pytest.mark.parametrize("named", [(), ("--patient", "anna")])
@pytest.mark.parametrize("ending", ["", ".svs", ".600C7D8C-F04C-4125-AF14-B1E76DC01A1E"])
def test_a_training_slide_is_known_without_its_patients_name(
    hospital: Site, tmp_path: Path, named: tuple[str, ...], ending: str
) -> None:
    path = tmp_path / f"{TRIDENT}/slide-017{ending}.h5"
    path.parent.mkdir(parents=True)
    path.write_bytes((hospital.folder / TRIDENT / "slide-017.h5").read_bytes())
    run(hospital, "--slides", path, *named, "--out", tmp_path / "out", "--model", "local")
    (row,) = rows(tmp_path / "out/predictions.csv")
    kept = hospital.kept("UVM/predictions")
    assert kept is not None
    assert row["in_training"] == "yes"
    assert float(row["risk"]) == pytest.approx(kept["risk_local"][17], abs=1e-5)


def test_training_slides_that_no_model_left_out_together(hospital: Site, tmp_path: Path) -> None:
    kept = hospital.kept("UVM/predictions")
    assert kept is not None
    other = int(np.flatnonzero(kept["folds"] != kept["folds"][0])[0])
    slides = [hospital.folder / TRIDENT / f"slide-{number:03d}.h5" for number in (0, other)]
    given = [argument for path in slides for argument in ("--slides", path)]
    said = run(hospital, *given, "--out", tmp_path / "out", expect=65)
    assert "training patients of several folds" in said
    assert not (tmp_path / "out").exists()


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
        ({"target_magnification": 20, "patch_size": 512}, "in", "are 512 pixels wide"),
        ({"encoder": "virchow2"}, "in", "are of encoder virchow2, the model reads uni_v2"),
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
    """Whatever label of the study `site.yaml` has: the files are compared with each other."""
    assert hospital.config.encoder == "UNI2-h-20x"
    path = slide(tmp_path / TRIDENT / "s.h5", **MADE)
    run(hospital, "--slides", path, "--out", tmp_path / "out")
    assert "went unchecked" not in (tmp_path / "out/s/page.html").read_text()


def test_what_the_files_agree_on_is_kept(
    hospital: Site, write: Callable[..., Path], study_of_small: StudyConfig, tmp_path: Path
) -> None:
    about = Kept.open(hospital.released(UVM)).about
    assert (about.encoder, about.magnification, about.patch_size) == ("uni_v2", 20, 256)
    packed = Site.load(write(tmp_path, UVM, seed=0, magnification=20))
    assert packed.facts(packed.cohort(UVM, study_of_small)[0]) == SlideFacts()


@pytest.mark.parametrize(
    ("about", "what"),
    [
        ({}, "encoder and magnification"),
        ({"encoder": "UNI2-h"}, "magnification"),
        ({"target_magnification": 20}, "encoder"),
    ],
)
def test_what_no_file_says_is_said_to_be_unchecked(
    hospital: Site, tmp_path: Path, about: dict[str, Any], what: str
) -> None:
    path = slide(tmp_path / "s.h5", **about)
    run(hospital, "--slides", path, "--out", tmp_path / "out")
    note = f"1 slide whose {what} went unchecked: its own file or those of the training slides"
    assert note in (tmp_path / "out/s/page.html").read_text()


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


HOT = {"the answer": 9, "UVM (own)": 15, "KIPAN": 2}  # the one patch that each panel looks at


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Let every model look at one patch alone, each at another; return the figures drawn."""
    asked, figures = ReleasedModel.predict, []

    def predict(released: ReleasedModel, bags: list[Tensor], **options: Any) -> list[Answer]:
        (answer,) = asked(released, bags, **options)
        whole, own, other = (np.eye(len(bags[0]))[patch] for patch in HOT.values())
        first = replace(answer.voices[0], cancer=UVM, own=True, weight=0.6, attention=own)
        second = replace(first, cancer=KIPAN, own=False, weight=0.4, attention=other)
        return [replace(answer, attention=whole, voices=(first, second))]

    monkeypatch.setattr(ReleasedModel, "predict", predict)
    monkeypatch.setattr(module, "png", lambda figure: figures.append(figure) or png(figure))
    return figures


def panels(figure: Figure, path: Path) -> dict[str, np.ndarray]:
    """Return the pixels (h, w, 3) of each panel of a picture, by its title."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=float)
    found = {}
    for axes in figure.axes:
        if title := axes.get_title(loc="left"):
            left, bottom, right, top = np.round(axes.get_window_extent().extents).astype(int)
            found[title.partition("  ")[0]] = pixels[len(pixels) - top : len(pixels) - bottom][
                :, left:right
            ]
    return found


def cell(panel: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, ...]:
    """Return left, top, right and bottom of a colour in a panel, in patches of the slide."""
    rows, columns = np.nonzero(np.abs(panel - colour).max(-1) < 12)
    high, wide = panel.shape[:2]
    x, y = np.array([columns.min(), columns.max() + 1]), np.array([rows.min(), rows.max() + 1])
    (left, right), (top, bottom) = x / wide * 9 - 2, y / high * 8 - 2  # a margin of two patches
    return left, top, right, bottom


def test_each_panel_is_hot_where_its_model_looks(
    hospital: Site, tmp_path: Path, drawn: list[Figure]
) -> None:
    path = slide(tmp_path / "s.h5", patch_size_level0=512)
    run(hospital, "--slides", path, "--out", tmp_path / "out")
    found = panels(drawn[0], tmp_path / "out/s/s.png")
    assert list(found) == list(HOT)
    for name, patch in HOT.items():
        x, y = patch % 5, patch // 5
        assert cell(found[name], (253, 231, 37)) == pytest.approx((x, y, x + 1, y + 1), abs=0.1)


def test_a_map_lies_over_the_thumbnail(hospital: Site, tmp_path: Path, drawn: list[Figure]) -> None:
    """The slide is 10 by 8 patches, the thumbnail 100 by 80 pixels with a mark on one patch."""
    path = slide(tmp_path / "s.h5", patch_size_level0=512)
    picture, thumbnail = tmp_path / "thumb.png", Image.new("RGB", (100, 80), (200, 30, 30))
    thumbnail.paste((30, 30, 200), (60, 40, 70, 50))  # beside the patches
    thumbnail.save(picture)
    inputs = (hospital, "--slides", path, "--out", tmp_path / "out", "--thumbnail", picture)
    assert "--level0-size" in run(*inputs, expect=64)
    run(*inputs, "--level0-size", 5120, 4096)
    found = panels(drawn[0], tmp_path / "out/s/s.png")
    hot = tuple(np.array((253, 231, 37)) * 0.8 + np.array((200, 30, 30)) * 0.2)
    for name, patch in HOT.items():
        x, y = patch % 5, patch // 5
        assert cell(found[name], hot) == pytest.approx((x, y, x + 1, y + 1), abs=0.1)
        assert cell(found[name], (30, 30, 200)) == pytest.approx((6, 4, 7, 5), abs=0.1)
        assert cell(found[name], (200, 30, 30)) == pytest.approx((0, 0, 7, 6), abs=0.1)


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
