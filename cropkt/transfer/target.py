"""All that a target site knows when it decides whom to listen to.

The target's own experts are cross-fitted: for fold f, patients of another fold g are judged by
the model that saw neither f nor g, so that choices made for f are honest within and without.
Shapes: n patients, K folds, S sources, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cropkt.cohort.bags import Cohort
from cropkt.config import RouterConfig, StudyConfig
from cropkt.experts.abmil import Abmil
from cropkt.experts.bank import Opinions, Units, consult_in
from cropkt.experts.training import Plan, moments
from cropkt.survival.metrics import Estimate, Pairs, concordance_of, leads, over_controls
from cropkt.transfer.scores import shrunken, training_scores

Ask = Callable[[Abmil, Cohort, Sequence[Units | None]], list[Opinions]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """One target's patients, its own experts, and what the sources say.

    Row 0 of what is "per view" is for the model of all patients, row 1 + f for fold f.
    """

    cohort: Cohort
    plan: Plan
    own: Abmil  # the F cross-fitted experts of the target
    opinions: Opinions  # (F, n) of the own experts
    pairs: Pairs
    ask: Ask = consult_in  # how experts are asked: a site remembers what they said

    @classmethod
    def of(cls, cohort: Cohort, plan: Plan, own: Abmil, *, ask: Ask = consult_in) -> Target:
        """Return the target whose own experts are `own`, in the order of `plan`."""
        return cls(
            cohort=cohort,
            plan=plan,
            own=own,
            opinions=ask(own, cohort, [None])[0],
            pairs=Pairs.of(cohort.days, cohort.event),
            ask=ask,
        )

    @property
    def folds(self) -> NDArray[np.int64]:
        """Fold of each patient, (n,)."""
        return self.plan.folds

    @property
    def views(self) -> int:
        """1 + K."""
        return 1 + int(self.folds.max()) + 1

    def own_model(self, view: int, *, in_sample: bool = False) -> NDArray[np.int64]:
        """Return which own model judges each patient, (n,), when fold `view - 1` is held out."""
        left_out = () if view == 0 else (view - 1,)
        if in_sample:
            return np.full(len(self.cohort), self.plan.model(*left_out))
        of_fold = [self.plan.model(*left_out, fold) for fold in range(self.views - 1)]
        return np.array(of_fold)[self.folds]

    def local_risk(self, view: int = 0) -> NDArray[np.float64]:
        """Return the own experts' out-of-fold risk (n,), by models that never saw `view`."""
        risk: NDArray[np.float64] = self.opinions.risk[
            self.own_model(view), np.arange(len(self.cohort))
        ]
        return risk

    def local_score(self, view: int = 0) -> Estimate:
        """Return the own experts' C-index; for view 1 + f on the other folds' patients alone.

        Only pairs within a fold count: two folds are judged by two models.
        """
        within = self.pairs.inside(self.folds)
        if view:
            within = within.within(self.folds != view - 1)
        return concordance_of(within, self.local_risk(view))

    def units(self, config: StudyConfig) -> list[Units | None]:
        """Return per view the units in which sources read; [None] where all read alike.

        A source reads the target's patches in the target's own units, learnt on the training
        folds of the view.
        """
        if config.training.standardise == "none":
            return [None]
        mean, deviation = moments(self.cohort, self.plan)
        left_out = [() if view == 0 else (view - 1,) for view in range(self.views)]
        models = [self.plan.model(*folds) for folds in left_out]
        return [(mean[model], deviation[model]) for model in models]

    def consult(self, sources: Abmil, config: StudyConfig) -> list[Opinions]:
        """Return the sources' opinions per view, from one read; equal where all read alike."""
        found = self.ask(sources, self.cohort, self.units(config))
        return found if len(found) > 1 else found * self.views

    def consult_whole(self, sources: Abmil, config: StudyConfig) -> Opinions:
        """Return the sources' opinions in the units of all patients."""
        return self.ask(sources, self.cohort, self.units(config)[:1])[0]

    def source_scores(self, opinions: list[Opinions]) -> list[list[Estimate]]:
        """Return per view each source's C-index: row 0 on all patients, 1 + f without fold f."""
        if all(opinion is opinions[0] for opinion in opinions):
            risk = opinions[0].risk
            whole = [concordance_of(self.pairs, row) for row in risk]
            return [whole, *training_scores(self.pairs, self.folds, risk)]
        rows = []
        for view, opinion in enumerate(opinions):
            pairs = self.pairs.within(self.folds != view - 1)
            rows.append([concordance_of(pairs, row) for row in opinion.risk])
        return rows

    def leads_over(
        self, opinions: Opinions, controls: Opinions
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the sources' leads (S,) over control experts on all patients, and their errors."""
        return over_controls(self.pairs, opinions.risk, controls.risk)

    def router_features(self, opinions: list[Opinions], config: RouterConfig) -> Tensor:
        """Return slide features (1 + K, 1 + S, n, E) per view, the own expert first."""
        at = torch.arange(len(self.cohort))
        rows = []
        for view, opinion in enumerate(opinions):
            model = self.own_model(view, in_sample=config.self_features == "in_sample")
            own = self.opinions.features[torch.from_numpy(model), at]  # (n, E)
            rows.append(torch.cat([own[None], opinion.features]))
        return torch.stack(rows)

    def prior(self, opinions: list[Opinions], config: RouterConfig) -> Tensor:
        """Return the gates' starting logits (1 + K, 1 + S), from what each view may see."""
        within = self.pairs.inside(self.folds)  # two folds of the own expert share no scale
        rows = []
        for view, opinion in enumerate(opinions):
            risks = np.concatenate([self.local_risk(view)[None], opinion.risk])
            seen = within.within(self.folds != view - 1)
            rows.append(shrunken(*leads(seen, risks)))
        value = np.stack(rows)
        value -= value.max(1, keepdims=True)
        return torch.from_numpy(config.prior_strength * value).float()
