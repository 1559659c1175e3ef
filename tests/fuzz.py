"""Does any formula, tree, recipe, space or pattern hang, eat memory, or end in a traceback?

`python -m tests.fuzz --inputs 1000000 --seed 0` reads that many random inputs, each of them a
function of its number, so that a run goes on where an earlier one stopped: `--seed` is the first
number. It prints the slowest (CPU seconds), the largest growth of memory, and every input that took
more than is allowed, or ended otherwise than by an answer or an error of ours.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunezero.errors import FormulaWarning, PruneZeroError
from prunezero.formula import FEATURES, OPERATORS, Criterion
from prunezero.formula.code import torch_lines
from prunezero.formula.ranking import ranking_form
from prunezero.models.anatomy.patterns import check_pattern
from prunezero.pruning.recipes.documents import to_yaml
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.words import WORDS
from prunezero.searching.spaces.space import SearchSpace
from tests.formula.grammar import EXPONENTS, random_text

SECONDS, BYTES = 0.5, 200 * 2**20
# What stands between the words of a formula, and outside every formula.
SIGNS = [
    *"+-*/(),. ",
    "**",
    "**(-8)",
    "**0.123457",
    "999999",
    "1e-12",
    "e9",
    "(" * 20,
    "0",
    "-" * 9,
]
NUMBERS = (0, 1, 2, -1, 0.5, 8, 10**6, 10**12, 10**40, 1e308, -1e-300, 16, 64, 255)
PIECES = [
    "(",
    ")",
    "*",
    "+",
    "?",
    "{0,9}",
    "{999}",
    "[a-z_.0-9]",
    ".",
    "|",
    "a",
    "q_proj",
    r"\d",
    "^",
    "$",
]
PIECES += ["(?:", "(?=", r"\1", "layers", "[", "]", "(a|aa)", ".*"]


def formula(rng: random.Random) -> Callable[[Path], object]:
    few = rng.sample(list(FEATURES), rng.randint(1, 3))
    text = random_text(
        rng,
        rng.randint(1, 7),
        features=few if rng.random() < 0.7 else tuple(FEATURES),
        operators=rng.sample(list(OPERATORS), rng.randint(2, 9)),
        exponents=(*EXPONENTS, 7.654321, 0.000123),
    )
    return lambda folder: read(text)


def mutated(rng: random.Random) -> Callable[[Path], object]:
    words = [random_text(rng, rng.randint(1, 5)) for _ in range(rng.randint(1, 3))]
    text = rng.choice(SIGNS).join(words)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(text) + 1)
        new = rng.choice([*SIGNS, *FEATURES, *OPERATORS, text[place : place + 9]])
        text = text[:place] + new + text[place + rng.randint(0, 3) :]
    return lambda folder: read(text)


def read(text: str) -> object:
    """All that is done with a formula without weights."""
    return work(Criterion.parse(text))


def work(criterion: Criterion) -> object:
    again = Criterion.parse(criterion.text)
    assert again == criterion and again.sympy == criterion.sympy, f"not read back: {criterion}"
    for group in ("row", "model"):
        ranking_form(criterion.sympy, group)
    return criterion.latex, criterion.complexity, criterion.fingerprint, torch_lines(criterion)


def tree(rng: random.Random) -> Callable[[Path], object]:
    words = "W X G neg abs sqr pow sqrt exp tanh skp mms zsn log add sub mul div".split()

    def grown(depth: int) -> Any:
        if depth == 0 or rng.random() < 0.1:
            return {"data": rng.choice("WXG")} if rng.random() < 0.98 else rng.choice([3, None, []])
        sides = {side: grown(depth - 1) for side in ("left", "right") if rng.random() < 0.7}
        return {"data": rng.choice(words), **sides}

    text = json.dumps(grown(rng.randint(0, 18)))[: 80 * 1024]

    def load(folder: Path) -> object:
        path = folder / "tree.json"
        path.write_text(text)
        return work(Recipe.load(path).criterion)

    return load


def value(rng: random.Random) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(NUMBERS),
        lambda: random_text(rng, 2),
        lambda: rng.choice(["2:4", "999999:1000000", "none", "uniform", "128 columns", "", "~"]),
        lambda: [value(rng) for _ in range(rng.randint(0, 3))],
        lambda: {random_word(rng): value(rng)},
        lambda: True,
        lambda: "".join(chr(rng.choice([9, 10, 32, 58, 133, 8232, 65279])) for _ in range(4)),
        lambda: [0] * rng.choice([1, 300, 5000]),
    ]
    return rng.choice(kinds)()


def random_word(rng: random.Random) -> str:
    words = [word for arrow in WORDS.values() for word in arrow]
    return str(
        rng.choice([*words, "steps", "iterations", "sequences", "ratios", "re:.*", "q_proj"])
    )


def document(kind: Any, start: dict[str, Any]) -> Callable[[random.Random], Any]:
    keys = [row.alias or name for name, row in kind.model_fields.items()]

    def make(rng: random.Random) -> Callable[[Path], object]:
        fields = dict(start)
        for _ in range(rng.randint(1, 4)):
            fields[rng.choice([*keys, "other"])] = value(rng)
        text = to_yaml(fields)
        if rng.random() < 0.3:
            place = rng.randrange(len(text))
            text = (
                text[:place]
                + rng.choice(["[" * 99, "&a ", "*a", ":", "\n", "!!x ", "\t"])
                + text[place:]
            )

        def load(folder: Path) -> object:
            path = folder / "document.yaml"
            path.write_text(text, encoding="utf-8", errors="replace")
            return kind.load(path)

        return load

    return make


def pattern(rng: random.Random) -> Callable[[Path], object]:
    text = "re:" + "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 14)))
    return lambda folder: check_pattern(text)


SPACE = {"name": "a", "terminals": ["abs(W)", "X"], "operators": ["add", "mul"]}
# How often each kind is drawn, of a thousand.
KINDS: dict[str, tuple[int, Callable[[random.Random], Callable[[Path], object]]]] = {
    "formula": (550, formula),
    "mutated text": (250, mutated),
    "tree": (120, tree),
    "recipe": (50, document(Recipe, {"name": "a", "criterion": "abs(W)"})),
    "space": (25, document(SearchSpace, SPACE)),
    "pattern": (5, pattern),
}


@dataclass
class Report:
    """What came of the inputs."""

    inputs: Counter[str] = field(default_factory=Counter)
    # CPU seconds, bytes, and the input of each
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")
    faults: list[str] = field(default_factory=list)


class _TooLong(BaseException):
    pass


def _stop(*_: object) -> None:
    raise _TooLong


def run(
    first: int, count: int, *, at_most: float = float("inf"), seconds: float = SECONDS
) -> Report:
    """Read the inputs of these numbers, or as many as `at_most` CPU seconds allow.

    Args:
        seconds: of CPU, from which on an input is a fault.
    """
    report, begin = Report(), time.process_time()
    weights = [weight for weight, _ in KINDS.values()]
    before = signal.signal(signal.SIGPROF, _stop)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FormulaWarning)
        for number in range(first, first + count):
            rng = random.Random(number)
            kind = rng.choices(list(KINDS), weights)[0]
            _one(f"{kind} {number}", KINDS[kind][1](rng), Path(folder), report, seconds)
            report.inputs[kind] += 1
            if time.process_time() - begin > at_most:
                break
    signal.signal(signal.SIGPROF, before)
    return report


def _one(
    name: str, load: Callable[[Path], object], folder: Path, report: Report, most: float
) -> None:
    memory, start = _memory(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 20)
    try:
        load(folder)
    except PruneZeroError as error:
        if len(str(error)) > 20_000:
            report.faults.append(f"{name}: an error of {len(str(error))} characters")
    except (Exception, _TooLong) as error:
        report.faults.append(f"{name}: {type(error).__name__}: {error!s:.200}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, grown = time.process_time() - start, _memory() - memory
    report.slowest = max(report.slowest, (seconds, name))
    report.largest = max(report.largest, (grown, name))
    if seconds > most or grown > BYTES:
        report.faults.append(f"{name}: {seconds:.2f} CPU seconds, {grown / 2**20:.0f} MiB")


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Read as many as asked for, a report after each ten thousand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    chosen = parser.parse_args()
    end = chosen.seed + chosen.inputs
    for first in range(chosen.seed, end, 10_000):
        begin = time.process_time()
        report = run(first, min(10_000, end - first))
        (seconds, slow), (grown, large) = report.slowest, report.largest
        print(
            f"{first}: {sum(report.inputs.values())} inputs {dict(report.inputs)} in "
            f"{time.process_time() - begin:.0f} CPU seconds; slowest {seconds:.3f} ({slow}), "
            f"largest {grown / 2**20:.1f} MiB ({large}); {len(report.faults)} faults",
            flush=True,
        )
        for fault in report.faults:
            print(f"  {fault}", flush=True)


if __name__ == "__main__":
    main()
