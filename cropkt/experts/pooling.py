"""Gated attention pooling: at once where it fits, else in blocks, with the same result.

A block is some models on some patches. The softmax over a bag's patches runs along with them:
the largest score so far, the sum of exponentials and the weighted sum, scaled anew whenever a
larger score appears, so nothing is approximated. For gradients each block is computed a second
time, so that the layers of one block are all that lies in memory.
Shapes: F models, B bags, P patches of all bags, C of a block, D features, E embedding, A attention.

References:
    Milakov and Gimelshein, arXiv 1805.02867; recomputation: Chen et al., arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cropkt.cohort.bags import PackedBags

BLOCK = 1 << 23  # float32 values of one block's hidden layer on a CPU, 32 MiB
WIDE = 16  # models of a block: wider products are no faster
MASKS = 1 << 27  # bytes of the dropout masks that are held at once
ALL = slice(None)  # models


class Weights(NamedTuple):
    """The weights of F attention networks, the input scaling folded in."""

    project: Tensor  # (F, E, D)
    project_bias: Tensor  # (F, E)
    gate_tanh: Tensor  # (F, A, E)
    gate_tanh_bias: Tensor  # (F, A)
    gate_sigmoid: Tensor  # (F, A, E)
    gate_sigmoid_bias: Tensor  # (F, A)
    score: Tensor  # (F, A)
    score_bias: Tensor  # (F, 1)

    def of(self, models: slice) -> Weights:
        """Return the weights of some models."""
        return self if models == ALL else Weights(*(weight[models] for weight in self))


def layer_values(weights: Weights, bags: PackedBags) -> int:
    """Return how many numbers a pass at once, forward and back, holds for these bags."""
    models, embed, _ = weights.project.shape
    return (
        models * bags.patches.shape[0] * values_of_patch(embed, weights.score.shape[1], bags.count)
    )


def values_of_patch(embed: int, attention: int, bags: int) -> int:
    """Return how many numbers one model holds for a patch: layers, and their gradients."""
    return 3 * embed + 8 * attention + 3 * bags


def pooled_at_once(
    weights: Weights, bags: PackedBags, factor: Tensor | None, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return slide features (F, B, E) and attention (F, P), all layers in memory.

    Args:
        weights: of the models.
        bags: packed bags.
        factor: (F, P, A) of each gate, for dropout.
        compute: type of the products; sums over patches are float32.
    """
    hidden, scores = _layers(weights, bags.patches, factor, compute)
    mine = bags.segment == torch.arange(bags.count, device=bags.segment.device)[:, None]
    share = scores[:, None].masked_fill(~mine, -torch.inf).softmax(2)  # (F, B, P)
    return share @ hidden, share.sum(1)


@dataclass(frozen=True, slots=True)
class Dropout:
    """Which gates are dropped: drawn when needed, or drawn before."""

    rate: float = 0.0
    generators: Sequence[torch.Generator] = ()  # one a model, if drawn when needed
    keep: Tensor | None = None  # (F, P, A) bool, if drawn before

    def kept(self, models: slice, shape: tuple[int, int, int]) -> Tensor | None:
        """Return which gates of some models are kept, or None if all are."""
        if not self.rate:
            return None
        if self.keep is not None:
            return self.keep[models]
        return drawn(self.generators[models], shape, self.rate)

    def again(self) -> Dropout:
        """Return what will draw the same as this one draws from now on."""
        copies = [torch.Generator().set_state(g.get_state()) for g in self.generators]
        return replace(self, generators=copies)


