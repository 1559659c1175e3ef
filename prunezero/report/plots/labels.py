"""Words on a picture that neither overlap each other nor hide a point."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from prunezero.report.quoting import picture_text

LONGEST_LABEL = 26
# Places around a point: first close by, then farther out; points (1/72 inch) right and up.
DISTANCES = (10, 24, 42, 64, 90)
DIRECTIONS = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))
FREE_WITHOUT_LINE = 20
PIXELS_BETWEEN_LINES = 14


def short(formula: str) -> str:
    """A formula that fits beside a point; a long one is cut and ends in an ellipsis."""
    return formula if len(formula) <= LONGEST_LABEL else formula[: LONGEST_LABEL - 1] + "…"


def place_labels(
    axes: Any,
    labels: Sequence[tuple[float, float, str, str]],
    points: Sequence[tuple[float, float]],
) -> None:
    """Write each (x, y, text, colour) beside its point where the fewest things are in the way.

    Labels placed first win. A label far from its point is joined to it by a thin line.
    """
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    legend = axes.get_legend()
    taken = [legend.get_window_extent(renderer)] if legend else []
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    marks = axes.transData.transform(points) if len(points) else np.empty((0, 2))
    for x, y, words, color in labels:
        note = axes.annotate(
            picture_text(words),
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            color=color,
            fontsize=10,
            zorder=8,
            path_effects=_halo(),
        )
        costs = {}
        for distance, direction in product(DISTANCES, DIRECTIONS):
            _move(note, distance, direction)
            box = note.get_window_extent(renderer).padded(2)
            costs[distance, direction] = distance / 40 + _cost(box, inside, taken, marks)
        distance, direction = min(costs, key=costs.__getitem__)
        _move(note, distance, direction)
        if distance > FREE_WITHOUT_LINE:
            _join(axes, (x, y), note.xyann, color)
        taken.append(note.get_window_extent(renderer).padded(2))


def _move(note: Any, distance: int, direction: tuple[int, int]) -> None:
    right, up = direction
    shrink = 0.75 if right and up else 1.0
    note.xyann = (right * distance * shrink, up * distance * shrink)
    note.set_ha(("center", "left", "right")[right])
    note.set_va(("center", "bottom", "top")[up])


def _join(axes: Any, point: tuple[float, float], offset: tuple[float, float], color: str) -> None:
    """A thin line from a point to its label, under all points."""
    line = {"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkA": 0, "shrinkB": 5}
    place = {"xytext": offset, "textcoords": "offset points"}
    axes.annotate("", point, arrowprops=line, zorder=2, **place)


def _halo() -> list[Any]:
    """A white rim, so that words stay readable over grid lines and points."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]


def _cost(box: Any, inside: Any, taken: list[Any], marks: Any) -> float:
    """How bad a place is: leaving the axes is worst, then covering words, then covering points."""
    fits = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
    words = sum(box.overlaps(other) for other in taken)
    across = (marks[:, 0] > box.x0 - 4) & (marks[:, 0] < box.x1 + 4)
    covered = across & (marks[:, 1] > box.y0 - 4) & (marks[:, 1] < box.y1 + 4)
    return 1000 * (not fits) + 100 * words + float(covered.sum())


def spread(axes: Any, lines: Sequence[tuple[float, str]], color: str) -> None:
    """Name horizontal lines at the right edge, moved apart where they would overlap."""
    axes.figure.canvas.draw()
    heights = [float(axes.transData.transform((0, value))[1]) for value, _ in lines]
    order = sorted(range(len(lines)), key=heights.__getitem__)
    floor = float("-inf")
    for index in order:
        value, words = lines[index]
        height = max(heights[index], floor + PIXELS_BETWEEN_LINES)
        floor = height
        axes.annotate(
            picture_text(words),
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(6, (height - heights[index]) * 72 / axes.figure.dpi),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=10,
            annotation_clip=False,
        )
