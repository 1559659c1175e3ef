"""How many measurements does a search need to find what plain genetic programming finds?

    python benchmarks/search_efficiency.py             # all of it: many hours on 2 cores
    python benchmarks/search_efficiency.py --space width --patterns free:0.2 --sequence-length 256
    python benchmarks/search_efficiency.py --report    # only write the table and the picture anew

`plain-gp` is Pruner-Zero's search as published, in its own space; its budget counts evaluations,
one for every formula. The others search the space `formulas`, start from published formulas where
they know how to (`evolution-from-scratch` does not), and end after some perplexities on all search
text. All of a pattern share one journal of answers, so that no recipe is measured twice, and a
second start goes on where the first was stopped. Every finished run is a line of
docs/results/search_efficiency.jsonl; docs/results/search_efficiency.md is the table, and
docs/results/search_efficiency.png the picture, of all lines under these settings. Another space has
files of its own, such as search_efficiency_width.md; in a space of whole units all strategies, the
reference too, search that space, and what is charged are the same perplexities.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from efficiency_report import REFERENCE, STRATEGIES, draw, report
from rows import append, read

from prunezero.pruning.testbed import Settings, Testbed, set_up
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.evaluation.rungs import Rungs
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.experiment.provenance import conditions
from prunezero.searching.experiment.task import Task
from prunezero.searching.search import search
from prunezero.searching.session import make_task
from prunezero.searching.spaces.space import SearchSpace

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
SCRATCH = "-from-scratch"
KEYS = (
    *("model", "dtype", "text", "pattern", "sparsity", "strategy", "seed", "limit"),
    "evaluation_tokens",
)
USUAL = "formulas"
# Rows stand in one report where these are the same.
SETTINGS = ("model", "dtype", "text", "evaluation_tokens")


def main() -> None:
    """Run what is missing, then write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--space", default=USUAL, choices=[USUAL, "width", "neurons", "heads"])
    parser.add_argument("--patterns", nargs="+", default=["free:0.5", "2:4"])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--evaluations", type=int, default=300, help="of plain-gp")
    parser.add_argument("--ours", type=int, default=40, help="perplexities of each other strategy")
    parser.add_argument("--evaluation-tokens", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=Path("runs/search_efficiency"))
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--model", default="demo", help=argparse.SUPPRESS)
    parser.add_argument("--text", default="demo", help=argparse.SUPPRESS)
    parser.add_argument("--sequence-length", type=int, default=256, help=argparse.SUPPRESS)
    parser.add_argument("--calibration-tokens", type=int, default=8192, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = "search_efficiency" + ("" if arguments.space == USUAL else f"_{arguments.space}")
    path = arguments.results / f"{stem}.jsonl"
    heads = list(wanted(arguments))
    if not arguments.report:
        for pattern, group in itertools.groupby(heads, lambda head: head["pattern"]):
            run_pattern(arguments, pattern, list(group), path)
    rows = shown(read(path), heads[0])
    if not any(row["strategy"] == REFERENCE for row in rows):
        raise SystemExit(f"{path} holds no finished run of {REFERENCE} to compare with")
    text = "\n".join(report(rows))
    path.with_suffix(".md").write_text(text + "\n")
    draw(rows, path.with_suffix(".png"))
    print(text)


def wanted(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What tells every run that is asked for from the others, the first seed of all first."""
    for word in arguments.patterns:
        pattern, sparsity = ("free", float(word[5:])) if word.startswith("free:") else (word, None)
        for seed, strategy in itertools.product(range(arguments.seeds), arguments.strategies):
            is_reference = strategy == REFERENCE
            yield {
                "model": arguments.model,
                "dtype": arguments.dtype,
                "text": arguments.text,
                **({} if arguments.space == USUAL else {"space": arguments.space}),
                "pattern": pattern,
                "sparsity": sparsity,
                "strategy": strategy,
                "seed": seed,
                "limit": arguments.evaluations if is_reference else arguments.ours,
                "evaluation_tokens": arguments.evaluation_tokens,
            }


def shown(rows: list[dict[str, Any]], like: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows under the same settings, of runs that differ in their limit the longest."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: int(row["limit"])):
        if all(row[name] == like[name] for name in SETTINGS):
            found[tuple(row[key] for key in KEYS if key != "limit")] = row
    return list(found.values())


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The values of `KEYS`."""
    return tuple(row[key] for key in KEYS)


def run_pattern(
    arguments: argparse.Namespace, pattern: str, heads: list[dict[str, Any]], path: Path
) -> None:
    """Append the lines of one pattern that the file does not hold yet."""
    done = {key_of(row) for row in read(path)}
    missing = [head for head in heads if key_of(head) not in done]
    if not missing:
        return
    settings = Settings(
        sequence_length=arguments.sequence_length,
        calibration_tokens=arguments.calibration_tokens,
        evaluation_tokens=arguments.evaluation_tokens,
        test_tokens=arguments.sequence_length,
    )
    testbed = set_up(arguments.model, arguments.text, settings, dtype=arguments.dtype)
    # Holds every feature of the reference's space as well, and answers alike for both.
    task = task_of({**missing[0], "strategy": "evolution", "seed": 0}, testbed)
    name = f"{pattern}-{task.budgets[0].amount:g}-{arguments.dtype}".replace(":", "_")
    name += "" if arguments.space == USUAL else f"-{arguments.space}"
    folder = arguments.folder / name
    header = conditions(task.config, [testbed]) | {"features": list(task.space.features)}
    journal = Journal(folder / "journal.jsonl", header, resume=True)
    try:
        evaluator = Evaluator(task, [testbed])
        for head in missing:
            rungs = Counted(Rungs(for_task(evaluator, task_of(head, testbed)), journal))
            print(f"{pattern} {head['strategy']} seed {head['seed']}", flush=True)
            append(path, {**head, "points": list(points(rungs, head))})
    finally:
        journal.close()


def task_of(head: dict[str, Any], testbed: Testbed) -> Task:
    """What one run looks for, and where it starts."""
    is_reference = head["strategy"] == REFERENCE
    space = head.get("space", USUAL)
    config = SearchConfig.on(
        testbed,
        space_content=SearchSpace.load("pruner_zero" if is_reference and space == USUAL else space),
        sparsity=head["sparsity"],
        pattern=head["pattern"],
        seed=head["seed"],
        from_scratch=is_reference or head["strategy"].endswith(SCRATCH),
    )
    return make_task(config)


def for_task(evaluator: Evaluator, task: Task) -> Evaluator:
    """The same model on the same runner, asked by another search."""
    other = copy.copy(evaluator)
    other.task = task
    return other


class Counted:
    """Rungs that count the results they give and the seconds these took when computed.

    They ask one request at a time, since a strategy that forgets may ask the same twice at once.
    """

    def __init__(self, rungs: Rungs) -> None:
        self.uncounted = rungs
        self.task, self.probe = rungs.task, rungs.probe
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0

    def errors(self, rules: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """As those of the search."""
        for rule in rules:
            yield from self._counted("screened", self.uncounted.errors([rule]))

    def tunings(self, rules: Sequence[Any], trials: int) -> Iterator[dict[str, Any]]:
        """As those of the search."""
        for rule in rules:
            yield from self._counted("tuned", self.uncounted.tunings([rule], trials))

    def rows(self, recipes: Sequence[Any], splits: Sequence[str]) -> Iterator[dict[str, Any]]:
        """As those of the search."""
        for recipe in recipes:
            yield from self._counted(splits[0], self.uncounted.rows([recipe], splits))

    def _counted(self, what: str, answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for answer in answers:
            self.counts[what] += 1
            self.seconds += answer.get("elapsed", answer.get("seconds", 0.0))
            yield answer


def points(rungs: Counted, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Where the run stood each time that it found a better formula, and where it ended."""
    is_reference, limit = head["strategy"] == REFERENCE, head["limit"]
    seen: dict[int, float | None] = {}
    best: float = math.inf
    state: dict[str, Any] = {"search": None, "validation": None, "formula": ""}

    def charged() -> int:
        return len(seen) if is_reference else rungs.counts["search"]

    def point() -> dict[str, Any]:
        counts = rungs.counts
        return {
            "evaluations": charged(),
            "distinct": counts["search"],
            "glances": counts["glance"],
            "validations": counts["validation"],
            "screened": counts["screened"],
            "seconds": round(rungs.seconds, 1),
            **state,
        }

    for candidate in search(
        cast(Rungs, rungs),
        strategy=head["strategy"].removesuffix(SCRATCH),
        max_candidates=limit if is_reference else None,
        stop=lambda: not is_reference and charged() >= limit,
    ):
        value = candidate.search_perplexity
        seen[candidate.slot] = value
        if value is not None and value < best:
            best = value
            # No search is charged for this, nor chooses by it unless it asks itself.
            recipe = rungs.task.recipe(candidate.rule, "incumbent")
            row = next(rungs.uncounted.rows([recipe], ("validation",)))
            state = {
                "search": value,
                "validation": row.get("validation_perplexity"),
                "formula": candidate.rule.text,
            }
            yield point()
            print(f"  {charged()}: {value:.2f}  {candidate.rule.text}", flush=True)
    yield point()


if __name__ == "__main__":
    main()
