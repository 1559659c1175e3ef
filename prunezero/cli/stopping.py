"""When does a search end? When its time is up, or when somebody says so.

Between candidates it ends as if its time were up. Anywhere else (while the model is calibrated,
while published recipes or finalists are measured) a signal ends the work at hand, and all that is
open is closed on the way out.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Stopping:
    """Ends a search after some seconds, or at the first Ctrl-C or SIGTERM; a second one at once.

    A search that ends early has lost nothing: every result is in its journal already.
    """

    def __init__(self, seconds: float | None, say: Callable[[str], None]) -> None:
        self.was_interrupted = False
        self._say = say
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether the search should end before its next piece of work."""
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        return self.was_interrupted or is_late

    def _heard(self, number: int, frame: object) -> None:
        if self.was_interrupted:
            raise KeyboardInterrupt
        self.was_interrupted = True
        self._say("ending after the candidate at hand; press Ctrl-C again to end at once")


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within it, SIGTERM raises KeyboardInterrupt, as Ctrl-C does.

    By itself it ends a process at once, with files locked and records unwritten.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def told_what_is_kept(kept: Callable[[], str]) -> Iterator[None]:
    """Whoever interrupts what is within it reads what `kept` says then, before it goes on its way.

    What is within has to be closed by then, so that the sentence holds.
    """
    from prunezero.cli.tables import say

    try:
        yield
    except KeyboardInterrupt:
        say(kept())
        raise


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
