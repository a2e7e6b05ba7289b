"""What experts made of the patients is computed once, and stays right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cropkt.cancers import Cancer
from cropkt.cohort.bags import Cohort
from cropkt.config import StudyConfig
from cropkt.experts.abmil import Abmil, flatten, initialise
from cropkt.experts.bank import Opinions, consult, consult_in
from cropkt_client import features
from cropkt_client.features import SlideFeatures
from cropkt_client.site import Site


@pytest.fixture
def experts(study: StudyConfig) -> Abmil:
    module = Abmil(study.shape, models=4)
    initialise(module, torch.Generator().manual_seed(0))
    return module.requires_grad_(False)


@pytest.fixture
def cohort(make_site: Callable[..., Site], study: StudyConfig) -> Cohort:
    return make_site().cohort(Cancer.UVM, study)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "features"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return how many experts were asked of how many patients, call by call."""
    calls: list[tuple[int, int]] = []

    def count(module, people, units) -> list[Opinions]:
        calls.append((module.models, len(people)))
        return consult_in(module, people, units)

    monkeypatch.setattr(features, "consult_in", count)
    return calls


def some(experts: Abmil, models: list[int]) -> Abmil:
    return Abmil.from_flat(experts.shape, flatten(experts)[models]).requires_grad_(False)


def same(one: Opinions, two: Opinions) -> bool:
    return bool(
        np.allclose(one.risk, two.risk, atol=1e-5)
        and torch.allclose(one.features, two.features, atol=1e-6)
    )


def test_only_what_is_new_is_computed(folder: Path, experts, cohort, asked) -> None:
    kept = SlideFeatures(folder)
    first = cohort.subset(np.arange(40))
    (two,) = kept.ask(some(experts, [0, 1]), first, [None])
    (four,) = kept.ask(experts, first, [None])  # two more experts
    (grown,) = kept.ask(some(experts, [3, 1]), cohort, [None])  # eight more patients
    (again,) = kept.ask(some(experts, [3, 1]), cohort, [None])
    assert asked == [(2, 40), (2, 40), (2, 8)]
    whole = consult(experts, cohort)
    assert same(two, Opinions(risk=whole.risk[:2, :40], features=whole.features[:2, :40]))
    assert same(four, Opinions(risk=whole.risk[:, :40], features=whole.features[:, :40]))
    assert same(grown, Opinions(risk=whole.risk[[3, 1]], features=whole.features[[3, 1]]))
    assert np.array_equal(again.risk, grown.risk)
    assert torch.equal(again.features, grown.features)


def test_units_are_told_apart(folder: Path, experts, cohort, asked) -> None:
    kept = SlideFeatures(folder)
    units = [None, (torch.full((6,), 0.5), torch.full((6,), 2.0))]
    found = kept.ask(experts, cohort, units)
    fresh = Abmil.from_flat(experts.shape, flatten(experts)).requires_grad_(False)
    for one, two in zip(found, consult_in(fresh, cohort, units), strict=True):
        assert same(one, two)
    assert not same(*found)
    same_units = Abmil.from_flat(experts.shape, flatten(experts)).requires_grad_(False)
    same_units.standardise(*units[1])
    assert same(kept.ask(same_units, cohort, [None])[0], found[1])
    assert asked == [(4, 48)]


def test_another_slide_file_is_another_patient(folder: Path, experts, cohort, asked) -> None:
    class Rewritten(type(cohort.source)):
        def stamp(self, slide_id: str) -> str:
            return super().stamp(slide_id) + ("!" if slide_id.endswith("007") else "")

    kept = SlideFeatures(folder)
    kept.ask(experts, cohort, [None])
    kept.ask(experts, replace(cohort, source=Rewritten(cohort.source.folder)), [None])
    assert asked == [(4, 48), (4, 1)]


@pytest.mark.parametrize("harm", ["cut", "flip", "torn"])
def test_damage_costs_no_more_than_computing_again(
    folder: Path, experts, cohort, asked, harm
) -> None:
    kept = SlideFeatures(folder)
    (before,) = kept.ask(experts, cohort, [None])
    victim = sorted(folder.glob("*.npz"))[0]
    if harm == "cut":
        victim.write_bytes(victim.read_bytes()[:200])
    elif harm == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 255
        victim.write_bytes(data)
    else:  # a process died in the middle of a write
        victim.rename(victim.with_name(f".{victim.name}.abcd1234"))
    (after,) = kept.ask(experts, cohort, [None])
    assert same(before, after)
    assert asked == [(4, 48), (1, 48)]
    assert len(list(folder.iterdir())) == 4


def test_it_stays_within_its_bound_and_can_be_wiped(folder: Path, experts, cohort) -> None:
    one = SlideFeatures(folder)
    one.ask(some(experts, [0]), cohort, [None])
    (first,) = folder.iterdir()
    small = SlideFeatures(folder, limit=2 * first.stat().st_size)
    (found,) = small.ask(experts, cohort, [None])
    assert found.risk.shape == (4, 48)
    files = list(folder.iterdir())
    assert sum(path.stat().st_size for path in files) <= small.limit
    assert files
    small.wipe()
    assert not list(folder.iterdir())


def test_no_patient_s_name_is_in_the_files(folder: Path, experts, cohort) -> None:
    SlideFeatures(folder).ask(experts, cohort, [None])
    for path in folder.iterdir():
        assert b"SECRETPATIENT" not in path.read_bytes()
        assert "SECRETPATIENT" not in path.name
