"""Gated attention over the patches of a bag (ABMIL), F models side by side.

One object holds F experts of the same shape, so that the folds of one cancer train from one
read of the data, and so that a bank of experts sees a bag once. A single expert is F = 1.
Shapes: F models, B bags, P patches of all bags, D features, E embedding, A attention, T bins.

    Linear D->E + ReLU; tanh(Linear E->A) * sigmoid(Linear E->A) -> Linear A->1; softmax over
    the patches of a bag; weighted sum = slide feature (E); Linear E->T = hazard logits

References:
    Ilse et al., arXiv 1802.04712; widths as published in arXiv 2508.13482.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log, prod

import torch
from torch import Tensor, nn

from cropkt.cohort.bags import PackedBags
from cropkt.config import ExpertShape
from cropkt.experts.device import room
from cropkt.experts.measured import compute_type
from cropkt.experts.pooling import (
    ALL,
    BLOCK,
    Dropout,
    PooledAgain,
    Weights,
    layer_values,
    pooled_at_once,
    pooled_in_blocks,
    scaled,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BagOutput:
    """What F models say of B bags."""

    logits: Tensor  # (F, B, T) hazard logits
    features: Tensor  # (F, B, E) slide features
    attention: Tensor  # (F, P) attention, sums to 1 over the patches of each bag


class Attention(nn.Module):
    """Projection and gated attention pooling of F models: patches to one feature a bag."""

    def __init__(self, *, models: int, dim: int, embed: int, attention: int) -> None:
        super().__init__()
        self.models, self.dim = models, dim
        self.project = nn.Parameter(torch.empty(models, embed, dim))
        self.project_bias = nn.Parameter(torch.empty(models, embed))
        self.gate_tanh = nn.Parameter(torch.empty(models, attention, embed))
        self.gate_tanh_bias = nn.Parameter(torch.empty(models, attention))
        self.gate_sigmoid = nn.Parameter(torch.empty(models, attention, embed))
        self.gate_sigmoid_bias = nn.Parameter(torch.empty(models, attention))
        self.score = nn.Parameter(torch.empty(models, attention))
        self.score_bias = nn.Parameter(torch.empty(models, 1))
        # Standardisation is the site's own and is not a weight: it never leaves with an expert.
        self.register_buffer("shift", torch.zeros(models, dim), persistent=False)
        self.register_buffer("scale", torch.ones(models, dim), persistent=False)
        self.shift: Tensor
        self.scale: Tensor
        self.plain = True  # the input is taken as it is
        self.compute: torch.dtype | None = None  # of the products; None: as this machine is faster

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Let the input be (x - mean) / deviation, each (F, D) or (D,)."""
        self.shift.copy_(mean)
        self.scale.copy_(1 / deviation)
        self.plain = bool((self.shift == 0).all() and (self.scale == 1).all())

    @contextlib.contextmanager
    def standardised(self, mean: Tensor, deviation: Tensor) -> Iterator[None]:
        """Let the input be (x - mean) / deviation, each (F, D) or (D,), while the block runs."""
        shift, scale, plain = self.shift.clone(), self.scale.clone(), self.plain
        self.standardise(mean, deviation)
        try:
            yield
        finally:
            self.shift.copy_(shift)
            self.scale.copy_(scale)
            self.plain = plain

    def forward(
        self,
        bags: PackedBags,
        *,
        dropout: float = 0.0,
        generators: Sequence[torch.Generator] = (),
        keep: Tensor | None = None,
        models: slice = ALL,
    ) -> tuple[Tensor, Tensor]:
        """Return slide features (F, B, E) and attention (F, P).

        Layers that would not fit in memory are computed block by block, with the same result.

        Args:
            bags: packed bags of width D, in any floating dtype.
            dropout: rate on both gates.
            generators: one a model when `dropout` is not 0: a model's dropout depends on no other.
            keep: (F, P, A) which gates dropout keeps, if that was drawn before.
            models: which of the models; all others, too, count as F.
        """
        weights = self._folded(models)
        device, (count, attention) = weights.project.device, weights.score.shape
        compute = self.compute or compute_type(device, self.dim, self.project.shape[1])
        drop = Dropout(dropout, generators[models], keep)
        learning = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if learning:
            at_once = layer_values(weights, bags) <= room(device)
        else:
            at_once = weights.project_bias.numel() * len(bags.patches) <= BLOCK
        if at_once:
            kept = drop.kept(ALL, (count, len(bags.patches), attention))
            factor = None if kept is None else scaled(kept, dropout, device)
            return pooled_at_once(weights, bags, factor, compute)
        if learning:
            apply: Callable[..., tuple[Tensor, Tensor]] = PooledAgain.apply
            return apply(bags, drop, compute, *weights)
        return pooled_in_blocks(weights, bags, drop, compute)

    def _folded(self, models: slice) -> Weights:
        """Return the weights of some models, the input scaling folded into the first layer."""
        weights = Weights(
            self.project,
            self.project_bias,
            self.gate_tanh,
            self.gate_tanh_bias,
            self.gate_sigmoid,
            self.gate_sigmoid_bias,
            self.score,
            self.score_bias,
        ).of(models)
        if self.plain:
            return weights
        project = weights.project * self.scale[models][:, None, :]  # (F, E, D)
        moved = (project @ self.shift[models][:, :, None]).squeeze(2)  # (F, E)
        return weights._replace(project=project, project_bias=weights.project_bias - moved)


