"""Quality against size: what each way to prune a model leaves of it, and of its perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunezero.report.plots.axes import canvas, plain_log_ticks
from prunezero.report.plots.labels import place_labels
from prunezero.report.plots.plots import BASELINE, FAR_WORSE, is_number, save_picture

Row = Mapping[str, Any]

# Kind of unit -> (colour, marker); kinds that are not named here look like the last one.
UNITS = {
    "weight": ("#e69f00", "s"),
    "neuron": ("#0072b2", "o"),
    "width": ("#009e73", "^"),
    "other": ("#cc79a7", "D"),
}
SIZE = "parameters_without_embeddings"


def quality_against_size(rows: Sequence[Row], path: Path) -> None:
    """Perplexity on test text against parameters, one point for each row, the dense model too.

    Args:
        rows: with `name`, `test_perplexity` and `parameters_without_embeddings`; others are left
            out. What is far worse than the rest is named at the top edge instead.
        path: of the PNG.

    Raises:
        OutputError: the picture cannot be written.
    """
    shown = [row for row in rows if is_number(row.get("test_perplexity")) and row.get(SIZE)]
    figure, axes = canvas(
        "What a smaller model costs",
        "parameters outside of embeddings and head, in millions",
    )
    axes.set_ylabel("perplexity on the test text (log scale, lower is better)", fontsize=12)
    axes.set_yscale("log")
    pruned = [row for row in shown if row["name"] != "dense"]
    if pruned:
        best = min(row["test_perplexity"] for row in pruned)
        low = min(row["test_perplexity"] for row in shown)
        high = min(max(row["test_perplexity"] for row in pruned), FAR_WORSE * best)
        axes.set_ylim(low / 1.05, high * 1.1)
        plain_log_ticks(axes.yaxis, *axes.get_ylim())
    top = axes.get_ylim()[1]
    inside = [row for row in shown if row["test_perplexity"] <= top]
    for unit, (color, marker) in UNITS.items():
        members = [row for row in inside if _kind(row) == unit and row["name"] != "dense"]
        if members:
            axes.scatter(*_places(members), color=color, marker=marker, s=44, label=unit, zorder=4)
    dense = [row for row in inside if row["name"] == "dense"]
    axes.scatter(*_places(dense), color="#7f7f7f", marker="*", s=170, zorder=5)
    if pruned:
        axes.legend(title="what goes", loc="lower left", frameon=True, edgecolor="#dddddd")
    worse = [row for row in shown if row["test_perplexity"] > top]
    if worse:
        named = ", ".join(f"{row['name']} {row['test_perplexity']:,.0f}" for row in worse[:4])
        more = f" and {len(worse) - 4} more" if len(worse) > 4 else ""
        place = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "fontsize": 9}
        axes.text(1.0, 1.005, f"↑ far worse: {named}{more}", color=BASELINE, **place)
    ranked = sorted(inside, key=lambda row: float(row["test_perplexity"]))
    points = list(zip(*_places(inside), strict=True))
    place_labels(axes, [(*_place(row), row["name"], "#333333") for row in ranked], points)
    save_picture(figure, path)


def _kind(row: Row) -> str:
    unit = row.get("unit") or "weight"
    return unit if unit in UNITS else "other"


def _place(row: Row) -> tuple[float, float]:
    return row[SIZE] / 1e6, float(row["test_perplexity"])


def _places(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    places = [_place(row) for row in rows]
    return [x for x, _ in places], [y for _, y in places]
