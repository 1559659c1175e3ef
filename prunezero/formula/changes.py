"""Where does a formula, as it was rewritten, differ from its text? Who reads one may listen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# What was rewritten since a reader began to listen; None where nobody does.
_heard: ContextVar[set[str] | None] = ContextVar("_heard", default=None)
# A part of the formula went, and with it an axis along which it varied.
SHRUNK = "shrunk"


@contextmanager
def changes() -> Iterator[set[str]]:
    """The points, in words, at which what is built meanwhile differs from what was typed."""
    heard: set[str] = set()
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)
        heard.discard(SHRUNK)


def report(point: str) -> None:
    """Tell whoever listens of a point, in words."""
    heard = _heard.get()
    if heard is not None:
        heard.add(point)


def has_shrunk() -> bool:
    """Whether somebody listens, and some part went with an axis along which it varied."""
    return SHRUNK in (_heard.get() or ())


def is_heard() -> bool:
    """Whether somebody listens."""
    return _heard.get() is not None
