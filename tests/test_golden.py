"""The published implementation's numbers, to 1e-5."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cropkt.cohort.bags import PackedBags
from cropkt.config import PUBLISHED
from cropkt.published import load_expert, load_router
from cropkt.survival.bins import time_bins
from cropkt.survival.likelihood import discrete_nll, risk
from cropkt.survival.metrics import concordance
from cropkt.transfer.roupkt import balance_loss, z_loss

STACK_NAMES = {
    "feat_proj.0.weight": "project",
    "feat_proj.0.bias": "project_bias",
    "attention_net.attention_a.0.weight": "gate_tanh",
    "attention_net.attention_a.0.bias": "gate_tanh_bias",
    "attention_net.attention_b.0.weight": "gate_sigmoid",
    "attention_net.attention_b.0.bias": "gate_sigmoid_bias",
    "attention_net.attention_c.weight": "score",
    "attention_net.attention_c.bias": "score_bias",
    "pred_head.weight": "head",
    "pred_head.bias": "head_bias",
}


def close(got, expected) -> bool:
    return bool(torch.allclose(got.float(), expected.float(), atol=1e-5, rtol=1e-5))


@pytest.fixture(scope="module")
def expert(golden):
    return load_expert(golden.folder / "abmil.pth")


@pytest.fixture(scope="module")
def router(golden):
    return load_router(golden.folder / "roupkt.pth", top_k=golden.facts["top_k"])


def test_expert(golden, expert) -> None:
    for i, bag in enumerate(golden.bags):
        assert close(expert(bag), golden.tensor("abmil_logits")[i])
        assert close(expert.slide_feature(bag), golden.tensor("abmil_slide_features")[i])
        assert close(expert.attention(bag), golden.tensor(f"abmil_attention_{i}"))


def test_expert_over_packed_bags(golden, expert) -> None:
    out = expert.abmil.outputs(PackedBags.of(golden.bags))
    assert close(out.logits[0], golden.tensor("abmil_logits"))
    assert close(out.features[0], golden.tensor("abmil_slide_features"))


def test_time_bins(golden) -> None:
    assert np.array_equal(time_bins(golden.arrays["days"]), golden.arrays["time_bin"])


@pytest.mark.parametrize("loss", ["log_space", "clamped"])
@pytest.mark.parametrize(("alpha", "name"), [(0.0, "nll_alpha_0"), (0.5, "nll_alpha_05")])
def test_losses(golden, loss, alpha, name) -> None:
    got = discrete_nll(
        golden.tensor("abmil_logits"),
        golden.tensor("time_bin"),
        golden.tensor("event").bool(),
        alpha=alpha,
        loss=loss,
    )
    assert close(got, golden.tensor(name))


@pytest.mark.parametrize("loss", ["log_space", "clamped"])
def test_gradients(golden, loss) -> None:
    module = load_expert(golden.folder / "abmil.pth").abmil.requires_grad_(True)
    losses = discrete_nll(
        module.outputs(PackedBags.of(golden.bags)).logits,
        golden.tensor("time_bin"),
        golden.tensor("event").bool(),
        alpha=0.5,
        loss=loss,
    )
    losses.mean().backward()
    names = {name.removeprefix("grad/") for name in golden.arrays if name.startswith("grad/")}
    assert names == set(STACK_NAMES)
    for name, ours in STACK_NAMES.items():
        expected = golden.tensor(f"grad/{name}")
        got = getattr(module, ours).grad.view_as(expected)
        assert torch.allclose(got, expected, atol=1e-7, rtol=1e-3), name
        assert close(got, expected), name


def test_concordance(golden) -> None:
    logits = golden.tensor("abmil_logits")
    published = -torch.cumprod(1 - logits.sigmoid(), dim=1).sum(1)
    assert close(risk(logits), published)
    died = golden.arrays["event"].astype(bool)
    got = concordance(golden.arrays["days"], died, risk(logits).numpy())
    assert got.c_index == pytest.approx(float(golden.arrays["concordance"]), abs=1e-12)


def test_router(golden, router) -> None:
    features = golden.tensor("expert_features")
    for i, bag in enumerate(golden.bags):
        assert close(router(bag, features[i]), golden.tensor("roupkt_logits")[i])
        assert close(router.gates(bag), golden.tensor("roupkt_probs")[i])


def test_router_over_packed_bags(golden, router) -> None:
    features = golden.tensor("expert_features").transpose(0, 1)[None]  # (1, X, B, E)
    out = router.roupkt.outputs(PackedBags.of(golden.bags), features, router.config)
    assert close(out.logits[0], golden.tensor("roupkt_logits"))
    assert close(out.gates[0], golden.tensor("roupkt_probs"))
    assert close(
        balance_loss(out.gates[0], over=PUBLISHED.router.balance),
        golden.tensor("roupkt_balance_loss"),
    )
    assert close(z_loss(out.router_logits[0]), golden.tensor("roupkt_z_loss"))
