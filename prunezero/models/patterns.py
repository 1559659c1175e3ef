"""Which layers does a pattern mean? A full name, the end of one, or "re:" and an expression."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def patterns_of(text: str) -> tuple[str, ...]:
    """The patterns of a text, of which commas stand between two."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def fits(pattern: str, name: str) -> bool:
    """Whether a layer of this name is meant: by its full name, its last parts, or re:PATTERN.

    Raises:
        re.error: what follows "re:" is not a regular expression.
    """
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern)


def fitting(values: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """The value of the first pattern that fits the name of a layer; `otherwise` if none does."""
    return next((value for pattern, value in values.items() if fits(pattern, name)), otherwise)
