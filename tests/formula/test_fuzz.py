"""Nothing that people write makes reading hang, or end in a traceback."""

from __future__ import annotations

from tests.fuzz import run


def test_random_inputs_are_read_or_refused_within_half_a_second_and_little_memory() -> None:
    report = run(first=10**9, count=100_000, at_most=8.0)
    assert not report.faults, "\n".join(report.faults)
    assert sum(report.inputs.values()) > 500
