"""Records of a search and of measured recipes for MLflow: one for each run there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prunezero.files.digests import joined_digest
from prunezero.pruning.compare import layers_told
from prunezero.pruning.recipes.recipe import Recipe, with_patterns
from prunezero.pruning.testbed import Testbed, beginning
from prunezero.report.tracking.records import RunRecord, candidate_name, run_record, shown
from prunezero.searching.experiment.budgets import in_words
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.provenance import surroundings
from prunezero.searching.session import Session

# Files of a finished or stopped search that are also kept in MLflow.
_FILES = ("recipe.yaml", "pruner.py", "results.json", "candidates.parquet", "candidates.csv")
_VIEWS = ("pareto.png", "proxy.png", "progress.png", "optuna.log")


def tracked_rows(
    rows: Sequence[dict[str, Any]], testbeds: Sequence[Testbed], *, origin: str = "baseline"
) -> Iterator[RunRecord]:
    """Records of the dense model and of recipes; measuring one again updates its record.

    Args:
        testbeds: of all models over which the rows are means.
    """
    around = json.dumps([surroundings(one) for one in testbeds], sort_keys=True)
    for row in rows:
        is_dense = row["recipe"] == "dense"
        told = ("sparsity", "pattern", "allocate", "statistics", "seed")
        words = [row[key] for key in told]
        words += [row["sequence_length"], row["calibration_tokens"]]
        words += [f"{row['draws']} draws"] if "draws" in row else []
        words += [f"{word} {row[word]}" for word in ("recover", "targets", "ignore") if word in row]
        # Numbers of other text, versions or formulas are no news of the same run.
        rule = [str(row.get(key)) for key in ("formula", "criteria", "compare", "update")]
        # Of a formula with the choices of a winner, all of these.
        rule += [json.dumps(row["choices"], sort_keys=True)] if "choices" in row else []
        words += [joined_digest([around, *rule])[:16]]
        key = "/".join(str(part) for part in ["baseline", row["recipe"], *words])
        name = (
            row["recipe"] if is_dense else f"{row['recipe']} {row['sparsity']:g} {row['pattern']}"
        )
        full = {**baseline_row(row), **described(testbeds), "origin": origin}
        yield run_record(key, name, "dense" if is_dense else "baseline", full)


def search_key(session: Session, name: str) -> str:
    """The key of a search: others of the same name, in other folders, have other keys."""
    return f"{name}-{session.journal.digest[:8]}"


def tracked_candidate(candidate: Candidate, session: Session, name: str) -> RunRecord:
    """The record of a candidate that was measured on the model."""
    task = session.task
    recipe = task.recipe(candidate.rule, "candidate")
    row = {
        **candidate.row(),
        **described(session.testbeds),
        "criteria": "; ".join(with_patterns(recipe.criteria)),
        "compare": recipe.compare,
        "allocate": recipe.allocate.text,
        "update": ", ".join(recipe.updates) or "none",
        "pattern": in_words(task.budgets),
        "sparsity": task.budgets[0].amount,
        "statistics": "dense",
        "seed": task.seed,
        "draws": task.config.draws,
        **layers_told(task.config.targets, task.config.ignore),
    }
    parent = search_key(session, name)
    key = f"{parent}/{candidate.slot:05d}"
    return run_record(key, candidate_name(row), "candidate", row, parent_key=parent)


def tracked_winner(
    recipe: Recipe, row: dict[str, Any], session: Session, name: str, folder: Path
) -> RunRecord:
    """The record of the search's winner, with its files."""
    told = described(session.testbeds)
    full = {**baseline_row(row), **told, "origin": "search"}
    named = (folder / file for file in ("recipe.yaml", "pruner.py"))
    files = tuple(path for path in named if path.is_file())
    objective = session.task.objective
    title = f"{name} champion · {shown(objective, row[objective.key('validation')])}"
    parent = search_key(session, name)
    return run_record(
        f"{parent}/champion", title, "champion", full, parent_key=parent, artifacts=files
    )


def tracked_search(
    session: Session, name: str, *, finished: bool, artifacts: tuple[Path, ...] = ()
) -> RunRecord:
    """The record of the search itself, the parent of its candidates."""
    task = session.task
    params: dict[str, Any] = {
        **task.config.shown(),
        **described(session.testbeds),
        "pattern": in_words(task.budgets),
        "sparsity": task.budgets[0].amount,
        "draws": task.config.draws,
        "compare": task.space.compare,
        **layers_told(task.config.targets, task.config.ignore),
        "seeds": len(task.seeds),
    }
    return RunRecord(
        key=search_key(session, name),
        name=name,
        role="search",
        params=params,
        finished=finished,
        artifacts=artifacts,
    )


def kept_files(folder: Path) -> tuple[Path, ...]:
    """What of a run's folder is also kept in MLflow, as far as it is there."""
    return tuple(folder / name for name in (*_FILES, *_VIEWS) if (folder / name).is_file())


def described(testbeds: Sequence[Testbed]) -> dict[str, str]:
    """Models, text, dtype and what windows begin with, as parameters of a record."""
    own, *others = testbeds
    also = ", ".join(one.language_model.name for one in others)
    return {
        "model": own.language_model.name,
        **({"also_models": also} if also else {}),
        "text": own.text.name,
        "dtype": own.language_model.dtype_word,
        **beginning(one.begin_with for one in testbeds),
    }


def baseline_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of results with the fingerprint of its formula."""
    from prunezero.formula.criterion import Criterion

    named = {**row, "name": row["recipe"]}
    if row["formula"]:
        named["fingerprint"] = Criterion.parse(row["formula"]).fingerprint
    return named
