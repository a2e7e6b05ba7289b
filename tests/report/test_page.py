"""The page: that it is whole, says what the numbers say, and needs nothing but itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cropkt.report import gain_sections, methods, patient_sections
from cropkt.report.knowledge_sections import transfer
from cropkt.report.page import write_page
from cropkt.report.runs import Runs, one_run
from cropkt.report.schema import Results
from cropkt.report.seeds import together

VOID = {"meta", "br", "link", "img", "input", "hr"}
SECTIONS = [
    *("short", "gained", "events", "arms", "transfer", "heard", "few-shot", "risk"),
    *("calibration", "cost", "gaps", "methods", "limits"),
]


class Page(HTMLParser):
    """A parsed page: its elements, its words, and whether every element was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += f" {data}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def made(results: Results | Runs, folder: Path) -> tuple[Page, str]:
    runs = results if isinstance(results, Runs) else one_run(results)
    text = write_page(runs, folder)[0].read_text()
    return Page(text), " ".join(Page(text).words.split())


@pytest.fixture(scope="module")
def whole(
    everything: Callable[[], Results], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Page, str]:
    """The page of 26 cancers with everything, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *made(everything(), folder)


def test_has_every_section_and_every_target(whole: tuple[Path, Page, str], full: Results) -> None:
    _, page, words = whole
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert len(page.all("h1")) == 1
    assert len(page.all("h2")) == len(SECTIONS)
    links = {link["href"] for link in page.all("a")}
    assert links == {f"#{name}" for name in SECTIONS}
    for target in full["targets"]:
        assert target in words
    assert "uveal melanoma" in words


def test_needs_nothing_but_itself(whole: tuple[Path, Page, str]) -> None:
    folder, page, _ = whole
    text = (folder / "report.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text
    assert "@import" not in text
    assert not page.all("link")
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    policy = page.all("meta")[3]["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_references_lead_somewhere(whole: tuple[Path, Page, str]) -> None:
    folder, page, _ = whole
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = (folder / "report.html").read_text()
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_figures_have_words_and_lie_beside_the_page(whole: tuple[Path, Page, str]) -> None:
    folder, page, _ = whole
    pictures = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(pictures) == 7
    assert all(len(svg["aria-label"] or "") > 30 for svg in pictures)
    names = {"gained", "arms", "gain", "transfer", "routing", "few_shot", "survival"}
    for ending, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        files = list((folder / "figures").glob(f"*{ending}"))
        assert {file.stem for file in files} == names
        assert all(file.read_bytes().startswith(start) for file in files)
    tables = {"transfer.csv", "pairs.csv", "per_cancer.csv", "arms.csv", "few_shot.csv"}
    assert {file.name for file in folder.glob("*.csv")} == tables | {"voices.csv"}


def test_tables_have_heads_and_scroll_in_their_own_box(whole: tuple[Path, Page, str]) -> None:
    _, page, _ = whole
    assert len(page.all("table")) == 12
    assert {head["scope"] for head in page.all("th")} == {"col", "row"}
    boxes = [div for div in page.all("div") if div.get("class") == "scroll"]
    assert len(boxes) == 12 + 7
    assert all(box["tabindex"] == "0" for box in boxes)


def test_the_methods_name_versions_seed_and_hash(few: Results) -> None:
    (text,) = methods.methods(one_run(few)).texts
    assert "cropkt 0.1.0, flwr 1.20.0, python 3.11.7, torch 2.8.0" in text
    assert "seed 0; configuration 0f3a0" in text
    assert "5-fold cross-validation by patient" in text
    assert "20 epochs" in text
    few["config"]["split"] = "hospital"
    assert "no hospital lies in both" in methods.methods(one_run(few)).texts[0]


def test_the_limits_are_stated(few: Results) -> None:
    text = " ".join(methods.limits(one_run(few)).points)
    for words in (
        "not a medical device",
        "ranking only",
        "no external validation",
        "patients are made up",
        "Benjamini-Hochberg",
        "One seed",
        "TGCT 3, CHOL 18, UVM 21",
        "may recognise a hospital",
    ):
        assert words in text
    few["transfer"] = {}
    assert "Nothing here is adjusted" in " ".join(methods.limits(one_run(few)).points)


def test_who_gained_is_told_from_the_interval(few: Results) -> None:
    uvm, chol = few["targets"]["UVM"]["arms"], few["targets"]["CHOL"]["arms"]
    local = uvm["local"]["c_index"] or 0.0
    uvm["auto"] |= {"c_index": local + 0.08, "gain_low": 0.03, "gain_high": 0.14}
    chol["auto"] |= {"gain_low": -0.1, "gain_high": 0.1}
    short = gain_sections.in_short(one_run(few))
    told = {tile.label: (tile.count, tile.names) for tile in short.tiles}
    assert told == {
        "gained": (1, "UVM"),
        "no difference that these patients could show": (1, "CHOL"),
        "lost": (0, ""),
        "cannot be told": (1, "TGCT"),
    }
    assert "Largest gain: UVM (uveal melanoma), +.08 (+.03 to +.14)." in short.texts
    rows = {row[0].text: row for row in gain_sections.gained(one_run(few)).grids[0].rows}
    assert rows["UVM"][1].text == "+.08 (+.03 to +.14)"
    assert rows["UVM"][2].text == "gained"
    assert rows["TGCT"][2].text == "not estimable"


def test_a_gain_is_transfer_only_over_both_controls(few: Results) -> None:
    def said() -> str:
        return gain_sections.in_short(one_run(few)).texts[-2]

    auto = few["targets"]["UVM"]["arms"]["auto"]
    auto |= {"gain_low": 0.03, "gain_high": 0.14}
    for name in ("CHOL", "TGCT"):
        few["targets"][name]["arms"]["auto"] |= {"gain_low": -0.1, "gain_high": 0.1}
    for control in ("self_only", "random_init"):
        auto["against"][control] |= {"low": 0.01, "high": 0.1}
    assert said().endswith("Of the 1 that gained, this is shown for 1 (UVM).")
    auto["against"]["random_init"]["low"] = -0.01
    assert said().endswith("Of the 1 that gained, this is shown for none.")
    for target in few["targets"].values():
        target["arms"]["auto"].pop("against", None)
    assert said().endswith("Whether the gains are transfer was not evaluated in this study.")


def test_pairs_are_counted_before_and_after_adjustment() -> None:
    row = {"c_index": 0.6, "lead": 0.1, "p_random": 0.01, "p_random_bh": 0.04}
    results: Results = {
        "transfer": {
            "UVM": {
                "SKCM": row | {"p_random_holm": 0.09},  # type: ignore[typeddict-item]
                "OV": row | {"lead": -0.1, "p_random_holm": 0.01},  # type: ignore[typeddict-item]
                "UCS": {"c_index": 0.6, "lead": 0.1, "p_random": 0.04, "p_random_bh": 0.4},
                "UVM": {"c_index": 0.7},
            }
        }
    }
    section = transfer(one_run(results))
    assert section.texts[1] == (
        "Against untrained experts on the same patients, of 3 pairs that could be tested: better "
        "at p < .05 one by one 2; after Benjamini-Hochberg (false discoveries at most 5 %) 1; "
        "after Holm (no false one with 95 % confidence) 0. Worse after Benjamini-Hochberg: 1."
    )
    assert [row[0].text for row in section.grids[0].rows] == ["SKCM helps UVM"]


def test_without_curves_the_page_says_why(few: Results) -> None:
    for target in few["targets"].values():
        target.pop("kaplan_meier", None)
    section = patient_sections.risk_groups(one_run(few))
    assert section.picture is None
    assert section.texts == (
        "No survival curve can be drawn: event times never leave a hospital. So only the "
        "log-rank test between the halves at high and at low risk is shown.",
    )
    assert section.grids[0].heads == ("cancer", "local", "auto")


def test_names_are_text(few: Results, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    few["targets"][evil] = few["targets"].pop("CHOL")
    few["targets"]["UVM"]["voices"][evil] = few["targets"]["UVM"]["voices"].pop("CHOL")
    few["transfer"][evil] = few["transfer"].pop("CHOL")
    few["failed"] = [{"row": "<img src=x onerror=alert(1)>", "cause": "'\"><b>"}]
    few["data"] = "</style><b>"
    page, words = made(few, tmp_path)
    assert not page.all("script")
    assert not page.all("b")
    assert all((image.get("src") or "").startswith("data:") for image in page.all("img"))
    assert evil in words
    assert "<img src=x onerror=alert(1)>" in words


def test_equal_results_give_equal_files(few: Results, tmp_path: Path) -> None:
    shuffled = copy.deepcopy(few)
    shuffled["targets"] = dict(reversed(shuffled["targets"].items()))
    shuffled["transfer"] = dict(reversed(shuffled["transfer"].items()))
    first = write_page(one_run(few), tmp_path / "a")
    second = write_page(one_run(shuffled), tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_an_older_study_makes_a_page_that_says_what_it_lacks(
    older: Results, tmp_path: Path
) -> None:
    page, words = made(older, tmp_path)
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert "the study's answer (ROUPKT)" in words
    for lack in (
        "Whether the gains are transfer was not evaluated in this study.",
        "A comparison over all cancers together was not evaluated in this study.",
        "Not evaluated: training with 20, 50 or 100 patients was not part of this study.",
        "The log-rank test between the halves at high and at low risk was not evaluated.",
        "Not evaluated: this study measured ranking (the C-index) only.",
        "how the folds were made is not in the results",
    ):
        assert lack in words
    assert {file.stem for file in (tmp_path / "figures").glob("*.svg")} == {
        *("gained", "gain", "transfer", "routing"),
    }


@pytest.mark.parametrize(
    "gap",
    [
        {},
        {"targets": {}},
        {"targets": {"UVM": {}}, "transfer": {"UVM": {}}},
        {"targets": {"UVM": {"events": 21, "arms": {"auto": {"c_index": 0.7}}}}},
        {"targets": {"UVM": {"events": None, "patients": None, "routing": None}}},
        {"targets": {"UVM": {"arms": {"local": {"c_index": None}, "auto": {"c_index": None}}}}},
        {"targets": {"UVM": {"few_shot": [], "voices": {}, "kaplan_meier": {}}}},
        {"targets": {"UVM": {"few_shot": [{"patients": 20, "arms": {}}]}}},
        {"transfer": {"A": {"B": {"c_index": None}}}, "planted": {"relatives": {"NO": ["A"]}}},
        {"across": {"auto": {}}, "experts": {}, "config": {}, "versions": {}},
    ],
)
def test_every_kind_of_gap_still_makes_a_page(gap: Results, tmp_path: Path) -> None:
    page, words = made(gap, tmp_path)
    assert len(page.all("section")) == len(SECTIONS)
    assert "valuated" in words


def test_several_seeds_show_their_range(seeded: Callable[[int], Results], tmp_path: Path) -> None:
    each = tuple(map(seeded, (0, 1, 2)))
    _, words = made(Runs(together(each), each), tmp_path)
    assert "seeds 0, 1, 2" in words
    assert words.count("seeds: ") > 2
    assert "means over 3 seeds" in words
    assert "The curves are those of the first seed." in words
    assert "Several seeds show how much folds and training move the numbers." in words
