"""Summary of a search: what it found, read from its folder while it runs, stopped or finished."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prunezero.errors import (
    PruneZeroError,
    RecipeError,
    SearchError,
    did_you_mean,
    reason,
    shell_word,
)
from prunezero.formula.criterion import Criterion
from prunezero.pruning.recipes.measured_rows import is_result
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Settings
from prunezero.report.plots.plots import pareto_front
from prunezero.report.quoting import latex_text
from prunezero.report.runs.search_file import read_config
from prunezero.report.tracking.records import shown
from prunezero.searching.evaluation.journal import read_journal
from prunezero.searching.evaluation.request import Request
from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.experiment.budgets import with_names
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.experiment.objectives import Objective, objective_of
from prunezero.searching.experiment.provenance import comparable, config_of
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
from prunezero.searching.session import make_task
from prunezero.searching.spaces.space import SearchSpace

Row = dict[str, Any]
# Fields of an experiment that only say where something is, or how it is called.
_PLACES = ("model", "also_model", "text", "dtype", "device", "space", "start_from", "from_scratch")
# What a search measures its baselines on before it begins.
BASELINE_SPLITS = ("search", "validation")


@dataclass(frozen=True)
class Run:
    """What the folder of a search holds."""

    folder: Path
    """where it is"""
    header: Mapping[str, Any]
    """what its results depend on, see `comparable`"""
    config: SearchConfig
    """the experiment; where no file names its models and text, their fingerprints stand there"""
    has_names: bool
    """whether some file does"""
    baselines: Sequence[Row]
    """the dense model and the published recipes, as far as they were measured"""
    answers: Mapping[str, int]
    """how many results the journal holds, by kind"""
    candidates: Sequence[Row] | None
    """rows of `candidates.parquet`, some seconds old while a search runs; None before the first"""
    recipe: Recipe | None
    """the winner, with its measured rows in the provenance; None of an unfinished search"""

    @cached_property
    def task(self) -> Task:
        """What was searched for."""
        return make_task(self.config)

    @property
    def measured(self) -> list[Row]:
        """The rows of the winner and its baselines as a finished search reports them, else none."""
        return [] if self.recipe is None else list(self.recipe.provenance.get("measured", []))


def list_runs_command(runs_dir: Path) -> str:
    """What to type for the searches of a runs folder."""
    where = "" if runs_dir == Path("runs") else f" --runs-dir {shell_word(runs_dir)}"
    return f"`prunezero list runs{where}`"


def find_run(run: str, runs_dir: Path) -> Path:
    """The folder of a search, by its name inside the runs folder or by its path.

    Raises:
        SearchError: there is none; the message gives the nearest.
    """
    for folder in (runs_dir / run, Path(run)):
        if os.path.isfile(folder / "journal.jsonl"):
            return folder
        if run and os.path.isdir(folder):
            raise SearchError(
                f"there is no search '{run[:80]}' in {runs_dir}, for the folder {folder} has no "
                f"journal.jsonl; see {list_runs_command(runs_dir)}"
            )
    known = [journal.parent.name for journal in sorted(runs_dir.glob("*/journal.jsonl"))]
    name = Path(run).name
    near = f"; did you mean '{name}'?" if name in known else did_you_mean(name, known)
    see = near or f"; see {list_runs_command(runs_dir)}"
    raise SearchError(f"there is no search '{run[:80]}' in {runs_dir}{see}")


def read_run(folder: Path) -> Run:
    """Everything that the folder of a search tells.

    Raises:
        PruneZeroError: a file of it is damaged.
    """
    records = read_journal(folder / "journal.jsonl")
    whole = records[0]["header"]
    known = {(one["kind"], one["key"]): one["result"] for one in records[1:]}
    try:
        header = comparable(whole)
        _check_header(header)
        config = _config_of(whole, header)
        task = make_task(config)
    except (PruneZeroError, LookupError, TypeError, ValueError) as error:
        raise SearchError(f"{folder}: {reason(error)}") from error
    asked = read_config(folder)
    if asked is not None:
        # Whatever was moved since is named there.
        config = config.model_copy(update={key: getattr(asked, key) for key in _PLACES})
    recipe = folder / "recipe.yaml"
    names = model_names(header, config)
    return Run(
        folder=folder,
        header=header,
        config=config,
        has_names=asked is not None or "config" in whole,
        baselines=[with_names(row, names) for row in _baselines(task, known)],
        answers=Counter(kind for kind, _ in known),
        candidates=read_candidates(folder),
        recipe=Recipe.load(recipe) if recipe.is_file() else None,
    )


def _config_of(whole: Mapping[str, Any], header: Mapping[str, Any]) -> SearchConfig:
    """The experiment that a header tells of; of an older one, names are fingerprints.

    Raises:
        SearchError: the header is not one of a search.
    """
    if "config" in whole:
        return config_of(whole)
    try:
        also = ("also", "draws", "targets", "ignore", "strategy")
        return SearchConfig.of(
            model=header["model"],
            also_model=header.get("also_models", ()),
            text=header["text"],
            space_content=SearchSpace.model_validate(header["space"]),
            sparsity=header["sparsity"],
            pattern=header["pattern"],
            **{key: header[key] for key in also if key in header},
            dtype=header["dtype"].removeprefix("torch."),
            **{**header["settings"], "seed": header["seed"]},
            calibration_seed=header["settings"]["seed"],
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SearchError(
            "it was searched by another version of prunezero, or its journal was changed "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_header(header: Mapping[str, Any]) -> None:
    """Refuse what a search never writes.

    Raises:
        LookupError, TypeError, ValueError: a key is missing, or holds something else.
    """
    sizes = vars(Settings(**header["settings"])).values()
    words = [header[key] for key in ("model", "text", "dtype", "pattern")]
    words += [*header.get("also_models", []), *header.get("also", [])]
    numbers = [*sizes, header["seed"], header.get("draws", 1)]
    for kind, values in ((str, words), (int, numbers)):
        wrong = [value for value in values if not isinstance(value, kind)]
        if wrong:
            raise ValueError(f"{wrong[0]!r:.40} in its header")


def model_names(header: Mapping[str, Any], config: SearchConfig) -> dict[str, str]:
    """What the models of a search are called, by fingerprint, its own first."""
    prints = [str(one) for one in (header.get("model"), *header.get("also_models", ()))]
    return dict(zip(prints, (config.model, *config.also_model), strict=False))


def _baselines(task: Task, known: Mapping[tuple[str, str], Row]) -> list[Row]:
    found = []
    for recipe in (None, *baselines(task)):
        request = Request.of(recipe, BASELINE_SPLITS)
        row = known.get((request.kind, request.key))
        if row is not None and "fault" not in row and is_result(row):
            found.append({**row, "recipe": recipe.name if recipe else "dense"})
    return found


def read_candidates(folder: Path) -> list[Row] | None:
    """The rows of `candidates.parquet`; None where there is no such file.

    Raises:
        SearchError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = folder / "candidates.parquet"
    if not path.is_file():
        return None
    try:
        return list(parquet.read_table(path).to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise SearchError(f"{path} cannot be read: {reason(error, path)}") from error


def counted(candidates: Sequence[Row]) -> dict[str, int]:
    """How many candidates came how far up the rungs."""
    statuses = Counter(row["status"] for row in candidates)
    own = [row for row in candidates if row["status"] != "known"]
    objective = objective_of(candidates)
    return {
        "proposed": len(candidates),
        "known": statuses["known"],
        "invalid": statuses["invalid"],
        "screened": statuses["new"],
        "by quick KL": sum(row["kl"] is not None for row in own),
        "measured": sum(objective.of(row, "search") is not None for row in own),
    }


def front(candidates: Sequence[Row], top: int | None = None, *, each: int = 1) -> list[Row]:
    """The candidates that none of equal or smaller size beats on search text, small to large.

    The search's objective says which is the better one.

    Args:
        top: keeps that many sizes, those of the best on search text; None keeps all.
        each: how many of each such size to keep, its best first; the others of a size may be
            beaten by smaller ones.
    """
    objective = objective_of(candidates)

    def value(row: Mapping[str, Any]) -> float:
        found = objective.of(row, "search")
        return math.inf if found is None else found

    measured = [
        row
        for row in candidates
        if row["status"] == "new" and row.get(objective.key("search")) is not None
    ]
    best = pareto_front(measured, value)
    # Along the front, larger is better.
    kept = best[max(0, len(best) - top) if top is not None else 0 :]
    measured.sort(key=lambda row: (value(row), row["slot"]))
    found = []
    for size in [row["complexity"] for row in kept]:
        found += [row for row in measured if row["complexity"] == size][:each]
    return [dict(row) for row in found]


def rule_of(row: Mapping[str, Any]) -> Rule:
    """The rule that a row of `candidates.parquet` stands for.

    Raises:
        PruneZeroError: its formula or its choices cannot be read.
    """
    try:
        choices = json.loads(row["choices"] or "{}")
    except ValueError as error:
        raise SearchError(
            f"candidate {row.get('slot')}: its choices '{row['choices']}' are no JSON; they were "
            "written by another version of prunezero"
        ) from error
    return Rule(Criterion.parse(row["formula"]), choices)


def best_row(run: Run) -> Row | None:
    """The row of `candidates.parquet` that the winner was; None where it is not known."""
    slot = run.recipe.provenance.get("slot") if run.recipe else None
    return next((row for row in run.candidates or () if row["slot"] == slot), None)


def results(run: Run) -> list[Row]:
    """The dense model, the baselines and the winner with every perplexity that is known of them.

    Raises:
        RecipeError: the recipe of the winner holds rows that are none.
    """
    keys = dict.fromkeys(("search_perplexity", run.task.objective.key("search")))
    searched = {row["recipe"]: {key: row.get(key) for key in keys} for row in run.baselines}
    winner = best_row(run) or {}
    if not run.measured:
        return [dict(row) for row in run.baselines]
    try:
        searched[run.measured[-1]["recipe"]] = {key: winner.get(key) for key in keys}
        unknown = dict.fromkeys(keys)
        return [{**row, **searched.get(row["recipe"], unknown)} for row in run.measured]
    except (KeyError, TypeError) as error:
        raise RecipeError(f"{run.folder / 'recipe.yaml'} holds rows that are no results") from error


def latex_of_front(rows: Sequence[Row]) -> str:
    """The front as a LaTeX table; it needs the packages booktabs and amsmath."""
    lines = [
        r"% \usepackage{amsmath,booktabs}",
        r"\begin{tabular}{rrrl}",
        r"\toprule",
        r"Complexity & Search & Validation & Formula \\",
        r"\midrule",
    ]
    objective = objective_of(rows)
    for row in rows:
        formula = f"${Criterion.parse(row['formula']).latex}$"
        rule = rule_of(row)
        for pattern, own in rule.per_layer.items():
            formula += rf"; \texttt{{{latex_text(pattern)}}}: ${own.latex}$"
        around = ", ".join(rule.with_per_layer({}).other_choices)
        if around:
            formula += f" ({latex_text(around)})"
        numbers = [
            _number(objective, row[objective.key(split)]) for split in ("search", "validation")
        ]
        lines.append(rf"{' & '.join([str(row['complexity']), *numbers, formula])} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _number(objective: Objective, value: float | None) -> str:
    return "--" if value is None else shown(objective, value)
