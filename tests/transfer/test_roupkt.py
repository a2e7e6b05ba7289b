from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cropkt.cohort.bags import PackedBags
from cropkt.config import PUBLISHED, ExpertShape, RouterConfig
from cropkt.experts.abmil import Abmil, flatten, initialise, parameter_count
from cropkt.transfer.roupkt import Roupkt, balance_loss, z_loss

SHAPE = ExpertShape(dim=6, embed=5, attention=4, bins=7)


def bags(sizes=(3, 1, 6, 2)) -> PackedBags:
    generator = torch.Generator().manual_seed(1)
    return PackedBags.of([torch.randn(n, 6, generator=generator) for n in sizes])


def drawn(module, seed: int = 0):
    initialise(module, torch.Generator().manual_seed(seed))
    return module


def speak(router: Roupkt, f: int, out, features, config):
    """The answer of router f for each bag, term by term."""
    answers = []
    for b in range(features.shape[2]):
        gates = out.router_logits[f, b].softmax(0)
        chosen = gates.argsort(descending=True)[: config.top_k]
        total = gates[chosen].sum() if config.renormalise else 1.0
        answer = torch.zeros(SHAPE.bins)
        mixed = torch.zeros(SHAPE.embed)
        for x in chosen:
            adapted = router.adapter[f, x] @ features[f, x, b] + router.adapter_bias[f, x]
            mixed += gates[x] / total * adapted.relu()
            if router.head.shape[1] > 1:
                spoken = router.head[f, x] @ adapted.relu() + router.head_bias[f, x]
                answer += gates[x] / total * spoken
        if router.head.shape[1] == 1:
            answer = router.head[f, 0] @ mixed + router.head_bias[f, 0]
        answers.append(answer)
    return torch.stack(answers)


@pytest.mark.parametrize("own_heads", [True, False])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4, 9])
def test_equals_the_definition(own_heads, renormalise, top_k) -> None:
    router = drawn(Roupkt(SHAPE, experts=4, models=2, own_heads=own_heads))
    router.prior.copy_(torch.randn(2, 4))
    features = torch.rand(2, 4, 4, SHAPE.embed)
    config = RouterConfig(top_k=top_k, renormalise=renormalise, keep_own=False)
    out = router.outputs(bags(), features, config)
    for f in range(2):
        assert torch.allclose(out.logits[f], speak(router, f, out, features, config), atol=1e-5)


@settings(max_examples=30)
@given(experts=st.integers(1, 6), top_k=st.integers(1, 7), renormalise=st.booleans())
def test_top_k_and_renormalise(experts, top_k, renormalise) -> None:
    router = drawn(Roupkt(SHAPE, experts=experts, models=2))
    router.prior.copy_(torch.randn(2, experts))
    config = RouterConfig(top_k=top_k, renormalise=renormalise, keep_own=False)
    out = router.outputs(bags(), torch.rand(2, experts, 4, SHAPE.embed), config)
    assert torch.allclose(out.gates.sum(2), torch.ones(2, 4))
    used = out.weights > 0
    assert (used.sum(2) == min(top_k, experts)).all()
    weakest_used = out.gates.masked_fill(~used, 1).amin(2)
    assert (weakest_used >= out.gates.masked_fill(used, 0).amax(2)).all()
    if renormalise:
        assert torch.allclose(out.weights.sum(2), torch.ones(2, 4))
    else:
        assert torch.equal(out.weights[used], out.gates[used])


@pytest.mark.parametrize("experts", [3, 4, 14, 26])
def test_of_equal_experts_the_own_is_heard(experts) -> None:
    config = RouterConfig()
    router = Roupkt.initial(SHAPE, experts=experts, models=2, seed=0, config=config)
    with torch.no_grad():
        router.gate.zero_()
    out = router.outputs(bags(), torch.rand(2, experts, 4, SHAPE.embed), config)
    assert (out.weights[..., :5] > 0).all()
    assert not out.weights[..., 5:].any()


def test_the_prior_is_added_to_the_router_s_logits() -> None:
    router = drawn(Roupkt(SHAPE, experts=3))
    features, config = torch.rand(1, 3, 4, SHAPE.embed), RouterConfig()
    before = router.outputs(bags(), features, config).router_logits
    router.prior.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    after = router.outputs(bags(), features, config).router_logits
    assert torch.allclose(after - before, router.prior[:, None].expand(1, 4, 3), atol=1e-6)
    assert "prior" not in dict(router.named_parameters())  # it is the site's, and stays


def test_initial_routers_are_equal_and_seeded() -> None:
    config = RouterConfig()
    one = Roupkt.initial(SHAPE, experts=3, models=4, seed=2, config=config)
    rows = flatten(one)
    assert rows.shape == (4, parameter_count(one))
    assert torch.equal(rows, rows[:1].expand(4, -1))
    again = Roupkt.initial(SHAPE, experts=3, models=1, seed=2, config=config)
    assert torch.equal(flatten(again), rows[:1])
    other = Roupkt.initial(SHAPE, experts=3, models=1, seed=3, config=config)
    assert not torch.equal(flatten(other), rows[:1])
    assert one.head.shape[1] == 3
    published = Roupkt.initial(SHAPE, experts=3, models=4, seed=2, config=PUBLISHED.router)
    assert published.head.shape[1] == 1


def test_the_published_widths_have_the_published_size() -> None:
    count = parameter_count(Roupkt(ExpertShape(), experts=13, own_heads=False))
    assert count == pytest.approx(4.6e6, rel=0.02)


