"""The table and the picture of `search_efficiency.py`, from the lines that it wrote."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from prunezero.report.plots.axes import INK, plain_log_ticks

REFERENCE = "plain-gp"
STRATEGIES = (
    "plain-gp evolution evolution-from-scratch random enumeration no-memory optuna"
).split()
# Okabe and Ito's colours, which colour-blind people tell apart, and a second sign for print.
STYLES = {
    "plain-gp": ("#000000", "-"),
    "evolution": ("#0072b2", "-"),
    "evolution-from-scratch": ("#56b4e9", "--"),
    "random": ("#e69f00", "-."),
    "enumeration": ("#009e73", ":"),
    "no-memory": ("#cc79a7", "--"),
    "optuna": ("#d55e00", "-."),
}
# A glance is perplexity and KL on a quarter of the search text.
GLANCE_SHARE = 0.25
# Results worse than this many times the best are above the picture.
SHOWN = 2.5


def work(point: dict[str, Any], *, validations: bool = False) -> float:
    """Evaluations with glances as quarters, and with those on validation text where asked for."""
    whole = point["evaluations"] + GLANCE_SHARE * point["glances"]
    return whole + point["validations"] * validations


def reached(row: dict[str, Any], target: float) -> dict[str, Any] | None:
    """The first point of a run that is at least as good as the target; None if there is none."""
    at = (one for one in row["points"] if one["search"] is not None and one["search"] <= target)
    return next(at, None)


def by_strategy(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs by strategy, in the order of `STRATEGIES`."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["strategy"]].append(row)
    return {name: found[name] for name in STRATEGIES if name in found}


def report(rows: list[dict[str, Any]]) -> list[str]:
    """The tables as Markdown, one for each pattern."""
    space = rows[0].get("space")
    spaces = (
        f"which like the others uses the space {space}, and nothing published"
        if space
        else "which uses the space pruner_zero and nothing published; the others use the space "
        "formulas"
    )
    lines = [
        "# What a search costs",
        "",
        f"![curves](search_efficiency{f'_{space}' if space else ''}.png)",
        "",
        f"{rows[0]['model']} in {rows[0]['dtype']}, {rows[0]['evaluation_tokens']} tokens of "
        "search and of validation text; made by `python benchmarks/search_efficiency.py"
        f"{f' --space {space}' if space else ''}`. Medians "
        "over seeds, with the smallest and largest in brackets. The target is the median of the "
        "best search perplexity "
        f"of `{REFERENCE}`, {spaces}, and only evolution and no-memory start from published "
        "formulas, of which `evolution-from-scratch` knows none. An evaluation is the perplexity "
        f"of one formula on all search text; `{REFERENCE}` is charged one for every formula, also "
        "for a mask that it has seen. A ratio is how many times more of them the reference needs "
        "to reach the target, by the median run: of evaluations; of evaluations and glances (KL on "
        "a quarter of the search text, counted as a quarter); of these and evaluations on "
        "validation text. "
        "A run that never reaches the target counts as infinite. Seconds are those that answers "
        "took when they were computed, until the end of a run.",
        "",
    ]
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        for sparsity in dict.fromkeys(row["sparsity"] for row in rows if row["pattern"] == pattern):
            chosen = [
                row for row in rows if (row["pattern"], row["sparsity"]) == (pattern, sparsity)
            ]
            lines += table(chosen, pattern if sparsity is None else f"{100 * sparsity:g} %")
    return lines


def table(rows: list[dict[str, Any]], title: str) -> list[str]:
    """The table of one pattern."""
    groups = by_strategy(rows)
    if REFERENCE not in groups:
        return []
    finals = [row["points"][-1]["search"] for row in groups[REFERENCE]]
    target = median([math.inf if value is None else value for value in finals])
    lines = [
        f"## {title}: target {target:.2f}",
        "",
        "| strategy | seeds | reached | evaluations to target | ratio | glances "
        "| ratio with glances | validations | ratio with all | final search | final validation "
        "| screened | seconds |",
        "|---" * 13 + "|",
    ]
    costs = {name: costs_of(group, target) for name, group in groups.items()}
    for name, group in groups.items():
        ends = [row["points"][-1] for row in group]
        there = [one for one in (reached(row, target) for row in group) if one is not None]
        ratios = [
            ratio(median(of_reference), median(mine))
            for of_reference, mine in zip(costs[REFERENCE], costs[name], strict=True)
        ]
        cells = [
            f"`{name}`",
            str(len(group)),
            str(len(there)),
            spread(costs[name][0], 0),
            ratios[0],
            spread([one["glances"] for one in there], 0),
            ratios[1],
            spread([one["validations"] for one in there], 0),
            ratios[2],
            spread([end["search"] for end in ends], 2),
            spread([end["validation"] for end in ends], 2),
            spread([end["screened"] for end in ends], 0),
            spread([end["seconds"] for end in ends], 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def costs_of(group: list[dict[str, Any]], target: float) -> tuple[list[float], ...]:
    """What each run paid until the target, counted in three ways; infinite if it never did."""
    there = [reached(row, target) for row in group]
    return (
        [math.inf if one is None else one["evaluations"] for one in there],
        [math.inf if one is None else work(one) for one in there],
        [math.inf if one is None else work(one, validations=True) for one in there],
    )


def ratio(reference: float, mine: float) -> str:
    """How many times more the reference needs; a bound where a run never got there."""
    if math.isinf(mine):
        return "not reached"
    return "not reached by the reference" if math.isinf(reference) else f"{reference / mine:.1f}"


def spread(values: Sequence[float | None], digits: int) -> str:
    """The median, and in brackets the smallest and largest."""
    known = [math.inf if value is None else float(value) for value in values]
    if not known:
        return "-"
    low, middle, high = (
        "never" if math.isinf(value) else f"{value:,.{digits}f}"
        for value in (min(known), median(known), max(known))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def best_at(row: dict[str, Any], evaluations: int) -> float:
    """The best search perplexity of a run after so many evaluations; infinite before the first."""
    values = [
        one["search"]
        for one in row["points"]
        if one["evaluations"] <= evaluations and one["search"] is not None
    ]
    return min(values, default=math.inf)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Best so far against evaluations charged: medians as lines, smallest to largest as bands."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["pattern"], row["sparsity"]) for row in rows))
    figure = Figure(figsize=(8 * len(panels), 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (pattern, sparsity) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        chosen = [row for row in rows if (row["pattern"], row["sparsity"]) == (pattern, sparsity)]
        title = pattern if sparsity is None else f"{100 * sparsity:g} % of the weights removed"
        axes.set_title(title, loc="left", fontsize=15, weight="bold", color=INK)
        draw_panel(axes, by_strategy(chosen))
    drawn = figure.axes[0].get_legend_handles_labels()
    title = "line: median over seeds; band: smallest to largest; dotted: where the reference ends"
    figure.legend(
        *drawn, loc="outside lower center", ncol=4, frameon=False, fontsize=11, title=title
    )
    figure.savefig(path)


def draw_panel(axes: Any, groups: dict[str, list[dict[str, Any]]]) -> None:
    """The curves of one pattern."""
    ends = []
    for name, group in groups.items():
        last = min(row["points"][-1]["evaluations"] for row in group)
        steps = range(1, last + 1)
        values = [[best_at(row, step) for row in group] for step in steps]
        middle = [median(one) for one in values]
        colour, line = STYLES[name]
        low, high = [min(one) for one in values], [max(one) for one in values]
        order = 5 if name in (REFERENCE, "evolution") else 3
        # A log axis has no place for infinity, which is what comes before the first result.
        drawn = [[min(value, 1e30) for value in one] for one in (low, middle, high)]
        axes.fill_between(steps, drawn[0], drawn[2], step="post", color=colour, alpha=0.13, lw=0)
        axes.step(
            steps, drawn[1], where="post", color=colour, ls=line, lw=2.4, label=name, zorder=order
        )
        axes.plot(steps[-1], drawn[1][-1], "o", color=colour, ms=6, zorder=order)
        ends += [value for value in (*low[-1:], *middle[-1:]) if math.isfinite(value)]
        if name == REFERENCE:
            axes.axhline(drawn[1][-1], color=INK, lw=1, ls=(0, (1, 3)), zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    longest = max(row["points"][-1]["evaluations"] for group in groups.values() for row in group)
    axes.set_xlim(1, longest * 1.1)
    if ends:
        axes.set_ylim(min(ends) / 1.03, min(ends) * SHOWN)
        plain_log_ticks(axes.yaxis, *axes.get_ylim())
    plain_log_ticks(axes.xaxis, *axes.get_xlim())
    axes.set_xlabel("evaluations charged: perplexity on all search text (log scale)", fontsize=12)
    axes.set_ylabel("best perplexity on search text (log scale, lower is better)", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=11)
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
