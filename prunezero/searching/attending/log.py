"""Log of a search for criteria of keys: one line per result, written once and never changed.

To go on after a cut the search runs again from its start and reads here what it would measure, so
its end cannot differ. The first line says what all numbers depend on. `evaluation/journal.py` is
the same for experiments on weights, whose header is a `SearchConfig`.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prunezero.errors import OutputError, PruneZeroWarning, SearchError, differences, reason
from prunezero.files.checked_lines import line_of, record_of

Result = dict[str, Any]


class Log:
    """Results by kind and key, in a file or, without a path, in memory alone."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        """Open a log, new or to go on with; a line that was cut off is taken away.

        Damaged lines are told by a warning, and their results measured again.

        Args:
            header: what the results depend on; JSON data.

        Raises:
            SearchError: the file was written under another header, or is no log.
            OutputError: it cannot be read or written.
        """
        self._path = path
        self._results: dict[tuple[str, str], Result] = {}
        if path is not None:
            self._begin(path, json.loads(json.dumps(header)))

    def result(self, kind: str, key: str, measure: Callable[[], Result]) -> Result:
        """What stands under kind and key; measured now, and on disk before it is returned, if new.

        Raises:
            OutputError: the file cannot be written.
        """
        if (kind, key) not in self._results:
            # As it is read back: with sorted keys, and lists for tuples.
            found = json.loads(json.dumps(measure(), sort_keys=True))
            self._append({"kind": kind, "key": key, "result": found})
            self._results[kind, key] = found
        return self._results[kind, key]

    def _begin(self, path: Path, header: Result) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {reason(error, path)}") from error
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            self._append({"header": header})
            return
        records = [record_of(line) for line in whole.splitlines()]
        before = (records[0] or {}).get("header")
        if not isinstance(before, dict):
            raise SearchError(
                f"{path}, line 1 does not say what was searched; move the file away, or name "
                "another one"
            )
        if changed := differences(before, header):
            raise SearchError(
                f"{path} was searched under other settings ({changed}); repeat those, or name "
                "another file"
            )
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        self._take(path, records)

    def _take(self, path: Path, records: list[Result | None]) -> None:
        damaged = [place for place, one in enumerate(records, start=1) if one is None]
        if damaged:
            lines = "line" if len(damaged) == 1 else f"{len(damaged)} lines, the first line"
            warnings.warn(
                f"{path}, {lines} {damaged[0]}: damaged; what stood there is measured again",
                PruneZeroWarning,
                stacklevel=5,
            )
        for one in records[1:]:
            if one:
                self._results[one["kind"], one["key"]] = one["result"]

    def _append(self, record: Result) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(line_of(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self._path} cannot be written: {reason(error, self._path)}"
            ) from error
