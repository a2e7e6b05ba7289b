"""Training an expert that tells almost nothing of any one patient: DP-SGD over patients.

A step takes each patient with the mechanism's probability, clips the gradient of each one's own
loss to a fixed length, and adds Gaussian noise to the sum. All else that decides the weights is a
constant of the study: M0, the schedule, the lot size that the sum is divided by. The gradients of
many patients are made at once (`vmap`), in groups of bounded memory, without ghost clipping. So the
expert is a function of clipped, noised sums alone. What would break this is refused: a loss that is
not a sum over patients, and inputs in units of the cohort.

The noise and who takes part come from a key that the operating system gives to this one training,
never from the study's seed: who knows the stream could subtract it. So no two private trainings
are equal, and one that is resumed goes on with fresh noise.

References:
    Abadi et al., arXiv 1607.00133; Opacus, arXiv 2109.12298.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from cropkt.cohort.bags import Cohort, PackedBags
from cropkt.config import TrainingConfig
from cropkt.errors import ConfigError
from cropkt.experts.abmil import Abmil, parameter_count
from cropkt.experts.accountant import Mechanism
from cropkt.experts.checkpoint import Checkpoint, Training
from cropkt.experts.device import device_of, moved
from cropkt.experts.training import cosine_with_warmup
from cropkt.survival.likelihood import discrete_nll

LOT = 64  # patients that a step takes on average
STEPS = 100
SPEED = 10.0  # times the study's learning rate: fewer steps, averaged over more patients
MAX_VALUES = 1 << 25  # float32 values that the gradients and layers of a group may take


class SecretStream:
    """Random numbers that nobody can repeat: the ChaCha20 stream of a key.

    torch's generator expands 32 bits of its seed, few enough to try them all.

    Args:
        key: 32 bytes; from the operating system, but in a test.
    """

    def __init__(self, key: bytes | None = None) -> None:
        cipher = Cipher(ChaCha20(key or os.urandom(32), bytes(16)), mode=None)
        self._cipher = cipher.encryptor()

    def uniform(self, size: int) -> NDArray[np.float64]:
        """Return numbers in [0, 1) with 53 random bits each."""
        words = np.frombuffer(self._cipher.update(bytes(8 * size)), dtype="<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, size: int) -> NDArray[np.float64]:
        """Return standard normal numbers (Box and Muller), in double precision."""
        half = (size + 1) // 2
        radius = np.sqrt(-2 * np.log1p(-self.uniform(half)))
        angle = 2 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def schedule(patients: int) -> tuple[float, int]:
    """Return the probability that a patient takes part in a step, and how many steps there are.

    Args:
        patients: of the cohort, as everybody may know it.
    """
    return min(1.0, LOT / patients), STEPS


class NoisySum(DPOptimizer):  # type: ignore[misc]
    """Opacus' DP optimizer, whose noise comes from a `SecretStream`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        mechanism: Mechanism,
        clip: float,
        lot: float,
        stream: SecretStream,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=clip,
            expected_batch_size=lot,
        )
        self.stream = stream

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Clip the gradient of each patient, rows of tensors (B, ...), and add it to the sum."""
        for parameter, rows in zip(self.params, gradients, strict=True):
            parameter.grad_sample = rows
        self.clip_and_accumulate()

    def add_noise(self) -> None:
        """Add the noise to the sum, in double precision."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            noise = torch.from_numpy(deviation * self.stream.normal(parameter.numel()))
            noised = parameter.summed_grad.cpu().double() + noise.view(parameter.shape)
            parameter.grad = noised.to(parameter)

    def finish(self) -> None:
        """Take the step that the noised sum over the lot size says."""
        self.add_noise()
        self.scale_grad()
        self.original_optimizer.step()


