"""The options that several commands share, so that a word means the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunezero.errors import RecipeError, reason

if TYPE_CHECKING:
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.pruning.testbed import Settings

_TEXT = "Calibration and evaluation text"
_SIZES = "How much text"
# Upper ends of what may be asked for: beyond them are slips of the keyboard alone.
LONGEST_WINDOW, MOST_TOKENS = 10**6, 10**9
MOST_ROWS = 10**9
# Of a cluster; `asking.check_hands` knows what this machine bears.
MOST_HANDS = 4096


def expanded(path: Path | None) -> Path | None:
    """A path as typed, with the home folder for `~`, which a shell leaves behind `=`."""
    try:
        return None if path is None else path.expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{path}: {reason(error)}") from error


Model = Annotated[
    str, typer.Option(help="Hub id, folder, .gguf file, or `demo` (a 135M Llama-class model).")
]
TextName = Annotated[
    str,
    typer.Option("--text", help="Hub dataset id, .txt/.jsonl/.parquet file or folder, or `demo`."),
]
Sparsity = Annotated[
    float | None, typer.Option(help="Fraction of the weights to remove, such as 0.5.")
]
Pattern = Annotated[
    str | None,
    typer.Option(help="`free`, or N:M such as 2:4, which keeps 2 of every 4 weights."),
]
AlsoModel = Annotated[
    list[str] | None,
    typer.Option(
        help="Another model that the criterion has to be good on; may be given several times. "
        "Perplexities are then geometric means over all."
    ),
]
StartFrom = Annotated[
    list[str] | None,
    typer.Option(
        help="Name or folder of another search, or a recipe, whose rules to start from; may be "
        "given several times. What the space cannot write is left out."
    ),
]
Draws = Annotated[
    int,
    typer.Option(
        min=1,
        max=99,
        help="Draws of calibration text that the criterion has to be good on, by seeds that count "
        "up from --seed. Perplexities are then geometric means over all.",
    ),
]
Also = Annotated[
    str,
    typer.Option(
        help="Other sparsities and patterns that the criterion has to serve, such as `0.7,2:4`; "
        "perplexities are then geometric means over all."
    ),
]
Statistics = Annotated[
    str | None,
    typer.Option(
        help="`dense`: layers see the dense model; `sequential`: the model as pruned so far."
    ),
]
Allocate = Annotated[
    str | None,
    typer.Option(
        help="How much each layer loses: `uniform`, `owl`, `sensitivity` or `heavy_tail`; "
        "a `table` of ratios stands in a recipe."
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Chooses the calibration text, and every draw of a search.", min=0, max=2**32 - 1
    ),
]
SequenceLength = Annotated[
    int,
    typer.Option(help="Tokens in a window.", min=2, max=LONGEST_WINDOW, rich_help_panel=_SIZES),
]
CalibrationTokens = Annotated[
    int,
    typer.Option(
        help="Tokens to make statistics from.", min=2, max=MOST_TOKENS, rich_help_panel=_SIZES
    ),
]
EvaluationTokens = Annotated[
    int,
    typer.Option(
        help="Tokens of search and of validation text.",
        min=2,
        max=MOST_TOKENS,
        rich_help_panel=_SIZES,
    ),
]
TestTokens = Annotated[
    int,
    typer.Option(help="Tokens of test text.", min=2, max=MOST_TOKENS, rich_help_panel=_SIZES),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of forward passes: `float32`, `bfloat16`, or `auto`, which is float32 on a CPU and "
        "bfloat16 on a GPU where the files hold that; `doctor` tells which is faster. A saved "
        "model keeps the dtype of its files."
    ),
]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1` ...")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result for machines to this file.", callback=expanded),
]
RunsDir = Annotated[
    Path,
    typer.Option(help="Folder of all runs and of the MLflow database.", callback=expanded),
]
# Of a search alone.
Signals = Annotated[
    str | None,
    typer.Option(
        help="The dearest that a rule may look at: `none` (weights alone), `activations`, "
        "`gradients` or `second order` (Gram matrices), in order of cost. Terminals and choices of "
        "the space that need more are left out: with `gradients` the features H, V and U, the "
        "updates obs, admm and swaps, and damping; with `activations` also G, G1, F, D and the "
        "gradient weights of the search's own layer error. Left out: as the space says."
    ),
]
Space = Annotated[str, typer.Option(help="Name or .yaml file; see `prunezero list spaces`.")]
Budget = Annotated[
    int | None, typer.Option(help="Candidates with a new mask to screen.", min=1, max=MOST_ROWS)
]
TimeLimit = Annotated[
    str | None, typer.Option("--time", help="Such as 90s, 10m or 2h, of the search alone.")
]
SearchName = Annotated[
    str | None, typer.Option("--name", help="Folder of this search inside the runs folder.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where --name stopped.")]
FromScratch = Annotated[
    bool, typer.Option("--from-scratch", help="Do not start from published formulas.")
]
StrategyWord = Annotated[
    str,
    typer.Option(
        "--strategy", help="Who proposes; the others are controls to compare `evolution` with."
    ),
]
Workers = Annotated[
    int,
    typer.Option(help="Processes or actors that judge candidates.", min=1, max=MOST_HANDS),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Of each who judges; the cores divided by --workers if left out.",
        min=1,
        max=MOST_HANDS,
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(help="Judge on Ray: address of a cluster, or `local`; see docs/scaling.md."),
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

    if sequence_length < 2:
        raise RecipeError(f"--sequence-length must be at least 2 but is {sequence_length}")
    for name, tokens in (
        ("calibration", calibration_tokens),
        ("evaluation", evaluation_tokens),
        ("test", test_tokens),
    ):
        if tokens < sequence_length:
            raise RecipeError(
                f"--{name}-tokens must be at least one window of {sequence_length} tokens but is "
                f"{tokens}"
            )
    return Settings(sequence_length, calibration_tokens, evaluation_tokens, test_tokens, seed)


def load_recipes(names: str) -> list[Recipe]:
    """The recipes of a comma-separated list.

    Raises:
        RecipeError: one is unknown or faulty, or none is named.
    """
    from prunezero.pruning.recipes.recipe import Recipe

    words = [word.strip() for word in names.split(",") if word.strip()]
    if not words:
        raise RecipeError("--recipes names no recipe; see `prunezero list recipes`")
    return [Recipe.load(word) for word in words]


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
