"""The table, the picture and the MLflow runs of `pruning.py`, from the lines that it wrote."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from tracking import log

from prunezero.report.plots.axes import INK

OURS = "prunezero"
# Okabe and Ito's colours, which colour-blind people tell apart.
COLOURS = {
    OURS: "#0072b2",
    "prunezero, dense": "#56b4e9",
    "straightforward": "#e69f00",
    "llm-compressor": "#009e73",
}
# Metric name in MLflow by key of a row.
METRICS = {
    "seconds": "seconds",
    "processor_seconds": "processor_seconds",
    "load_seconds": "load_seconds",
    "peak_mib": "peak_mib",
    "loaded_mib": "loaded_mib",
    "sparsity_reached": "sparsity",
    "test_perplexity": "perplexity",
}

Row = dict[str, Any]
# Target as people write it, and method.
Group = tuple[str, str]


def grouped(rows: list[Row]) -> dict[Group, dict[str, list[Row]]]:
    """Prunings by what was asked for, then by contender in the order of `COLOURS`."""
    found: dict[Group, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["contender"] in COLOURS:
            is_free = row["pattern"] == "free"
            target = f"{100 * row['sparsity']:g} %" if is_free else row["pattern"]
            found[target, row["method"]][row["contender"]].append(row)
    return {
        group: {name: members[name] for name in COLOURS if name in members}
        for group, members in found.items()
    }


def middle(rows: list[Row], key: str) -> float:
    """The median over repeats."""
    return median(row[key] for row in rows)


def report(rows: list[Row]) -> list[str]:
    """The table as Markdown, with the conditions above it."""
    one = rows[0]
    threads = threads_of(one)
    dense = [f"{row['test_perplexity']:.2f}" for row in rows if row["contender"] == "dense"]
    lines = [
        "# Seconds and memory of a whole pruning",
        "",
        "![seconds and peak memory](pruning.png)",
        "",
        f"{one['model']} in {one['dtype']} on a CPU ({one['cpu']}, {threads}); "
        f"{one['calibration_tokens']} tokens of calibration text in windows of "
        f"{one['sequence_length']}, seed {one['seed']}; {one['test_tokens']} tokens of test text "
        f"(dense perplexity {', '.join(dense) or 'not measured'}); made by "
        f"`python benchmarks/pruning.py`. {software(rows)}",
        "",
        "Medians over repeats, for seconds with the smallest and largest in brackets. Seconds are "
        "those of calibration and pruning, from the loaded model on, and the ratio is theirs to "
        "prunezero's. `straightforward` is a plain torch loop (`rivals_in_torch.py`). Peak is the "
        "most memory that the process held meanwhile, and behind it how much more that is than "
        "when pruning began. All contenders see the model as pruned so far, except "
        "`prunezero, dense`, on the same token windows.",
        "",
        "| target | method | contender | repeats | seconds | ratio | peak MiB | more than loaded "
        "| seconds to load | zeros | test perplexity |",
        "|---" * 11 + "|",
    ]
    for (target, method), contenders in grouped(rows).items():
        for name, members in contenders.items():
            cells = [target, f"`{method}`", name, str(len(members))]
            cells += numbers(members, contenders.get(OURS))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def numbers(members: list[Row], ours: list[Row] | None) -> list[str]:
    """The cells of one contender that are measured."""
    seconds = sorted(row["seconds"] for row in members)
    shown = f"{median(seconds):.1f}"
    if len(seconds) > 1:
        shown += f" ({seconds[0]:.1f} to {seconds[-1]:.1f})"
    peak = middle(members, "peak_mib")
    ratio = "-" if ours is None else f"{median(seconds) / middle(ours, 'seconds'):.2f}"
    return [
        shown,
        ratio,
        f"{peak:,.0f}",
        f"{peak - middle(members, 'loaded_mib'):,.0f}",
        f"{middle(members, 'load_seconds'):.1f}",
        f"{100 * middle(members, 'sparsity_reached'):.3f} %",
        f"{middle(members, 'test_perplexity'):.2f}",
    ]


def threads_of(row: Row) -> str:
    """How many threads each contender had, for reading."""
    return f"{row['threads']} thread" + "s" * (row["threads"] != 1)


def software(rows: list[Row]) -> str:
    """Which versions each contender ran with."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if "versions" in row:
            named = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
            found[named].add(row["contender"])
    names = [f"{' and '.join(sorted(who))} with {named}" for named, who in found.items()]
    return f"Versions: {'; '.join(names)}."


def draw(rows: list[Row], path: Path) -> None:
    """One bar of seconds for every pruning, with its peak memory behind it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = grouped(rows)
    count = sum(map(len, groups.values())) + len(groups)
    figure = Figure(figsize=(10, 1.6 + 0.36 * count), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    place, ticks, longest = 0.0, [], 0.0
    for contenders in groups.values():
        ticks.append(place + (len(contenders) - 1) / 2)
        for name, members in contenders.items():
            seconds = middle(members, "seconds")
            longest = max(longest, seconds)
            axes.barh(place, seconds, height=0.86, color=COLOURS[name], label=name)
            words = f" {seconds:.1f} s, {middle(members, 'peak_mib'):,.0f} MiB"
            axes.text(seconds, place, words, va="center", fontsize=10, color=INK)
            place += 1
        place += 0.8
    axes.set_yticks(ticks, [f"{method}, {target}" for target, method in groups])
    axes.set_xlim(0, longest * 1.22 or 1)
    axes.invert_yaxis()
    finish(figure, axes, rows[0])
    figure.savefig(path)


def finish(figure: Any, axes: Any, one: Row) -> None:
    """Title, legend and lines."""
    figure.suptitle(
        f"A whole pruning of {one['model']}: seconds and peak memory",
        x=0.01,
        ha="left",
        fontsize=15,
        weight="bold",
        color=INK,
    )
    axes.set_xlabel(
        f"seconds of calibration and pruning ({one['calibration_tokens']:,} tokens, "
        f"{one['dtype']}, CPU, {threads_of(one)}; lower is better)",
        fontsize=12,
        color=INK,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=11)
    axes.grid(axis="x", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    drawn = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncol=4, frameon=False)


def to_mlflow(rows: list[Row], conditions: Row, runs: Path, artifacts: tuple[Path, ...]) -> None:
    """One run with table and picture, and below it one for every contender of every target."""
    children = []
    for (target, method), contenders in grouped(rows).items():
        for name, members in contenders.items():
            asked = conditions | {"target": target, "method": method, "contender": name}
            metrics = {METRICS[key]: middle(members, key) for key in METRICS}
            children.append((f"{method} {target} {name}", asked, metrics))
    log("pruning", conditions, children, runs=runs, artifacts=artifacts)
