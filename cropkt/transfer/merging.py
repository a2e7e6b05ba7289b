"""Merging: one model in the target's own shape, made of task vectors.

All experts of a study start from the same M0, so an expert is M0 plus its task vector. A merged
model is M0 plus a weighted sum of the target's own vector and the sources'; its weights, one a
vector, and its head are learnt on the target. A penalty on the sources' weights pulls it to the
target's own vector alone; how hard is chosen inside the training folds.

With no sources this is the control `self_only`: the target's own vector rescaled, under a
retrained head. A gain of merging counts as transfer only over that.

Shapes: F models of the target's plan, X vectors (own first), B bags, P parameters.

References:
    Task vectors and their merging at the target: arXiv 2603.10526 (STEPH), where the weights come
    from a hypernetwork a patient; here one weight a vector, because a rare target has few events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from cropkt.cohort.bags import PackedBags
from cropkt.cohort.feed import packed
from cropkt.config import StudyConfig
from cropkt.experts.abmil import Abmil, flatten, unflatten
from cropkt.experts.bank import MAX_HIDDEN, groups
from cropkt.experts.device import device_of, moved
from cropkt.experts.training import fit, hash_seed, masked_mean, standardise_for
from cropkt.survival.likelihood import discrete_nll, log_survival
from cropkt.survival.metrics import Pairs, concordance_of
from cropkt.transfer.target import Target

PENALTIES = (10.0, 1.0, 0.1)  # on the squared weights of the sources, the strongest first
STEP = 10.0  # a weight moves so many times faster than the head
BETTER = 1.0  # standard errors by which a weaker penalty must lead


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What the merged models say, out of fold."""

    risk: NDArray[np.float64]  # (n,)
    survival: NDArray[np.float64]  # (n, T) at the end of each yearly bin
    weights: NDArray[np.float64]  # (K, X) of each vector, a row a fold, the own vector first
    penalties: tuple[float, ...]  # chosen for each fold


class MergedExperts(nn.Module):
    """F models M0 + sum of weight x task vector, with heads of their own."""

    def __init__(self, own: Abmil, sources: Tensor, initial: Tensor) -> None:
        """Take the own experts (F), sources (S, P) and M0 (P,), all frozen."""
        super().__init__()
        self.frame = Abmil(own.shape, models=own.models).requires_grad_(False)
        self.frame.standardise(own.shift, 1 / own.scale)
        self.register_buffer("initial", initial)
        self.register_buffer("own", flatten(own) - initial)
        self.register_buffer("sources", sources - initial)
        self.initial: Tensor
        self.own: Tensor
        self.sources: Tensor
        self.moved = nn.Parameter(torch.zeros(own.models, 1 + len(sources)))
        self.head = nn.Parameter(own.head.detach().clone())
        self.head_bias = nn.Parameter(own.head_bias.detach().clone())

    def weights(self) -> Tensor:
        """Return the weight of every vector, (F, X); at first the own one alone."""
        alone = torch.zeros_like(self.moved)
        alone[:, 0] = 1
        return alone + STEP * self.moved

    def logits(
        self, bags: PackedBags, *, dropout: float = 0.0, generators: Sequence[torch.Generator] = ()
    ) -> Tensor:
        """Return hazard logits (F, B, T)."""
        weights = self.weights()
        merged = self.initial + weights[:, :1] * self.own + weights[:, 1:] @ self.sources
        parts, start = dict[str, Tensor](), 0
        for name, parameter in self.frame.named_parameters():
            size = parameter[0].numel()
            parts[name] = merged[:, start : start + size].reshape(parameter.shape)
            start += size
        parts["head"], parts["head_bias"] = self.head, self.head_bias
        features, _ = functional_call(
            self.frame, parts, (bags,), {"dropout": dropout, "generators": generators}
        )
        logits: Tensor = features @ self.head.transpose(1, 2) + self.head_bias[:, None]
        return logits


