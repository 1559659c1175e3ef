"""A search whose own process is killed, or whose workers are stopped, ends as one left alone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.journal import Journal, read_journal
from prunezero.searching.evaluation.request import Request
from prunezero.searching.evaluation.rungs import Evaluators, Rungs
from prunezero.searching.experiment.provenance import header
from prunezero.searching.experiment.task import Task
from prunezero.searching.search import search
from prunezero.searching.workers.pool import WorkerPool
from tests.searching.test_search import outcome, session_in
from tests.searching.test_workers import Drawing, asked, fill, is_running, stub_pool, until
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

# By space: of how many candidates, and how often it is killed. In the second, whole units go.
KILLED = {"formulas": (40, 20), "width": (16, 4)}
SPENT = ("seconds", "elapsed")

# A process that has imported everything forks the searches, so that each begins at once. It
# computes on one thread: others would not be there in the fork.
NURSERY = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    import optuna
    from prunezero.searching.search import search
    from tests.searching.test_search import session_in, tiny_testbed
    tiny_testbed()
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            session = session_in(Path(sys.argv[1]), sys.argv[2], resume=True)
            for _ in search(session.rungs, max_candidates=int(sys.argv[3])): pass
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
)


def answers_in(path: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """What a journal knows, in its order, but for the time that it took."""
    return [
        (one["kind"], one["key"], {k: v for k, v in one["result"].items() if k not in SPENT})
        for one in read_journal(path)[1:]
    ]


@pytest.mark.parametrize("space", KILLED)
def test_kills_of_the_search_itself_change_neither_journal_nor_candidates(
    space: str, tmp_path: Path
) -> None:
    budget, kills = KILLED[space]
    session = session_in(tmp_path / "whole", space)
    whole = outcome(list(search(session.rungs, max_candidates=budget)))
    size = session.journal.path.stat().st_size
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(tmp_path / "parts"), space, str(budget)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert nursery.stdin is not None and nursery.stdout is not None
    rng = random.Random(7)
    path = tmp_path / "parts" / "journal.jsonl"
    sizes = []
    for kill_number in range(1, kills + 1):
        nursery.stdin.write(b"\n")
        nursery.stdin.flush()
        child = int(nursery.stdout.readline())
        # Anywhere between where the last one ended and its share of the whole journal.
        share = size * kill_number / (kills + 1)
        goal = rng.uniform(written(path), max(share, written(path)))
        assert until(lambda goal=goal: written(path) >= goal, 60)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert int(nursery.stdout.readline()) == -signal.SIGKILL
        sizes.append(written(path))
    nursery.stdin.close()
    assert nursery.wait() == 0
    nursery.stdout.close()
    # They died while they worked, not all at the same place.
    assert len(set(sizes)) > kills // 2 and sizes[-1] < size
    again = session_in(tmp_path / "parts", space, resume=True)
    assert outcome(list(search(again.rungs, max_candidates=budget))) == whole
    assert answers_in(path) == answers_in(session.journal.path)


def written(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.fixture(autouse=True)
def closed_journals() -> Iterator[None]:
    from tests.searching.test_search import OPENED

    yield
    while OPENED:
        OPENED.pop().journal.close()


DEADLINE = 0.6
STOPS = 4


def later(seconds: float, number: signal.Signals, pid: int) -> threading.Timer:
    """The signal, after so many seconds, to a process that may have ended by then."""

    def send() -> None:
        if is_running(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    timer = threading.Timer(seconds, send)
    timer.start()
    return timer


class Told:
    """Evaluators in this process that draw as `Drawing` does, and fail where they are told to."""

    threads = 1

    def __init__(self, faults: dict[tuple[str, str], dict[str, Any]]) -> None:
        self.faults = faults

    def results(self, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        for one in requests:
            yield self.faults.get((one.kind, one.key)) or Drawing().result(one)

    def close(self) -> None:
        pass


def searched(
    folder: Path, task: Task, evaluators: Evaluators, disturb: Any = lambda: None
) -> tuple[list[tuple[object, ...]], list[tuple[str, str, dict[str, Any]]]]:
    """The candidates of a search, and the answers in its journal."""
    testbed = tiny_testbed()
    journal = Journal(folder / "journal.jsonl", header(task, [testbed]), resume=False)
    rungs = Rungs(Evaluator(task, [testbed]), journal, evaluators)
    found = []
    for one in search(rungs, max_candidates=24):
        found.append(one)
        disturb()
    rungs.close()
    return outcome(found), answers_in(journal.path)


def test_workers_that_sleep_over_their_deadline_cost_their_own_question_alone(
    tmp_path: Path,
) -> None:
    task, rng = make_task(tiny_space(), 0.5), random.Random(5)
    processes = stub_pool("drawing", 2, deadline=DEADLINE)
    fill(processes, 2, Request(("search",), None))
    timers: list[threading.Timer] = []

    def stop_one() -> None:
        busy = [pid for pid, one in processes.at_work.items() if one is not None]
        if busy and len(timers) < STOPS and not any(timer.is_alive() for timer in timers):
            pid = rng.choice(busy)
            time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGSTOP)
            # It wakes shortly before or after its time is up; what it then says is late or just
            # in time, and the pool may or may not have looked.
            timers.append(later(DEADLINE + rng.uniform(-0.1, 0.1), signal.SIGCONT, pid))

    candidates, results = searched(tmp_path / "stopped", task, processes, stop_one)
    for timer in timers:
        timer.join()
    faults = {(kind, key): told for kind, key, told in results if "fault" in told}
    assert len(timers) == STOPS and faults
    assert {told["fault"] for told in faults.values()} == {f"no answer after {DEADLINE} seconds"}
    # Every other answer is that of its own question, and the search went on as with these faults.
    assert searched(tmp_path / "told", task, Told(faults)) == (candidates, results)


@pytest.fixture(scope="module")
def sleepy() -> Iterator[WorkerPool]:
    processes = stub_pool("obedient", 2, deadline=2.0)
    yield processes
    processes.close()


def test_a_stopped_worker_is_ended_at_its_deadline_and_cannot_answer_any_more(
    sleepy: WorkerPool,
) -> None:
    fill(sleepy, 2, asked("say"))
    before = set(sleepy.at_work)
    results = sleepy.results([asked("say", "a"), asked("wait", "0.4"), asked("say", "b")])
    assert next(results)["said"] == ["a"]
    (pid,) = [pid for pid, one in sleepy.at_work.items() if one and one.splits[0] == "wait"]
    os.kill(pid, signal.SIGSTOP)
    timer = later(2.5, signal.SIGCONT, pid)
    assert next(results) == {"fault": "no answer after 2 seconds"}
    assert next(results)["said"] == ["b"]
    timer.join()
    assert not is_running(pid)
    expected = [[str(number)] for number in range(6)]
    found = list(sleepy.results([asked("say", *words) for words in expected]))
    assert [one["said"] for one in found] == expected
    assert pid not in {one["pid"] for one in found} and pid in before


def test_a_worker_that_wakes_in_another_batch_answers_into_the_void(sleepy: WorkerPool) -> None:
    fill(sleepy, 2, asked("say"))
    results = sleepy.results([asked("say", "a"), asked("wait", "0.4")])
    assert next(results)["said"] == ["a"]
    (pid,) = [pid for pid, one in sleepy.at_work.items() if one and one.splits[0] == "wait"]
    os.kill(pid, signal.SIGSTOP)
    del results
    for number in range(4):
        (one,) = sleepy.results([asked("say", str(number))])
        assert one["said"] == [str(number)] and one["pid"] != pid
    # Its deadline passes, and nobody has looked when it wakes and speaks.
    time.sleep(2.1)
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.6)
    expected = [["wait"]] + [[str(number)] for number in range(6)]
    found = list(sleepy.results([asked("say", *words) for words in expected]))
    assert [one["said"] for one in found] == expected