def pooled_in_blocks(
    weights: Weights, bags: PackedBags, dropout: Dropout, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return slide features (F, B, E) and attention (F, P), one block in memory; no gradient."""
    (models, embed, _), patches = weights.project.shape, bags.patches.shape[0]
    device = bags.segment.device
    features = torch.empty(models, bags.count, embed, device=device)
    attention = torch.empty(models, patches, device=device)
    for some, keep in _model_blocks(weights, bags, dropout):
        mine, count = weights.of(some), some.stop - some.start
        peak = torch.full((count, bags.count), -torch.inf, device=device)
        total = torch.zeros(count, bags.count, device=device)
        summed = torch.zeros(count, bags.count, embed, device=device)
        scores = attention[some]
        for rows in _patch_blocks(mine, patches):
            factor = _factor(keep, rows, dropout.rate, scores.device)
            hidden, scores[:, rows] = _layers(mine, bags.patches[rows], factor, compute)
            segment = bags.segment[rows]
            first, last = max(0, int(segment.min())), int(segment.max()) + 1
            here = segment == torch.arange(first, last, device=segment.device)[:, None]
            score = scores[:, None, rows].masked_fill(~here, -torch.inf)  # (f, b, C)
            so_far = peak[:, first:last]
            higher = torch.maximum(so_far, score.amax(2))
            finite = higher.masked_fill(higher.isinf(), 0)  # a bag of which no patch came yet
            share = (score - finite[..., None]).exp()
            shrink = (so_far - finite).exp()
            total[:, first:last] = total[:, first:last] * shrink + share.sum(2)
            summed[:, first:last] = summed[:, first:last] * shrink[..., None] + share @ hidden
            peak[:, first:last] = higher
        features[some] = summed / total[..., None]
        of_bag = bags.segment.clamp(min=0)
        scores.sub_(peak[:, of_bag]).exp_().div_(total[:, of_bag])
        scores.masked_fill_(bags.segment < 0, 0)
    return features, attention


class PooledAgain(torch.autograd.Function):
    """`pooled_in_blocks` with gradients: the way back computes each block's layers again."""

    @staticmethod
    def forward(
        ctx: Any, bags: PackedBags, dropout: Dropout, compute: torch.dtype, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return slide features (F, B, E) and attention (F, P)."""
        ctx.bags, ctx.dropout, ctx.compute = bags, dropout.again(), compute
        features, attention = pooled_in_blocks(Weights(*weights), bags, dropout, compute)
        ctx.save_for_backward(features, attention, *weights)
        return features, attention

    @staticmethod
    def backward(ctx: Any, of_features: Tensor, of_attention: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the weights; bags and dropout have none."""
        features, attention, *saved = ctx.saved_tensors
        bags, weights = ctx.bags, Weights(*saved)
        of_bag = bags.segment.clamp(min=0)
        # d score = attention x (what this patch would add - what its bag has on average)
        level = (of_features * features).sum(2)  # (F, B)
        level.index_add_(1, of_bag, of_attention * attention)
        gradients = [torch.zeros_like(weight) for weight in weights]
        for some, keep in _model_blocks(weights, bags, ctx.dropout):
            mine = Weights(*(weight[some].detach().requires_grad_() for weight in weights))
            for rows in _patch_blocks(mine, bags.patches.shape[0], backward=True):
                factor = _factor(keep, rows, ctx.dropout.rate, attention.device)
                with torch.enable_grad():
                    hidden, scores = _layers(mine, bags.patches[rows], factor, ctx.compute)
                share, here = attention[some, rows], of_bag[rows]
                of_hidden = of_features[some][:, here]  # (f, C, E)
                gain = (of_hidden * hidden.detach()).sum(2) + of_attention[some, rows]
                of_scores = share * (gain - level[some][:, here])
                torch.autograd.backward([hidden, scores], [of_hidden * share[..., None], of_scores])
            for gradient, weight in zip(gradients, mine, strict=True):
                if weight.grad is not None:
                    gradient[some] = weight.grad
        return None, None, None, *gradients


def drawn(
    generators: Sequence[torch.Generator], shape: tuple[int, int, int], dropout: float
) -> Tensor:
    """Return which gates of `shape` (F, P, A) dropout keeps; model f draws from its own generator.

    Drawn on the CPU: a seed means the same on every device.
    """
    keep = torch.empty(shape, dtype=torch.bool)
    for row, generator in zip(keep, generators, strict=True):
        row.bernoulli_(1 - dropout, generator=generator)
    return keep


def scaled(keep: Tensor, dropout: float, device: torch.device) -> Tensor:
    """Return the factor of each gate: 0, or what makes up for those that are dropped."""
    return keep.to(device).float() / (1 - dropout)


def _layers(
    weights: Weights, patches: Tensor, factor: Tensor | None, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return hidden layer (F, C, E) and attention scores (F, C) of patches (C, D)."""
    models, embed, dim = weights.project.shape
    weights = Weights(*(weight.to(compute) for weight in weights))
    wide = torch.addmm(
        weights.project_bias.reshape(-1),
        patches.to(compute),
        weights.project.reshape(-1, dim).t(),
    )
    hidden = wide.relu_().view(-1, models, embed).transpose(0, 1)  # (F, C, E)
    by_tanh = (hidden @ weights.gate_tanh.transpose(1, 2)).add_(weights.gate_tanh_bias[:, None])
    by_sigmoid = (hidden @ weights.gate_sigmoid.transpose(1, 2)).add_(
        weights.gate_sigmoid_bias[:, None]
    )
    gates = by_tanh.tanh_() * by_sigmoid.sigmoid_()  # (F, C, A)
    if factor is not None:
        gates = gates * factor
    scores = (gates.float() @ weights.score.float()[:, :, None]).squeeze(2)
    return hidden.float(), scores + weights.score_bias.float()


def _model_blocks(
    weights: Weights, bags: PackedBags, dropout: Dropout
) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield models that are computed together, and which of their gates are kept."""
    (models, attention), patches = weights.score.shape, bags.patches.shape[0]
    count = min(models, WIDE)
    if dropout.rate and dropout.keep is None:
        count = max(1, min(count, MASKS // (patches * attention)))
    for start in range(0, models, count):
        some = slice(start, min(start + count, models))
        yield some, dropout.kept(some, (some.stop - start, patches, attention))


def _patch_blocks(weights: Weights, patches: int, *, backward: bool = False) -> Iterator[slice]:
    """Yield patches that are computed together."""
    models, embed, dim = weights.project.shape
    values = max(models * embed, dim)
    if backward:
        values = models * values_of_patch(embed, weights.score.shape[1], 1) // 4
    block = BLOCK if weights.project.device.type == "cpu" else 8 * BLOCK
    rows = max(1, block // values)
    for start in range(0, patches, rows):
        yield slice(start, min(start + rows, patches))


def _factor(
    keep: Tensor | None, rows: slice, dropout: float, device: torch.device
) -> Tensor | None:
    return None if keep is None else scaled(keep[:, rows], dropout, device)
