"""A seeded search goes as it went: its stored trace tells what a change of the code changes."""

from __future__ import annotations

import json

import pytest

from tests.searching.trace import NUMBERS, PATHS, WORDS, trace


@pytest.mark.parametrize("space", PATHS)
def test_a_seeded_search_goes_as_its_stored_trace_says(space: str) -> None:
    stored, now = json.loads(PATHS[space].read_text()), trace(space)
    told = "\n".join(
        f"{one}\n  now {other}"
        for one, other in zip(stored, now, strict=False)
        if {key: one[key] for key in WORDS} != {key: other[key] for key in WORDS}
    )
    assert not told and len(now) == len(stored), f"{told}\npython -m tests.searching.trace"
    for one, other in zip(stored, now, strict=True):
        numbers = {key: other[key] for key in NUMBERS if key in other}
        kept = {key: one[key] for key in NUMBERS if key in one}
        # A small KL is a difference of large numbers, whose last bits are the processor's.
        assert numbers == pytest.approx(kept, rel=1e-4, abs=3e-7)


@pytest.mark.parametrize("space", PATHS)
def test_the_stored_trace_shows_every_rung_and_every_origin_of_a_small_search(space: str) -> None:
    stored = json.loads(PATHS[space].read_text())
    assert {key for step in stored for key in NUMBERS if key in step} == set(NUMBERS)
    assert {"seed", "mutate", "cross", "choose", "tune"} <= {step["origin"] for step in stored}
