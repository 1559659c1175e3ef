"""A disk that fills while a search writes its files: a sentence, no half file, and another try."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import OutputError
from prunezero.report.runs.folder import STUDY, write_run, write_winner
from prunezero.searching import session as sessions
from prunezero.searching.search import search
from prunezero.searching.session import Session, open_session
from tests.searching.test_disks import no_file_longer_than
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

BUDGET = 8
SPLITS = ("validation", "test")
# What stands around each of the two parts of the writing.
Room = Callable[[str], AbstractContextManager[None]]
PICTURES = ("pareto.png", "proxy.png", "progress.png")
FILES = {"candidates.parquet", "candidates.csv", *PICTURES, STUDY}
FILES |= {"recipe.yaml", "pruner.py", "results.json"}


@contextmanager
def opened(folder: Path, *, resume: bool = False) -> Iterator[Session]:
    task = make_task(tiny_space(trials=4, tuned=0), 0.5)
    session = open_session([tiny_testbed()], task, folder, resume=resume)
    try:
        yield session
    finally:
        session.journal.close()


def write(session: Session, folder: Path, room: Room) -> None:
    """What the command does when the search has ended, in its two parts."""
    candidates = list(
        {one.slot: one for one in search(session.rungs, max_candidates=BUDGET)}.values()
    )
    known = list(sessions.measure_baselines(session, ("search", "validation")))
    with room("run"):
        write_run(session, folder, candidates, known)
    best = sessions.finalists(candidates)[0]
    rows = list(sessions.measure_baselines(session, SPLITS))
    recipe = sessions.found_recipe(session, "mine", best)
    rows.append(session.rungs.measure(recipe, SPLITS))
    with room("winner"):
        write_winner(recipe, rows, folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that met no full disk; to look at, not to change."""
    folder = tmp_path_factory.mktemp("full") / "run"
    with opened(folder) as session:
        write(session, folder, lambda part: nullcontext())
    assert FILES <= {path.name for path in folder.iterdir()}
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """The files; results without the remark that an answer was known, and in any order."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "results.json" in found:
        rows = json.loads(found["results.json"])["rows"]
        found["results.json"] = [
            {key: value for key, value in row.items() if key != "is_replayed"} for row in rows
        ]
    return found


# By the part of the writing and the bytes that a file may take: what does not fit.
FULL = {
    ("run", 100): r"the candidate tables in .* cannot be written: .*File too large",
    ("run", 20_000): r"the picture .*pareto\.png cannot be written: File too large",
    ("winner", 100): r"recipe\.yaml cannot be written: File too large",
    ("winner", 5_000): r"pruner\.py cannot be written: File too large",
}


@pytest.mark.parametrize(("part", "size"), FULL)
def test_a_disk_that_fills_while_files_are_written_again_leaves_no_half_file(
    part: str, size: int, whole: Path, tmp_path: Path
) -> None:
    folder = prepared(tmp_path / "run", whole, "again")
    with opened(folder, resume=True) as session:
        until_full(session, folder, part, size)
    assert halves(folder, whole) == []


@pytest.mark.parametrize(("part", "size"), FULL)
def test_a_disk_that_fills_while_files_are_written_leaves_no_half_file_and_costs_another_try(
    part: str, size: int, whole: Path, tmp_path: Path
) -> None:
    folder = prepared(tmp_path / "run", whole, "new")
    with opened(folder, resume=True) as session:
        told = until_full(session, folder, part, size)
    assert re.search(FULL[part, size], told) and "\n" not in told
    assert halves(folder, whole) == []
    expected = contents(whole)
    assert contents(folder)["journal.jsonl"] == expected["journal.jsonl"]
    with opened(folder, resume=True) as session:
        write(session, folder, lambda part: nullcontext())
    assert contents(folder) == expected


def halves(folder: Path, whole: Path) -> list[str]:
    """The files that are not as those of the search that met no full disk."""
    expected, found = contents(whole), contents(folder)
    return [name for name, content in found.items() if content != expected.get(name)]


def prepared(folder: Path, whole: Path, written: str) -> Path:
    """The journal of the search, or all its files, where it goes on."""
    shutil.copytree(whole, folder)
    if written == "new":
        for name in FILES:
            (folder / name).unlink()
    return folder


def until_full(session: Session, folder: Path, part: str, size: int) -> str:
    """Write while one part has too little room; what the error says."""
    with pytest.raises(OutputError) as caught:
        write(
            session, folder, lambda at: no_file_longer_than(size) if at == part else nullcontext()
        )
    return str(caught.value)
