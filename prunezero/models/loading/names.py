"""Is a name that a user gives a path, or an id on the hub?"""

from __future__ import annotations


def is_spelled_as_path(name: str) -> bool:
    """Whether no hub id could be spelled so; a path like `models/mine` could be either."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
