"""Journal of a search: one line per result, written once and never changed.

A search is a function of its settings and of the results in its journal. To go on after a crash it
runs again from the start, and finds every result that was written before instead of computing it;
so a resumed search cannot differ from one that was never interrupted.

Every line has a checksum. What was cut off by a crash is removed when the journal is opened, before
anything is appended; a damaged line before it is stepped over, and its result computed again. The
first line, the header, is known again by its checksum or by its text, whichever was not damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunezero.errors import OutputError, PruneZeroWarning, SearchError, differences, reason
from prunezero.files.checked_lines import line_of, record_of
from prunezero.searching.experiment.provenance import comparable, header_digest

# How the line of a header begins, of which a full disk may have kept no more.
_BEGINNING = re.compile(rb'[0-9a-f]{8} [0-9]+ \{"header": [^\n]*')


class Journal:
    """An append-only file of results, open in one process at a time."""

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool) -> None:
        """Open a journal, new or to go on with.

        Damaged lines are told by a warning.

        Args:
            header: what the results depend on; JSON data.

        Raises:
            SearchError: the journal is in use, exists although `resume` is False, was written under
                another header, whose differences the message lists, or is no journal; the file is
                as it was.
            OutputError: the file cannot be read or written.
        """
        self.path = path
        self.digest = header_digest(header)
        """Hexadecimal, of the header: equal for searches that cannot differ."""
        self._results: dict[tuple[str, str], dict[str, Any]] = {}
        self._is_damaged = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise SearchError(f"{path} is no file; move it away, or choose another --name")
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
        self._file.seek(0)
        data = self._file.read()
        if not data or _is_torn_header(data):
            self._write_header(header)
            return
        data = self._with_header(data, header)
        *lines, torn = data.split(b"\n")
        records = _records(lines, self.path)
        if not resume:
            raise SearchError(
                f"{self.path.parent} already holds a search; go on with it by --resume, or choose "
                "another --name"
            )
        before = records[0]["header"]
        _refuse_other_header(_comparable(before, self.path), comparable(header), self.path)
        # Of an older journal it is that of its own header, by which MLflow knows the search.
        self.digest = header_digest(before)
        self._tell([place for place, one in enumerate(records, start=1) if not one])
        self._results = {(one["kind"], one["key"]): one["result"] for one in records[1:] if one}
        self._file.truncate(len(data) - len(torn))

    def _write_header(self, header: dict[str, Any]) -> None:
        """Begin the file; where it cannot be begun, it is not there."""
        self._file.truncate(0)
        try:
            self._append({"header": header})
        except OutputError:
            self.path.unlink(missing_ok=True)
            raise

    def _with_header(self, data: bytes, header: dict[str, Any]) -> bytes:
        """The content, whose first line is written anew if it was that of this very header."""
        line = line_of({"header": header})
        found, begin = data[: len(line)], line.index(b"{")
        is_damaged = record_of(data.partition(b"\n")[0]) is None
        if not is_damaged or not (found[:begin] == line[:begin] or found[begin:] == line[begin:]):
            return data
        # The journal itself is open for appending alone.
        with self.path.open("r+b") as file:
            file.write(line)
        warnings.warn(
            f"{self.path}, line 1 was damaged and is written anew", PruneZeroWarning, stacklevel=4
        )
        return line + data[len(line) :]

    def _tell(self, places: Sequence[int]) -> None:
        """Say which lines are damaged, by their numbers from 1."""
        self._is_damaged = bool(places)
        if places:
            lines = "line" if len(places) == 1 else f"{len(places)} lines, the first line"
            warnings.warn(
                f"{self.path}, {lines} {places[0]}: damaged; what stood there is computed again",
                PruneZeroWarning,
                stacklevel=4,
            )

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
        """Close it, and take the file away again when it holds no result, nor ever did."""
        if not self._results and not self._is_damaged:
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


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a journal, the header first; a search may be writing on meanwhile.

    Raises:
        SearchError: the file cannot be read, or holds no header.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {reason(error, path)}") from error
    # What follows the last line's end is not written yet.
    return [record for record in _records(lines[:-1], path) if record]


def _records(lines: Sequence[bytes], path: Path) -> list[dict[str, Any]]:
    """The records of a journal, the header first; an empty one for each line that is damaged.

    Raises:
        SearchError: it has no header, or several.
    """
    records = [record_of(line) or {} for line in lines]
    headers = [place for place, record in enumerate(records) if _is_header(record)]
    if not any(records):
        raise SearchError(
            f"{path} is no journal of a search, or damaged in every line; move it away, or choose "
            "another --name"
        )
    if not headers or headers[0] > 0:
        raise SearchError(
            f"{path}, line 1 is missing or damaged, so nothing tells what was searched; --resume "
            "mends it where it can, or type the search again under another --name: what "
            f"{path.parent.parent / 'archive.jsonl'} holds is not measured again"
        )
    if len(headers) > 1:
        raise SearchError(
            f"{path}, line {headers[1] + 1} begins another search, so these are two journals in "
            "one file; leave the lines of one of them in it"
        )
    return [record if _is_header(record) or _is_result(record) else {} for record in records]


def _is_header(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("header"), dict)


def _is_result(record: Mapping[str, Any]) -> bool:
    kinds = {"kind": str, "key": str, "result": dict}
    return all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def _is_torn_header(data: bytes) -> bool:
    """Whether it is what a full disk or a crash leaves of a journal that was only begun."""
    return _BEGINNING.fullmatch(data) is not None


def _lock(handle: int, path: Path) -> None:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise SearchError(f"{path.parent} is in use by another search that is running") from error


def _comparable(header: Mapping[str, Any], path: Path) -> dict[str, Any]:
    try:
        return comparable(header)
    except SearchError as error:
        raise SearchError(f"{path.parent}: {error}") from error


def _refuse_other_header(before: dict[str, Any], header: dict[str, Any], path: Path) -> None:
    refuse_other_format(before, header.get("format"), path.parent)
    changed = differences(before, header)
    if changed:
        raise SearchError(
            f"{path.parent} was searched under other settings ({changed}); "
            "repeat those, or start anew under another --name, with what this one found by "
            f"--start-from {path.parent}"
        )


def refuse_other_format(header: Mapping[str, Any], now: Any, folder: Path) -> None:
    """Refuse results that were written under other rules than those of this version.

    Args:
        header: of a journal, as `comparable` gives it.
        now: the `FORMAT` of `experiment/provenance.py`.
        folder: of the search.

    Raises:
        SearchError: they were.
    """
    if header.get("format") != now:
        raise SearchError(
            f"{folder} was searched by another version of prunezero (format: "
            f"{header.get('format')}, now {now}), whose numbers are not those of this one; use "
            "that version, or start anew under another --name, with what this one found by "
            f"--start-from {folder}"
        )
