"""Are this site's outcomes and slides what the study needs, and is no patient on both sides?

What errors say of a row or a file is not repeated: it may name a patient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

from cropkt.cancers import Cancer
from cropkt.checkup import Finding, fail, failed, ok, skipped, warn
from cropkt.cohort.bags import UNNAMED, Cohort, load_cohort
from cropkt.cohort.checks import slides_by_name
from cropkt.cohort.forms import form_of
from cropkt.cohort.names import SlideNames
from cropkt.cohort.outcomes import OutcomeTable, counted, read_outcomes
from cropkt.cohort.pack import Pack
from cropkt.cohort.source import SlideSource
from cropkt.cohort.tables import read_table
from cropkt.config import Endpoint, StudyConfig
from cropkt.errors import ConfigError, DataError, OutcomeTableError
from cropkt_client.doctor.folds import (
    at_least,
    events_and_pairs,
    may_leave,
    minima,
    one_side,
)
from cropkt_client.doctor.making import made_alike
from cropkt_client.doctor.reading import Reading
from cropkt_client.site import Site

Found = Generator[Finding, None, Cohort | None]
_ADD = "Add what is missing, or go on without"
_SKIP = "Correct it, or leave such rows and slides out: on_bad: skip in site.yaml"


class Cohorts:
    """The data of one site; `usable` are the cancers that can be trained, with their patients.

    Args:
        config: its `site.yaml`.
        study: what the study asks; None: nobody said so yet.
        full: read every slide, however long that takes.
    """

    def __init__(self, config: Path, study: StudyConfig | None, *, full: bool) -> None:
        self.usable: dict[Cancer, int] = {}
        self._site, self._full = Site.load(config), full
        self._known = study is not None
        self.study = study or StudyConfig(encoder=self._site.config.encoder)

    def checks(self) -> Iterator[Finding]:
        """Yield a finding a check."""
        source, finding = self._slides()
        yield finding
        table = yield from self._outcomes()
        yield self._settings()
        yield self._agreed_encoder()
        if source is None or table is None:
            missing = "slides" if source is None else "outcomes"
            yield skipped("patients", f"the {missing} cannot be read")
            return
        yield self._width(source)
        yield _without_outcome(table, source)
        yield _alike(table)
        cohorts = []
        for cancer in self._site.config.cancers:
            cohort = yield from self._patients(cancer, table, source)
            if cohort is not None:
                cohorts.append(cohort)
                yield from events_and_pairs(cohort, self.study, self._site.config)
                yield one_side(cohort, self.study)
                yield may_leave(cohort, self.study, self._site.config)
        if cohorts:
            yield made_alike(cohorts, source, self._site.config)
            self.usable = {cohort.cancer: len(cohort) for cohort in cohorts}
            yield from Reading(cohorts, source, self._site.state, full=self._full).checks()

    def _slides(self) -> tuple[SlideSource | None, Finding]:
        """Open where the slides lie."""
        config, folder = self._site.config, self._site.folder
        lost = [n for n, one in enumerate(config.slides, 1) if not (folder / one).is_dir()]
        if lost and config.pack is None:
            numbers = ", ".join(map(str, lost))
            problem = f"of the folders under `slides` in site.yaml, number {numbers} does not exist"
            return None, fail("slides", problem, "Correct the path, or mount the disk")
        try:
            source = self._site.source()
            number = len(list(source.slide_ids()))
        except DataError as error:
            if config.pack is not None:
                return None, fail("slides", "the pack cannot be opened", error.fix)
            return None, fail("slides", error.problem, error.fix)
        return source, ok("slides", f"{number} in {_kind(source, len(config.slides))}")

    def _outcomes(self) -> Generator[Finding, None, OutcomeTable | None]:
        """Read the table, leaving out what is bad; say what it was taken to mean."""
        path = self._site.folder / self._site.config.outcomes
        try:
            columns = read_table(path).columns
        except OutcomeTableError as error:
            yield fail("outcomes", "the table cannot be read", error.fix)
            return None
        if not self._known:
            self._guess_endpoint(columns, path)
        try:
            form_of(columns, self.study.endpoint, path)
        except OutcomeTableError as error:
            problem = f"its columns are in no known form for {self.study.endpoint}, or in several"
            yield fail("outcomes", problem, error.fix)
            return None
        try:
            table = read_outcomes(path, endpoint=self.study.endpoint, on_bad="skip")
        except OutcomeTableError as error:
            yield fail("outcomes", error.problem, error.fix)
            return None
        patients = at_least(len(table), minima(self._site.config).minimum_patients)
        yield ok("outcomes", f"{patients} patients; {table.form}")
        row = self._stops_at(path)
        for line in table.dropped:
            text = f"{line}; the study stops at the first, {row} of the table"
            yield fail("outcome rows", text, _SKIP) if row else warn("outcome rows", line, _ADD)
        return table

    def _stops_at(self, path: Path) -> str:
        """Return the row of the table at which a study would stop, as "row 7"; or nothing."""
        try:
            read_outcomes(path, endpoint=self.study.endpoint, on_bad=self._site.config.on_bad)
        except OutcomeTableError as error:
            return f"row {error.where.rpartition(' row ')[2]}"
        return ""

    def _guess_endpoint(self, columns: tuple[str, ...], path: Path) -> None:
        for endpoint in get_args(Endpoint):
            try:
                form_of(columns, endpoint, path)
            except OutcomeTableError:
                continue
            self.study = replace(self.study, endpoint=endpoint)
            return

    def _settings(self) -> Finding:
        study = self.study
        text = f"{study.endpoint}, {study.folds} folds ({study.split})"
        if self._known:
            text = f"{text}, features {study.shape.dim} wide, {study.training.epochs} epochs"
            return ok("study", f"the coordinator's settings: {text}")
        return skipped("study", f"nobody told its settings yet: judged by {text}")

    def _agreed_encoder(self) -> Finding:
        mine = self._site.config.encoder
        if not mine:
            fix = "Write the agreed encoder's name into site.yaml: without it no client starts"
            return fail("encoder", "site.yaml names none", fix)
        if not self._known:
            return ok("encoder", f"{mine}; nobody told the study's yet")
        try:
            self._site.check_encoder(self.study)
        except ConfigError as error:
            return failed("encoder", error)
        return ok("encoder", f"{mine}, as the study's")

    def _width(self, source: SlideSource) -> Finding:
        """Compare the first slide that can be read with the study; each is looked at later."""
        for slide_id in source.slide_ids():
            try:
                _, width = source.shape(slide_id)
            except DataError:
                continue
            break
        else:
            return fail("width", "no slide can be read", "Extract them again")
        if not self._known:
            shape = replace(self.study.shape, dim=width)
            self.study = replace(self.study, shape=shape)
            return ok("width", f"features are {width} wide; what the study asks is not known here")
        if width != self.study.shape.dim:
            problem = f"features are {width} wide, the study's {self.study.shape.dim}"
            return fail("width", problem, "Extract the slides with the study's encoder")
        return ok("width", f"features are {width} wide, as the study's")

    def _patients(self, cancer: Cancer, table: OutcomeTable, source: SlideSource) -> Found:
        check = f"patients of {cancer}"
        try:
            cohort, dropped = load_cohort(
                table,
                source,
                cancer=cancer,
                dim=self.study.shape.dim,
                on_bad="skip",
                check_values=False,
            )
        except DataError as error:
            yield fail(check, error.problem, error.fix)
            return None
        several = [len(slides) for slides in cohort.slides if len(slides) > 1]
        policy = minima(self._site.config)
        patients = at_least(len(cohort), policy.minimum_patients)
        events = at_least(int(cohort.event.sum()), policy.minimum_events)
        text = f"{patients} with outcome and slides, events: {events}"
        if several:
            text = f"{text}; {len(several)} have several slides, up to {max(several)}"
        yield ok(check, text)
        for line in dropped:
            stops = self._site.config.on_bad == "raise" and UNNAMED not in line
            yield fail(check, line, _SKIP) if stops else warn(check, line, _ADD)
        return cohort


def _kind(source: SlideSource, folders: int) -> str:
    return "a pack" if isinstance(source, Pack) else counted(folders, "folder")


def _without_outcome(table: OutcomeTable, source: SlideSource) -> Finding:
    """Count the slides that the table gives to nobody."""
    stored = set(source.slide_ids())
    patients = table.rows
    if not any(patient.slides for patient in patients):
        patients = tuple(slides_by_name(patients, source))
    names = SlideNames(stored)
    used = {name for one in patients for slide in one.slides for name in names.matches(slide)}
    if alone := len(stored - used):
        fix = "Add their rows to the table, if they belong to the study"
        return warn("slides without outcome", f"{alone} of {len(stored)} are not used", fix)
    return ok("slides without outcome", "none")


def _alike(table: OutcomeTable) -> Finding:
    """Count ids that differ in case or punctuation alone: perhaps one patient, on two sides."""
    plain = Counter(
        "".join(letter for letter in patient.patient_id.casefold() if letter.isalnum())
        for patient in table.rows
    )
    if twice := sum(count > 1 for count in plain.values()):
        problem = f"{twice} ids are written in several ways (case, dashes or blanks)"
        fix = "Write each patient in one way: one who counts as two is trained on and tested"
        return warn("patients twice", problem, fix)
    return ok("patients twice", "no two ids differ in case or punctuation alone")
