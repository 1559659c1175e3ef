"""Recipes by two objectives that disagree: which are dominated by none?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunezero.report.plots.axes import canvas, plain_log_ticks
from prunezero.report.plots.labels import place_labels
from prunezero.report.plots.plots import is_number, save_picture

Row = Mapping[str, Any]
Key = tuple[str, str]

# Of a row's `is_found` -> (label, colour, marker).
_KINDS = {
    False: ("published", "#0072b2", "s"),
    True: ("found", "#e69f00", "o"),
}


def pareto_picture(rows: Sequence[Row], path: Path, *, across: Key, upwards: Key) -> None:
    """One point for each recipe; those of rank 0 are joined, and both axes are logarithmic.

    Args:
        rows: with `recipe`, `is_found`, `rank`, and two numbers; others are left out.
        path: of the PNG.
        across, upwards: key of the number, which lower is better of, and its name in words.

    Raises:
        OutputError: the picture cannot be written.
    """
    keys = (across[0], upwards[0])
    shown = [row for row in rows if all(_is_positive(row.get(key)) for key in keys)]
    figure, axes = canvas("Recipes by what they are good at", across[1])
    axes.set_ylabel(upwards[1], fontsize=12)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for is_found, (label, color, marker) in _KINDS.items():
        members = [row for row in shown if bool(row["is_found"]) == is_found]
        if members:
            places = [[row[key] for row in members] for key in keys]
            axes.scatter(*places, color=color, marker=marker, s=44, label=label, zorder=4)
    front = sorted((row[keys[0]], row[keys[1]]) for row in shown if row.get("rank") == 0)
    if front:
        axes.plot(*zip(*front, strict=True), color="#7f7f7f", lw=1, zorder=3)
        axes.legend(loc="upper right", frameon=True, edgecolor="#dddddd")
        plain_log_ticks(axes.xaxis, *axes.get_xlim())
        plain_log_ticks(axes.yaxis, *axes.get_ylim())
    points = [(row[keys[0]], row[keys[1]]) for row in shown]
    labels = [(*point, row["recipe"], "#333333") for point, row in zip(points, shown, strict=True)]
    place_labels(axes, labels, points)
    save_picture(figure, path)


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0
