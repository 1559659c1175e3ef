"""Short memory, hanging rungs and jumping clocks cost one candidate, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.cli.live import SearchView
from prunezero.errors import ScoreError
from prunezero.formula import Criterion
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.request import Request
from prunezero.searching.evaluation.rungs import Rungs
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.history import RUNGS, History
from prunezero.searching.search import search
from prunezero.searching.session import Session, finalists, open_session
from prunezero.searching.workers import processes as workers
from prunezero.searching.workers import worker as plan
from prunezero.searching.workers.pool import WorkerPool
from prunezero.searching.workers.processes import process_pool
from prunezero.searching.workers.worker import EvaluatorPlan, WorkerLoop
from tests.searching.test_search import outcome
from tests.searching.test_workers import Stage, Stub, asked
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

BUDGET = 12


@pytest.fixture
def opened() -> Iterator[Callable[..., Session]]:
    """Opens sessions on a tiny model, and closes their journals afterwards."""
    sessions: list[Session] = []

    def open_in(folder: Path, *, resume: bool = False) -> Session:
        task = make_task(tiny_space(trials=4), 0.5)
        session = open_session([tiny_testbed()], task, folder, resume=resume)
        sessions.append(session)
        return session

    yield open_in
    for session in sessions:
        session.journal.close()


def _of_the_cpu() -> Exception:
    """What torch raises here where memory is short."""
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error
    raise AssertionError("torch gave an exbibyte")


SHORT_OF_MEMORY: dict[str, Exception] = {
    "torch on a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "torch on the CPU": _of_the_cpu(),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    "numpy or Python": MemoryError("Unable to allocate 8.00 PiB"),
}


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> Any:
        raise error

    return fail


def weights_of(session: Session) -> dict[str, torch.Tensor]:
    state = session.testbeds[0].language_model.model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("whose", sorted(SHORT_OF_MEMORY))
def test_a_candidate_that_needs_too_much_memory_is_a_fault_and_the_model_is_dense_again(
    whose: str,
    opened: Callable[..., Session],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = opened(tmp_path / "run")
    evaluator = Evaluator(session.task, [session.testbeds[0]])
    dense = weights_of(session)
    recipe = Recipe.load("wanda")
    for place, request in {
        "searching.proxies.layer_error.layer_error": Request.of(recipe),
        "searching.proxies.layer_error.masks_on": Request.of(recipe, trials=3),
        # By then the model is pruned.
        "pruning.compare.evaluate": Request.of(recipe, ("search",)),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"prunezero.{place}", raising(SHORT_OF_MEMORY[whose]))
            assert evaluator.result(request) == {"fault": "it needs too much memory"}
        assert "fault" not in evaluator.result(request)
    # Optuna would print a traceback for each.
    assert not caplog.records
    now = weights_of(session)
    assert all(torch.equal(now[name], tensor) for name, tensor in dense.items())


def test_an_error_that_is_not_for_lack_of_memory_is_no_fault_of_the_candidate(
    opened: Callable[..., Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(tmp_path / "run")
    evaluator = Evaluator(session.task, [session.testbeds[0]])
    monkeypatch.setattr(
        "prunezero.searching.proxies.layer_error.layer_error", raising(RuntimeError("a mistake"))
    )
    with pytest.raises(RuntimeError, match="a mistake"):
        evaluator.result(Request.of(Recipe.load("wanda")))


@dataclass
class Faulty:
    """Evaluators that answer all but the questions of one kind that they are told to fail on."""

    evaluator: Evaluator
    kind: str
    fails: Callable[[int], bool]
    asked: list[str] = field(default_factory=list)
    faults: int = 0
    threads: int = 1

    def results(self, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        for request in requests:
            self.asked.append(request.kind)
            fails = request.kind == self.kind and self.fails(self.asked.count(self.kind))
            self.faults += fails
            yield {"fault": "it hangs"} if fails else self.evaluator.result(request)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", ["layer error", "tuning", "measurement"])
def test_a_fault_on_any_rung_costs_that_candidate_alone_and_is_not_met_again_on_resume(
    kind: str, opened: Callable[..., Session], tmp_path: Path
) -> None:
    session = opened(tmp_path / "run")
    evaluators = Faulty(
        Evaluator(session.task, [session.testbeds[0]]), kind, lambda count: count % 2 == 1
    )
    rungs = Rungs(evaluators.evaluator, session.journal, evaluators)
    found = list(search(rungs, max_candidates=BUDGET))
    assert 0 < evaluators.faults < evaluators.asked.count(kind)
    last = {one.slot: one for one in found}.values()
    assert sum(one.layer_error is not None and one.status != "known" for one in last) >= BUDGET
    # A formula that could not be tuned is what it was; all others are out of the race.
    failed = [one for one in last if one.status == "invalid" and one.mask]
    assert len(failed) == (0 if kind == "tuning" else evaluators.faults)
    session.journal.close()
    session = opened(tmp_path / "run", resume=True)
    again = Faulty(evaluators.evaluator, kind, lambda count: True)
    rungs = Rungs(again.evaluator, session.journal, again)
    assert outcome(list(search(rungs, max_candidates=BUDGET))) == outcome(found)
    assert not again.asked


def test_the_dense_model_and_baselines_are_tried_again_on_resume_where_memory_was_short(
    opened: Callable[..., Session], tmp_path: Path
) -> None:
    session = opened(tmp_path / "run")
    evaluator, recipe = Evaluator(session.task, [session.testbeds[0]]), Recipe.load("wanda")
    short = Rungs(evaluator, session.journal, Faulty(evaluator, "measurement", lambda count: True))
    with pytest.raises(ScoreError, match="the dense model cannot be measured: it hangs"):
        short.measure_dense(("search",))
    with pytest.raises(ScoreError, match="recipe wanda cannot be measured: it hangs"):
        short.measure(recipe, ("search",))
    rungs = Rungs(evaluator, session.journal, evaluator)
    dense, pruned = rungs.measure_dense(("search",)), rungs.measure(recipe, ("search",))
    session.journal.close()
    session = opened(tmp_path / "run", resume=True)
    refusing = Faulty(evaluator, "measurement", lambda count: True)
    rungs = Rungs(evaluator, session.journal, refusing)
    assert rungs.measure_dense(("search",)) == dense | {"is_replayed": True}
    assert rungs.measure(recipe, ("search",)) == pruned | {"is_replayed": True}
    assert not refusing.asked


@dataclass
class Pensive:
    """An office whose workers are silent when they are first listened to."""

    stage: Stage
    loading: int = 1
    silences: int = 3

    def start(self, place: int) -> Any:
        return self.stage.start(place)

    def wait(self, handles: Sequence[int], seconds: float) -> Collection[int]:
        self.silences -= 1
        return [] if self.silences >= 0 else self.stage.wait(handles, seconds)

    def close(self) -> None:
        self.stage.close()


def test_a_clock_that_jumps_by_days_ends_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter(range(0, 10**12, 86400))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    launcher = Pensive(Stage([("ready", 7), ("answer", {"it": 1})]))
    assert list(WorkerPool(launcher, 1, deadline=60.0).results([asked("say")])) == [{"it": 1}]
    assert launcher.silences < 0


@pytest.mark.parametrize(
    ("cores", "count", "threads", "each"),
    [(8, 2, None, 4), (8, 3, None, 2), (2, 4, None, 1), (8, 2, 3, 3)],
)
def test_workers_divide_the_cores_among_them(
    cores: int,
    count: int,
    threads: int | None,
    each: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[int] = []

    def started(stub: Any, threads: int, gpu: str | None) -> Any:
        given.append(threads)
        return Stage([("ready", len(given)), ("answer", {})]).start(0)

    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.setattr(workers, "_Process", started)
    monkeypatch.setattr("multiprocessing.connection.wait", lambda handles, seconds: handles)
    processes = process_pool(Stub(), count, threads=threads)  # type: ignore[arg-type]
    list(processes.results([asked("say")]))
    processes.close()
    assert given == [each]


def test_a_worker_computes_on_the_threads_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    testbed = tiny_testbed()
    task = make_task(tiny_space(), 0.5)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(plan, "set_up", lambda *args, **kwargs: testbed)
    assert WorkerLoop(EvaluatorPlan.of(task.config, [testbed]), 3).start()[0] == "ready"
    assert given == [3]


def candidate(slot: int, formula: str, **values: Any) -> Candidate:
    known = {"status": "new", "mask": f"{slot:032x}", **values}
    return Candidate(slot, 0, Criterion.parse(formula), "random", (), **known)


def test_numbers_of_different_rungs_are_never_ranked_together() -> None:
    found = [
        candidate(0, "abs(W)", layer_error=0.001),
        candidate(1, "abs(W)*X", layer_error=0.3, kl=0.001),
        candidate(2, "abs(W)+X", layer_error=0.4, kl=0.5, search_perplexity=60.0),
        candidate(3, "abs(W)/X", layer_error=0.9, kl=0.9, search_perplexity=90.0),
    ]
    found[3] = replace(found[3], validation_perplexity=95.0)
    history = History()
    for one in found:
        history.keep(one)
    slots = {rung: [one.slot for one in history.ranked(rung)] for rung in RUNGS}
    assert slots == {
        "layer_error": [0, 1, 2, 3],
        "kl": [1, 2, 3],
        "search_fitness": [2, 3],
        "validation_fitness": [3],
    }
    assert [one.slot for one in finalists(found)] == [2, 3]
    view = SearchView([], budget=None, seconds=None)
    for one in found:
        view.show(one)
    # Validation text decides; nobody stands there who was not measured.
    assert [one.slot for one in view._best()] == [3, 2]


def test_a_candidate_that_fails_on_a_higher_rung_is_no_finalist() -> None:
    history = History()
    good = history.keep(candidate(0, "abs(W)", layer_error=0.5, search_perplexity=70.0))
    bad = history.keep(candidate(1, "abs(W)*X", layer_error=0.1, search_perplexity=50.0))
    history.keep(replace(bad, status="invalid"))
    assert finalists(history.candidates) == [good]
