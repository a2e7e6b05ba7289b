"""The straightforward formulation that cropkt is measured against: plain PyTorch.

One model and one bag at a time, in float32; one pass over the data for every expert, and every pass
reads every bag again. It shares with cropkt only the order of patients, the learning rate's
schedule and the loss, so that both must come to the same numbers (tests/test_baseline.py).
Shapes: N patches of one bag, D features, E embedding, A attention, T bins, X experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cropkt.cohort.bags import Cohort
from cropkt.config import ExpertShape, OptimiserConfig, RouterConfig, StudyConfig, TrainingConfig
from cropkt.experts.abmil import Abmil
from cropkt.experts.training import batches, cosine_with_warmup, epochs, updates_per_epoch
from cropkt.survival.likelihood import discrete_nll, risk
from cropkt.transfer.roupkt import Roupkt, balance_loss, z_loss


class Expert(nn.Module):
    """One gated-attention expert."""

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__()
        self.project = nn.Linear(shape.dim, shape.embed)
        self.gate_tanh = nn.Linear(shape.embed, shape.attention)
        self.gate_sigmoid = nn.Linear(shape.embed, shape.attention)
        self.score = nn.Linear(shape.attention, 1)
        self.head = nn.Linear(shape.embed, shape.bins)

    @classmethod
    def of(cls, experts: Abmil, model: int = 0) -> Expert:
        """Return one model of a stack."""
        one = cls(experts.shape)
        with torch.no_grad():
            for name, layer in one.named_children():
                _copy(layer, getattr(experts, name)[model], getattr(experts, f"{name}_bias")[model])
        return one

    def slide_feature(self, bag: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return slide feature (E,) and attention (N,) of a bag (N, D)."""
        hidden = F.relu(self.project(bag.float()))
        gates = torch.tanh(self.gate_tanh(hidden)) * torch.sigmoid(self.gate_sigmoid(hidden))
        attention = torch.softmax(self.score(F.dropout(gates, dropout)).squeeze(1), 0)
        return attention @ hidden, attention

    def forward(self, bag: Tensor, dropout: float = 0.0) -> Tensor:
        """Return hazard logits (T,)."""
        logits: Tensor = self.head(self.slide_feature(bag, dropout)[0])
        return logits


