"""Which bytes does a file hold, or a folder? Read once, and remembered as long as a file rests.

A file is known again by its path, size, inode, and the moments of its last change. The moment of
the content (mtime) can be set back by anybody, that of the inode (ctime) by nobody, so both count.
A file that changed a moment ago is not remembered: it may change again within the same tick of the
clock, or by a mapped page whose moment the system writes later.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from prunezero.files.atomic import replace_bytes
from prunezero.files.cache import cache_dir
from prunezero.files.checked_lines import line_of, record_of
from prunezero.files.digests import file_digest, in_parallel, joined_digest

# Systems write mapped pages back, and with them the moment of their change, within half a minute.
SECONDS_AT_REST = 60.0
_SEAL = ".digests"


def digest_of_file(path: Path) -> str:
    """Hexadecimal digest of a file's bytes, from memory where the file has rested since.

    Raises:
        OSError: it cannot be read.
    """
    path = path.resolve()
    seen = _state(path)
    memory = cache_dir() / "digests" / joined_digest([str(path)])
    known = _remembered(memory)
    if known.get("path") == str(path) and known.get("state") == seen:
        return str(known["digest"])
    now = time.time()
    found = file_digest(path)
    is_at_rest = now - path.stat().st_ctime > SECONDS_AT_REST
    if is_at_rest and _state(path) == seen:
        record = {"path": str(path), "state": seen, "digest": found}
        # What cannot be remembered is read again.
        with suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(line_of(record), memory)
    return found


def digests_of_files(paths: Sequence[Path]) -> list[str]:
    """`digest_of_file` of each, in their order.

    Raises:
        OSError: one cannot be read.
    """
    return in_parallel(digest_of_file, paths)


def seal(folder: Path) -> None:
    """Note the bytes of all files of a folder in it, so that `is_sealed` knows them again.

    Raises:
        OSError: a file cannot be read, or the note not written.
    """
    names = _names(folder)
    digests = dict(zip(names, digests_of_files([folder / name for name in names]), strict=True))
    replace_bytes(line_of(digests), folder / _SEAL)


def is_sealed(folder: Path) -> bool:
    """Whether a folder holds the very files that it held when it was sealed."""
    try:
        noted = record_of((folder / _SEAL).read_bytes().rstrip(b"\n"))
        names = _names(folder)
        digests = digests_of_files([folder / name for name in names])
    except OSError:
        return False
    return noted is not None and noted == dict(zip(names, digests, strict=True))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != _SEAL)


def _state(path: Path) -> list[int]:
    now = os.stat(path)
    return [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_dev]


def _remembered(memory: Path) -> dict[str, object]:
    try:
        return record_of(memory.read_bytes().rstrip(b"\n")) or {}
    except OSError:
        return {}
