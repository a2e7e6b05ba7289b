from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cropkt.cohort.bags import PackedBags
from cropkt.experts import bank
from cropkt.experts.abmil import Abmil, initialise
from cropkt.survival.likelihood import risk


class Sizes:
    """A cohort of which only the bags' sizes are asked."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def patches(self, index: int) -> int:
        return self.sizes[index]


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    patches=st.integers(1, 50),
    patients=st.integers(1, 8),
)
def test_groups_cover_everybody_in_order_within_bounds(sizes, patches, patients) -> None:
    groups = list(bank.groups(Sizes(sizes), patches=patches, patients=patients))
    assert np.concatenate(groups).tolist() == list(range(len(sizes)))
    for group in groups:
        assert 1 <= len(group) <= patients
        assert len(group) == 1 or sum(sizes[i] for i in group) <= patches
    for one, two in pairwise(groups):  # none could have taken one more
        full = sum(sizes[i] for i in one) + sizes[two[0]] > patches
        assert full or len(one) == patients


@pytest.mark.parametrize("hidden", [1, 200, 1 << 26])
def test_consulting_equals_asking_each_expert_for_each_patient(
    make_cohort, shape, monkeypatch, hidden
) -> None:
    monkeypatch.setattr(bank, "MAX_HIDDEN", hidden)
    cohort, experts = make_cohort(patients=9), Abmil(shape, models=3)
    initialise(experts, torch.Generator().manual_seed(0))
    opinions = bank.consult(experts, cohort)
    assert opinions.risk.shape == (3, 9)
    assert opinions.features.shape == (3, 9, shape.embed)
    assert opinions.risk.dtype == np.float64
    for i in range(9):
        out = experts.outputs(PackedBags.of([cohort.bag(i)]))
        assert opinions.risk[:, i] == pytest.approx(risk(out.logits)[:, 0].detach(), abs=1e-5)
        assert torch.allclose(opinions.features[:, i], out.features[:, 0], atol=1e-6)
