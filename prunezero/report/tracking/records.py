"""What one run in the experiment list says, and how it survives a trip through a file.

Every role (search, candidate, baseline, dense, champion) takes its names from the two tables below,
so that a chart can hold all of them.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prunezero.files.digests import joined_digest
from prunezero.report.quoting import markdown_code
from prunezero.searching.experiment.objectives import FURTHER, Objective, objective_of

# Row key -> metric name. Section names before the slash group the charts of the web page.
METRIC_NAMES = {
    "search_perplexity": "eval/search_perplexity",
    "validation_perplexity": "eval/validation_perplexity",
    "test_perplexity": "eval/test_perplexity",
    "validation_rounding": "eval/validation_rounding",
    "test_rounding": "eval/test_rounding",
    **{key: f"eval/{key}" for key in FURTHER},
    "kl": "eval/kl",
    "top1_agreement": "eval/top1_agreement",
    "top5_agreement": "eval/top5_agreement",
    "acceptance": "eval/acceptance",
    "layer_error": "eval/layer_error",
    **{
        f"{text}_{key}": f"eval/{text}_{key}"
        for text in ("text", "recall", "needle", "needles", "cloze")
        for key in ("kl", "kl_early", "kl_middle", "kl_late", "perplexity", "answered", "lost")
    },
    "links": "keys/links",
    "sparsity_reached": "mask/sparsity",
    "removed": "units/removed",
    "units_removed": "units/count_removed",
    "parameters": "units/parameters",
    "parameters_without_embeddings": "units/parameters_without_embeddings",
    "flops": "units/flops_per_token",
    "kv_bytes": "units/kv_bytes_per_token",
    "seconds": "cost/seconds",
    "steps_skipped": "recovery/steps_skipped",
    "complexity": "formula/complexity",
}
# Row key, of (step, value) pairs -> name of a curve.
CURVE_NAMES = {
    "training_losses": "recovery/loss",
    "held_out_losses": "recovery/held_out_loss",
}
# Row key, of curves by source of the text -> name of the curves, with the source behind it.
SOURCE_CURVE_NAMES = {
    "source_shares": "recovery/share",
    "source_growth": "recovery/growth",
}
PARAM_NAMES = (
    "formula",
    "criteria",
    "fingerprint",
    "complexity",
    "signal",
    "unit",
    "removed_of",
    "compare",
    "pattern",
    "allocate",
    "update",
    "recover",
    "sources",
    "targets",
    "ignore",
    "sparsity",
    "statistics",
    "model",
    "also_models",
    "text",
    "calibration_tokens",
    "sequence_length",
    "windows_begin_with",
    "seed",
    "draws",
    "generation",
    "origin",
)
TAG_NAMES = ("status", "parents", "mask")
# By which a run is found again.
KEY_TAG = "prunezero.key"
LONGEST_NAME = 250
LONGEST_PARAM = 6000
LONGEST_TAG = 8000

Number = int | float


@dataclass(frozen=True)
class RunRecord:
    """One run as it should stand in the list; recording the same key again updates it."""

    key: str
    """Unique and stable, such as "night/00017"; the part before the slash is the search."""
    name: str
    """Shown in the list; an empty name leaves an existing run's name as it is."""
    role: str
    """"search", "candidate", "baseline", "dense" or "champion"."""
    params: Mapping[str, str | Number] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metric name to value, logged at step 0."""
    curves: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Metric name to (step, value) pairs."""
    tags: Mapping[str, str] = field(default_factory=dict)
    parent_key: str | None = None
    note: str = ""
    """Markdown on the run's page."""
    artifacts: tuple[Path, ...] = ()
    """Files or folders to copy."""
    finished: bool = True
    """False leaves the run marked as running."""
    recorded_at: int = 0
    """Milliseconds since 1970; 0 until the tracker takes the record."""


def run_record(
    key: str,
    name: str,
    role: str,
    row: Mapping[str, Any],
    *,
    parent_key: str | None = None,
    artifacts: tuple[Path, ...] = (),
) -> RunRecord:
    """The record of one flat row; row keys outside the tables and values of None are left out."""
    formula = row.get("formula")
    return RunRecord(
        key=key,
        name=name,
        role=role,
        params=row_params(row),
        metrics=row_metrics(row),
        curves=row_curves(row),
        tags={tag: _joined(row[tag]) for tag in TAG_NAMES if row.get(tag) not in (None, "", ())},
        parent_key=parent_key,
        note=markdown_code(formula) if formula else "",
        artifacts=artifacts,
    )


def row_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The row's numbers under their metric names."""
    return {
        metric: float(row[key]) for key, metric in METRIC_NAMES.items() if row.get(key) is not None
    }