class Abmil(Attention):
    """F discrete-time survival experts of one shape."""

    def __init__(self, shape: ExpertShape, *, models: int = 1) -> None:
        super().__init__(models=models, dim=shape.dim, embed=shape.embed, attention=shape.attention)
        self.shape = shape
        self.head = nn.Parameter(torch.empty(models, shape.bins, shape.embed))
        self.head_bias = nn.Parameter(torch.empty(models, shape.bins))

    @classmethod
    def initial(
        cls, shape: ExpertShape, *, seed: int, hazard: float | None = None, models: int = 1
    ) -> Abmil:
        """Return F copies of M0, the initial expert that every site of a study starts from.

        Args:
            shape: widths.
            seed: of the draw.
            hazard: yearly hazard that M0 gives every bag, so that training need not spend its
                few updates on the base rate; None for torch's draw, near one half.
            models: F.
        """
        module = cls(shape)
        initialise(module, torch.Generator().manual_seed(seed))
        if hazard is not None:
            module.head.data.zero_()
            module.head_bias.data.fill_(log(hazard / (1 - hazard)))
        return cls.from_flat(shape, flatten(module).expand(models, -1))

    @classmethod
    def from_flat(cls, shape: ExpertShape, weights: Tensor) -> Abmil:
        """Return the experts whose weights are the rows of `weights` (F, parameters)."""
        module = cls(shape, models=weights.shape[0])
        unflatten(module, weights)
        return module

    def outputs(
        self,
        bags: PackedBags,
        *,
        dropout: float = 0.0,
        generators: Sequence[torch.Generator] = (),
        keep: Tensor | None = None,
        models: slice = ALL,
    ) -> BagOutput:
        """Return hazard logits, slide features and attention of every model for every bag.

        The arguments are those of `Attention.forward`.
        """
        features, attention = self(
            bags, dropout=dropout, generators=generators, keep=keep, models=models
        )
        logits = self.predict(features, models=models)
        return BagOutput(logits=logits, features=features, attention=attention)

    def predict(self, features: Tensor, *, models: slice = ALL) -> Tensor:
        """Return hazard logits (F, B, T) of slide features (F, B, E)."""
        if models == ALL:
            return features @ self.head.transpose(1, 2) + self.head_bias[:, None]
        head, bias = self.head[models], self.head_bias[models]
        return features @ head.transpose(1, 2) + bias[:, None]


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill stacked parameters as `torch.nn.Linear` does: uniform within 1 / sqrt(fan in)."""
    fan_in = 1
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("_bias"):  # a bias follows its weight and shares the fan in
                fan_in = parameter.shape[-1]
            parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)


def parameter_count(module: nn.Module) -> int:
    """Return the number of weights of one of the F models in `module`."""
    return sum(prod(parameter.shape[1:]) for parameter in module.parameters())


def flatten(module: nn.Module) -> Tensor:
    """Return the weights as rows, (F, parameters) float32: one array travels, not twelve."""
    rows = [parameter.detach().flatten(1) for parameter in module.parameters()]
    return torch.cat(rows, dim=1).float()


def unflatten(module: nn.Module, weights: Tensor) -> None:
    """Copy rows (F, parameters) into the weights of `module`."""
    start = 0
    with torch.no_grad():
        for parameter in module.parameters():
            size = prod(parameter.shape[1:])
            parameter.copy_(weights[:, start : start + size].view_as(parameter))
            start += size
