"""Is all that a study has kept whole: databases, answers, the bank; and who takes part?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from cropkt.checkup import Finding, fail, failed, ok, skipped, warn
from cropkt.database import problem_with
from cropkt.errors import ArtifactError, ConfigError, MessageError, UnknownSignerError
from cropkt.experts.card import check_models, public_text, verified
from cropkt_server import bank, roster, store
from cropkt_server.bank import Banked
from cropkt_server.catalogue import weights_of
from cropkt_server.findings import Findings
from cropkt_server.pki import Keys
from cropkt_server.settings import Settings
from cropkt_server.status import SiteStatus, read_status
from cropkt_server.store import read_tasks
from cropkt_server.study import check_unchanged

_OURS: dict[str, Sequence[str]] = {
    "roster.sqlite": roster.SCHEMAS,
    "study.sqlite": store.SCHEMAS,
    "bank.sqlite": bank.SCHEMAS,
}
_FLOWER = "flower.sqlite"


def check_records(folder: Path, settings: Settings) -> Iterator[Finding]:
    """Yield a finding a check."""
    whole = True
    for name, steps in _OURS.items():
        problem = problem_with(folder / name, steps)
        whole = whole and not problem
        if problem:
            fix = "Restore it from a backup, or use the cropkt that wrote it"
            yield fail("databases", f"{folder / name} {problem}", fix)
    if (folder / _FLOWER).exists() and (problem := problem_with(folder / _FLOWER)):
        fix = "Stop the study and move it away: it is made anew from the roster"
        yield fail("databases", f"{folder / _FLOWER} {problem}", fix)
        whole = False
    if not whole:
        for check in ("settings", "answers", "bank", "sites"):
            yield skipped(check, "a database cannot be used")
        return
    yield ok("databases", "all open, of a known schema, and whole")
    findings = Findings(folder, settings.study, read_only=True)
    with closing(findings.store) as kept:
        yield _unchanged(kept, settings)
        yield _answers(kept)
        yield _bank(findings)
    yield from _sites(folder, settings)


def _unchanged(kept: store.Store, settings: Settings) -> Finding:
    try:
        check_unchanged(kept, settings.study)
    except ConfigError as error:
        return failed("settings", error)
    if kept.meta("config") is None:
        return ok("settings", "the study has not begun")
    return ok("settings", "those with which the study began")


def _answers(kept: store.Store) -> Finding:
    if lost := kept.lost():
        names = ", ".join(task.id for task in lost[:3])
        problem = f"{len(lost)} rows are done, but their answers are missing ({names})"
        return fail("answers", problem, f"Restore {kept.folder / 'replies'} from a backup")
    done = sum(task.state == "done" for task in kept.tasks())
    return ok("answers", f"{done} rows are done, and their answers are here")


def _bank(findings: Findings) -> Finding:
    """Check the signature of every expert, its signer, and its weights where they are kept."""
    folder, problems = findings.store.folder, []
    with closing(roster.Roster(folder, read_only=True)) as known:
        keys = {site.name: site.signing_key for site in known.sites()}
    experts = findings.store.bank.experts()
    for expert in experts:
        try:
            _check(expert, findings, keys, Keys.of(folder))
        except (ArtifactError, MessageError, OSError) as error:
            name = expert.signed.hash[:16]
            why = error.problem if isinstance(error, ArtifactError) else "it cannot be read"
            problems.append(f"{name}: {why}")
    if problems:
        problem = f"{len(problems)} of {len(experts)} experts: {'; '.join(problems[:3])}"
        fix = "Restore the study's folder from a backup, or: cropkt-server revoke --expert HASH"
        return fail("bank", problem, fix)
    text = f"{len(experts)} experts, their signatures and weights verified"
    return ok("bank", text if experts else "no expert yet")


def _check(expert: Banked, findings: Findings, sites: dict[str, str], keys: Keys) -> None:
    """Check one expert.

    Raises:
        ArtifactError: it is not what was signed, or not by whom it should be.
    """
    card = verified(expert.signed.card, expert.signed.signature)
    signer = public_text(keys.signing()) if card.site is None else sites.get(card.site)
    if card.signer != signer:
        problem = f"it is not signed with the key of {card.site or 'the coordinator'}"
        raise UnknownSignerError("", problem, "")
    weights = weights_of(findings, expert)
    if weights is not None:
        check_models(card, weights, [model.excluded for model in card.models], cancer=card.cancer)


def _sites(folder: Path, settings: Settings) -> Iterator[Finding]:
    status = read_status(folder)
    states = Counter(site.state for site in status.sites)
    given = {
        task.site
        for task in read_tasks(folder)
        if task.kind == "fit_expert" and task.state == "done"
    }
    text = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    if not states:
        invite = f"cropkt-server invite {folder} --site NAME --cancer CODE"
        yield warn("sites", "nobody is invited yet", invite)
    elif late := [site.site for site in status.sites if site.state == "expired"]:
        problem = f"{text}; the invite of {', '.join(late)} has expired"
        yield warn("sites", problem, "Invite again, or revoke the invite")
    else:
        yield ok("sites", f"{text}; {len(given)} with experts")
    yield _enough(status.sites, settings.min_sites)


def _enough(sites: Sequence[SiteStatus], least: int) -> Finding:
    coming = sum(site.state in ("enrolled", "invited") for site in sites)
    text = f"{coming} of at least {least} sites are enrolled or invited"
    if coming < least:
        fix = "Invite more, or lower min_sites in study.yaml"
        return fail("min_sites", text, fix) if sites else warn("min_sites", text, fix)
    return ok("min_sites", text)
