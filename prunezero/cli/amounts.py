"""How much memory, and for how long? Sizes and durations as a user writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prunezero.errors import RecipeError, shortened

_LONGEST_SECONDS, _LARGEST_MEMORY = 8760 * 3600, 2**50
_TIME_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
# K, Ki, KB, KiB and so on.
_SIZE_UNITS = {
    f"{letter}{binary}{end}": (1024 if binary else 1000) ** power
    for power, letter in enumerate("KMGT", start=1)
    for binary in ("", "i")
    for end in ("", "B")
}


def bytes_of(size: str | None) -> int | None:
    """Bytes of a size such as 900MiB, 16GiB or 16GB.

    Raises:
        RecipeError: it is none.
    """
    if size is None:
        return None
    rule = "--memory-limit must be a size from 1KiB to 1024TiB, such as 900MiB or 16GiB,"
    return int(_amount(size, _SIZE_UNITS, rule, least=1024, most=_LARGEST_MEMORY))


def seconds_of(duration: str | None) -> float | None:
    """Seconds of a duration such as 90s, 10m, 1.5h or plain seconds.

    Raises:
        RecipeError: it is none.
    """
    if duration is None:
        return None
    rule = "--time must be a duration from 0.01s to 8760h, such as 90s, 10m or 2h,"
    return _amount(duration, _TIME_UNITS, rule, least=0.01, most=_LONGEST_SECONDS)


def _amount(text: str, units: Mapping[str, int], rule: str, *, least: float, most: float) -> float:
    """A number times the unit behind it, within both ends; else `rule` says what is wrong."""
    found = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)", text.strip())
    amount = float(found[1]) * units.get(found[2], 0) if found else 0.0
    if not least <= amount <= most:
        raise RecipeError(f"{rule} but is '{shortened(text)}'")
    return amount
