"""WorkerPool: many evaluators at once, results in order, although some of them die or hang.

A pool has a number of places, each with one worker or none. Whoever is free gets the next request.
A request that a worker died over is given to one other worker, then it counts as faulty; one that
is not answered in time counts as faulty at once. Workers are processes (`workers.py`) or actors of
a cluster (`cluster.py`); the pool cannot tell the difference.

An answer belongs to the batch that its worker was given the request from. So requests of a batch
that nobody reads any more are answered into the void, and a killed worker cannot answer at all.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prunezero.errors import PruneZeroError, SearchError
from prunezero.searching.evaluation.request import Request
from prunezero.searching.workers.worker import Message

# Seconds for one request, where nothing else is asked for.
DEADLINE = 1800.0
# Seconds for a worker to get ready.
_PATIENCE = 1800.0
# Workers that may die over one request.
_ATTEMPTS = 2
# Workers in a row that may die before one is ready.
_FALSE_STARTS = 3


class Worker(Protocol):
    """An evaluator elsewhere that has one thing to say at a time; at first whether it is ready."""

    @property
    def handle(self) -> Any:
        """What its office can wait for."""
        ...

    def ask(self, request: Request) -> bool:
        """Hand it a request; False if it is known to have died."""
        ...

    def hear(self) -> Message:
        """What it has to say, once its handle is ready; "died" and by what, if it has."""
        ...

    def kill(self) -> None:
        """End it, whatever it does."""
        ...


class Launcher(Protocol):
    """Where workers come from."""

    @property
    def loading(self) -> int:
        """How many may load their model at the same time."""
        ...

    def start(self, place: int) -> Worker:
        """A new worker, which begins to load at once."""
        ...

    def wait(self, handles: Sequence[Any], seconds: float) -> Collection[Any]:
        """The handles that are ready, as soon as there is one; none when time is up."""
        ...

    def close(self) -> None:
        """Let go of what workers came from; they have ended."""
        ...


class _Batch:
    """Questions that are answered together, and how far they are."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.waiting = deque(range(len(requests)))
        self.deaths: Counter[int] = Counter()
        self.found: dict[int, dict[str, Any] | PruneZeroError] = {}


@dataclass
class _Slot:
    """A worker at its place, and what it is doing."""

    worker: Worker
    until: float = math.inf
    """the monotonic time at which it must have spoken"""
    pid: int | None = None
    """None until it is ready"""
    batch: _Batch | None = None
    """what its request is from; None for an idle one"""
    number: int = 0
    """of its request in the batch"""


