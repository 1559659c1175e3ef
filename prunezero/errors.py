"""Every error prunezero raises, so that a caller can catch one type and a user reads one sentence.

    PruneZeroError
    ├── CriterionError     a formula that may not be read, or that ranks nothing
    ├── RecipeError        a recipe or search space with unknown or contradictory choices
    ├── SelectionError     a sparsity, group or pattern that no mask can satisfy
    ├── ScoreError         scores that must not become a mask: NaN, infinite, all equal
    ├── ModelError         a model that cannot be loaded, pruned or saved
    ├── TextError          text that cannot be read, or is too short for what is asked
    ├── StatisticsError    calibration sums that are missing, damaged or of another model
    │   └── FactorizationError  a Gram matrix that no damping makes positive definite
    ├── SearchError        a search that cannot start, or cannot go on where it stopped
    └── OutputError        a folder that cannot be written

The message says what is wrong with the value, where it stands and what to do about it.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

# Longer ones lose their middle: what failed stands first in a message, the remedy often last.
_LONGEST_REASON = 700
# Where a library goes on with its own stack.
_STACKS = re.compile(r"\s*(Exception raised from |C\+\+ CapturedTraceback|Traceback \(most recent)")
# What a terminal would obey: control characters but for line ends and tabs, turns of direction.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# What exceptions mean that seldom carry a message of their own.
_WORDLESS: dict[type[BaseException], str] = {
    MemoryError: "there is not enough memory",
    RecursionError: "it is nested too deeply",
    StopIteration: "it holds nothing",
    EOFError: "it ends too early",
    TimeoutError: "no answer in time",
    BrokenPipeError: "the other end is closed",
    KeyboardInterrupt: "somebody stopped it",
}


class PruneZeroError(Exception):
    """A mistake that the user can mend; the message is one sentence meant for them.

    It never holds a password, whoever's message it passes on.
    """

    def __init__(self, *words: object) -> None:
        super().__init__(*(masked_uri(one) if isinstance(one, str) else one for one in words))


class CriterionError(PruneZeroError):
    """A formula that may not be read, or that ranks nothing."""


class RecipeError(PruneZeroError):
    """A recipe or search space with unknown or contradictory choices."""


class SelectionError(PruneZeroError):
    """A sparsity, comparison group or pattern that no mask can satisfy."""


class ScoreError(PruneZeroError):
    """Scores that must not become a mask: NaN, infinite, or all equal."""


class ModelError(PruneZeroError):
    """A model that cannot be loaded, pruned or saved."""


class TextError(PruneZeroError):
    """Text that cannot be read, or is too short for what is asked."""


class StatisticsError(PruneZeroError):
    """Calibration sums that are missing, damaged, or of another model."""


class FactorizationError(StatisticsError):
    """A Gram matrix that is not positive definite, however strongly it is damped."""


class SearchError(PruneZeroError):
    """A search that cannot start, or cannot go on where it stopped."""


class OutputError(PruneZeroError):
    """A folder that cannot be written."""


class PruneZeroWarning(UserWarning):
    """What a user should know of work that goes on."""


class FormulaWarning(PruneZeroWarning):
    """A formula means its simplified form, which somewhere differs from the text as typed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word as the tail of a sentence, or nothing when none is near."""
    # A word that is known is not there for another reason, which its likeness would hide.
    others = [one for one in known if one != word]
    near = difflib.get_close_matches(word, others, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def reason(error: BaseException, path: str | PathLike[str] | None = None) -> str:
    """What an exception says, as one line that fits into a sentence of ours.

    The whole message but for line ends, a stop at its end, and stacks. One without a message is
    told by what caused it, else by what its kind means.

    Args:
        path: of the file that our sentence names; an error of the system repeats no path there.
    """
    if isinstance(error, RecursionError):
        return _WORDLESS[RecursionError]
    said = " ".join(_STACKS.split(_said(error, path), maxsplit=1)[0].split()).rstrip(".")
    if not said:
        return _wordless(error)
    half = _LONGEST_REASON // 2
    return said if len(said) <= _LONGEST_REASON else f"{said[:half]} ... {said[-half:]}"


def _said(error: BaseException, path: str | PathLike[str] | None) -> str:
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"{error.args[0]!r} is missing"
    if not isinstance(error, OSError) or not isinstance(error.errno, int):
        return str(error)
    said = str(error.strerror or os.strerror(error.errno))
    if error.filename is None or (path is not None and _beside(f"{error.filename}", path)):
        return said
    return f"{said}: '{error.filename}'"


def _beside(one: str | PathLike[str], other: str | PathLike[str]) -> bool:
    """Whether two paths are of one folder."""
    return os.path.realpath(os.path.dirname(one)) == os.path.realpath(os.path.dirname(other))


def _wordless(error: BaseException) -> str:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        return reason(cause)
    meanings = (words for kind, words in _WORDLESS.items() if isinstance(error, kind))
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    return next(meanings, f"an error of the kind {kind}, which says nothing else")


def shell_word(text: str | PathLike[str]) -> str:
    """A name as a command that we advise holds it: pasted into a shell, it is that name again."""
    word = os.fspath(text)
    # Neither is an option what begins with a hyphen.
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def printable(text: str) -> str:
    """Text of others as a terminal shows it and does not obey it: control characters escaped."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a request that is kept on disk has otherwise than the present one, for a message.

    Keys with other values as "key: before, now after", in the order of `now`, by semicolons; of
    texts of several lines the lines that differ. Nothing where nothing differs.
    """
    changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    return "; ".join(_difference(key, str(before.get(key)), str(now.get(key))) for key in changed)


def _difference(key: str, before: str, now: str) -> str:
    old, new = before.splitlines(), now.splitlines()
    gone = " ".join(line.strip() for line in old if line not in new)
    come = " ".join(line.strip() for line in new if line not in old)
    return f"{key}: {shortened(gone)}, now {shortened(come)}"


def shortened(text: str) -> str:
    """A value as a message shows it: at most 80 signs of it, and a word where there is none."""
    return text if 0 < len(text) <= 80 else text[:77] + "..." if text else "nothing"


# Names of values that nobody else may read, in the query of a URI or in a connection text.
_PASSWORD = "(?:password|passwd|passphrase|pwd|secret)"
_SECRET = (
    rf"(?:[a-z0-9_.-]*(?:{_PASSWORD}|token|signature|credentials?)|(?:[a-z0-9]+[_.-])*"
    "(?:pass|auth|authorization|sig|user|username|(?:api|access|secret|private|account|shared)?key|"
    "secretkey|sharedaccesskey))"
)
_IN_QUERY = re.compile(rf"([?&;#]{_SECRET}=)[^&#;\s'\"<>`]+", re.I)
# The same where a whole connection text is one value of a query, as ODBC has it.
_IN_ENCODED = re.compile(rf"(%(?:3B|26|3F){_SECRET}%3D)(?:(?!%3B|%26)[^&#;\s'\"<>`])+", re.I)
_IN_WORDS = re.compile(rf"(\b\w*{_PASSWORD}['\"]?\s?[=:]\s?['\"]?)[^&#;,\s'\"<>`]+", re.I)
_SCHEME = "[a-z][a-z0-9+.-]{0,30}"
# Everything up to the next blank or URI: a password may hold any other sign.
_URI = re.compile(rf"({_SCHEME}://)((?:(?!{_SCHEME}://)\S)+)", re.I)
_ENCODED_URI = re.compile(rf"({_SCHEME}%3A%2F%2F)\S*%40", re.I)


def masked_uri(text: str) -> str:
    """A URI, or a text with some in it, with `***` for users, passwords and other secrets."""
    text = _URI.sub(lambda found: found[1] + _without_user(found[2]), text)
    text = _ENCODED_URI.sub(r"\1***%40", text)
    for secret in (_IN_QUERY, _IN_ENCODED, _IN_WORDS):
        text = secret.sub(r"\1***", text)
    return text


def _without_user(rest: str) -> str:
    """What follows `://`, with `***` before its last `@` where that ends a user."""
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # A password that was not encoded may hold a slash; then what stands before it is no port.
    is_cut = re.fullmatch(r"[^:]*:(?!\d*$).*", place) is not None
    if "@" not in rest or not ("@" in place or is_cut):
        return rest
    return f"***@{rest.rpartition('@')[2]}"
