"""Where generated kernels live: a private folder of Python files that only their owner can change.

Triton reads the source of a kernel from a real file. A file that we import is a file that could
run somebody else's code, so the folder must belong to the user and be closed to everybody else, a
file is named by the hash of what it must hold, and its bytes are compared before they are run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import stat
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from prunezero.errors import OutputError, reason

# Enough for every formula that a user prunes with; a search needs one, see `machine.py`.
_MOST_FILES = 512


def kernel_folder() -> Path:
    """The folder for generated kernels, `$XDG_CACHE_HOME/prunezero/kernels` or in `~/.cache`.

    Raises:
        OutputError: there is no home folder, and code from the folder at hand is not run.
    """
    return _folder(os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~"))


@lru_cache(maxsize=16)
def _folder(cache: str, home: str) -> Path:
    root = Path(cache) if os.path.isabs(cache) else Path(home) / ".cache"
    if not root.is_absolute():
        raise OutputError(
            f"there is no folder for generated kernels, because your home folder is '{home}'; set "
            "XDG_CACHE_HOME to a folder of yours"
        )
    return root / "prunezero" / "kernels"


def import_kernels(source: str, folder: Path) -> ModuleType:
    """The module of a generated source, from its file in `folder`; written where it is missing.

    A file whose bytes differ from the source is written anew. Several processes may do this at
    once; each sees a whole file.

    Raises:
        OutputError: the folder cannot be made, or others could change what is in it.
    """
    return _import_once(source, folder, _triton_version())


@lru_cache(maxsize=1)
def _triton_version() -> str:
    return importlib.metadata.version("triton")


@lru_cache(maxsize=_MOST_FILES)
def _import_once(source: str, folder: Path, version: str) -> ModuleType:
    _make_private(folder)
    data = source.encode()
    name = hashlib.sha256(data + b"\0" + version.encode()).hexdigest()
    path = folder / f"{name}.py"
    if not path.is_file() or path.read_bytes() != data:
        _write_whole(path, data)
        _forget_the_oldest(folder)
    else:
        with contextlib.suppress(OSError):
            os.utime(path)
    return _run_module(f"prunezero_kernel_{name}", path, data)


def _make_private(folder: Path) -> None:
    """Make the folder for its owner alone, or refuse one that others can write."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = [(place, place.lstat()) for place in (folder, folder.parent)]
    except OSError as error:
        raise OutputError(
            f"{folder}: the folder for generated kernels cannot be made ({reason(error)}); "
            "set XDG_CACHE_HOME to a folder that you can write"
        ) from error
    for place, status in found:
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise OutputError(
                f"{place} is not a folder of yours, so code in it is not run; remove it, or set "
                "XDG_CACHE_HOME to another place"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OutputError(
                f"{place} can be written by others, so code in it is not run; "
                f"`chmod 700 {place}` and remove what you do not know"
            )


def _write_whole(path: Path, data: bytes) -> None:
    """Put the bytes at the path in one step, so that no reader sees half a file."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"{path}: a generated kernel cannot be written ({reason(error)}); free some space, or "
            "set XDG_CACHE_HOME to a folder that you can write"
        ) from error


def _forget_the_oldest(folder: Path) -> None:
    """Remove what was used longest ago, of more files than we keep."""
    used = []
    for path in folder.glob("*.py"):
        # Another process may be at the same.
        with contextlib.suppress(FileNotFoundError):
            used.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(used)[:-_MOST_FILES]:
        path.unlink(missing_ok=True)


def _run_module(name: str, path: Path, data: bytes) -> ModuleType:
    """The module made from just these bytes; no `__pycache__` is read or written."""
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise OutputError(f"{path}: a generated kernel cannot be imported; remove the file")
    module = importlib.util.module_from_spec(spec)
    exec(loader.source_to_code(data, str(path)), module.__dict__)
    return module
