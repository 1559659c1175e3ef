"""Which layers does a pattern mean? A full name, the end of one, or "re:" and an expression.

A regular expression can take longer than the universe lasts, and which ones do cannot be read off
them. So each has a budget of processor time: Python's `re` looks for signals while it searches, and
a timer of the process interrupts it. (The package `regex` has a timeout, but compiling
`(?:(?:a{999}){999}){999}` in it takes gigabytes; RE2 knows no lookahead.) Only the main thread can
be interrupted so; elsewhere a child process searches.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from types import FrameType
from typing import Any, NoReturn, TypeVar

from prunezero.errors import ModelError

Value = TypeVar("Value")

MAX_LENGTH = 256
# Processor seconds that one expression may take, over all names.
BUDGET = 0.25
# Names like those of layers, on which an expression is tried when it is read.
_EXAMPLES = ("model.layers.10.self_attn.q_proj", "transformer.h.3.attn.c_attn")
_CHILD = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (1, 2))
pattern, name = json.load(sys.stdin)
print(re.search(pattern, name) is not None)
"""
_spent: defaultdict[str, float] = defaultdict(float)


def patterns_of(text: str) -> tuple[str, ...]:
    """The patterns of a text, of which commas stand between two."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def check_pattern(pattern: str) -> str:
    """The pattern, if it is one that can be searched in names of layers.

    Raises:
        ModelError: it is empty or too long, or what follows "re:" is no regular expression, or
            takes too long.
    """
    if not pattern or len(pattern) > MAX_LENGTH:
        raise ModelError(
            f"a layer pattern has {len(pattern)} characters; write 1 to {MAX_LENGTH}, such as "
            "q_proj"
        )
    for name in _EXAMPLES:
        fits(pattern, name)
    return pattern


@lru_cache(maxsize=65536)
def fits(pattern: str, name: str) -> bool:
    """Whether a layer of this name is meant: by its full name, its last parts, or re:PATTERN.

    Raises:
        ModelError: what follows "re:" is not a regular expression, or takes too long.
    """
    if pattern.startswith("re:"):
        return _is_found(_compiled(pattern), name)
    return name == pattern or name.endswith("." + pattern)


def fitting(values: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """The value of the first pattern that fits the name of a layer; `otherwise` if none does."""
    return next((value for pattern, value in values.items() if fits(pattern, name)), otherwise)


def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > MAX_LENGTH:
        raise ModelError(
            f"layer pattern '{pattern[:40]}...' has {len(pattern)} characters; at most "
            f"{MAX_LENGTH} are read"
        )
    try:
        with warnings.catch_warnings():
            # Python says what a later version may read otherwise.
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile(pattern.removeprefix("re:"))
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(
            f"layer pattern '{pattern}' is not a regular expression: {error}"
        ) from error


class _OutOfTime(Exception):
    pass


def _is_found(expression: re.Pattern[str], name: str) -> bool:
    """Whether the expression is found in a name.

    Raises:
        ModelError: it has used up its budget.
    """
    begin = time.thread_time()
    try:
        if _spent[expression.pattern] >= BUDGET:
            raise _OutOfTime
        return _searched(expression, name)
    except _OutOfTime:
        _spent[expression.pattern] += BUDGET
        raise ModelError(
            f"layer pattern 're:{expression.pattern}' takes too long on names such as '{name}'; "
            "write one without a repetition inside a repetition"
        ) from None
    finally:
        _spent[expression.pattern] += time.thread_time() - begin


def _searched(expression: re.Pattern[str], name: str) -> bool:
    if threading.current_thread() is not threading.main_thread():
        return _searched_by_child(expression, name)
    handler = signal.signal(signal.SIGVTALRM, _stop)
    before = signal.setitimer(signal.ITIMER_VIRTUAL, BUDGET)
    try:
        return expression.search(name) is not None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *before)
        signal.signal(signal.SIGVTALRM, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _OutOfTime


def _searched_by_child(expression: re.Pattern[str], name: str) -> bool:
    command: list[Any] = [sys.executable, "-I", "-S", "-c", _CHILD]
    request = json.dumps([expression.pattern, name])
    try:
        answer = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=20, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        raise _OutOfTime from None
    return answer.stdout.strip() == "True"
