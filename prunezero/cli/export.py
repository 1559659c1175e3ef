"""`prunezero export`: a recipe as one page of plain torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from prunezero.cli.options import Pattern, Statistics, check_statistics


def export(
    recipe: Annotated[
        str, typer.Option(help="Name, .yaml file, or the name of a finished search.")
    ],
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("pruner.py"),
    pattern: Pattern = None,
    statistics: Statistics = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder where searches are.")] = Path("runs"),
) -> None:
    """Write a recipe as a one-page pruner that needs torch and nothing of prunezero.

    Examples:

        prunezero export --recipe first --output pruner.py

        prunezero export --recipe wanda --statistics dense --output wanda.py
    """
    from prunezero.cli.tables import say
    from prunezero.errors import OutputError
    from prunezero.pruning.bench import with_choices
    from prunezero.pruning.recipe import Recipe
    from prunezero.report.export import write_pruner
    from prunezero.report.run_folder import pruner_fields

    check_statistics(statistics)
    if os.path.isdir(output):
        raise OutputError(f"--output {output} is a folder; name a file such as {output}/pruner.py")
    found = runs_dir / recipe / "recipe.yaml"
    chosen = Recipe.load(found if os.path.isfile(found) else recipe)
    chosen = with_choices(chosen, pattern=pattern, statistics=statistics)
    write_pruner(pruner_fields(chosen), output)
    say(f"wrote {output}: {chosen.criterion.text}")
    fraction = "--sparsity 0.5 " if chosen.pattern == "free" else ""
    say(f"run it: python {output} MODEL_FOLDER TEXT_FILE {fraction}--output PRUNED")
