"""Files that are replaced whole, so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunezero.errors import OutputError, reason


def replace_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` write beside the file, and move that there in one step.

    Raises:
        OSError: the folder cannot be written; the file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        follow_umask(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_bytes(data: bytes, path: Path) -> None:
    """Let the file hold these bytes.

    Raises:
        OSError: the folder cannot be written; the file is as it was.
    """

    def write(beside: Path) -> None:
        beside.write_bytes(data)

    replace_whole(path, write)


def replace_text(text: str, path: Path) -> None:
    """Let the file hold this text, in UTF-8.

    Raises:
        OSError: the folder cannot be written; the file is as it was.
    """
    replace_bytes(text.encode(), path)


def follow_umask(path: Path) -> None:
    """Give a file, or a folder with all in it, the permissions that new files of the user have.

    Temporary folders, and the files that safetensors writes, are made for their owner alone.

    Raises:
        OSError: it is not ours to change.
    """
    allowed = 0o777 & ~_umask()
    for each in [path, *path.rglob("*")]:
        each.chmod(allowed if each.is_dir() else allowed & 0o666)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(text: str, path: Path) -> None:
    """`replace_text`, for those who answer a user.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        replace_text(text, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {reason(error, path)}") from error


def write_json(data: Any, path: Path) -> None:
    """Write data as JSON, whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_text(json.dumps(data, indent=2) + "\n", path)
