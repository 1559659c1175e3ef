"""`prunezero export`: a recipe as one page of plain torch, its formula as a Triton kernel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunezero.cli.options import Pattern, Statistics, check_statistics, expanded

if TYPE_CHECKING:
    from prunezero.pruning.recipes.recipe import Recipe


def export(
    recipe: Annotated[
        str, typer.Option(help="Name, .yaml file, or the name of a finished search.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="File for the pruner; pruner.py if only the recipe is named.", callback=expanded
        ),
    ] = None,
    kernel: Annotated[
        Path | None,
        typer.Option(
            help="File for the formula's Triton kernel, which gives scores alone.",
            callback=expanded,
        ),
    ] = None,
    pattern: Pattern = None,
    statistics: Statistics = None,
    runs_dir: Annotated[
        Path, typer.Option(help="Folder where searches are.", callback=expanded)
    ] = Path("runs"),
) -> None:
    """Write a recipe as a one-page pruner that needs torch and nothing of prunezero.

    A page for neurons and heads zeroes them, or takes them out of their matrices. One for keys in a
    cache registers an attention that hides those that went, for plain transformers.

    `--kernel` writes the formula as a Triton kernel: from a layer's weight and features to its
    scores. It needs torch and Triton, and is there for every recipe of one formula, since it takes
    of it the formula alone.

    Examples:

        prunezero export --recipe first --output pruner.py

        prunezero export --recipe wanda --statistics dense --output wanda.py

        prunezero export --recipe mask_fisher --output mask_fisher.py

        prunezero export --recipe first --output pruner.py --kernel kernel.py

        prunezero export --recipe sparsegpt --kernel kernel.py

        prunezero export --recipe snapkv --output snapkv_page.py
    """
    from prunezero.cli.tables import say
    from prunezero.errors import shell_word
    from prunezero.files.places import check_apart, try_file
    from prunezero.pruning.recipes.staged import load_recipe, refuse_stages
    from prunezero.pruning.testbed import with_choices
    from prunezero.report.export.kernel import refuse_several, write_kernel
    from prunezero.report.export.page import write_pruner

    check_statistics(statistics)
    if output is None and kernel is None:
        output = Path("pruner.py")
    try_file(output, "--output", example="pruner.py")
    try_file(kernel, "--kernel", example="kernel.py")
    check_apart({"--output": output, "--kernel": kernel})
    found = runs_dir / recipe / "recipe.yaml"
    loaded = load_recipe(found if os.path.isfile(found) else recipe)
    why = "which one file of plain torch cannot follow; use `prunezero prune` with the recipe"
    chosen = with_choices(refuse_stages(loaded, why), pattern=pattern, statistics=statistics)
    if chosen.unit.row.domain.is_run_time:
        _export_keys(chosen, output, kernel)
        return
    # What one file cannot follow is told before the other is written.
    if kernel is not None:
        refuse_several(chosen)
    if output is not None:
        write_pruner(chosen, output)
        say(f"wrote {output}: {chosen.text}")
        share = "0.5" if chosen.unit.is_usual else "0.2"
        fraction = f"--sparsity {share} " if chosen.pattern == "free" else ""
        say(f"run it: python {shell_word(output)} MODEL_FOLDER TEXT_FILE {fraction}--output PRUNED")
    if kernel is not None:
        write_kernel(chosen, kernel)
        say(f"wrote {kernel}: {chosen.criterion.text} as score(weight, ...) in Triton")


def _export_keys(recipe: Recipe, output: Path | None, kernel: Path | None) -> None:
    """Write a recipe of keys as an attention; a kernel is for weights.

    Raises:
        RecipeError: a kernel is asked for.
        OutputError: a page cannot follow the recipe, or cannot be written.
    """
    from prunezero.cli.tables import say
    from prunezero.report.export.keys_page import write_keys

    if output is None or kernel is not None:
        recipe.unit.row.refuse_run_time()
        return
    write_keys(recipe, output)
    say(f"wrote {output}: {recipe.text}")
    say(f"use it: import {output.stem}, then model.set_attn_implementation({output.stem}.NAME)")
