"""Do criteria that a search found hold against every published formula, on other draws of text?

    python benchmarks/found.py docs/results/found/*.yaml --dtype bfloat16   # what was found here
    python benchmarks/found.py runs/night                                   # what you found
    python benchmarks/found.py --report

Each recipe is measured beside the published ones at its own sparsity and pattern, on three draws of
calibration text, of which the search saw the first; after a search with `--draws 3`, take others by
`--first-seed 3`. Formulas all have dense statistics, pipelines those that they were published with.
A paired test compares windows of test text. Rows are kept in docs/results/found-TRACK.jsonl, the
table in found-TRACK.md beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rows import append, read

from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.compare import SPLITS, RecipeRunner, finite_row
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import Settings, set_up, with_choices
from prunezero.searching.evaluation.rung_correlation import chance_of_no_gain

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
RIVALS = {
    "formulas": ("magnitude", "wanda", "ria", "gblm", "pruner_zero", "obd", "fisher"),
    "pipelines": ("sparsegpt", "admm"),
}
# Published formulas where all layers compete, which their papers do not do: most of what a search
# gains at 50 % and 70 % comes from there.
WIDENED = ("obd", "fisher")
DRAWS = 3
# Rows stand in one table only where these are the same.
CONDITIONS = ("model", "dtype", "calibration_tokens", "test_tokens")


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of searches, or recipes")
    parser.add_argument("--track", choices=RIVALS, default="formulas")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--first-seed", type=int, default=0, help="of the draws, a multiple of 3")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / f"found-{arguments.track}.jsonl"
    files = [run / "recipe.yaml" if run.is_dir() else run for run in arguments.runs]
    found = [Recipe.load(file) for file in files]
    first = arguments.first_seed
    if first % DRAWS:
        parser.error(f"--first-seed {first}: a table holds draws from a multiple of {DRAWS} on")
    for seed in () if arguments.report else range(first, first + DRAWS):
        settings = Settings(
            calibration_tokens=arguments.calibration_tokens,
            test_tokens=arguments.test_tokens,
            seed=seed,
        )
        measure(arguments, settings, found, path)
    text = "\n".join(report(read(path), arguments.track))
    (RESULTS / f"found-{arguments.track}.md").write_text(text + "\n")
    print(text)


def measure(
    arguments: argparse.Namespace, settings: Settings, found: list[Recipe], path: Path
) -> None:
    """Append the rows of one draw of calibration text that the file does not hold yet."""
    jobs = []
    for recipe in found:
        sparsity = recipe.provenance["sparsity"]
        is_formula = arguments.track == "formulas"
        choices = {"pattern": recipe.pattern, "statistics": "dense" if is_formula else None}
        rivals = [with_choices(Recipe.load(name), **choices) for name in RIVALS[arguments.track]]
        if is_formula and recipe.pattern == "free":
            rivals += [widened(name) for name in WIDENED]
        jobs += [(one, sparsity) for one in (*rivals, recipe)]
    conditions = {"model": arguments.model, "dtype": arguments.dtype}
    conditions |= {key: getattr(settings, key) for key in ("calibration_tokens", "test_tokens")}
    known = {place_of(row) for row in read(path)}
    missing = [
        (recipe, sparsity)
        for recipe, sparsity in jobs
        if place_of(head_of(recipe, sparsity, settings) | conditions) not in known
    ]
    if not missing:
        return
    testbed = set_up(arguments.model, "demo", settings, dtype=arguments.dtype)
    layers = find_linears(testbed.language_model.model)
    runner = RecipeRunner(
        testbed, testbed.statistics(layers, dense_sums([one for one, _ in missing]))
    )
    for recipe, sparsity in missing:
        row = finite_row(runner.row(recipe, sparsity, SPLITS)) | conditions
        row |= head_of(recipe, sparsity, settings)
        append(path, row)
        print(
            recipe.name, sparsity, recipe.pattern, settings.seed, row["test_perplexity"], flush=True
        )


def widened(name: str) -> Recipe:
    """A published formula, with all layers in competition."""
    wide = with_choices(Recipe.load(name), statistics="dense", compare="model")
    return wide.model_copy(update={"name": f"{name}, all layers"})


def head_of(recipe: Recipe, sparsity: float, settings: Settings) -> dict[str, Any]:
    """What tells a row from every other of the same model."""
    return {
        "recipe": recipe.name,
        "formula": recipe.criterion.text,
        "sparsity": sparsity,
        "pattern": recipe.pattern,
        "seed": settings.seed,
    }


def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The place of a row in the file."""
    keys = ("recipe", "formula", "sparsity", "pattern", "seed", *CONDITIONS)
    return tuple(row[key] for key in keys)


