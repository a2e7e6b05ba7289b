"""`cropkt-client predict`: the released model answers for patients, and nothing leaves.

What is written may be read by its owner alone. What is printed holds counts and no patient.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from cropkt.cancers import Cancer, cancer_of
from cropkt.cohort.checks import all_finite, slides_by_name
from cropkt.cohort.facts import SlideFacts, facts_of, refuse_other, unchecked
from cropkt.cohort.features import SlideFolders
from cropkt.cohort.names import SlideNames, bare_name
from cropkt.cohort.outcomes import PatientOutcome, counted
from cropkt.cohort.pack import Pack
from cropkt.cohort.source import SlideSource
from cropkt.cohort.tables import read_table
from cropkt.errors import (
    BagShapeError,
    CohortError,
    ConfigError,
    DataError,
    MissingSlideError,
    OutcomeTableError,
    SlideFileError,
    UsageError,
)
from cropkt.experts.card import hash_of
from cropkt.files import write_private
from cropkt.prediction.answer import Answer
from cropkt.prediction.kept import About, Which
from cropkt.prediction.model import ReleasedModel
from cropkt.prediction.page import page
from cropkt.prediction.pictures import heat_map
from cropkt.prediction.slides import Slide, attention_csv, geojson, spacing
from cropkt.prediction.tables import Predicted, csv_files, json_file
from cropkt.report.canvas import png
from cropkt_client.site import Site
from cropkt_client.trust import Trust

MOST = 20  # slides that are taken for one patient's without being told so
_PATIENT = ("patient_id", "case_id", "bcr_patient_barcode")
_SLIDE = ("slide_id", "pathology_id")
_PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for."""

    cancer: Cancer
    slides: tuple[Path, ...]  # files and folders
    out: Path
    table: Path | None = None
    patient: str = ""  # name of the one patient, without a table
    model: Which = "released"
    patch_size: float | None = None  # pixels of the finest level
    thumbnail: Path | None = None  # a picture, or a folder of them by slide
    level0_size: tuple[int, int] | None = None


@dataclass(slots=True, kw_only=True)
class Summary:
    """What was done, in counts."""

    patients: int = 0
    slides: int = 0
    patches: int = 0
    in_training: int = 0
    heat_maps: int = 0
    without_coords: int = 0  # slides
    out: str = ""

    def lines(self) -> list[str]:
        """Return it in words."""
        lines = [
            f"{counted(self.patients, 'patient')}, {counted(self.slides, 'slide')}, "
            f"{self.patches} patches"
        ]
        if self.in_training:
            lines.append(
                f"{self.in_training} of the training cohort, answered by models that did not "
                "see them"
            )
        if self.without_coords:
            slides = counted(self.without_coords, "slide")
            lines.append(f"no heat map of {slides} whose files hold no coordinates")
        lines.append(f"{counted(self.heat_maps, 'heat map')}; all lies in {self.out}")
        return lines


def predict(site: Site, request: Request) -> Summary:
    """Answer for the patients of a request, and write tables, pages and maps.

    Raises:
        ConfigError: no model has been released here.
        ArtifactError: the released model is damaged, or an expert in it was revoked.
        DataError: a table or slide that cannot be used, or is not what the model reads.
    """
    model = _model(site, request)
    source = _source(request.slides)
    patients = _patients(request, source)
    folds = _training_folds(site, request, patients)
    expected = SlideFacts(
        encoder=model.about.encoder or None,
        magnification=model.about.magnification or site.config.magnification,
        patch_size=model.about.patch_size,
    )
    facts = _checked(patients, source, expected, dim=model.about.study.shape.dim, site=site)
    request.out.mkdir(parents=True, exist_ok=True, mode=0o700)
    summary, found = Summary(out=str(request.out)), []
    names = _folder_names([patient.patient_id for patient in patients])
    for patient, fold, name in zip(patients, folds, names, strict=True):
        slides, bag = _read(patient, source, facts, expected, request)
        (answer,) = model.predict([bag], model=request.model, folds=[fold])
        one = Predicted(patient=patient.patient_id, slides=tuple(slides), answer=answer)
        found.append(one)
        summary.heat_maps += _write(request, model.about, one, request.out / name)
        summary.patients += 1
        summary.slides += len(slides)
        summary.patches += len(bag)
        summary.in_training += fold is not None
        summary.without_coords += sum(slide.coords is None for slide in slides)
    for name, content in csv_files(model.about, found).items():
        write_private(request.out / name, content)
    write_private(request.out / "predictions.json", json_file(model.about, found))
    return summary


def as_json(summary: Summary) -> str:
    """Return a summary for scripts."""
    return json.dumps(asdict(summary), sort_keys=True)


