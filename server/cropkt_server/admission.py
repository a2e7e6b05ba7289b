"""What a model must be before it is taken in: a pure function of the study and of stored replies.

Alone, each model is held against what the study allows. AdamW moves a weight by at most a few
times the learning rate an update, whatever the gradients are, so the learning rates of a whole
training bound how far a weight may lie from where it began: no honest training is outside. On
probe bags drawn from the study's seed (no patient is in them) an expert must answer finitely up
to the largest float16 feature, and not the same to every bag.

Together, experts are held against each other. One that repeats the attention or the head of
another, with either sign, is a copy; the later of the two is refused, since nobody can copy what
is not there yet. Of five experts or more, one whose distance from M0, alignment with M0, spread
of risks or size of logits lies more than `FAR` robust standard deviations from the median is an
outlier; this depends on who is there, so it is asked when an average or the bank is decided, of
all at once, and not when a reply arrives.

What it cannot see: an expert trained well on wrong outcomes, or one altered within what honest
experts differ by. Whether an expert helps is for each target to measure on its own patients.
Growth with the number of patches is ruled out by the architecture, which averages over patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import atanh, ceil, log, sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from cropkt.cohort.bags import PackedBags
from cropkt.config import OptimiserConfig, StudyConfig
from cropkt.experts.abmil import Abmil, flatten
from cropkt.experts.training import hash_seed, updates_per_epoch
from cropkt.messages import Weights
from cropkt.survival.likelihood import risk

BETAS = (0.9, 0.999)  # of AdamW
COUNTED = 25  # patients: counts are rounded and suppressed, so a cohort may have this many more
COPIED = 0.01  # of the distance that a block of weights moved: closer to another's is a copy
FAR = 6.0  # robust standard deviations
ENOUGH = 5  # experts, below which there is no robust comparison
CONSTANT = 1e-6  # of the bins: a standard deviation of risks below it is none
PROBES = 32  # bags
AT_ONCE = 8  # models that answer the probes together
LARGEST = 65_504.0  # feature, in float16
BUCKETS = 256  # of a sketch

# The standard deviation that honest experts of different cohorts are at least allowed.
_FLOORS = {
    "distance of the attention from M0": 0.25,
    "distance of the head from M0": 0.25,
    "alignment with M0": 0.1,
    "spread of risks": 0.5,
    "size of logits": 0.25,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Portrait:
    """What of one expert is compared with others."""

    measures: dict[str, float]
    blocks: dict[str, NDArray[np.float64]]  # sketch of each block of weights
    moved: dict[str, float]  # how far each block moved


@dataclass(frozen=True, kw_only=True)
class Admission:
    """The checks of one study."""

    study: StudyConfig

    @cached_property
    def initial(self) -> Weights:
        """M0, (parameters,)."""
        study = self.study
        m0 = Abmil.initial(study.shape, seed=study.seed, hazard=study.initial_hazard)
        weights: Weights = flatten(m0)[0].numpy()
        return weights

    def expert_form(self, weights: Weights, *, shared: bool) -> str:
        """Return why a reply's weights are not experts of this study; nothing if they are.

        Args:
            weights: (1, parameters), or one a model of the folds where the cancer is shared.
            shared: whether it is.
        """
        models = self.study.models if shared else 1
        return _form("experts", weights, (models, len(self.initial)))

    def fold_models_form(self, weights: Weights) -> str:
        """Return why weights are not models (1 + folds, parameters) of this study, or nothing."""
        return _form("models", weights, (1 + self.study.folds, len(self.initial)))

    def router_form(self, weights: Weights, *, sources: int) -> str:
        """Return why a reply's weights are not routers of this study; nothing if they are.

        Args:
            weights: (1 + folds, parameters).
            sources: experts of other cancers that they route.
        """
        study, experts = self.study, 1 + sources
        one = study.shape.router_parameters(experts=experts, own_heads=study.router.warm_start)
        return _form("routers", weights, (1 + study.folds, one))

    def expert(
        self, weights: Weights, *, patients: int, start: Weights | None, private: bool = False
    ) -> str:
        """Return why a reply's experts cannot be taken in; nothing if they can.

        Args:
            weights: (F, parameters), of the right form.
            patients: whom the site described.
            start: what the round began with, (F, parameters); None is M0.
            private: it was trained with differential privacy, in fewer and longer steps.
        """
        cause = self.travel(weights, patients=patients, start=start, private=private)
        if cause:
            return cause
        sent = self.sent(weights)
        began = self.initial if start is None else start[sent]
        if (weights[sent] == began).all():
            return "it is the model that the training began with"
        return self._behaviour(weights, sent)

    def travel(
        self, weights: Weights, *, patients: int, start: Weights | None, private: bool = False
    ) -> str:
        """Return that models (F, parameters) lie further from their start than a training leads.

        The arguments are those of `expert`; nothing if they do not.
        """
        began = self.initial[None] if start is None else start
        moved = np.abs(weights - began)
        reach = _reach(self.study.training, patients, np.abs(began), private=private)
        return _too_far("a model", float((moved / reach).max())) if (moved > reach).any() else ""

    def router(self, weights: Weights, *, patients: int, sent: Iterable[Weights | None]) -> str:
        """Return why a reply's routers cannot be taken in; nothing if they can.

        Args:
            weights: (F, parameters), of the right form.
            patients: whom the site described.
            sent: what they may have begun with, beside this site's own experts.
        """
        own = np.abs(self.initial).max()
        largest = max(
            1.0,  # an adapter that is the identity
            float(own + _reach(self.study.training, patients, own, private=True)),
            *(float(np.abs(rows).max()) for rows in sent if rows is not None),
        )
        bound = largest + float(_reach(self.study.router, patients, np.array(largest)))
        found = float(np.abs(weights).max())
        return _too_far("a router", found / bound) if found > bound else ""

    def sent(self, weights: Weights) -> int:
        """Return which of a reply's rows other targets would receive."""
        return 1 if self.study.source == "fold_0" and len(weights) > 1 else 0

    def portrait(self, weights: Weights, start: Weights | None = None) -> Portrait:
        """Return what of an expert (parameters,) is compared; `start` (parameters,) as above."""
        began = self.initial if start is None else start
        logits = self._answers(weights[None], 1.0)[0]
        measures = {
            "spread of risks": _log(float(risk(logits).std())),
            "size of logits": _log(float(logits.abs().max())),
        }
        blocks, moved = {}, {}
        for name, part in self._blocks().items():
            mine = weights[part].astype(np.float64)
            m0 = self.initial[part].astype(np.float64)
            measures[f"distance of the {name} from M0"] = _log(float(np.linalg.norm(mine - m0)))
            if name == "attention":
                measures["alignment with M0"] = _alignment(mine, m0)
            blocks[name] = self._sketch(mine)
            moved[name] = float(np.linalg.norm(mine - began[part]))
        return Portrait(measures=measures, blocks=blocks, moved=moved)

    def _blocks(self) -> dict[str, slice]:
        """Return where attention and head lie in a row of weights."""
        head = self.study.shape.bins * (self.study.shape.embed + 1)
        split = len(self.initial) - head
        return {"attention": slice(0, split), "head": slice(split, None)}

    def _behaviour(self, weights: Weights, sent: int) -> str:
        usual, extreme = (risk(self._answers(weights, scale)) for scale in (1.0, LARGEST))
        if not bool(torch.isfinite(usual).all() and torch.isfinite(extreme).all()):
            return "it has no finite answer to a probe bag"
        if float(usual[sent].std()) < CONSTANT * self.study.shape.bins:
            return "it gives every probe bag the same risk"
        return ""

    @cached_property
    def _probes(self) -> PackedBags:
        """Bags of 1 to 32 patches, each around a centre of its own."""
        dim = self.study.shape.dim
        rng = torch.Generator().manual_seed(hash_seed(self.study.seed, 4))
        bags = []
        for size in range(1, PROBES + 1):
            centre = torch.randn(1, dim, generator=rng)
            bags.append(centre + torch.randn(size, dim, generator=rng))
        return PackedBags.of(bags)

    @torch.inference_mode()
    def _answers(self, weights: Weights, scale: float) -> torch.Tensor:
        """Return the hazard logits (F, PROBES, bins) of experts for the probes times `scale`."""
        bags = self._probes
        scaled = (bags.patches * scale).clamp(-LARGEST, LARGEST)
        probes = PackedBags(patches=scaled, segment=bags.segment, count=bags.count)
        parts = [weights[i : i + AT_ONCE] for i in range(0, len(weights), AT_ONCE)]
        shape = self.study.shape
        return torch.cat(
            [Abmil.from_flat(shape, torch.tensor(part)).outputs(probes).logits for part in parts]
        )

    def _sketch(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return sums with signs in `BUCKETS` buckets: linear, and of about the same norm."""
        signs = np.random.default_rng(self.study.seed).choice([-1.0, 1.0], size=len(values))
        padded = np.zeros(ceil(len(values) / BUCKETS) * BUCKETS)
        padded[: len(values)] = values * signs
        summed: NDArray[np.float64] = padded.reshape(-1, BUCKETS).sum(0)
        return summed


def copy_of(portrait: Portrait, others: Mapping[str, Portrait]) -> str:
    """Return which of `others` an expert repeats, as an objection; nothing if none."""
    for name, other in others.items():
        for block, mine in portrait.blocks.items():
            theirs, close = other.blocks[block], COPIED * portrait.moved[block]
            if np.linalg.norm(mine - theirs) <= close:
                return f"its {block} is a copy of that in {name}"
            if np.linalg.norm(mine + theirs) <= close:
                return f"its {block} is that in {name} with the sign changed"
    return ""


def outliers(portraits: Mapping[str, Portrait]) -> dict[str, str]:
    """Return those of at least `ENOUGH` experts that lie far from the others, and in what."""
    found: dict[str, str] = {}
    for name, measure, z in distances(portraits):
        if abs(z) > FAR and name not in found:
            found[name] = f"its {measure} is {abs(z):.1f} robust standard deviations from the bank"
    return found


def distances(portraits: Mapping[str, Portrait]) -> list[tuple[str, str, float]]:
    """Return each expert's distance from the median of all in each measure, in robust units."""
    if len(portraits) < ENOUGH:
        return []
    found = []
    for measure, floor in _FLOORS.items():
        values = np.array([portrait.measures[measure] for portrait in portraits.values()])
        median = np.median(values)
        deviation = max(floor, 1.4826 * float(np.median(np.abs(values - median))))
        found += [
            (name, measure, float(z))
            for name, z in zip(portraits, (values - median) / deviation, strict=True)
        ]
    return found


def _reach(
    config: OptimiserConfig, patients: int, began: NDArray[np.floating], *, private: bool = False
) -> NDArray[np.floating]:
    """Return how far weights can get from where they began, by all updates of a training."""
    each = updates_per_epoch(patients + COUNTED, config)
    updates = max(config.epochs * each, config.minimum_updates + each)
    if private:
        from cropkt.experts.private import SPEED, STEPS  # loads Opacus

        updates = max(updates, int(SPEED * (STEPS + 2)))
    rates = config.learning_rate * (updates / 2 + 1)  # warm-up and cosine both average a half
    first, second = BETAS
    # By Cauchy and Schwarz, of the two moving averages of any gradients, both corrected for bias.
    longest = (1 - first) / sqrt((1 - second) * (1 - first**2 / second))
    longest *= sqrt(1 - second**updates) / (1 - first**updates)
    steps = longest * rates
    with np.errstate(over="ignore"):  # a learning rate without measure: no bound
        return steps + config.weight_decay * rates * (began + steps)


def _form(what: str, weights: Weights, want: tuple[int, int]) -> str:
    if weights.shape != want:
        return f"its {what} have shape {weights.shape}, expected {want}"
    return "" if np.isfinite(weights).all() else f"its {what} hold values that are not finite"


def _too_far(what: str, ratio: float) -> str:
    return (
        f"a weight of {what} lies {ratio:.1f} times as far from where it began as the study's "
        "learning rates can move it"
    )


def _alignment(mine: NDArray[np.float64], m0: NDArray[np.float64]) -> float:
    size = float(np.linalg.norm(mine) * np.linalg.norm(m0))
    cosine = float(mine @ m0) / size if size else 0.0
    return atanh(max(-0.999999, min(0.999999, cosine)))


def _log(value: float) -> float:
    return log(max(value, 1e-30))
