"""A study of 26 cancers, as `results.json` would hold it."""

from __future__ import annotations

import numpy as np
import pytest

from cropkt.report.schema import ArmResult, Results, TargetResult, TransferScore

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


@pytest.fixture
def results() -> Results:
    """Return the 26-cancer study, with paired intervals of the gains."""
    return study()
