"""Kaplan-Meier curves of risk groups, which only a simulation can draw: it is every site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cropkt.config import Arm, StudyConfig
from cropkt.report.schema import CurveResult, Results
from cropkt.survival.strata import high_risk, kaplan_meier
from cropkt_client.site import Site

DRAWN: tuple[Arm, ...] = ("local", "auto")


def add_curves(found: Results, sites: Iterable[Path], study: StudyConfig) -> None:
    """Add to each target the curves of its halves at low and high risk.

    A site without predictions (it failed, or is private) adds none.

    Args:
        found: the results, to which the curves are added.
        sites: folders of the simulated sites.
        study: that they took part in.
    """
    patients: dict[tuple[str, str], list[NDArray[np.float64]]] = defaultdict(list)
    for folder in sites:
        site = Site.load(folder / "site.yaml")
        for cancer in site.config.cancers:
            said = site.kept(f"{cancer}/predictions")
            if said is None or site.config.privacy is not None:
                continue
            cohort, _ = site.cohort(cancer, study)
            if tuple(said["patients"]) != cohort.patient_ids:
                continue  # the data changed since
            for arm in DRAWN:
                if f"risk_{arm}" in said:
                    high = high_risk(said[f"risk_{arm}"], said["folds"])
                    patients[cancer, arm].append(np.stack([cohort.days, cohort.event, high]))
    for (target, drawn), parts in patients.items():
        days, event, high = np.concatenate(parts, axis=1)
        curves = found["targets"][target].setdefault("kaplan_meier", {})
        curves[drawn] = {
            "low": _curve(days, event == 1, high == 0),
            "high": _curve(days, event == 1, high == 1),
        }


def _curve(
    days: NDArray[np.float64], event: NDArray[np.bool_], mine: NDArray[np.bool_]
) -> CurveResult:
    if not mine.any():
        return {"patients": 0, "days": [], "survival": []}
    times, survival = kaplan_meier(days[mine], event[mine])
    return {
        "patients": int(mine.sum()),
        "days": [round(float(day), 1) for day in times],
        "survival": [round(float(value), 5) for value in survival],
    }