def report(rows: list[dict[str, Any]], track: str) -> list[str]:
    """One table for each sparsity and pattern: mean over draws, spread, gain and its test."""
    lines = [f"# What searches found, track {track}", ""]
    targets: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        conditions = tuple(row[key] for key in CONDITIONS)
        draws = row["seed"] // DRAWS
        targets[(*conditions, row["sparsity"], row["pattern"], draws)].append(row)
    for (model, dtype, tokens, _, sparsity, pattern, _), inside in sorted(targets.items()):
        one = inside[0]
        seeds = sorted({row["seed"] for row in inside})
        lines += [
            f"## {model}, {sparsity:.0%}, pattern {pattern}",
            "",
            f"{dtype}, statistics from {tokens} tokens, dense where nothing else is said, "
            f"draws {seeds}; windows of {one['sequence_length']} tokens, "
            f"{len(one['window_losses']['test'])} of "
            "test text. Mean perplexity over draws and in brackets the largest minus the smallest. "
            "The chance of no gain is that of a one-sided Wilcoxon test over test windows, their "
            "losses averaged over draws, against the best published one on validation text.",
            "",
            "| recipe | formula | compares, choices | validation | test | against | gain on test "
            "| chance of no gain |",
            "|---|---|---|---|---|---|---|---|",
            *table(inside),
            "",
        ]
    return lines


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of one table, best on test text last."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"], row["formula"]].append(row)
    rivals = {name for names in RIVALS.values() for name in names}
    wide = {f"{name}, all layers" for name in WIDENED}
    means = {
        key: statistics.fmean(row["validation_perplexity"] or float("inf") for row in found)
        for key, found in groups.items()
    }
    published = [key for key in groups if key[0] in rivals]
    best = min(published, key=lambda key: means[key])
    lines = []
    for key, found in groups.items():
        gain, chance = "", ""
        if key[0] not in rivals | wide:
            mine, theirs = (losses(groups[one]) for one in (key, best))
            gain = f"{test_mean(found) / test_mean(groups[best]) - 1:+.1%}"
            chance = f"{chance_of_no_gain(mine, theirs):.1g}"
        cells = [shown(found, split) for split in SPLITS]
        against = best[0] if gain else ""
        lines.append(
            f"| {key[0]} | `{key[1]}` | {around(found[0])} | {cells[0]} | {cells[1]} "
            f"| {against} | {gain} | {chance} |"
        )
    return lines


def around(row: dict[str, Any]) -> str:
    """Who competes, formulas of some layers, and the choices that are not the usual ones."""
    words = {"uniform": row["allocate"], "none": row["update"], "dense": row["statistics"]}
    own = [f"`{row['criteria']}`"] if row.get("criteria") else []
    return "; ".join([row["compare"], *own, *(one for usual, one in words.items() if one != usual)])


def losses(rows: list[dict[str, Any]]) -> list[float]:
    """Nats per token of every test window, the mean over draws."""
    draws = [row["window_losses"]["test"] for row in rows]
    return [statistics.fmean(window) for window in zip(*draws, strict=True)]


def test_mean(rows: list[dict[str, Any]]) -> float:
    """Mean test perplexity over draws."""
    return statistics.fmean(row["test_perplexity"] for row in rows)


def shown(rows: list[dict[str, Any]], split: str) -> str:
    """Mean over draws, and the spread."""
    values = [row[f"{split}_perplexity"] or float("nan") for row in rows]
    mean = statistics.fmean(values)
    digits = 0 if mean >= 1000 else 1
    return f"{mean:.{digits}f} ({max(values) - min(values):.{digits}f})"


if __name__ == "__main__":
    main()
