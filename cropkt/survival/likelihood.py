"""Likelihoods and risk for discrete-time survival.

Time is cut into T bins; a patient is the bin of the last observation and whether it was a
death. Shapes: leading dimensions are free (models, patients), the last one is T.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cropkt.config import Loss

CLAMP = 1e-7  # the published floor under every probability


def log_survival(logits: Tensor) -> Tensor:
    """Return log S(j) = sum over i <= j of log(1 - h_i), (..., T), from hazard logits."""
    return F.logsigmoid(-logits).cumsum(-1)


def risk(logits: Tensor) -> Tensor:
    """Return the risk -sum_j S(j), (...,), of hazard logits (..., T): higher dies earlier.

    The sum runs in float64, so that risks of patients that differ stay different.
    """
    return -log_survival(logits.double()).exp().sum(-1)


def discrete_nll(
    logits: Tensor, bins: Tensor, event: Tensor, *, alpha: float = 0.0, loss: Loss = "log_space"
) -> Tensor:
    """Return each patient's negative log-likelihood (..., B) of a discrete hazard model, nats.

    (1 - alpha) NLL + alpha NLL of the uncensored part, as published; the loss of one patient
    depends on no other patient, so that per-patient clipping is valid.

    Args:
        logits: (..., B, T) hazard logits.
        bins: (B,) or (..., B) int64 in [0, T), bin of death or last follow-up.
        event: (B,) or (..., B) bool, True for a death.
        alpha: in [0, 1), down-weights censored patients.
        loss: `log_space` has no clamp; `clamped` floors every probability at 1e-7 as published,
            which leaves patients censored in late bins without a gradient.

    References:
        Zadeh and Schmid, doi:10.1109/TPAMI.2020.2979450; arXiv 2508.13482.
    """
    at = bins.expand(logits.shape[:-1])[..., None]  # (..., B, 1)
    if loss == "clamped":
        hazard = torch.sigmoid(logits)
        survival = torch.cumprod(1 - hazard, dim=-1)
        padded = torch.cat([torch.ones_like(survival[..., :1]), survival], dim=-1)
        log_before = padded.gather(-1, at).clamp(min=CLAMP).log().squeeze(-1)
        log_dies = hazard.gather(-1, at).clamp(min=CLAMP).log().squeeze(-1)
        log_after = padded.gather(-1, at + 1).clamp(min=CLAMP).log().squeeze(-1)
    else:
        log_alive = log_survival(logits)
        log_after = log_alive.gather(-1, at).squeeze(-1)
        log_before = log_after - F.logsigmoid(-logits).gather(-1, at).squeeze(-1)
        log_dies = F.logsigmoid(logits).gather(-1, at).squeeze(-1)
    return -torch.where(event, log_before + log_dies, (1.0 - alpha) * log_after)
