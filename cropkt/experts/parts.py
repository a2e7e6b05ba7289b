"""One update in parts: some models on some bags at a time, whose gradients add up to the whole's.

A patient's loss depends on no other patient and a model on no other model, so an update may go
through memory in any cut. The cut that computes most at once is taken, unless it does not fit, or
one bag at a time is measured to be faster here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from cropkt.cohort.bags import PackedBags
from cropkt.config import ExpertShape
from cropkt.experts.abmil import Abmil
from cropkt.experts.device import room
from cropkt.experts.measured import faster
from cropkt.experts.pooling import ALL, MASKS, drawn, values_of_patch

LARGE = 1 << 22  # hidden values of an update from which on the cut is worth a measurement
SAMPLE = 1024  # patches of the measurement; on a GPU 64 times as many
CLEARLY = 1.1  # one bag at a time must be so many times faster

Part = tuple[slice, list[slice]]  # models, and the runs of bags that they take in turn

log = logging.getLogger(__name__)


def cut(
    lengths: Sequence[int], *, models: int, each: int, masks: int, fits: int, together: bool
) -> list[Part]:
    """Return the parts of an update, each model and bag once.

    Args:
        lengths: patches of each bag.
        models: F.
        each: numbers that one model holds for one patch.
        masks: bytes of dropout masks that one model holds for one patch.
        fits: numbers that may be held at once.
        together: several bags at a time, where they fit.
    """
    total = sum(lengths)
    if together and models * total * each <= fits:
        return [(ALL, [slice(0, len(lengths))])]
    count = fits // (each * max(lengths))
    if masks:
        count = min(count, MASKS // (masks * total))
    count = min(models, max(1, count))
    runs, start, held = [], 0, 0
    for at, length in enumerate(lengths):
        if at > start and (not together or count * each * (held + length) > fits):
            runs.append(slice(start, at))
            start, held = at, 0
        held += length
    runs.append(slice(start, len(lengths)))
    some = [slice(first, min(first + count, models)) for first in range(0, models, count)]
    return [(group, runs) for group in some]


def losses_in_parts(
    experts: Abmil,
    bags: PackedBags,
    loss: Callable[[Tensor, slice, slice], Tensor],
    *,
    dropout: float,
    generators: Sequence[torch.Generator],
    together: bool,
) -> Iterator[Tensor]:
    """Yield the parts of an update's loss, one after the other, to be led back before the next.

    Args:
        experts: F models.
        bags: B bags of one update.
        loss: gives the loss of hazard logits (f, b, T) of some models on some bags.
        dropout: rate on the attention gates.
        generators: one a model.
        together: several bags at a time, where they fit.
    """
    lengths = torch.bincount(bags.segment, minlength=bags.count).tolist()
    attention = experts.score.shape[1]
    parts = cut(
        lengths,
        models=experts.models,
        each=values_of_patch(experts.shape.embed, attention, bags.count),
        masks=attention if dropout else 0,
        fits=room(experts.score.device),
        together=together,
    )
    for models, runs in parts:
        if models == ALL:
            out = experts.outputs(bags, dropout=dropout, generators=generators)
            yield loss(out.logits, ALL, ALL)
            continue
        keep = None
        if dropout:  # drawn for all bags at once, as where they are computed at once
            shape = models.stop - models.start, len(bags.patches), attention
            keep = drawn(generators[models], shape, dropout)
        for run in runs:
            first, last = sum(lengths[: run.start]), sum(lengths[: run.stop])
            some = PackedBags(
                patches=bags.patches[first:last],
                segment=bags.segment[first:last] - run.start,
                count=run.stop - run.start,
            )
            mine = None if keep is None else keep[:, first:last]
            out = experts.outputs(some, dropout=dropout, keep=mine, models=models)
            yield loss(out.logits, models, run)


def together_pays(
    shape: ExpertShape, *, models: int, bags: int, patches: int, device: torch.device
) -> bool:
    """Return whether several bags are trained on at a time, rather than one after the other.

    Small updates always go together. A large one is measured on random patches, once a process
    for bags of about this size.

    Args:
        shape: widths.
        models: F.
        bags: of an update.
        patches: of a bag in the middle.
        device: where they run.
    """
    if models * bags * patches * shape.embed < LARGE:
        return True
    limit = SAMPLE if device.type == "cpu" else 64 * SAMPLE
    size = min(1 << (patches.bit_length() - 1), limit // 4)
    return _measured(shape, size, device)


@cache
def _measured(shape: ExpertShape, patches: int, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    expert = Abmil.initial(shape, seed=0).to(device)
    some = [torch.randn(patches, shape.dim, generator=generator).to(device) for _ in range(4)]

    def learn(groups: list[PackedBags]) -> None:
        for group in groups:
            expert.outputs(group).logits.sum().backward()  # type: ignore[no-untyped-call]

    apart, joined = [PackedBags.of([bag]) for bag in some], [PackedBags.of(some)]
    gain = faster(lambda: learn(joined), lambda: learn(apart), device, repeats=3)
    log.info(
        "bags of about %d patches one at a time are %.2f times as fast as together: %s",
        *(patches, gain, "one at a time" if gain >= CLEARLY else "together"),
    )
    return gain < CLEARLY
