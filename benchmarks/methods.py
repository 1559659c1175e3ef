"""How good is every method at 50 %, at 70 % and at 2:4, with uniform and outlier-weighed layers?

    python benchmarks/methods.py                      # all of it: hours on 2 cores
    python benchmarks/methods.py --seeds 0            # one draw of calibration text
    python benchmarks/methods.py --report             # only write the table anew

All methods see sequential statistics of the same calibration text. Every finished row is kept in
docs/results/methods.jsonl, so a second start goes on behind the last one; the table over all seeds
is docs/results/methods.md. Nothing is chosen by test text.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import append, read

from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.compare import SPLITS, RecipeRunner, finite_row
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import Settings, set_up, with_choices

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
RECIPES = ("magnitude", "wanda", "ria", "pruner_zero", "isc", "sparsegpt", "admm")
ALLOCATIONS = ("uniform", "owl")
# What is asked for: sparsity and pattern.
TARGETS = ((0.5, "free"), (0.7, "free"), (0.5, "2:4"))
# Columns of the table: sparsity, pattern and allocation.
COLUMNS = {
    "50 %": (0.5, "free", "uniform"),
    "50 % owl": (0.5, "free", "owl"),
    "70 %": (0.7, "free", "uniform"),
    "70 % owl": (0.7, "free", "owl"),
    "2:4": (0.5, "2:4", "uniform"),
}
EVALUATION_TOKENS = 4096
TEST_TOKENS = 8192
KEYS = ("recipe", "allocate", "sparsity", "pattern", "seed", "calibration_tokens", "model")


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / "methods.jsonl"
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        seeds = list(map(int, arguments.seeds.split(",")))
        # The columns that everybody asks for are complete first.
        for allocate, seed in itertools.product(ALLOCATIONS, seeds):
            settings = Settings(
                calibration_tokens=arguments.calibration_tokens,
                evaluation_tokens=EVALUATION_TOKENS,
                test_tokens=TEST_TOKENS,
                seed=seed,
            )
            measure(arguments.model, settings, allocate, path)
    asked = (arguments.model, arguments.calibration_tokens)
    rows = [row for row in read(path) if (row["model"], row["calibration_tokens"]) == asked]
    text = "\n".join(report(rows))
    (RESULTS / "methods.md").write_text(text + "\n")
    print(text)


def wanted(allocate: str) -> Iterator[tuple[Recipe, float]]:
    """Every recipe with every target that the allocation can be had for, and its sparsity."""
    for sparsity, pattern in TARGETS:
        if pattern != "free" and allocate != "uniform":
            continue  # N:M takes the same share of every layer
        for name in RECIPES:
            choices = {"allocate": allocate, "statistics": "sequential"}
            yield with_choices(Recipe.load(name), pattern=pattern, **choices), sparsity


def measure(model: str, settings: Settings, allocate: str, path: Path) -> None:
    """Append the rows of one seed and allocation that the file does not hold yet."""
    done = {key_of(row) for row in read(path)}
    missing = [
        job for job in wanted(allocate) if key_of(head_of(model, settings, *job)) not in done
    ]
    dense_head = head_of(model, settings, Recipe.load("magnitude"), 0.0) | {"recipe": "dense"}
    if not missing and key_of(dense_head) in done:
        return
    testbed = set_up(model, "demo", settings, dtype="float32")
    layers = find_linears(testbed.language_model.model)
    sums = testbed.statistics(layers, dense_sums([recipe for recipe, _ in missing]), told)
    runner = RecipeRunner(testbed, sums)
    if key_of(dense_head) not in done:
        write(path, runner.dense_row(SPLITS) | dense_head)
    for recipe, sparsity in missing:
        begin = time.perf_counter()
        row = runner.row(recipe, sparsity, SPLITS)
        write(path, row | head_of(model, settings, recipe, sparsity))
        print(f"  {time.perf_counter() - begin:.0f} s with evaluation", flush=True)


def head_of(model: str, settings: Settings, recipe: Recipe, sparsity: float) -> dict[str, Any]:
    """What tells a row from every other."""
    return {
        "recipe": recipe.name,
        "allocate": recipe.allocate.word,
        "sparsity": sparsity,
        "pattern": recipe.pattern,
        "seed": settings.seed,
        "calibration_tokens": settings.calibration_tokens,
        "model": model,
    }


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The values of `KEYS`."""
    return tuple(row[key] for key in KEYS)


def write(path: Path, row: dict[str, Any]) -> None:
    """Append and tell one row."""
    # Hours of background work are paused and share the machine: their seconds say nothing.
    left_out = ("seconds", "window_losses")
    kept = {key: value for key, value in finite_row(row).items() if key not in left_out}
    append(path, kept)
    print(
        f"{row['recipe']} {row['allocate']} {row['sparsity']} {row['pattern']} seed {row['seed']}: "
        f"validation {row['validation_perplexity']:.2f}, test {row['test_perplexity']:.2f}",
        flush=True,
    )


def told(what: str, done: int, total: int) -> None:
    """Progress of the dense statistics, now and then."""
    if done == total or done % 32 == 0:
        print(f"  {what} {done}/{total}", flush=True)


def report(rows: list[dict[str, Any]]) -> list[str]:
    """The table as Markdown: mean and spread (largest minus smallest) over seeds."""
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    one = rows[0]
    lines = [
        "# Methods under equal conditions",
        "",
        f"{one['model']}, windows of {one['sequence_length']} tokens, sequential statistics from "
        f"{one['calibration_tokens']} tokens, seeds {seeds}; {EVALUATION_TOKENS} tokens of "
        f"validation and {TEST_TOKENS} of test text; made by `python benchmarks/methods.py`. "
        "A cell is the mean over seeds and in brackets the largest minus the smallest; a cell "
        "without brackets has one seed, or the same result for all; - was not measured yet.",
        "",
    ]
    for split in SPLITS:
        dense = [row[f"{split}_perplexity"] for row in rows if row["recipe"] == "dense"]
        lines += [f"Perplexity on {split} text (dense {_shown(dense)}):", ""]
        lines += [*table(rows, split), ""]
    return lines


def table(rows: list[dict[str, Any]], split: str) -> list[str]:
    """The table of one split."""
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        value = row[f"{split}_perplexity"]
        place = (row["sparsity"], row["pattern"], row["allocate"])
        found[row["recipe"], place].append(float("nan") if value is None else value)
    lines = ["| recipe | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name in RECIPES:
        cells = [_shown(found.get((name, column), [])) for column in COLUMNS.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def _shown(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    digits = 0 if mean >= 1000 else 1
    shown, spread = (f"{value:.{digits}f}" for value in (mean, max(values) - min(values)))
    return f"{shown} ({spread})" if float(spread) else shown


if __name__ == "__main__":
    main()
