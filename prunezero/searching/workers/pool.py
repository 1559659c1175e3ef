"""How do many judges answer at once, in order, although some of them die or hang?

A crew has a number of places, each with one worker or none. Whoever is free gets the next question.
A question that a worker died over is given to one other worker, then it counts as faulty; one that
is not answered in time counts as faulty at once. Workers are processes (`workers.py`) or actors of
a cluster (`cluster.py`); the crew cannot tell the difference.

An answer belongs to the batch that its worker was given the question from. So questions of a batch
that nobody reads any more are answered into the void, and a killed worker cannot answer at all.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prunezero.errors import PruneZeroError, SearchError
from prunezero.searching.evaluation.evaluator import Question
from prunezero.searching.workers.worker import Message

# Seconds for one question, where nothing else is asked for.
DEADLINE = 1800.0
# Seconds for a worker to get ready.
_PATIENCE = 1800.0
# Workers that may die over one question.
_ATTEMPTS = 2
# Workers in a row that may die before one is ready.
_FALSE_STARTS = 3


class Worker(Protocol):
    """A judge elsewhere that has one thing to say at a time; at first whether it is ready."""

    @property
    def handle(self) -> Any:
        """What its office can wait for."""
        ...

    def ask(self, question: Question) -> bool:
        """Hand it a question; False if it is known to have died."""
        ...

    def hear(self) -> Message:
        """What it has to say, once its handle is ready; "died" and by what, if it has."""
        ...

    def kill(self) -> None:
        """End it, whatever it does."""
        ...


class Office(Protocol):
    """Where workers come from."""

    @property
    def loading(self) -> int:
        """How many may load their model at the same time."""
        ...

    def hire(self, place: int) -> Worker:
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

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.waiting = deque(range(len(questions)))
        self.deaths: Counter[int] = Counter()
        self.found: dict[int, dict[str, Any] | PruneZeroError] = {}


@dataclass
class _Seat:
    """A worker at its place, and what it is doing."""

    worker: Worker
    until: float
    """the monotonic time at which it must have spoken"""
    pid: int | None = None
    """None until it is ready"""
    batch: _Batch | None = None
    """what its question is from; None for an idle one"""
    number: int = 0
    """of its question in the batch"""


class Crew:
    """Workers that answer questions; a `Judges`."""

    def __init__(
        self, office: Office, count: int, deadline: float = DEADLINE, *, threads: int = 1
    ) -> None:
        """Begin with nobody: workers are hired when there is something to ask.

        Args:
            count: workers at most.
            deadline: seconds for one question.
            threads: on which each computes.
        """
        self.threads = threads
        self._office = office
        self._count = count
        self._deadline = deadline
        self._seats: dict[int, _Seat] = {}
        self._false_starts = 0

    @property
    def at_work(self) -> dict[int, Question | None]:
        """By process id, the question that each worker which is ready is at."""
        return {
            seat.pid: seat.batch.questions[seat.number] if seat.batch else None
            for seat in self._seats.values()
            if seat.pid is not None
        }

    def answers(self, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
        """One answer to each question, in their order, each as soon as it can be had.

        Raises:
            SearchError: workers cannot start.
            PruneZeroError: as the judge.
        """
        batch = _Batch(questions)
        for number in range(len(questions)):
            self._hand_out(batch)
            while number not in batch.found:
                self._listen()
                self._hand_out(batch)
            answer = batch.found.pop(number)
            if isinstance(answer, PruneZeroError):
                raise answer
            yield answer

    def close(self) -> None:
        """End all workers, and let go of where they came from."""
        for place in list(self._seats):
            self._dismiss(place)
        self._office.close()

    def _hand_out(self, batch: _Batch) -> None:
        """Give questions to whoever is free, and hire for those that are left."""
        for place, seat in list(self._seats.items()):
            if batch.waiting and seat.pid is not None and seat.batch is None:
                if seat.worker.ask(batch.questions[batch.waiting[0]]):
                    seat.batch, seat.number = batch, batch.waiting.popleft()
                    seat.until = time.monotonic() + self._deadline
                else:
                    self._dismiss(place)
        vacant = [place for place in range(self._count) if place not in self._seats]
        loading = sum(seat.pid is None for seat in self._seats.values())
        wanted = min(len(batch.waiting), self._office.loading) - loading
        for place in vacant[: max(0, wanted)]:
            until = time.monotonic() + _PATIENCE
            self._seats[place] = _Seat(self._office.hire(place), until)

    def _listen(self) -> None:
        """Wait until a worker says something or is late."""
        busy = {
            place: seat for place, seat in self._seats.items() if seat.batch or seat.pid is None
        }
        seconds = min(seat.until for seat in busy.values()) - time.monotonic()
        handles = [seat.worker.handle for seat in busy.values()]
        speaking = self._office.wait(handles, max(0.0, seconds))
        for place, seat in busy.items():
            if seat.worker.handle in speaking:
                self._hear(place, seat)
            elif seat.until <= time.monotonic():
                self._give_up(place, seat)

    def _hear(self, place: int, seat: _Seat) -> None:
        kind, content = seat.worker.hear()
        if kind == "ready":
            seat.pid, self._false_starts = content, 0
        elif kind == "refused":
            self._dismiss(place)
            raise SearchError(f"a worker cannot start: {content}")
        elif kind == "died":
            self._dismiss(place)
            self._mourn(seat, content)
        elif seat.batch is not None:
            seat.batch.found[seat.number], seat.batch = content, None

    def _mourn(self, seat: _Seat, reason: str) -> None:
        """Give the question of a worker that died to another one, unless that was the last try."""
        batch = seat.batch
        if batch is None:
            self._false_starts += 1
            if self._false_starts == _FALSE_STARTS:
                raise SearchError(
                    f"{_FALSE_STARTS} workers in a row died while they loaded the model (the "
                    f"last: {reason}); see what they printed, and if memory is short, ask for "
                    "fewer --workers"
                )
            return
        batch.deaths[seat.number] += 1
        if batch.deaths[seat.number] < _ATTEMPTS:
            batch.waiting.appendleft(seat.number)
        else:
            batch.found[seat.number] = {
                "fault": f"{_ATTEMPTS} workers died over it (the last: {reason})"
            }

    def _give_up(self, place: int, seat: _Seat) -> None:
        self._dismiss(place)
        if seat.batch is None:
            raise SearchError(
                f"a worker was not ready after {_PATIENCE:g} seconds; see whether machines "
                "and files can be reached, or ask for fewer --workers"
            )
        seat.batch.found[seat.number] = {"fault": f"no answer after {self._deadline:g} seconds"}

    def _dismiss(self, place: int) -> None:
        self._seats.pop(place).worker.kill()