@pytest.mark.parametrize("shape", [ExpertShape(), SHAPE], ids=["published", "small"])
def test_a_shape_tells_how_many_weights_models_have(shape: ExpertShape) -> None:
    with torch.device("meta"):
        assert shape.parameters == parameter_count(Abmil(shape))
        for experts, own_heads in ((1, True), (3, True), (13, False)):
            router = Roupkt(shape, experts=experts, own_heads=own_heads)
            told = shape.router_parameters(experts=experts, own_heads=own_heads)
            assert told == parameter_count(router)


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_warm_start_is_the_gated_vote_of_the_experts(renormalise) -> None:
    own, sources = drawn(Abmil(SHAPE, models=2), 1), drawn(Abmil(SHAPE, models=3), 2)
    packed, config = bags(), RouterConfig(top_k=2, renormalise=renormalise, keep_own=False)
    mine, theirs = own.outputs(packed), sources.outputs(packed)
    features = torch.cat([mine.features[:, None], theirs.features.expand(2, -1, -1, -1)], 1)
    votes = torch.cat([mine.logits[:, None], theirs.logits.expand(2, -1, -1, -1)], 1)
    router = Roupkt.initial(SHAPE, experts=4, models=2, seed=0, config=config)
    router.warm_start(own, sources)
    router.prior.copy_(torch.randn(2, 4))
    out = router.outputs(packed, features, config)
    assert torch.equal(out.gates, router.prior.softmax(1)[:, None].expand(2, 4, 4))
    gates = router.prior.softmax(1)
    for f in range(2):
        first, second = gates[f].argsort(descending=True)[:2]
        total = gates[f, first] + gates[f, second] if renormalise else 1
        vote = gates[f, first] * votes[f, first] + gates[f, second] * votes[f, second]
        assert torch.allclose(out.logits[f], vote / total, atol=1e-5)


def test_a_router_depends_on_no_other() -> None:
    router = drawn(Roupkt(SHAPE, experts=3, models=2))
    features, config = torch.rand(2, 3, 4, SHAPE.embed), RouterConfig(top_k=2)
    whole = router.outputs(bags(), features, config).logits
    with torch.no_grad():
        for parameter in router.parameters():
            parameter[0] *= -2
    features[0] += 1
    assert torch.equal(router.outputs(bags(), features, config).logits[1], whole[1])


def test_balance_of_a_patient_is_the_gate_of_the_first() -> None:
    gates = torch.randn(3, 5, 4).softmax(2)
    got = balance_loss(gates, over="patient")
    assert got.shape == (3, 5)
    for f in range(3):
        for b in range(5):
            top = gates[f, b].argmax()
            assert got[f, b] == sum(float(x == top) * gates[f, b, x] for x in range(4))


@given(bags=st.integers(1, 6), experts=st.integers(1, 6))
def test_balance_of_a_batch_is_one_when_all_are_equal(bags, experts) -> None:
    uniform = torch.full((2, bags, experts), 1 / experts)
    assert balance_loss(uniform, over="batch").tolist() == pytest.approx([1, 1])
    # Each expert leads as often as any other, with any gate: 1 as well.
    turns = torch.eye(experts).repeat(bags, 1) * 0.7 + 0.3 / experts
    assert balance_loss(turns, over="batch").item() == pytest.approx(1)
    collapsed = torch.eye(experts)[:1].expand(bags, -1)
    assert balance_loss(collapsed, over="batch").item() == pytest.approx(experts)


def test_balance_counts_the_patients_one_may_learn_from() -> None:
    gates = torch.randn(2, 5, 3).softmax(2)
    learns = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    got = balance_loss(gates, over="batch", learns=learns)
    for f in range(2):
        alone = balance_loss(gates[f, learns[f]], over="batch")
        assert got[f].item() == pytest.approx(alone.item())
    everybody = torch.ones(2, 5).bool()
    assert torch.allclose(
        balance_loss(gates, over="batch", learns=everybody), balance_loss(gates, over="batch")
    )
    nobody = balance_loss(gates, over="batch", learns=~everybody)
    assert nobody.tolist() == [0, 0]


def test_z_loss_is_the_squared_logsumexp() -> None:
    logits = torch.randn(2, 3, 4).double()
    assert torch.allclose(z_loss(logits), logits.exp().sum(-1).log() ** 2)
    assert z_loss(torch.full((1, 4), -float(torch.tensor(4.0).log()))).item() == pytest.approx(
        0, abs=1e-12
    )


def test_dropout_is_each_router_s_own() -> None:
    config = replace(RouterConfig(), top_k=3)
    router = drawn(Roupkt(SHAPE, experts=3, models=2))
    features = torch.rand(2, 3, 4, SHAPE.embed)

    def logits(*seeds: int):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return router.outputs(
            bags(), features, config, generators=generators, dropout=0.5
        ).router_logits

    assert torch.equal(logits(1, 2)[1], logits(3, 2)[1])
    assert not torch.equal(logits(1, 2)[0], logits(3, 2)[0])


def test_the_own_expert_is_always_heard() -> None:
    module = Roupkt.initial(SHAPE, experts=4, models=1, seed=0, config=RouterConfig())
    module.prior[:, 0] = -5.0
    features = torch.rand(1, 4, bags().count, SHAPE.embed)
    for keep_own in (True, False):
        out = module.outputs(bags(), features, RouterConfig(top_k=2, keep_own=keep_own))
        assert ((out.weights[..., 0] > 0) == keep_own).all()
        assert ((out.weights > 0).sum(2) == 2).all()
