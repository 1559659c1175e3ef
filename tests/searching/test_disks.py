"""A disk that is full, or a folder that is gone, ends a search in a sentence and loses nothing."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prunezero.errors import OutputError
from prunezero.searching.evaluation.archive import Archive
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.search import search
from prunezero.searching.session import Session, open_session
from tests.searching.test_search import outcome
from tests.searching.test_workers import is_running
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

BUDGET = 12


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """Within it, files of this process take no more bytes than so many, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def opened(folder: Path, *, archive: Path | None = None, resume: bool = False) -> Iterator[Session]:
    task = make_task(tiny_space(trials=4), 0.5)
    session = open_session([tiny_testbed()], task, folder, archive=archive, resume=resume)
    try:
        yield session
    finally:
        session.journal.close()


@pytest.mark.parametrize("full", ["journal.jsonl", "archive.jsonl"])
def test_a_disk_that_fills_ends_the_search_in_a_sentence_and_resume_ends_like_a_whole_one(
    full: str, tmp_path: Path
) -> None:
    with opened(tmp_path / "whole") as session:
        whole = outcome(list(search(session.rungs, max_candidates=BUDGET)))
    archive = tmp_path / "archive.jsonl"
    with opened(tmp_path / "parts", archive=archive) as session:
        room = session.journal.path.stat().st_size + 8000
        # Empty lines are nobody's answers; they make the archive the longer of the two.
        archive.write_bytes(b"\n" * (room - 4000 if full == archive.name else 0))
        complaint = f"{full} cannot be written: File too large"
        with no_file_longer_than(room), pytest.raises(OutputError, match=complaint):
            list(search(session.rungs, max_candidates=BUDGET))
    with opened(tmp_path / "parts", archive=archive, resume=True) as session:
        parts = list(search(session.rungs, max_candidates=BUDGET))
    assert outcome(parts) == whole
    assert any(one.is_replayed for one in parts) and not all(one.is_replayed for one in parts)


def test_a_disk_that_is_full_from_the_start_is_a_sentence_and_leaves_the_name_free(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    with no_file_longer_than(20), pytest.raises(OutputError, match="cannot be written: File too"):
        Journal(path, {"model": "a"}, resume=False)
    Journal(path, {"model": "a"}, resume=False).close()
    Journal(path, {"model": "a"}, resume=True).close()


def test_an_archive_on_a_full_disk_keeps_what_it_holds_and_takes_the_answer_later(
    tmp_path: Path,
) -> None:
    path = tmp_path / "archive.jsonl"
    archive = Archive(path, {"model": "a"})
    archive.write("layer error", "W", {"layer_error": 0.1})
    with (
        no_file_longer_than(path.stat().st_size + 20),
        pytest.raises(OutputError, match="archive.jsonl cannot be written: File too large"),
    ):
        archive.write("layer error", "X", {"layer_error": 0.2})
    again = Archive(path, {"model": "a"})
    assert again.known("layer error", "W") == {"layer_error": 0.1}
    assert again.known("layer error", "X") is None
    archive.write("layer error", "X", {"layer_error": 0.2})
    assert Archive(path, {"model": "a"}).known("layer error", "X") == {"layer_error": 0.2}


def test_a_folder_that_vanishes_ends_the_search_instead_of_losing_its_results(
    tmp_path: Path,
) -> None:
    with opened(tmp_path / "run") as session:
        going = search(session.rungs, max_candidates=BUDGET)
        next(going)
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(OutputError, match="was removed while the search ran"):
            list(going)


def test_the_lock_of_a_killed_search_is_free_at_once_although_a_child_of_it_lives(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    program = textwrap.dedent(
        """
        import multiprocessing, sys, time
        from pathlib import Path
        from prunezero.searching.evaluation.journal import Journal
        journal = Journal(Path(sys.argv[1]), {"model": "a"}, resume=False)
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        child.start()
        journal.write("layer error", "W", {"layer_error": 0.1})
        print(child.pid, flush=True)
        time.sleep(60)
        """
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        journal = Journal(path, {"model": "a"}, resume=True)
        assert journal.known("layer error", "W") == {"layer_error": 0.1}
        journal.close()
        assert is_running(child)
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
