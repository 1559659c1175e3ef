"""`prunezero transfer`: is a criterion that was found on one model good on others?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunezero.cli import options
from prunezero.cli.options import (
    CalibrationTokens,
    Device,
    Dtype,
    EvaluationTokens,
    JsonFile,
    RunsDir,
    Seed,
    SequenceLength,
    Sparsity,
    TestTokens,
)

if TYPE_CHECKING:
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.pruning.testbed import Testbed
    from prunezero.report.tracking.tracker import Tracker

Row = dict[str, Any]


def transfer(
    source: Annotated[str, typer.Argument(help="Name of a search, or a recipe by name or file.")],
    models: Annotated[
        str, typer.Option(help="Hub ids, folders or .gguf files, separated by commas.")
    ] = "demo",
    texts: Annotated[
        str, typer.Option(help="Texts as --text takes them, separated by commas.")
    ] = "demo",
    sparsity: Sparsity = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
    runs_dir: RunsDir = Path("runs"),
    sequence_length: SequenceLength = 256,
    calibration_tokens: CalibrationTokens = 8192,
    evaluation_tokens: EvaluationTokens = 4096,
    test_tokens: TestTokens = 8192,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure a recipe on other models and texts, beside the published ones.

    Each rival stands there twice, as published and with the choices of the recipe around its
    formula; it is told what of a gain is the formula's. The sparsity is that of the search, if
    none is given. Results are logged to MLflow, where the view Transfer shows them.

    Examples:

        prunezero transfer night --models ./other,hub/model --texts demo,./mine.txt

        prunezero transfer runs/night/recipe.yaml --models ./other --sparsity 0.7
    """
    from prunezero.cli.tables import console, print_results, say, say_conditions
    from prunezero.models.anatomy.patterns import patterns_of
    from prunezero.report.runs.folder import check_runs_dir
    from prunezero.report.tracking.tracker import Tracker

    options.check_json(json_file)
    recipe, asked = _found(source, runs_dir, sparsity)
    settings = options.make_settings(
        sequence_length, calibration_tokens, evaluation_tokens, test_tokens, seed
    )
    check_runs_dir(runs_dir)
    places = [(model, text) for model in patterns_of(models) for text in patterns_of(texts)]
    tracker, told = Tracker(runs_dir), []
    try:
        for model, text in places:
            testbed = _testbed(model, text, settings, dtype, device)
            rows = list(_measured(testbed, recipe, asked, tracker))
            title = f"{recipe.name} on {testbed.language_model.name}, {testbed.text.name} text"
            print_results(rows, title, best="validation_perplexity")
            say_conditions(rows, testbed.language_model.name, [testbed])
            told += [{"model": model, "text": text, **row} for row in rows]
            # Nothing that was computed is lost when a later model cannot be loaded.
            options.write_json({"source": source, "rows": told}, json_file)
            console.print(_summary(told, recipe.name))
            _say_verdict(rows)
    finally:
        if untracked := tracker.close():
            say(f"{untracked} results could not be logged to MLflow yet; they are kept")


def _found(source: str, runs_dir: Path, sparsity: float | None) -> tuple[Recipe, float | None]:
    """The recipe of a search or file, and how much it removes.

    Raises:
        RecipeError: there is none, it is one of several stages or removes nothing from the
            weights, or nothing says how much.
    """
    from prunezero.errors import RecipeError
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.pruning.requirements import settled_sparsity

    folder = runs_dir / source
    recipe = Recipe.load(folder / "recipe.yaml" if folder.is_dir() else source)
    recipe.unit.row.refuse_run_time()
    asked = recipe.provenance.get("sparsity") if sparsity is None else sparsity
    if asked is None and recipe.pattern == "free":
        raise RecipeError(
            f"recipe {recipe.name} does not say how much its search removed; give --sparsity"
        )
    settled_sparsity(recipe.pattern, asked)
    return recipe, asked


def _testbed(model: str, text: str, settings: Any, dtype: str, device: str) -> Testbed:
    from prunezero.cli.tables import say_about, waiting
    from prunezero.pruning.testbed import set_up

    with waiting(f"loading {model}"):
        testbed = set_up(model, text, settings, dtype=dtype, device=device)
    say_about([testbed])
    return testbed


def _measured(
    testbed: Testbed, recipe: Recipe, sparsity: float | None, tracker: Tracker
) -> Iterator[Row]:
    """Rows of the dense model, of rivals that the model can take, and of the recipe at the end."""
    from prunezero.cli.tables import Bars, say
    from prunezero.errors import PruneZeroError
    from prunezero.pruning.compare import compare
    from prunezero.pruning.requirements import check_recipe, settled_sparsity
    from prunezero.report.tracking.search_records import tracked_rows
    from prunezero.searching.experiment.baselines import rivals_of

    fraction = settled_sparsity(recipe.pattern, sparsity)
    chosen: list[Recipe] = []
    for rival in rivals_of(recipe):
        try:
            check_recipe(testbed.language_model, rival, fraction)
            chosen.append(rival)
        except PruneZeroError as error:
            say(f"without {rival.name}: {error}")
    chosen.append(recipe)
    with Bars() as bars:
        rows = compare(
            testbed,
            chosen,
            sparsity,
            statistics=recipe.statistics,
            with_rounding=False,
            progress=bars,
        )
        for done, row in enumerate(rows, start=1):
            yield row
            bars("recipes", done, len(chosen) + 1)
            for record in tracked_rows([row], [testbed], origin=f"transfer of {recipe.name}"):
                tracker.record(record)


def _say_verdict(rows: list[Row]) -> None:
    from prunezero.cli.final_table import verdict
    from prunezero.cli.tables import say

    for sentence in verdict(rows):
        say(sentence)


def _summary(rows: Sequence[Row], name: str) -> Any:
    """A line for each model and text: the recipe, and the best rival of either kind."""
    from rich.table import Table

    from prunezero.cli.tables import cell
    from prunezero.searching.experiment.baselines import SAME_TERMS

    table = Table(title=f"test perplexity of {name} and of the best rivals by validation text")
    for heading in ("model", "text", "dense", name, "as published", "on its terms"):
        table.add_column(heading)
    for model, text in dict.fromkeys((row["model"], row["text"]) for row in rows):
        here = [row for row in rows if (row["model"], row["text"]) == (model, text)]
        dense, *rivals, own = here
        fair = [row for row in rivals if row["recipe"].endswith(SAME_TERMS)]
        published = [row for row in rivals if row not in fair]
        best = [_best_of(some) for some in (published, fair)]
        numbers = [cell("test_perplexity", row["test_perplexity"]) for row in (dense, own)]
        table.add_row(Path(model).name, Path(text).name, *numbers, *best)
    return table


def _best_of(rows: list[Row]) -> str:
    from prunezero.cli.final_table import best_on_validation
    from prunezero.cli.tables import cell

    best = best_on_validation(rows)
    return f"{cell('test_perplexity', best['test_perplexity'])} {best['recipe']}" if best else "-"
