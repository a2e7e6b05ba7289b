"""Blocks against everything at once, and the memory that blocks save."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cropkt.cohort.bags import PackedBags
from cropkt.config import ExpertShape
from cropkt.experts import abmil, pooling
from cropkt.experts.abmil import Abmil, initialise

SHAPE = ExpertShape(dim=6, embed=8, attention=4, bins=5)
GIB = 1 << 30


def stack(models: int) -> Abmil:
    module = Abmil(SHAPE, models=models)
    initialise(module, torch.Generator().manual_seed(0))
    return module


def draw_bags(sizes: list[int], spread: float = 1.0) -> PackedBags:
    generator = torch.Generator().manual_seed(1)
    return PackedBags.of([spread * torch.randn(n, 6, generator=generator) for n in sizes])


def generators(models: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(models)]


@pytest.fixture
def in_blocks(monkeypatch) -> Callable[[int], None]:
    """Return a function that makes every pass go by blocks of so many hidden values."""

    def make(block: int) -> None:
        for module in (abmil, pooling):
            monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(abmil, "room", lambda _: 0)

    return make


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    models=st.integers(1, 20),
    block=st.integers(1, 400),
    spread=st.sampled_from([1.0, 40.0]),  # large scores: the softmax must not overflow
)
def test_blocks_equal_everything_at_once(sizes, models, block, spread) -> None:
    module, bags = stack(models).requires_grad_(False), draw_bags(sizes, spread)
    whole = module.outputs(bags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "BLOCK", block)
        features, attention = pooling.pooled_in_blocks(
            module._folded(pooling.ALL), bags, pooling.Dropout(), torch.float32
        )
    assert torch.allclose(features, whole.features, rtol=1e-5, atol=1e-5 * spread)
    assert torch.allclose(attention, whole.attention, rtol=1e-4, atol=1e-6)
    for b in range(len(sizes)):
        assert torch.allclose(attention[:, bags.segment == b].sum(1), torch.ones(models))


@pytest.mark.parametrize("block", [1, 64, 1 << 24])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_by_blocks_equal_those_at_once(in_blocks, block, dropout, monkeypatch) -> None:
    monkeypatch.setattr(pooling, "WIDE", 2)
    bags, found = draw_bags([1, 7, 3, 40]), []
    target = torch.randn(3, len(bags.patches), generator=torch.Generator().manual_seed(2))
    for by_blocks in (False, True):
        if by_blocks:
            in_blocks(block)
        module = stack(3)
        module.standardise(torch.full((6,), 0.3), torch.full((6,), 2.0))
        out = module.outputs(bags, dropout=dropout, generators=generators(3))
        loss = out.logits.square().sum() + (out.attention * target).sum()
        loss.backward()
        found.append((loss, {name: p.grad for name, p in module.named_parameters()}))
    (one, at_once), (two, again) = found
    assert two.item() == pytest.approx(one.item(), rel=1e-5)
    for name, gradient in at_once.items():
        if name == "score_bias":  # it cancels in the softmax
            assert again[name].abs().max() < 1e-4
        else:
            assert (gradient - again[name]).norm() < 1e-5 * gradient.norm(), name


def test_blocks_draw_the_dropout_that_one_pass_draws(in_blocks) -> None:
    module, bags = stack(3), draw_bags([5, 9])
    mine, theirs = generators(3), generators(3)
    whole = module.outputs(bags, dropout=0.5, generators=mine)
    in_blocks(16)
    again = module.outputs(bags, dropout=0.5, generators=theirs)
    assert torch.allclose(whole.logits, again.logits, atol=1e-5)
    for one, two in zip(mine, theirs, strict=True):  # and the next draw is the same, too
        assert torch.equal(one.get_state(), two.get_state())


def test_patches_of_no_bag_take_no_part(in_blocks) -> None:
    module, bags = stack(2).requires_grad_(False), draw_bags([4, 3])
    padded = PackedBags(
        patches=torch.cat([bags.patches, torch.full((2, 6), 9.0)]),
        segment=torch.cat([bags.segment, torch.tensor([-1, -1])]),
        count=2,
    )
    in_blocks(16)
    out, alone = module.outputs(padded), module.outputs(bags)
    assert torch.allclose(out.logits, alone.logits, atol=1e-5)
    assert out.attention[:, -2:].abs().max() == 0


def test_some_models_say_what_they_say_among_all() -> None:
    module, bags = stack(5), draw_bags([4, 3])
    whole, some = module.outputs(bags), module.outputs(bags, models=slice(1, 3))
    assert torch.allclose(some.logits, whole.logits[1:3], atol=1e-6)
    assert torch.allclose(some.attention, whole.attention[1:3], atol=1e-6)


BANK = """
from dataclasses import dataclass
import torch
from cropkt.cohort.bags import PackedBags
from cropkt.config import ExpertShape
from cropkt.experts.abmil import Abmil
shape = ExpertShape(bins=8)
bags = PackedBags.of([torch.randn(64, shape.dim).half().repeat({patches} // 64 + 1, 1)])
start()
experts = Abmil.initial(shape, seed=0, models={models}).requires_grad_(False)
with torch.inference_mode():
    out = experts.outputs(bags)
stop()
assert out.attention.shape == ({models}, len(bags.patches))
assert torch.allclose(out.attention.sum(1), torch.ones({models}), atol=1e-3)
"""


@pytest.mark.slow
def test_a_bank_on_a_large_bag_stays_small(peak_of) -> None:
    # One block of patches shows the peak; the bag's size then adds its attention alone.
    block, attention = 1_100, 4 * 50_000
    assert peak_of(BANK.format(models=100, patches=block)) + 2 * 100 * attention < 1.5 * GIB
    short, long = (peak_of(BANK.format(models=1, patches=p)) for p in (block, 50_000))
    assert long - short < 150e6