def merged(target: Target, sources: NDArray[np.float32], study: StudyConfig) -> Merged:
    """Return the merged models' out-of-fold risk.

    Args:
        target: with its own cross-fitted experts.
        sources: (S, parameters) experts of other cancers; none gives `self_only`.
        study: training follows `router`, dropout, loss and standardisation `training`.

    Raises:
        TrainingFailedError: the loss is no longer finite.
    """
    penalties = PENALTIES if len(sources) else PENALTIES[:1]
    trained = [_trained(target, sources, study, penalty) for penalty in penalties]
    curves = [_survival(module, target) for module in trained]  # (F, n, T) each
    risks = [-curve.sum(-1) for curve in curves]
    count, folds = target.views - 1, target.folds
    answer = np.empty((len(folds), study.shape.bins))
    weights, chosen = [], []
    for fold in range(count):
        # Each training patient by the model that saw neither them nor this fold.
        model = np.array([target.plan.model(fold, other) for other in range(count)])[folds]
        inner = [risk[model, np.arange(len(folds))] for risk in risks]
        best = _weakest_that_leads(target.pairs.within(folds != fold).inside(folds), inner)
        mine, last = folds == fold, target.plan.model(fold)
        answer[mine] = curves[best][last, mine]
        weights.append(trained[best].weights()[last].detach().cpu().double().numpy())
        chosen.append(penalties[best])
    return Merged(
        risk=-answer.sum(-1),
        survival=answer,
        weights=np.stack(weights),
        penalties=tuple(chosen),
    )


def _weakest_that_leads(pairs: Pairs, risks: list[NDArray[np.float64]]) -> int:
    """Return the first risk (n,), unless a later one's C-index is a standard error higher."""
    scores = [concordance_of(pairs, risk) for risk in risks]
    best = 0
    for index, score in enumerate(scores):
        held = scores[best]
        if score.c_index is None or held.c_index is None or score.se is None:
            continue
        if score.c_index > held.c_index + BETTER * score.se:
            best = index
    return best


def _trained(
    target: Target, sources: NDArray[np.float32], study: StudyConfig, penalty: float
) -> MergedExperts:
    """Return the F merged models of one penalty."""
    cohort, plan, training = target.cohort, target.plan, study.training
    device = device_of(target.own)
    start = Abmil.initial(study.shape, seed=study.seed, hazard=study.initial_hazard)
    own = Abmil(study.shape, models=target.own.models).to(device)
    unflatten(own, flatten(target.own))
    standardise_for(own, cohort, plan, training)
    module = MergedExperts(
        own,
        torch.from_numpy(sources).reshape(-1, flatten(own).shape[1]).to(device),
        flatten(start)[0].to(device),
    ).to(device)
    learns = torch.from_numpy(plan.learns()).to(device)
    bins = torch.from_numpy(cohort.time_bins).to(device)
    event = torch.from_numpy(cohort.event).to(device)
    generators = [
        torch.Generator().manual_seed(hash_seed(study.seed, 4, *left_out))
        for left_out in plan.excluded
    ]

    def step(chosen: NDArray[np.int64], bags: PackedBags) -> list[Tensor]:
        logits = module.logits(bags, dropout=training.dropout, generators=generators)
        losses = discrete_nll(
            logits, bins[chosen], event[chosen], alpha=training.alpha, loss=training.loss
        )
        heavy = module.weights()[:, 1:].square().sum()
        return [masked_mean(losses, learns[:, chosen]) + penalty * heavy / len(cohort)]

    fit(
        module,
        step,
        cohort,
        config=study.router,
        seed=hash_seed(study.seed, 5),
        generators=generators,
    )
    return module


@torch.inference_mode()
def _survival(module: MergedExperts, target: Target) -> NDArray[np.float64]:
    """Return the survival (F, n, T) that each merged model gives each patient."""
    cohort, device = target.cohort, device_of(module)
    width = module.frame.models * module.frame.shape.embed
    parts = [
        log_survival(module.logits(moved(bags, device)).cpu().double()).exp()
        for _, bags in packed(cohort, list(groups(cohort, patches=max(1, MAX_HIDDEN // width))))
    ]
    return torch.cat(parts, 1).numpy()
