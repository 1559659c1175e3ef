"""`prunezero prune`: one recipe, one model, one saved folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunezero.cli import options
from prunezero.cli.options import (
    CalibrationTokens,
    Device,
    Dtype,
    EvaluationTokens,
    JsonFile,
    Model,
    Pattern,
    Seed,
    SequenceLength,
    Sparsity,
    Statistics,
    TestTokens,
    TextName,
)

PATTERN_LINE = "Zeros do not make a model smaller or faster unless its kernels use the pattern."
FIRST_LINE = "Free-form zeros do not make a model smaller or faster by themselves."


def prune(
    model: Model = "demo",
    text: TextName = "demo",
    recipe: Annotated[
        str, typer.Option(help="Name, .yaml file, or a Pruner-Zero tree in .json.")
    ] = "wanda",
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder for the pruned model; without it, only report.")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="Layers to prune: names, endings or re:PATTERN, by commas.")
    ] = "",
    ignore: Annotated[str, typer.Option(help="Layers to leave alone, written likewise.")] = "",
    statistics: Statistics = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
    sequence_length: SequenceLength = 256,
    calibration_tokens: CalibrationTokens = 8192,
    evaluation_tokens: EvaluationTokens = 4096,
    test_tokens: TestTokens = 8192,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    r"""Prune a model by a recipe, measure it, and save it as a plain transformers folder.

    The folder holds dense safetensors with exact zeros, so every loader takes it, a model card,
    the recipe and a report. Its sparsity is counted again from the files.

    Examples:

        prunezero prune --model demo --recipe wanda --sparsity 0.5 --output pruned

        prunezero prune --model demo --recipe runs/first/recipe.yaml --pattern 2:4 --output pruned

        prunezero prune --model demo --recipe ria --sparsity 0.5 --ignore "re:layers\.0\."
    """
    from prunezero.cli.tables import Bars, conditions, console, results_table, say, waiting
    from prunezero.models.loading import check_writable
    from prunezero.pruning.bench import set_up, with_choices
    from prunezero.pruning.compare import SPLITS, Stand
    from prunezero.pruning.recipe import Recipe
    from prunezero.pruning.requirements import check_recipe, dense_sums, settled_sparsity
    from prunezero.report.saved_model import save_pruned

    options.check_statistics(statistics)
    options.check_json(json_file)
    chosen = with_choices(
        Recipe.load(recipe),
        pattern=pattern,
        statistics=statistics,
        targets=_words(targets),
        ignore=_words(ignore),
    )
    fraction = settled_sparsity(chosen.pattern, sparsity)
    settings = options.make_settings(
        sequence_length, calibration_tokens, evaluation_tokens, test_tokens, seed
    )
    if output is not None:
        check_writable(output)
    with waiting(f"loading {model}"):
        bench = set_up(model, text, settings, dtype=dtype, device=device)
    say(options.about_model(bench))
    layers = check_recipe(bench.language_model, chosen, fraction)
    with Bars() as bars:
        sums = bench.statistics(layers, dense_sums([chosen]), bars)
        with waiting("measuring the dense model"):
            stand = Stand(bench, sums)
            rows = [stand.dense_row(SPLITS)]
        with waiting(f"pruning by {chosen.name}, then measuring"):
            rows.append(stand.row(chosen, fraction, SPLITS, keep=True))
    say(FIRST_LINE if chosen.pattern == "free" else PATTERN_LINE)
    if output is not None:
        saved = save_pruned(bench, chosen, rows, layers, output)
        rows[-1]["sparsity_reached"] = saved.sparsity
    console.print(results_table(rows, f"{chosen.name} on {bench.language_model.name}"))
    say(conditions(rows, bench.language_model.name, bench.text.name))
    if output is not None:
        say(
            f"saved to {output}: {saved.zeros} of {saved.total} weights of {len(layers)} layers "
            "are zero, counted from the files"
        )
    options.write_json({"model": model, "text": text, **rows[-1]}, json_file)


def _words(names: str) -> tuple[str, ...] | None:
    return tuple(word.strip() for word in names.split(",") if word.strip()) or None
