"""Devices by name; what a machine without a GPU can tell of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cropkt.config import ExpertShape
from cropkt.errors import ConfigError
from cropkt.experts.abmil import Abmil
from cropkt.experts.device import device_of, moved, problem_with_device, resolve_device


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    def has(cuda: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return has


@pytest.mark.parametrize(
    ("name", "cuda", "mps", "device"),
    [
        ("auto", 0, False, "cpu"),
        ("auto", 0, True, "mps"),
        ("auto", 2, True, "cuda:0"),
        ("cuda", 2, False, "cuda:0"),
        ("cuda:1", 2, False, "cuda:1"),
        ("mps", 0, True, "mps"),
        ("cpu", 2, True, "cpu"),
    ],
)
def test_a_name_becomes_a_device(
    machine: Callable[[int, bool], None], name: str, cuda: int, mps: bool, device: str
) -> None:
    machine(cuda, mps)
    assert resolve_device(name) == torch.device(device)
    assert problem_with_device(name) == ""


@pytest.mark.parametrize(
    ("name", "cuda", "only"),
    [("cuda", 0, "cpu"), ("cuda:2", 2, "cuda:0, cuda:1, cpu"), ("mps", 0, "cpu")],
)
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(
    machine: Callable[[int, bool], None], name: str, cuda: int, only: str
) -> None:
    machine(cuda, False)
    with pytest.raises(ConfigError, match=f"no {name} on this machine, only {only}"):
        resolve_device(name)
    assert f"only {only}" in problem_with_device(name)


def test_on_the_cpu_nothing_is_copied(make_cohort: Callable[..., Any], shape: ExpertShape) -> None:
    bags = make_cohort().pack([0, 1])
    there = moved(bags, device_of(Abmil.initial(shape, seed=0)))
    assert there.patches is bags.patches
    assert there.segment is bags.segment
