"""What does a short training win back, and is it better spent before or after units go?

    python benchmarks/recovery.py                       # all of it: hours on 2 cores
    python benchmarks/recovery.py --shares 0.2 --draws 1 --recipes flap,lora_prune
    python benchmarks/recovery.py --report              # only the table anew

Recipes that remove neurons and key-value groups are trained on equally many tokens, with the same
optimizer, rate and rank: those that prune at once train afterwards, those that prune while they
train do so from the first step. Whatever a recipe says of its own training is replaced by that.
Every row also stands without training where that can be. Of text of several sources (--text a,b) a
recipe that samples them by what they lost does so here too, and rows tell tokens and perplexity of
each. Finished rows are kept in docs/results/recovery.jsonl, so a second start goes on behind the
last one; docs/results/recovery.md is the table. Nothing is chosen by test text.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conditions import add_conditions, settings_of
from pruning import cpu_name
from rows import append, read, under_equal
from seconds_and_memory import measured
from units import KEPT, share_of_units, update_of, with_refit
from units_report import CONDITIONS, cell, mean, part

from prunezero.errors import PruneZeroError
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.compare import SPLITS, RecipeRunner, finite_row
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import load_recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import set_up, with_choices

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
RECIPES = (
    *("llm_pruner", "llm_pruner_element1", "flap", "ziplm", "mask_fisher", "fisher_slopes"),
    *("lora_prune", "hesso", "hesso_cric", "lora_shear"),
)
# Recipes that are trained in both ways.
DISTILLED = ("flap", "fisher_slopes")
# How often units go while factors train, of the steps of the optimizer.
REMOVALS = 20
# What a recipe says of the sources of its text.
SAMPLING = ("sampling", "measure_every", "balance", "second_stage", "second_from", "held_out")
# What is kept of training and measuring on several of them.
OF_SOURCES = (
    *("sources", "trained_tokens_by_source", "steps_skipped_by_source", "source_shares"),
    *("source_growth", "validation_perplexity_by_source", "test_perplexity_by_source"),
)
TRAINING = ("steps", "batch", "learning_rate", "rank", "alpha")
PLACE = ("recipe", "update", "recover", "share", "seed", *TRAINING, *CONDITIONS)

Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, then write the table."""
    arguments = parsed()
    path = RESULTS / "recovery.jsonl"
    for seed in range(0 if arguments.report else arguments.draws):
        measure(arguments, seed, path)
    text = "\n".join(report(read(path))) + "\n"
    path.with_suffix(".md").write_text(text)
    print(text)


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="names or files, by commas")
    parser.add_argument("--shares", default="0.2,0.5", help="of block parameters, by commas")
    parser.add_argument("--steps", type=int, default=64, help="of the optimizer")
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    add_conditions(parser, calibration_tokens=32768, evaluation_tokens=8192)
    arguments = parser.parse_args()
    arguments.cpu = cpu_name()
    return arguments


def measure(arguments: argparse.Namespace, seed: int, path: Path) -> None:
    """Append the rows of one draw of calibration text that the file does not hold yet."""
    conditions = {
        key: getattr(arguments, key) for key in (*TRAINING, *CONDITIONS, "threads", "cpu")
    }
    known = {place_of(row) for row in read(path)}
    missing = []
    for share in map(float, arguments.shares.split(",")):
        for recipe in wanted(arguments):
            head: Row = {"recipe": recipe.name, "update": update_of(recipe)}
            head |= {"recover": recipe.recover.word, "share": share, "seed": seed} | conditions
            if place_of(head) not in known:
                missing.append((recipe, share, head))
    if not missing:
        return
    torch.set_num_threads(arguments.threads)
    testbed = set_up(arguments.model, arguments.text, settings_of(arguments, seed), dtype="float32")
    linears = find_linears(testbed.language_model.model)
    sums = testbed.statistics(linears, dense_sums([recipe for recipe, _, _ in missing]))
    runner = RecipeRunner(testbed, sums, splits=SPLITS)
    dense = {"recipe": "dense", "update": "none", "recover": "none", "share": 0.0, "seed": seed}
    dense |= conditions
    if place_of(dense) not in known:
        append(path, dense | kept_of(finite_row(runner.dense_row(SPLITS, with_costs=True))))
    for recipe, share, head in missing:
        row = head | measured_row(runner, recipe, share)
        append(path, row)
        told = (row.get(key) for key in ("recipe", "update", "recover", "validation_perplexity"))
        print(*told, share, seed, flush=True)


def wanted(arguments: argparse.Namespace) -> Iterator[Recipe]:
    """Each recipe with the training that all have, and without one where it can be.

    Where columns that stay are not refitted before a training, they are in one more row.
    """
    numbers = {key: getattr(arguments, key) for key in TRAINING}
    for name in arguments.recipes.split(","):
        recipe = load_recipe(name)
        assert isinstance(recipe, Recipe)  # none of several stages is asked for
        lora = {"lora": {**numbers, **sampling_of(recipe), "after": "last step"}}
        if recipe.schedule.row.in_training:
            yield with_choices(recipe, recover=lora, schedule=in_steps(recipe, arguments.steps))
            continue
        yield with_choices(recipe, recover="none")
        trained = with_choices(recipe, recover=lora)
        yield trained
        refitted = with_refit(trained)
        if isinstance(refitted, Recipe):
            yield refitted
        if name in DISTILLED:
            distil = {**numbers, "through": "lora", "after": "last step"}
            yield with_choices(recipe, recover={"distil": distil})


