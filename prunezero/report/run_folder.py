"""The folder of a search, `runs/NAME/`: which files it holds, and how its results are recorded."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prunezero.errors import OutputError, RecipeError
from prunezero.pruning.bench import Bench
from prunezero.pruning.recipe import Recipe
from prunezero.report.candidates import write_candidates
from prunezero.report.export import PrunerFields, write_pruner
from prunezero.report.plots import pareto, progress, proxy_against_truth
from prunezero.report.records import RunRecord, candidate_name, run_record
from prunezero.report.whole_files import replace_whole, write_json
from prunezero.searching.candidate import Candidate
from prunezero.searching.mirror import study_journal
from prunezero.searching.regimes import in_words, seeds_of
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
    "sparsity_reached",
    *_PERPLEXITIES,
    "kl",
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
    return runs_dir / name


def check_runs_dir(runs_dir: Path) -> None:
    """Refuse a runs folder that cannot be written, before any work.

    Raises:
        OutputError: it cannot.
    """
    if os.path.isfile(runs_dir):
        raise OutputError(f"--runs-dir {runs_dir} is a file; name a folder")
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        # Permissions alone do not tell: the disk may be read-only, or full.
        with tempfile.TemporaryFile(dir=runs_dir):
            pass
    except OSError as error:
        raise OutputError(f"--runs-dir {runs_dir} cannot be written: {error.strerror}") from error


def write_run(
    session: Session,
    folder: Path,
    candidates: Sequence[Candidate],
    rivals: Sequence[dict[str, Any]],
) -> None:
    """Write what is known so far: every candidate as a table, the pictures, and a study."""
    rows = [candidate.row() for candidate in candidates]
    write_candidates(rows, folder)
    named = [baseline_row(row) for row in rivals]
    pareto(rows, named, folder / "pareto.png")
    proxy_against_truth(rows, folder / "proxy.png")
    progress(rows, named, folder / "progress.png")
    _write_study(study_journal(candidates, session.task, folder.name), folder / STUDY)


def _write_study(text: str, path: Path) -> None:
    """Write the study for Optuna's dashboard; no file without a trial.

    The tables hold all that it shows, so a disk that does not take it is a warning and no error.
    """

    def write(beside: Path) -> None:
        beside.write_text(text, encoding="utf-8")

    try:
        if text:
            replace_whole(path, write)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written, so Optuna is shown nothing new: {error.strerror}",
            stacklevel=3,
        )


def write_winner(recipe: Recipe, rows: Sequence[dict[str, Any]], folder: Path) -> Recipe:
    """Write `recipe.yaml`, `pruner.py` and `results.json` of a finished search.

    Args:
        rows: results on validation and test text; the winner's last.

    Returns:
        The recipe, with its measured results in the provenance.
    """
    measured = [{key: row[key] for key in _MEASURED if row.get(key) is not None} for row in rows]
    recipe = recipe.model_copy(update={"provenance": {**recipe.provenance, "measured": measured}})
    recipe.save(folder / "recipe.yaml")
    write_pruner(pruner_fields(recipe), folder / "pruner.py")
    write_json({"rows": list(rows)}, folder / "results.json")
    return recipe


def pruner_fields(recipe: Recipe) -> PrunerFields:
    """What an exported page takes from a recipe."""
    return PrunerFields(
        name=recipe.name,
        criterion=recipe.criterion,
        compare=recipe.compare,
        pattern=recipe.pattern,
        targets=recipe.targets,
        ignore=recipe.ignore,
        allocate=recipe.allocate.text,
        statistics=recipe.statistics,
        update=", ".join(recipe.updates) or "none",
        permute=recipe.permute.text,
        schedule=recipe.schedule.text,
        recover=recipe.recover.text,
        damping=recipe.damping,
        source=recipe.source,
        results=tuple(_sentence(row) for row in recipe.provenance.get("measured", [])),
    )


def _sentence(row: dict[str, Any]) -> str:
    validation, test = (_shown(row.get(key)) for key in _PERPLEXITIES)
    mean = "geometric mean of " if row.get("regimes") else ""
    return (
        f"{row['recipe']}: {mean}test perplexity {test}, validation {validation}, at sparsity "
        f"{row['sparsity']:g} ({row['pattern']}), windows of "
        f"{row['sequence_length']} tokens, {seeds_of(row)}."
    )


def _shown(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.2f}"


def tracked_rows(
    rows: Sequence[dict[str, Any]],
    bench: Bench,
    *,
    origin: str = "baseline",
    also_benches: Sequence[Bench] = (),
) -> Iterator[RunRecord]:
    """Records of the dense model and of recipes; measuring one again updates its record.

    Args:
        also_benches: of further models over which the rows are means.
    """
    models = [one.language_model.fingerprint[:8] for one in (bench, *also_benches)]
    for row in rows:
        is_dense = row["recipe"] == "dense"
        words = ("sparsity", "pattern", "allocate", "statistics", "seed")
        conditions = [row[key] for key in words]
        conditions += [row["sequence_length"], row["calibration_tokens"]]
        conditions += [f"{row['draws']} draws"] if "draws" in row else []
        conditions += ["+".join(models), bench.text.fingerprint[:8]]
        key = "/".join(str(part) for part in ["baseline", row["recipe"], *conditions])
        name = (
            row["recipe"] if is_dense else f"{row['recipe']} {row['sparsity']:g} {row['pattern']}"
        )
        full = {**baseline_row(row), **described(bench, also_benches), "origin": origin}
        yield run_record(key, name, "dense" if is_dense else "baseline", full)


def tracked_candidate(candidate: Candidate, session: Session, name: str) -> RunRecord:
    """The record of a candidate that was measured on the model."""
    task = session.task
    recipe = task.recipe(candidate.rule, "candidate")
    row = {
        **candidate.row(),
        **described(session.bench, session.also_benches),
        "compare": recipe.compare,
        "allocate": recipe.allocate.text,
        "update": ", ".join(recipe.updates) or "none",
        "pattern": in_words(task.regimes),
        "sparsity": task.sparsity,
        "statistics": "dense",
        "seed": task.seed,
        "draws": task.draws,
    }
    key = f"{name}/{candidate.slot:05d}"
    return run_record(key, candidate_name(row), "candidate", row, parent_key=name)


def tracked_champion(
    recipe: Recipe, row: dict[str, Any], session: Session, name: str, folder: Path
) -> RunRecord:
    """The record of the search's winner, with its files."""
    told = described(session.bench, session.also_benches)
    full = {**baseline_row(row), **told, "origin": "search"}
    files = tuple(folder / file for file in ("recipe.yaml", "pruner.py"))
    title = f"{name} champion · {_shown(row['validation_perplexity'])}"
    record = run_record(
        f"{name}/champion", title, "champion", full, parent_key=name, artifacts=files
    )
    return record


