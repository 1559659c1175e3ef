"""How good are recipes that remove neurons, key-value groups, sub-blocks and layers?

    python benchmarks/units.py                         # all of it: hours on 2 cores
    python benchmarks/units.py --shares 0.2 --draws 1  # one share, one draw of calibration text
    python benchmarks/units.py --recipes flap,mask_fisher
    python benchmarks/units.py --report                # only the table and the picture anew

Every recipe of `baselines/` that removes whole units is measured as published, and with its columns
refitted where it does not do that by itself; each loses the same share of the parameters of all
blocks, norms aside. Beside perplexity and KL stands what is left: parameters, FLOPs, bytes of keys
and values. Finished rows are kept in docs/results/units.jsonl, so a second start goes on behind the
last one; docs/results/units.md is the table, units.png the picture. Nothing is chosen by test text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conditions import add_conditions, settings_of
from pruning import cpu_name
from rows import append, read
from units_report import CONDITIONS, draw, report

from prunezero.errors import PruneZeroError
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.compare import SPLITS, RecipeRunner, finite_row
from prunezero.pruning.recipes.recipe import Recipe, published_recipes
from prunezero.pruning.recipes.staged import AnyRecipe, load_recipe, recipes_of
from prunezero.pruning.requirements import checked_groups, dense_sums
from prunezero.pruning.testbed import Testbed, set_up, with_choices

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
# What tells a row from every other under the same conditions.
PLACE = ("recipe", "update", "share", "seed")
KEPT = (
    *("window_losses", "kl", "removed", "unit", "units", "units_removed", "seconds"),
    *("parameters", "parameters_without_embeddings", "flops", "kv_bytes"),
)

Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, then write the table and draw the picture."""
    arguments = parsed()
    path = RESULTS / "units.jsonl"
    for seed in range(0 if arguments.report else arguments.draws):
        measure(arguments, seed, path)
    rows = read(path)
    path.with_suffix(".md").write_text("\n".join(report(rows)) + "\n")
    draw(rows, path.with_suffix(".png"))
    print(path.with_suffix(".md").read_text())


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--recipes", default="", help="names or files, by commas; else all")
    parser.add_argument("--shares", default="0.1,0.2,0.3", help="of block parameters, by commas")
    add_conditions(parser, calibration_tokens=16384, evaluation_tokens=8192)
    arguments = parser.parse_args()
    arguments.cpu = cpu_name()
    return arguments


def measure(arguments: argparse.Namespace, seed: int, path: Path) -> None:
    """Append the rows of one draw of calibration text that the file does not hold yet."""
    conditions = {key: getattr(arguments, key) for key in (*CONDITIONS, "threads", "cpu")}
    known = {place_of(row) for row in read(path)}
    shares = [float(share) for share in arguments.shares.split(",")]
    missing = []
    for recipe, share in wanted(arguments.recipes, shares):
        head = {"recipe": recipe.name, "update": update_of(recipe), "share": share, "seed": seed}
        if place_of(head | conditions) not in known:
            missing.append((recipe, share, head | conditions))
    if not missing:
        return
    torch.set_num_threads(arguments.threads)
    testbed = set_up(arguments.model, arguments.text, settings_of(arguments, seed), dtype="float32")
    linears = find_linears(testbed.language_model.model)
    sums = testbed.statistics(linears, dense_sums([recipes_of(one)[0] for one, _, _ in missing]))
    runner = RecipeRunner(testbed, sums)
    dense = {"recipe": "dense", "update": "", "share": 0.0, "seed": seed} | conditions
    if place_of(dense) not in known:
        measured = finite_row(runner.dense_row(SPLITS, with_costs=True))
        append(path, dense | kept_of(measured))
    for recipe, share, head in missing:
        row = head | measured_row(testbed, runner, recipe, share)
        append(path, row)
        print(told(row), flush=True)


def wanted(names: str, shares: list[float]) -> Iterator[tuple[AnyRecipe, float]]:
    """Each recipe as published, and with its columns refitted, at each share."""
    chosen = [load_recipe(name) for name in names.split(",") if name] or [
        recipe
        for recipe in map(load_recipe, published_recipes())
        if not recipe.unit.is_usual
        and not any(one.unit.row.domain.is_run_time for one in recipes_of(recipe))
    ]
    for share in shares:
        for recipe in chosen:
            yield recipe, share
            if refitted := with_refit(recipe):
                yield refitted, share


def with_refit(recipe: AnyRecipe) -> AnyRecipe | None:
    """The recipe with its columns refitted; None where it does that, or where nothing can be."""
    # The updates of several stages differ.
    if not isinstance(recipe, Recipe) or "refit" in recipe.updates:
        return None
    updates = ["refit", *recipe.updates]
    try:
        return with_choices(recipe, update=updates)
    except PruneZeroError:
        return None


def update_of(recipe: AnyRecipe) -> str:
    """The updates in words."""
    words = dict.fromkeys(word for one in recipes_of(recipe) for word in one.updates)
    return ", ".join(words) or "none"


def measured_row(testbed: Testbed, runner: RecipeRunner, recipe: AnyRecipe, share: float) -> Row:
    """What a recipe leaves when so much of the blocks' parameters goes, or why it cannot."""
    try:
        amount = share_of_units(testbed, recipe, share)
        row = finite_row(runner.row(recipe, amount, SPLITS, with_costs=True))
    except PruneZeroError as error:
        return {"refused": str(error)}
    return {"amount": amount} | kept_of(row)


def share_of_units(testbed: Testbed, recipe: AnyRecipe, share: float) -> float:
    """The share of what such units have that is this share of all blocks' parameters."""
    if not isinstance(recipe, Recipe):
        # Their sparsity is that share already.
        return share
    language_model = testbed.language_model
    groups = checked_groups(language_model, recipe, 0.0)
    weights = sum(linear.weight.numel() for linear in find_linears(language_model.model))
    return share * weights / sum(group.cost_of("weights") * group.units for group in groups)


def kept_of(row: Row) -> Row:
    """What is kept of a row of results."""
    perplexities = {key: row[key] for key in row if key.endswith("_perplexity")}
    return {key: row[key] for key in KEPT if key in row} | perplexities


def place_of(row: Row) -> tuple[Any, ...]:
    """The place of a row in the file."""
    return tuple(row.get(key) for key in (*PLACE, *CONDITIONS))


def told(row: Row) -> str:
    """One row for reading."""
    found = row.get("refused") or f"{row['validation_perplexity']:.2f} {row['test_perplexity']:.2f}"
    return " ".join(map(str, [row["recipe"], row["update"], row["share"], row["seed"], found]))


if __name__ == "__main__":
    main()
