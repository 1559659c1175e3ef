"""Run folder of a search for criteria of keys: which files does it hold, and what do they say?

Beside `search.json` and the journal: every recipe that was tried (`candidates.parquet`, `.csv`),
those of the front as files to use (`front/`), and the front beside its published rivals on
validation text (`results.json`, `front.md`, `pareto.png`).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunezero.errors import OutputError, SearchError, reason
from prunezero.files.atomic import replace_whole, write_json, write_text
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.plots.fronts import pareto_picture
from prunezero.report.runs.search_file import headed, read_config
from prunezero.searching.attending.finalists import table
from prunezero.searching.attending.proposals import choices_of
from prunezero.searching.attending.search import Found, Tried
from prunezero.searching.evaluation.journal import read_journal
from prunezero.searching.experiment.config import SearchConfig

Row = dict[str, Any]
TEXTS = ("text", "recall")
FRONT = "front"
_WORDS = ("origin", "status", "formula", "choices", "signal", "mask", "fault")
_COUNTS = ("slot", "generation", "complexity")
_NUMBERS = tuple(f"{text}_{key}" for text in TEXTS for key in ("lost", "kl"))
_COLUMNS = (
    *("slot", "generation", "origin", "parents", "status", "formula", "choices"),
    *("complexity", "signal", "mask", *_NUMBERS, "fault"),
)


@dataclass(frozen=True)
class AttentionRun:
    """What the folder of such a search holds."""

    folder: Path
    """where it is"""
    config: SearchConfig
    """the experiment"""
    answers: Mapping[str, int]
    """how many results the journal holds, by kind"""
    front: Sequence[Recipe]
    """recipes that the search made and no other one beats on search text"""
    rows: Sequence[Row]
    """the front and its published rivals on validation text; none before the end"""


def candidate_row(tried: Tried) -> Row:
    """One recipe that was tried, in the columns of the table."""
    recipe = tried.recipe
    row: Row = {"slot": tried.slot, "generation": tried.generation, "origin": tried.origin}
    row |= {"parents": list(tried.parents), "formula": recipe.criterion.text}
    row |= {"choices": json.dumps(choices_of(recipe), sort_keys=True)}
    row |= {"complexity": recipe.criterion.complexity, "signal": recipe.signal}
    row |= {"status": "measured" if tried.kl else "screened"}
    row |= {"mask": tried.mask, "fault": tried.fault}
    row |= {f"{text}_lost": value for text, value in tried.lost.items()}
    return row | {f"{text}_kl": value for text, value in tried.kl.items()}


def write_candidates(found: Found, folder: Path) -> None:
    """Write `candidates.parquet` and `candidates.csv`, in the order of proposals.

    Raises:
        OutputError: the folder cannot be written.
    """
    rows = [candidate_row(one) for one in found.tried]
    try:
        replace_whole(folder / "candidates.parquet", lambda path: _write_parquet(rows, path))
        replace_whole(folder / "candidates.csv", lambda path: _write_csv(rows, path))
    except OSError as error:
        raise OutputError(
            f"the candidate tables in {folder} cannot be written: {reason(error)}"
        ) from error


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    types = dict.fromkeys(_WORDS, pa.string()) | dict.fromkeys(_COUNTS, pa.int64())
    types |= dict.fromkeys(_NUMBERS, pa.float64()) | {"parents": pa.list_(pa.string())}
    schema = pa.schema([(name, types[name]) for name in _COLUMNS])
    plain = [{name: row.get(name) for name in _COLUMNS} for row in rows]
    parquet.write_table(pa.Table.from_pylist(plain, schema=schema), path)


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "parents": " ".join(row["parents"])} for row in rows)


def write_front(recipes: Sequence[Recipe], folder: Path) -> list[Path]:
    """Write each recipe of the front as a file, and take away those of an earlier front.

    Raises:
        OutputError: the folder cannot be written.
    """
    place = folder / FRONT
    try:
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob("*.yaml"):
            old.unlink()
        # They are of an earlier front.
        for name in ("results.json", "front.md", "pareto.png"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{place} cannot be written: {reason(error, place)}") from error
    paths = [place / f"{recipe.name}.yaml" for recipe in recipes]
    for recipe, path in zip(recipes, paths, strict=True):
        recipe.save(path)
    return paths


def write_results(found: Found, rows: Sequence[Row], config: SearchConfig, folder: Path) -> None:
    """Write the front and its rivals on validation text: for machines, readers and eyes.

    Raises:
        OutputError: the folder cannot be written.
    """
    taus = {text: found.rung_tau(text) for text in TEXTS}
    write_json(
        {"rows": list(rows), "rung_tau": {k: _finite(v) for k, v in taus.items()}},
        folder / "results.json",
    )
    lines = [*_head(found, taus, config), "", *table(rows, TEXTS)]
    write_text("\n".join(lines) + "\n", folder / "front.md")
    pareto_picture(
        rows,
        folder / "pareto.png",
        across=("text_kl", "KL on text that goes on, nats per token"),
        upwards=("recall_kl", "KL on recall, nats per token"),
    )


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _head(found: Found, taus: Mapping[str, float], config: SearchConfig) -> list[str]:
    told = ", ".join(f"{text} {tau:.2f}" for text, tau in taus.items())
    return [
        f"# Criteria by which {1 - (config.sparsity or 0):.0%} of a prompt's keys stay",
        "",
        f"Of model {config.model} on {config.text} text, search space {config.space_content.name}, "
        f"seed {config.seed}, windows of {config.sequence_length} tokens: {found.proposed} recipes "
        f"drawn, {len(found.tried)} that keep keys of their own, {len(found.measured)} measured on "
        f"search text. Kendall's tau between attention lost and KL: {told}. The table is of "
        "validation text, KL in nats per token; rank 0 is dominated by none, and what the search "
        "found is bold.",
    ]


def is_attention_run(folder: Path) -> bool:
    """Whether the search in a folder is of keys in a cache, as far as any file tells.

    Raises:
        SearchError: `search.json` is damaged.
    """
    config = read_config(folder) or headed(folder)
    return config is not None and config.is_run_time


def read_attention_run(folder: Path) -> AttentionRun:
    """Everything that the folder of such a search tells.

    Raises:
        PruneZeroError: a file of it is damaged.
    """
    config = read_config(folder) or headed(folder)
    if config is None:
        raise SearchError(f"{folder} does not say what was searched; move it away")
    records = read_journal(folder / "journal.jsonl")
    return AttentionRun(
        folder,
        config,
        Counter(record["kind"] for record in records[1:]),
        [Recipe.load(path) for path in sorted((folder / FRONT).glob("*.yaml"), key=_number)],
        _rows_in(folder / "results.json"),
    )


def _number(path: Path) -> tuple[int, str]:
    """By the number behind the last dash, since text would put 10 before 2."""
    tail = path.stem.rpartition("-")[2]
    return (int(tail) if tail.isdecimal() else 0, path.stem)


def _rows_in(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_bytes())["rows"]
        if not all(isinstance(row["recipe"], str) for row in rows):
            raise ValueError("a row without a recipe")
        return list(rows)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SearchError(
            f"{path} cannot be read ({reason(error, path)}); go on with the search by --resume, "
            "which writes it anew"
        ) from error


def recipes_of_keys(source: str, runs_dir: Path) -> list[Recipe]:
    """The recipes that a search of keys may start from: one by name or file, or a search's front.

    Args:
        source: name of a published recipe, file of a recipe, or name or folder of a search.
        runs_dir: where searches are looked for by their names.

    Raises:
        PruneZeroError: there is none, or it has found nothing yet.
    """
    for folder in (runs_dir / source, Path(source)):
        if (folder / "journal.jsonl").is_file():
            front = read_attention_run(folder).front if is_attention_run(folder) else ()
            if not front:
                raise SearchError(
                    f"the search in {folder} has left no recipe of keys to start from; start from "
                    "another one"
                )
            return list(front)
    return [Recipe.load(source)]
