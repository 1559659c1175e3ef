"""Tracker: keeps what a search finds in MLflow, without ever making the search wait.

`Tracker.record` puts a record in a queue; one daemon thread writes it. When MLflow does not answer,
the record goes to `untracked.jsonl` in the runs folder, and that file is replayed, without
duplicates, once MLflow answers again or at the next start. So an outage costs no record.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prunezero.errors import masked_uri
from prunezero.report.tracking.page import tracking_uri, ui_command, view_links
from prunezero.report.tracking.records import (
    RunRecord,
    candidate_name,
    row_metrics,
    row_params,
    run_record,
    stamped,
)
from prunezero.report.tracking.spool import Spool, read_record

if TYPE_CHECKING:
    from prunezero.report.tracking.mlflow_store import MlflowStore

__all__ = [
    "RunRecord",
    "Tracker",
    "candidate_name",
    "row_metrics",
    "row_params",
    "run_record",
    "tracking_uri",
    "ui_command",
    "view_links",
]

SECONDS_BETWEEN_PROBES = 30.0
# At who else writes what waits.
SECONDS_BETWEEN_LOOKS = 0.5
LINES_PER_DROP = 50
FAILURES_OF_ONE_RECORD = 3
# Error codes with which MLflow says that the record, not the server, is at fault.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
# MLflow's own patience with a dead server is about four minutes per call, and it reports usage
# home by default. A value that the user has set stays.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # MLflow's client otherwise draws a progress bar over ours when it copies a folder.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

log = logging.getLogger(__name__)


class Tracker:
    """Records runs in MLflow from one background thread; no method raises because of MLflow."""

    def __init__(self, runs_dir: Path, *, uri: str | None = None) -> None:
        """Start the writer thread; nothing here waits for a disk or a server.

        Args:
            runs_dir: holds the database, the artifacts and `untracked.jsonl`.
            uri: MLflow's tracking URI; by default as `tracking_uri` says.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.runs_dir = runs_dir.absolute()
        self.uri = tracking_uri(self.runs_dir, uri)
        self._spool = Spool(self.runs_dir / "untracked.jsonl")
        self._queue: queue.Queue[RunRecord | None] = queue.Queue()
        self._in_hand: list[RunRecord] = []
        self._store: MlflowStore | None = None
        self._refused: set[str] = set()
        self._failures: dict[str, int] = {}
        self._is_away = False
        self._is_elsewhere = False
        self._owed = 0
        self._next_probe = 0.0
        self._lost = 0
        self._abandoned = False
        # Guards the hand-over of unwritten records from the thread to `close`.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="prunezero-tracker", daemon=True)
        self._thread.start()

    def record(self, run: RunRecord) -> None:
        """Queue one run; returns at once."""
        self._queue.put(stamped(run, int(time.time() * 1000)))

    def progress(self, key: str, step: int, metrics: Mapping[str, float]) -> None:
        """Queue one point of each of a search's `search/...` curves."""
        curves = {
            name if name.startswith("search/") else f"search/{name}": [(step, float(value))]
            for name, value in metrics.items()
        }
        self.record(RunRecord(key=key, name="", role="search", curves=curves, finished=False))

    def close(self, timeout: float = 20.0) -> int:
        """Wait for the queue, at most `timeout` seconds, then keep the rest for the next start.

        Returns:
            How many records MLflow does not have; those wait in `untracked.jsonl`.
        """
        if not self._abandoned:
            self._queue.put(None)
            self._thread.join(timeout)
            with self._lock:
                self._abandoned = True
                self._keep([*self._in_hand, *_drained(self._queue)])
        return self._lost + sum(read_record(line) is not None for line in self._waiting())

    def _run(self) -> None:
        """The writer thread: old records first, then new ones as they come."""
        self._replay()
        while True:
            try:
                run = self._queue.get(timeout=1.0)
            except queue.Empty:
                self._replay_when_due()
                continue
            self._in_hand = [run] if run else []
            self._replay_when_due()
            while run is None and self._is_elsewhere and not self._abandoned:
                # Ours may have come too late for whoever is at it.
                time.sleep(SECONDS_BETWEEN_LOOKS)
                self._replay()
            if run is None or self._abandoned:
                return
            # A record must not overtake older ones of its run, which still wait in the file.
            written = not self._owed and self._write(run)
            with self._lock:
                if self._abandoned:
                    return
                if not written:
                    self._keep([run])
                self._in_hand = []

    def _write(self, run: RunRecord) -> bool:
        """Write one record; a failure starts a pause unless the record itself is at fault."""
        try:
            if self._store is None:
                self._store = self._connect()
            self._store.write(run)
            self._is_away = False
            return True
        except Exception as error:
            reason = masked_uri(f"{type(error).__name__}: {error}")[:300]
            self._failures[run.key] = self._failures.get(run.key, 0) + 1
            is_refused = self._is_refusal(run, error)
        if is_refused:
            self._refused.add(run.key)
            log.warning("MLflow refused the run %s (%s)", run.key, reason)
            return False
        if not self._is_away:
            log.warning(
                "MLflow at %s does not answer; runs are kept in %s (%s)",
                masked_uri(self.uri),
                self._spool.path,
                reason,
            )
        self._is_away = True
        self._store = None
        self._next_probe = time.monotonic() + SECONDS_BETWEEN_PROBES
        return False

    def _is_refusal(self, run: RunRecord, error: Exception) -> bool:
        """Whether the record is at fault: it must not hold up the records behind it."""
        if self._store is None:
            return False
        self._store.forget()
        if getattr(error, "error_code", "") in REFUSALS or isinstance(error, TypeError):
            return True
        return self._failures[run.key] >= FAILURES_OF_ONE_RECORD and self._store.is_alive()

    def _connect(self) -> MlflowStore:
        from prunezero.report.tracking.mlflow_store import MlflowStore

        return MlflowStore(self.uri, self.runs_dir)

    def _replay_when_due(self) -> None:
        if self._owed and not self._abandoned and time.monotonic() >= self._next_probe:
            self._replay()

    def _replay(self) -> None:
        """Write the waiting records, unless another process is at it."""
        waiting = self._waiting()
        self._is_elsewhere = False
        try:
            if waiting:
                with self._spool.replaying() as is_ours:
                    self._is_elsewhere = not is_ours
                    if is_ours:
                        self._write_waiting()
                        return
        except OSError as error:
            log.warning("%s cannot be locked, so it waits (%s)", self._spool.path, error)
        self._owed = len(waiting)
        self._next_probe = time.monotonic() + SECONDS_BETWEEN_LOOKS

    def _write_waiting(self) -> None:
        """Write the waiting records in their order, as far as MLflow answers."""
        runs = [(line, read_record(line)) for line in self._waiting()]
        waiting = [(line, run) for line, run in runs if run and run.key not in self._refused]
        written: set[str] = set()
        left = len(waiting)
        for line, run in waiting:
            if self._abandoned:
                break
            if self._write(run):
                written.add(line)
            elif run.key not in self._refused:
                break
            left -= 1
            if len(written) >= LINES_PER_DROP:
                self._drop(written)
                written = set()
        self._drop(written)
        self._owed = left

    def _waiting(self) -> list[str]:
        try:
            return self._spool.lines()
        except OSError:
            return []

    def _drop(self, lines: set[str]) -> None:
        try:
            self._spool.drop(lines)
        except OSError as error:
            log.warning("%s could not be shortened (%s)", self._spool.path, error)

    def _keep(self, runs: list[RunRecord]) -> None:
        """Put records in the file, or count them as lost when even that fails."""
        try:
            self._spool.append(runs)
            self._owed += sum(run.key not in self._refused for run in runs)
        except OSError as error:
            if not self._lost:
                log.warning("runs are lost: %s cannot be written (%s)", self._spool.path, error)
            self._lost += len(runs)


def _drained(records: queue.Queue[RunRecord | None]) -> list[RunRecord]:
    """Every record still in the queue, taken out of it."""
    found: list[RunRecord] = []
    while True:
        try:
            record = records.get_nowait()
        except queue.Empty:
            return found
        if record is not None:
            found.append(record)
