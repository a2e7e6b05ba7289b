"""What a federation costs: a coordinator under load, experts on the wire, tasks beside training.

    python benchmarks/bench_federation.py load [--sites 100] [--cancers 26]
    python benchmarks/bench_federation.py bank [--sites 26]
    python benchmarks/bench_federation.py overhead [--updates 240]

`load` and `bank` run a real `cropkt-server start` over TLS against light sites (`light_sites.py`)
in another process. `load` has many sites with small experts, several sites a cancer, so that
averaging and the bank both take part; `bank` has one site a cancer, with experts of the published
widths (4.8 MB), each of which every other site scores and routes. A relay counts the TCP payload
between them. A task's latency is from when it was sent to when its reply was stored; of it, light
sites look for messages every 3 s, and the coordinator for replies every second.

`overhead` runs a study of three hospitals with `cropkt-client`, and the same study in the
simulation, where each task is a call in a process that is already there; in both, three sites
train at once with one thread each. `bare` is the time in the tasks alone, in the same run.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from coordinator import Coordinator, Relay, Timing, load_average, median_p95
from hospitals import ENCODER, federated, simulated, write_hospital
from light_sites import Traffic, serve
from rich.console import Console
from rich.table import Table

from cropkt.cancers import Cancer
from cropkt.config import ExpertShape, RouterConfig, StudyConfig, TrainingConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
SMALL = ExpertShape(dim=64, embed=32, attention=16, bins=16)
MIDDLE = ExpertShape(dim=256, embed=128, attention=64, bins=16)
HOSPITALS = {"eye-clinic": Cancer.UVM, "skin-clinic": Cancer.SKCM, "kidney-clinic": Cancer.KIPAN}
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]
Keep = Annotated[Path | None, typer.Option(help="A new folder in which to leave the study.")]


@app.command()
def load(
    sites: Annotated[int, typer.Option(min=2)] = 100,
    cancers: Annotated[int, typer.Option(min=2, max=26)] = 26,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Many light sites with small experts, several a cancer."""
    names = list(Cancer)[:cancers]
    holders = {f"site-{i:03d}": (names[i % cancers],) for i in range(sites)}
    _show(_light(StudyConfig(encoder=ENCODER, shape=SMALL, folds=3), holders, keep=keep), as_json)


@app.command()
def bank(sites: Annotated[int, typer.Option(min=2, max=26)] = 26, as_json: AsJson = False) -> None:
    """One light site a cancer, with experts of the published widths."""
    holders = {f"site-{cancer}": (cancer,) for cancer in list(Cancer)[:sites]}
    _show(_light(StudyConfig(encoder=ENCODER), holders), as_json)


@app.command()
def overhead(
    updates: Annotated[int, typer.Option(help="Of a training.", min=1)] = 240,
    patients: Annotated[int, typer.Option(min=12)] = 64,
    patches: Annotated[int, typer.Option(min=1)] = 256,
    as_json: AsJson = False,
) -> None:
    """Three hospitals that train."""
    before, folder = load_average(), Path(tempfile.mkdtemp(prefix="cropkt-bench-"))
    config = StudyConfig(
        encoder=ENCODER,
        folds=3,
        shape=MIDDLE,
        training=TrainingConfig(minimum_updates=updates),
        router=RouterConfig(minimum_updates=updates),
    )
    for seed, (site, cancer) in enumerate(HOSPITALS.items()):
        where = folder / "sites" / site
        write_hospital(where, cancer, dim=MIDDLE.dim, patients=patients, patches=patches, seed=seed)
    bare = simulated(folder, config, HOSPITALS)
    whole = federated(folder, config, HOSPITALS)
    found: dict[str, Any] = {
        "federation, s": whole.span,
        "simulation, s": bare.span,
        "federation over simulation": whole.span / bare.span,
        "bare, s": _bare(whole),
        "federation over bare": whole.span / _bare(whole),
    }
    for kind, tasks in whole.by_kind().items():
        seconds = median_p95([whole.seconds[task] for task in tasks])[0]
        beside = median_p95([whole.latency[task] - whole.seconds[task] for task in tasks])[0]
        found[f"{kind}, s"] = [seconds, beside]
    _show({**found, "load average": f"{before}; {load_average()}"}, as_json)
    shutil.rmtree(folder)


def _bare(timing: Timing) -> float:
    """Return the seconds in the tasks of the sites alone: of each stage the slowest site's."""
    return sum(max(timing.seconds[task] for task in tasks) for tasks in timing.by_kind().values())


def _light(
    config: StudyConfig, holders: Mapping[str, Sequence[Cancer]], *, keep: Path | None = None
) -> dict[str, Any]:
    """Run a study with light sites, in the folder `keep` if there is one; return what it cost."""
    before, folder = load_average(), keep or Path(tempfile.mkdtemp(prefix="cropkt-bench-"))
    coordinator = Coordinator(folder / "study", config, min_sites=len(holders))
    sites = [coordinator.enrol(name, cancers) for name, cancers in holders.items()]
    coordinator.start()
    relay = Relay(coordinator.port)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            traffic: Traffic = pool.apply(serve, (sites, relay.address, coordinator.ca))
        cost = coordinator.cost()
    finally:
        coordinator.stop()
        relay.close()
    if cost.code:
        raise SystemExit(f"exit code {cost.code}; {traffic.broken[:3]}; see {folder}")
    timing = Timing.of(coordinator.folder)
    found: dict[str, Any] = {
        "sites": len(sites),
        "peak memory, MB": cost.peak / 1e6,
        "peak of its processes together, MB": cost.tree / 1e6,
        "CPU, s": cost.cpu,
        "CPU of the light sites, s": traffic.cpu,
        "study, s": timing.span,
        "weights, MB": (traffic.down + traffic.up) / 1e6,
        "wire, MB": (relay.down + relay.up) / 1e6,
        "wire over weights": (relay.down + relay.up) / (traffic.down + traffic.up),
        "sessions that broke": len(traffic.broken),
        "tries beyond the first": timing.repeated,
    }
    for kind, tasks in timing.by_kind().items():
        found[f"{kind}, latency, s"] = median_p95([timing.latency[task] for task in tasks])
    if keep is None:
        shutil.rmtree(folder)
    return {**found, "load average": f"{before}; {load_average()}"}


def _show(found: dict[str, Any], as_json: bool) -> None:
    """Print the figures; of pairs, median and 95th percentile, or the task and what it waited."""
    if as_json:
        print(json.dumps(found))
        return
    table = Table(show_header=False)
    for name, value in found.items():
        values = value if isinstance(value, tuple | list) else [value]
        shown = [f"{one:,.3f}" if isinstance(one, float) else str(one) for one in values]
        table.add_row(name, ", ".join(shown))
    Console().print(table)


if __name__ == "__main__":
    app()
