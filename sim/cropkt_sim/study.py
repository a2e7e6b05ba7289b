"""One simulated study from options to report."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from cropkt.cancers import Cancer, cancer_of
from cropkt.config import Arm, Endpoint, StudyConfig
from cropkt.errors import StudyError, UsageError
from cropkt.report.schema import Planted as PlantedResult
from cropkt.report.schema import Results
from cropkt.report.tables import summary_lines, summary_table
from cropkt.report.write import write_report
from cropkt_server.progress import shown
from cropkt_server.results import results
from cropkt_server.settings import Settings, save_settings
from cropkt_server.study import Study
from cropkt_sim.curves import add_curves
from cropkt_sim.engine import Engine, simulate
from cropkt_sim.presets import Data, Preset, study_for
from cropkt_sim.sites import Prepared, prepare
from cropkt_sim.synthetic import Planted

FEWEST = 10  # patients of which any fold still learns something
_FEDAVG: tuple[Arm, ...] = ("fedavg", "fedavg_tuned")
PAGE = 120  # characters of a line where no terminal says
POLL = 0.02  # seconds between looks at the grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `cropkt-sim run` was asked for."""

    data: Data
    outcomes: Path | None
    features: tuple[Path, ...]
    cancers: str
    by: Literal["cancers", "hospitals"]
    endpoint: Endpoint
    folds: int | None
    split: Literal["stratified", "hospital"]
    seed: int
    out: Path
    preset: Preset
    programs: Literal["default", "none"]
    engine: Engine
    workers: int
    skip_bad: bool
    epsilon: float | None = None
    shots: str = ""
    fedavg_rounds: int = 0


def run_study(options: Options) -> None:
    """Prepare the sites, run the study over them, write and print the report.

    Raises:
        CropktError: bad input, before anything is run; or rows of the study failed.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PAGE  # a file or pipe has no width of its own
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    started = time.monotonic()
    cancers, _ = _cancers(options.cancers), _shots(options.shots)
    if cancers is not None and len(cancers) < 2:
        raise UsageError("--cancers", "transfer needs at least two cancers", "Name another")
    prepared = prepare(
        data=options.data,
        folder=options.out,
        cancers=cancers,
        seed=options.seed,
        outcomes=options.outcomes,
        features=options.features,
        endpoint=options.endpoint,
        by=options.by,
        on_bad="skip" if options.skip_bad else "raise",
        programs=options.programs,
        epsilon=options.epsilon,
    )
    for note in prepared.notes:
        console.print(note, soft_wrap=True)
    if len(prepared.cancers) < 2:
        raise UsageError(
            "data", "holds one cancer, and transfer needs two", "Add another's patients"
        )
    settings = Settings(
        name=f"{options.data}-{options.seed}", sites=prepared.names, study=_study(options, prepared)
    )
    folder = options.out / "study"
    folder.mkdir(parents=True, exist_ok=True)
    save_settings(settings, folder)
    Study(folder, settings.study, settings.sites).store.close()  # refuses other settings early
    prepared_at = time.monotonic()
    with shown(folder, console):
        simulate(
            server_app="cropkt_server.app:app",
            client_app="cropkt_client.app:app",
            nodes=len(prepared.names),
            run_config={"study": str(folder), "sites": str(prepared.folder), "poll": POLL},
            engine=options.engine,
            workers=options.workers,
        )
    found = _gather(options, prepared, settings, folder)
    found["seconds"] = {
        "prepare": round(prepared_at - started, 1),
        "study": round(time.monotonic() - prepared_at, 1),
        "total": round(time.monotonic() - started, 1),
    }
    paths = write_report(found, options.out)
    console.print(summary_table(found))
    for line in summary_lines(found):
        console.print(line, soft_wrap=True)
    console.print(f"\nThe report lies in {options.out}: {', '.join(p.name for p in paths)}.")
    console.print(f"Took {found['seconds']['total']:.0f} s.")
    if found["failed"]:
        rows = ", ".join(failure["row"] for failure in found["failed"])
        raise StudyError("study", f"{len(found['failed'])} rows failed: {rows}")


def _gather(options: Options, prepared: Prepared, settings: Settings, folder: Path) -> Results:
    study = Study(folder, settings.study, settings.sites)
    try:
        found = results(study)
    finally:
        study.store.close()
    found["data"], found["preset"] = options.data, options.preset
    if prepared.planted is not None:
        found["planted"] = planted_result(found, prepared.planted)
    folders = [prepared.folder / str(i) for i in range(len(prepared.names))]
    add_curves(found, folders, settings.study)
    return found


def planted_result(found: Results, planted: Planted) -> PlantedResult:
    """Compare the routing with the truth: do relatives together outweigh all other sources?"""
    targets = 0
    hits = 0
    for target, relatives in planted.relatives.items():
        routing = found["targets"].get(target, {}).get("routing")
        if not routing or not relatives:
            continue
        targets += 1
        of_relatives = sum(routing.get(name, 0.0) for name in relatives)
        of_others = sum(
            weight for name, weight in routing.items() if name not in relatives and name != "self"
        )
        hits += of_relatives > of_others
    return {
        "targets_routed_to_relatives": hits,
        "of": targets,
        "relatives": planted.relatives,
        "best_c_index": planted.best_c_index,
    }


def _cancers(text: str) -> tuple[Cancer, ...] | None:
    """Return the cancers of a comma-separated list, None for all."""
    chosen = tuple(sorted({cancer_of(code) for code in text.split(",") if code.strip()}))
    return chosen or None


def _study(options: Options, prepared: Prepared) -> StudyConfig:
    study = study_for(data=options.data, preset=options.preset, dim=prepared.dim)
    return replace(
        study,
        endpoint=options.endpoint,
        folds=options.folds or study.folds,
        split=options.split,
        seed=options.seed,
        shots=_shots(options.shots),
        fedavg_rounds=options.fedavg_rounds,
        arms=(*study.arms, *(_FEDAVG if options.fedavg_rounds else ())),
    )


def _shots(text: str) -> tuple[int, ...]:
    """Return the numbers of a comma-separated list; `all` is always compared.

    Raises:
        UsageError: something in it is no number of patients.
    """
    parts = [part.strip() for part in text.split(",") if part.strip() not in ("", "all")]
    if not all(part.isdecimal() and int(part) >= FEWEST for part in parts):
        problem = f"{text} is not a list of numbers of patients, {FEWEST} or more"
        raise UsageError("--shots", problem, "Write 20,50,100,all")
    return tuple(sorted({int(part) for part in parts}))
