"""The `study.yaml` that `init` writes: every setting with its default and what it means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from cropkt_server.settings import Settings

_HEAD = """\
# A cropkt study. Every setting is here; what is left out has the value shown.
# What stands under `study` decides the numbers: once the study has begun it cannot change.
"""
_SAYS = {
    "name": "This study's name; the sites' enrolments carry it.",
    "host": "Name or address, and port, by which the sites reach this coordinator.",
    "listen": "Address of this machine to listen on; 0.0.0.0 is all of IPv4.",
    "port": "Port of this machine to listen on, where a firewall forwards the one in host to\n"
    "another; null is the one in host.",
    "min_sites": "Experts are not shared before so many sites have joined.",
    "deadline": "When to go on with the sites that are there: 2026-03-01T12:00, or a span from\n"
    "the first start such as 12h, 7d, 2w; null waits for every site that was invited.",
    "sites": "Of a simulation only: a deployed study knows its sites from invitations.",
    "study": "Everything that decides the study's numbers.",
    "study.purpose": "What the study is for; a site answers only the purposes in its policy.",
    "study.encoder": "That made all sites' features, as every site.yaml names it (UNI2-h, say);\n"
    "no study starts without it.",
    "study.endpoint": "Which outcome: OS, DSS, PFI or DFI.",
    "study.seed": "Of folds and training.",
    "study.folds": "Of the cross-validation, 3 to 10.",
    "study.split": "Folds by patient (stratified) or by hospital.",
    "study.rounds": "Of averaging, where several sites share a cancer.",
    "study.initial_hazard": "Yearly hazard that an untrained expert predicts; null: none set.",
    "study.source": "Which expert a site shares: of all_patients, or of fold_0 as published.",
    "study.max_sources": "At most so many experts of other cancers for one router.",
    "study.arms": "Ways to predict that are compared at each target, with the controls that tell\n"
    "transfer from an ensemble; fewer of them cost the sites less.",
    "study.fedavg_rounds": "Of one model for all cancers, which all sites train together: the\n"
    "arms fedavg and fedavg_tuned; 0: none.",
    "study.shots": "Compare also with so few training patients, such as [20, 50, 100].",
    "study.draws": "Of patients, for each of shots.",
    "study.shape": "Widths of an expert.",
    "study.shape.dim": "Features a patch: what the agreed encoder makes.",
    "study.shape.embed": "Of a slide's feature.",
    "study.shape.attention": "Of the attention.",
    "study.shape.bins": "Years of follow-up that are told apart, the last one open.",
    "study.training": "How a site trains its expert.",
    "study.router": "How a site trains its router.",
    "epochs": "Passes over the patients.",
    "minimum_updates": "A small cohort trains more epochs, until so many updates.",
    "learning_rate": "Highest learning rate of AdamW.",
    "weight_decay": "Of AdamW.",
    "warmup_epochs": "Of linear warm-up before the cosine schedule.",
    "batch": "Patients an update.",
    "drop_last": "Leave an epoch's incomplete last update out.",
    "study.training.dropout": "On the attention gates.",
    "study.training.alpha": "In [0, 1): weighs censored patients down.",
    "study.training.loss": "log_space, or clamped as published.",
    "study.training.standardise": "Features: none, or site (by moments of the training folds).",
    "study.router.top_k": "Experts that are heard for one patient.",
    "study.router.keep_own": "The site's own expert is always heard.",
    "study.router.renormalise": "Weights of the chosen experts sum to 1.",
    "study.router.balance": "Of the experts' use: over a batch, or a patient as published.",
    "study.router.balance_weight": "Of that balance in the loss.",
    "study.router.z_weight": "Of the penalty on large router logits.",
    "study.router.self_features": "out_of_fold, or in_sample as published.",
    "study.router.prior": "Gates start at the measured transfer, or at none.",
    "study.router.prior_strength": "Logits a unit of C-index.",
    "study.router.warm_start": "Adapters start as the identity, the head as the site's own.",
}
_OF_OPTIMISERS = ("study.training.", "study.router.")  # both have these settings


def template(settings: Settings) -> str:
    """Return the text of a new `study.yaml`."""
    return f"{_HEAD}\n{chr(10).join(_lines(settings, ''))}\n"


def _lines(settings: Any, prefix: str) -> Iterator[str]:
    """Yield a comment and a value for every setting, nested as in YAML."""
    indent = "  " * prefix.count(".")
    for item in fields(settings):
        path, value = f"{prefix}{item.name}", getattr(settings, item.name)
        for line in meaning(path).splitlines():
            yield f"{indent}# {line}"
        if is_dataclass(value):
            yield f"{indent}{item.name}:"
            yield from _lines(value, f"{path}.")
        else:
            plain = list(value) if isinstance(value, tuple) else value
            yield f"{indent}{item.name}: {_scalar(plain)}"


def meaning(path: str) -> str:
    """Return what a setting means, by its path: `study.training.epochs`."""
    shared = path.startswith(_OF_OPTIMISERS) and path not in _SAYS
    return _SAYS.get(path.rpartition(".")[2] if shared else path, "")


def _scalar(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
