"""`prunezero plan`: how much memory would it take, and which GPU would do?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunezero.cli import options
from prunezero.cli.options import (
    CalibrationTokens,
    Dtype,
    EvaluationTokens,
    JsonFile,
    SequenceLength,
    TestTokens,
)
from prunezero.errors import RecipeError

if TYPE_CHECKING:
    from prunezero.models.loading.language_model import LanguageModel
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.pruning.testbed import Settings

# Of one device, in GB as they are sold; of each CUDA and gaps between tensors take some.
DEVICES_GB = (24, 80, 141)
SET_ASIDE_BYTES = 2 * 2**30
# A recipe of each signal.
OF_SIGNALS = "magnitude,wanda,gblm,sparsegpt"


def plan(
    config: Annotated[
        str, typer.Option(help="As --model, or path of a config.json; no weight is read.")
    ],
    recipes: Annotated[
        str, typer.Option(help="Names or .yaml files, separated by commas: a row for each.")
    ] = OF_SIGNALS,
    space: Annotated[
        str, typer.Option(help="Search space: a row for each of its --signals.")
    ] = "formulas",
    json_file: JsonFile = None,
    sequence_length: SequenceLength = 256,
    calibration_tokens: CalibrationTokens = 8192,
    evaluation_tokens: EvaluationTokens = 4096,
    test_tokens: TestTokens = 8192,
    dtype: Dtype = "auto",
    device: Annotated[
        str,
        typer.Option(help="`cuda`: memory of the GPU; `cpu`: of the process. Need not be here."),
    ] = "cuda",
) -> None:
    """Estimate the memory of prune, compare and search from a model's configuration alone.

    Of each recipe, and of a search by each signal: the peak with everything in memory, and the
    least `--memory-limit` with which the same is found, where sums over calibration text stay on
    disk and dense weights are read from their files again; and the smallest device that holds it.

    Examples:

        prunezero plan --config ./7b/config.json

        prunezero plan --config ./7b --recipes wanda,sparsegpt --sequence-length 2048

        prunezero plan --config ./7b --device cpu --json plan.json
    """
    from prunezero.cli.tables import console, say, waiting
    from prunezero.models.loading.outline import outlined_model

    options.check_json(json_file)
    if device not in ("cuda", "cpu"):
        raise RecipeError(f"--device must be cuda or cpu but is '{device}'")
    chosen = options.load_recipes(recipes)
    settings = options.make_settings(
        sequence_length, calibration_tokens, evaluation_tokens, test_tokens, 0
    )
    with waiting(f"reading the configuration of {config}"):
        model = outlined_model(config, dtype=dtype, device=device)
        rows = planned_rows(model, chosen, space, settings)
    console.print(_table(rows, f"memory of {config} in {model.dtype_word} on {device}, GiB"))
    say(
        f"windows of {sequence_length} tokens, {calibration_tokens} for calibration; devices of "
        f"{', '.join(map(str, DEVICES_GB))} GB, 2 GiB of which are set aside; not of training"
    )
    facts = {"config": config, "dtype": model.dtype_word, "device": device}
    options.write_json({**facts, "settings": vars(settings), "rows": rows}, json_file)


def planned_rows(
    model: LanguageModel, recipes: Sequence[Any], space: str, settings: Settings
) -> list[dict[str, Any]]:
    """One row for each work: its signal, bytes with all in memory, and the least limit.

    Args:
        model: its weights may be outlines.
        recipes: to prune by, and to compare, one by one.
        space: name or path of a search space.

    Raises:
        PruneZeroError: the memory of a recipe or of the space cannot be planned.
    """
    from prunezero.pruning.memory_plan import compare_plan, refuse_unplanned

    chosen = [refuse_unplanned(recipe) for recipe in recipes]
    rows = [_streamed_row(model, recipe, settings) for recipe in chosen]
    for recipe in chosen:

        def compared(sparing: bool, recipe: Recipe = recipe) -> Any:
            return compare_plan(model, [recipe], settings, is_sparing=sparing)

        rows.append(_row("compare", recipe.name, recipe.signal, compared))
    rows += _search_rows(model, space, settings)
    return rows


def _search_rows(model: LanguageModel, space: str, settings: Settings) -> Iterator[dict[str, Any]]:
    from prunezero.formula.feature_row import WEIGHT_SIGNALS
    from prunezero.searching.evaluation.memory import search_plan
    from prunezero.searching.experiment.config import SearchConfig
    from prunezero.searching.session import make_task
    from prunezero.searching.spaces.space import SearchSpace

    unit = SearchSpace.load(space).unit
    if unit != "weight":
        raise RecipeError(
            f"search space {space} is of unit: {unit}, whose memory is not planned; choose "
            "one of weights, such as formulas"
        )
    sizes = {key: value for key, value in vars(settings).items() if key != "seed"}
    known: set[str] = set()
    for signals in WEIGHT_SIGNALS:
        config = SearchConfig.of(space=space, sparsity=0.5, signals=signals, **sizes)
        task = make_task(config)
        signal = task.space.costliest_signal
        if signal in known:
            continue
        known.add(signal)

        def searched(sparing: bool, task: Any = task) -> Any:
            return search_plan(model, task, is_sparing=sparing)

        yield _row("search", task.space.name, signal, searched)


def _row(work: str, what: str, signal: str, plan_of: Callable[[bool], Any]) -> dict[str, Any]:
    usual, least = plan_of(False), plan_of(True)
    return {
        "work": work,
        "what": what,
        "signal": signal,
        "in_memory_bytes": usual.total,
        "in_memory_while": usual.peak.what,
        "in_memory_on_gb": smallest_device(usual.total),
        "least_limit_bytes": least.total,
        "least_limit_while": least.peak.what,
        "least_limit_on_gb": smallest_device(least.total),
        "gradient_passes": least.passes,
    }


def _streamed_row(model: LanguageModel, recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """Pruning from files to files, where that is had: it has a limit alone."""
    from prunezero.errors import RecipeError as Refused
    from prunezero.pruning.memory_plan import streamed_bytes

    try:
        least = streamed_bytes(model, recipe, settings)
    except Refused:
        least = None
    return {
        "work": "prune --memory-limit",
        "what": recipe.name,
        "signal": recipe.signal,
        "in_memory_bytes": None,
        "in_memory_while": None,
        "in_memory_on_gb": None,
        "least_limit_bytes": least,
        "least_limit_while": None if least is None else "pruning a block",
        "least_limit_on_gb": None if least is None else smallest_device(least),
        "gradient_passes": 0,
    }


def smallest_device(size: int) -> int | None:
    """GB of the smallest device that holds so many bytes; None where none does."""
    return next((gb for gb in DEVICES_GB if size + SET_ASIDE_BYTES <= gb * 10**9), None)


def _table(rows: Sequence[dict[str, Any]], title: str) -> Any:
    from prunezero.cli.fitting import Table

    table = Table(title=title)
    for heading in ("work", "of", "signal"):
        table.add_column(heading)
    for heading in ("in memory", "fits", "least limit", "fits ", "passes"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [row["work"], row["what"], row["signal"]]
        for way in ("in_memory", "least_limit"):
            size, device = row[f"{way}_bytes"], row[f"{way}_on_gb"]
            cells.append("-" if size is None else f"{size / 2**30:.2f}")
            cells.append("-" if size is None else f"{device} GB" if device else "none")
        table.add_row(*cells, str(row["gradient_passes"] or "-"))
    return table
