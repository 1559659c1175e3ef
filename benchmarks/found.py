"""Do recipes that a search found hold on other draws of text, and what is their formula's merit?

    python benchmarks/found.py docs/results/found/*.yaml --dtype bfloat16   # what was found here
    python benchmarks/found.py runs/night                                   # what you found
    python benchmarks/found.py --report                                     # only the table anew

Each recipe is measured at its own sparsity and pattern, on draws of calibration text of which its
search saw the first; `--first-seed 3` takes others. Beside it stand the published recipes, each
twice: as published (formulas by the same dense statistics), and with all choices of the found
recipe around the rival's formula, since a search that lets all layers compete or mends weights owes
much of its gain to that. A paired test over windows of test text holds the found recipe against the
stronger of the two. Recipes that do the same are measured once. Finished rows are kept in
docs/results/found.jsonl, so a second start goes on behind the last one; docs/results/found.md is
the table.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from found_report import CONDITIONS, DRAWS, report
from found_rivals import Contender, contenders
from pruning import cpu_name
from rows import append, read

from prunezero.errors import PruneZeroError
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.compare import SPLITS, RecipeRunner, finite_row
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import Settings, set_up

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
# What tells a row from every other under the same conditions.
PLACE = ("role", "recipe", "formula", "choices", "sparsity", "pattern", "seed")

Row = dict[str, Any]


def main(words: list[str] | None = None) -> None:
    """Measure what is missing, then write the table."""
    arguments = parsed(words)
    path = arguments.results / "found.jsonl"
    files = [run / "recipe.yaml" if run.is_dir() else run for run in arguments.runs]
    found = [Recipe.load(file) for file in files]
    first = arguments.first_seed
    for seed in () if arguments.report else range(first, first + arguments.draws):
        settings = Settings(
            sequence_length=arguments.sequence_length,
            calibration_tokens=arguments.calibration_tokens,
            evaluation_tokens=arguments.evaluation_tokens,
            test_tokens=arguments.test_tokens,
            seed=seed,
        )
        measure(arguments, settings, found, path)
    text = "\n".join(report(read(path)))
    path.with_suffix(".md").write_text(text + "\n")
    print(text)


def parsed(words: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="folders of searches, or recipes")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--evaluation-tokens", type=int, default=4096)
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--first-seed", type=int, default=0, help="of the draws")
    parser.add_argument("--draws", type=int, default=DRAWS, help="how many")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args(words)
    arguments.cpu = cpu_name()
    return arguments


def measure(
    arguments: argparse.Namespace, settings: Settings, found: list[Recipe], path: Path
) -> None:
    """Append the rows of one draw of calibration text that the file does not hold yet."""
    conditions = {key: getattr(arguments, key) for key in CONDITIONS}
    known = {place_of(row): row for row in read(path)}
    missing: dict[tuple[Any, ...], tuple[Contender, Row]] = {}
    for recipe in found:
        for one in contenders(recipe):
            head = head_of(one, recipe, settings.seed) | conditions
            if place_of(head) not in known:
                missing.setdefault(place_of(head), (one, head))
    if not missing:
        return
    torch.set_num_threads(arguments.threads)
    testbed = set_up(arguments.model, arguments.text, settings, dtype=arguments.dtype)
    linears = find_linears(testbed.language_model.model)
    recipes = [one.recipe for one, _ in missing.values() if one.recipe is not None]
    runner = RecipeRunner(testbed, testbed.statistics(linears, dense_sums(recipes)))
    for one, head in missing.values():
        row = row_of(one, head, runner, list(known.values()))
        append(path, row)
        known[place_of(row)] = row
        print(told(row), flush=True)


def head_of(one: Contender, found: Recipe, seed: int) -> Row:
    """What a row says before it is measured."""
    return {
        "role": one.role,
        "recipe": one.name,
        "formula": one.formula,
        "choices": one.choices,
        "sparsity": found.provenance["sparsity"],
        "pattern": found.pattern,
        "seed": seed,
        "ranks_as": one.ranks_as,
    }


def row_of(one: Contender, head: Row, runner: RecipeRunner, known: list[Row]) -> Row:
    """The row of a contender: measured, copied from one that does the same, or refused."""
    if one.recipe is None:
        return head | {"refused": one.refused}
    alike = (*CONDITIONS, "sparsity", "seed", "ranks_as")
    for row in known:
        if all(row.get(key) == head[key] for key in alike) and "refused" not in row:
            return row | head | {"measured_as": row.get("measured_as", row["recipe"])}
    try:
        row = finite_row(runner.row(one.recipe, head["sparsity"], SPLITS))
    except PruneZeroError as error:
        return head | {"refused": str(error)}
    # Seconds of work beside other work say nothing.
    kept = ("window_losses", "kl", "sparsity_reached", "calibration_tokens", "sequence_length")
    measured = {key: row[key] for key in (*kept, *(f"{split}_perplexity" for split in SPLITS))}
    return measured | head


def place_of(row: Row) -> tuple[Any, ...]:
    """The place of a row in the file."""
    return tuple(row.get(key) for key in (*PLACE, *CONDITIONS))


def told(row: Row) -> str:
    """One row for reading."""
    found = row.get("refused") or row["test_perplexity"]
    words = [row[key] for key in ("recipe", "role", "sparsity", "pattern", "seed")]
    copied = [f"as {row['measured_as']}"] if "measured_as" in row else []
    return " ".join(map(str, [*words, found, *copied]))


if __name__ == "__main__":
    main()
