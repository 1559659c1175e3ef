"""`prunezero ui`: the MLflow page of a runs folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunezero.cli.options import RunsDir


def ui(
    runs_dir: RunsDir = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow page with searches and baselines side by side.

    The experiment "prunezero" has four saved views: Leaderboard, Pareto, Evolution and Baselines.

    Examples:

        prunezero ui

        prunezero ui --runs-dir /data/runs --port 5001
    """
    import os

    from prunezero.cli.tables import say
    from prunezero.errors import OutputError
    from prunezero.report.tracking.tracker import Tracker, ui_command

    if not os.environ.get("MLFLOW_TRACKING_URI") and not (runs_dir / "mlflow.db").is_file():
        raise OutputError(
            f"{runs_dir} holds no runs yet; run `prunezero search` first, or give --runs-dir"
        )
    command, environment = ui_command(runs_dir, port=port)
    _refuse_taken(port)
    # What an outage kept back is written before anyone looks.
    Tracker(runs_dir).close()
    links = _links(runs_dir, port)
    say(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends it)")
    for name, link in links.items():
        say(f"  {name}: {link}")
    code = _served(command, environment)
    if code:
        raise OutputError(
            f"MLflow ended with exit code {code}; what it says above tells why, and another "
            "MLFLOW_TRACKING_URI or --port may help"
        )


def _refuse_taken(port: int) -> None:
    """Raise OutputError where another program has the port, or it is not ours to have."""
    import socket

    from prunezero.errors import OutputError, reason

    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("127.0.0.1", port))
    except OSError as error:
        raise OutputError(
            f"--port {port} cannot be had ({reason(error)}); choose another, such as "
            f"{port + 1 if 1023 < port < 65535 else 5001}"
        ) from error


def _links(runs_dir: Path, port: int) -> dict[str, str]:
    """Where each saved view opens, by its name.

    Raises:
        OutputError: MLflow cannot read what the tracking URI names.
    """
    from prunezero.errors import OutputError, reason
    from prunezero.report.tracking.tracker import tracking_uri, view_links

    try:
        return view_links(runs_dir, port=port)
    # MLflow, SQLAlchemy and drivers of databases each have errors of their own.
    except Exception as error:
        raise OutputError(
            f"the runs at {tracking_uri(runs_dir)} cannot be read ({reason(error)}); look at "
            "MLFLOW_TRACKING_URI and --runs-dir"
        ) from error


def _served(command: list[str], environment: dict[str, str]) -> int:
    """Exit code of the server; 0 where somebody ended it."""
    import contextlib
    import os
    import signal
    import subprocess

    from prunezero.cli.tables import say

    # MLflow starts a server of its own: both belong to one group, and end together.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return server.wait()
    except KeyboardInterrupt:
        say("closed")
        return 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()
