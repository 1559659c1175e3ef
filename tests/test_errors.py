"""What a library says reaches the user whole, as one line."""

from __future__ import annotations

import errno
import os
import re
import shlex
from pathlib import Path

import pytest

import prunezero
from prunezero.cli import _one_sentence
from prunezero.errors import PruneZeroWarning, did_you_mean, reason, shell_word


def raised_from(cause: BaseException) -> BaseException:
    try:
        raise ValueError from cause
    except ValueError as error:
        return error


REASONS = {
    "lines are joined, for the remedy stands in the last": (
        OSError("We couldn't connect to the hub:\n  no route.\n\nSet HF_HUB_OFFLINE=1.\n"),
        "We couldn't connect to the hub: no route. Set HF_HUB_OFFLINE=1",
    ),
    "a colon ends nothing": (ValueError("bad header: size: 12"), "bad header: size: 12"),
    "the system's words": (OSError(errno.ENOSPC, "No space left on device"), "No space left on "),
    "a number without words": (OSError(errno.ENOSPC, None), "No space left on device"),
    "no number and no words": (OSError(), "an error of the kind OSError, which says nothing else"),
    "another file than ours": (
        PermissionError(errno.EACCES, "Permission denied", "/cache/x"),
        "Permission denied: '/cache/x'",
    ),
    "a missing key": (KeyError("weight_map"), "'weight_map' is missing"),
    "an end that has no message": (StopIteration(), "it holds nothing"),
    "no message but a cause": (raised_from(TypeError("of the cause")), "of the cause"),
    "a stack of C++": (
        RuntimeError("CUDA error: out of memory\nException raised from f at x.cpp:12\nframe #0"),
        "CUDA error: out of memory",
    ),
    "depth": (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_reason_is_one_whole_line(case: str) -> None:
    error, said = REASONS[case]
    assert reason(error).startswith(said)
    assert "\n" not in reason(error) and "None" not in reason(error)


def test_a_long_reason_keeps_its_beginning_and_its_end() -> None:
    said = reason(ValueError("what failed " + "x" * 5000 + " and what to do"))
    assert len(said) < 800
    assert said.startswith("what failed") and said.endswith("and what to do")


def test_a_file_that_the_sentence_names_is_not_named_twice() -> None:
    path = Path("runs/s/x.csv")
    beside = PermissionError(errno.EACCES, "Permission denied", "runs/s/.x.csv.77")
    assert reason(beside, path) == "Permission denied"
    other = PermissionError(errno.EACCES, "Permission denied", "/proc/none")
    assert reason(other, path) == "Permission denied: '/proc/none'"


@pytest.mark.parametrize("name", ["runs", "my runs", "a'b", "$(rm x)", "-rf", "*.json", "a\nb", ""])
def test_a_name_in_an_advised_command_is_that_name_again(name: str) -> None:
    (word,) = shlex.split(shell_word(name))
    assert os.path.normpath(word) == os.path.normpath(name)
    assert not word.startswith("-")


def test_a_known_word_is_not_taken_for_its_own_mistyping() -> None:
    assert did_you_mean("s", ["s"]) == ""
    assert did_you_mean("wandaa", ["wanda", "ria"]) == "; did you mean 'wanda'?"


def test_every_warning_of_ours_is_of_our_kind_so_that_a_terminal_shows_it_as_a_sentence() -> None:
    package = Path(prunezero.__file__).parent
    files = {path: path.read_text("utf-8") for path in package.rglob("*.py")}
    # Pages stand alone, without our kinds.
    found = {
        f"{path.name}: {call}"
        for path, code in files.items()
        for call in re.findall(r"warnings\.warn\(.*?stacklevel", code, re.DOTALL)
        if path.name not in ("pruner_template.py", "expert_parts.py")
    }
    assert len(found) >= 10
    assert not [call for call in found if not re.search(r"\b(PruneZero|Formula)Warning,", call)]


def test_a_warning_of_ours_is_shown_in_one_line_without_the_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show = _one_sentence(lambda *where: pytest.fail("as Python shows it"))
    show(PruneZeroWarning("http://u:secret@h\x1b[2J is damaged"), PruneZeroWarning, "file.py", 3)
    assert capsys.readouterr().err == "prunezero: http://***@h\\x1b[2J is damaged\n"
