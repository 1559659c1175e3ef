"""The memory of a search: one line per result, written once and never changed.

A search is a function of its settings and of the results in its journal. To go on after a crash it
runs again from the start, and finds every result that was written before instead of computing it;
so a resumed search cannot differ from one that was never interrupted.

A line is `crc32 length json`, in hexadecimal, decimal and UTF-8; a line that was cut off by a crash
is removed when the journal is opened, before anything is appended.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from prunezero.errors import OutputError, SearchError, differences, reason


class Journal:
    """An append-only file of results, open in one process at a time."""

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool) -> None:
        """Open a journal, new or to go on with.

        Args:
            header: what the results depend on; JSON data.

        Raises:
            SearchError: the journal is in use, damaged, exists although `resume` is False, or was
                written under another header, whose differences the message lists.
            OutputError: the file cannot be written.
        """
        self.path = path
        self._results: dict[tuple[str, str], dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {reason(error, path)}") from error
        try:
            self._begin(json.loads(json.dumps(header)), resume)
        except BaseException:
            self.close()
            raise

    def _begin(self, header: dict[str, Any], resume: bool) -> None:
        _lock(self._file.fileno(), self.path)
        records = self._read()
        if records and not resume:
            raise SearchError(
                f"{self.path.parent} already holds a search; go on with it by --resume, or choose "
                "another --name"
            )
        if not records:
            self._append({"header": header})
            return
        _refuse_other_header(records[0], header, self.path)
        for record in records[1:]:
            self._results[record["kind"], record["key"]] = record["result"]

    def __len__(self) -> int:
        return len(self._results)

    def known(self, kind: str, key: str) -> dict[str, Any] | None:
        """The result that was written under this kind and key, or None."""
        return self._results.get((kind, key))

    def write(self, kind: str, key: str, result: dict[str, Any]) -> dict[str, Any]:
        """Add a result, and return it only when it is safe on disk.

        Raises:
            OutputError: the disk is full or gone; everything written before is intact.
        """
        self._append({"kind": kind, "key": key, "result": result})
        self._results[kind, key] = result
        return result

    def close(self) -> None:
        """Give the journal free for another process."""
        # What a full disk refused was reported when it was written; it is still in the buffer.
        with contextlib.suppress(OSError):
            self._file.close()

    def give_up(self) -> None:
        """Close it, and take the file away again when it holds no result."""
        if not self._results:
            self.path.unlink(missing_ok=True)
        self.close()

    def _append(self, record: dict[str, Any]) -> None:
        try:
            if not os.fstat(self._file.fileno()).st_nlink:
                raise OutputError(f"{self.path} was removed while the search ran; start it anew")
            self._file.write(line_of(record))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {reason(error, self.path)}"
            ) from error

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        records, length = [], 0
        for place, line in enumerate(lines[:-1]):
            record = record_of(line)
            if record is None:
                if place < len(lines) - 2:
                    raise SearchError(
                        f"{self.path}, line {place + 1} is damaged; the file was changed by "
                        "something else than prunezero"
                    )
                break
            records.append(record)
            length += len(line) + 1
        self._file.truncate(length)
        return records


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a journal, the header first; a search may be writing on meanwhile.

    Raises:
        SearchError: the file cannot be read, or holds no header.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {reason(error, path)}") from error
    records = [record for record in map(record_of, lines) if record is not None]
    if not records or "header" not in records[0]:
        raise SearchError(f"{path} holds no search; its first line is missing or damaged")
    return records


def line_of(record: dict[str, Any]) -> bytes:
    """A record as a line of a file, from which `record_of` reads it back."""
    text = json.dumps(record, allow_nan=False, sort_keys=True).encode()
    return b"%08x %d %s\n" % (zlib.crc32(text), len(text), text)


def record_of(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None if it is not as it was written."""
    checksum, _, rest = line.partition(b" ")
    size, _, text = rest.partition(b" ")
    try:
        is_whole = int(size) == len(text) and int(checksum, 16) == zlib.crc32(text)
        return json.loads(text) if is_whole else None
    except ValueError:
        return None


def _lock(handle: int, path: Path) -> None:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise SearchError(f"{path.parent} is in use by another search that is running") from error


def _refuse_other_header(first: dict[str, Any], header: dict[str, Any], path: Path) -> None:
    before = first.get("header", {})
    changed = differences(before, header)
    if changed:
        raise SearchError(
            f"{path.parent} was searched under other settings ({changed}); "
            "repeat those, or start anew under another --name, with what this one found by "
            f"--start-from {path.parent}"
        )
