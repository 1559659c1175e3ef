"""The search never waits for MLflow, and MLflow ends up with every run exactly once."""

from __future__ import annotations

import http.server
import importlib
import math
import multiprocessing
import socket
import sqlite3
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import OutputError
from prunezero.report.tracking import tracker as track
from prunezero.report.tracking.database import is_network_disk
from prunezero.report.tracking.mlflow_store import MlflowStore
from prunezero.report.tracking.records import RunRecord, run_record
from prunezero.report.tracking.spool import Spool, read_record
from prunezero.report.tracking.tracker import Tracker, tracking_uri, ui_command
from prunezero.report.tracking.views import VIEW_TAG, VIEWS

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def candidate(slot: int, **changes: Any) -> RunRecord:
    row = {"slot": slot, "formula": "abs(W)*X", "search_perplexity": 20.0 - slot, "seconds": 1.5}
    record = run_record(f"night/{slot:05d}", f"c{slot}", "candidate", row, parent_key="night")
    return replace(record, **changes)


PARENT = RunRecord(key="night", name="night", role="search", params={"seed": 3}, finished=False)


class RememberingStore:
    """A stand-in for MLflow that can be away, or refuse a key."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.is_away = False
        self.refused = ""

    def write(self, record: RunRecord) -> None:
        if self.is_away:
            raise ConnectionError("away")
        if record.key == self.refused:
            raise TypeError("not a run")
        self.runs.append(record.key)

    def is_alive(self) -> bool:
        return not self.is_away

    def forget(self) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> RememberingStore:
    found = RememberingStore()
    monkeypatch.setattr(Tracker, "_connect", lambda tracker: found)
    monkeypatch.setattr(track, "SECONDS_BETWEEN_PROBES", 0.2)
    return found


def wait_until(claim: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_an_outage_delays_runs_but_loses_none_and_keeps_their_order(
    store: RememberingStore, tmp_path: Path
) -> None:
    tracker = Tracker(tmp_path)
    tracker.record(PARENT)
    wait_until(lambda: store.runs == ["night"])
    store.is_away = True
    for slot in range(3):
        tracker.record(candidate(slot))
    wait_until(lambda: len(Spool(tmp_path / "untracked.jsonl").lines()) == 3)
    store.is_away = False
    tracker.record(candidate(3))
    wait_until(lambda: len(store.runs) == 5)
    assert tracker.close() == 0
    assert store.runs == ["night", *(f"night/{slot:05d}" for slot in range(4))]
    assert not (tmp_path / "untracked.jsonl").exists()


def test_waiting_runs_are_written_without_a_new_one(
    store: RememberingStore, tmp_path: Path
) -> None:
    store.is_away = True
    tracker = Tracker(tmp_path)
    tracker.record(candidate(0))
    wait_until(lambda: bool(Spool(tmp_path / "untracked.jsonl").lines()))
    store.is_away = False
    wait_until(lambda: len(store.runs) == 1)
    assert tracker.close() == 0


def test_a_dead_server_is_asked_once_per_pause(
    store: RememberingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "SECONDS_BETWEEN_PROBES", 60.0)
    asked: list[str] = []

    def refuse(record: RunRecord) -> None:
        asked.append(record.key)
        raise ConnectionError("away")

    monkeypatch.setattr(store, "write", refuse)
    tracker = Tracker(tmp_path)
    for slot in range(50):
        tracker.record(candidate(slot))
    assert tracker.close() == 50
    assert asked == ["night/00000"]


def test_a_run_that_mlflow_refuses_does_not_hold_up_the_others(
    store: RememberingStore, tmp_path: Path
) -> None:
    store.refused = "night/00001"
    tracker = Tracker(tmp_path)
    for slot in range(3):
        tracker.record(candidate(slot))
    assert tracker.close() == 1
    assert store.runs == ["night/00000", "night/00002"]
    store.refused = ""
    again = Tracker(tmp_path)
    wait_until(lambda: "night/00001" in store.runs)
    assert again.close() == 0


def test_runs_of_a_killed_process_are_written_at_the_next_start(
    store: RememberingStore, tmp_path: Path
) -> None:
    Spool(tmp_path / "untracked.jsonl").append([candidate(7)])
    assert Tracker(tmp_path).close() == 0
    assert store.runs == ["night/00007"]


def test_close_waits_no_longer_than_it_may_and_keeps_the_rest(
    store: RememberingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(store, "write", lambda record: released.wait(20))
    tracker = Tracker(tmp_path)
    for slot in range(4):
        tracker.record(candidate(slot))
    start = time.monotonic()
    left = tracker.close(timeout=0.3)
    assert time.monotonic() - start < 10  # the store would wait for 20
    assert left == 4 and tracker.close() == 4
    kept = [read_record(line) for line in Spool(tmp_path / "untracked.jsonl").lines()]
    assert [run.key for run in kept if run] == [f"night/{slot:05d}" for slot in range(4)]
    released.set()


def test_a_folder_that_cannot_be_written_costs_the_record_of_runs_but_not_the_search(
    store: RememberingStore, tmp_path: Path
) -> None:
    store.is_away = True
    (tmp_path / "runs").write_text("a file, not a folder")
    tracker = Tracker(tmp_path / "runs")
    tracker.record(candidate(0))
    assert tracker.close() == 1


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers 500 to everything."""

    def do_GET(self) -> None:
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(params=["closed port", "silent port", "answers 500"])
def dead_uri(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "answers 500":
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent port":
            listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_dead_server_never_blocks_the_search(dead_uri: str, tmp_path: Path) -> None:
    import mlflow  # noqa: F401  # its import alone may take seconds of the interpreter's lock

    start = time.monotonic()
    tracker = Tracker(tmp_path, uri=dead_uri)
    times = []
    for slot in range(30):
        before = time.perf_counter()
        tracker.record(candidate(slot))
        tracker.progress("night", slot, {"best_perplexity": 20.0})
        times.append(time.perf_counter() - before)
        time.sleep(0.002)
    assert statistics.median(times) < 0.01 and sorted(times)[-3] < 1, times
    assert tracker.close(timeout=1.0) == 60
    assert time.monotonic() - start < 10


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder with a search of three candidates whose first records met a dead server."""
    folder = tmp_path_factory.mktemp("runs")
    first = Tracker(folder, uri="http://127.0.0.1:9")
    first.record(PARENT)
    first.record(candidate(0))
    assert first.close() == 2
    tracker = Tracker(folder)
    artifact = folder / "recipe.yaml"
    artifact.write_text("name: mine")
    for _ in range(2):
        for slot in range(3):
            tracker.record(candidate(slot, artifacts=(artifact,)))
    for step, best in enumerate([20.0, 19.0, 18.0]):
        tracker.progress("night", step, {"best_perplexity": best})
        tracker.progress("night", step, {"best_perplexity": best})
    tracker.record(candidate(8, name="../x\ny", metrics={"|W| @": 1.0, "b": math.inf}))
    tracker.record(candidate(9, params={"formula": "x" * 7000, "seed": 1}))
    tracker.record(candidate(9, params={"seed": 2}, artifacts=(folder / "gone",)))
    tracker.record(replace(PARENT, finished=True))
    assert tracker.close(60) == 0
    return folder


@pytest.fixture(scope="module")
def runs(database: Path) -> dict[str, Any]:
    client = client_of(database)
    experiment = client.get_experiment_by_name("prunezero")
    found = client.search_runs([experiment.experiment_id])
    assert len(found) == len({run.data.tags["prunezero.key"] for run in found})
    return {run.data.tags["prunezero.key"]: run for run in found}


def client_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")


def test_every_run_is_there_once_after_an_outage_and_repeated_records(
    runs: dict[str, Any],
) -> None:
    assert sorted(runs) == ["night", *(f"night/0000{slot}" for slot in (0, 1, 2, 8, 9))]


def test_candidates_are_children_of_their_search_with_all_they_carry(
    runs: dict[str, Any], database: Path
) -> None:
    run = runs["night/00001"]
    assert run.data.metrics == {"eval/search_perplexity": 19.0, "cost/seconds": 1.5}
    assert run.data.params == {"formula": "abs(W)*X"}
    assert run.data.tags["mlflow.parentRunId"] == runs["night"].info.run_id
    assert run.data.tags["role"] == "candidate"
    assert run.info.status == "FINISHED" and run.info.end_time - run.info.start_time == 1500
    artifacts = client_of(database).list_artifacts(run.info.run_id)
    assert [artifact.path for artifact in artifacts] == ["recipe.yaml"]
    assert str(database) in run.info.artifact_uri


def test_a_metric_recorded_twice_stands_once(runs: dict[str, Any], database: Path) -> None:
    run_id = runs["night/00000"].info.run_id
    history = client_of(database).get_metric_history(run_id, "eval/search_perplexity")
    assert [(point.step, point.value) for point in history] == [(0, 20.0)]


def test_curves_of_the_search_hold_each_step_once(runs: dict[str, Any], database: Path) -> None:
    run_id = runs["night"].info.run_id
    history = client_of(database).get_metric_history(run_id, "search/best_perplexity")
    assert sorted((point.step, point.value) for point in history) == [
        (0, 20.0),
        (1, 19.0),
        (2, 18.0),
    ]
    assert runs["night"].info.run_name == "night" and runs["night"].info.status == "FINISHED"


def test_names_and_numbers_that_mlflow_refuses_are_kept_another_way(runs: dict[str, Any]) -> None:
    run = runs["night/00008"]
    assert run.info.run_name == "../x y" and run.data.params["original_name"] == "../x\ny"
    assert run.data.metrics == {"_W_ _": 1.0}
    assert run.data.tags["original._W_ _"] == "|W| @"
    assert run.data.tags["status"] == "not finite: b"


def test_long_and_changed_params_are_kept_another_way(runs: dict[str, Any], database: Path) -> None:
    run = runs["night/00009"]
    assert len(run.data.params["formula"]) == 6000 and run.data.params["seed"] == "1"
    assert run.data.tags["changed.seed"] == "2"
    assert run.data.tags["missing.artifacts"].endswith("gone")
    path = client_of(database).download_artifacts(run.info.run_id, "params/formula.txt")
    assert Path(path).read_text() == "x" * 7000


def test_the_database_writes_ahead_and_the_experiment_has_its_views(database: Path) -> None:
    connection = sqlite3.connect(database / "mlflow.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    tags = client_of(database).get_experiment_by_name("prunezero").tags
    assert {VIEW_TAG + key for key in VIEWS} <= set(tags)
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def one_of_several(folder: Path, name: str) -> None:
    """What a search does with a runs folder that it shares, in a process of its own."""
    tracker = Tracker(folder)
    tracker.record(RunRecord(key="baseline/dense", name="dense", role="dense", metrics={"a": 1.0}))
    tracker.record(RunRecord(key=f"{name}/1", name=name, role="candidate"))
    sys.exit(tracker.close(100))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_three_processes_at_once_store_what_waited_and_what_they_share_once(
    tmp_path: Path,
) -> None:
    waiting = [replace(candidate(slot), recorded_at=1) for slot in range(6)]
    Spool(tmp_path / "untracked.jsonl").append([replace(PARENT, recorded_at=1), *waiting])
    # MLflow is imported once, and each process begins with it.
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    context = multiprocessing.get_context("fork")
    names = ("one", "two", "three")
    started = [context.Process(target=one_of_several, args=(tmp_path, name)) for name in names]
    begin = time.monotonic()
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert time.monotonic() - begin < 60  # who waits in vain gives up after 100
    # Who ended first may have seen what the others still had to write.
    assert None not in [process.exitcode for process in started]
    assert not (tmp_path / "untracked.jsonl").exists()
    client = client_of(tmp_path)
    experiment = client.get_experiment_by_name("prunezero")
    found = client.search_runs([experiment.experiment_id])
    own = ["baseline/dense", "one/1", "two/1", "three/1", "night"]
    keys = sorted(run.data.tags["prunezero.key"] for run in found)
    assert keys == sorted([*own, *(record.key for record in waiting)])
    for run in found:
        for metric in run.data.metrics:
            assert len(client.get_metric_history(run.info.run_id, metric)) == 1


def test_who_else_writes_what_waits_is_waited_for(store: RememberingStore, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "untracked.jsonl")
    spool.append([candidate(7)])
    with spool.replaying() as is_ours:
        assert is_ours
        tracker = Tracker(tmp_path)
        tracker.record(candidate(8))
        assert tracker.close(timeout=1.0) == 2
    assert store.runs == []
    assert Tracker(tmp_path).close() == 0
    assert store.runs == ["night/00007", "night/00008"]


def test_a_crash_between_writing_and_dropping_stores_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = replace(PARENT, recorded_at=1)
    step = {"search/best_perplexity": [(0, 20.0)]}
    records = [search, replace(candidate(0), recorded_at=2)]
    records += [RunRecord("night", "", "search", curves=step, finished=False, recorded_at=3)]
    records += [replace(search, finished=True, recorded_at=4)]
    Spool(tmp_path / "untracked.jsonl").append(records)
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "drop", lambda spool, lines: None)
        Tracker(tmp_path).close(60)
    assert Tracker(tmp_path).close(60) == 0
    client = client_of(tmp_path)
    experiment = client.get_experiment_by_name("prunezero")
    found = {
        run.data.tags["prunezero.key"]: run for run in client.search_runs(experiment.experiment_id)
    }
    assert sorted(found) == ["night", "night/00000"]
    assert found["night"].info.status == "FINISHED"
    run_id = found["night"].info.run_id
    assert len(client.get_metric_history(run_id, "search/best_perplexity")) == 1


@pytest.mark.parametrize(
    "spelling", ["{secret}", "{runs}/../secret", "{runs}/link", "{runs}/folder"]
)
def test_files_outside_the_runs_folder_are_never_copied_to_mlflow(
    spelling: str, tmp_path: Path
) -> None:
    runs, secret = tmp_path / "runs", tmp_path / "secret"
    (runs / "folder").mkdir(parents=True)
    secret.write_text("it")
    (runs / "link").symlink_to(secret)
    (runs / "folder" / "link").symlink_to(secret)
    (runs / "own").write_text("mine")
    foreign = Path(spelling.format(secret=secret, runs=runs))
    log = CopiedFiles(runs)
    told = log.store._log_artifacts("run", candidate(0, artifacts=(foreign, runs / "own")), {})
    assert log.copied == [str(runs / "own")]
    assert told == {"outside.artifacts": str(foreign)}


class CopiedFiles:
    """A store whose client notes the files that it is given."""

    def __init__(self, runs_dir: Path) -> None:
        self.copied: list[str] = []
        self.store = MlflowStore.__new__(MlflowStore)
        self.store._runs_dir = runs_dir.resolve()
        self.store._client = self

    def log_artifact(self, run_id: str, path: str) -> None:
        self.copied.append(path)

    def log_artifacts(self, run_id: str, path: str, artifact_path: str) -> None:
        self.copied.append(path)


def test_a_password_is_neither_logged_nor_shown_in_a_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tracker: Tracker) -> Any:
        raise ConnectionError(f"no answer from {tracker.uri}/api?token=s3cret")

    monkeypatch.setattr(Tracker, "_connect", refuse)
    tracker = Tracker(tmp_path, uri="https://alice:s3cret@127.0.0.1:9")
    tracker.record(candidate(0))
    assert tracker.close() == 1
    assert "https://***@127.0.0.1:9" in caplog.text
    command, environment = ui_command(tmp_path, "mysql://alice:s3cret@127.0.0.1/runs")
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "mysql://alice:s3cret@127.0.0.1/runs"
    with pytest.raises(OutputError, match=r"https://\*\*\*@there") as refused:
        ui_command(tmp_path, "https://alice:s3cret@there")
    written = [path.read_text() for path in tmp_path.iterdir()]
    assert "s3cret" not in " ".join([caplog.text, str(refused.value), *command, *written])


def test_the_uri_is_the_argument_then_the_environment_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert tracking_uri(tmp_path) == "http://there:5000"
    assert tracking_uri(tmp_path, "http://here:5000") == "http://here:5000"


def test_the_page_is_opened_on_this_machine_alone(tmp_path: Path) -> None:
    command, environment = ui_command(tmp_path)
    assert command[1:4] == ["-m", "mlflow", "ui"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("-w") + 1] == "1"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    with pytest.raises(OutputError, match="open that address"):
        ui_command(tmp_path, "http://there:5000")


def test_network_disks_are_known_by_their_mounts(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\nserver:/home {tmp_path} nfs4 rw 0 0\n")
    assert is_network_disk(tmp_path / "runs", mounts)
    assert not is_network_disk(Path("/"), mounts)
    assert not is_network_disk(tmp_path, tmp_path / "no such file")
