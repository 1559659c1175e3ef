"""Whatever ends a command, the user reads one sentence, and the shell gets the right exit code."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from prunezero.cli.fitting import Table
from prunezero.cli.guard import guarded
from prunezero.cli.tables import console, say, waiting
from prunezero.errors import OutputError, printable


def ended(deed: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and standard error of a deed under the guard."""
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    try:
        with guarded():
            deed()
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code, errors.getvalue()
    return 0, errors.getvalue()


def raising(error: BaseException) -> Callable[[], object]:
    def deed() -> None:
        raise error

    return deed


def nested() -> None:
    nested()


ENDS: dict[str, tuple[Callable[[], object], int, str]] = {
    "a mistake": (raising(OutputError("x is a file")), 1, "prunezero: x is a file\n"),
    "an error of the system": (
        raising(PermissionError(13, "Permission denied", "/x/y")),
        1,
        "prunezero: Permission denied: '/x/y'",
    ),
    "too little memory": (raising(MemoryError()), 1, "use less text (--calibration-tokens)"),
    "too little memory in torch": (
        raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")),
        1,
        "the memory does not suffice (DefaultCPUAllocator: can't allocate memory",
    ),
    "depth": (nested, 1, "what was given is nested too deeply"),
    "a number out of range": (
        raising(OverflowError("cannot convert float infinity to integer")),
        1,
        "OverflowError: cannot convert float infinity to integer",
    ),
    "a fault of ours": (raising(KeyError("header")), 1, "KeyError: 'header' is missing"),
    "a library that tells a password": (
        raising(ValueError("no answer from https://alice:s3cret@127.0.0.1:9")),
        1,
        "no answer from https://***@127.0.0.1:9",
    ),
    "Ctrl-C": (raising(KeyboardInterrupt()), 130, "prunezero: stopped\n"),
    "an exit": (raising(SystemExit(3)), 3, ""),
    "nothing": (lambda: None, 0, ""),
}


@pytest.mark.parametrize("case", ENDS)
def test_an_end_is_a_sentence_and_an_exit_code(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deed, code, said = ENDS[case]
    found, errors = ended(deed, monkeypatch)
    assert found == code and said in errors
    assert "Traceback" not in errors and errors.count("\n") == (1 if said else 0)


def test_a_full_output_ends_no_work_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def deed() -> None:
        for number in range(3):
            say("a line that goes nowhere")
            sys.stdout.flush()
            done.append(number)

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, errors = ended(deed, monkeypatch)
    assert (code, done) == (1, [0, 1, 2])
    assert "could not be written (No space left on device)" in errors and errors.count("\n") == 1


def test_a_reader_that_leaves_ends_no_work_and_needs_no_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert ended(lambda: say("nobody hears this"), monkeypatch) == (141, "")


def test_closed_outputs_are_told_of_where_one_is_left() -> None:
    program = "from prunezero.cli import main; main()"
    command = f"{sys.executable} -c '{program}' list spaces"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for closed, code in ((">&-", 1), ("2>&- >/dev/null", 0), ("<&-", 0)):
        shell = ["sh", "-c", f"{command} {closed}"]
        found = subprocess.run(shell, capture_output=True, text=True, env=environment)
        assert found.returncode == code, (closed, found.stderr)
        assert found.stderr.count("\n") == code


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_a_terminal_of_any_code_page_is_written_to(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(console, "_force_terminal", True)

    def deed() -> None:
        with waiting("loading"):
            pass
        say("‘a’ → … \udcff")
        table = Table(title="α")
        table.add_column("recipe")
        table.add_row("β")
        console.print(table)
        print("┃", flush=True)

    assert ended(deed, monkeypatch) == (0, "")
    shown = raw.getvalue().decode(encoding)
    assert "-> ..." in shown or encoding in ("utf-8", "cp1252")
    assert "recipe" in shown and "\\udcff" in shown


def shown(table: Table, width: int) -> str:
    into = io.StringIO()
    Console(file=into, width=width, markup=False).print(table)
    return into.getvalue()


def results(*spare: str) -> Table:
    table = Table(title="[red]2 of 2[/] recipes")
    table.add_column("recipe")
    for heading in ("sparsity", "validation", "test", "KL to dense"):
        table.add_column(heading, justify="right")
    for _ in spare:
        table.add_column("accepted", justify="right", is_spare=True)
    name = "a_recipe_of_a_long_name_that_somebody_chose"
    table.add_row(name, "50.00 %", "123456.78", "1.23e+08", "0.0002", *spare, style="bold")
    return table


@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 200])
def test_numbers_are_whole_on_a_terminal_of_any_width(width: int) -> None:
    text = shown(results(), width)
    for number in ("50.00", "123456.78", "1.23e+08", "0.0002"):
        assert number in text
    assert "…" not in text
    letters = "".join(sign for sign in text if sign.isalpha() or sign == "_")
    assert "somebody_chose" in letters or width > 40
    assert all(len(line) <= width for line in text.splitlines())


def test_a_spare_column_stands_there_only_where_nothing_has_to_be_folded_for_it() -> None:
    table = results("87.65 %")
    whole = len(shown(table, 500).splitlines()[1])
    assert "87.65 %" in shown(table, whole) and "somebody_chose" in shown(table, whole)
    for width in (20, 60, 80, whole - 1):
        assert shown(table, width) == shown(results(), width)


def test_brackets_and_control_characters_of_others_are_shown_and_not_obeyed() -> None:
    table = Table(title="[red]x[/]")
    table.add_column("name")
    table.add_row("[bold]a[/] \x1b[31mred \x9b2J")
    text = shown(table, 80)
    assert "[red]x[/]" in text and r"[bold]a[/] \x1b[31mred \x9b2J" in text
    assert printable("a\tb\nc\x1b]0;title\x07 \u202egnp") == "a\tb\nc\\x1b]0;title\\x07 \\u202egnp"
