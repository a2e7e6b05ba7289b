"""Trains a target's routers: one for all patients and one for each held-out fold, in one pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cropkt.cohort.bags import PackedBags
from cropkt.cohort.feed import packed
from cropkt.config import StudyConfig
from cropkt.experts.abmil import Abmil, flatten, unflatten
from cropkt.experts.bank import MAX_HIDDEN, Opinions, groups
from cropkt.experts.checkpoint import Checkpoint
from cropkt.experts.device import device_of, moved
from cropkt.experts.training import Epoch, Plan, fit, hash_seed, masked_mean, moments
from cropkt.survival.likelihood import discrete_nll, log_survival
from cropkt.transfer.roupkt import Roupkt, balance_loss, z_loss
from cropkt.transfer.target import Target


class RouterStack:
    """The 1 + K routers of one target, over its own expert and S sources; where these lie."""

    def __init__(
        self, target: Target, sources: Abmil, opinions: list[Opinions], study: StudyConfig
    ) -> None:
        self.target, self.study = target, study
        self.config = study.router
        self.device = device_of(sources)
        features = target.router_features(opinions, study.router)
        self.features = features.to(self.device)  # (1 + K, X, n, E)
        self.module = Roupkt.initial(
            study.shape,
            experts=self.features.shape[1],
            models=target.views,
            seed=hash_seed(study.seed, 1),
            config=study.router,
        ).to(self.device)
        self.excluded = tuple(() if view == 0 else (view - 1,) for view in range(target.views))
        own = [target.plan.model(*left_out) for left_out in self.excluded]
        if study.router.warm_start:
            self.module.warm_start(_rows(target.own, own), sources)
        if study.router.prior == "transfer":
            self.module.prior.copy_(target.prior(opinions, study.router))
        if study.training.standardise == "site":
            mean, deviation = moments(target.cohort, Plan(target.folds, self.excluded))
            self.module.standardise(mean, deviation)

    def load(self, weights: NDArray[np.float32]) -> None:
        """Take over routers (1 + K, parameters), for example a round's average."""
        unflatten(self.module, torch.tensor(weights))

    def train(
        self,
        on_epoch: Callable[[Epoch], None] | None = None,
        *,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Train all routers from where they stand, or from where the checkpoint stands."""
        target, config, training = self.target, self.config, self.study.training
        cohort = target.cohort
        learns = torch.from_numpy(Plan(target.folds, self.excluded).learns()).to(self.device)
        bins = torch.from_numpy(cohort.time_bins).to(self.device)
        event = torch.from_numpy(cohort.event).to(self.device)
        generators = [
            torch.Generator().manual_seed(hash_seed(self.study.seed, 2, view))
            for view in range(target.views)
        ]

        def step(chosen: NDArray[np.int64], bags: PackedBags) -> list[Tensor]:
            out = self.module.outputs(
                bags,
                self.features[:, :, chosen],
                config,
                generators=generators,
                dropout=training.dropout,
            )
            losses = discrete_nll(
                out.logits, bins[chosen], event[chosen], alpha=training.alpha, loss=training.loss
            )  # (1 + K, B)
            losses = losses + config.z_weight * z_loss(out.router_logits)
            mine = learns[:, chosen]  # (1 + K, B)
            balance = balance_loss(out.gates, over=config.balance, learns=mine)
            if config.balance == "patient":
                return [masked_mean(losses + config.balance_weight * balance, mine)]
            return [masked_mean(losses, mine) + config.balance_weight * balance.sum()]

        fit(
            self.module,
            step,
            cohort,
            config=config,
            seed=hash_seed(self.study.seed, 3),
            on_epoch=on_epoch,
            generators=generators,
            checkpoint=checkpoint,
        )

    @torch.inference_mode()
    def predict(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return out-of-fold survival (n, T) and each expert's weight for each patient (n, X)."""
        cohort, view = self.target.cohort, torch.from_numpy(1 + self.target.folds)
        survival, weights = [], []
        width = self.module.models * self.study.shape.embed
        some = list(groups(cohort, patches=max(1, MAX_HIDDEN // width)))
        for group, bags in packed(cohort, some):
            out = self.module.outputs(
                moved(bags, self.device), self.features[:, :, group], self.config
            )
            mine = (view[group], torch.arange(len(group)))
            survival.append(log_survival(out.logits.cpu()[mine].double()).exp())
            weights.append(out.weights.cpu()[mine])
        return torch.cat(survival).numpy(), torch.cat(weights).double().numpy()


def _rows(experts: Abmil, models: list[int]) -> Abmil:
    """Return some models of a stack."""
    return Abmil.from_flat(experts.shape, flatten(experts)[models])
