"""Where records wait while MLflow does not answer: one file of JSON lines.

Lines are only ever appended, or removed by their exact text, under a file lock: two searches may
share one folder of runs, and a line that was torn by a crash is stepped over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from prunezero.report.records import RunRecord, record_from_line, record_to_line


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
            text = self.path.read_text(encoding="utf-8", errors="replace")
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
            temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text("\n".join(left) + "\n", encoding="utf-8")
            temporary.replace(self.path)

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the spool against other processes, where the system has such locks."""
        try:
            import fcntl
        except ImportError:
            yield
            return
        with self.path.with_suffix(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def read_record(line: str) -> RunRecord | None:
    """The record on a line, or None when the line is torn or not ours."""
    try:
        return record_from_line(line)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
