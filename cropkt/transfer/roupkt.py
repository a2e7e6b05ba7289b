"""ROUPKT: a router that mixes frozen experts' slide features for one target, F models at a time.

Every expert turns the target's bag into a slide feature. A fresh gated-attention network reads
the same patches and yields one logit an expert; softmax over the experts gives gates, the top k
are used. Each chosen feature passes an adapter Linear E->E + ReLU, and a head Linear E->T turns
the gated sum into hazard logits.

Named repairs (RouterConfig), each off in the `published` preset: the own expert is always among
the chosen; gates of the chosen experts are renormalised; the balance loss is that of a batch;
gates start at the measured transfer; adapters start as the identity and every expert keeps a head
of its own, so that before the first update the router already is a transfer-weighted vote of the
experts, and learning can only refine it.

Shapes: F routers, X experts (own expert first), B bags, P patches, E embedding, T bins.

References:
    arXiv 2508.13482; balance and z losses: Fedus et al., arXiv 2101.03961; Zoph et al.,
    arXiv 2202.08906.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cropkt.cohort.bags import PackedBags
from cropkt.config import ExpertShape, RouterConfig
from cropkt.experts.abmil import Abmil, Attention, initialise


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOutput:
    """What F routers say of B bags."""

    logits: Tensor  # (F, B, T) hazard logits
    gates: Tensor  # (F, B, X) softmax over all experts, before the top k
    weights: Tensor  # (F, B, X) weight of each expert in the answer, 0 outside the top k
    router_logits: Tensor  # (F, B, X)


class Roupkt(Attention):
    """F routers of one shape over X experts."""

    def __init__(
        self, shape: ExpertShape, *, experts: int, models: int = 1, own_heads: bool = True
    ) -> None:
        super().__init__(models=models, dim=shape.dim, embed=shape.embed, attention=shape.attention)
        heads = experts if own_heads else 1
        self.gate = nn.Parameter(torch.empty(models, experts, shape.embed))
        self.adapter = nn.Parameter(torch.empty(models, experts, shape.embed, shape.embed))
        self.adapter_bias = nn.Parameter(torch.empty(models, experts, shape.embed))
        self.head = nn.Parameter(torch.empty(models, heads, shape.bins, shape.embed))
        self.head_bias = nn.Parameter(torch.empty(models, heads, shape.bins))
        self.register_buffer("prior", torch.zeros(models, experts))
        self.prior: Tensor

    @classmethod
    def initial(
        cls, shape: ExpertShape, *, experts: int, models: int, seed: int, config: RouterConfig
    ) -> Roupkt:
        """Return F equal untrained routers over `experts` experts."""
        one = cls(shape, experts=experts, own_heads=config.warm_start)
        initialise(one, torch.Generator().manual_seed(seed))
        module = cls(shape, experts=experts, models=models, own_heads=config.warm_start)
        with torch.no_grad():
            for parameter, source in zip(module.parameters(), one.parameters(), strict=True):
                parameter.copy_(source.expand_as(parameter))
        return module

    @torch.no_grad()
    def warm_start(self, own: Abmil, sources: Abmil) -> None:
        """Start as the gated vote of the experts: `own` (F models) first, then `sources` (X - 1).

        Adapters become the identity (slide features are not negative), heads the experts' own,
        and the gates no more than the prior.
        """
        self.gate.zero_()
        self.adapter.copy_(torch.eye(self.adapter.shape[-1]).expand_as(self.adapter))
        self.adapter_bias.zero_()
        self.head[:, 0], self.head_bias[:, 0] = own.head, own.head_bias
        self.head[:, 1:], self.head_bias[:, 1:] = sources.head, sources.head_bias

    def outputs(
        self,
        bags: PackedBags,
        expert_features: Tensor,
        config: RouterConfig,
        *,
        generators: Sequence[torch.Generator] = (),
        dropout: float = 0.0,
    ) -> RouterOutput:
        """Return hazard logits and gates.

        Args:
            bags: the target's bags.
            expert_features: (F, X, B, E) slide features of the frozen experts.
            config: `top_k`, `keep_own` and `renormalise` are read.
            generators: one a model, when dropout is not 0.
            dropout: rate on the router's attention gates.
        """
        router_logits, gates, weights = self.weigh(
            bags, config, generators=generators, dropout=dropout
        )
        return RouterOutput(
            logits=self.mixed(expert_features, weights.transpose(1, 2)),
            gates=gates,
            weights=weights,
            router_logits=router_logits,
        )

    def weigh(
        self,
        bags: PackedBags,
        config: RouterConfig,
        *,
        generators: Sequence[torch.Generator] = (),
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, gates and weights, each (F, B, X), before any expert is asked."""
        seen, _ = self(bags, dropout=dropout, generators=generators)  # (F, B, E)
        router_logits = seen @ self.gate.transpose(1, 2) + self.prior[:, None]  # (F, B, X)
        gates = router_logits.softmax(2)
        rank = gates.detach().clone()
        if config.keep_own:
            rank[..., 0] = 2.0  # above any gate
        # Sorted stably: of equal gates the first experts win, above all the target's own.
        expert = rank.argsort(dim=2, descending=True, stable=True)
        chosen = expert[..., : min(config.top_k, gates.shape[2])]
        weights = torch.zeros_like(gates).scatter(2, chosen, gates.gather(2, chosen))
        if config.renormalise:
            weights = weights / weights.sum(2, keepdim=True)
        return router_logits, gates, weights

    def mixed(
        self, expert_features: Tensor, share: Tensor, *, experts: Sequence[int] | None = None
    ) -> Tensor:
        """Return hazard logits (F, B, T) of experts' features, each with its share.

        Args:
            expert_features: (F, C, B, E) of C experts.
            share: (F, C, B).
            experts: which C of the X these are; all by default. One that is left out has no say.
        """
        of = slice(None) if experts is None else list(experts)
        adapted = expert_features @ self.adapter[:, of].transpose(2, 3)  # (F, C, B, E)
        adapted = (adapted + self.adapter_bias[:, of, None]).relu()
        share = share[..., None]  # (F, C, B, 1)
        if self.head.shape[1] == 1:  # one head on the mixed feature, as published
            mixed = (share * adapted).sum(1)  # (F, B, E)
            return mixed @ self.head[:, 0].transpose(1, 2) + self.head_bias
        spoken = adapted @ self.head[:, of].transpose(2, 3) + self.head_bias[:, of, None]
        return (share * spoken).sum(1)


def balance_loss(gates: Tensor, *, over: str, learns: Tensor | None = None) -> Tensor:
    """Return the load-balance loss (..., B) or (...,) of gates (..., B, X).

    `patient`: the gate of the top expert, each patient alone (as published). `batch`: X times
    the sum over experts of (share of patients it leads) x (mean gate), 1 when all are equal;
    over the patients that `learns` (..., B) names, so that a held-out patient takes no part.
    """
    if over == "patient":
        return gates.amax(-1)
    experts = gates.shape[-1]
    leads = nn.functional.one_hot(gates.argmax(-1), experts).to(gates.dtype)
    share = torch.ones_like(gates[..., 0]) if learns is None else learns.to(gates.dtype)
    share = (share / share.sum(-1, keepdim=True).clamp(min=1))[..., None]  # (..., B, 1)
    return experts * ((leads * share).sum(-2) * (gates * share).sum(-2)).sum(-1)


def z_loss(router_logits: Tensor) -> Tensor:
    """Return the router z loss (..., B): the squared logsumexp of the logits (..., B, X)."""
    return router_logits.logsumexp(-1).square()
