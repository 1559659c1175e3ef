"""Spool in which records wait while MLflow does not answer: one file of JSON lines.

Lines are only ever appended, or removed by their exact text, under a file lock: two searches may
share one folder of runs, and a line that was torn by a crash is stepped over. One process at a time
writes waiting records to MLflow; what a crash leaves between writing and removing is written again,
which changes nothing there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from prunezero.files.atomic import replace_bytes
from prunezero.report.tracking.records import RunRecord, record_from_line, record_to_line


class Spool:
    """The records that are still owed to MLflow, oldest first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: Sequence[RunRecord]) -> None:
        """Add records at the end, on disk before this returns.

        Raises:
            OSError: the folder cannot be written.
        """
        if not records:
            return
        text = "".join(record_to_line(record) + "\n" for record in records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(), self.path.open("ab") as file:
            if file.tell() and not self._ends_with_newline():
                # A torn line of a killed process must not swallow the next record.
                file.write(b"\n")
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[str]:
        """Every waiting line, oldest first; empty when the file does not exist."""
        try:
            # What is not UTF-8 is kept as it is, when lines beside it are removed.
            text = self.path.read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return []
        return [line for line in text.split("\n") if line.strip()]

    def drop(self, lines: set[str]) -> None:
        """Remove lines by their text, atomically; the file goes when none is left."""
        if not lines:
            return
        with self._lock():
            left = [line for line in self.lines() if line not in lines]
            if not left:
                self.path.unlink(missing_ok=True)
                return
            text = "\n".join(left) + "\n"
            replace_bytes(text.encode(errors="surrogateescape"), self.path)

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _lock(self) -> contextlib.AbstractContextManager[bool]:
        """Hold the file against other processes."""
        return locked(self.path.with_suffix(".lock"))

    def replaying(self) -> contextlib.AbstractContextManager[bool]:
        """Within it, no other process writes waiting records to MLflow; False if one does now."""
        return locked(self.path.with_suffix(".replay.lock"), wait=False)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Within it, a lock file is held; False if it is not, since somebody else holds it.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def read_record(line: str) -> RunRecord | None:
    """The record on a line, or None when the line is torn or not ours."""
    try:
        # Refuses bytes that are no UTF-8, which no server would take.
        line.encode()
        return record_from_line(line)
    except ValueError:
        return None
