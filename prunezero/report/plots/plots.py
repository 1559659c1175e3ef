"""Three pictures of a search: cost of simplicity, truth of the proxy, progress.

Rows are flat dicts with the keys of `candidates.COLUMNS`; baselines also have a `name`, and a row
whose `role` (or name) is "dense" is drawn as the floor. Rows without the numbers of a picture are
left out of it. Colours are Okabe and Ito's, and shapes repeat what colours say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from prunezero.errors import OutputError, reason
from prunezero.files.atomic import replace_whole
from prunezero.report.plots.axes import bulk, canvas, perplexity_axis, plain_log_ticks
from prunezero.report.plots.labels import place_labels, short, spread
from prunezero.searching.evaluation.rung_correlation import kendall_tau

Row = Mapping[str, Any]

BASELINE = "#d55e00"
FRONT = "#000000"
# Signal -> (colour, marker).
SIGNALS = {
    "none": ("#e69f00", "s"),
    "activations": ("#0072b2", "o"),
    "gradients": ("#009e73", "^"),
    "second order": ("#cc79a7", "D"),
    "full map": ("#f0e442", "P"),
    "oracle": ("#56b4e9", "v"),
}
LABELLED_FORMULAS = 6
# Times the best perplexity; farther methods are named at the top edge instead.
FAR_WORSE = 2.5


def pareto(candidates: Sequence[Row], baselines: Sequence[Row], path: Path) -> None:
    """The best perplexity that each formula size allows, with the published criteria named."""
    figure, axes = canvas("What a simpler formula costs", "size of the formula (symbols)")
    found = _with_numbers(candidates, "complexity", "search_perplexity")
    named = _with_numbers(_pruned(baselines), "complexity", "search_perplexity")
    shown = [*found, *named]
    _scatter_by_signal(axes, found, "complexity")
    front = pareto_front(found)
    if front:
        axes.step(*_columns(front, "complexity"), where="post", color=FRONT, lw=1.6, zorder=3)
        axes.scatter(*_columns(front, "complexity"), s=46, fc="none", ec=FRONT, lw=1.6, zorder=5)
    axes.scatter(
        *_columns(named, "complexity"),
        marker="*",
        s=150,
        color=BASELINE,
        ec="white",
        lw=0.8,
        zorder=6,
        label="published",
    )
    perplexity_axis(axes, shown, keep=_near_best(shown, [*front, *named]))
    _dense_line(axes, baselines)
    sizes = [row["complexity"] for row in shown]
    if sizes:
        axes.set_xlim(min(sizes) - 1, max(sizes) + 1 + 0.12 * (max(sizes) - min(sizes)))
    labels = [(row, short(row["formula"]), FRONT) for row in _spaced(front, LABELLED_FORMULAS)]
    labels += [(row, row["name"], BASELINE) for row in named]
    _legend(axes)
    top = axes.get_ylim()[1]
    place_labels(
        axes,
        [(r["complexity"], _value(r), text, color) for r, text, color in labels if _value(r) < top],
        [*((row["complexity"], _value(row)) for row in shown), *_along(front)],
    )
    save_picture(figure, path)


def proxy_against_truth(candidates: Sequence[Row], path: Path) -> None:
    """Layer error, the cheap proxy, against perplexity, with Kendall's tau in the title."""
    found = _with_numbers(candidates, "layer_error", "search_perplexity")
    found = [row for row in found if row["layer_error"] > 0]
    tau = kendall_tau(*_columns(found, "layer_error"))
    told = f"Kendall τ = {tau:.2f}" if math.isfinite(tau) else "too few candidates to tell"
    figure, axes = canvas(
        f"Does the layer error foretell perplexity?  {told}",
        "gradient-weighted layer error (log scale)",
    )
    _scatter_by_signal(axes, found, "layer_error")
    axes.set_xscale("log")
    if found:
        low, high = bulk([row["layer_error"] for row in found], [])
        axes.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
        plain_log_ticks(axes.xaxis, *axes.get_xlim())
    perplexity_axis(axes, found, keep=[])
    _legend(axes)
    save_picture(figure, path)


