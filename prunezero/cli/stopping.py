"""When does a search end? When its time is up, or when somebody says so."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any


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
