"""`cropkt-sim`: a whole federation on one machine or cluster."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cropkt.console import Version, one_line

EXAMPLES = """\b
26 cancers with planted truth, in minutes:
  cropkt-sim run --preset demo
Real patients without slides, from the TCGA-CDR table:
  cropkt-sim run --data clinical --outcomes tcga_cdr.csv --out clinical-run
The same, every hospital a site of its own:
  cropkt-sim run --data clinical --outcomes tcga_cdr.csv --sites hospitals
Your own slide features:
  cropkt-sim run --data features --outcomes labels.csv --features FEATURES
What a privacy budget costs:
  cropkt-sim run --preset demo --epsilon 8 --out private-run

\b
Interrupted, the same command goes on where it was. Exit codes: 0 every row is done, 3 rows
failed, 64 a wrong option, 65 bad data, 78 configuration, 130 interrupted.
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Simulate a federation of hospitals: every TCGA cancer is a site.

    \b
    cropkt-sim run --preset demo
    cropkt-sim report demo-out
    """,
)


class DataKind(StrEnum):
    """Where the patients come from."""

    synthetic = "synthetic"
    clinical = "clinical"
    features = "features"


class PresetName(StrEnum):
    """Named settings."""

    default = "default"
    demo = "demo"
    published = "published"


class EngineName(StrEnum):
    """What carries the messages."""

    local = "local"
    ray = "ray"


class SitesBy(StrEnum):
    """What a site is."""

    cancers = "cancers"
    hospitals = "hospitals"


class Split(StrEnum):
    """How patients are divided into folds."""

    stratified = "stratified"
    hospital = "hospital"


class Endpoint(StrEnum):
    """TCGA-CDR endpoints."""

    OS = "OS"
    DSS = "DSS"
    PFI = "PFI"
    DFI = "DFI"


class Programs(StrEnum):
    """What the synthetic data has planted."""

    default = "default"
    none = "none"


@app.callback()
def about(version: Version = False) -> None:
    """Simulate a federation of hospitals: every TCGA cancer is a site."""


@app.command(epilog=EXAMPLES)
def run(
    data: Annotated[DataKind, typer.Option(help="Patients to use.")] = DataKind.synthetic,
    outcomes: Annotated[
        Path | None, typer.Option(help="Outcome table (CSV or TSV) for clinical and features.")
    ] = None,
    features: Annotated[
        list[Path] | None, typer.Option(help="Folder of slide features; repeat for several.")
    ] = None,
    cancers: Annotated[
        str, typer.Option(help="Cancer codes, comma-separated; all 26 by default.")
    ] = "",
    sites: Annotated[SitesBy, typer.Option(help="One site a cancer, or one a hospital.")] = (
        SitesBy.cancers
    ),
    endpoint: Annotated[Endpoint, typer.Option(help="Which outcome of the table.")] = Endpoint.DSS,
    folds: Annotated[
        int | None, typer.Option(min=3, max=10, help="Cross-validation folds.")
    ] = None,
    split: Annotated[Split, typer.Option(help="Folds by patient, or by hospital.")] = (
        Split.stratified
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of folds, training and synthetic data.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the study and its report.")] = Path(
        "cropkt-run"
    ),
    preset: Annotated[PresetName, typer.Option(help="Named settings.")] = PresetName.default,
    programs: Annotated[
        Programs, typer.Option(help="Synthetic data: plant shared programs, or nothing.")
    ] = Programs.default,
    engine: Annotated[EngineName, typer.Option(help="Processes here, or Flower on Ray.")] = (
        EngineName.local
    ),
    workers: Annotated[int, typer.Option(min=0, help="Sites at a time; 0: one a core.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Drop and count bad rows and slides.")
    ] = False,
    shots: Annotated[
        str, typer.Option(help="Compare with so few training patients too: 20,50,100,all.")
    ] = "",
    fedavg_rounds: Annotated[
        int, typer.Option(min=0, max=100, help="Rounds of one model for all cancers; 0: none.")
    ] = 0,
    epsilon: Annotated[
        float | None,
        typer.Option(min=0.01, help="Sites are private: each may spend this on one expert."),
    ] = None,
) -> None:
    """Run a whole study: experts, transfer, routing, report."""
    with one_line("cropkt-sim"):
        from cropkt_sim.study import Options, run_study  # torch loads here: --help stays instant

        run_study(
            Options(
                data=data.value,
                outcomes=outcomes,
                features=tuple(features or ()),
                cancers=cancers,
                by=sites.value,
                endpoint=endpoint.value,
                folds=folds,
                split=split.value,
                seed=seed,
                out=out,
                preset=preset.value,
                programs=programs.value,
                engine=engine.value,
                workers=workers,
                skip_bad=skip_bad,
                epsilon=epsilon,
                shots=shots,
                fedavg_rounds=fedavg_rounds,
            )
        )


@app.command()
def hospital(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder: the hospital's.")],
    cancer: Annotated[str, typer.Option(help="Code of the cancer that it holds.")],
    seed: Annotated[int, typer.Option(min=0, help="Hospitals of one seed fit together.")] = 0,
) -> None:
    """Write what a hospital has, with synthetic patients, to practise a federation.

    The outcomes and slide features lie where the site.yaml expects them that `cropkt-client enrol`
    writes beside them.
    """
    with one_line("cropkt-sim"):
        from cropkt.cancers import cancer_of
        from cropkt_sim.practice import write_hospital

        for line in write_hospital(folder, cancer_of(cancer), seed=seed):
            typer.echo(line)


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="The pack.")],
    features: Annotated[
        list[Path] | None, typer.Option(help="Folder of slide features; repeat for several.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only compare a pack's checksums.")
    ] = False,
    unpack: Annotated[
        Path | None, typer.Option(help="Write a pack's slides back into this folder, as HDF5.")
    ] = None,
) -> None:
    """Pack slide files into one matrix that reads faster; optional, reversible."""
    with one_line("cropkt-sim"):
        from cropkt.cohort.features import SlideFolders
        from cropkt.cohort.packing import pack_or_unpack

        for line in pack_or_unpack(
            folder, lambda: SlideFolders(features or []), verify=verify, unpack_to=unpack
        ):
            typer.echo(line)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folder of a run; several: its seeds.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; with one run the run's own.")
    ] = None,
) -> None:
    """Write one HTML page for clinicians, with its figures and tables.

    Several runs are seeds of one study: the page shows means, and the range over the seeds.
    """
    with one_line("cropkt-sim"):
        from cropkt_sim.report import write  # matplotlib loads here

        typer.echo(write(runs, out))


def main() -> None:
    """Entry point of the `cropkt-sim` command."""
    app()
