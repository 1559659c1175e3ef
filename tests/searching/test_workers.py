"""Evaluators in other processes: the same search, whoever dies, hangs or answers first."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunezero.errors import ModelError, ScoreError, SearchError
from prunezero.pruning.testbed import Testbed, set_up
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.evaluation.request import Request
from prunezero.searching.evaluation.rungs import Evaluators, Rungs
from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.experiment.provenance import header
from prunezero.searching.experiment.task import Task
from prunezero.searching.search import search
from prunezero.searching.workers import cluster
from prunezero.searching.workers import pool as pool
from prunezero.searching.workers import processes as workers
from prunezero.searching.workers.cluster import ray_pool
from prunezero.searching.workers.pool import WorkerPool
from prunezero.searching.workers.processes import EvaluatorPlan, process_pool
from prunezero.searching.workers.worker import Message
from tests.searching.testbed import SETTINGS, config_of, make_task, tiny_space, tiny_testbed
from tests.tiny_models import save_tiny_model

Searched = tuple[list[tuple[object, ...]], bytes, list[tuple[str, str]]]


class Obedient:
    """An evaluator that does as the first split of a question says."""

    def result(self, request: Request) -> dict[str, Any]:
        word, *others = request.splits
        return ORDERS[word](*others) or {"said": others, "pid": os.getpid()}


def _die_once(marker: str) -> None:
    if not Path(marker).exists():
        Path(marker).touch()
        _die()


def _die(number: str = "SIGKILL") -> None:
    os.kill(os.getpid(), signal.Signals[number])
    time.sleep(60)


def _fail(error: str) -> None:
    raise {"ours": ScoreError, "other": ZeroDivisionError}[error]("it ranks nothing")


ORDERS: dict[str, Callable[..., Any]] = {
    "say": lambda *words: None,
    "wait": lambda seconds: time.sleep(float(seconds)),
    "die": _die,
    "die once": _die_once,
    "fail": _fail,
}


@dataclass(frozen=True)
class Stub:
    """The plan of an evaluator that needs no model."""

    kind: str = "obedient"
    device: str = "cpu"

    def evaluator(self, threads: int) -> Any:
        return {"obedient": Obedient, "drawing": Drawing, "missing": _missing}[self.kind]()


class Drawing:
    """An evaluator that draws numbers from the question, in the time that a small one takes."""

    def result(self, request: Request) -> dict[str, Any]:
        time.sleep(0.02)
        if request.kind == "tuning":
            assert request.recipe is not None
            return {"formula": request.recipe["criterion"]}
        digest = hashlib.blake2b(request.key.encode(), digest_size=4).digest()
        number = int.from_bytes(digest, "big") / 2**32
        names = ("layer_error", "kl", "search_perplexity", "validation_perplexity")
        return {name: number + place for place, name in enumerate(names)}


def _missing() -> None:
    raise ModelError("model 'gone' cannot be loaded")


class Drawn:
    """The drawing evaluator in this process."""

    threads = 1

    def results(self, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        return map(Drawing().result, requests)

    def close(self) -> None:
        pass


def stub_pool(kind: str, count: int, *, deadline: float = workers.DEADLINE) -> WorkerPool:
    """Workers of a stub, forked."""
    plan: Any = Stub(kind)
    return forked_pool(plan, count, deadline=deadline)


def forked_pool(
    plan: EvaluatorPlan, count: int, *, deadline: float = workers.DEADLINE
) -> WorkerPool:
    """Workers forked from one process that has imported everything.

    Where there are many, fresh interpreters would spend a minute on imports; the tests of one real
    evaluator, and of a coordinator that is killed, start theirs as a search does.
    """
    processes = process_pool(plan, count, threads=1, deadline=deadline)
    launcher: Any = processes._launcher
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload([__name__])
    start = launcher.start

    def forked(place: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            chosen = SimpleNamespace(get_context=lambda word: forking)
            patch.setattr(workers, "multiprocessing", chosen)
            return start(place)

    launcher.start = forked
    return processes


def asked(*words: str) -> Request:
    return Request(words, None)


def is_running(pid: int) -> bool:
    """Whether a process computes still; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def threads_of(pid: int) -> int:
    """How many threads of a process hold its files; a last one may wait to be reaped."""
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def until(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    stop = time.monotonic() + seconds
    while not holds() and time.monotonic() < stop:
        time.sleep(0.01)
    return holds()


def fill(evaluators: WorkerPool, count: int, request: Request) -> None:
    """Ask until so many workers are ready."""
    while len(evaluators.at_work) < count:
        # One more than can be at work, so that somebody is hired for it.
        list(evaluators.results([request] * (count + 1)))
        time.sleep(0.5)


def kill(pid: int) -> None:
    """End a process, and come back when its pipes are closed as well."""
    # It may have died by itself, unnoticed as yet.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        assert until(lambda: not is_running(pid) and threads_of(pid) < 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A saved tiny model and a text file."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    paragraphs = ["".join(rng.choices("abcdefgh ,.", k=200)) for _ in range(60)]
    (folder / "letters.txt").write_text("\n\n".join(paragraphs))
    return save_tiny_model("llama", folder / "model"), folder / "letters.txt"


@pytest.fixture(scope="module")
def pair() -> Iterator[WorkerPool]:
    """Two obedient processes."""
    processes = stub_pool("obedient", 2)
    yield processes
    processes.close()


def testbed_of(files: tuple[Path, Path]) -> Testbed:
    return set_up(str(files[0]), files[1], SETTINGS, dtype="float32", device="cpu")


def task_on(files: tuple[Path, Path], space: str = "formulas") -> Task:
    return make_task(tiny_space(space), 0.5, testbeds=[testbed_of(files)])


@pytest.fixture(scope="module", params=["formulas", "width"])
def space(request: pytest.FixtureRequest) -> str:
    """A search over single weights, then one over whole units."""
    return str(request.param)


@pytest.fixture(scope="module")
def alone(
    space: str, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Searched:
    """What `searched` finds where this process evaluates."""
    folder = tmp_path_factory.mktemp("alone")
    return searched(folder, task_on(files, space), testbed_of(files), None)


def searched(
    folder: Path,
    task: Task,
    testbed: Testbed,
    evaluators: Evaluators | None,
    *,
    max_candidates: int = 12,
    disturb: Callable[[], None] = lambda: None,
) -> Searched:
    """What must not depend on who evaluates: candidates, the journal's header, and its order."""
    evaluator = Evaluator(task, [testbed])
    journal = Journal(folder / "journal.jsonl", header(task, [testbed]), resume=False)
    rungs = Rungs(evaluator, journal, evaluators)
    found: list[tuple[object, ...]] = []
    for one in search(rungs, max_candidates=max_candidates):
        found.append(
            (one.slot, one.criterion.text, one.origin, one.parents, one.status, one.mask)
            + (one.layer_error, one.kl, one.search_perplexity, one.validation_perplexity)
        )
        disturb()
    rungs.close()
    first, *lines = journal.path.read_bytes().splitlines()
    records = [json.loads(line.split(b" ", 2)[2]) for line in lines]
    return found, first, [(record["kind"], record["key"]) for record in records]


def test_one_and_three_workers_search_as_this_process_does(
    space: str, files: tuple[Path, Path], alone: Searched, tmp_path: Path
) -> None:
    testbed, task = testbed_of(files), task_on(files, space)
    plan = EvaluatorPlan.of(task.config, [testbed])
    assert {"layer error", "tuning", "measurement"} == {kind for kind, _ in alone[2]}
    for count, processes in ((1, process_pool(plan, 1, threads=1)), (3, forked_pool(plan, 3))):
        fill(processes, count, Request(("search",), None))
        assert searched(tmp_path / str(count), task, testbed, processes) == alone
        assert not processes.at_work


def test_a_plan_builds_the_evaluator_again_without_calibrating(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    testbed, task = testbed_of(files), task_on(files)
    evaluator = Evaluator(task, [testbed])
    for collect in ("BlockWalk", "gradient_statistics"):
        monkeypatch.setattr(f"prunezero.models.observing.calibration.{collect}", None)
    again = EvaluatorPlan.of(task.config, [testbed]).evaluator(1)
    found = again.task.config
    assert found == task.config and again.task.budgets == task.budgets
    for recipe in baselines(task):
        for request in (Request.of(recipe), Request.of(recipe, ("search", "test"))):
            mine, other = evaluator.result(request), again.result(request)
            for spent in ("seconds", "elapsed"):
                mine.pop(spent, None), other.pop(spent, None)
            assert mine == other and "fault" not in mine


def test_a_worker_that_finds_another_model_refuses_to_measure(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    testbed, task = testbed_of(files), task_on(files)
    other = save_tiny_model("llama", tmp_path / "model", seed=1)
    with pytest.raises(SearchError, match="answer otherwise than the search"):
        plan = EvaluatorPlan.of(task.config, [testbed])
        replace(plan, config=plan.config.model_copy(update={"model": str(other)})).evaluator(1)


def test_a_plan_names_files_so_that_they_are_found_from_every_folder(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files[0].parent)
    testbed = set_up("model", "letters.txt", SETTINGS, dtype="float32", device="cpu")
    plan = EvaluatorPlan.of(config_of(tiny_space(), 0.5, testbeds=[testbed]), [testbed])
    assert (plan.config.model, plan.config.text) == tuple(map(str, files))
    several = plan.config.model_copy(update={"text": "letters.txt,demo"})
    assert EvaluatorPlan.of(several, [testbed]).config.text == f"{files[1]},demo"


def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    testbed, task = tiny_testbed(), make_task(tiny_space(), 0.5)
    rng = random.Random(3)
    died_over: list[Request] = []
    processes = stub_pool("drawing", 2)

    def kill_one() -> None:
        busy = {pid: one for pid, one in processes.at_work.items() if one is not None}
        # Two deaths over one question are a fault, which the next test is about.
        chosen = [pid for pid, one in busy.items() if one not in died_over]
        if chosen and len(died_over) < 20:
            pid = rng.choice(chosen)
            time.sleep(rng.uniform(0, 0.03))
            died_over.append(busy[pid])
            kill(pid)

    alone = searched(tmp_path / "alone", task, testbed, Drawn(), max_candidates=36)
    killed = searched(
        tmp_path / "killed", task, testbed, processes, max_candidates=36, disturb=kill_one
    )
    assert killed == alone
    assert len(died_over) == 20


def test_answers_come_in_order_from_workers_that_are_all_busy(pair: WorkerPool) -> None:
    requests = [asked("wait", f"{0.05 * (place % 3)}") for place in range(9)]
    results = list(pair.results(requests))
    assert [one["said"] for one in results] == [list(one.splits[1:]) for one in requests]
    fill(pair, 2, asked("say"))
    results = list(pair.results([asked("wait", "0.1")] * 6))
    assert {one["pid"] for one in results} == set(pair.at_work)
    assert list(pair.results([])) == []


def test_a_batch_that_nobody_reads_to_its_end_leaves_nothing_behind(pair: WorkerPool) -> None:
    for stopped in range(3):
        results = pair.results([asked("wait", "0.1"), *[asked("say", "stale")] * 6])
        for _ in range(stopped):
            next(results)
        del results
        expected = [[f"{stopped} {place}"] for place in range(5)]
        found = pair.results([asked("say", *words) for words in expected])
        assert [one["said"] for one in found] == expected


def test_an_error_of_the_evaluator_is_raised_in_its_turn_and_the_worker_goes_on(
    pair: WorkerPool,
) -> None:
    results = pair.results([asked("wait", "0.1"), asked("fail", "ours")])
    assert next(results)["said"] == ["0.1"]
    with pytest.raises(ScoreError, match="it ranks nothing"):
        next(results)
    pids = set(pair.at_work)
    with pytest.raises(SearchError, match="ZeroDivisionError: it ranks nothing") as caught:
        list(pair.results([asked("fail", "other")]))
    assert "in _fail" in caught.value.__notes__[0]
    assert next(pair.results([asked("say")]))["pid"] in pids


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost(
    pair: WorkerPool, tmp_path: Path
) -> None:
    requests = [asked("die once", str(tmp_path / "a")), *[asked("say", str(n)) for n in range(4)]]
    results = list(pair.results(requests))
    assert [one["said"] for one in results] == [list(one.splits[1:]) for one in requests]
    assert (tmp_path / "a").exists()


def test_a_worker_that_died_while_idle_costs_no_question_its_chance(
    pair: WorkerPool, tmp_path: Path
) -> None:
    list(pair.results([asked("say")]))
    for pid in pair.at_work:
        kill(pid)
    result = next(pair.results([asked("die once", str(tmp_path / "a"))]))
    assert result["said"] == [str(tmp_path / "a")]


def test_a_question_that_two_workers_die_over_is_a_fault_and_others_go_on(
    pair: WorkerPool,
) -> None:
    results = list(pair.results([asked("die", "SIGSEGV"), asked("say", "a"), asked("say", "b")]))
    assert results[0] == {"fault": "2 workers died over it (the last: SIGSEGV)"}
    assert [one["said"] for one in results[1:]] == [["a"], ["b"]]


def test_a_question_that_hangs_is_a_fault_at_its_deadline_and_others_go_on() -> None:
    processes = stub_pool("obedient", 1, deadline=0.5)
    results = list(processes.results([asked("wait", "3600"), asked("say", "a")]))
    assert results[0] == {"fault": "no answer after 0.5 seconds"}
    assert results[1]["said"] == ["a"]
    # Late for the question, but before anybody looked.
    late = processes.results([asked("say"), asked("wait", "0.1")])
    next(late)
    time.sleep(0.7)
    assert next(late)["said"] == ["0.1"]
    processes.close()


def test_a_worker_that_cannot_build_its_evaluator_ends_the_search_in_one_sentence() -> None:
    processes = stub_pool("missing", 2)
    with pytest.raises(SearchError, match="cannot start: model 'gone' cannot be loaded"):
        list(processes.results([asked("say")] * 4))
    processes.close()


@dataclass
class Actor:
    """A worker that says what it is told to."""

    says: list[Message]
    handle: int
    was_killed: bool = False

    def ask(self, request: Request) -> bool:
        return True

    def hear(self) -> Message:
        return self.says.pop(0)

    def kill(self) -> None:
        self.was_killed = True


class Stage:
    """An office of actors; one with nothing to say stays silent."""

    loading = 2

    def __init__(self, *scripts: list[Message]) -> None:
        self.scripts = list(scripts)
        self.actors: list[Actor] = []

    def start(self, place: int) -> Actor:
        self.actors.append(Actor(self.scripts.pop(0), len(self.actors)))
        return self.actors[-1]

    def wait(self, handles: Sequence[int], seconds: float) -> Collection[int]:
        return [handle for handle in handles if self.actors[handle].says]

    def close(self) -> None:
        """Nothing is held."""


def test_workers_that_die_while_they_load_end_the_search_and_not_the_question() -> None:
    died: Message = ("died", "SIGKILL")
    ready: Message = ("ready", 7)
    recovers = Stage([died], [died], [ready, died], [died], [ready, ("answer", {"it": 1})])
    assert list(WorkerPool(recovers, 1).results([asked("say")])) == [{"it": 1}]
    with pytest.raises(SearchError, match="3 workers in a row .* SIGKILL.* fewer --workers"):
        list(WorkerPool(Stage([died], [died], [died]), 1).results([asked("say")]))


def test_a_worker_that_is_never_ready_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_PATIENCE", 0.05)
    stage = Stage([])
    with pytest.raises(SearchError, match=r"not ready after 0\.05 seconds"):
        list(WorkerPool(stage, 1).results([asked("say")]))
    assert stage.actors[0].was_killed


def test_workers_end_with_a_coordinator_that_is_killed_and_by_no_signal_of_a_terminal() -> None:
    program = textwrap.dedent(
        """
        from tests.searching.test_workers import process_pool, Stub, asked, fill
        processes = process_pool(Stub(), 2, threads=1)  # type: ignore[arg-type]
        fill(processes, 2, asked("say"))
        answers = processes.results([asked("say"), asked("wait", "3600")])
        next(answers)
        print(*processes.at_work, flush=True)
        next(answers)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        for pid, number in itertools.product(pids, (signal.SIGINT, signal.SIGTERM)):
            os.kill(pid, number)
        time.sleep(0.5)
        assert len(pids) == 2 and all(map(is_running, pids))
        process.stdout.close()
    finally:
        process.kill()
        process.wait()
    assert until(lambda: not any(map(is_running, pids)))


def test_actors_of_a_cluster_search_as_this_process_does_although_one_is_killed(
    space: str, files: tuple[Path, Path], alone: Searched, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    testbed, task = testbed_of(files), task_on(files, space)
    actors = ray_pool(EvaluatorPlan.of(task.config, [testbed]), "local", 2, threads=1)
    died: list[int] = []

    def kill_one() -> None:
        busy = [pid for pid, one in actors.at_work.items() if one is not None]
        if busy and not died:
            died.append(busy[0])
            kill(busy[0])

    fill(actors, 2, Request(("search",), None))
    assert searched(tmp_path / "ray", task, testbed, actors, disturb=kill_one) == alone
    assert died and not actors.at_work


def test_a_cluster_without_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SearchError, match=r'pip install "prunezero\[cluster\]"'):
        ray_pool(Stub(), "local", 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_that_does_not_answer_is_one_sentence(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(SearchError, match=f"'{address}' cannot be joined .*ray start --head"):
        ray_pool(Stub(), address, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machines", "device", "count", "threads"),
    [
        ([8, 8], "cpu", 2, 8),
        # 16 cores for 3 are 5 each, but then only two find a place
        ([8, 8], "cpu", 3, 4),
        ([16, 2], "cpu", 4, 4),
        ([64], "cuda", 4, 16),
        ([64, 64], "cuda", 8, 16),
    ],
)
def test_cores_are_shared_so_that_every_actor_finds_a_place(
    machines: list[int], device: str, count: int, threads: int
) -> None:
    resources = [{"CPU": float(cores), "GPU": 4.0} for cores in machines]
    assert cluster._share(resources, device, count, None) == threads


def test_a_cluster_that_is_too_small_is_refused_with_its_size() -> None:
    machines = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}]
    with pytest.raises(SearchError, match="16 cores on 2 machines.* 17 workers"):
        cluster._share(machines, "cpu", 17, None)
    with pytest.raises(SearchError, match="2 GPUs on 2 machines.* 3 workers"):
        cluster._share(machines, "cuda", 3, None)
    with pytest.raises(SearchError, match="2 workers of 9 threads"):
        cluster._share(machines, "cpu", 2, 9)
