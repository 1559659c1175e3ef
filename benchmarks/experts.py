"""How good are recipes that remove experts, calibrated on the text that counts and on another?

    python benchmarks/moe_models.py small FOLDER       # a mixture to measure on, and its two texts
    python benchmarks/experts.py FOLDER --texts FOLDER/articles.jsonl,FOLDER/code.jsonl
    python benchmarks/experts.py --report              # only the table anew

Every recipe of `baselines/` that removes experts takes the same share of them, calibrated on each
text, and is measured on each: what a model loses on a text that nobody calibrated with is the price
of choosing by another. Finished rows are kept in docs/results/experts.jsonl, so a second start goes
on behind the last one; docs/results/experts.md is the table. Nothing is chosen by test text.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conditions import add_conditions, settings_of
from pruning import cpu_name
from rows import append, read, under_equal
from units import kept_of
from units_report import CONDITIONS, cell, mean, part

from prunezero.errors import PruneZeroError
from prunezero.models.anatomy.experts import find_moe_layers
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import load_model
from prunezero.models.text.splits import Text, load_text
from prunezero.pruning.compare import SPLITS, RecipeRunner, finite_row
from prunezero.pruning.recipes.recipe import Recipe, published_recipes
from prunezero.pruning.recipes.staged import load_recipe
from prunezero.pruning.testbed import Testbed

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"

# What tells a row from every other.
PLACE = ("recipe", "calibrated_on", "share", "seed", *CONDITIONS)

Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, then write the table."""
    arguments = parsed()
    path = RESULTS / "experts.jsonl"
    if not arguments.report:
        torch.set_num_threads(arguments.threads)
        texts = {Path(name).stem: load_text(name) for name in arguments.texts.split(",")}
        model = load_model(arguments.folder, dtype="float32")
        for seed in range(arguments.draws):
            for measured in texts:
                for seen in texts:
                    measure(arguments, model, texts, (seen, measured, seed), path)
    text = "\n".join(report(read(path))) + "\n"
    path.with_suffix(".md").write_text(text)
    print(text)


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="", help="the model")
    parser.add_argument("--texts", default="demo", help="by commas")
    parser.add_argument("--recipes", default="", help="names or files, by commas; else all")
    parser.add_argument("--shares", default="0.25,0.5", help="of experts, by commas")
    add_conditions(parser, calibration_tokens=16384, evaluation_tokens=16384)
    arguments = parser.parse_args()
    if not (arguments.folder or arguments.report):
        parser.error("say the folder of a mixture of experts, or --report")
    arguments.cpu = cpu_name()
    return arguments


def measure(
    arguments: argparse.Namespace,
    model: LanguageModel,
    texts: dict[str, Text],
    which: tuple[str, str, int],
    path: Path,
) -> None:
    """Append the rows of one draw of one text, measured on one text, that the file lacks.

    Args:
        which: text to calibrate with, text to measure on, and the draw.
    """
    seen, measured, seed = which
    given = {
        "model": Path(arguments.folder).name,
        "text": measured,
        "sequence_length": arguments.sequence_length,
        "calibration_tokens": arguments.calibration_tokens,
        "evaluation_tokens": arguments.evaluation_tokens,
        "test_tokens": arguments.test_tokens,
        "threads": arguments.threads,
        "cpu": arguments.cpu,
    }
    known = {place_of(row) for row in read(path)}
    missing = []
    for share in [0.0, *map(float, arguments.shares.split(","))]:
        for recipe in [None] if share == 0 else recipes_of(arguments.recipes):
            head = {
                "recipe": recipe.name if recipe else "dense",
                "calibrated_on": seen,
                "share": share,
            }
            head |= {"seed": seed} | given
            if place_of(head) not in known and (recipe or seen == measured):
                missing.append((recipe, share, head))
    if not missing:
        return
    testbed = testbed_of(arguments, model, texts[seen], texts[measured], seed)
    runner = RecipeRunner(testbed, {}, splits=SPLITS)
    for recipe, share, head in missing:
        row = head | measured_row(runner, recipe, share)
        append(path, row)
        print(row["recipe"], seen, measured, share, seed, row.get("validation_perplexity"))


