"""How do several sources make one text?

Each is divided into splits by itself, and windows of them come in turn, one of each source after
the other, so that the source of a window follows from its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prunezero.errors import TextError


def names_of_sources(name: str) -> list[str]:
    """The sources that a name speaks of: itself, or those that commas divide.

    A file or folder of that very name is one source, whatever commas it has.

    Raises:
        TextError: a source is named twice, or not at all.
    """
    if "," not in name or _is_there(name):
        return [name]
    names = [part.strip() for part in name.split(",")]
    if not all(names):
        raise TextError(f"text '{name}' has a comma with no source beside it; take it away")
    twice = [part for part, count in Counter(names).items() if count > 1]
    if twice:
        raise TextError(f"text '{name}' names '{twice[0]}' twice; name each source once")
    return names


def _is_there(name: str) -> bool:
    """Whether a file or folder has that very name."""
    try:
        return Path(name).expanduser().exists()
    # A name that no file can have, or the home of nobody.
    except (OSError, RuntimeError):
        return False


def shares(count: int, sources: int) -> list[int]:
    """How many of some windows are of each source: equally many, of the first ones one more."""
    return [len(range(place, count, sources)) for place in range(sources)]


def in_turn(windows: Sequence[Tensor]) -> Tensor:
    """Windows [count, length] of sources, the first of each, then the second of each, and so on.

    Sources that have no more are passed over.
    """
    longest = max(map(len, windows))
    return torch.cat([one[place : place + 1] for place in range(longest) for one in windows])
