"""Where do the records of a runs folder lie, and how does their web page open?"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prunezero.errors import OutputError, reason


def tracking_uri(runs_dir: Path, uri: str | None = None) -> str:
    """The URI given, else `MLFLOW_TRACKING_URI`, else the database in the runs folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or _database_uri(runs_dir)


def ui_command(
    runs_dir: Path, uri: str | None = None, *, port: int = 5000
) -> tuple[list[str], dict[str, str]]:
    """The command that opens the web page on this machine alone, and the environment it needs.

    Raises:
        OutputError: the runs are on a server, which has its own page.
    """
    store = tracking_uri(runs_dir, uri)
    if store.startswith(("http://", "https://")):
        raise OutputError(f"the runs are on the server {store}; open that address in a browser")
    command = [sys.executable, "-m", "mlflow", "ui"]
    # One worker and no job runner: a quarter of the memory, and nothing here needs more.
    command += ["--host", "127.0.0.1", "--port", str(port), "-w", "1"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # Not in the command, which every user of the machine can read, and a URI may hold a password.
    return command, {**os.environ, **quiet, "MLFLOW_BACKEND_STORE_URI": store}


def view_links(runs_dir: Path, *, port: int = 5000) -> dict[str, str]:
    """Where each saved view opens, by its name, once `ui_command` runs.

    Raises:
        OutputError: the records cannot be read.
    """
    from mlflow import MlflowClient

    from prunezero.report.tracking.mlflow_store import EXPERIMENT
    from prunezero.report.tracking.views import MODES, VIEWS

    uri = tracking_uri(runs_dir)
    try:
        experiment = MlflowClient(tracking_uri=uri).get_experiment_by_name(EXPERIMENT)
    # Whatever a server, a database or a wrong address makes the library do.
    except Exception as error:
        raise OutputError(f"MLflow at {uri} does not answer ({reason(error)})") from error
    if experiment is None:
        return {}
    page = f"http://127.0.0.1:{port}/#/experiments/{experiment.experiment_id}/runs"
    return {
        name: f"{page}?viewStateShareKey={key}&compareRunsMode={MODES.get(name, 'CHART')}"
        for key, (name, _) in VIEWS.items()
    }


def _database_uri(runs_dir: Path) -> str:
    return f"sqlite:///{runs_dir.absolute() / 'mlflow.db'}"
