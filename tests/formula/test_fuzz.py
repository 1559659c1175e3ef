"""Nothing that people write makes reading hang, or end in a traceback."""

from __future__ import annotations

from tests.fuzz import run


def test_random_inputs_are_read_or_refused_soon_and_in_little_memory() -> None:
    # Half a second is what `python -m tests.fuzz` asks for; here others may be at work, and a
    # garbage collection of all tests before this one may come in between.
    report = run(first=10**9, count=100_000, at_most=4.0, seconds=5.0)
    assert not report.faults, "\n".join(report.faults)
    assert sum(report.inputs.values()) > 500
