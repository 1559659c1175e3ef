"""Workers in processes of one machine: how a search uses all its cores and GPUs.

Each process has its model, its pipe and its share of the cores, and ends with its coordinator
however that ends. The coordinator alone decides what Ctrl-C means.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any

import torch

from prunezero.errors import SearchError, reason
from prunezero.searching.evaluation.request import Request
from prunezero.searching.workers.pool import DEADLINE, Worker, WorkerPool
from prunezero.searching.workers.worker import EvaluatorPlan, Message, WorkerLoop

__all__ = ["DEADLINE", "EvaluatorPlan", "process_pool", "usable_cores"]

# What a terminal or a batch system sends to every process of a search.
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
# For a process that was killed to be gone.
_SECONDS_TO_END = 10.0


def process_pool(
    plan: EvaluatorPlan, count: int, *, threads: int | None = None, deadline: float = DEADLINE
) -> WorkerPool:
    """Evaluators in processes of this machine; the first request starts them.

    Args:
        count: processes at most; where there are GPUs, they take these in turn.
        threads: of each process; None divides the cores. Sums differ in their last bits between
            numbers of threads.
        deadline: seconds for one request.
    """
    each = threads or max(1, usable_cores() // count)
    launcher = _Here(plan, count, each)
    pool = WorkerPool(launcher, count, deadline, threads=each)
    # Before multiprocessing waits at exit for processes that wait for requests.
    launcher.at_exit = pool.close
    atexit.register(pool.close)
    return pool


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Here:
    """This machine, as a launcher of a pool."""

    def __init__(self, plan: EvaluatorPlan, count: int, threads: int) -> None:
        self._plan = plan
        self._threads = threads
        self._gpus = _visible_gpus() if plan.device == "cuda" else []
        # In main memory, a model that loads may need twice its size for a moment.
        self.loading = count if self._gpus else 1
        self.at_exit: Callable[[], None] | None = None

    def start(self, place: int) -> Worker:
        gpu = self._gpus[place % len(self._gpus)] if self._gpus else None
        return _Process(self._plan, self._threads, gpu)

    def wait(self, handles: Sequence[Any], seconds: float) -> Collection[Any]:
        return connection.wait(handles, seconds)

    def close(self) -> None:
        if self.at_exit is not None:
            atexit.unregister(self.at_exit)


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(one) for one in range(torch.cuda.device_count())]


class _Process:
    """A worker in a process, at the other end of a pipe."""

    def __init__(self, plan: EvaluatorPlan, threads: int, gpu: str | None) -> None:
        spawning = multiprocessing.get_context("spawn")
        self.handle, theirs = spawning.Pipe()
        self._process = spawning.Process(
            target=_serve, args=(theirs, plan, threads, gpu), daemon=True
        )
        try:
            with _signals_held():
                self._process.start()
        except OSError as error:
            self.handle.close()
            raise SearchError(
                f"a worker process cannot be started ({reason(error)}); ask for fewer --workers"
            ) from error
        finally:
            # The process has its own; as long as this one is open, its death is not heard.
            theirs.close()

    def ask(self, request: Request) -> bool:
        try:
            self.handle.send(request)
        except OSError:
            return False
        return True

    def hear(self) -> Message:
        try:
            return self.handle.recv()
        except (EOFError, OSError):
            self._process.join(_SECONDS_TO_END)
            return "died", _end_in_words(self._process.exitcode)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(_SECONDS_TO_END)
        self.handle.close()


def _end_in_words(code: int | None) -> str:
    """What ended a process, from the exit code that Python gives it."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Within it, signals of terminals wait; a process that is started never gets them at all."""
    # Python starts it with the first process, and lets signals through when it has.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Any, plan: EvaluatorPlan, threads: int, gpu: str | None) -> None:
    """The whole life of a worker process."""
    threading.Thread(target=_end_with_the_coordinator, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    loop = WorkerLoop(plan, threads)
    # The pipe ends when the coordinator does, or when it needs no more answers.
    with contextlib.suppress(EOFError, OSError):
        pipe.send(loop.start())
        while True:
            pipe.send(loop.result(pipe.recv()))


def _end_with_the_coordinator() -> None:
    """End this process, whatever it is at, as soon as its coordinator has ended."""
    coordinator = multiprocessing.parent_process()
    if coordinator is not None:
        coordinator.join()
        os._exit(1)