class PatientLoss(nn.Module):
    """The loss of one patient, and so its gradient, which no other patient enters.

    Args:
        expert: one model.
        alpha: down-weights censored patients.
    """

    def __init__(self, expert: Abmil, *, alpha: float) -> None:
        super().__init__()
        self.expert, self.alpha = expert, alpha

    def forward(self, patches: Tensor, segment: Tensor, time_bin: Tensor, event: Tensor) -> Tensor:
        """Return the loss of a bag (P, D), of which patches with segment 0 count, (P,)."""
        bag = PackedBags(patches=patches, segment=segment, count=1)
        logits = self.expert.outputs(bag).logits
        return discrete_nll(logits, time_bin[None], event[None], alpha=self.alpha).sum()

    def gradients(self, cohort: Cohort, patients: NDArray[np.int64]) -> list[Tensor]:
        """Return each patient's gradient, a tensor (B, ...) for each weight that is trained.

        A gradient that is not finite has no direction to clip, and counts as 0.
        """
        if len(patients) == 1:  # perhaps a bag too large for all of its layers at once
            rows = [row[None] for row in self._gradient(cohort, patients)]
            return _finite(rows)
        trained = {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}
        device = device_of(self)
        bags = [cohort.bag(int(i)).cpu() for i in patients]
        patches = nn.utils.rnn.pad_sequence(bags, batch_first=True).to(device).float()
        segment = torch.full(patches.shape[:2], -1)
        for row, bag in zip(segment, bags, strict=True):
            row[: len(bag)] = 0
        of_each = vmap(
            grad(lambda weights, *patient: functional_call(self, weights, patient)),
            in_dims=(None, 0, 0, 0, 0),
        )
        found = of_each(
            trained,
            patches,
            segment.to(device),
            torch.from_numpy(cohort.time_bins[patients]).to(device),
            torch.from_numpy(cohort.event[patients]).to(device),
        )
        return _finite([found[name] for name in trained])

    def _gradient(self, cohort: Cohort, patient: NDArray[np.int64]) -> tuple[Tensor, ...]:
        device = device_of(self)
        bag = moved(cohort.pack(patient), device)
        loss: Tensor = self(
            bag.patches,
            bag.segment,
            torch.tensor(cohort.time_bins[patient[0]], device=device),
            torch.tensor(cohort.event[patient[0]], device=device),
        )
        return torch.autograd.grad(loss, [p for p in self.parameters() if p.requires_grad])


def _finite(rows: list[Tensor]) -> list[Tensor]:
    """Return gradients (B, ...), those of a patient nought where any is not finite."""
    finite = torch.stack([g.flatten(1).isfinite().all(1) for g in rows]).all(0)  # (B,)
    for g in rows:
        g[~finite] = 0
    return rows


def train_private(
    cohort: Cohort,
    *,
    initial: Abmil,
    config: TrainingConfig,
    mechanism: Mechanism,
    clip: float,
    lot: float,
    stream: SecretStream | None = None,
    checkpoint: Checkpoint | None = None,
) -> Abmil:
    """Train the one model in `initial` in place by DP-SGD, where it lies, and return it.

    The checkpoint holds no state of the stream: whatever steps a killed training took since
    then nobody has seen, and they are taken anew with other noise.

    Args:
        cohort: all patients may take part.
        initial: M0, one model.
        config: learning rate (times `SPEED`), weight decay and alpha are read.
        mechanism: how many steps, who takes part in each, and how much noise.
        clip: length to which a patient's gradient is clipped.
        lot: what the noised sum is divided by: a constant, not how many took part.
        stream: of noise and sampling; a new one by default.
        checkpoint: where to resume from, and to keep where the training stands.

    Raises:
        ConfigError: the study's training cannot be private.
    """
    check_private(config)
    stream = stream or SecretStream()
    loss = PatientLoss(initial.requires_grad_(True), alpha=config.alpha)
    rate = SPEED * config.learning_rate
    optimizer = torch.optim.AdamW(
        loss.parameters(), lr=rate, weight_decay=config.weight_decay / SPEED
    )
    noisy = NoisySum(optimizer, mechanism=mechanism, clip=clip, lot=lot, stream=stream)
    training = Training(module=initial, optimizer=optimizer, rng=None)
    done = checkpoint.resume(training) if checkpoint else 0
    for step in range(done, mechanism.steps):
        noisy.zero_grad()
        factor = cosine_with_warmup(step, total=mechanism.steps, warmup=0)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        chosen = np.flatnonzero(stream.uniform(len(cohort)) < mechanism.sample_rate)
        if not chosen.size:
            noisy.add([p.new_zeros(0, *p.shape) for p in noisy.params])
        for some in _groups(cohort, chosen, initial):
            noisy.add(loss.gradients(cohort, some))
        noisy.finish()
        if checkpoint:
            checkpoint.save(training, step + 1)
    return initial.requires_grad_(False)


def check_private(config: TrainingConfig) -> None:
    """Check that nothing but clipped, noised sums would decide the weights.

    Raises:
        ConfigError: the loss or the inputs of this training do not allow it.
    """
    if config.loss != "log_space":
        raise ConfigError(
            "training.loss",
            f"{config.loss} cannot be trained privately",
            "Ask the coordinator for a study with log_space",
        )
    if config.standardise != "none":
        raise ConfigError(
            "training.standardise",
            f"{config.standardise} makes every patient's gradient depend on all patients",
            "Ask the coordinator for a study with none",
        )


def _groups(
    cohort: Cohort, patients: NDArray[np.int64], expert: Abmil
) -> Iterator[NDArray[np.int64]]:
    """Yield patients with bags of like size in groups that bound the memory."""
    shape, weights = expert.shape, parameter_count(expert)
    width = shape.dim + 4 * (shape.embed + shape.attention)
    order = sorted(map(int, patients), key=cohort.patches, reverse=True)
    while order:
        each = weights + cohort.patches(order[0]) * width
        size = max(1, MAX_VALUES // each)
        yield np.array(order[:size])
        order = order[size:]
