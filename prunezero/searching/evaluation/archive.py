"""Archive of results that outlive a search: what was measured once is never computed again.

All searches of a runs folder share one file. An answer stands under the request and under
everything else that it depends on (model, text, sizes, sparsity, versions), so what is found there
is what would have been computed, and a search goes the same way with the archive or without it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from prunezero.errors import OutputError, reason
from prunezero.files.checked_lines import line_of, record_of
from prunezero.files.digests import joined_digest

# Bytes in which at least one line is whole.
_BEGINNING = 2**22


def check_archive(path: Path) -> None:
    """Refuse a file that is something else, before long work; nothing is added to it then.

    Raises:
        OutputError: it is, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(_BEGINNING)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path} cannot be written or read: {error.strerror}") from error
    if begin.strip() and not any(map(record_of, begin.split(b"\n"))):
        raise OutputError(
            f"{path} is no archive of searches, or damaged in every line; move it away"
        )


class Archive:
    """A file of answers that several searches read and append to, also at the same time."""

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        """Read what is known under the conditions of a search.

        Args:
            conditions: whatever answers depend on beside their requests; JSON data.

        Raises:
            OutputError: the file cannot be read or written, or is something else.
        """
        check_archive(path)
        self._path = path
        self._context = joined_digest([json.dumps(conditions, sort_keys=True)])
        self._results: dict[tuple[str, str], dict[str, Any]] = {}
        with self._open() as file:
            lines = file.read().split(b"\n")
        for record in filter(None, map(record_of, lines)):
            # A torn line was never an answer; other conditions are other searches' business.
            if record.get("context") == self._context and isinstance(record.get("answer"), dict):
                self._results[str(record.get("kind")), str(record.get("key"))] = record["answer"]

    def __len__(self) -> int:
        return len(self._results)

    def known(self, kind: str, key: str) -> dict[str, Any] | None:
        """The answer that was written under this kind and key, or None."""
        return self._results.get((kind, key))

    def write(self, kind: str, key: str, result: dict[str, Any]) -> None:
        """Add an answer, unless there is one.

        Raises:
            OutputError: the disk is full or gone.
        """
        if (kind, key) in self._results:
            return
        record = {"context": self._context, "kind": kind, "key": key, "answer": result}
        with self._open() as file:
            # Begins with a line's end: what a crash may have left there stays a line of its own.
            file.write(b"\n" + line_of(record))
        self._results[kind, key] = result

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file, from its start, while no other search writes."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                yield file
        except OSError as error:
            raise OutputError(
                f"{self._path} cannot be written: {reason(error, self._path)}"
            ) from error
