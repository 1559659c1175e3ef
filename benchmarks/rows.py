"""Rows of results in a file of JSON lines, for measurements that are stopped and gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of the file; a line that a kill cut off is taken away."""
    if not path.is_file():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, row: dict[str, Any]) -> None:
    """One line, on the disk before the next measurement begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def under_equal(rows: list[dict[str, Any]], keys: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Rows that are equal in some columns together, in the order in which they first stand."""
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return list(places.values())
