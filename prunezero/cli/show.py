"""`prunezero show`: what a search found, from its folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunezero.cli.options import MOST_ROWS, JsonFile, RunsDir, check_json, write_json
from prunezero.cli.search_setup import way_on
from prunezero.errors import SearchError
from prunezero.searching.experiment.objectives import FURTHER

if TYPE_CHECKING:
    from prunezero.cli.fitting import Table
    from prunezero.report.runs.summary import Run

# Columns of the front, by the key of a candidate's row.
_FRONT = {
    "complexity": "words",
    "search_perplexity": "search",
    "validation_perplexity": "validation",
    **{key: " ".join(key.split("_")) for key in FURTHER},
    "kl": "quick KL",
    "signal": "needs",
    "formula": "formula",
    "choices": "choices",
}


def show(
    run: Annotated[str, typer.Argument(help="Name of a search in the runs folder, or its path.")],
    latex: Annotated[
        bool, typer.Option("--latex", help="Print the front as a LaTeX table, and nothing else.")
    ] = False,
    top: Annotated[
        int, typer.Option(help="Sizes on the front, those of the best ones.", min=1, max=MOST_ROWS)
    ] = 10,
    each: Annotated[
        int,
        typer.Option(help="Candidates of each size on the front, its best.", min=1, max=MOST_ROWS),
    ] = 1,
    runs_dir: RunsDir = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Show what a search looked for and found: its counts, baselines, front and winner.

    The front holds the best candidate of each size that no smaller one beats, by what the search
    measures on search text. No model is loaded, and a search that runs or was stopped is shown as
    far as it is.

    Examples:

        prunezero show first

        prunezero show runs/first --top 5 --json first.json

        prunezero show first --each 3

        prunezero show first --latex > front.tex
    """
    from prunezero.report.runs.attention_run import is_attention_run
    from prunezero.report.runs.summary import find_run, front, latex_of_front, read_run

    check_json(json_file)
    folder = find_run(run, runs_dir)
    if is_attention_run(folder):
        _show_keys(folder, latex, json_file)
        return
    found = read_run(folder)
    best = front(found.candidates or (), top, each=each)
    if latex:
        print(latex_of_front(best))
    else:
        _print(found, best, each)
    write_json(_data(found, best), json_file)


def _show_keys(folder: Path, latex: bool, json_file: Path | None) -> None:
    """Show a search for recipes of keys in a cache, which has a front of two objectives."""
    from prunezero.cli.attention_tables import keys_data, show_keys
    from prunezero.report.runs.attention_run import read_attention_run

    if latex:
        raise SearchError(
            f"{folder} has a front by two objectives, of which there is no LaTeX table; its "
            "front.md is a Markdown table"
        )
    run = read_attention_run(folder)
    show_keys(run)
    write_json(keys_data(run), json_file)


def _print(run: Run, front: Sequence[dict[str, Any]], each: int) -> None:
    from prunezero.cli.tables import console, print_results, say, say_same_terms
    from prunezero.report.runs.folder import STUDY
    from prunezero.report.runs.summary import results

    for name, value in _about(run).items():
        say(f"{name:<9} {value}")
    say(_counts(run))
    rows = results(run)
    if rows:
        shown = run.task.objective.key("test" if run.measured else "validation")
        print_results(rows, "measured", best=shown)
        say_same_terms(rows, run.recipe)
    if front:
        console.print(_front_table(front, each))
    if (run.folder / STUDY).is_file():
        say(
            f"every measured candidate in a browser: optuna-dashboard {STUDY}, in the folder of "
            "the search, after pip install optuna-dashboard"
        )
    if run.recipe is None:
        say(f"not finished; go on with: {way_on(run.folder)} and a --budget or --time")
        return
    say("winner", style="bold")
    say(_recipe_text(run).rstrip())


def _about(run: Run) -> dict[str, str]:
    """What was searched, a line each."""
    from prunezero.report.runs.summary import model_names
    from prunezero.searching.experiment.budgets import in_words

    config, task = run.config, run.task
    start = ", from scratch" if config.from_scratch else ""
    layers = {"targets": config.targets, "ignore": config.ignore}
    return {
        "search": str(run.folder),
        "model": " and ".join(model_names(run.header, config).values()),
        "text": config.text,
        "sparsity": f"{task.budgets[0].amount:g}, pattern {in_words(task.budgets)}",
        "space": f"{task.space.name}, strategy {config.strategy}, seed {config.seed}{start}",
        "signals": f"{task.space.costliest_signal}, the costliest that a rule can look at",
        **({} if task.objective.is_usual else {"objective": task.objective.text}),
        **({"draws": f"{config.draws} of calibration text"} if config.draws > 1 else {}),
        **{key: ", ".join(value) for key, value in layers.items() if value},
        "windows": f"{config.sequence_length} tokens each; {config.calibration_tokens} "
        f"tokens calibrate in {str(run.header['dtype']).removeprefix('torch.')}",
    }


def _counts(run: Run) -> str:
    """How many candidates came how far; of a search without a table, what its journal holds."""
    from prunezero.report.runs.summary import counted

    if run.candidates is not None:
        return ", ".join(f"{count} {what}" for what, count in counted(run.candidates).items())
    results = ", ".join(f"{count} of {kind}" for kind, count in sorted(run.answers.items()))
    return (
        f"its candidates are listed once the first is screened; its journal holds "
        f"{results or 'no results'} so far"
    )


def _front_table(front: Sequence[dict[str, Any]], each: int) -> Table:
    from prunezero.cli.fitting import Table
    from prunezero.cli.tables import cell
    from prunezero.report.runs.summary import rule_of

    those = "the best" if each == 1 else f"the best {each}"
    table = Table(title=f"front: {those} of each size on search text")
    shown = [key for key in _FRONT if any(row.get(key) not in (None, "") for row in front)]
    for key in shown:
        is_word = key in ("signal", "formula", "choices")
        table.add_column(
            _FRONT[key],
            justify="left" if is_word else "right",
            overflow="fold",
            no_wrap=not is_word,
        )
    for row in front:
        told = {**row, "choices": ", ".join(rule_of(row).other_choices)}
        table.add_row(*(cell(key, told[key]) for key in shown))
    return table


def _recipe_text(run: Run) -> str:
    """The winner's recipe as its file spells it, without where it comes from."""
    from prunezero.pruning.recipes.documents import read_document, to_yaml

    fields = read_document(run.folder / "recipe.yaml")
    return to_yaml({key: value for key, value in fields.items() if key != "provenance"})


def _data(run: Run, front: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is shown, for machines."""
    from prunezero.report.runs.summary import counted, results

    recipe = run.recipe.model_dump(mode="json", by_alias=True) if run.recipe else None
    return {
        "folder": str(run.folder),
        "finished": run.recipe is not None,
        "header": dict(run.header),
        "config": run.config.model_dump(mode="json"),
        "counts": None if run.candidates is None else counted(run.candidates),
        "answers": dict(run.answers),
        "rows": results(run),
        "front": list(front),
        "recipe": recipe,
    }