def sampling_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of the sources of its text, where it tells them apart."""
    own = recipe.recover.options.model_dump(include=set(SAMPLING))
    return own if own.get("sampling", "equal") != "equal" else {}


def in_steps(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The schedule of a recipe that prunes while it trains, for so many steps."""
    numbers = recipe.schedule.options.model_dump(exclude_defaults=True)
    if "every" in type(recipe.schedule.options).model_fields:
        numbers["every"] = max(1, steps // REMOVALS)
    return {recipe.schedule.word: numbers}


def measured_row(runner: RecipeRunner, recipe: Recipe, share: float) -> Row:
    """What a recipe leaves when so much of the blocks' parameters goes, or why it cannot."""
    found: Row = {}

    def work() -> None:
        amount = share_of_units(runner.testbed, recipe, share)
        found.update(finite_row(runner.row(recipe, amount, SPLITS, with_costs=True)))

    try:
        taken = measured(work)
    except PruneZeroError as error:
        return {"refused": str(error)}
    trainings = runner.outcome.trainings if runner.outcome else ()
    return kept_of(found) | {
        "trained_tokens": sum(training.tokens for training in trainings),
        "training_seconds": sum(training.seconds for training in trainings),
        "peak_mib": taken["peak_mib"] - taken["loaded_mib"],
        "processor_seconds": taken["processor_seconds"],
    }


def kept_of(row: Row) -> Row:
    """What is kept of a row of results."""
    perplexities = {key: row[key] for key in row if key.endswith("_perplexity")}
    kept = (*KEPT, "training_losses", "steps_skipped", *OF_SOURCES)
    return {key: row[key] for key in kept if key in row} | perplexities


def place_of(row: Row) -> tuple[Any, ...]:
    """The place of a row in the file."""
    return tuple(row.get(key) for key in PLACE)


def report(rows: list[Row]) -> list[str]:
    """The table as Markdown: means over draws, and in brackets the largest minus the smallest."""
    lines = [
        "# Units that go, and a training on equally many tokens",
        "",
        "Made by `python benchmarks/recovery.py`. Every recipe loses the same share of the "
        "parameters of all blocks, and is trained on as many tokens as all others, with low-rank "
        "factors in all matrices of the blocks; `none` is the recipe without training. A cell is "
        "the mean over draws of calibration text and in brackets the largest minus the smallest. "
        "Memory is what the process held at most, beside what it held before, evaluation "
        "included. Nothing was chosen by test text.",
        "",
    ]
    for found in under_equal(rows, (*TRAINING, *CONDITIONS)):
        lines += _under_equal_conditions(found)
    return lines


def _under_equal_conditions(rows: list[Row]) -> list[str]:
    one, dense = rows[0], [row for row in rows if row["recipe"] == "dense"]
    tokens = one["steps"] * one["batch"] * one["sequence_length"]
    lines = [
        f"## {one['model']}, float32, windows of {one['sequence_length']}, {tokens:,} tokens of "
        "training",
        "",
        f"{one['steps']} steps of {one['batch']} windows, AdamW at {one['learning_rate']:g}, rank "
        f"{one['rank']}, alpha {one['alpha']:g}; {one['calibration_tokens']:,} calibration, "
        f"{one['evaluation_tokens']:,} validation and {one['test_tokens']:,} test tokens of "
        f"{one['text']} text; {one['threads']} threads of {one['cpu']}; dense: validation "
        f"{cell(dense, 'validation_perplexity')}, test {cell(dense, 'test_perplexity')}.",
        "",
    ]
    for share in sorted({row["share"] for row in rows} - {0.0}):
        lines += [f"### {100 * share:g} % of the blocks' parameters", ""]
        lines += [*_table([row for row in rows if row["share"] == share], dense), ""]
    return lines


def _table(rows: list[Row], dense: list[Row]) -> list[str]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"], row["update"], row["recover"]].append(row)
    fine = {key: found for key, found in groups.items() if "refused" not in found[0]}
    lines = [
        "| recipe | update | training | draws | validation | test | KL | parameters | "
        "tokens trained | seconds of training | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted(fine, key=lambda key: mean(fine[key], "validation_perplexity")):
        found = fine[key]
        numbers = [cell(found, f"{split}_perplexity") for split in ("validation", "test")]
        numbers += [cell(found, "kl", 3), part(found, dense, "parameters_without_embeddings")]
        numbers.append(tokens_of(found))
        numbers += [f"{mean(found, name):,.0f}" for name in ("training_seconds", "peak_mib")]
        lines.append(" | ".join([f"| `{key[0]}`", *key[1:], str(len(found)), *numbers]) + " |")
    refused = {(key[0], found[0]["refused"]) for key, found in groups.items() if key not in fine}
    return [*lines, *(f"\n`{name}` was refused: {why}" for name, why in sorted(refused))]


def tokens_of(rows: list[Row]) -> str:
    """How many tokens were trained on, the mean over draws, and on each of several sources."""
    told = f"{mean(rows, 'trained_tokens'):,.0f}"
    column = "trained_tokens_by_source"
    found = [row[column] for row in rows if column in row]
    if not found:
        return told
    means = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    each = ", ".join(f"{Path(name).name} {count:,.0f}" for name, count in means.items())
    return f"{told} ({each})"


if __name__ == "__main__":
    main()
