"""Every candidate of a search as a table: one file for programs, one for people.

`candidates.parquet` holds the rows as they are, `candidates.csv` the same rows rounded and best
first. Both are replaced whole, so a reader never sees half a file.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunezero.errors import OutputError, reason
from prunezero.files.atomic import replace_whole
from prunezero.models.measures import TO_DENSE
from prunezero.searching.experiment.candidate import BOUNDS, Candidate
from prunezero.searching.experiment.objectives import objective_of

COLUMNS = (
    "slot",
    "generation",
    "origin",
    "parents",
    "status",
    "formula",
    "choices",
    "complexity",
    "depth",
    "signal",
    "fingerprint",
    "mask",
    "layer_error",
    *TO_DENSE,
    "search_perplexity",
    "validation_perplexity",
    "seconds",
    "fault",
)
# What a reader looks for first; the digits of each rounded number.
READABLE = {
    "search_perplexity": 3,
    "validation_perplexity": 3,
    **dict.fromkeys(TO_DENSE, 4),
    "layer_error": 5,
    "complexity": None,
    "formula": None,
    "choices": None,
    "signal": None,
    "origin": None,
    "generation": None,
    "slot": None,
    "parents": None,
    "status": None,
    "depth": None,
    "seconds": 2,
    "fingerprint": None,
    "mask": None,
    "fault": None,
}
# Seconds between two tables of a running search: few at first, then more and more, at most so many.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
# A pause is at least this many times as long as the writing was.
_WRITING = 50


class RunningTables:
    """The tables of a search that still runs, so that a crash leaves them behind too."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin to wait for a candidate.

        Args:
            clock: seconds, from any beginning.
        """
        self._folder = folder
        self._clock = clock
        self._pause = _FIRST_PAUSE
        self._due = -math.inf
        self._has_news = False

    def show(self, candidate: Candidate, found: Mapping[int, Candidate]) -> None:
        """Take notice of a candidate, and write the tables of all now and then.

        While a search that goes on reads its journal, the tables of before are the longer ones, and
        stay.

        Args:
            found: all candidates as they stand now, by slot.

        Raises:
            OutputError: the folder cannot be written; it is tried again after the next pause.
        """
        self._has_news |= candidate.status == "new" and not candidate.is_replayed
        begin = self._clock()
        if not self._has_news or begin < self._due:
            return
        try:
            write_candidates([found[slot].row() for slot in sorted(found)], self._folder)
        finally:
            now = self._clock()
            self._due = now + max(self._pause, _WRITING * (now - begin))
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def write_candidates(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write `candidates.parquet` and `candidates.csv`; keys outside `COLUMNS` are left out.

    A search by another objective than perplexity has two columns more, and one that stopped a
    candidate early those of what such a one is at least.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_whole(folder / "candidates.parquet", lambda path: _write_parquet(rows, path))
        replace_whole(folder / "candidates.csv", lambda path: _write_csv(best_first(rows), path))
    except OSError as error:
        raise OutputError(
            f"the candidate tables in {folder} cannot be written: {reason(error)}"
        ) from error


def _further(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns of what the search measures by, where that is not perplexity, and of bounds."""
    own = objective_of(rows)
    objective = [] if own.is_usual else [own.key(split) for split in ("search", "validation")]
    return objective + [key for key in BOUNDS if any(key in row for row in rows)]


def best_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows by the search's objective on search text, then by layer error; unmeasured ones last."""
    own = objective_of(rows)
    return sorted(
        rows,
        key=lambda row: (
            _or_last(own.of(row, "search")),
            _or_last(row.get("layer_error")),
            row.get("slot") or 0,
        ),
    )


def _or_last(value: Any) -> float:
    return math.inf if value is None or math.isnan(value) else float(value)


def _write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    whole, text, number = pa.int64(), pa.string(), pa.float64()
    types = {"parents": pa.list_(whole)}
    types |= dict.fromkeys(("slot", "generation", "complexity", "depth"), whole)
    measured = ("layer_error", *TO_DENSE, "search_perplexity", "validation_perplexity", "seconds")
    further = _further(rows)
    types |= dict.fromkeys((*measured, *further), number)
    columns = (*COLUMNS, *further)
    schema = pa.schema([(name, types.get(name, text)) for name in columns])
    plain = [{name: _plain(row.get(name)) for name in columns} for row in rows]
    parquet.write_table(pa.Table.from_pylist(plain, schema=schema), path)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        digits_of = {**dict.fromkeys(_further(rows), 4), **READABLE}
        writer.writerow(digits_of)
        for row in rows:
            cells = [_readable(row.get(name), digits) for name, digits in digits_of.items()]
            writer.writerow(cells)


def _readable(value: Any, digits: int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, (tuple, list)):
        return " ".join(str(part) for part in value)
    return f"{value:.{digits}f}" if digits is not None else str(value)
