"""Numbers that took long to measure, on disk: one checksummed line a file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from prunezero.errors import PruneZeroWarning, reason
from prunezero.files.atomic import replace_bytes
from prunezero.files.checked_lines import line_of, record_of


def numbers_in(path: Path) -> dict[str, float]:
    """What was measured before; what is damaged is measured anew, with a warning."""
    try:
        line = path.read_bytes()
    except OSError:
        return {}
    record = record_of(line.rstrip(b"\n"))
    if record is None or record.get("place") != path.name:
        warnings.warn(
            f"{path} is damaged, and what it held is measured anew", PruneZeroWarning, stacklevel=3
        )
        # It would be read, and told of, once more before it is written.
        with suppress(OSError):
            path.unlink()
        return {}
    kept: dict[str, float] = record["numbers"]
    return kept


def keep_numbers(path: Path, numbers: Mapping[str, float]) -> None:
    """Write what was measured for the next run; where that cannot be, it measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(line_of({"place": path.name, "numbers": dict(numbers)}), path)
    except OSError as error:
        warnings.warn(
            f"measured {path.parent.name} are not kept in {path}: {reason(error, path)}",
            PruneZeroWarning,
            stacklevel=3,
        )
