"""A study of 26 cancers, as `results.json` would hold it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
from numpy.random import Generator

from cropkt.config import StudyConfig
from cropkt.report.schema import (
    ArmResult,
    CurveResult,
    DifferenceResult,
    Results,
    ShotsResult,
    TargetResult,
    TransferScore,
    VoiceResult,
)

# Patients, DSS deaths and hospitals in the TCGA-CDR table (Liu et al., Cell 2018).
COHORTS = """ACC 89/29/5, BLCA 396/123/35, BRCA 1064/83/40, CESC 290/54/31, CHOL 42/18/9,
COADREAD 584/75/38, DLBC 47/4/7, GBMLGG 1057/558/46, HNSC 501/130/28, KIPAN 919/147/59,
LIHC 362/80/37, LUNG 919/202/66, MESO 65/43/12, OV 545/301/21, PAAD 177/79/27, PCPG 179/4/18,
PRAD 498/5/32, SARC 255/81/34, SKCM 448/188/25, STES 573/151/40, TGCT 134/3/15, THCA 500/7/22,
THYM 123/4/19, UCEC 544/60/31, UCS 54/31/10, UVM 80/21/6"""
SIZES: dict[str, tuple[int, int, int]] = {}
for entry in COHORTS.replace("\n", " ").split(", "):
    code, _, counts = entry.strip().partition(" ")
    patients, events, sites = map(int, counts.split("/"))
    SIZES[code] = (patients, events, sites)


def arm(c_index: float, se: float, gain: float | None = None) -> ArmResult:
    """Return an arm with a symmetric interval, and one of its gain if there is a gain."""
    low, high = max(0.0, c_index - 1.96 * se), min(1.0, c_index + 1.96 * se)
    made: ArmResult = {
        "c_index": c_index,
        "low": low,
        "high": high,
        "se": se,
        "pairs": 1234,
        "fold_mean": c_index,
        "pooled": c_index,
    }
    if gain is not None:
        made |= {"gain_low": gain - 0.8 * se, "gain_high": gain + 0.8 * se}
    return made


def study(*, whiskers: bool = True, seed: int = 0) -> Results:
    """Return a made-up study whose noise has the size that the event counts imply."""
    rng = np.random.default_rng(seed)
    targets: dict[str, TargetResult] = {}
    transfer: dict[str, dict[str, TransferScore]] = {}
    relatives = {"UVM": ["SKCM"], "UCS": ["UCEC", "OV"], "CHOL": ["LIHC"]}
    for name, (patients, events, sites) in SIZES.items():
        se = float(min(0.2, 0.32 / np.sqrt(events)))
        if events < 4:
            none: ArmResult = {"c_index": None, "reason": "3 deaths, 11 comparable pairs"}
            arms = dict.fromkeys(("local", "zero_shot", "roupkt"), none)
            transfer[name] = {source: {"c_index": None} for source in SIZES}
        else:
            local = float(np.clip(rng.normal(0.66, 0.06 + se / 3), 0.05, 0.95))
            zero = float(rng.normal(-0.03, 0.02 + se / 3))
            gain = float(rng.normal(0.25 / np.sqrt(events), 0.01 + se / 4))
            arms = {
                "local": arm(local, se),
                "zero_shot": arm(local + zero, se, zero if whiskers else None),
                "roupkt": arm(local + gain, se, gain if whiskers else None),
            }
            transfer[name] = {
                source: {"c_index": float(np.clip(rng.normal(0.53, 0.03 + se / 2), 0, 1)), "se": se}
                for source in SIZES
            }
            for relative in relatives.get(name, []):
                transfer[name][relative] = {"c_index": local + 0.02, "se": se}
            transfer[name][name] = {"c_index": local, "se": se}
        weights = rng.dirichlet([3.0] + [0.3] * 25)
        others = [source for source in SIZES if source != name]
        targets[name] = {
            "patients": patients,
            "events": events,
            "sites": sites,
            "arms": arms,
            "routing": dict(zip(["self", *others], map(float, weights), strict=True)),
            "zero_shot_choice": {"vote": 1, "SKCM": 1, others[events % 25]: 3},
            "best_source": "SKCM",
        }
    return {
        "cropkt": "0.1.0",
        "versions": {"python": "3.11.7", "torch": "2.8.0", "flwr": "1.20.0"},
        "data": "synthetic",
        "preset": "default",
        "seed": seed,
        "folds": 5,
        "endpoint": "DSS",
        "config_hash": "0f3a",
        "seconds": {"total": 123.4},
        "targets": targets,
        "transfer": transfer,
        "planted": {
            "targets_routed_to_relatives": 23,
            "of": 26,
            "relatives": relatives,
            "best_c_index": {"UVM": 0.8, "UCS": 0.7},
        },
        "failed": [{"row": "UVM/fit_router", "cause": "site lost"}],
    }


def rich(*, seed: int = 0) -> Results:
    """Return the same study with everything that a results file can hold."""
    rng = np.random.default_rng(100 + seed)
    found = study(seed=0)
    for name, target in found["targets"].items():
        _more_arms(rng, target)
        others = [source for source in SIZES if source != name]
        voices = rng.dirichlet([4.0] + [0.2] * 25)
        target["auto"] = {
            "share": float(1 - voices[0]),
            "candidates": {"equal": 0, "vote": 1, "stack": 4},
            "gain": 0.02,
        }
        target["voices"] = {
            source: voice(float(weight), rng)
            for source, weight in zip(["self", *others], voices, strict=True)
        }
        if name in ("UVM", "ACC", "GBMLGG", "SKCM", "UCS"):
            target["few_shot"] = [shots(n, rng) for n in (20, 50, 100, None)]
            target["kaplan_meier"] = {
                arm: {"low": curve(rng, 0.0002), "high": curve(rng, 0.0007)}
                for arm in ("local", "auto")
            }
    for scores in found["transfer"].values():
        for score in scores.values():
            if score["c_index"] is not None:
                p = float(rng.uniform() ** 3)
                score |= {
                    "lead": score["c_index"] - 0.5,
                    "lead_se": 0.05,
                    "p_half": p,
                    "p_half_bh": min(1, 3 * p),
                    "p_half_holm": min(1, 100 * p),
                    "p_random": p,
                    "p_random_bh": min(1, 3 * p),
                    "p_random_holm": min(1, 100 * p),
                }
    config = json.loads(json.dumps(dataclasses.asdict(StudyConfig(seed=seed))))
    found |= {"seed": seed, "config_hash": f"0f3a{seed}", "config": config}
    found["across"] = {
        arm: {
            control: {
                "targets": 24,
                "mean": mean - 0.003 * shift,
                "low": mean - 0.003 * shift - 0.012,
                "high": mean - 0.003 * shift + 0.012,
                "between": 0.01,
                "wilcoxon": 0.0004 if mean > 0.02 else 0.4,
                "detectable": 0.017,
            }
            for shift, control in enumerate(("local", "self_only", "random_init"))
        }
        for arm, mean in MEANS.items()
    }
    found["experts"] = {
        source: {
            "targets": 25,
            "c_index": 0.5 + 0.05 * index / 25,
            "low": 0.47 + 0.05 * index / 25,
            "high": 0.53 + 0.05 * index / 25,
            "verdict": ("silent", "contrary", "no use", "unclear", "helps")[index // 6],
        }
        for index, source in enumerate(SIZES)
    }
    return found


MEANS = {
    "finetune": 0.001,
    "zero_shot": -0.03,
    "vote": -0.01,
    "roupkt": -0.004,
    "roupkt+": 0.022,
    "merge": -0.05,
    "stack": 0.026,
    "fedavg": -0.08,
    "fedavg_tuned": 0.004,
    "auto": 0.031,
    "random_init": -0.12,
    "permuted": -0.11,
    "mean_pool": -0.02,
    "self_only": 0.006,
}


def _more_arms(rng: Generator, target: TargetResult) -> None:
    local = target["arms"]["local"]
    c_index, se = local["c_index"], local.get("se") or 0.05
    for name, mean in MEANS.items():
        if c_index is None:
            target["arms"][name] = dict(local)  # type: ignore[typeddict-item]
            continue
        gain = float(rng.normal(mean, 0.01))
        if name == "auto":
            gain += 0.45 / np.sqrt(target["events"] or 1) - 0.06
        made = arm(c_index + gain, se, gain)
        made |= {"gain": gain, "gain_se": 0.4 * se, "log_rank": float(rng.uniform() ** 4)}
        made |= {"c_ipcw": c_index + gain - 0.01, "brier": 0.17, "d_calibration": 0.3}
        made |= {"auc": [None, 0.7 + gain, 0.68 + gain]}
        made["cost"] = {"seconds": 12.5, "megabytes": None, "gflop": 40.1}
        made["cost"] |= {"received_megabytes": 120.0, "sent_megabytes": 4.8}
        if name in ("auto", "roupkt+"):
            made["against"] = {
                "self_only": difference(gain - 0.006, 0.3 * se),
                "random_init": difference(gain + 0.12, 0.3 * se),
            }
        target["arms"][name] = made
    if c_index is not None:
        local |= {"c_ipcw": c_index, "brier": 0.19, "d_calibration": 0.01, "auc": [None, 0.7, 0.6]}
        local["log_rank"] = 0.04


def difference(value: float, se: float) -> DifferenceResult:
    return {"value": value, "se": se, "low": value - 1.96 * se, "high": value + 1.96 * se}


def voice(weight: float, rng: Generator) -> VoiceResult:
    cost = float(rng.normal(0.004, 0.004))
    return {
        "weight": weight,
        "weight_sd": weight / 3,
        "cost": cost,
        "silent": int(weight < 1e-3),
        "contrary": 0,
    }


def shots(patients: int | None, rng: Generator) -> ShotsResult:
    base = 0.7 if patients is None else 0.5 + 0.05 * np.log10(patients)
    draws = 1 if patients is None else 5
    return {
        "patients": patients,
        "arms": {
            name: [float(value) for value in rng.normal(base + up, 0.02, draws)]
            for name, up in (("local", 0.0), ("zero_shot", 0.03), ("auto", 0.05))
        },
    }


def curve(rng: Generator, rate: float) -> CurveResult:
    days = sorted(float(day) for day in rng.uniform(1, 3000, 12))
    survival = [float(np.exp(-rate * day)) for day in days]
    return {"patients": 40, "days": [0.0, *days], "survival": [1.0, *survival]}


def cut(results: Results, cancers: list[str]) -> Results:
    """Leave some cancers of a study only."""
    results["targets"] = {c: results["targets"][c] for c in cancers}
    results["transfer"] = {c: {s: results["transfer"][c][s] for s in cancers} for c in cancers}
    return results


FEW = ["CHOL", "TGCT", "UVM"]


@pytest.fixture(scope="session")
def seeded() -> Callable[[int], Results]:
    """Return a function from a seed to everything of three cancers."""
    return lambda seed: cut(rich(seed=seed), FEW)


@pytest.fixture
def few(seeded: Callable[[int], Results]) -> Results:
    """Return everything of three cancers: quick to draw."""
    return seeded(0)


@pytest.fixture
def older() -> Results:
    """Return three cancers of a study as earlier versions wrote it."""
    return cut(study(), FEW)


@pytest.fixture(scope="session")
def everything() -> Callable[[], Results]:
    """Return a function that makes the study with everything, of 26 cancers."""
    return rich


@pytest.fixture
def full() -> Results:
    """Return the study with everything that a results file can hold."""
    return rich()


@pytest.fixture
def results() -> Results:
    """Return the 26-cancer study, with paired intervals of the gains."""
    return study()
