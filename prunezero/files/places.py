"""Can results be kept where the user wants them? Tried before the work, by the very deed.

Files are made, written to the disk and renamed, as the work will do it; permissions alone do not
tell that a disk is full, read-only, or mounted there. Nothing of a trial stays, nor a folder that
was made for it.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from prunezero.errors import OutputError, reason

# Enough for a full disk to be noticed, where blocks are larger than a line of text.
_TRIAL_BYTES = 64 * 1024
# What the work adds to the name of a folder for what is not finished.
_LONGEST_ENDING = ".partial-0000"
# Another process may take away a folder that both have made for their trials.
_TRIES = 5


def try_folder(folder: str | Path) -> Path:
    """The folder in which a model may be saved: new or empty, and sure to take files.

    Raises:
        OutputError: it cannot be had; the message says why.
    """
    try:
        path = _followed(Path(folder).expanduser())
        _refuse_taken(folder, path)
        _tried(lambda: _try_folder(path))
    except (OSError, RuntimeError, ValueError) as error:
        # So the system speaks of a folder on which a disk is mounted.
        is_busy = isinstance(error, OSError) and error.errno == errno.EBUSY
        advice = "name a folder inside it" if is_busy else "choose another folder"
        raise OutputError(
            f"folder '{folder}' cannot be written ({reason(error, folder)}); {advice}"
        ) from error
    return path


def try_file(path: Path | None, option: str, *, example: str = "result.json") -> None:
    """Refuse a file that cannot be written or replaced; its folder has to be there.

    Args:
        option: by which the user named it.
        example: of a file's name.

    Raises:
        OutputError: it cannot; the message says why.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise OutputError(f"{option} {path} is a folder; name a file such as {path / example}")
        if is_special(path):
            # To open a pipe and to close it again would be the end of the text for its reader.
            if os.access(path, os.W_OK):
                return
            raise PermissionError(errno.EACCES, None)
        target = Path(os.path.realpath(path))
        with suppress(FileNotFoundError):
            # Links that lead in a circle, and names that are too long.
            target.stat()
        _try_file(target.parent)
    except (OSError, ValueError) as error:
        raise OutputError(f"{option} {path} cannot be written: {reason(error, path)}") from error


def check_apart(places: Mapping[str, Path | None]) -> None:
    """Refuse options that name one place: what is written last would be in the way, or be lost.

    Raises:
        OutputError: two of them do.
    """
    seen: dict[str, str] = {}
    for option, path in places.items():
        if path is None or is_special(path):
            continue
        other = seen.setdefault(os.path.realpath(path), option)
        if other != option:
            raise OutputError(f"{other} and {option} both name {path}; give each its own place")


def try_inside(folder: Path, option: str) -> None:
    """Refuse a folder, there or not, in which no file can be written.

    Args:
        option: by which the user named it.

    Raises:
        OutputError: it cannot; the message says why.
    """
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise OutputError(f"{option} {folder} is a file; name a folder")
        _tried(lambda: _try_inside(folder))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{option} {folder} cannot be written: {reason(error, folder)}"
        ) from error


def check_room(path: Path, size: int, what: str) -> None:
    """Refuse a place whose disk has less room than will be written.

    Args:
        path: there or not.
        size: in bytes.
        what: takes that room, in words.

    Raises:
        OutputError: there is less.
    """
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(there).free
    if free < size:
        raise OutputError(
            f"{what} takes about {mebibytes(size)} but the disk of '{there}' has "
            f"{mebibytes(free)} left; free some space, or choose another disk"
        )


def is_special(path: Path) -> bool:
    """Whether a path leads to a device, a pipe or an open file: written to, and never replaced."""
    place = os.path.abspath(path)
    is_open_file = place.startswith(("/dev/", "/proc/"))
    return path.exists() and (is_open_file or not path.is_file()) and not path.is_dir()


def _followed(path: Path) -> Path:
    """Where links lead, and what dots mean: what stands at the end is what will be replaced."""
    is_plain = path.name not in ("", "..") and not path.is_symlink()
    return path if is_plain else Path(os.path.realpath(path))


def _refuse_taken(folder: str | Path, path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"'{folder}' is a file; choose a folder that is new or empty")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"folder '{folder}' is not empty; choose a folder that is new or empty")
    if path.is_dir() and path.samefile(Path.cwd()):
        raise OutputError(
            f"'{folder}' is the folder you are in, which cannot be replaced; name one inside it"
        )


def _tried(trial: Callable[[], None]) -> None:
    for left in reversed(range(_TRIES)):
        try:
            return trial()
        except FileNotFoundError:
            if not left:
                raise


def _try_folder(path: Path) -> None:
    """Make a folder beside, with a file, and give it the name; or give the empty one another."""
    with _made(path.parent):
        with suppress(FileNotFoundError):
            # Raises where the system takes no name of this length.
            path.with_name(path.name + _LONGEST_ENDING).lstat()
        beside = Path(tempfile.mkdtemp(prefix=".trial.", dir=path.parent))
        renamed = path
        try:
            _try_file(beside)
            if path.exists():
                renamed = beside / "renamed"
                path.rename(renamed)
                renamed.rename(path)
            else:
                beside.rename(path)
                path.rmdir()
        finally:
            if renamed != path and renamed.exists():
                renamed.rename(path)
            shutil.rmtree(beside, ignore_errors=True)


def _try_inside(folder: Path) -> None:
    with _made(folder):
        _try_file(folder)


def _try_file(folder: Path) -> None:
    """Make, fill, rename and remove a file."""
    with tempfile.TemporaryDirectory(prefix=".trial.", dir=folder) as beside:
        first, second = Path(beside, "first"), Path(beside, "second")
        second.touch()
        with first.open("wb") as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
        first.replace(second)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Within it, the folder is there; afterwards, those that had to be made are gone."""
    above = [folder, *folder.parents]
    missing = list(takewhile(lambda one: not one.exists(), above))
    there = above[len(missing)]
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, None, str(there))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for one in missing:
            # Somebody else may have put something there.
            with suppress(OSError):
                one.rmdir()


def mebibytes(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**20:.1f} MiB"
