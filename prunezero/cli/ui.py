"""`prunezero ui`: the MLflow page of a runs folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunezero.cli.options import RunsDir


def ui(
    runs_dir: RunsDir = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """Open the MLflow page with searches and baselines side by side.

    The experiment "prunezero" has four saved views: Leaderboard, Pareto, Evolution and Baselines.

    Examples:

        prunezero ui

        prunezero ui --runs-dir /data/runs --port 5001
    """
    import contextlib
    import os
    import signal
    import subprocess

    from prunezero.cli.tables import say
    from prunezero.errors import OutputError
    from prunezero.report.track import Tracker, ui_command, view_links

    if not os.environ.get("MLFLOW_TRACKING_URI") and not (runs_dir / "mlflow.db").is_file():
        raise OutputError(
            f"{runs_dir} holds no runs yet; run `prunezero search` first, or give --runs-dir"
        )
    # What an outage kept back is written before anyone looks.
    Tracker(runs_dir).close()
    command, environment = ui_command(runs_dir, port=port)
    say(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends it)")
    for name, link in view_links(runs_dir, port=port).items():
        say(f"  {name}: {link}")
    # MLflow starts a server of its own: both belong to one group, and end together.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.wait()
    except KeyboardInterrupt:
        say("closed")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()