class Router(nn.Module):
    """One router over X frozen experts' slide features, each with an adapter and a head."""

    def __init__(self, routers: Roupkt, model: int) -> None:
        super().__init__()
        experts, embed, _ = routers.adapter.shape[1:]
        shape = ExpertShape(
            dim=routers.dim,
            embed=embed,
            attention=routers.score.shape[1],
            bins=routers.head.shape[2],
        )
        self.expert = Expert(shape)
        with torch.no_grad():
            for name, layer in self.expert.named_children():
                if name != "head":
                    bias = getattr(routers, f"{name}_bias")[model]
                    _copy(layer, getattr(routers, name)[model], bias)
        del self.expert.head
        self.gate = nn.Parameter(routers.gate[model].detach().clone())  # (X, E)
        self.prior = routers.prior[model].clone()
        self.adapters = nn.ModuleList(nn.Linear(embed, embed) for _ in range(experts))
        self.heads = nn.ModuleList(nn.Linear(embed, shape.bins) for _ in range(experts))
        with torch.no_grad():
            for x in range(experts):
                _copy(self.adapters[x], routers.adapter[model, x], routers.adapter_bias[model, x])
                _copy(self.heads[x], routers.head[model, x], routers.head_bias[model, x])

    def forward(
        self, bag: Tensor, features: Tensor, config: RouterConfig, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return hazard logits (T,), gates (X,) and router logits (X,)."""
        logits = self.gate @ self.expert.slide_feature(bag, dropout)[0] + self.prior
        gates = logits.softmax(0)
        order = gates.argsort(descending=True, stable=True).tolist()
        if config.keep_own:
            order = [0, *(x for x in order if x)]
        chosen = order[: config.top_k]
        total = gates[chosen].sum() if config.renormalise else 1.0
        said = [
            gates[x] / total * self.heads[x](F.relu(self.adapters[x](features[x]))) for x in chosen
        ]
        return torch.stack(said).sum(0), gates, logits


def train_expert(
    cohort: Cohort,
    learns: NDArray[np.bool_],
    expert: Expert,
    config: TrainingConfig,
    *,
    seed: int,
) -> Expert:
    """Train one expert in place on the patients it may learn from, (n,), and return it."""
    bins, event = torch.from_numpy(cohort.time_bins), torch.from_numpy(cohort.event)
    optimizer = torch.optim.AdamW(
        expert.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    for chosen in _updates(len(cohort), config, seed, optimizer):
        mine = [int(i) for i in chosen if learns[i]]
        optimizer.zero_grad()
        for i in mine:
            logits = expert(cohort.bag(i), config.dropout)[None]
            loss = discrete_nll(logits, bins[[i]], event[[i]], alpha=config.alpha, loss=config.loss)
            torch.autograd.backward(loss.sum() / len(mine))
        optimizer.step()
    return expert


@torch.no_grad()
def zero_shot(
    experts: list[Expert], cohort: Cohort
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return risk (X, n) and slide features (X, n, E): one pass over the data an expert."""
    risks, features = [], []
    for expert in experts:
        mine = [expert.slide_feature(cohort.bag(i))[0] for i in range(len(cohort))]
        features.append(torch.stack(mine))
        risks.append(risk(expert.head(features[-1])))
    return torch.stack(risks).numpy(), torch.stack(features).numpy()


def train_router(
    cohort: Cohort,
    learns: NDArray[np.bool_],
    router: Router,
    features: Tensor,
    study: StudyConfig,
    *,
    seed: int,
) -> Router:
    """Train one router in place over experts' slide features (X, n, E), and return it."""
    config, training = study.router, study.training
    bins, event = torch.from_numpy(cohort.time_bins), torch.from_numpy(cohort.event)
    optimizer = torch.optim.AdamW(
        router.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    for chosen in _updates(len(cohort), config, seed, optimizer):
        mine = [int(i) for i in chosen if learns[i]]
        optimizer.zero_grad()
        losses, gates = [], []
        for i in mine:
            said, gate, logits = router(cohort.bag(i), features[:, i], config, training.dropout)
            loss = discrete_nll(
                said[None], bins[[i]], event[[i]], alpha=training.alpha, loss=training.loss
            )
            losses.append(loss.sum() + config.z_weight * z_loss(logits))
            gates.append(gate)
        if mine:
            balance = balance_loss(torch.stack(gates), over="batch")
            torch.autograd.backward(torch.stack(losses).mean() + config.balance_weight * balance)
        optimizer.step()
    return router


def clipped_sum(
    cohort: Cohort, patients: list[int], expert: Expert, *, alpha: float, clip: float
) -> list[Tensor]:
    """Return the sum over patients of their own clipped gradients, one patient at a time."""
    bins, event = torch.from_numpy(cohort.time_bins), torch.from_numpy(cohort.event)
    summed = [torch.zeros_like(p) for p in expert.parameters()]
    for i in patients:
        loss = discrete_nll(expert(cohort.bag(i))[None], bins[[i]], event[[i]], alpha=alpha).sum()
        gradient = torch.autograd.grad(loss, list(expert.parameters()))
        length = torch.sqrt(sum((g.square().sum() for g in gradient), torch.zeros(())))
        factor = (clip / (length + 1e-6)).clamp(max=1.0)
        for total, one in zip(summed, gradient, strict=True):
            total += factor * one
    return summed


def _copy(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give a linear layer these numbers."""
    assert isinstance(layer, nn.Linear)
    layer.weight.copy_(weight.view_as(layer.weight))
    layer.bias.copy_(bias)


def _updates(
    patients: int, config: OptimiserConfig, seed: int, optimizer: torch.optim.Optimizer
) -> Iterator[NDArray[np.int64]]:
    """Yield the patients of each update, the learning rate being set for it."""
    rng, each = np.random.default_rng(seed), updates_per_epoch(patients, config)
    total, at = epochs(patients, config) * each, 0
    for _ in range(epochs(patients, config)):
        for chosen in batches(patients, config, rng):
            factor = cosine_with_warmup(at, total=total, warmup=config.warmup_epochs * each)
            optimizer.param_groups[0]["lr"] = config.learning_rate * factor
            at += 1
            yield chosen
