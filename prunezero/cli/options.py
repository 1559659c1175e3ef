"""The options that several commands share, so that a word means the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunezero.errors import RecipeError, reason

if TYPE_CHECKING:
    from prunezero.pruning.recipes.staged import AnyRecipe
    from prunezero.pruning.testbed import Settings

_TEXT = "Calibration and evaluation text"
_SIZES = "How much text"
# Upper ends of what may be asked for: beyond them are slips of the keyboard alone.
LONGEST_WINDOW, MOST_TOKENS = 10**6, 10**9
MOST_ROWS = 10**9
# Of a cluster; `search_setup.check_workers` knows what this machine bears.
MOST_HANDS = 4096


def expanded(path: Path | None) -> Path | None:
    """A path as typed, with the home folder for `~`, which a shell leaves behind `=`."""
    try:
        return None if path is None else path.expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{path}: {reason(error)}") from error


MODEL = typer.Option(help="Hub id, folder, .gguf file, or `demo` (a 135M Llama-class model).")
Model = Annotated[str, MODEL]
TEXT = typer.Option(
    "--text",
    help="Hub dataset id, .txt/.jsonl/.parquet file or folder, or `demo`; several by commas.",
)
TextName = Annotated[str, TEXT]
Sparsity = Annotated[
    float | None,
    typer.Option(
        help="Fraction to remove, such as 0.5: of the weights, or of the units' parameters."
    ),
]
PATTERN = typer.Option(help="`free`, or N:M such as 2:4, which keeps 2 of every 4 weights.")
Pattern = Annotated[str | None, PATTERN]
Statistics = Annotated[
    str | None,
    typer.Option(
        help="`dense`: layers see the dense model; `sequential`: the model as pruned so far."
    ),
]
Allocate = Annotated[
    str | None,
    typer.Option(
        help="How much each layer loses: `uniform`, `owl`, `sensitivity` or `heavy_tail`; of units "
        "`uniform`, `slopes` or `evolve`; a `table` of ratios stands in a recipe."
    ),
]
Unit = Annotated[
    str | None,
    typer.Option(
        help="What recipes of whole units take out instead of their own: `neuron`, `head`, "
        "`kv_group`, `width` or others of `prunezero list choices`."
    ),
]
SEED = typer.Option(
    help="Chooses the calibration text, and every draw of a search.", min=0, max=2**32 - 1
)
Seed = Annotated[int, SEED]
SEQUENCE_LENGTH = typer.Option(
    help="Tokens in a window.", min=2, max=LONGEST_WINDOW, rich_help_panel=_SIZES
)
SequenceLength = Annotated[int, SEQUENCE_LENGTH]
CALIBRATION_TOKENS = typer.Option(
    help="Tokens to make statistics from.", min=2, max=MOST_TOKENS, rich_help_panel=_SIZES
)
CalibrationTokens = Annotated[int, CALIBRATION_TOKENS]
EVALUATION_TOKENS = typer.Option(
    help="Tokens of search and of validation text.",
    min=2,
    max=MOST_TOKENS,
    rich_help_panel=_SIZES,
)
EvaluationTokens = Annotated[int, EVALUATION_TOKENS]
TEST_TOKENS = typer.Option(
    help="Tokens of test text.", min=2, max=MOST_TOKENS, rich_help_panel=_SIZES
)
TestTokens = Annotated[int, TEST_TOKENS]
DTYPE = typer.Option(
    help="Of forward passes: `float32`, `bfloat16`, or `auto`, which is float32 on a CPU and "
    "bfloat16 on a GPU where the files hold that; `doctor` tells which is faster. A saved "
    "model keeps the dtype of its files."
)
Dtype = Annotated[str, DTYPE]
DEVICE = typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1` ...")
Device = Annotated[str, DEVICE]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result for machines to this file.", callback=expanded),
]
RunsDir = Annotated[
    Path,
    typer.Option(help="Folder of all runs and of the MLflow database.", callback=expanded),
]


def make_settings(
    sequence_length: int,
    calibration_tokens: int,
    evaluation_tokens: int,
    test_tokens: int,
    seed: int,
) -> Settings:
    """The settings that the options spell.

    Raises:
        RecipeError: a size is smaller than one window.
    """
    from prunezero.pruning.testbed import Settings

    sizes = (sequence_length, calibration_tokens, evaluation_tokens, test_tokens)
    settings = Settings(*sizes, seed)
    check_settings(settings)
    return settings


def usual_settings(
    sequence_length: int | None,
    calibration_tokens: int | None,
    evaluation_tokens: int | None,
    test_tokens: int | None,
    seed: int,
) -> Settings:
    """The settings that the options spell, and the usual ones in the place of what was not typed.

    Raises:
        RecipeError: a size is smaller than one window.
    """
    from prunezero.pruning.testbed import Settings

    usual = Settings()
    return make_settings(
        usual.sequence_length if sequence_length is None else sequence_length,
        usual.calibration_tokens if calibration_tokens is None else calibration_tokens,
        usual.evaluation_tokens if evaluation_tokens is None else evaluation_tokens,
        usual.test_tokens if test_tokens is None else test_tokens,
        seed,
    )


def prompt_settings(
    sequence_length: int | None,
    calibration_tokens: int | None,
    evaluation_tokens: int | None,
    seed: int,
) -> Settings:
    """The settings of windows whose first part is a prompt; see `usual_settings`.

    Raises:
        RecipeError: a size is smaller than one window, or a window too short.
    """
    from prunezero.pruning.prompts import WINDOW, PromptSizes, window_tokens

    length = WINDOW if sequence_length is None else sequence_length
    PromptSizes.of(length)
    usual = window_tokens(length)
    calibration = calibration_tokens or usual["calibration_tokens"]
    evaluation = evaluation_tokens or usual["evaluation_tokens"]
    return make_settings(length, calibration, evaluation, usual["test_tokens"], seed)


def refuse_of_weights(recipe: AnyRecipe, typed: Mapping[str, Any]) -> None:
    """Refuse options that say nothing of recipes of run time.

    Args:
        typed: by the name of an option, something true where it was typed.

    Raises:
        RecipeError: names the first.
    """
    for name, value in typed.items():
        if value:
            raise RecipeError(
                f"recipe {recipe.name} is of unit: {recipe.unit.word}, which is left out while a "
                f"model runs, and --{name.replace('_', '-')} says nothing of that; leave it out"
            )


def check_settings(settings: Settings) -> None:
    """Refuse texts that hold no window.

    Raises:
        RecipeError: a size is smaller than one window.
    """
    length = settings.sequence_length
    if length < 2:
        raise RecipeError(f"--sequence-length must be at least 2 but is {length}")
    for name in ("calibration", "evaluation", "test"):
        tokens = getattr(settings, f"{name}_tokens")
        if tokens < length:
            raise RecipeError(
                f"--{name}-tokens must be at least one window of {length} tokens but is {tokens}"
            )


def load_recipes(names: str) -> list[AnyRecipe]:
    """The recipes of a comma-separated list.

    Raises:
        RecipeError: one is unknown or faulty, or none is named.
    """
    from prunezero.pruning.recipes.staged import load_recipe

    words = [word.strip() for word in names.split(",") if word.strip()]
    if not words:
        raise RecipeError("--recipes names no recipe; see `prunezero list recipes`")
    return [load_recipe(word) for word in words]


def on_unit(recipes: Sequence[AnyRecipe], word: str | None) -> list[AnyRecipe]:
    """The recipes, those of whole units for other units; those of single weights as they are.

    Raises:
        RecipeError: one removes nothing from the weights; or there are no such units, or none of
            the recipes is of whole units, or one has stages of units of its own.
    """
    from prunezero.pruning.recipes.staged import recipes_of, refuse_stages

    for one in [one for recipe in recipes for one in recipes_of(recipe)]:
        one.unit.row.refuse_run_time()
    if word is None:
        return list(recipes)
    if all(recipe.unit.is_usual for recipe in recipes):
        raise RecipeError(
            f"--unit {word} is for recipes that remove whole units, and none is named; see "
            "`prunezero list recipes`"
        )
    why = f"each of units of its own, so --unit {word} says nothing of it; leave one of them out"
    return [
        recipe if recipe.unit.is_usual else refuse_stages(recipe, why).on_unit(word)
        for recipe in recipes
    ]


def check_statistics(word: str | None) -> None:
    """Refuse a word that is no kind of statistics.

    Raises:
        RecipeError: it is not.
    """
    from prunezero.pruning.recipes.recipe import STATISTICS

    if word is not None and word not in STATISTICS:
        raise RecipeError(f"--statistics must be {' or '.join(STATISTICS)} but is '{word}'")


def check_json(path: Path | None) -> None:
    """Refuse a file that cannot be written, before long work.

    Raises:
        OutputError: its folder does not exist, or cannot be written.
    """
    from prunezero.files.places import try_file

    try_file(path, "--json")


def write_json(data: Any, path: Path | None) -> None:
    """Write a result for machines, numbers that are not finite as null; what was there is replaced.

    Raises:
        OutputError: the file cannot be written; what was there is as it was.
    """
    from prunezero.files.atomic import write_text

    if path is not None:
        write_text(json.dumps(_plain(data), indent=2, allow_nan=False) + "\n", path)


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not abs(data) < float("inf"):
        return None
    return data
