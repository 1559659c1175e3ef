"""How does a command end that something went wrong with? In a sentence and an exit code.

All commands end here, whatever raised. What the output does not take (a full disk, a reader that
left) is noted, and does not end the work: files and records are as they would have been.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import extract_tb, print_exception
from typing import Any, TextIO, cast

from prunezero.errors import PruneZeroError, masked_uri, printable, reason

# As shells report a program that SIGINT or SIGPIPE ended.
INTERRUPTED, READER_LEFT = 130, 141
# Shows the traceback of a fault of ours.
TRACEBACK = "PRUNEZERO_TRACEBACK"
# What our output holds beyond ASCII, for terminals that have no sign for it.
_IN_ASCII = {"…": "...", "•": "*", "–": "-", "—": "-", "’": "'", "“": '"', "”": '"', "≥": ">="}
_IN_ASCII |= {"→": "->", "×": "x", "é": "e", "≤": "<=", "━": "-", "─": "-", "│": "|"}


@contextmanager
def guarded() -> Iterator[None]:
    """Within it, nothing ends the program but by a sentence on standard error and an exit code.

    Exit codes: 1 for what the user can mend and for faults of ours, 130 for Ctrl-C, 141 where
    nobody reads on, and that of `SystemExit`.
    """
    _fill_streams()
    before = sys.stdout, sys.stderr
    out, errors = Outlet(sys.stdout), Outlet(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, errors)
    code = 0
    try:
        yield
    except SystemExit as error:
        code = _code_of(error)
    except BaseException as error:
        code = _ended_by(error)
    try:
        out.flush()
        code = code or _lost(out)
        errors.flush()
    finally:
        sys.stdout, sys.stderr = before
    if code:
        sys.exit(code)


class Outlet:
    """An output that writes as long as it can, and notes the first fault instead of raising it.

    Signs that its encoding lacks are written in ASCII.
    """

    def __init__(self, stream: TextIO | None) -> None:
        # Python sets None where the program was started with the output closed.
        self._stream = stream if stream is not None else _nowhere()
        self.fault: Exception | None = None if stream is not None else OSError(9, None)
        if isinstance(self._stream, io.TextIOWrapper):
            with suppress(OSError, ValueError):
                self._stream.reconfigure(errors=_ASCII)

    def write(self, text: str) -> int:
        """As `TextIO.write`, but for what it raises."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As `TextIO.flush`, but for what it raises."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, deed: Callable[[], object]) -> None:
        try:
            deed()
        # A closed file is a ValueError.
        except (OSError, ValueError) as error:
            self.fault = self.fault or error
            self._redirect()

    def _redirect(self) -> None:
        """Let go what is buffered and what follows, or Python tries it again at its end."""
        with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream.flush()


def _fill_streams() -> None:
    """Open what is closed of standard input, output and error.

    Else the next file that is opened takes their place, and gets what libraries print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _nowhere() -> TextIO:
    return open(os.devnull, "w")


def _lost(out: Outlet) -> int:
    """Exit code of a command that did its work, but for what its output did not take."""
    if out.fault is None:
        return 0
    if isinstance(out.fault, BrokenPipeError):
        return READER_LEFT
    say_aside(f"the output could not be written ({reason(out.fault)}); the rest was done")
    return 1


def _ended_by(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        say_aside("stopped")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return READER_LEFT
    if os.environ.get(TRACEBACK):
        print_exception(error)
    say_aside(_sentence(error))
    return 1


def _sentence(error: BaseException) -> str:
    if isinstance(error, PruneZeroError):
        return str(error)
    if isinstance(error, OSError):
        return f"{reason(error)}{_spot(error)}"
    # torch has one of this name for GPUs, and a RuntimeError for processors.
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_memory or "not enough memory" in str(error) or "can't allocate memory" in str(error):
        return (
            f"the memory does not suffice ({reason(error)}); use less text "
            "(--calibration-tokens), shorter windows (--sequence-length) or a smaller model"
        )
    if isinstance(error, RecursionError):
        return f"what was given is nested too deeply{_spot(error)}; make it flatter"
    return (
        f"{type(error).__name__}: {reason(error)}{_spot(error)}; this is a fault of prunezero, "
        f"please report it with what {TRACEBACK}=1 shows"
    )


def _spot(error: BaseException) -> str:
    """Where in our code it happened."""
    ours = Path(__file__).parent.parent
    spots = [
        one for one in extract_tb(error.__traceback__) if Path(one.filename).is_relative_to(ours)
    ]
    return f" (in {Path(spots[-1].filename).name}, line {spots[-1].lineno})" if spots else ""


def say_aside(sentence: str) -> None:
    """One sentence of ours on standard error."""
    print(f"prunezero: {printable(masked_uri(sentence))}", file=sys.stderr)


def _code_of(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    say_aside(str(error.code))
    return 1


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What stands for signs that an encoding lacks; an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    plain = "".join(
        _IN_ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs
    )
    return plain, error.end


_ASCII = "prunezero-in-ascii"
codecs.register_error(_ASCII, _in_ascii)
