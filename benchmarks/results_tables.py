"""The tables of docs/results/README.md, each from the lines of one measurement."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import efficiency_report
import found_report
import methods
import scoring_report
from published_selection import FORMULAS

from prunezero.formula.features import FEATURES
from prunezero.pruning.recipes.recipe import Recipe

Row = dict[str, Any]
# So many measurements of search text are early in a search.
EARLY = 12
STRATEGIES = {
    "evolution": "evolution",
    "no-memory": "without the memory of masks",
    "evolution-from-scratch": "without published formulas to start from",
    "random": "random formulas, which climb the same ladder",
    "enumeration": "enumeration from the smallest formula on",
    efficiency_report.REFERENCE: "genetic programming as Pruner-Zero published it",
}
NEEDS = {
    "activations": "forward pass",
    "gradients": "backward pass",
    "second order": "Gram matrices",
}
# What a recipe does beyond ranking weights by its formula.
DEEDS = {
    "ria_permuted": "RIA, channels moved by linear sum assignment",
    "owl": "Wanda, blocks with more outliers lose less",
    "alphapruning": "Wanda, blocks with heavier-tailed spectra lose less",
    "dsnot": "Wanda's mask, exchanges by DSnoT",
    "admm": "Wanda's mask, kept weights fitted again",
    "isc": "`W**2*(H + 1/V)`, swept by `obs`",
    "sparsegpt": "`W**2/U**2`, swept by `obs`",
    "prune_and_tune": "SparseGPT in three steps, short training after each",
}
# What these need beside the signals of their formulas.
ALSO_NEEDS = {
    "alphapruning": ["SVD"],
    "admm": ["Gram matrices"],
    "prune_and_tune": ["backward pass"],
}
GPU_SHAPES = {
    "4096x11008": ("product", "wanda"),
    "11008x4096": ("product",),
    "576x576": ("wanda",),
}
CPU_SHAPES = ("1536x576", "4096x4096")
MASKS = {"rows": "50 % by rows", "2:4": "2:4"}


def strategies(rows: list[Row]) -> list[str]:
    """What each strategy has found early: medians over seeds."""
    columns = {"2:4": "2:4", "free": "50 %"}
    lines = [f"| after {EARLY} perplexities | {' | '.join(columns.values())} |", "|---|---|---|"]
    for strategy, told in STRATEGIES.items():
        cells = []
        for pattern in columns:
            wanted = (strategy, pattern)
            runs = [row for row in rows if (row["strategy"], row["pattern"]) == wanted]
            # The same seed may stand there with a longer run, which saw the same at first.
            seeds = {row["seed"]: efficiency_report.best_at(row, EARLY) for row in runs}
            cells.append(f"{median(seeds.values()):.1f}" if seeds else "not measured")
        lines.append(f"| {told} | {' | '.join(cells)} |")
    return lines


def formulas(rows: list[Row]) -> list[str]:
    """Formulas that rank and do nothing else, by dense statistics."""
    lines = [
        "| recipe | formula | compares | needs | 50 % | 2:4 | published |",
        "|---|---|---|---|---|---|---|",
    ]
    chosen = [row for row in rows if row["statistics"] == "dense"]
    for name, (free, pattern) in by_recipe(chosen).items():
        published = shown(free, "published_perplexity")
        cells = [shown(free), shown(pattern), published]
        if name == "dense":
            lines.append(f"| (dense) | | | | {' | '.join(cells)} |")
            continue
        recipe = Recipe.load(name)
        head = [f"`{name}`", f"`{recipe.criterion.text}`", recipe.compare, needs(recipe)]
        lines.append(f"| {' | '.join([*head, *cells])} |")
    return lines


def mending(rows: list[Row]) -> list[str]:
    """Recipes that mend weights, spread the sparsity or move channels, by sequential statistics."""
    lines = [
        "| recipe | what it does | needs | seconds | 70 % | 2:4 | published 70 % / 2:4 |",
        "|---|---|---|---|---|---|---|",
    ]
    chosen = [row for row in rows if row["statistics"] == "sequential"]
    for name, pair in by_recipe(chosen).items():
        free, pattern = pair
        told = [shown(row, "published_perplexity") for row in pair]
        published = told[0] if name == "dense" or told == ["-", "-"] else " / ".join(told)
        cells = [shown(free), shown(pattern), published]
        if name == "dense":
            lines.append(f"| (dense) | | | | {' | '.join(cells)} |")
            continue
        recipe = Recipe.load(name)
        what = DEEDS.get(name, f"`{recipe.criterion.text}`")
        seconds = next(f"{row['seconds']}" for row in pair if row)
        head = [f"`{name}`", what, needs(recipe), seconds]
        lines.append(f"| {' | '.join([*head, *cells])} |")
    return lines


def by_recipe(rows: list[Row]) -> dict[str, tuple[Row, Row]]:
    """The row without a pattern and that of 2:4 by recipe; empty where it was not measured."""
    found: dict[str, tuple[Row, Row]] = {}
    for row in rows:
        free, pattern = found.get(row["recipe"], ({}, {}))
        is_dense = row["recipe"] == "dense"
        free = row if is_dense or row["pattern"] == "free" else free
        pattern = row if is_dense or row["pattern"] != "free" else pattern
        found[row["recipe"]] = free, pattern
    return found


def shown(row: Row, key: str = "test_perplexity") -> str:
    """A perplexity; - where there is none. Published ones have as many digits as their papers."""
    value = row.get(key)
    if value is None:
        return "-"
    return f"{value:.2f}" if key == "test_perplexity" else f"{value}"


def needs(recipe: Recipe) -> str:
    """What has to be collected for a recipe."""
    symbols = {str(symbol) for one in recipe.formulas for symbol in one.sympy.free_symbols}
    signals = [FEATURES[name].cost for name in symbols]
    words = [NEEDS[signal] for signal in NEEDS if signal in signals]
    words += ALSO_NEEDS.get(recipe.name, [])
    if "Gram matrices" in words:
        words.remove("forward pass") if "forward pass" in words else None
    text = ", ".join(dict.fromkeys(words)) or "nothing"
    return text.replace("forward pass, backward pass", "forward and backward pass")


def main_methods(rows: list[Row]) -> list[str]:
    """Test perplexity of the main methods under equal conditions."""
    return methods.table(rows, "test")


def scoring_on_gpu(rows: list[Row]) -> list[str]:
    """Some matrices on a GPU, against published code and one `topk`."""
    lines = [
        "| matrix | formula, mask | kernel, of a copy's bandwidth "
        "| whole call: times as fast as published code | as one `topk` |",
        "|---|---|---|---|---|",
    ]
    on_gpu = [row for row in scoring_report.latest(rows) if row["device"] != "cpu"]
    for shape, names in GPU_SHAPES.items():
        matrix = shape
        for name in names:
            for request, mask in MASKS.items():
                kernel, call, topk = (
                    contender(on_gpu, shape, name, request, one)
                    for one in ("kernels", "prunezero", "topk")
                )
                quicker = scoring_report.speed_up(call, on_gpu) or 0.0
                than_topk = quicker / (scoring_report.speed_up(topk, on_gpu) or 1.0)
                share = scoring_report.bandwidth(kernel, on_gpu) or 0.0
                cells = [matrix, f"`{FORMULAS[name].text}`, {mask}", f"{100 * share:.0f} %"]
                lines.append(f"| {' | '.join([*cells, times(quicker), times(than_topk)])} |")
                matrix = ""
    return lines


def scoring_on_cpu(rows: list[Row]) -> list[str]:
    """Some matrices on a processor: how many times as fast as published code."""
    names = {"wanda": "`abs(W)*X`", "product": "`abs(W)*G`", "mixed": "roots, logarithm and tanh"}
    heads = [f"{told}, {mask}" for told in names.values() for mask in ("rows", "2:4")]
    lines = [f"| matrix | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    on_cpu = [row for row in scoring_report.latest(rows) if row["device"] == "cpu"]
    for shape in CPU_SHAPES:
        found = [
            scoring_report.speed_up(contender(on_cpu, shape, name, request, "prunezero"), on_cpu)
            for name in names
            for request in MASKS
        ]
        lines.append(f"| {shape} | {' | '.join(times(one or 0.0) for one in found)} |")
    return lines


def contender(rows: list[Row], shape: str, name: str, request: str, who: str) -> Row:
    """The one row of this work."""
    keys = ("part", "shape", "formula", "request", "contender")
    wanted = ("matrix", shape, name, request, who)
    (row,) = [row for row in rows if tuple(row[key] for key in keys) == wanted]
    return row


def times(number: float) -> str:
    """A ratio in two digits, or in whole numbers from 10 on."""
    return f"{number:.0f}" if number >= 9.95 else f"{number:.1f}"


TABLES: dict[str, tuple[str, Callable[[list[Row]], list[str]]]] = {
    "found": ("found", lambda rows: found_report.summary(found_report.gathered(rows))),
    "strategies": ("search_efficiency", strategies),
    "formulas": ("compare", formulas),
    "mending": ("compare", mending),
    "main methods": ("methods", main_methods),
    "scoring on a GPU": ("scoring", scoring_on_gpu),
    "scoring on a processor": ("scoring", scoring_on_cpu),
}
