"""Files that are replaced whole, so that a reader never sees half of one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prunezero.errors import OutputError, reason
from prunezero.files.places import is_special


def replace_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` write beside the file, and move that there in one step.

    Of a link, what it leads to is replaced. A device, a pipe or an open file gets the bytes.

    Raises:
        OSError: the folder cannot be written; the file is as it was.
    """
    if is_special(path):
        _append(path, write)
        return
    path = Path(os.path.realpath(path))
    # Names may be as long as the system allows already.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}")
    try:
        write(temporary)
        follow_umask(temporary)
        _move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _move(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except OSError as error:
        # A file that is mounted there, or somebody else's in a common folder, may only be filled.
        if error.errno not in (errno.EBUSY, errno.EPERM):
            raise
        shutil.copyfile(temporary, path)


def _append(path: Path, write: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        write(whole)
        with path.open("ab") as file:
            file.write(whole.read_bytes())


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
    # To ask for it is to set it, for all threads; Linux also tells it without.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
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
