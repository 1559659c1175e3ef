"""Run folder `runs/NAME/` of a search: which files it holds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunezero.errors import OutputError, PruneZeroWarning, RecipeError, SearchError, reason
from prunezero.files.atomic import replace_text, write_json
from prunezero.files.places import try_inside
from prunezero.models.measures import TO_DENSE
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.export.page import no_page, write_pruner
from prunezero.report.plots.plots import pareto, progress, proxy_against_truth
from prunezero.report.runs.candidate_tables import write_candidates
from prunezero.report.runs.optuna_study import study_journal
from prunezero.report.runs.search_file import FILE as SEARCH_FILE
from prunezero.report.runs.search_file import read_config
from prunezero.report.tracking.search_records import baseline_row
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.objectives import FURTHER
from prunezero.searching.session import Session

# The file that `optuna-dashboard` opens.
STUDY = "optuna.log"
_PERPLEXITIES = ("validation_perplexity", "test_perplexity")
# What a recipe keeps of a row of results.
_MEASURED = (
    "recipe",
    "sparsity",
    "pattern",
    "seed",
    "draws",
    "calibration_tokens",
    "sequence_length",
    "windows_begin_with",
    "sparsity_reached",
    *_PERPLEXITIES,
    "validation_rounding",
    "test_rounding",
    *TO_DENSE,
    *FURTHER,
    "regimes",
)


def run_folder(runs_dir: Path, name: str) -> Path:
    """The folder of the search called `name`.

    Raises:
        OutputError: the name could not be a folder's, or `runs_dir` cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise OutputError(
            f"--name {name[:60]!r} must be 1 to 100 letters, digits, '_', '-' or '.', and begin "
            "with a letter or digit"
        )
    check_runs_dir(runs_dir)
    folder = runs_dir / name
    try_inside(folder, "the folder of the search,")
    return folder


def check_runs_dir(runs_dir: Path) -> None:
    """Refuse a runs folder that cannot be written, before any work.

    Raises:
        OutputError: it cannot.
    """
    try_inside(runs_dir, "--runs-dir")


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder in which a new search would replace files that no search of it has made.

    Raises:
        OutputError: it holds files, and no journal that says whose they are.
    """
    journal = folder / "journal.jsonl"
    if not folder.exists() or (journal.is_file() and journal.stat().st_size):
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; move it away, or choose another --name")
    # What a search leaves that could not begin.
    own = {journal.name, SEARCH_FILE} if _is_asked(folder) else {journal.name}
    held = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if held:
        raise OutputError(
            f"{folder} holds {held[0]} but no journal of a search, so nothing in it is replaced; "
            "move the folder away, or choose another --name"
        )


def _is_asked(folder: Path) -> bool:
    try:
        return read_config(folder) is not None
    except SearchError:
        return False


def write_run(
    session: Session,
    folder: Path,
    candidates: Sequence[Candidate],
    baselines: Sequence[dict[str, Any]],
) -> None:
    """Write what is known so far: every candidate as a table, the pictures, and a study."""
    rows = [candidate.row() for candidate in candidates]
    write_candidates(rows, folder)
    named = [baseline_row(row) for row in baselines]
    pareto(rows, named, folder / "pareto.png")
    proxy_against_truth(rows, folder / "proxy.png")
    progress(rows, named, folder / "progress.png")
    _write_study(study_journal(candidates, session.task, folder.name), folder / STUDY)


def _write_study(text: str, path: Path) -> None:
    """Write the study for Optuna's dashboard; no file without a trial.

    The tables hold all that it shows, so a disk that does not take it is a warning and no error.
    """
    try:
        if text:
            replace_text(text, path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written, so Optuna is shown nothing new: {reason(error, path)}",
            PruneZeroWarning,
            stacklevel=3,
        )


def write_winner(recipe: Recipe, rows: Sequence[dict[str, Any]], folder: Path) -> Recipe:
    """Write `recipe.yaml`, `results.json` and, where one page can follow the recipe, `pruner.py`.

    Args:
        rows: results on validation and test text; the winner's last.

    Returns:
        The recipe, with its measured results in the provenance.
    """
    measured = [{key: row[key] for key in _MEASURED if row.get(key) is not None} for row in rows]
    recipe = recipe.model_copy(update={"provenance": {**recipe.provenance, "measured": measured}})
    recipe.save(folder / "recipe.yaml")
    page = folder / "pruner.py"
    if no_page(recipe):
        # That of an earlier winner.
        page.unlink(missing_ok=True)
    else:
        write_pruner(recipe, page)
    write_json({"rows": list(rows)}, folder / "results.json")
    return recipe


def list_runs(runs_dir: Path) -> list[dict[str, Any]]:
    """Searches of a runs folder: name, formula and measured perplexity of each winner."""
    rows = []
    for journal in sorted(runs_dir.glob("*/journal.jsonl")):
        folder = journal.parent
        row: dict[str, Any] = {"name": folder.name, "formula": "", "validation": "", "test": ""}
        state = "go on with --resume"
        if (folder / "front").is_dir():
            row |= {"formula": _front(folder)}
            state = "finished" if (folder / "results.json").is_file() else state
        elif (folder / "recipe.yaml").is_file():
            try:
                row |= _winner(Recipe.load(folder / "recipe.yaml"))
                state = "finished"
            except (RecipeError, LookupError, TypeError, ValueError):
                # One file that somebody changed must not hide the other runs.
                state = "recipe.yaml cannot be read"
        rows.append(row | {"state": state})
    return rows


def _front(folder: Path) -> str:
    """Of a search by two objectives, how many recipes its front holds."""
    count = len(list((folder / "front").glob("*.yaml")))
    return f"{count} {'recipe' if count == 1 else 'recipes'} in {folder / 'front'}"


def _winner(recipe: Recipe) -> dict[str, str]:
    last = recipe.provenance["measured"][-1]
    validation, test = (f"{last[key]:.2f}" if key in last else "" for key in _PERPLEXITIES)
    return {"formula": recipe.text, "validation": validation, "test": test}
