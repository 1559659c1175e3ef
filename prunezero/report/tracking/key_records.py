"""Records of recipes of run time for MLflow: of a comparison, and of a search for them.

They stand in the experiment of all others, under the same names wherever the same thing is meant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunezero.files.digests import joined_digest
from prunezero.pruning.key_rows import described_row
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Testbed
from prunezero.report.runs.attention_run import candidate_row
from prunezero.report.tracking.records import RunRecord, run_record
from prunezero.report.tracking.search_records import baseline_row, described
from prunezero.searching.attending.search import Tried
from prunezero.searching.attending.session import AttentionSession
from prunezero.searching.experiment.provenance import surroundings

Row = Mapping[str, Any]
# Files of a search that are also kept in MLflow.
_FILES = ("candidates.parquet", "candidates.csv", "results.json", "front.md", "pareto.png", "front")


def tracked_key_rows(
    rows: Sequence[Row], testbed: Testbed, *, origin: str = "baseline"
) -> Iterator[RunRecord]:
    """Records of compared recipes; measuring one again updates its record."""
    around = json.dumps(surroundings(testbed), sort_keys=True)
    for row in rows:
        rule = [str(row.get(key)) for key in ("formula", "sparsity", "compare")]
        rule += [json.dumps(row.get("choices"), sort_keys=True)]
        digest = joined_digest([around, *rule])[:16]
        is_dense = row["recipe"] == "dense"
        key = f"keys/{row['recipe']}/{row['sparsity']:g}/{digest}"
        name = f"{row['recipe']} keys" if is_dense else f"{row['recipe']} {row['sparsity']:g} keys"
        full = {**baseline_row(dict(row)), **described([testbed]), "origin": origin}
        yield run_record(key, name, "dense" if is_dense else "baseline", full)


def attention_key(session: AttentionSession, name: str) -> str:
    """The key of a search: others of the same name, in other folders, have other keys."""
    return f"{name}-{session.journal.digest[:8]}"


def tracked_attention(
    session: AttentionSession, name: str, *, finished: bool, folder: Path | None = None
) -> RunRecord:
    """The record of the search itself, the parent of its candidates."""
    files = [] if folder is None else [folder / file for file in _FILES]
    return RunRecord(
        key=attention_key(session, name),
        name=name,
        role="search",
        params=_asked(session),
        finished=finished,
        artifacts=tuple(path for path in files if path.exists()),
    )


def tracked_tried(tried: Tried, session: AttentionSession, name: str) -> RunRecord:
    """The record of a recipe whose KL was measured on search text."""
    config = session.config
    row = {**candidate_row(tried), **_asked(session), "compare": tried.recipe.compare}
    row |= {"fingerprint": tried.recipe.criterion.fingerprint, "removed": config.sparsity}
    parent = attention_key(session, name)
    title = f"g{tried.generation:02d}-c{tried.slot:04d} · " + " ".join(
        f"{value:.4f}" for value in tried.kl.values()
    )
    return run_record(f"{parent}/{tried.slot:05d}", title, "candidate", row, parent_key=parent)


def tracked_finals(
    rows: Sequence[Row], recipes: Sequence[Recipe], session: AttentionSession, folder: Path
) -> Iterator[RunRecord]:
    """Records of the front, and of its published rivals, on validation text."""
    parent = attention_key(session, folder.name)
    by_name = {recipe.name: recipe for recipe in recipes}
    for row in rows:
        recipe = by_name.get(row["recipe"]) or Recipe.load(row["recipe"])
        if "refused" in row:
            continue
        measured = {**row, "kept": round(1 - (session.config.sparsity or 0), 12)}
        full = {**described_row(session.testbed, recipe, measured), **_asked(session)}
        full = baseline_row(full) | {"origin": "search" if row["is_found"] else "baseline"}
        file = folder / "front" / f"{recipe.name}.yaml"
        yield run_record(
            f"{parent}/final/{recipe.name}",
            recipe.name,
            "champion" if row["is_found"] else "baseline",
            full,
            parent_key=parent,
            artifacts=(file,) if row["is_found"] else (),
        )


def _asked(session: AttentionSession) -> dict[str, Any]:
    config = session.config
    space = config.space_content
    return {
        **described([session.testbed]),
        "space": space.name,
        "signals": space.costliest_signal,
        "unit": space.unit,
        "sparsity": config.sparsity,
        "seed": config.seed,
        "calibration_tokens": config.calibration_tokens,
        "sequence_length": config.sequence_length,
    }
