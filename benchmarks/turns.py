"""Contenders that take turns, by the clock of the device on which they run.

Everybody is called twice before, which compiles what has to be compiled and says how many calls
make a measurement long enough for the clock. Who begins changes from one repeat to the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch

# Seconds that one measurement should last.
LONG_ENOUGH = 0.02
MOST_CALLS = 1000

# Called with the number of the call, so that it may take other memory every time.
Call = Callable[[int], Any]


@dataclass
class Times:
    """What one contender took."""

    first_seconds: float
    """of the first call of all"""
    result: Any
    """of that call"""
    calls: int = 1
    """in one repeat"""
    seconds: list[float] = field(default_factory=list)
    """of one call, by repeat"""


def _keep(call: Call, kept: list[Any]) -> None:
    kept.append(call(0))


def in_turn(contenders: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, Times]:
    """The times of every contender, by name."""
    found: dict[str, Times] = {}
    numbers = {name: count(2) for name in contenders}
    for name, call in contenders.items():
        kept: list[Any] = []
        first = seconds_of(partial(_keep, call, kept), device)
        again = seconds_of(partial(call, 1), device)
        calls = min(MOST_CALLS, math.ceil(LONG_ENOUGH / max(again, 1e-9)))
        found[name] = Times(first, kept[0], calls)
    names = list(contenders)
    for repeat in range(repeats):
        first_of_all = repeat % len(names)
        for name in names[first_of_all:] + names[:first_of_all]:
            times, call = found[name], contenders[name]

            def run(times: Times = times, call: Call = call, name: str = name) -> None:
                for _ in range(times.calls):
                    call(next(numbers[name]))

            times.seconds.append(seconds_of(run, device) / times.calls)
    return found


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds from the start until the device has done all of it."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
