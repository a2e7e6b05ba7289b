"""Can the folds of one cohort be judged, and what may leave of it?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cropkt.checkup import Finding, fail, ok, warn
from cropkt.cohort.bags import Cohort
from cropkt.cohort.names import SlideNames
from cropkt.cohort.outcomes import counted
from cropkt.cohort.splits import comparable_pairs, read_splits
from cropkt.config import StudyConfig
from cropkt.errors import CohortError
from cropkt.experts.training import Plan
from cropkt_client.settings import ReleasePolicy, SiteConfig
from cropkt_client.site import folds_of

FEW_EVENTS, FEW_PAIRS = 3, 30  # in a fold; with fewer, its C-index says next to nothing


def minima(config: SiteConfig) -> ReleasePolicy:
    """Return the policy whose minima a count has to reach to be shown: the usual one if none is."""
    return config.release or ReleasePolicy()


def at_least(number: int, minimum: int) -> str:
    """Return a count for an output that may be mailed: exact from the minimum on."""
    return f"fewer than {minimum}" if number < minimum else str(number)


def events_and_pairs(cohort: Cohort, study: StudyConfig, config: SiteConfig) -> Iterator[Finding]:
    """Yield how many events and comparable pairs each fold holds.

    Pairs are of patients, and shown from the minimum of patients on.
    """
    events, pairs = f"events of {cohort.cancer}", f"pairs of {cohort.cancer}"
    more = "Add patients or follow-up; or accept wide intervals"
    try:
        folds = folds_of(cohort, study)
    except CohortError as error:
        yield fail(events, error.problem, error.fix)
        return
    inside = [folds == fold for fold in range(int(folds.max()) + 1)]
    died = [int(cohort.event[fold].sum()) for fold in inside]
    policy = minima(config)
    text = f"by fold: {', '.join(at_least(n, policy.minimum_events) for n in died)}"
    yield warn(events, text, more) if min(died) < FEW_EVENTS else ok(events, text)
    compared = [comparable_pairs(cohort.days[fold], cohort.event[fold]) for fold in inside]
    said = ", ".join(at_least(n, policy.minimum_patients) for n in compared)
    text = f"comparable by fold: {said}"
    if not any(compared):
        yield fail(pairs, "no fold has a comparable pair", "Add patients with events")
    elif empty := compared.count(0):
        text = f"{text}; {counted(empty, 'fold')} without any: its patients are not judged"
        yield warn(pairs, text, "Add patients with events")
    else:
        yield warn(pairs, text, more) if min(compared) < FEW_PAIRS else ok(pairs, text)


def one_side(cohort: Cohort, study: StudyConfig) -> Finding:
    """Check that no slide is of two patients, whatever names it goes by: folds are of patients.

    A study uses no other splits than its own: `site.yaml` takes no split files.
    """
    check = f"both sides of {cohort.cancer}"
    names = SlideNames(cohort.source.slide_ids())
    owners: dict[str, set[int]] = defaultdict(set)
    for patient, slides in enumerate(cohort.slides):
        for slide in slides:
            for name in names.matches(slide):
                owners[name].add(patient)
    if shared := sum(len(patients) > 1 for patients in owners.values()):
        problem = f"{shared} slides are of two patients, under different names"
        return fail(check, problem, "Give each slide one patient: they are trained on and tested")
    several = sum(len(slides) > 1 for slides in cohort.slides)
    try:
        folds = folds_of(cohort, study)
    except CohortError as error:
        return fail(check, error.problem, error.fix)
    sizes = np.bincount(folds)
    text = f"every patient is whole in one of {len(sizes)} folds, {several} with several slides"
    if study.split == "hospital":
        text = f"{text}; so is every hospital"
    return ok(check, f"{text}; other splits than the study's are not used")


def other_splits(paths: Sequence[Path]) -> Finding:
    """Check that the splits of other work train on nobody whom they test, and test nobody twice.

    Files are numbered as they were given, since a name may tell of a patient.
    """
    check = "splits"
    for number, path in enumerate(paths, start=1):
        try:
            read_splits([path], ())
        except CohortError as error:
            return fail(check, f"file {number}: {error.problem}", error.fix)
    try:
        read_splits(paths, ())
    except CohortError:
        problem = "a patient is tested in two files"
        return fail(check, problem, "A patient is tested once: correct the files")
    files = counted(len(paths), "file")
    return ok(check, f"{files}: nobody is trained on and tested in one fold, or tested in two")


def may_leave(cohort: Cohort, study: StudyConfig, config: SiteConfig) -> Finding:
    """Hold the cohort's size against what the site lets out."""
    check, policy = f"release of {cohort.cancer}", config.release
    if policy is None:
        return warn(check, "nothing leaves this site", "Decide `release` in site.yaml")
    patients, events = len(cohort), int(cohort.event.sum())
    if study.purpose not in policy.purposes:
        problem = f"a study for {study.purpose} is answered nothing"
        return warn(check, problem, "Add the purpose to release.purposes, if that is meant")
    if policy.cancers is not None and cohort.cancer not in policy.cancers:
        return warn(check, "nothing of this cancer leaves", "Add it to release.cancers")
    if patients < policy.minimum_patients or events < policy.minimum_events:
        problem = (
            f"patients: {at_least(patients, policy.minimum_patients)}, events: "
            f"{at_least(events, policy.minimum_events)}; something may leave of "
            f"{policy.minimum_patients} and {policy.minimum_events}"
        )
        return warn(check, problem, "Lower the minima in site.yaml, if that is allowed")
    try:
        patients, events = Plan.one_a_fold(folds_of(cohort, study)).fewest(cohort.event)
    except CohortError as error:
        return fail(check, error.problem, error.fix)
    if patients < policy.minimum_patients or events < policy.minimum_events:
        problem = "enough patients and events, but not without a fold: no fold's score or model"
        return warn(check, f"{problem} leaves", "Lower the minima in site.yaml, if that is allowed")
    waits = "after approval here" if policy.approval == "human" else "by itself"
    return ok(check, f"enough patients and events; what the policy allows leaves {waits}")
