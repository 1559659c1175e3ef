"""Where is kept what can be made again?"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder of the cache: $PRUNEZERO_CACHE, or ~/.cache/prunezero."""
    chosen = os.environ.get("PRUNEZERO_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "prunezero"
