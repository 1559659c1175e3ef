"""Is a line of JSON still as it was written? It says so itself, by its length and checksum.

A line is `crc32 length json`, in hexadecimal, decimal and UTF-8.
"""

from __future__ import annotations

import json
import zlib
from typing import Any


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
        record = json.loads(text) if is_whole else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
