"""`prunezero compare`: recipes side by side on one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunezero.cli import options
from prunezero.cli.layer_options import Ignore, Targets
from prunezero.cli.limit import Limit, MemoryLimit
from prunezero.cli.options import (
    Allocate,
    Device,
    Dtype,
    JsonFile,
    Model,
    Pattern,
    RunsDir,
    Seed,
    Sparsity,
    TextName,
    Unit,
)
from prunezero.cli.search_options import (
    CalibrationTokens,
    EvaluationTokens,
    SequenceLength,
    TestTokens,
)

if TYPE_CHECKING:
    from prunezero.pruning.recipes.staged import AnyRecipe
    from prunezero.pruning.testbed import Testbed
    from prunezero.report.tracking.tracker import Tracker


def compare(
    model: Model = "demo",
    text: TextName = "demo",
    recipes: Annotated[
        str, typer.Option(help="Names or .yaml files, separated by commas.")
    ] = "magnitude,wanda,ria,pruner_zero",
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    allocate: Allocate = None,
    targets: Targets = "",
    ignore: Ignore = "",
    statistics: Annotated[
        str, typer.Option(help="`dense` or `sequential`, the same for every recipe.")
    ] = "dense",
    rounding: Annotated[
        bool,
        typer.Option(
            help="Prune by each recipe that mends weights a second time, on the calibration "
            "windows in reverse order: what then changes is rounding."
        ),
    ] = True,
    unit: Unit = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="PNG file: perplexity on test text against parameters, all recipes."),
    ] = None,
    memory_limit: MemoryLimit = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
    runs_dir: RunsDir = Path("runs"),
    sequence_length: SequenceLength = None,
    calibration_tokens: CalibrationTokens = None,
    evaluation_tokens: EvaluationTokens = None,
    test_tokens: TestTokens = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Prune one model by several recipes and compare the results.

    All recipes see the same calibration text and the same kind of statistics. The results are also
    logged to MLflow, next to those of every search in the same runs folder. Recipes of keys in a
    cache, or of links to them, are installed for a while instead: --sparsity is the share of a
    prompt's keys that go, and what follows the prompt is measured, on several kinds of text.

    Examples:

        prunezero compare --model demo --recipes magnitude,wanda,ria,gblm,pruner_zero --sparsity 0.5

        prunezero compare --model demo --recipes wanda,runs/first/recipe.yaml --pattern 2:4

        prunezero compare --model demo --sparsity 0.6 --statistics sequential --json out.json

        prunezero compare --model demo --recipes wanda,sparsegpt --sparsity 0.7 --allocate owl

        prunezero compare --model demo --recipes wanda,ria --sparsity 0.5 --ignore down_proj

        prunezero compare --model demo --recipes wanda,gblm --sparsity 0.5 --memory-limit 2GiB

        prunezero compare --model demo --recipes flap,mask_fisher --sparsity 0.2 --plot sizes.png

        prunezero compare --model demo --recipes snapkv,keydiff,h2o_mean --sparsity 0.75
    """
    from prunezero.cli.tables import console, results_table, say, say_about, say_conditions, waiting
    from prunezero.files.places import check_apart, try_file
    from prunezero.models.anatomy.patterns import patterns_of
    from prunezero.pruning.key_rows import of_run_time
    from prunezero.pruning.memory_plan import compare_plan
    from prunezero.pruning.requirements import settled_sparsity
    from prunezero.pruning.testbed import set_up, with_choices
    from prunezero.report.plots.quality import quality_against_size
    from prunezero.report.runs.folder import check_runs_dir
    from prunezero.report.tracking.tracker import Tracker

    options.check_statistics(statistics)
    options.check_json(json_file)
    check_apart({"--json": json_file, "--plot": plot})
    try_file(plot, "--plot", example="sizes.png")
    loaded = options.load_recipes(recipes)
    sizes = (sequence_length, calibration_tokens, evaluation_tokens, test_tokens)
    if of_keys := of_run_time(loaded):
        from prunezero.cli.attention_compare import compare_keys

        of_weights = {"pattern": pattern, "allocate": allocate, "unit": unit, "targets": targets}
        odd = {"statistics": statistics != "dense", "no_rounding": not rounding}
        of_weights |= {"ignore": ignore, "memory_limit": memory_limit}
        options.refuse_of_weights(of_keys[0], {**of_weights, **odd, "test_tokens": test_tokens})
        settings = options.prompt_settings(*sizes[:3], seed)
        subject, places = (model, text, dtype, device), (json_file, plot, runs_dir)
        compare_keys(subject, of_keys, sparsity, settings, places)
        return
    chosen = [
        with_choices(
            recipe,
            pattern=pattern,
            statistics=statistics,
            allocate=allocate,
            targets=patterns_of(targets) or None,
            ignore=patterns_of(ignore) or None,
        )
        for recipe in options.on_unit(loaded, unit)
    ]
    for recipe in chosen:
        settled_sparsity(recipe.pattern, sparsity)
    settings = options.usual_settings(*sizes, seed)
    check_runs_dir(runs_dir)
    limit = Limit(memory_limit, device)
    with waiting(f"loading {model}"):
        testbed = set_up(model, text, settings, dtype=dtype, device=device)
    say_about([testbed], chosen)
    planned = partial(compare_plan, testbed.language_model, chosen, settings)
    testbed = limit.kept_on(testbed, lambda size: planned(limit=size, with_rounding=rounding))
    rows: list[dict[str, Any]] = []
    tracker = Tracker(runs_dir)
    try:
        for row in _measured(
            testbed,
            chosen,
            sparsity,
            statistics,
            tracker,
            with_rounding=rounding,
            with_costs=plot is not None,
        ):
            rows.append(row)
    finally:
        untracked = tracker.close()
        if rows:
            title = f"{len(rows) - 1} of {len(chosen)} recipes on {testbed.language_model.name}"
            console.print(results_table(rows, title, best="validation_perplexity"))
            say_conditions(rows, testbed.language_model.name, [testbed])
            memory = limit.measured()
            options.write_json({"model": model, "text": text, "rows": rows, **memory}, json_file)
            if plot is not None:
                quality_against_size([{**row, "name": row["recipe"]} for row in rows], plot)
        if untracked:
            say(f"{untracked} results could not be logged to MLflow yet; they are kept")


def _measured(
    testbed: Testbed,
    recipes: Sequence[AnyRecipe],
    sparsity: float | None,
    statistics: str,
    tracker: Tracker,
    *,
    with_rounding: bool,
    with_costs: bool,
) -> Iterator[dict[str, Any]]:
    """The rows as they come, each shown and recorded behind its handing over."""
    from prunezero.cli.tables import Bars, console, one_line, say
    from prunezero.pruning.compare import compare as measure
    from prunezero.report.tracking.search_records import tracked_rows

    with Bars() as bars:
        rows = measure(
            testbed,
            recipes,
            sparsity,
            statistics=statistics,
            with_rounding=with_rounding,
            with_costs=with_costs,
            progress=bars,
        )
        for done, row in enumerate(rows, start=1):
            yield row
            if not console.is_terminal:
                say(one_line(row))
            bars("recipes", done, len(recipes) + 1)
            for record in tracked_rows([row], [testbed]):
                tracker.record(record)
