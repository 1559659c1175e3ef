"""How many seconds does a call take, and how much memory does its process hold meanwhile?

Only the standard library is used, so that other environments can measure in the same way.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MIB = 1 << 20


def measured(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of the call, and the memory of its process when it began and at most, in MiB.

    Processor seconds stand beside those of the clock: they add up over threads, and a busy machine
    changes them less. Where the system cannot forget a peak (any but Linux) both memories include
    what came before the call.
    """
    gc.collect()
    forget_peak()
    loaded = peak_mib()
    begin, busy = time.perf_counter(), time.process_time()
    call()
    return {
        "seconds": time.perf_counter() - begin,
        "processor_seconds": time.process_time() - busy,
        "loaded_mib": loaded,
        "peak_mib": peak_mib(),
    }


def forget_peak() -> None:
    """Let the peak of this process's resident memory begin anew at what it holds now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The most resident memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on a Mac, in KiB elsewhere.
    return peak / MIB if sys.platform == "darwin" else peak / 1024
