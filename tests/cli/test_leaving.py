"""A signal outside the candidate loop: all is closed, and a sentence says what is kept."""

from __future__ import annotations

import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from prunezero.cli.stopping import sigterm_interrupts, told_what_is_kept
from prunezero.report.runs.summary import read_candidates
from tests.cli.conftest import SMALL, Run

# `prunezero`, but that it stays for long at one call, and says when it is there.
PROGRAM = textwrap.dedent(
    """
    import signal, sys, time
    from prunezero.cli import main
    from prunezero.searching import session
    from prunezero.searching.evaluation.rungs import Rungs
    place, *words = sys.argv[1:]
    owner, name = {
        "calibration": (session, "Evaluator"),
        "baselines": (Rungs, "measure"),
        "candidates": (Rungs, "rows"),
        "finalists": (session, "measure_finalist"),
    }[place]
    def waits(*args, **kwargs):
        print("it is there", flush=True)
        time.sleep(120)
    setattr(owner, name, waits)
    sys.argv = ["prunezero", *words]
    # Whoever runs tests in the background may have had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
    """
)
COMMAND = "search --sparsity 0.5 --space tiny --budget 6 --name one"


def stopped_at(
    place: str, number: signal.Signals, tiny_files: tuple[Path, Path]
) -> tuple[int, str, str]:
    """Exit code and output of a search in its own process that gets a signal at this place."""
    model, text = tiny_files
    words = shlex.split(f"{COMMAND} --model {model} --text {text} {SMALL}")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, place, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "it is there\n":
            process.send_signal(number)
            break
    try:
        told, errors = process.communicate(timeout=110)
    finally:
        process.kill()
    return process.returncode, "".join(lines) + told, errors


def unended() -> list[str]:
    """Runs that the MLflow database takes for running; nobody may hold it any more.

    On a slow machine it was not open in time, and what it lacks waits in a file.
    """
    if Path("runs/untracked.jsonl").is_file():
        return []
    with sqlite3.connect("runs/mlflow.db", timeout=0.1) as database:
        database.execute("begin exclusive")
        rows = database.execute("select name from runs where status != 'FINISHED'").fetchall()
    return [name for (name,) in rows]


@pytest.mark.parametrize(
    ("place", "number"), [("baselines", signal.SIGINT), ("finalists", signal.SIGTERM)]
)
def test_a_search_that_has_results_keeps_them_and_names_the_way_on(
    place: str, number: signal.Signals, run: Run, tiny_files: tuple[Path, Path]
) -> None:
    code, told, errors = stopped_at(place, number, tiny_files)
    assert code == 130 and "Traceback" not in errors, errors
    assert "stopped; everything is in runs/one, and goes on from here by\n" in told
    assert told.count("  prunezero search --name one --resume --budget 6\n") == 1
    assert not unended()
    assert Path("runs/one/candidates.csv").is_file() == (place == "finalists")
    if place == "finalists":
        result = run("search --name one --resume --budget 6")
        assert result.exit_code == 0, result.exception
        assert Path("runs/one/recipe.yaml").is_file()


@pytest.mark.usefixtures("run")
def test_a_search_that_has_none_says_so_and_is_not_in_its_own_way(
    tiny_files: tuple[Path, Path],
) -> None:
    code, told, errors = stopped_at("calibration", signal.SIGTERM, tiny_files)
    assert code == 130 and "Traceback" not in errors, errors
    assert "stopped before its first result" in told and "type the same command again" in told
    assert "--resume" not in told and not Path("runs/one/journal.jsonl").exists()


def test_kill_minus_nine_leaves_a_table_of_what_was_screened(
    run: Run, tiny_files: tuple[Path, Path]
) -> None:
    code, _, _ = stopped_at("candidates", signal.SIGKILL, tiny_files)
    assert code == -signal.SIGKILL
    rows = read_candidates(Path("runs/one"))
    assert rows and any(row["layer_error"] for row in rows)
    shown = run("show one")
    assert shown.exit_code == 0, shown.exception
    assert f"{len(rows)} proposed" in shown.output and "0 measured" in shown.output
    assert "not finished; go on with: prunezero search --name one --resume" in shown.output


def test_sigterm_is_heard_within_and_not_after() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_errors_say_nothing_of_what_is_kept() -> None:
    def never() -> str:
        raise AssertionError("nobody stopped it")

    with pytest.raises(ValueError, match="inside"), told_what_is_kept(never):
        raise ValueError("inside")
