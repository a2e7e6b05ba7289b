"""The coordinator's Flower app: sends what is due to whoever is online, stores what comes back.

The same app runs in a deployed federation and in the simulation. Run configuration: `study`, the
study's folder with its `study.yaml`; `poll`, seconds between looks at the grid. Sites that
`study.yaml` names are a simulation's; where it names none, the folder's roster says who they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cropkt_server.dispatch import Dispatcher
from cropkt_server.membership import Enrolled, Membership, Named
from cropkt_server.settings import load_settings
from cropkt_server.study import Gathering, Study

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in the folder `study` until no row is left to do."""
    poll = float(context.run_config.get("poll", 1.0))
    with opened(Path(str(context.run_config["study"]))) as (study, membership):
        Dispatcher(grid, study, membership, poll=poll).run()


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Study, Membership]]:
    """Open a study and the list of those who take part in it."""
    settings = load_settings(folder)
    membership = Named(settings.sites) if settings.sites else Enrolled(folder)
    deployed = isinstance(membership, Enrolled)
    waits = Gathering(min_sites=settings.min_sites, deadline=settings.deadline_after)
    try:
        study = Study(
            folder, settings.study, membership.members(), gathering=waits if deployed else None
        )
        try:
            yield study, membership
        finally:
            study.store.close()
    finally:
        if isinstance(membership, Enrolled):
            membership.close()
