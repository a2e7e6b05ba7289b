"""The report as one HTML file that needs nothing else, with its figures and tables beside it."""

from __future__ import annotations

import re
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from cropkt.files import replace_file
from cropkt.report import canvas, gain_sections, knowledge_sections, methods, patient_sections
from cropkt.report import values as read
from cropkt.report.blocks import Picture, Section
from cropkt.report.csv_files import csv_files
from cropkt.report.figures import FIGURES
from cropkt.report.runs import Runs
from cropkt.report.schema import Results

NAME = "report.html"
_BUILDERS = (
    gain_sections.in_short,
    gain_sections.gained,
    gain_sections.against_events,
    gain_sections.arms,
    knowledge_sections.transfer,
    knowledge_sections.heard,
    patient_sections.few_shot,
    patient_sections.risk_groups,
    patient_sections.calibration,
    patient_sections.cost,
    methods.gaps,
    methods.methods,
    methods.limits,
)


def write_page(runs: Runs, folder: Path) -> list[Path]:
    """Write `report.html`, its figures as SVG and PNG, and its tables as CSV.

    Each file is replaced whole, and equal results give equal bytes.

    Returns:
        Their paths, the page first.

    Raises:
        OSError: the folder cannot be written.
    """
    sections = [build(runs) for build in _BUILDERS]
    content: dict[str, bytes] = {}
    drawn: dict[str, str] = {}
    for section in sections:
        if (picture := section.picture) is not None:
            figure = FIGURES[picture.name](runs.results)
            outline = canvas.svg(figure)
            content[f"figures/{picture.name}.svg"] = outline
            content[f"figures/{picture.name}.png"] = canvas.png(figure)
            drawn[picture.name] = inline(outline, picture)
    content |= csv_files(runs.results)
    page = _render(runs, sections, drawn, sorted(content)).encode()
    paths = []
    for name, data in {NAME: page, **content}.items():
        replace_file(folder / name, data)
        paths.append(folder / name)
    return paths


def _render(runs: Runs, sections: list[Section], drawn: dict[str, str], names: list[str]) -> str:
    return template(__package__, "page.html.j2").render(
        palette=palette(),
        facts=_facts(runs.results, runs.seeds),
        sections=sections,
        drawn=drawn,
        names=names,
    )


def palette() -> str:
    """Return the colours of every page, light and dark, as CSS variables."""
    return files(__package__).joinpath("palette.css").read_text("utf-8")


@cache
def template(package: str, name: str) -> Template:
    """Return the template of a page, which lies beside a package's modules."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(files(package).joinpath(name).read_text("utf-8"))


def _facts(results: Results, seeds: list[int]) -> str:
    """Return what the study was, for under the title."""
    count = len(read.targets_of(results))
    facts = [f"{count} target {'cancer' if count == 1 else 'cancers'}"]
    facts += [f"{results['data']} data"] if "data" in results else []
    facts += [f"endpoint {results['endpoint']}"] if "endpoint" in results else []
    facts += [f"{results['folds']} folds"] if "folds" in results else []
    if seeds:
        facts.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}")
    facts += [f"cropkt {results['cropkt']}"] if "cropkt" in results else []
    return " · ".join(facts)


def inline(outline: bytes, picture: Picture) -> str:
    """Return an SVG file as an element of a page, apart from the ids of the others."""
    text = outline.decode()
    text = text[text.index("<svg") :]
    prefix = f"figure-{picture.name}"
    text = re.sub(r'(?<=\bid=")(?=[^"])', f"{prefix}-", text)
    text = re.sub(r'(?<=href="#)|(?<=url\(#)', f"{prefix}-", text)
    # The page is HTML, where these elements need no namespace; and a style is for this figure.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"(?s)<metadata>.*?</metadata>", "", text)
    text = text.replace("*{stroke", f"#{prefix} *{{stroke")
    width = re.search(r'(?<= width=")[\d.]+(?=pt")', text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return (
        f'<svg id="{prefix}" class="figure" role="img" aria-label="{escape(picture.alt)}"'
        f' style="max-width:{width[0] if width else 700}pt"{text.removeprefix("<svg")}'
    )
