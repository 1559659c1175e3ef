"""`prunezero compare` of recipes of run time: how does a model go on without some keys?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunezero.cli import options
from prunezero.cli.attention_tables import key_table
from prunezero.cli.tables import Bars, console, say, say_about, waiting

if TYPE_CHECKING:
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.pruning.testbed import Settings


def compare_keys(
    subject: tuple[str, str, str, str],
    recipes: Sequence[Recipe],
    sparsity: float | None,
    settings: Settings,
    places: tuple[Path | None, Path | None, Path],
) -> None:
    """Measure recipes of keys or links beside the model that keeps all, print and record them.

    Args:
        subject: model, text, dtype and device, as typed.
        places: of the JSON file and of the picture, if any, and the runs folder.

    Raises:
        PruneZeroError: a recipe cannot be installed, or nothing says how much goes.
    """
    from prunezero.pruning.key_rows import kept_share, key_rows
    from prunezero.pruning.testbed import set_up
    from prunezero.report.runs.folder import check_runs_dir
    from prunezero.report.tracking.key_records import tracked_key_rows
    from prunezero.report.tracking.tracker import Tracker

    model, text, dtype, device = subject
    json_file, plot, runs_dir = places
    kept_share(sparsity)
    check_runs_dir(runs_dir)
    with waiting(f"loading {model}"):
        testbed = set_up(model, text, settings, dtype=dtype, device=device)
    say_about([testbed])
    rows: list[dict[str, Any]] = []
    tracker = Tracker(runs_dir)
    try:
        with Bars() as bars:
            for row in key_rows(testbed, recipes, sparsity, progress=bars):
                rows.append(row)
                for record in tracked_key_rows([row], testbed):
                    tracker.record(record)
    finally:
        untracked = tracker.close()
        if rows:
            title = f"{len(rows) - 1} of {len(recipes)} recipes on {testbed.language_model.name}"
            console.print(key_table(rows, title))
            say(_conditions(rows[0], model, text, testbed.language_model.dtype_word))
            options.write_json({"model": model, "text": text, "rows": rows}, json_file)
            _draw(rows, plot)
        if untracked:
            say(f"{untracked} results could not be logged to MLflow yet; they are kept")


def _conditions(row: dict[str, Any], model: str, text: str, dtype: str) -> str:
    """The line under the table that says how its numbers were measured."""
    from prunezero.pruning.prompts import PromptSizes

    sizes = PromptSizes.of(row["sequence_length"])
    return (
        f"{model} in {dtype} on validation text of {text}: {sizes.following} tokens behind prompts "
        f"of {sizes.prompt} (text), and {sizes.repeated} of a prompt's beginning that come again "
        f"(recall); needle, needles and cloze: prompts whose number or last word is told word for "
        f"word; KL in nats per token to the model that keeps all keys, late: on the last third; KV "
        f"bytes for each token of a prompt"
    )


def _draw(rows: list[dict[str, Any]], plot: Path | None) -> None:
    """The picture of both KL; of recipes that somebody named none counts as found."""
    from prunezero.report.plots.fronts import pareto_picture
    from prunezero.searching.attending.finalists import ranked

    if plot is not None:
        shown = [{**row, "is_found": False} for row in rows if row["recipe"] != "dense"]
        pareto_picture(
            ranked(shown, ["text_kl", "recall_kl"]),
            plot,
            across=("text_kl", "KL on text that goes on, nats per token"),
            upwards=("recall_kl", "KL on recall, nats per token"),
        )