def _model(site: Site, request: Request) -> ReleasedModel:
    if request.cancer not in site.config.cancers:
        served = ", ".join(site.config.cancers)
        raise ConfigError("site.yaml", f"its cancers are {served}, not {request.cancer}")
    path = site.released(request.cancer)
    try:
        model = ReleasedModel.load(path, device=site.device)
    except FileNotFoundError:
        problem = f"no model of {request.cancer} has been released here yet"
        fix = "Serve the study until its evaluation (cropkt-client status), then ask again"
        raise ConfigError(path, problem, fix) from None
    about, trust = model.about, Trust(site.config, site.state)
    if about.cancer != request.cancer:
        raise ConfigError(path, f"it is a model of {about.cancer}", "Restore it from a backup")
    trust.refuse_revoked(f"average of {about.cancer}", *about.parents)
    for weight, source in zip(about.weights[1:], about.sources, strict=True):
        if request.model == "router" or (request.model == "released" and weight > 0):
            trust.refuse_revoked(f"expert {source.cancer}", hash_of(source.card.encode()))
    return model


def _source(slides: Sequence[Path]) -> SlideSource:
    if len(slides) == 1 and (slides[0] / "slides.csv").is_file():
        return Pack(slides[0])
    return SlideFolders(slides)


def _training_folds(
    site: Site, request: Request, patients: Sequence[PatientOutcome]
) -> list[int | None]:
    """Return the fold of each patient whom the model learnt from, known by id or by a slide.

    Raises:
        CohortError: no model left out all training patients whose slides were given as one's.
    """
    kept = site.kept(f"{request.cancer}/predictions")
    if kept is None:
        return [None] * len(patients)
    if "slides" not in kept:
        problem = "was kept by an earlier version, and does not say which slides it learnt from"
        raise ConfigError(site.state / request.cancer, problem, "Let a study release it again")
    of_patient = dict(zip(kept["patients"].tolist(), kept["folds"].tolist(), strict=True))
    slides, owners = map(bare_name, kept["slides"].tolist()), kept["folds"][kept["owners"]]
    of_slide = dict(zip(slides, owners.tolist(), strict=True))
    names, found = SlideNames(of_slide), []
    for patient in patients:
        folds = {of_slide[name] for slide in patient.slides for name in names.matches(slide)}
        folds |= {of_patient[name] for name in [patient.patient_id] if name in of_patient}
        if len(folds) > 1:
            problem = "slides of training patients of several folds were given as one patient's"
            raise CohortError(request.table or "--slides", problem, "Ask for each patient alone")
        found.append(folds.pop() if folds else None)
    return found


def _patients(request: Request, source: SlideSource) -> list[PatientOutcome]:
    """Return whom to answer for, with their slides; nobody's outcome is known."""
    if request.table is None:
        slides = sorted(source.slide_ids())
        if len(slides) > MOST and not request.patient:
            problem = f"{len(slides)} slides were given without saying whose they are"
            raise UsageError("--slides", problem, "Give --table, or --patient if all are of one")
        name = slides[0] if len(slides) == 1 else "patient"
        return [_patient(request.patient or name, [(slide, 0) for slide in slides])]
    table = read_table(request.table)
    key = next((name for name in _PATIENT if name in table.columns), None)
    if key is None:
        problem = f"has no column {', '.join(_PATIENT)}"
        raise OutcomeTableError(request.table, problem, "Name the column patient_id")
    named = next((name for name in _SLIDE if name in table.columns), None)
    found: dict[str, list[tuple[str, int]]] = {}
    for number, cells in table.rows:
        if (code := cells.get("cancer")) and cancer_of(code) != request.cancer:
            continue
        if not cells[key] or (named and not cells[named]):
            raise OutcomeTableError(
                f"{request.table} row {number}", "a cell is empty", "Fill it in"
            )
        rows = found.setdefault(cells[key], [])
        if named:
            rows.append((cells[named], number))
    patients = [_patient(name, slides) for name, slides in sorted(found.items())]
    if named is None:
        patients = slides_by_name(patients, source)
    if not patients or (missing := sum(not patient.slides for patient in patients)):
        problem = f"{missing} patients have no slide" if patients else "names no such patient"
        raise MissingSlideError(request.table, problem, "Add a column slide_id, or their slides")
    owners = [bare_name(slide) for patient in patients for slide in patient.slides]
    if len(owners) != len(set(owners)):
        raise OutcomeTableError(request.table, "lists a slide twice", "Keep one of the rows")
    return patients


def _patient(name: str, slides: Sequence[tuple[str, int]]) -> PatientOutcome:
    known = PatientOutcome(patient_id=name, days=math.nan, event=False)
    return known.with_slides(slides)


