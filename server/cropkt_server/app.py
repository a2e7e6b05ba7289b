"""The coordinator's Flower app: sends what is due to whoever is online, stores what comes back.

The same app runs in a deployed federation and in the simulation. Run configuration: `study`, the
study's folder with its `study.yaml`; `poll`, seconds between looks at the grid.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cropkt_server.dispatch import Dispatcher
from cropkt_server.settings import load_settings
from cropkt_server.study import Study

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in the folder `study` until no row is left to do."""
    folder = Path(str(context.run_config["study"]))
    settings = load_settings(folder)
    study = Study(folder, settings.study, settings.sites)
    try:
        Dispatcher(grid, study, poll=float(context.run_config.get("poll", 1.0))).run()
    finally:
        study.store.close()
