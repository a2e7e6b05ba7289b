"""Do the files of the slides say that all were made in one way?

A folder may bear any name, so encoders are counted and not named.
"""

from __future__ import annotations

from collections.abc import Sequence

from cropkt.checkup import Finding, ok, skipped, warn
from cropkt.cohort.bags import Cohort
from cropkt.cohort.facts import facts_of, tallies
from cropkt.cohort.features import SlideFolders
from cropkt.cohort.source import SlideSource
from cropkt_client.settings import SiteConfig


def made_alike(cohorts: Sequence[Cohort], source: SlideSource, config: SiteConfig) -> Finding:
    """Compare what the files of training slides say of encoder and magnification."""
    check = "made alike"
    if not isinstance(source, SlideFolders):
        return skipped(check, "a pack does not keep how its slides were made")
    slides = [slide for cohort in cohorts for mine in cohort.slides for slide in mine]
    encoders, magnifications = tallies(facts_of(source, slide) for slide in slides)
    wrong = []
    if len(encoders) > 1:
        counts = ", ".join(str(count) for _, count in encoders.most_common())
        wrong.append(f"the files name {len(encoders)} encoders (slides: {counts})")
    if len(magnifications) > 1:
        counts = ", ".join(f"{of:g}x: {count}" for of, count in magnifications.most_common())
        wrong.append(f"the files are of {len(magnifications)} magnifications (slides: {counts})")
    elif magnifications and config.magnification not in (None, *magnifications):
        (said,) = magnifications
        wrong.append(f"site.yaml says {config.magnification:g}x, the files {said:g}x")
    if wrong:
        fix = "Extract the others again, or give the folder of one encoder and magnification"
        return warn(check, "; ".join(wrong), fix)
    if not (encoders or magnifications):
        return skipped(check, "no file says its encoder or magnification")
    told = f"encoder (said by {encoders.total()}) and magnification ({magnifications.total()})"
    return ok(check, f"{told} of {len(slides)} files agree")
