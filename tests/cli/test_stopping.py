"""Ctrl-C and SIGTERM: once ends after the candidate at hand, twice at once; both can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from prunezero.cli.stopping import Stopping
from prunezero.searching import search as searching
from tests.cli.conftest import Run, interrupted_at
from tests.searching.test_search import outcome, session_in

PROGRAM = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from prunezero.cli.stopping import Stopping
    from prunezero.searching.search import search
    from tests.searching.test_search import session_in
    session = session_in(Path(sys.argv[1]))
    def say(text): print(text, flush=True)
    with Stopping(None, say) as stopping:
        for place, candidate in enumerate(search(session.rungs, max_candidates=10, stop=stopping)):
            if place == 4:
                say("candidate")
                time.sleep(float(sys.argv[2]))
    say(f"interrupted: {stopping.was_interrupted}, after: {place + 1}")
    """
)


def started(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A search in its own process that stays `seconds` with its fifth candidate."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stdout.readline() == "candidate\n"
    return process


def resumed_equals_whole(folder: Path) -> bool:
    """Whether the interrupted search, resumed, ends like one that was left alone."""
    sessions = session_in(folder / "parts", resume=True), session_in(folder / "whole")
    parts, whole = (
        list(searching.search(session.rungs, max_candidates=10)) for session in sessions
    )
    for session in sessions:
        session.journal.close()
    return outcome(parts) == outcome(whole) and any(one.is_replayed for one in parts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_search_after_the_candidate_at_hand(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = started(tmp_path / "parts", 1.0)
    process.send_signal(number)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "ending after the candidate at hand" in told
    assert "interrupted: True, after: 5" in told
    assert resumed_equals_whole(tmp_path)


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    process = started(tmp_path / "parts", 60.0)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and "press Ctrl-C again" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert "interrupted" not in told
    assert time.monotonic() - begin < 30
    assert resumed_equals_whole(tmp_path)


def test_handlers_of_the_caller_come_back_whatever_happened() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="inside"), Stopping(None, print):
        raise ValueError("inside")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_time_that_is_up_ends_the_search_but_is_no_interruption() -> None:
    stopping = Stopping(0.01, print)
    assert not Stopping(60, print)() and not Stopping(None, print)()
    time.sleep(0.02)
    assert stopping() and not stopping.was_interrupted


def test_an_interrupted_command_names_the_way_on_and_resume_finishes_it(run: Run) -> None:
    command = "search MODEL --sparsity 0.5 --space tiny --budget 6 --name one"
    with interrupted_at(3):
        result = run(command)
    assert result.exit_code == 0, result.output
    assert "--name one --resume" in result.output
    assert Path("runs/one/candidates.csv").is_file()
    assert not Path("runs/one/recipe.yaml").exists()
    result = run(command + " --resume")
    assert result.exit_code == 0, result.output
    assert Path("runs/one/recipe.yaml").is_file()
