from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cropkt.cohort.bags import PackedBags
from cropkt.config import ExpertShape
from cropkt.experts.abmil import Abmil, flatten, initialise, parameter_count, unflatten
from cropkt.experts.pooling import drawn, scaled

SHAPE = ExpertShape(dim=6, embed=8, attention=4, bins=5)


def stack(models: int, *, seed: int = 0) -> Abmil:
    module = Abmil(SHAPE, models=models)
    initialise(module, torch.Generator().manual_seed(seed))
    return module


def draw_bags(sizes, *, dim: int = 6, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, generator=generator) for n in sizes]


def by_definition(module: Abmil, f: int, bag):
    """One model, one bag, as the paper writes it."""
    hidden = F.linear(bag, module.project[f], module.project_bias[f]).relu()
    tanh = F.linear(hidden, module.gate_tanh[f], module.gate_tanh_bias[f]).tanh()
    sigmoid = F.linear(hidden, module.gate_sigmoid[f], module.gate_sigmoid_bias[f]).sigmoid()
    scores = (tanh * sigmoid * module.score[f]).sum(1) + module.score_bias[f]
    attention = scores.softmax(0)
    feature = (attention[:, None] * hidden).sum(0)
    return F.linear(feature, module.head[f], module.head_bias[f]), feature, attention


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), models=st.integers(1, 3))
def test_packed_bags_of_stacked_models_equal_the_definition(sizes, models) -> None:
    module, bags = stack(models), draw_bags(sizes)
    out = module.outputs(PackedBags.of(bags))
    assert out.logits.shape == (models, len(sizes), SHAPE.bins)
    for f in range(models):
        attentions = out.attention[f].split(sizes)
        for b, bag in enumerate(bags):
            logits, feature, attention = by_definition(module, f, bag)
            assert torch.allclose(out.logits[f, b], logits, atol=1e-6)
            assert torch.allclose(out.features[f, b], feature, atol=1e-6)
            assert torch.allclose(attentions[b], attention, atol=1e-6)


def test_gradients_equal_those_of_one_bag_at_a_time() -> None:
    module, bags = stack(3), draw_bags([1, 7, 3, 4])
    module.outputs(PackedBags.of(bags)).logits.square().sum().backward()
    packed = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    for f in range(3):
        for bag in bags:
            by_definition(module, f, bag)[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        if name == "score_bias":  # attention does not change with it: its gradient is nought
            assert packed[name].abs().max() < 1e-5
            continue
        assert (packed[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_patches_come_in_any_float_type(dtype) -> None:
    bags = [bag.to(dtype) for bag in draw_bags([3, 2])]
    out = stack(2).outputs(PackedBags.of(bags))
    same = stack(2).outputs(PackedBags.of([bag.float() for bag in bags]))
    assert out.logits.dtype == torch.float32
    assert torch.equal(out.logits, same.logits)


def test_rows_of_weights_round_trip() -> None:
    module = stack(3)
    rows = flatten(module)
    assert rows.shape == (3, parameter_count(module))
    assert parameter_count(module) == parameter_count(Abmil(SHAPE))
    again = Abmil.from_flat(SHAPE, rows)
    for (name, one), two in zip(module.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    alone = Abmil.from_flat(SHAPE, rows[[1]])
    bags = PackedBags.of(draw_bags([4, 2]))
    assert torch.allclose(alone.outputs(bags).logits[0], module.outputs(bags).logits[1], atol=1e-6)


def test_unflatten_does_not_tie_the_module_to_its_rows() -> None:
    rows = flatten(stack(2))
    module = Abmil(SHAPE, models=2)
    unflatten(module, rows)
    kept = flatten(module)
    rows.zero_()
    assert torch.equal(flatten(module), kept)


def test_the_published_widths_have_the_published_size() -> None:
    assert parameter_count(Abmil(ExpertShape())) == 1_197_729  # 1.198 M


def test_every_site_starts_from_the_same_expert() -> None:
    one, two = (Abmil.initial(SHAPE, seed=4, models=m) for m in (1, 3))
    assert torch.equal(flatten(one).expand(3, -1), flatten(two))
    assert not torch.equal(flatten(one), flatten(Abmil.initial(SHAPE, seed=5)))
    # As torch.nn.Linear: within 1 / sqrt(fan in), and not much narrower.
    for name, fan_in in [("project", 6), ("project_bias", 6), ("head", 8), ("score_bias", 4)]:
        values = getattr(one, name)
        assert values.abs().max() <= fan_in**-0.5
        assert values.abs().max() > (0.5 * fan_in**-0.5 if values.numel() > 1 else 0)


def test_the_first_expert_gives_the_base_hazard_to_everybody() -> None:
    module = Abmil.initial(SHAPE, seed=4, hazard=0.06)
    logits = module.outputs(PackedBags.of(draw_bags([3, 9]))).logits
    assert torch.allclose(logits.sigmoid(), torch.tensor(0.06))
    assert logits[0, 0, 0].item() == pytest.approx(log(0.06 / 0.94))
    drawn = flatten(Abmil.initial(SHAPE, seed=4))
    body = parameter_count(module) - SHAPE.bins * (SHAPE.embed + 1)
    assert torch.equal(flatten(module)[:, :body], drawn[:, :body])  # only the head differs


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_dropout_of_a_model_depends_on_no_other() -> None:
    module, bags = Abmil.initial(SHAPE, seed=0, models=3), PackedBags.of(draw_bags([5, 6]))
    one = module.outputs(bags, dropout=0.5, generators=generators(1, 2, 3)).logits
    other = module.outputs(bags, dropout=0.5, generators=generators(9, 2, 8)).logits
    alone = Abmil.initial(SHAPE, seed=0).outputs(bags, dropout=0.5, generators=generators(2)).logits
    assert torch.equal(one[1], other[1])
    assert torch.allclose(one[1], alone[0], atol=1e-6)
    assert not torch.allclose(one[0], other[0])
    with pytest.raises(ValueError, match="zip"):
        module.outputs(bags, dropout=0.5, generators=generators(1))


def test_dropout_keeps_the_mean_and_nought_needs_no_generator() -> None:
    keep = drawn(generators(0), (1, 200, 200), 0.25)
    mask = scaled(keep, 0.25, keep.device)
    assert mask.unique().tolist() == pytest.approx([0, 4 / 3])
    assert mask.mean().item() == pytest.approx(1, abs=0.02)
    stack(2).outputs(PackedBags.of(draw_bags([2])), dropout=0.0)


def test_standardised_input_is_the_input_in_those_units() -> None:
    bags = draw_bags([3, 5])
    mean, deviation = torch.randn(2, 6), torch.rand(2, 6) + 0.5
    module = stack(2)
    module.standardise(mean, deviation)
    out = module.outputs(PackedBags.of(bags))
    plain = stack(2)
    for f in range(2):
        rescaled = [(bag - mean[f]) / deviation[f] for bag in bags]
        expected = plain.outputs(PackedBags.of(rescaled))
        assert torch.allclose(out.logits[f], expected.logits[f], atol=1e-5)
        assert torch.allclose(out.attention[f], expected.attention[f], atol=1e-5)
    module.standardise(mean[0], deviation[0])  # (D,) serves all models
    assert torch.equal(module.shift, mean[[0, 0]])


def test_a_site_s_units_are_no_weights() -> None:
    module = stack(2)
    before = flatten(module)
    module.standardise(torch.randn(6), torch.rand(6) + 1)
    assert torch.equal(flatten(module), before)
    assert not {"shift", "scale"} & set(module.state_dict())
