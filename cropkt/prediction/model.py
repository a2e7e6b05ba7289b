"""The released model at work: a bag of patches becomes an answer.

Three models lie in one file. `released` is the guard's final decision: the experts' risks, in
units of the training cohort, times its weights. `router` is the study's router, `local` the own
expert alone. Experts without weight are not asked; the router first says whom it wants.

Intervals. `released`: 95 % percentiles over bootstrap samples of the training cohort (slope and
baseline) and over the own expert's models that leave one fold out. `local`, `router`: from the
lowest to the highest of the models that leave one fold out and that of all patients. Neither
holds what the guard's choice, the sources' own training or another population adds.

Shapes: N patches, D features, V views, S sources, E embedding, T bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cropkt.cohort.bags import PackedBags
from cropkt.errors import BagShapeError
from cropkt.experts.abmil import Abmil, BagOutput, unflatten
from cropkt.experts.device import moved
from cropkt.prediction.answer import Answer, Voice, agreement
from cropkt.prediction.kept import WHICH, Kept, Which
from cropkt.survival.baseline import Baseline
from cropkt.survival.likelihood import log_survival, risk
from cropkt.transfer.roupkt import Roupkt

_CPU = torch.device("cpu")
_ENDS = (2.5, 97.5)  # per cent


class ReleasedModel:
    """What the guard decided for one cancer at one site, ready for patients to come."""

    def __init__(self, kept: Kept, *, device: torch.device = _CPU) -> None:
        self.about, self._kept, self._device = kept.about, kept, device
        self._experts: dict[str, Abmil] = {}
        self._routers: dict[int, Roupkt] = {}
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}  # mean and deviation by view
        self._units: NDArray[np.float64] = kept.tensor("units")
        self._percentiles: NDArray[np.float64] = kept.tensor("percentiles")
        centre, spread = kept.tensor("scale")
        self._baseline = Baseline(
            slope=kept.tensor("slope"),
            hazard=kept.tensor("hazard"),
            centre=float(centre),
            spread=float(spread),
        )

    @classmethod
    def load(cls, path: Path, *, device: torch.device = _CPU) -> ReleasedModel:
        """Return the model in a file.

        Raises:
            ArtifactError: one of its kinds; says what is wrong with the file.
            OSError: it cannot be read.
        """
        return cls(Kept.open(path), device=device)

    def predict(
        self,
        bags: Sequence[Tensor],
        *,
        model: Which = "released",
        folds: Sequence[int | None] | None = None,
    ) -> list[Answer]:
        """Return what a model says of patients.

        Args:
            bags: (N_i, D) of each patient, in any floating dtype.
            model: which of the three.
            folds: of each patient the fold, if they are of the training cohort: then the models
                that did not see them answer. None, and by default: a patient to come.

        Raises:
            BagShapeError: a bag is empty, or of another width.
            ArtifactError: the file is damaged.
        """
        of = [None] * len(bags) if folds is None else list(folds)
        return [self._answer(bag, model, fold) for bag, fold in zip(bags, of, strict=True)]

    @torch.inference_mode()
    def _answer(self, bag: Tensor, model: Which, fold: int | None) -> Answer:
        dim = self.about.study.shape.dim
        if bag.ndim != 2 or bag.shape[1] != dim or not len(bag):
            problem = f"features have shape {tuple(bag.shape)}, expected (patches, {dim})"
            raise BagShapeError("bag", problem, "Extract all slides with the agreed encoder")
        asked = _Asked(self, moved(PackedBags.of([bag]), self._device))
        views = list(range(self.about.views)) if fold is None else [1 + fold]
        if model == "released":
            risks, weights, curves = self._guarded(asked, views)
        elif model == "router":
            risks, weights, curves = self._routed(asked, views)
        else:
            logits = torch.stack([asked.expert(0, view).logits[0, 0] for view in views])
            risks, weights, curves = risk(logits.cpu()).numpy(), np.ones(1), _curves(logits)
        return self._told(asked, model, fold, views[0], risks, weights, curves)

    def _guarded(
        self, asked: _Asked, views: list[int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return risk (V), weights (1 + S,) and survival (V, 1 + B, T) of the guard's answer."""
        weights = np.array(self.about.weights)
        sources = sum(
            weights[index] * asked.in_units(index, 0)
            for index in range(1, len(weights))
            if weights[index] > 0
        )
        own = [weights[0] * asked.in_units(0, view) if weights[0] > 0 else 0.0 for view in views]
        answer = np.array(own) + sources
        return answer, weights, self._baseline.survival(answer)

    def _routed(
        self, asked: _Asked, views: list[int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return risk (V), weights (1 + S,) of the first view, and survival (V, 1, T)."""
        logits, first = [], np.empty(0)
        for view in views:
            router, config = self._router(view), self.about.study.router
            _, _, weights = router.weigh(asked.bag, config)  # (1, 1, 1 + S)
            chosen = torch.nonzero(weights[0, 0]).flatten().tolist()
            features = torch.stack([asked.expert(i, view).features[0] for i in chosen])
            share = weights[:, :, chosen].transpose(1, 2)  # (1, C, 1)
            logits.append(router.mixed(features[None], share, experts=chosen)[0, 0])
            if not len(first):
                first = weights[0, 0].double().cpu().numpy()
        stacked = torch.stack(logits)
        return risk(stacked.cpu()).numpy(), first, _curves(stacked)

    def _told(
        self,
        asked: _Asked,
        model: Which,
        fold: int | None,
        view: int,
        risks: NDArray[np.float64],
        weights: NDArray[np.float64],
        curves: NDArray[np.float64],
    ) -> Answer:
        steps = self._percentiles[WHICH.index(model)]
        median = float(np.median(steps))
        several = curves.reshape(-1, curves.shape[-1])
        ends = _ENDS if model == "released" else (0.0, 100.0)
        low, high = np.percentile(several, ends, axis=0)
        if len(several) == 1:
            low = high = np.full(curves.shape[-1], np.nan)
        of_source = 0 if model == "released" else view
        voices = [
            Voice(
                cancer=self.about.experts[index],
                own=index == 0,
                weight=float(weights[index]),
                risk=asked.in_units(index, view if index == 0 else of_source),
                attention=asked.attention(index, view if index == 0 else of_source),
            )
            for index in np.argsort(-weights, kind="stable").tolist()
            if weights[index] > 0
        ]
        looked = np.stack([voice.attention for voice in voices])
        share = np.array([voice.weight for voice in voices])
        side = risks[0] > median
        versions = risks[1:] if fold is None else risks
        return Answer(
            model=model,
            fold=fold,
            risk=float(risks[0]),
            percentile=float(np.interp(risks[0], steps, np.linspace(0, 100, len(steps)))),
            high=bool(side),
            same_side=int(((versions > median) == side).sum()),
            versions=len(versions),
            survival=curves[0, 0],
            low=low,
            high_end=high,
            followed=self.about.followed,
            voices=tuple(voices),
            attention=share @ looked / share.sum(),
            agreement=agreement([voice.attention for voice in voices]),
        )

    def _expert(self, name: str, view: int) -> Abmil:
        """Return the expert of a tensor, reading features as the patients of a view do."""
        if name not in self._experts:
            row = torch.from_numpy(self._kept.tensor(name))[None]
            expert = Abmil.from_flat(self.about.study.shape, row).requires_grad_(False)
            self._experts[name] = expert.to(self._device)
        self._standardise(self._experts[name], view)
        return self._experts[name]

    def _router(self, view: int) -> Roupkt:
        if view not in self._routers:
            study = self.about.study
            experts, heads = 1 + len(self.about.sources), study.router.warm_start
            router = Roupkt(study.shape, experts=experts, own_heads=heads)
            unflatten(router, torch.from_numpy(self._kept.tensor(f"router/{view}"))[None])
            router.prior.copy_(torch.from_numpy(self._kept.tensor("prior"))[view])
            self._routers[view] = router.requires_grad_(False).to(self._device)
            self._standardise(self._routers[view], view)
        return self._routers[view]

    def _standardise(self, module: Abmil | Roupkt, view: int) -> None:
        if self.about.study.training.standardise == "none":
            return
        if view not in self._inputs:
            mean = torch.from_numpy(self._kept.tensor(f"mean/{view}"))
            self._inputs[view] = mean, torch.from_numpy(self._kept.tensor(f"deviation/{view}"))
        module.standardise(*self._inputs[view])


class _Asked:
    """One patient's bag, and what experts said of it so far: each is asked once."""

    def __init__(self, model: ReleasedModel, bag: PackedBags) -> None:
        self._model, self.bag = model, bag
        self._said: dict[tuple[str, int], BagOutput] = {}

    def expert(self, index: int, view: int) -> BagOutput:
        """Return what an expert says; index 0 is the own one, whose model a view chooses."""
        name = f"own/{view}" if index == 0 else f"source/{index - 1}"
        if self._model.about.study.training.standardise == "none" and index > 0:
            view = 0  # all views read alike
        if (name, view) not in self._said:
            self._said[name, view] = self._model._expert(name, view).outputs(self.bag)
        return self._said[name, view]

    def in_units(self, index: int, view: int) -> float:
        """Return an expert's risk in units of the training cohort; 0 if it says nothing."""
        centre, deviation = self._model._units[:, index]
        said = float(risk(self.expert(index, view).logits.cpu())[0, 0])
        return (said - float(centre)) / float(deviation) if deviation > 1e-12 else 0.0

    def attention(self, index: int, view: int) -> NDArray[np.float64]:
        """Return the expert's attention (N,)."""
        return self.expert(index, view).attention[0].double().cpu().numpy()


def _curves(logits: Tensor) -> NDArray[np.float64]:
    """Return survival (V, 1, T) of hazard logits (V, T)."""
    curves: NDArray[np.float64] = log_survival(logits.cpu().double()).exp().numpy()[:, None]
    return curves