def recipes_of(names: str) -> list[Recipe]:
    """Those named, or all that remove experts."""
    chosen = [name for name in names.split(",") if name] or published_recipes()
    found = [load_recipe(name) for name in chosen]
    return [one for one in found if isinstance(one, Recipe) and one.unit.word == "expert"]


def testbed_of(
    arguments: argparse.Namespace, model: LanguageModel, seen: Text, measured: Text, seed: int
) -> Testbed:
    """The model on a text, calibrated with another, or the same."""
    documents = {**measured.documents, "calibration": seen.documents["calibration"]}
    text = replace(
        measured, documents=documents, fingerprint=f"{seen.fingerprint}{measured.fingerprint}"
    )
    return Testbed(model, text, settings_of(arguments, seed))


def measured_row(runner: RecipeRunner, recipe: Recipe | None, share: float) -> Row:
    """What a recipe leaves, or why it cannot; the dense model's row without one."""
    if recipe is None:
        layers = find_moe_layers(runner.testbed.language_model.model)
        counts = {"experts": [layer.count for layer in layers], "top_k": layers[0].top_k}
        return kept_of(finite_row(runner.dense_row(SPLITS, with_costs=True))) | counts
    try:
        row = finite_row(runner.row(recipe, share, SPLITS, with_costs=True))
    except PruneZeroError as error:
        return {"refused": str(error)}
    return kept_of(row) | {"acceptance": row["acceptance"]}


def place_of(row: Row) -> tuple[Any, ...]:
    """The place of a row in the file."""
    return tuple(row.get(key) for key in PLACE)


def report(rows: list[Row]) -> list[str]:
    """The tables as Markdown: means over draws, in brackets the largest minus the smallest."""
    lines = [
        "# Recipes that remove experts",
        "",
        "Made by `python benchmarks/experts.py`. Each recipe loses the same share of all experts, "
        "calibrated on the text that it is measured on, and on another one. A cell is the mean "
        "over draws of calibration text and in brackets the largest minus the smallest. KL and "
        "acceptance (of speculative decoding, beside the dense model) are of validation text. "
        "Nothing was chosen by test text.",
        "",
    ]
    for found in under_equal(rows, CONDITIONS):
        one, dense = found[0], [row for row in found if row["recipe"] == "dense"]
        lines += [
            f"## {one['model']} on {one['text']}",
            "",
            f"{dense[0]['experts'][0]} experts in each of {len(dense[0]['experts'])} layers, "
            f"{dense[0]['top_k']} for a token; float32, windows of {one['sequence_length']}; "
            f"{one['calibration_tokens']:,} calibration, {one['evaluation_tokens']:,} validation "
            f"and {one['test_tokens']:,} test tokens; dense: validation "
            f"{cell(dense, 'validation_perplexity')}, test {cell(dense, 'test_perplexity')}.",
            "",
        ]
        for share in sorted({row["share"] for row in found} - {0.0}):
            lines += [f"### {100 * share:g} % of the experts", ""]
            lines += [*_table([row for row in found if row["share"] == share], dense), ""]
    return lines


def _table(rows: list[Row], dense: list[Row]) -> list[str]:
    by_recipe: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_recipe[row["recipe"]][row["calibrated_on"]].append(row)
    measured = rows[0]["text"]
    others = sorted({row["calibrated_on"] for row in rows} - {measured})
    head = ["recipe", "draws", "validation", "test", "KL", "acceptance", "parameters"]
    head += [f"{what}, calibrated on {other}" for other in others for what in ("test", "KL")]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    fine = {name: found for name, found in by_recipe.items() if "refused" not in found[measured][0]}
    for name in sorted(fine, key=lambda name: mean(fine[name][measured], "validation_perplexity")):
        own = fine[name][measured]
        numbers = [str(len(own))]
        numbers += [cell(own, f"{split}_perplexity") for split in ("validation", "test")]
        numbers += [cell(own, key, 3) for key in ("kl", "acceptance")]
        numbers.append(part(own, dense, "parameters_without_embeddings"))
        for other in others:
            numbers += [
                cell(fine[name][other], "test_perplexity"),
                cell(fine[name][other], "kl", 3),
            ]
        lines.append(f"| `{name}` | {' | '.join(numbers)} |")
    for name in sorted(by_recipe.keys() - fine):
        lines.append(f"\n`{name}` was refused: {by_recipe[name][measured][0]['refused']}")
    return lines


if __name__ == "__main__":
    main()