def _checked(
    patients: Sequence[PatientOutcome],
    source: SlideSource,
    expected: SlideFacts,
    *,
    dim: int,
    site: Site,
) -> dict[str, SlideFacts]:
    """Check every slide's header before the first is answered; return what each says."""
    facts = {}
    for patient in patients:
        for slide, row in patient.numbered_slides():
            path, facts[slide] = _where(source, slide, row), facts_of(source, slide)
            refuse_other(facts[slide], expected, path)
            patches, width = source.shape(slide)
            if not patches:
                raise SlideFileError(path, "the slide's bag is empty", "Extract it again")
            if width != dim:
                problem = f"features are {width} wide, the model reads {dim}"
                fix = f"Extract with the encoder of the study{_named(site.config.encoder)}"
                raise BagShapeError(path, problem, fix)
    return facts


def _where(source: SlideSource, slide: str, row: int) -> str:
    """Return how an error calls a slide: by its file, or by its row of the table."""
    return str(source.path(slide)) if isinstance(source, SlideFolders) else f"table row {row}"


def _named(encoder: str) -> str:
    return f", {encoder}" if encoder else ""


def _read(
    patient: PatientOutcome,
    source: SlideSource,
    facts: Mapping[str, SlideFacts],
    expected: SlideFacts,
    request: Request,
) -> tuple[list[Slide], torch.Tensor]:
    """Return a patient's slides and their patches as one bag."""
    slides, pieces, first = [], [], 0
    for name, row in patient.numbered_slides():
        features, coords = source.features(name), source.coords(name)
        if not all_finite(features):
            problem = "the slide's features hold NaN or infinite values"
            raise SlideFileError(_where(source, name, row), problem, "Extract it again")
        said = facts[name]
        corners = None if coords is None else coords.numpy()
        size = request.patch_size or said.patch_size_level0
        guess = None if corners is None or size else spacing(corners)
        known = (said.width, said.height) if said.width and said.height else None
        slides.append(
            Slide(
                name=bare_name(name),
                first=first,
                patches=len(features),
                coords=corners,
                patch_size=size or guess,
                guessed=guess is not None,
                size=request.level0_size or known,
                unchecked=unchecked(said, expected),
            )
        )
        pieces.append(features)
        first += len(features)
    return slides, pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _write(request: Request, about: About, one: Predicted, folder: Path) -> int:
    """Write the page and the maps of one patient; return how many maps there are."""
    folder.mkdir(exist_ok=True, mode=0o700)
    maps, notes, answer = [], _notes(one.slides, answer=one.answer), one.answer
    for slide, name in zip(one.slides, _folder_names([s.name for s in one.slides]), strict=True):
        if not slide.drawable:
            continue
        drawn = png(heat_map(slide, answer, _thumbnail(request, slide, many=len(one.slides) > 1)))
        maps.append((slide.name, drawn))
        write_private(folder / f"{name}.png", drawn)
        write_private(folder / f"{name}.geojson", geojson(slide, answer))
    write_private(folder / "attention.csv", attention_csv(one.slides, answer))
    write_private(folder / "page.html", page(about, one, maps=maps, notes=notes))
    return len(maps)


def _notes(slides: Sequence[Slide], *, answer: Answer) -> list[str]:
    notes = []
    if answer.fold is not None:
        notes.append(
            "This patient is of the training cohort. The own expert that answers is the one that "
            "left this patient's fold out; the weights of the experts were chosen with all."
        )
    if blind := sum(not slide.drawable for slide in slides):
        notes.append(
            f"{counted(blind, 'slide')} without coordinates of patches: no heat map can be drawn."
        )
    if guessed := sum(slide.guessed for slide in slides):
        notes.append(
            f"{counted(guessed, 'slide')} whose file does not say how large a patch is: taken from "
            "the spacing of the coordinates (--patch-size says it)."
        )
    blank = Counter(" and ".join(slide.unchecked) for slide in slides if slide.unchecked)
    for what, count in blank.items():
        notes.append(
            f"{counted(count, 'slide')} whose {what} went unchecked: its own file or those of the "
            "training slides do not say it."
        )
    return notes


def _thumbnail(request: Request, slide: Slide, *, many: bool) -> Image.Image | None:
    """Return the picture of a slide, if one was given for it."""
    path = request.thumbnail
    if path is None:
        return None
    if path.is_dir():
        found = [path / f"{slide.name}{suffix}" for suffix in _PICTURES]
        path = next((one for one in found if one.is_file()), None)
        if path is None:
            return None
    elif many or request.table is not None:
        raise UsageError("--thumbnail", "is one picture for several slides", "Give their folder")
    if slide.size is None:
        problem = "no file says how large the slide is at its finest level"
        raise UsageError("--thumbnail", problem, "Give --level0-size WIDTH HEIGHT")
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise DataError(path, "is no picture that can be read", "Give a PNG or JPEG") from None


def _folder_names(names: Sequence[str]) -> list[str]:
    """Return names that any file system takes, each once."""
    found: list[str] = []
    taken: set[str] = set()  # in lower case, which some file systems do not tell apart
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:80] or "patient"
        number, unique = 1, safe
        while unique.lower() in taken:
            number += 1
            unique = f"{safe}-{number}"
        found.append(unique)
        taken.add(unique.lower())
    return found
