"""Ctrl-C and SIGTERM: once ends after the candidate at hand, twice at once; both can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunezero.cli.stopping import Stopping
from prunezero.searching import search as searching
from prunezero.searching.experiment.candidate import Candidate
from tests.cli.conftest import Run, interrupted_at
from tests.searching.test_search import outcome, session_in

# A process that has imported everything forks the searches, so that each begins at once. Each stays
# so many seconds with its fifth candidate; what it says of an error goes to a file.
PROGRAM = textwrap.dedent(
    """
    import os, signal, sys, time, traceback
    from pathlib import Path
    from prunezero.cli.stopping import Stopping
    from prunezero.searching.search import search
    from tests.searching.test_search import session_in, tiny_testbed
    tiny_testbed()
    def say(text): print(text, flush=True)
    def searched(folder, seconds):
        session = session_in(Path(folder))
        with Stopping(None, say) as stopping:
            found = search(session.rungs, max_candidates=10, stop=stopping)
            for place, candidate in enumerate(found):
                if place == 4:
                    say("candidate")
                    time.sleep(float(seconds))
        say(f"interrupted: {stopping.was_interrupted}, after: {place + 1}")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            # Whoever runs tests in the background may have had it ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                searched(*line.split())
            except BaseException:
                Path(f"{line.split()[0]} errors").write_text(traceback.format_exc())
                os._exit(1)
            os._exit(0)
        say(child)
        say(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
    """
)


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    yield process
    process.communicate(timeout=60)


def said(nursery: subprocess.Popen[str]) -> str:
    """The next line of the search, or of the process that has forked it."""
    assert nursery.stdout is not None
    return nursery.stdout.readline()


def started(nursery: subprocess.Popen[str], folder: Path, seconds: float) -> int:
    """A search in its own process that stays `seconds` with its fifth candidate."""
    assert nursery.stdin is not None
    nursery.stdin.write(f"{folder} {seconds}\n")
    nursery.stdin.flush()
    pid = int(said(nursery))
    assert said(nursery) == "candidate\n"
    return pid


def told_to_its_end(nursery: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code of the search, and what it says until then."""
    told = ""
    while not (line := said(nursery)).startswith("ended "):
        assert line, "the process that forks searches is gone"
        told += line
    return int(line.split()[1]), told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    """The candidates of the search that is left alone."""
    return searched(tmp_path_factory.mktemp("whole"))


def searched(folder: Path) -> list[Candidate]:
    """The candidates of a search, or of one that goes on."""
    session = session_in(folder, resume=True)
    candidates = list(searching.search(session.rungs, max_candidates=10))
    session.journal.close()
    return candidates


def resumed_equals_whole(folder: Path, whole: list[Candidate]) -> bool:
    """Whether the interrupted search, resumed, ends like one that was left alone."""
    parts = searched(folder / "parts")
    return outcome(parts) == outcome(whole) and any(one.is_replayed for one in parts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_search_after_the_candidate_at_hand(
    number: signal.Signals, nursery: subprocess.Popen[str], whole: list[Candidate], tmp_path: Path
) -> None:
    os.kill(started(nursery, tmp_path / "parts", 1.0), number)
    code, told = told_to_its_end(nursery)
    assert code == 0
    assert "ending after the candidate at hand" in told
    assert "interrupted: True, after: 5" in told
    assert resumed_equals_whole(tmp_path, whole)


def test_a_second_signal_ends_it_at_once(
    nursery: subprocess.Popen[str], whole: list[Candidate], tmp_path: Path
) -> None:
    pid = started(nursery, tmp_path / "parts", 60.0)
    begin = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert "press Ctrl-C again" in said(nursery)
    os.kill(pid, signal.SIGINT)
    code, told = told_to_its_end(nursery)
    assert code != 0 and "KeyboardInterrupt" in (tmp_path / "parts errors").read_text()
    assert "interrupted" not in told
    assert time.monotonic() - begin < 30
    assert resumed_equals_whole(tmp_path, whole)


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
