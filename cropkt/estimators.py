"""Experts and released models for those who know torch and scikit-survival, not cropkt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sksurv.base import SurvivalAnalysisMixin
from sksurv.functions import StepFunction
from torch import Tensor

from cropkt import published
from cropkt.errors import UsageError
from cropkt.experts.abmil import Abmil
from cropkt.experts.artifact import load_artifact
from cropkt.experts.card import Card
from cropkt.experts.single import SlideExpert
from cropkt.prediction.model import ReleasedModel
from cropkt.survival.bins import bin_ends
from cropkt.survival.likelihood import log_survival, risk

_LEAST = 1e-12  # survival, so that its cumulative hazard is finite


def load_expert(path: str | Path, *, signer: str | None = None, model: int = 0) -> SlideExpert:
    """Return an expert as one plain torch module, frozen, on the CPU.

    Args:
        path: of a signed expert (`cropkt-server experts --export`) or of a published ABMIL
            checkpoint (`.pth`, `.pt`).
        signer: public key that has to have signed the expert, as on its card; None takes any
            signer, and then the signature tells only that the file is whole.
        model: which of the expert's models; the first learnt from all patients of its site.

    Raises:
        ArtifactError: one of its kinds; says what is wrong with the file.
        UsageError: there is no such model.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return published.load_expert(path)

    def trusted(card: Card) -> bool:
        return signer is None or card.signer == signer

    expert = load_artifact(path, trusted=trusted)
    count = len(expert.card.models)
    if not 0 <= model < count:
        raise UsageError(path, f"it has no model {model}", f"Choose one of 0 to {count - 1}")
    weights = torch.from_numpy(expert.weights[model : model + 1].copy())
    return SlideExpert(Abmil.from_flat(expert.card.shape, weights).requires_grad_(False))


class SurvivalEstimator(SurvivalAnalysisMixin, BaseEstimator):  # type: ignore[misc]
    """A frozen model with the methods of a scikit-survival estimator; patients are bags (N, D)."""

    def __init__(self, model: SlideExpert | ReleasedModel) -> None:
        self.model = model

    @property
    def unique_times_(self) -> NDArray[np.float64]:
        """Days at the end of each time bin, (T,)."""
        model = self.model
        shape = model.abmil.shape if isinstance(model, SlideExpert) else model.about.study.shape
        return bin_ends(shape.bins)

    def fit(self, X: object = None, y: object = None) -> SurvivalEstimator:
        """Return this estimator as it is: the model was trained where its patients are."""
        return self

    def predict(self, X: Sequence[ArrayLike | Tensor]) -> NDArray[np.float64]:
        """Return the risk (n,) of n bags (N_i, D); higher dies earlier.

        Raises:
            BagShapeError: a bag has another width.
        """
        return self._told(X)[0]

    def predict_survival_function(
        self, X: Sequence[ArrayLike | Tensor], return_array: bool = False
    ) -> NDArray[np.float64] | NDArray[np.object_]:
        """Return survival of n bags: n step functions of days, or an array (n, T)."""
        survival = self._told(X)[1]
        return survival if return_array else self._steps(survival, before=1.0)

    def predict_cumulative_hazard_function(
        self, X: Sequence[ArrayLike | Tensor], return_array: bool = False
    ) -> NDArray[np.float64] | NDArray[np.object_]:
        """Return the cumulative hazard of n bags: n step functions of days, or an array (n, T)."""
        hazard = -np.log(np.maximum(self._told(X)[1], _LEAST))
        return hazard if return_array else self._steps(hazard, before=0.0)

    @torch.inference_mode()
    def _told(
        self, bags: Sequence[ArrayLike | Tensor]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return risk (n,) and survival (n, T)."""
        tensors = [bag if isinstance(bag, Tensor) else torch.as_tensor(bag) for bag in bags]
        if isinstance(self.model, ReleasedModel):
            answers = self.model.predict(tensors)
            risks = np.array([answer.risk for answer in answers])
            return risks, np.stack([answer.survival for answer in answers])
        logits = torch.stack([self.model(bag) for bag in tensors]).double()
        return risk(logits).numpy(), log_survival(logits).exp().numpy()

    def _steps(self, values: NDArray[np.float64], *, before: float) -> NDArray[np.object_]:
        """Return step functions from day 0, where each has the value `before`."""
        days = np.concatenate([[0.0], self.unique_times_])
        steps = np.empty(len(values), dtype=object)
        steps[:] = [StepFunction(x=days, y=np.concatenate([[before], row])) for row in values]
        return steps
