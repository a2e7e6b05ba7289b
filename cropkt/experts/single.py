"""One expert as a plain torch module for one bag, frozen: also a feature extractor."""

from __future__ import annotations

from torch import Tensor, nn

from cropkt.cohort.bags import PackedBags
from cropkt.errors import BagShapeError
from cropkt.experts.abmil import Abmil, BagOutput


class SlideExpert(nn.Module):
    """One expert; `abmil` is the same as a stack of one."""

    def __init__(self, abmil: Abmil) -> None:
        super().__init__()
        self.abmil = abmil

    def outputs(self, bag: Tensor) -> BagOutput:
        """Return logits, slide feature and attention of one bag (N, D)."""
        return self.abmil.outputs(one_bag(bag, self.abmil.dim))

    def forward(self, bag: Tensor) -> Tensor:
        """Return the hazard logits (T,) of a bag (N, D)."""
        return self.outputs(bag).logits[0, 0]

    def slide_feature(self, bag: Tensor) -> Tensor:
        """Return the slide feature (E,) of a bag (N, D)."""
        return self.outputs(bag).features[0, 0]

    def attention(self, bag: Tensor) -> Tensor:
        """Return the attention (N,) over the patches of a bag (N, D); it sums to 1."""
        return self.outputs(bag).attention[0]

    def standardise(self, mean: Tensor, deviation: Tensor) -> SlideExpert:
        """Let the expert read (x - mean) / deviation, each (D,); return it.

        A site that trains on standardised features keeps the mean and deviation of its patches to
        itself. Such an expert reads features elsewhere by those of the patches there.
        """
        self.abmil.standardise(mean, deviation)
        return self


def one_bag(bag: Tensor, dim: int) -> PackedBags:
    """Return a bag (N, D) packed.

    Raises:
        BagShapeError: it is none of that width.
    """
    if bag.ndim != 2 or bag.shape[1] != dim:
        raise BagShapeError(
            "bag",
            f"has shape {tuple(bag.shape)}, expected (n_patches, {dim})",
            "Extract with the encoder that the expert was trained on",
        )
    return PackedBags.of([bag])
