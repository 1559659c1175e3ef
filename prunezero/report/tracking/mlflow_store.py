"""Store of records in MLflow, a run for each: the only file that writes by its tracking client.

Everything here may block or raise; only the tracker's writer thread calls it. A run is found again
by its tag `prunezero.key`, so writing a record twice leaves one run.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prunezero.report.tracking import views
from prunezero.report.tracking.database import open_client
from prunezero.report.tracking.records import (
    KEY_TAG,
    LONGEST_PARAM,
    LONGEST_TAG,
    RunRecord,
    clean_key,
    clean_name,
    clean_title,
    key_filter,
    search_filter,
    split_finite,
)
from prunezero.report.tracking.spool import locked

EXPERIMENT = "prunezero"
# Hues of Okabe and Ito, which colour-blind readers can tell apart.
RUN_COLORS = {"dense": "#444444", "baseline": "#0072b2", "champion": "#d55e00"}
METRICS_PER_CALL = 900
NAMES_PER_CALL = 90

log = logging.getLogger(__name__)


class MlflowStore:
    """One experiment in one tracking server or database."""

    def __init__(self, uri: str, runs_dir: Path) -> None:
        """Import MLflow, open or create the experiment and publish its saved views."""
        self._runs_dir = runs_dir.resolve()
        # Takes seconds; nobody else has to wait for them.
        if uri.startswith("sqlite:"):
            importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
        with self._alone():
            self._client, artifacts = open_client(uri, runs_dir)
            self._experiment_id = self._open_experiment(artifacts)
            views.publish(self._client, self._experiment_id)
        self._run_ids: dict[str, str] = {}
        self._known_searches: set[str] = set()
        self._points: dict[tuple[str, str], dict[int, float]] = {}
        self._origin = origin_tags()

    def is_alive(self) -> bool:
        """Whether MLflow answers the smallest question."""
        try:
            self._client.search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def forget(self) -> None:
        """Drop what is remembered of runs: after a failed call it may be wrong."""
        self._run_ids.clear()
        self._known_searches.clear()
        self._points.clear()

    def write(self, record: RunRecord) -> None:
        """Create the record's run, or bring the run of that key up to date.

        Two processes of one runs folder never write at once: both would look for the run, find
        none, and create it.

        Raises:
            Exception: whatever MLflow raises when it is away or refuses the record.
        """
        with self._alone():
            self._write(record)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Within it, no other process of this runs folder writes to MLflow."""
        with contextlib.ExitStack() as held:
            # Who cannot write the folder may still write to a server.
            with contextlib.suppress(OSError):
                self._runs_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self._runs_dir / "mlflow.lock"))
            yield

    def _write(self, record: RunRecord) -> None:
        run_id = self._find(record.key) or self._look_up(record.key)
        stored = None if run_id is None else self._client.get_run(run_id)
        if run_id is None:
            run_id = self._create(record)
        params, tags, texts = self._params_and_tags(record, stored)
        metrics, unfit = self._metrics(record, run_id, stored)
        if unfit:
            status = f"not finite: {', '.join(unfit)}"
            tags["status"] = "; ".join(filter(None, (tags.get("status"), status)))
        tags |= self._log_artifacts(run_id, record, texts)
        self._log(run_id, metrics, params, tags)
        self._set_status(run_id, record, stored)

    def _open_experiment(self, artifacts: str | None) -> str:
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return self._client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id

    def _find(self, key: str) -> str | None:
        """The run of a key; one query per search, not per run, finds those of earlier processes."""
        key = clean_key(key)
        search = key.split("/")[0]
        if search not in self._known_searches:
            page = None
            while page is None or page.token:
                page = self._client.search_runs(
                    [self._experiment_id],
                    search_filter(key),
                    max_results=1000,
                    order_by=["attributes.start_time ASC"],
                    page_token=page.token if page else None,
                )
                for run in page:
                    self._run_ids.setdefault(run.data.tags[KEY_TAG], run.info.run_id)
            self._known_searches.add(search)
        return self._run_ids.get(key)

    def _look_up(self, key: str) -> str | None:
        """The run of a key that another process has created since."""
        key = clean_key(key)
        found = self._client.search_runs([self._experiment_id], key_filter(key), max_results=1)
        if found:
            self._run_ids[key] = found[0].info.run_id
        return self._run_ids.get(key)

    def _create(self, record: RunRecord) -> str:
        tags = {KEY_TAG: clean_key(record.key), "role": record.role, **self._origin}
        if record.role in RUN_COLORS:
            tags["mlflow.runColor"] = RUN_COLORS[record.role]
        if record.parent_key is not None:
            parent = self._find(record.parent_key)
            tags |= {"mlflow.parentRunId": parent} if parent else {"parent": record.parent_key}
        seconds = record.metrics.get("cost/seconds", 0.0)
        run = self._client.create_run(
            self._experiment_id,
            start_time=record.recorded_at - int(1000 * seconds if seconds < 1e9 else 0),
            tags={name: value[:LONGEST_TAG] for name, value in tags.items()},
            run_name=clean_title(record.name or record.key) or "unnamed",
        )
        self._run_ids[clean_key(record.key)] = run.info.run_id
        return run.info.run_id

    def _params_and_tags(
        self, record: RunRecord, stored: Any
    ) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
        """New params, tags, and the full texts of params that are too long for MLflow."""
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        texts: dict[str, str] = {}
        known = stored.data.params if stored else {}
        wanted = {name: str(value) for name, value in record.params.items()}
        if record.name != clean_title(record.name):
            wanted["original_name"] = record.name
        for name, text in wanted.items():
            clean = clean_name(name)
            value = text if len(text) <= LONGEST_PARAM else text[: LONGEST_PARAM - 1] + "…"
            if clean not in known:
                params[clean] = value
            elif known[clean] != value:
                # MLflow never changes a param; a resumed run with other choices must show it.
                tags[f"changed.{clean}"] = value
            if value != text:
                texts[f"params/{clean}.txt"] = text
        for name in (*record.metrics, *record.curves, *record.params):
            if clean_name(name) != name:
                tags[f"original.{clean_name(name)}"[:250]] = name
        tags |= {clean_name(name): str(value) for name, value in record.tags.items()}
        if record.note:
            tags["mlflow.note.content"] = record.note
        if stored and record.name:
            tags["mlflow.runName"] = clean_title(record.name)
        return params, tags, texts

    def _metrics(self, record: RunRecord, run_id: str, stored: Any) -> tuple[list[Any], list[str]]:
        """Metrics that are not yet stored, and the names of those that are not finite."""
        from mlflow.entities import Metric

        known = stored.data.metrics if stored else {}
        finite, unfit = split_finite(record.metrics)
        found = [
            Metric(clean_name(name), value, record.recorded_at, 0)
            for name, value in finite.items()
            if known.get(clean_name(name)) != value
        ]
        for name, points in record.curves.items():
            stored_points = self._stored_points(run_id, clean_name(name), known)
            for step, value in points:
                if not split_finite({name: value})[0]:
                    unfit.append(f"{name} at step {step}")
                elif stored_points.get(step) != value:
                    stored_points[step] = value
                    found.append(Metric(clean_name(name), value, record.recorded_at, step))
        return found, unfit

    def _stored_points(
        self, run_id: str, name: str, known: Mapping[str, float]
    ) -> dict[int, float]:
        """Step to value of one curve, asked of MLflow once per process."""
        if (run_id, name) not in self._points:
            history = self._client.get_metric_history(run_id, name) if name in known else []
            self._points[run_id, name] = {metric.step: metric.value for metric in history}
        return self._points[run_id, name]

    def _log(
        self, run_id: str, metrics: list[Any], params: dict[str, str], tags: dict[str, str]
    ) -> None:
        """Write everything in as few calls as MLflow's limits allow: each call is one commit."""
        from mlflow.entities import Param, RunTag

        all_params = [Param(name, value) for name, value in params.items()]
        all_tags = [RunTag(name, value[:LONGEST_TAG]) for name, value in tags.items()]
        while metrics or all_params or all_tags:
            self._client.log_batch(
                run_id,
                metrics[:METRICS_PER_CALL],
                all_params[:NAMES_PER_CALL],
                all_tags[:NAMES_PER_CALL],
            )
            metrics = metrics[METRICS_PER_CALL:]
            all_params = all_params[NAMES_PER_CALL:]
            all_tags = all_tags[NAMES_PER_CALL:]

    def _log_artifacts(
        self, run_id: str, record: RunRecord, texts: dict[str, str]
    ) -> dict[str, str]:
        """Copy files, folders and long texts; tags that name what was not there, or not ours."""
        missing, foreign = [], []
        for path in record.artifacts:
            if not self._is_inside(path):
                foreign.append(str(path))
            elif path.is_dir():
                self._client.log_artifacts(run_id, str(path.resolve()), artifact_path=path.name)
            elif path.is_file():
                self._client.log_artifact(run_id, str(path.resolve()))
            else:
                missing.append(str(path))
        for name, text in texts.items():
            self._client.log_text(run_id, text, name)
        if foreign:
            log.warning("%s are not copied to MLflow: they are outside %s", foreign, self._runs_dir)
        told = {"missing.artifacts": missing, "outside.artifacts": foreign}
        return {tag: ", ".join(paths) for tag, paths in told.items() if paths}

    def _is_inside(self, path: Path) -> bool:
        """Whether a path, and all that is in a folder, leads to files of the runs folder alone."""
        inside = [path, *(path.rglob("*") if path.is_dir() else ())]
        return all(one.resolve().is_relative_to(self._runs_dir) for one in inside)

    def _set_status(self, run_id: str, record: RunRecord, stored: Any) -> None:
        """Finish the run, or mark a resumed one as running again; a bare curve changes neither."""
        status = stored.info.status if stored else "RUNNING"
        if record.finished and (stored is None or status == "RUNNING"):
            self._client.set_terminated(run_id, end_time=record.recorded_at)
        elif record.name and not record.finished and status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")


def origin_tags() -> dict[str, str]:
    """Who runs what, at which commit: MLflow's client records none of it by itself."""
    tags = {"mlflow.source.name": Path(sys.argv[0] or "python").name, "mlflow.source.type": "LOCAL"}
    try:
        tags["mlflow.user"] = getpass.getuser()
        command = ["git", "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)
    except (OSError, KeyError, subprocess.SubprocessError):
        return tags
    return tags | ({"mlflow.source.git.commit": git.stdout.strip()} if git.returncode == 0 else {})
