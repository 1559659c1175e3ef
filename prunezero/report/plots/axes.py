"""Axes that a person can read: plain numbers, a log scale, and a range around what matters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunezero.report.quoting import picture_text

INK = "#333333"
PERPLEXITY_LABEL = "perplexity on the search text (log scale, lower is better)"

Row = Mapping[str, Any]


def canvas(title: str, horizontal: str) -> tuple[Any, Any]:
    """A figure of 1000 x 650 pixels with one pair of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 6.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=15, weight="bold", color=INK, pad=14)
    axes.set_xlabel(horizontal, fontsize=12, color=INK)
    axes.set_ylabel(PERPLEXITY_LABEL, fontsize=12, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=11)
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    # Sizes and counts are whole numbers; a log axis sets its own ticks afterwards.
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure, axes


def perplexity_axis(axes: Any, rows: list[Row], keep: list[Row]) -> None:
    """A log axis around what matters; worse rows leave it at the top and are counted there."""
    axes.set_yscale("log")
    if not rows:
        return
    low, high = bulk(
        [row["search_perplexity"] for row in rows], [row["search_perplexity"] for row in keep]
    )
    axes.set_ylim(low / (high / low) ** 0.1, high * (high / low) ** 0.12)
    plain_log_ticks(axes.yaxis, *axes.get_ylim())
    worse = [row for row in rows if row["search_perplexity"] > axes.get_ylim()[1]]
    if worse:
        names = [
            f"{row['name']} {row['search_perplexity']:,.1f}" for row in worse if row.get("name")
        ]
        words = f"↑ {len(worse)} worse" + (f", among them {', '.join(names)}" if names else "")
        place = {"transform": axes.transAxes, "ha": "right", "va": "bottom"}
        axes.text(1.0, 1.005, picture_text(words), color=INK, **place)


def bulk(values: Sequence[float], keep: Sequence[float]) -> tuple[float, float]:
    """The range of positive values without the far tail on the right, wide enough for `keep`.

    A search's failures are thousands of times worse than its finds, and would squash them.
    """
    lower, upper = np.quantile(np.log(values), (0.25, 0.75))
    fence = math.exp(upper + 1.5 * (upper - lower))
    inside = [value for value in values if value <= fence]
    low = min(*values, *keep) if keep else min(values)
    return low, max([*inside, *keep, low * 1.2])


def plain_log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at round, plain numbers: a log axis of less than a decade would have none."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

    wide = high / low > 6
    if wide:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**power for power in decades for step in (1, 2, 5)]
    else:
        ticks = [float(tick) for tick in MaxNLocator(8).tick_values(low, high) if tick > 0]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(_plain_number))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(FixedLocator([]))


def _plain_number(value: float, position: int | None = None) -> str:
    return f"{value:,.10g}" if value >= 1e-3 else f"{value:.0e}"
