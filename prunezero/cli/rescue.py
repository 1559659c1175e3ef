"""What becomes of a pruned model that the disk does not take at the end of the work?

It is kept elsewhere, where another disk has room. Where none has, whoever watches may make room,
and it is tried once more.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from prunezero.errors import OutputError, reason, shell_word

Saved = TypeVar("Saved")
# For somebody to make room, where no terminal can be asked.
SECONDS_OF_PATIENCE = 60


def saved_or_kept(save: Callable[[Path], Saved], output: Path, size: int) -> Saved:
    """What `save` returns, once it could write the output.

    Args:
        save: writes a folder, complete or not at all.
        output: folder that was asked for.
        size: bytes that it takes, about.

    Raises:
        OutputError: it could not; the message says where the model is kept now, if anywhere.
    """
    fault = _fault_of(save, output)
    if not isinstance(fault, OutputError):
        return fault
    for place in _places_elsewhere(output, size):
        if not isinstance(_fault_of(save, place), OutputError):
            # Into a folder that is there, `mv` would move it one level too deep.
            emptied = f"rmdir {shell_word(output)} && " if output.is_dir() else ""
            raise OutputError(
                f"{fault}; the pruned model is kept in {place}, make room and move it by: "
                f"{emptied}mv {shell_word(place)} {shell_word(output)}"
            ) from fault
        with suppress(OSError):
            place.parent.rmdir()
    _wait_for_room(fault)
    again = _fault_of(save, output)
    if isinstance(again, OutputError):
        raise OutputError(
            f"{again}; no other disk has room for the pruned model either, so it is lost: free "
            "some space and type the same command again"
        ) from again
    return again


def _fault_of(save: Callable[[Path], Saved], folder: Path) -> Saved | OutputError:
    """What came of it; another fault than the disk's is raised."""
    from safetensors import SafetensorError

    try:
        return save(folder)
    except (OutputError, OSError, SafetensorError) as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        return OutputError(f"folder '{folder}' cannot be written ({reason(cause, folder)})")


def _places_elsewhere(output: Path, size: int) -> Iterator[Path]:
    """New folders on disks with room, other disks than that of the output first."""
    from prunezero.files.cache import cache_dir

    usual = [Path(tempfile.gettempdir()), Path("/var/tmp"), cache_dir(), Path.home(), Path.cwd()]
    there = [folder for folder in usual if folder.is_dir() and os.access(folder, os.W_OK)]
    full = _disk_of(output.parent)
    others = {disk: folder for folder in reversed(there) if (disk := _disk_of(folder)) != full}
    for folder in reversed(others.values()):
        if shutil.disk_usage(folder).free > size:
            with suppress(OSError):
                yield Path(tempfile.mkdtemp(prefix="prunezero-", dir=folder)) / output.name


def _disk_of(folder: Path) -> int:
    try:
        return folder.stat().st_dev
    except OSError:
        return -1


def _wait_for_room(fault: OutputError) -> None:
    from prunezero.cli.tables import say

    if sys.stdin is not None and sys.stdin.isatty():
        say(f"{fault}; make room, then press Enter to try once more")
        with suppress(EOFError):
            input()
        return
    say(f"{fault}; it is tried once more in {SECONDS_OF_PATIENCE} seconds, make room meanwhile")
    time.sleep(SECONDS_OF_PATIENCE)
