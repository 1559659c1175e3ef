"""The table and the picture of `units.py`, from the lines that it wrote."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rows import under_equal

from prunezero.report.plots.quality import quality_against_size

# Rows stand in one table only where these are the same. Threads and processors differ by rounding
# alone, and are named below.
CONDITIONS = (
    *("model", "text", "sequence_length", "calibration_tokens", "evaluation_tokens"),
    "test_tokens",
)

# Recipes of one share that the picture shows.
SHOWN = 10

Row = dict[str, Any]


def report(rows: list[Row]) -> list[str]:
    """The table as Markdown: means over draws, and in brackets the largest minus the smallest."""
    if not rows:
        return ["# Recipes that remove whole units", "", "Nothing was measured yet."]
    lines = [
        "# Recipes that remove whole units",
        "",
        "Made by `python benchmarks/units.py`. Each recipe loses the same share of the parameters "
        "of all blocks, as published and with the columns that stay refitted by least squares. A "
        "cell is the mean over draws of calibration text and in brackets the largest minus the "
        "smallest; without brackets there is one draw. Parameters are those outside of embeddings "
        "and head, FLOPs those of a token in a window of 128, both beside the dense model's. "
        "Nothing was chosen by test text.",
        "",
    ]
    for found in under_equal(rows, CONDITIONS):
        lines += _under_equal_conditions(found)
    return lines


def _under_equal_conditions(rows: list[Row]) -> list[str]:
    one = rows[0]
    dense = [row for row in rows if row["recipe"] == "dense"]
    machines = sorted({f"{row['threads']} threads of {row['cpu']}" for row in rows})
    lines = [
        f"## {one['model']}, float32, windows of {one['sequence_length']} tokens",
        "",
        f"{one['calibration_tokens']:,} calibration, {one['evaluation_tokens']:,} validation and "
        f"{one['test_tokens']:,} test tokens of {one['text']} text; dense: validation "
        f"{cell(dense, 'validation_perplexity')}, test {cell(dense, 'test_perplexity')}; "
        f"{' and '.join(machines)}.",
        "",
    ]
    for share in sorted({row["share"] for row in rows} - {0.0}):
        chosen = [row for row in rows if row["share"] == share]
        lines += [
            f"### {100 * share:g} % of the blocks' parameters",
            "",
            *_table(chosen, dense),
            "",
        ]
    return lines


def _table(rows: list[Row], dense: list[Row]) -> list[str]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"], row["update"]].append(row)
    measured = {key: found for key, found in groups.items() if "refused" not in found[0]}
    ranked = sorted(measured, key=lambda key: mean(measured[key], "validation_perplexity"))
    lines = [
        "| recipe | update | draws | validation | test | KL | parameters | FLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in ranked:
        found = measured[key]
        cells = [cell(found, f"{split}_perplexity") for split in ("validation", "test")]
        parts = [part(found, dense, name) for name in ("parameters_without_embeddings", "flops")]
        lines.append(
            f"| `{key[0]}` | {key[1]} | {len(found)} | "
            + " | ".join([*cells, cell(found, "kl", 3), *parts])
            + " |"
        )
    refused = sorted(
        {(key[0], found[0]["refused"]) for key, found in groups.items() if "refused" in found[0]}
    )
    return [*lines, *(f"\n`{name}` was refused: {why}" for name, why in refused)]


def mean(rows: list[Row], key: str) -> float:
    """The mean of a column; infinite where a value was not finite."""
    return statistics.fmean(float("inf") if row[key] is None else row[key] for row in rows)


def cell(rows: list[Row], key: str, digits: int = 2) -> str:
    """The mean of a column, and in brackets the largest minus the smallest."""
    values = [float("inf") if row[key] is None else row[key] for row in rows]
    if not values:
        return "-"
    mean = statistics.fmean(values)
    digits = 0 if mean >= 1000 else digits
    spread = f" ({max(values) - min(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def part(rows: list[Row], dense: list[Row], key: str) -> str:
    """The mean of a column beside the dense model's."""
    if not dense:
        return "-"
    return f"{100 * mean(rows, key) / mean(dense, key):.1f} %"


def draw(rows: list[Row], path: Path) -> None:
    """Quality against size, the rows of the first conditions and draw.

    Each recipe stands there once at each share, under the better update, and only the best few: all
    that lose the same share stand in one column.
    """
    if not rows:
        return
    first = tuple(rows[0].get(key) for key in CONDITIONS)
    best: dict[tuple[str, float], Row] = {}
    for row in sorted(rows, key=lambda row: row.get("validation_perplexity") or float("inf")):
        is_shown = tuple(row.get(key) for key in CONDITIONS) == first
        if is_shown and row["seed"] == rows[0]["seed"] and "refused" not in row:
            name = row["recipe"] + (" + refit" if "refit" in row["update"] else "")
            best.setdefault((row["recipe"], row["share"]), {**row, "name": name})
    shares = {share for _, share in best}
    shown = [
        row
        for share in shares
        for row in [one for (_, at), one in best.items() if at == share][:SHOWN]
    ]
    quality_against_size(shown, path)