def progress(candidates: Sequence[Row], baselines: Sequence[Row], path: Path) -> None:
    """The best perplexity so far against candidates screened, with the methods it passed."""
    figure, axes = canvas("How the search got there", "candidates proposed")
    found = sorted(_with_numbers(candidates, "slot", "search_perplexity"), key=_slot)
    named = _with_numbers(_pruned(baselines), "search_perplexity")
    shown = [*found, *named]
    perplexity_axis(axes, shown, keep=_near_best(shown, named))
    last = max((row["slot"] for row in candidates), default=0) + 1
    _scatter_by_signal(axes, found, "slot", faint=True)
    if found:
        best = np.minimum.accumulate([_value(row) for row in found])
        steps = np.array([row["slot"] + 1 for row in found])
        axes.step([*steps, last], [*best, best[-1]], where="post", color=FRONT, lw=2.2, zorder=5)
        axes.annotate(
            f"{best[-1]:.2f}",
            (last, best[-1]),
            xytext=(-4, -6),
            textcoords="offset points",
            ha="right",
            va="top",
            weight="bold",
        )
    axes.set_xlim(0, max(last, 1) * 1.01)
    low, high = axes.get_ylim()
    named = [row for row in named if low <= _value(row) <= high]
    for row in named:
        axes.axhline(_value(row), color=BASELINE, lw=1, ls=(0, (4, 3)), zorder=2)
    _dense_line(axes, baselines)
    _legend(axes)
    spread(axes, [(_value(row), f"{row['name']}  {_value(row):.2f}") for row in named], BASELINE)
    save_picture(figure, path)


def pareto_front(rows: Sequence[Row], value: Callable[[Row], float] | None = None) -> list[Row]:
    """Rows that no row of equal or smaller size beats, from small to large.

    Args:
        value: of a row, lower is better; None takes its perplexity on search text.
    """
    of = value or _value
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["complexity"], of(row))):
        if not front or of(row) < of(front[-1]):
            front.append(row)
    return front


def _along(front: Sequence[Row]) -> list[tuple[float, float]]:
    """Points on the front's line, which labels should not cover either."""
    return [
        (float(size), _value(row))
        for row, following in pairwise(front)
        for size in np.linspace(row["complexity"], following["complexity"], 60)
    ]


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure as PNG, complete or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, lambda beside: figure.savefig(beside, format="png"))
    except OSError as error:
        raise OutputError(f"the picture {path} cannot be written: {reason(error, path)}") from error


def _scatter_by_signal(axes: Any, rows: list[Row], key: str, *, faint: bool = False) -> None:
    for signal, (color, marker) in SIGNALS.items():
        members = [row for row in rows if (row.get("signal") or "none") == signal]
        if members:
            axes.scatter(
                *_columns(members, key, shift=key == "slot"),
                marker=marker,
                s=26 if faint else 34,
                color=color,
                alpha=0.45 if faint else 0.7,
                lw=0,
                zorder=3 if faint else 4,
                label=f"uses {signal}" if signal != "none" else "weights only",
            )


def _dense_line(axes: Any, baselines: Sequence[Row]) -> None:
    """The unpruned model as a floor, where it is on the picture or just below it."""
    for row in baselines:
        if not _is_dense(row) or not is_number(row.get("search_perplexity")):
            continue
        low, high = axes.get_ylim()
        if _value(row) < low / 1.5:
            return
        axes.set_ylim(min(low, _value(row) / (high / low) ** 0.05), high)
        axes.axhline(_value(row), color="#7f7f7f", lw=1.2, ls=":", zorder=2)
        axes.annotate(
            f"dense model  {_value(row):.2f}",
            (0.005, _value(row)),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color="#595959",
            fontsize=10,
        )


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="#dddddd")


def _near_best(rows: Sequence[Row], wanted: Sequence[Row]) -> list[Row]:
    """The wanted rows that are not far worse than the best of all."""
    best = min((_value(row) for row in rows), default=0.0)
    return [row for row in wanted if _value(row) <= FAR_WORSE * best]


def _spaced(rows: list[Row], count: int) -> list[Row]:
    """At most `count` rows, evenly taken, the first and the last among them."""
    if len(rows) <= count:
        return rows
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


def _columns(rows: Sequence[Row], key: str, *, shift: bool = False) -> tuple[list[Any], list[Any]]:
    return [row[key] + int(shift) for row in rows], [_value(row) for row in rows]


def _with_numbers(rows: Sequence[Row], *keys: str) -> list[Row]:
    return [row for row in rows if all(is_number(row.get(key)) for key in keys)]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _pruned(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not _is_dense(row)]


def _is_dense(row: Row) -> bool:
    return "dense" in (row.get("role"), row.get("name"))


def _value(row: Row) -> float:
    return float(row["search_perplexity"])


def _slot(row: Row) -> int:
    return int(row["slot"])