def row_curves(row: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """The row's curves under their metric names; those of a source end in its place and name."""
    curves = {name: list(row[key]) for key, name in CURVE_NAMES.items() if row.get(key)}
    for key, name in SOURCE_CURVE_NAMES.items():
        for place, (source, points) in enumerate(row.get(key, {}).items(), start=1):
            if points:
                # The place tells sources apart whose names are alike once they are cleaned.
                curves[clean_name(f"{name}/{place} {source}")] = list(points)
    return curves


def row_params(row: Mapping[str, Any]) -> dict[str, str | Number]:
    """The row's choices under their parameter names, which are the row's own keys."""
    return {name: row[name] for name in PARAM_NAMES if row.get(name) is not None}


def candidate_name(row: Mapping[str, Any]) -> str:
    """A run name that sorts and reads well: "g07-c0031 · 8.41", by what the search measures."""
    name = f"g{int(row.get('generation') or 0):02d}-c{int(row['slot']):04d}"
    objective = objective_of([row])
    value = row.get(objective.key("search"))
    return name if value is None else f"{name} · {shown(objective, value)}"


def shown(objective: Objective, value: float | None) -> str:
    """What was measured as text; None is a number that was not finite."""
    if value is None:
        return "not finite"
    return f"{value:.2f}" if objective.is_usual else f"{value:.4f}"


def clean_name(name: str) -> str:
    """The name with what MLflow refuses replaced by "_": at most 250 characters, never a path up.

    Letters, digits, space and `_ - . : /` stay.
    """
    parts = re.sub(r"[^\w\-.:/ ]", "_", name).split("/")
    kept = [part.strip() for part in parts if part.strip() not in ("", ".", "..")]
    return posixpath.join(*kept)[:LONGEST_NAME].rstrip("/ ") if kept else "unnamed"


def clean_title(name: str) -> str:
    """A run name on one line of at most 250 characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())[:LONGEST_NAME]


def clean_key(key: str) -> str:
    """A key that can stand inside quotes in a search of MLflow, which knows no escapes.

    Keys that differ stay different: one that had to be changed or cut ends in a digest.
    """
    clean = re.sub(r"[\"'`\\%\x00-\x1f]", "_", key)[:LONGEST_NAME]
    return clean if clean == key else f"{clean[: LONGEST_NAME - 33]}~{joined_digest([key])}"


def key_filter(key: str) -> str:
    """The search of MLflow that finds the run of one `clean_key`."""
    return f"tags.`{KEY_TAG}` = '{key}'"


def search_filter(key: str) -> str:
    """The search of MLflow that finds all runs of the search, or kind, of a `clean_key`."""
    return f"tags.`{KEY_TAG}` LIKE '{key.split('/')[0]}%'"


def split_finite(metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """Finite metrics, and the names of the others: an infinity would ruin every axis."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    return finite, sorted(set(metrics) - set(finite))


def record_to_line(record: RunRecord) -> str:
    """One line of strict JSON, without its newline."""
    fields = asdict(record)
    fields["metrics"] = {name: _encoded(value) for name, value in record.metrics.items()}
    fields["curves"] = {
        name: [[step, _encoded(value)] for step, value in points]
        for name, points in record.curves.items()
    }
    fields["params"] = {name: _encoded(value) for name, value in record.params.items()}
    fields["artifacts"] = [str(path) for path in record.artifacts]
    return json.dumps(fields, allow_nan=False)


def record_from_line(line: str) -> RunRecord:
    """The record that `record_to_line` wrote.

    Raises:
        ValueError: the line is torn or foreign.
    """
    try:
        fields = json.loads(line)
        fields["metrics"] = {name: float(value) for name, value in fields["metrics"].items()}
        fields["curves"] = {
            name: [(int(step), float(value)) for step, value in points]
            for name, points in fields["curves"].items()
        }
        fields["artifacts"] = tuple(Path(path) for path in fields["artifacts"])
        record = RunRecord(**fields)
        is_sound = _is_sound(record)
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"no record ({error})") from error
    if not is_sound:
        raise ValueError("a record with words where numbers should be, or numbers for words")
    return record


def _is_sound(record: RunRecord) -> bool:
    """Whether every field has the type that it should have.

    Raises:
        AttributeError: one that should hold others holds none.
    """
    words = (record.key, record.name, record.role, record.note, *record.tags.values())
    kinds = ((str, words), (str | int | float, record.params.values()))
    return (
        all(isinstance(value, kind) for kind, values in kinds for value in values)
        and isinstance(record.parent_key, str | None)
        and isinstance(record.finished, bool)
        and isinstance(record.recorded_at, int)
        and 0 <= record.recorded_at < 2**53
    )


def stamped(record: RunRecord, now: int) -> RunRecord:
    """The record with the moment it was taken, so that a replay writes the very same points."""
    return record if record.recorded_at else replace(record, recorded_at=now)


def _encoded(value: Any) -> Any:
    """Numbers that JSON cannot hold as words that `float` reads back; numpy scalars as Python's."""
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _joined(value: Any) -> str:
    """A tag's text; several values are joined by a space."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return " ".join(str(part) for part in value)
    return str(value)
