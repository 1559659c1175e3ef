"""The runs of benchmarks in MLflow, in an experiment of their own.

The leaderboard of searches has no column for what a benchmark measures.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunezero.report.tracking.database import open_client
from prunezero.report.tracking.tracker import ENVIRONMENT, tracking_uri

EXPERIMENT = "benchmarks"
KEY_TAG = "benchmark.key"

Row = dict[str, Any]


def log(
    name: str,
    asked: Row,
    children: Iterable[tuple[str, Row, dict[str, float]]],
    *,
    runs: Path,
    artifacts: tuple[Path, ...],
) -> None:
    """One run with its artifacts, and below it one for each child.

    The same conditions written again bring the same runs up to date. An MLflow that does not
    answer costs nothing but a line.

    Args:
        asked: the conditions of the run, which are its parameters.
        children: name, conditions and metrics of each.
        runs: the folder of runs, whose database is written unless MLFLOW_TRACKING_URI names
            another place.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        experiment = _Experiment(tracking_uri(runs), runs.absolute())
        parent = experiment.write(name, asked, {}, artifacts=artifacts)
        for child, of_child, metrics in children:
            experiment.write(child, of_child, metrics, parent=parent)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"MLflow has not got all medians ({reason}); mend that and run again with --report")


class _Experiment:
    """The runs of the benchmarks' experiment, each found again by what was asked for."""

    def __init__(self, uri: str, folder: Path) -> None:
        self._client, place = open_client(uri, folder)
        known = self._client.get_experiment_by_name(EXPERIMENT)
        self._id = (
            known.experiment_id
            if known is not None
            else self._client.create_experiment(EXPERIMENT, artifact_location=place)
        )
        found = self._client.search_runs([self._id], max_results=5000)
        self._runs = {run.data.tags.get(KEY_TAG): run for run in found}

    def write(
        self,
        name: str,
        asked: Row,
        metrics: dict[str, float],
        *,
        parent: str | None = None,
        artifacts: tuple[Path, ...] = (),
    ) -> str:
        """Create the run or bring it up to date; its id."""
        from mlflow.entities import Metric, Param

        run = self._run(name, asked, parent)
        # MLflow shows the latest value, and of equal times the largest.
        now = time.time_ns() // 1_000_000
        self._client.log_batch(
            run.info.run_id,
            [Metric(key, value, now, 0) for key, value in metrics.items()],
            [Param(key, str(value)) for key, value in asked.items()],
        )
        for path in artifacts:
            self._client.log_artifact(run.info.run_id, str(path))
        self._client.set_terminated(run.info.run_id)
        return run.info.run_id

    def _run(self, name: str, asked: Row, parent: str | None) -> Any:
        key = json.dumps(asked, sort_keys=True)
        if key not in self._runs:
            tags = {KEY_TAG: key} | ({"mlflow.parentRunId": parent} if parent else {})
            self._runs[key] = self._client.create_run(self._id, tags=tags, run_name=name)
        return self._runs[key]