class WorkerPool:
    """Workers that take requests as one `Evaluator` does."""

    def __init__(
        self, launcher: Launcher, count: int, deadline: float = DEADLINE, *, threads: int = 1
    ) -> None:
        """Begin with nobody: workers are started when there is something to ask.

        Args:
            count: workers at most.
            deadline: seconds for one request.
            threads: on which each computes.
        """
        self.threads = threads
        self._launcher = launcher
        self._count = count
        self._deadline = deadline
        self._slots: dict[int, _Slot] = {}
        self._idle: list[int] = []
        """places of workers that are ready and have nothing to do"""
        self._expected: dict[Any, int] = {}
        """by the handle of whoever loads or answers, its place"""
        self._deadlines: list[tuple[float, int]] = []
        """a heap of times and places, some of which have spoken since"""
        self._false_starts = 0

    @property
    def at_work(self) -> dict[int, Request | None]:
        """By process id, the request that each worker which is ready is at."""
        return {
            slot.pid: slot.batch.requests[slot.number] if slot.batch else None
            for slot in self._slots.values()
            if slot.pid is not None
        }

    def results(self, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        """One answer to each request, in their order, each as soon as it can be had.

        Raises:
            SearchError: workers cannot start.
            PruneZeroError: as the evaluator.
        """
        batch = _Batch(requests)
        for number in range(len(requests)):
            self._hand_out(batch)
            while number not in batch.found:
                self._listen()
                self._hand_out(batch)
            result = batch.found.pop(number)
            if isinstance(result, PruneZeroError):
                raise result
            yield result

    def close(self) -> None:
        """End all workers, and let go of where they came from."""
        for place in list(self._slots):
            self._dismiss(place)
        self._launcher.close()

    def _hand_out(self, batch: _Batch) -> None:
        """Give requests to whoever is free, and start workers for those that are left."""
        while batch.waiting and self._idle:
            place = self._idle.pop()
            slot = self._slots[place]
            if slot.worker.ask(batch.requests[batch.waiting[0]]):
                slot.batch, slot.number = batch, batch.waiting.popleft()
                self._expect(place, slot, self._deadline)
            else:
                self._dismiss(place)
        free = self._count - len(self._slots)
        if batch.waiting and free:
            loading = sum(slot.pid is None for slot in self._slots.values())
            wanted = min(len(batch.waiting), self._launcher.loading) - loading
            vacant = [place for place in range(self._count) if place not in self._slots]
            for place in vacant[: max(0, wanted)]:
                self._slots[place] = slot = _Slot(self._launcher.start(place))
                self._expect(place, slot, _PATIENCE)

    def _expect(self, place: int, slot: _Slot, seconds: float) -> None:
        """Wait for a worker to say something, for so long."""
        slot.until = time.monotonic() + seconds
        self._expected[slot.worker.handle] = place
        heapq.heappush(self._deadlines, (slot.until, place))

    def _listen(self) -> None:
        """Wait until a worker says something or is late."""
        self._forget_kept_deadlines()
        seconds = self._deadlines[0][0] - time.monotonic()
        for handle in self._launcher.wait(list(self._expected), max(0.0, seconds)):
            place = self._expected.pop(handle)
            self._hear(place, self._slots[place])
        self._forget_kept_deadlines()
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, place = heapq.heappop(self._deadlines)
            self._give_up(place, self._slots[place])
            self._forget_kept_deadlines()

    def _forget_kept_deadlines(self) -> None:
        """Take away the times that are first but whose worker has spoken, or is gone."""
        while self._deadlines:
            until, place = self._deadlines[0]
            slot = self._slots.get(place)
            if slot is not None and slot.until == until:
                return
            heapq.heappop(self._deadlines)

    def _hear(self, place: int, slot: _Slot) -> None:
        kind, content = slot.worker.hear()
        slot.until = math.inf
        if kind == "ready":
            slot.pid, self._false_starts = content, 0
            self._idle.append(place)
        elif kind == "refused":
            self._dismiss(place)
            raise SearchError(f"a worker cannot start: {content}")
        elif kind == "died":
            self._dismiss(place)
            self._retry(slot, content)
        elif slot.batch is not None:
            slot.batch.found[slot.number], slot.batch = content, None
            self._idle.append(place)

    def _retry(self, slot: _Slot, reason: str) -> None:
        """Give the request of a worker that died to another one, unless that was the last try."""
        batch = slot.batch
        if batch is None:
            self._false_starts += 1
            if self._false_starts == _FALSE_STARTS:
                raise SearchError(
                    f"{_FALSE_STARTS} workers in a row died while they loaded the model (the "
                    f"last: {reason}); see what they printed, and if memory is short, ask for "
                    "fewer --workers"
                )
            return
        batch.deaths[slot.number] += 1
        if batch.deaths[slot.number] < _ATTEMPTS:
            batch.waiting.appendleft(slot.number)
        else:
            batch.found[slot.number] = {
                "fault": f"{_ATTEMPTS} workers died over it (the last: {reason})"
            }

    def _give_up(self, place: int, slot: _Slot) -> None:
        self._dismiss(place)
        if slot.batch is None:
            raise SearchError(
                f"a worker was not ready after {_PATIENCE:g} seconds; see whether machines "
                "and files can be reached, or ask for fewer --workers"
            )
        slot.batch.found[slot.number] = {"fault": f"no answer after {self._deadline:g} seconds"}

    def _dismiss(self, place: int) -> None:
        slot = self._slots.pop(place)
        self._expected.pop(slot.worker.handle, None)
        if place in self._idle:
            self._idle.remove(place)
        slot.worker.kill()