def tracked_search(
    session: Session, name: str, *, finished: bool, artifacts: tuple[Path, ...] = ()
) -> RunRecord:
    """The record of the search itself, the parent of its candidates."""
    task, bench = session.task, session.bench
    params: dict[str, Any] = {
        **described(bench, session.also_benches),
        "space": task.space.name,
        "sparsity": task.sparsity,
        "pattern": in_words(task.regimes),
        "compare": task.space.compare,
        "seed": task.seed,
        "draws": task.draws,
        "seeds": len(task.seeds),
        "calibration_tokens": bench.settings.calibration_tokens,
        "sequence_length": bench.settings.sequence_length,
    }
    return RunRecord(
        key=name, name=name, role="search", params=params, finished=finished, artifacts=artifacts
    )


def described(bench: Bench, also_benches: Sequence[Bench] = ()) -> dict[str, str]:
    """Models, text and dtype, as parameters of a record."""
    others = ", ".join(one.language_model.name for one in also_benches)
    return {
        "model": bench.language_model.name,
        **({"also_models": others} if others else {}),
        "text": bench.text.name,
        "dtype": bench.language_model.dtype_word,
    }


def baseline_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of results with what its formula says about itself."""
    from prunezero.formula.criterion import Criterion

    named = {**row, "name": row["recipe"]}
    if row["formula"]:
        criterion = Criterion.parse(row["formula"])
        named |= {
            "complexity": criterion.complexity,
            "signal": criterion.signal,
            "fingerprint": criterion.fingerprint,
        }
    return named


def list_runs(runs_dir: Path) -> list[dict[str, Any]]:
    """Searches of a runs folder: name, formula and measured perplexity of each winner."""
    rows = []
    for journal in sorted(runs_dir.glob("*/journal.jsonl")):
        folder = journal.parent
        row: dict[str, Any] = {"name": folder.name, "formula": "", "validation": "", "test": ""}
        state = "go on with --resume"
        if (folder / "recipe.yaml").is_file():
            try:
                row |= _winner(Recipe.load(folder / "recipe.yaml"))
                state = "finished"
            except (RecipeError, LookupError, TypeError, ValueError):
                # One file that somebody changed must not hide the other runs.
                state = "recipe.yaml cannot be read"
        rows.append(row | {"state": state})
    return rows


def _winner(recipe: Recipe) -> dict[str, str]:
    last = recipe.provenance["measured"][-1]
    validation, test = (f"{last[key]:.2f}" if key in last else "" for key in _PERPLEXITIES)
    return {"formula": recipe.criterion.text, "validation": validation, "test": test}
